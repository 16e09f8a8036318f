"""Figures in the README's tables, and most of those between them, are those of the files under results/ that it names."""
import json
import os

import pytest

import report
from conftest import ROOT

WORDS = ' '.join(open(os.path.join(ROOT, 'README.md'), encoding='utf-8').read().split())


def result(name):
    with open(os.path.join(ROOT, 'results', name)) as f:
        return json.load(f)


def says(*cells):
    """Whether the README has a row of a table that begins with these cells, or this sentence."""
    return (' '.join(f"| {' | '.join(cells)} |".split()) if len(cells) > 1 else cells[0]) in WORDS


@pytest.mark.parametrize('name', ['compare_shakespeare', 'compare_shakespeare_short'])
def test_side_by_side(name):
    for m in result(f'{name}/report.json')['models']:
        assert says(m['name'], f"{m['loss']:.4f} ± {m['sd']:.4f}", f"{m['tokens_per_s']:,.0f}", f"{m['flops_per_token']:,.0f}")


def test_side_by_side_in_words():
    r = result('compare_shakespeare/report.json')
    fold, same, twice, full, dropped = (m['loss'] for m in r['models'])
    assert says(f"window: {same - fold:.4f} below it, {(same - fold) / r['same_window']['sd']:.1f} standard deviations")
    assert says(f"({twice - fold:.4f} below)") and says(f"({full - fold:.4f} below),")
    assert says(f"of the {dropped - fold:.4f} that it loses {dropped - same:.4f} are these cold starts")
    assert says(f"what the carry adds to a scoring with a stride is the {same - fold:.4f} above.")
    flops, time = (r['full_window'][what]['fold'] for what in ('FLOPs', 'time'))
    assert says(f"at equal FLOPs it stands at {flops:.4f}, at equal time at {time:.4f}")


def test_distances_from_the_other_gpts():
    fold, _, *others = result('compare_shakespeare/report.json')['models']
    twice, full = ((m['loss'] - fold['loss']) / max(m['sd'], fold['sd']) for m in others[:2])
    assert says(f"{twice:.1f} and {full:.1f} standard deviations")


def test_weight_decay():
    fold, gpt, fold_decayed, all_global, gpt_decayed = (f"{r['val_loss']:.4f}" for r in result('weight_decay_search.json')['runs'])
    assert says(f"1 + 3 layers from {fold} to {fold_decayed} and the GPT of window 12 from {gpt} to {gpt_decayed}, and "
                f"0 + 4 layers have {all_global} at 0.1")


def test_ablations():
    first, *others = result('compare_shakespeare/report.json')['ablations']
    for m in [{**first, 'name': 'none'}, *others]:
        assert says(m['name'], f"{m['loss']:.4f}", f"{m['loss'] - first['loss']:+.4f}")


# --- needle ---------------------------------------------------------------------------------------------------------

def recalled(name):
    return [f"{row['right']} of {row['sequences']}" for row in result(f'needle/{name}.json')['recall']]


@pytest.mark.parametrize('seed', range(1337, 1342))
def test_needle(seed):
    distances = [f"{row['distance']:,}" for row in result(f'needle/fold_gated_{seed}.json')['recall']]
    assert says('filler, seed', *distances[:-1], f'{distances[-1]} tokens') and says(f'symbols, {seed}', *recalled(f'fold_gated_{seed}'))


def test_needle_on_two_cores():
    r = result('needle/fold_gated_1337_two_cores.json')
    assert says(f"took {r['minutes']:.1f} minutes on a calm day, {r['training_minutes']:.1f} of them training") and r['minutes'] < 20
    assert recalled('fold_gated_1337_two_cores') == recalled('fold_gated_1337')


def test_needle_among_text():
    *near, last = recalled('fold_gated_text_1337')
    assert says('Shakespeare, 1337', *near, f'{last} at 100,000')


def test_needle_of_the_gpt():
    a, b, c, *rest = recalled('gpt_24_1337')
    assert says(f"recalls {a} keys at 0 and 6 tokens of filler, {c.split()[0]} of 200 at 12, and none of 200 at 48")
    assert a == b and set(rest) == {'0 of 200'}
    a, b, *rest = recalled('gpt_12_1337')
    assert says(f"recalls {a} at 0, {b.split()[0]} at 6, and none from 12 on") and set(rest) == {'0 of 200'}


@pytest.mark.parametrize('kind', ['gated', 'plain'])
@pytest.mark.parametrize('seed', [1337, 1338, 1339])
def test_plain_and_gated_needle(kind, seed):
    r = result(f'needle/fold_{kind}_{seed}.json')
    first, right = r['first_0.99_at_probe_distance'], {row['distance']: f"{row['right']} of {row['sequences']}" for row in r['recall']}
    assert says(f'{kind}, {seed}', f"{first['iter']:,} updates" if first else 'never',
                f"{first['seconds'] / 60:.1f}" if first else '', *(right[d] for d in (192, 12288, 49152, 1000000)))


@pytest.mark.parametrize('l, C, heads', [(12, 64, 2), (12, 128, 4), (24, 64, 2), (24, 128, 4)])
def test_many_needles(l, C, heads):
    r = result(f'pairs/l{l}_{C}ch_1337.json')
    assert r['sizes']['segment_size'] == l and r['sizes']['n_embd'] == C and r['config']['places'] == 'turn'
    shares = [f"{r['recall'][n - 1]['recall']:.3f}" for n in (4, 8, 10, 11, 12, 16, 20, 22, 24, 32)]
    assert says(f'{l}, {C}, {heads}', f"{r['log'][-1]['iter']:,}, {r['training_minutes']:.1f}", *shares, str(r['held_at_0.9']))
    last = r['recall'][27]['in_order'][-(l - 2):]  # of 28 pairs
    assert (min(last) > 0.95 or (l, C) == (12, 64)) and max(r['recall'][27]['in_order'][:-l]) < 0.25


@pytest.mark.parametrize('name', ['12_64ch_1337', '12_64ch_1338_small_places', '12_64ch_1337_small_places', '12_64ch_4heads_1337',
                                  '12_128ch_1337', '12_128ch_1338', '12_128ch_1337_usual_start', '24_64ch_4heads_1337'])
def test_starts_of_many_needles(name):
    r = result(f'pairs/l{name}.json')
    c, log, scale = r['config'], r['log'], 1 if 'small' in name else 8
    passed = max(row['iter'] for row in log if row['lesson'] == 1)
    start = f'place_scale {scale}' if c['matched'] else 'usual start'
    assert says(f"{c['n_embd']} channels, {c['n_head']} heads, {start}, seed {c['seed']}" + ', window 24' * (c['segment_size'] == 24), f"{log[-1]['iter']:,}",
                f'{passed:,}' if passed < log[-1]['iter'] else 'never', str(r['held_at_0.9']))


def test_needles_that_waited():
    r = result('pairs/l12_128ch_1337_waited.json')
    assert r['config']['wait'] == 100 and says(f"recalled as before ({r['recall'][9]['recall']:.3f}, 12 tokens a segment")


# --- speed and memory -----------------------------------------------------------------------------------------------

def test_generation():
    table = result('generation.json')['table']
    for fold, gpt in zip(*([row for row in table if row['model'] == kind] for kind in ('fold', 'gpt'))):
        assert says(f"{fold['context']:,}", *(f"{row[key]:,.0f}" for row in (fold, gpt) for key in ('tokens_per_s', 'state_bytes')))


def test_generation_ratios():
    r = result('generation.json')
    (flat, ahead, at_once), (flat_of_medians, ahead_of_medians) = r['ratios'].values(), r['ratios_of_medians'].values()
    assert says(f"runs at {flat:.3f} of the speed") and says(f"the ratio of the medians is {flat_of_medians:.3f}")
    assert says(f"It is {ahead:.1f} times as fast (by the medians {ahead_of_medians:.1f} times)")
    assert says(f"{at_once:.1f} times as fast at once")
    assert says(f"held {r['resident_mb']['10000']:.1f} MB after 10,000 tokens and {r['resident_mb']['1000000']:.1f} MB")


def fastest(size, mode):
    """A mode's row in one process or two, whichever is faster."""
    return max((size[mode], size[f'{mode}, 2 processes']), key=lambda side: side['tokens_per_s'])


def test_training_speed():
    names = {'full': 'full', 'truncated': 'truncated (16 segments)', 'recomputed': 'recomputed', 'gpt': 'GPT'}
    files = [list(result(name)['speed'].values()) for name in ('training.json', 'training_torch.json')]
    for sizes in files:
        for mode, name in names.items():
            cells = []
            for size in sizes:
                cells += [f"{size[side]['tokens_per_s']:,.0f}" for side in (mode, f'{mode}, 2 processes')]
                cells.append('1' if mode == 'gpt' else f"{fastest(size, mode)['efficiency']:.3f}")
            assert says(name, *cells)
    more = [size['full']['flops_per_token'] / size['gpt']['flops_per_token'] for size in files[0]]
    assert says("the fold has {:.3f} and {:.3f} times the GPT's".format(*more))
    (small, large), (small_torch, large_torch) = files
    reached = [[fastest(size, mode)['efficiency'] >= 0.95 for mode in ('full', 'truncated')]
               for size in (small, large, small_torch, large_torch)]
    assert reached == [[False, False], [True, True], [True, True], [True, True]], "what the page says of 0.95"
    gains = [fastest(a, mode)['tokens_per_s'] / fastest(b, mode)['tokens_per_s']
             for a, b in ((small, small_torch), (large, large_torch)) for mode in ('full', 'gpt')]
    assert says("trains the fold {:.2f} times as fast and the GPT {:.2f} times (6 + 6 layers: {:.2f} and {:.2f} times).".format(*gains))
    ends = [f"{end(fastest(size, mode)['by_start']):.3f}" for size in (small, large, small_torch, large_torch)
            for mode in ('full', 'truncated') for end in (min, max)]
    assert says("By oneDNN's products, 2 + 2 layers, the starts lie between {} and {} in full, between {} and {} truncated; 6 + 6 layers "
                "between {} and {}, and {} and {}; by torch's own, 2 + 2 layers, between {} and {}, and {} and {}; 6 + 6 layers between "
                "{} and {}, and {} and {}.".format(*ends))
    assert all(fastest(small, mode) is small[f'{mode}, 2 processes'] for mode in ('full', 'truncated'))
    assert all((start >= 0.95) == side for size, sides in zip((small, large, small_torch, large_torch), reached)
               for mode, side in zip(('full', 'truncated'), sides) for start in fastest(size, mode)['by_start'])
    assert says("In these runs every start lies on the side of 0.95 of its median.")


def test_a_needle_with_another_rounding():
    found = {row['distance']: row['right'] for row in result('needle/fold_gated_1339_other_rounding.json')['recall']}
    assert set(found.values()) == {192} and says(f"recalled 192 of 200 at each distance up to {max(found):,}")


def test_what_was_tried_in_training():
    tried = result('training_tried.json')
    assert says("the fold calls {fold} products an update where the GPT calls {gpt}".format(**tried['products_of_an_update']))
    assert 9 < tried['microseconds_of_a_24x24_product']['onednn'] < 11
    two, one = tried['tokens_per_s_two_threads'], tried['tokens_per_s_one_thread']
    gains = [rates['gpt, compiled'] / rates['gpt'] - 1 for rates in (one, two)]
    assert says("with which the GPT trains {:.0f} to {:.0f} % faster".format(*(100 * gain for gain in gains)))
    assert all(round(1 - rates['fold, written-out blocks compiled'] / rates['fold, written out'], 2) == 0.05 for rates in (one, two))
    again = tried['efficiency_of_2_2_layers_in_another_run_commit_f9dce3e_two_threads']
    assert says("had {full:.3f} and {truncated:.3f} by oneDNN's".format(**again))
    third = tried['efficiency_of_2_2_layers_in_another_run_commit_ba19004_two_processes']
    assert says("in a third (commit ba19004) {full:.3f} and {truncated:.3f}.".format(**third))
    full = fastest(result('training.json')['speed']['2+2x128x4'], 'full')['efficiency']
    assert says(f"the fold of 2 + 2 layers has some {full / (1 + gains[1]):.2f};")
    whole = tried['tokens_per_s_two_processes_commit_0064921_whole_sequence_compiled']
    assert says("compiled at once ({} seconds of compiling; {:,} and {:,} tokens/s in two runs with two processes, written out {:,} and {:,})"
                .format(whole['seconds_of_compiling'], *whole['compiled'], *whole['written out']))
    assert says("took {full}, {truncated}, {recomputed} and {gpt} MB for 192".format(**tried['memory_mb_at_192_tokens_commit_f3df4be_by_torchs_products']))


def test_the_summary():
    needles = [{row['distance']: row['right'] for row in result(f'needle/fold_gated_{seed}.json')['recall']} for seed in range(1337, 1342)]
    assert all(right[1_000_000] == 100 for right in needles) and says("100 of 100, with each of five seeds; one")
    assert all(row['right'] == 0 for row in result('needle/gpt_24_1337.json')['recall'] if row['distance'] >= 48)
    most = [result(f'pairs/l{l}_{C}ch_1337.json')['held_at_0.9'] for l in (24, 12) for C in (64, 128)]
    assert most[0] == most[1] and says("{1} with a window of 24, {2} or {3} with one of 12.".format(*most))
    names = [name for name in os.listdir(os.path.join(ROOT, 'results', 'pairs')) if 'waited' not in name]
    runs = [r for r in (result(f'pairs/{name}') for name in names) if r['config']['matched']]
    found = [r['held_at_0.9'] >= r['sizes']['segment_size'] - 2 for r in runs]
    assert (sum(found), len(found)) == (5, 9) and says("Five of nine runs found it.") and says("five of nine with the ring")
    python, shakespeare = ({m['name']: {'kept': False, **m} for m in result(f'{name}/report.json')['models']}
                           for name in ('compare_python_longest', 'compare_shakespeare'))
    full = python['GPT, window 384']
    contexts = [python['fold']['preserved_context'][0], full['preserved_context'][0]]
    assert says("of Python source {}, where what is older than 96 is worth 0.001 nats".format(contexts[0]))
    assert says("uses {}, the most that was tried, copies words from afar, and is {:.2f} nats better.".format(contexts[1], python['fold']['loss'] - full['loss']))
    pairs = [(models['fold'], models['GPT, window 12']) for models in (shakespeare, python)]
    assert says("by {:.3f} nats on Shakespeare and {:.3f} on Python".format(*(b['loss'] - a['loss'] for a, b in pairs)))
    assert says("with {:.1f} to {:.1f} times the computation.".format(*sorted(a['flops_per_token'] / b['flops_per_token'] for a, b in pairs)))
    wins = [stands['fold'] < stands['GPT, window 12'] for stands in (report.standing(a, b)['FLOPs'] for a, b in pairs)]
    assert wins == [False, True] and says("At equal computation it wins on Python and loses on Shakespeare;")
    memory = {point['block_size']: point['peak_mb'] for point in result('training.json')['memory']['truncated']}
    assert abs(memory[49152] / memory[192] - 1) < 0.05


def test_what_paid_in_training():
    ms = result('training_ways.json')['ms']
    sides = 'fold, automatic', 'fold, written out', 'GPT'
    assert says('freed memory given back', *(f"{ms[side]:.1f}" for side in sides))
    assert says('kept', *(f"{ms[side + ', kept']:.1f}" for side in sides))


def test_training_memory():
    found = {mode: {p['block_size']: p for p in points} for mode, points in result('training.json')['memory'].items()}
    for T in (192, 768, 3072, 12288, 49152):
        assert says(f'{T:,}', *(f"{found[m][T]['training_mb']:,.1f}" if T <= 3072 or m in ('truncated', 'recomputed') else ''
                               for m in ('full', 'truncated', 'recomputed', 'gpt')))
    last, first = found['truncated'][49152], found['truncated'][192]
    whole, grown = (f'{last[key] / first[key] - 1:.1%}'.replace('%', ' %') for key in ('peak_mb', 'training_mb'))
    assert says(f"within {whole} of what it does at 192; of training alone that is {grown}.") and last['peak_mb'] < 1.05 * first['peak_mb']
    more, full = ((found[mode][b]['training_mb'] - found[mode][a]['training_mb']) / (b - a) * 12
                  for mode, a, b in (('recomputed', 24576, 49152), ('full', 1536, 3072)))
    carry = 16 * 12 * 128 * 4 / 1e6  # (B, l, C) of float32, in MB
    assert says(f"costs {1000 * more:.0f} kB, of which its carry is {1000 * carry:.0f} kB; full back-propagation costs {full:.1f} MB, "
                f"{full / more:.0f} times as much.") and more < 1.3 * carry


def test_longest_sequences():
    r = result('training.json')['longest']
    assert says(f"can have {r['full']['block_size']:,} tokens in full, {r['gpt']['block_size']:,} with the GPT")
    assert r['truncated']['block_size'] == r['recomputed']['block_size'] == 196608
    assert says(f"(196,608 tokens take {r['truncated']['peak_mb']:.0f} MB and {r['recomputed']['peak_mb']:.0f} MB)")


# --- text -----------------------------------------------------------------------------------------------------------

def test_two_runs():
    for name, label in (('fold_shakespeare', 'fold, 1 local + 3 global layers'), ('gpt_shakespeare', 'GPT, 4 layers')):
        r = result(f'{name}.json')
        assert f"| {label} | `python train.py config/{name}.py` | **{r['loss']:.4f}** ± {r['error']:.3f} |" in WORDS
    minutes = result('gpt_shakespeare.json')['minutes']
    assert says(f'{int(minutes)} min {minutes % 1 * 60:.0f} s')
    assert says('nats', *(f'{x:.2f}' for x in result('fold_shakespeare.json')['by_place']))


def test_two_runs_again():
    fold, gpt, by_torch, automatic = result('shakespeare_again.json')['runs'].values()
    assert says("by oneDNN's products, took {:.1f} minutes and give the fold {:.4f} ± {:.3f}, {:.1f} minutes and the GPT {:.4f} ± {:.3f};".format(
        *(run[key] for run in (fold, gpt) for key in ('minutes', 'loss', 'error'))))
    assert says("the fold by torch's own {:.4f}, and with automatic differentiation besides {:.4f}".format(by_torch['loss'], automatic['loss']))
    was = result('fold_shakespeare.json')['loss']
    assert was < min(run['loss'] for run in (fold, by_torch, automatic)) and result('gpt_shakespeare.json')['loss'] > gpt['loss']


def test_context_curve():
    table = {row['history']: row['loss']['mean'] for row in result('probe/shakespeare_fold.json')['context_curve']}
    shown = (0, 12, 24, 36, 48, 72, 144, 288)
    assert says('tokens of history before the segment', *map(str, shown))
    assert says('nats per character', *(f'{table[c]:.4f}' for c in shown))


def test_what_moves_the_reach():
    found = {run['name']: run for run in result('compare_python_reach/report.json')['runs'] if 'failed' not in run}
    loss = {name: run['loss'] for name, run in found.items()}
    preserved = {name: run['probe']['preserved_context'] for name, run in found.items()}
    for name in found:
        shown = {'fold, short': 'none', '0 + 4 layers, weight decay 0.5': f'**7,372,800 characters, {name}**'}.get(name, name)
        assert says(shown, f'{loss[name]:.4f}', f'{preserved[name]}')
    half = 'half the tokens an update'
    assert says(f"by {loss['fold, short'] - loss[half]:.3f}; streams raise it by {loss['streams'] - loss['fold, short']:.3f}")
    gain = next(row['gain'] for row in found[half]['probe']['context_curve'] if row['history'] == 192)
    assert says(f"({1e7 * gain['mean']:.1f}e-7, interval {1e7 * gain['low']:.1f}e-7 to {1e7 * gain['high']:.1f}e-7, at 192, {half})")
    assert sum(length > 150 for length in preserved.values()) == 3 and says("three of these pass 150 characters")


@pytest.mark.parametrize('name, shown', [('compare_python_long', (0, 12, 24, 48, 96, 144, 192, 360)), ('compare_bpe', (0, 12, 24, 48, 84))])
def test_text_beside_its_controls(name, shown):
    for run in result(f'{name}/report.json')['runs']:
        if 'failed' not in run:
            losses, kept = {row['history']: row['loss']['mean'] for row in run['probe']['context_curve']}, run['probe']['preserved_context']
            assert says(run['name'], f"{run['loss']:.4f}", *(f'{losses[c]:.4f}' for c in shown), 'none' if kept is None else str(kept))


def test_text_beside_its_controls_in_words():
    runs = {run['name']: run['probe'] for run in result('compare_python_long/report.json')['runs'] if 'failed' not in run}
    plain, gated = runs['fold'], runs['fold, gated carry']
    assert says(f"plain carry preserves {plain['preserved_context']} characters") and says(f"the gated one {gated['preserved_context']}")
    gain = next(row['gain'] for row in plain['context_curve'] if row['history'] == plain['preserved_context'])
    assert says(f"{gain['mean']:.5f} nats (interval {gain['low']:.5f} to {gain['high']:.5f})")
    word = next(row['difference'] for row in plain['co_occurrence'] if row['from'] == 48)
    assert says(f"{-word['mean']:.3f} nats, interval {-word['high']:.3f} to {-word['low']:.3f}")
    word = {row['from']: row['difference']['mean'] for row in runs['GPT, window 384']['co_occurrence']}
    assert says(f"The GPT of window 384 does: {-word[96]:.3f} nats at 96 to 149 characters and {-word[150]:.3f} at 150 to 335")
    losses = {run['name']: run['loss'] for run in result('compare_python_long/report.json')['runs'] if 'failed' not in run}
    assert says(f"its loss is {losses['GPT, window 384'] - losses['fold']:.3f} above the fold's")


def test_byte_pairs_in_words():
    losses = {run['name']: run['loss'] for run in result('compare_bpe/report.json')['runs']}
    fold, same, twice, dropped = (losses[name] for name in ('fold', 'GPT, window 12', 'GPT, window 24', 'fold, carry dropped'))
    assert says(f"The fold is {same - fold:.4f} ahead of the GPT of its own window and {fold - twice:.4f} behind that of window 24. "
                f"Without its carry it loses {dropped - fold:.4f}, of which {dropped - same:.4f} are cold starts")


def test_the_longest_run():
    r = result('compare_python_longest/report.json')
    runs, models = ({run['name']: run for run in r[key] if 'failed' not in run} for key in ('runs', 'models'))
    fold, same, full = (runs[name] for name in ('fold', 'GPT, window 12', 'GPT, window 384'))
    table, far = ({row['history']: row for row in run['probe']['context_curve']} for run in (fold, full))
    shown = (0, 12, 24, 48, 96, 144, 168, 192, 240, 300, 360)
    assert says('Python, 18,432,000 characters', 'validation loss', *map(str, shown), 'preserved context')
    for run in runs.values():
        losses = {row['history']: f"{row['loss']['mean']:.4f}" for row in run['probe']['context_curve']}
        preserved = run['probe']['preserved_context']
        assert says(run['name'], f"{run['loss']:.4f}", *(losses[c] for c in shown), 'none' if preserved is None else str(preserved))
    assert says(f"The fold's preserved context is {fold['probe']['preserved_context']} characters.")
    gains = {c: "{mean:.5f} ({low:.5f} to {high:.5f})".format(**table[c]['gain']) for c in (144, 168, 192)}
    assert says("What is older than 96 is worth {mean:.5f} nats (interval {low:.5f} to {high:.5f}), than 144 ".format(**table[96]['gain'])
                + f"{gains[144]}, than 168 {gains[168]}, than 192 {gains[192]}.")
    near, old = ((row['words'], *(f"{-row['difference'][key]:.{digits}f}" for key in ('mean', 'high', 'low'))) for digits, row in
                 zip((4, 5), result('probe/python_longest_words.json')['co_occurrence']))
    assert says("{1} nats (interval {2} to {3}, {0:,} words), and at 150 to 335, ".format(*near) + "{1} nats ({2} to {3}, {0:,} words)".format(*old))
    flops, twice = (report.standing(models['fold'], models[f'GPT, window {n}'])['FLOPs'] for n in (12, 24))
    assert says(f"the fold is {same['loss'] - fold['loss']:.4f} ahead at equal tokens and, read part-way through its training, "
                f"{flops['GPT, window 12'] - flops['fold']:.4f} at equal FLOPs; against that of window 24 "
                f"{runs['GPT, window 24']['loss'] - fold['loss']:.4f} ahead at equal tokens and {twice['fold'] - twice['GPT, window 24']:.4f} "
                f"behind at equal FLOPs.")
    dropped = runs['fold, carry dropped']['loss']
    assert says(f"Without its carry it loses {dropped - fold['loss']:.4f}, of which {dropped - same['loss']:.4f} are cold starts")
    shakespeare = {m['name']: m['tokens_per_s'] for m in result('compare_shakespeare/report.json')['models']}
    slower = shakespeare['GPT, window 12'] / shakespeare['fold']
    then = report.at(fold['curve'], 18_432_000 / slower)
    assert says(f"{slower:.1f} times as slowly as the GPT of window 12, as on Shakespeare, it would stand at {then:.3f} at equal time, "
                f"{then - same['loss']:.3f} behind that.")
    halfway = [dict(map(tuple, run['curve']))[9_216_000] for run in (full, fold)]
    assert says("(at 9,216,000 characters {:.4f} against {:.4f}) and ends ".format(*halfway) + f"{fold['loss'] - full['loss']:.4f} below it")
    words = [-row['difference']['mean'] for row in full['probe']['co_occurrence'] if row['from'] != 48]
    assert says("gain {:.2f} nats from a last occurrence 24 to 47 characters back, {:.2f} at 96 to 149, {:.2f} at 150 to 335".format(*words))
    worth = [rows[96]['gain']['mean'] for rows in (far, table)]
    assert says(f"what is older than 96 is worth {worth[0]:.3f} nats to it, {worth[0] / worth[1]:.0f} times as much as to the fold.")
