"""
Side by side: train models on the same task, probe and sample each, report which is ahead.

    python compare.py config/compare_shakespeare.py               # hours on two CPU cores
    python compare.py config/compare_shakespeare.py --quick=True  # a few updates a run, to try it

Each run is one of train.py in a folder of its own. Ctrl-C stops, and the same command goes on from
there. A run that fails is reported, does not stop the others, and is tried again by the next call.
"""
import lib.start  # noqa: F401 (before torch)
import asyncio
import json
import math
import os
import re
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from itertools import product
from pathlib import Path
from subprocess import PIPE, Popen

import probe
from configurator import at_least, configure, defaults_of, hint, is_helper, numbers, run_file
from lib import report
from lib.console import Progress, count, require, say
from lib.contract import find_model
from lib.device import choose_compile, pick_device, set_threads
from lib.files import PICTURE, RECORD, check_kind, check_place, own_folder, write_file
from lib.processes import Stop, end_on_signals
from lib.records import ROOT, load_record, result_path, save_record
from tasks import find_task

comparison = ''      # the file that lists the runs, such as config/compare_shakespeare.py
out_dir = ''         # folder of the runs and the report; '' is out/NAME of the comparison file
jobs = 0             # runs at a time; 0 is one on a GPU, two on a CPU
threads = 1          # CPU threads of each
seeds = ''           # in place of the file's, separated by commas
quick = False        # a few updates a run and small probes, in folders of their own
only = ''            # names of the runs to work on, separated by semicolons; '' is all
record = False       # write into results/ as well, which the docs are made from
data_dir = 'data'    # folder of the prepared data sets
device = 'auto'      # 'auto' takes cuda, mps or cpu, the first that is there

# keys of a comparison file, and their defaults; without `probe` runs are not probed
KEYS = {'seeds': [1337], 'tokens': 0, 'updates': 0, 'budgets': [], 'common': {}, 'runs': {},
        'probe': {}, 'prompts': [], 'new_tokens': 200}
BUDGETS = 'flops', 'seconds'  # equal to the first run's, beside equal tokens: runs of their own
EACH = {'seeds': int, 'prompts': str, 'budgets': str, 'runs': dict}  # what these are made of
# the files of a run, and the mark by which check_kind knows each
FILES = {'record.json': RECORD, 'probe.json': RECORD, 'samples.json': b'"prompts": ',
         'settings.json': b'"gradient_accumulation_steps": '}
# settings of probe.py that are not a comparison file's to set
OURS = {'out_dir', 'init_from', 'record', 'data_dir', 'seed', 'device', 'threads', 'file'}
# settings of train.py that are not a run's to set
PLANNED = {'seed', 'max_iters', 'eval_interval', 'checkpoint_interval', 'out_dir', 'overwrite',
           'data_dir', 'device', 'threads'}
UPDATE = 'batch_size', 'block_size', 'gradient_accumulation_steps'  # their product is its tokens
QUICK = {'log_interval': 1, 'warmup_iters': 1}  # with 4 updates
CALIBRATION = 40_000, 3  # tokens and rounds of the runs that tell what a token costs
QUICK_PROBE = {'histories': '0,12,24', 'targets': 10, 'words': 5, 'resamples': 20,
               'distances': '12,48', 'sequences': 8, 'most': 2}

def read_json(path):
    """The dictionary in a file; {} if there is none, or it is damaged."""
    with suppress(OSError, ValueError, TypeError, RecursionError):  # TypeError: no dictionary
        return {**json.loads(Path(path).read_text(encoding='utf-8'))}
    return {}

@dataclass
class Run:
    """One model to train, and the folder of all that comes of it."""
    name: str        # in the tables
    budget: str      # of those that are equal; ', ' between several
    seed: int
    settings: dict   # of train.py
    tokens: int      # that it is trained on
    folder: Path
    results: dict    # {file in the folder: the settings that it is to be made with}

    def __post_init__(self):
        self.error = self.conflict()  # why it cannot be complete

    def read(self, name):
        """The JSON in a file of its folder; {} if there is none."""
        return read_json(self.folder / name)

    def write(self, name, value):
        write_file(self.folder / name, lambda f: f.write(json.dumps(value).encode()))

    def has(self, name):
        """Whether a result is there, and was made with the settings that are wanted now."""
        settings = self.read(name).get('settings')
        return isinstance(settings, dict) and self.results[name].items() <= settings.items()

    def complete(self):
        return not self.error and all(self.has(name) for name in self.results)

    def done(self):
        """Tokens that it has been trained on, by its log's updates; a tenth less until probed."""
        log = self.folder / 'log.jsonl'
        found = re.findall(r'"iter": (\d+)', log.read_text() if log.exists() else '')
        share = 0.9 * max(map(int, found), default=0) / self.settings['max_iters']
        return self.tokens * (1 if self.complete() else share)

    def conflict(self):
        """What its folder holds in place of it: a run with another setting; '' if there is none.
        Raises SystemExit if that is of another program."""
        for name, mark in FILES.items():
            check_kind(self.folder / name, mark)
        begun = {*glob('*', root_dir=self.folder)} - {'settings.json', 'log.jsonl'}
        before = self.read('settings.json') if begun else self.settings
        for key in sorted({**before, **self.settings}):
            then, now = before.get(key), self.settings.get(key)  # None is train.py's own
            if then != now:
                return (f'{os.path.relpath(self.folder)} holds a run with another {key}, {then!r} '
                        f'in place of {now!r}: delete it, or take another out_dir')
        return ''

def read_comparison(name):
    """What a comparison file says, checked. Raises SystemExit for what cannot be meant."""
    require(name, 'name a comparison: python compare.py config/compare_shakespeare.py')
    given = {key: value for key, value in run_file(name, ROOT).items() if not is_helper(value)}
    require(given.get('runs'), f'{name} lists no runs: a comparison does; for one, take train.py')
    for key, value in given.items():
        require(key in KEYS, f'{name}: unknown key {key!r}: {hint(key, KEYS)}')
        kind = type(KEYS[key])
        require(type(value) is kind,
                f'{name}: {key} must be of type {kind.__name__}, not {value!r}')
        for one in (value.values() if kind is dict else value) if key in EACH else ():
            require(type(one) is EACH[key],
                    f'{name}: each of {key} must be of type {EACH[key].__name__}, not {one!r}')
    c = {**KEYS, **given}
    require(c['seeds'] and len({*c['seeds']}) == len(c['seeds']),
            f'{name}: seeds must be different numbers, at least one, not {c["seeds"]}')
    require((c['tokens'] > 0) != (c['updates'] > 0),
            f'{name}: tokens or updates must be above 0, and the other 0')
    require({*c['budgets']} <= {*BUDGETS} and len({*c['budgets']}) == len(c['budgets']),
            f'{name}: budgets must be some of {BUDGETS}, each once, not {c["budgets"]}')
    require(c['tokens'] or not c['budgets'], f'{name}: budgets take tokens in place of updates')
    known = defaults_of(probe).keys() - OURS
    for key in c['probe']:
        require(key in known, f'{name}: unknown key of probe {key!r}: {hint(key, known)}')
    for run in c['runs']:
        settings, _ = settings_of(c, run)
        known = keys_of(settings) - PLANNED
        for key in settings:
            require(key not in PLANNED, f'{name}: {key} of run {run!r} is set by compare.py')
            require(key in known, f'{name}: unknown key {key!r} of run {run!r}: {hint(key, known)}')
    require(len({folder_of('', run) for run in c['runs']}) == len(c['runs']),
            'two runs have names that differ in no letter or digit: rename one')
    return c

def keys_of(settings):
    """Keys that a run may have: of train.py, which is not run for that, its task and its model."""
    script = Path(__file__).with_name('train.py').read_text(encoding='utf-8')
    sources = (find_task(settings.get('task', 'text')),
               find_model(settings.get('model_type', 'fold'))[0])
    return {*re.findall(r'^(\w+) = \S+ +# ', script, re.M)}.union(*map(defaults_of, sources))

def settings_of(c, name):
    """The settings of a run but its length, and the tokens of its update. SystemExit if none are
    named."""
    settings = {'gradient_accumulation_steps': 1, **c['common'], **c['runs'][name]}
    sizes = [settings.get(key) for key in UPDATE]
    update = math.prod(n if type(n) is int and n > 0 else 0 for n in sizes)
    require(settings.get('task', 'text') == 'text' or not (c['tokens'] or c['prompts']),
            f'run {name!r}: tasks but text take `updates` in place of `tokens`, and no `prompts`')
    require(update and c['tokens'] % update == 0,
            f'run {name!r}: {", ".join(UPDATE)} must be whole numbers from 1 on whose product, '
            f'the tokens of an update, divides tokens={c["tokens"]}, not {sizes}')
    return settings, update

def few_tokens(settings):
    """Tokens to score where a run is short."""
    return 2000 + 2 * settings['block_size']

def folder_of(folder, *names):
    return Path(folder, '_'.join(re.sub(r'\W+', '_', str(name)).strip('_') for name in names))

def plan(c, folder, costs, quick=False):
    """All runs: of `updates`, or as many as pass `tokens`, or cost what the first run's do. costs:
    {name: {budget: of a token}}."""
    found, first, base = [], next(iter(c['runs'])), 'tokens' if c['tokens'] else 'updates'
    samples = {'prompts': c['prompts'], 'new_tokens': 20 if quick else c['new_tokens']}
    asked = {**c['probe'], **(QUICK_PROBE if quick else {})}
    for budget, seed, name in product([base, *c['budgets']], c['seeds'], c['runs']):
        if name == first and budget != base:
            continue  # the first run is the measure: at other budgets it is the same run
        settings, update = settings_of(c, name)
        ours, its = (costs.get(run, {}).get(budget) for run in (first, name))
        share = ours / its if ours and its else 1
        is_text = settings.get('task', 'text') == 'text'
        iters = 4 if quick else c['updates'] or max(1, round(c['tokens'] * share / update))
        settings.update(seed=seed, max_iters=iters, eval_interval=max(1, iters // 6),
                        checkpoint_interval=max(1, iters // 20), **(QUICK if quick else {}),
                        **({'eval_tokens': few_tokens(settings)} if quick and is_text else {}))
        results, full = {'record.json': {}}, budget == base
        if full and c['probe']:
            results['probe.json'] = asked
        if full and c['prompts'] and seed == c['seeds'][0]:
            results['samples.json'] = samples
        names = (name, seed) if full else (name, budget, seed)
        equal = ', '.join([base, *c['budgets']]) if name == first else budget
        found.append(Run(name, equal, seed, settings, iters * update, folder_of(folder, *names),
                         results))
        if not (quick or full or ours and its):
            found[-1].error = 'what its tokens cost is not known: its short runs failed'
    return found

async def call(s, script, **flags):
    """Run a script; returns what it printed. Raises SystemExit with its last line of complaint if
    it fails. If this is canceled, it is told to stop; asyncio.run then waits for the thread."""
    flags = {**flags, 'device': s.device, 'threads': s.threads}
    child = Popen([sys.executable, script, *(f'--{key}={value}' for key, value in flags.items())],
                  stdout=PIPE, stderr=PIPE, encoding='utf-8', errors='replace', cwd=ROOT,
                  env={**os.environ, 'PYTHONUTF8': '1'}, start_new_session=True)  # without Ctrl-C
    try:
        printed, complaint = await asyncio.to_thread(child.communicate)
    except asyncio.CancelledError:
        child.terminate()
        raise
    if child.returncode:
        raise SystemExit([f'{script} ended with {child.returncode}', *complaint.splitlines()][-1])
    return printed

async def calibrate(s, c, folder):
    """What a token costs each run, {run: {'flops': FLOPs, 'seconds': wall clock}}: of short runs in
    turns, s.jobs at a time; kept in the folder, with the settings that were measured."""
    path, slots = Path(folder, 'calibration.json'), asyncio.Semaphore(s.jobs)
    check_place(path, b'"flops": ')
    costs, (tokens, rounds) = read_json(path), CALIBRATION
    how = {'jobs': s.jobs, 'threads': s.threads, 'device': s.device}

    async def one(name):
        settings, update = settings_of(c, name)
        n, where = max(6, tokens // update), folder_of(folder, 'calibration', name)
        updates = 0 if settings.get('document') else c['tokens'] // update  # as in train.py
        settings['compile'] = choose_compile(settings.get('compile', 'auto'),  # of the long run
                                             pick_device(s.device), updates)
        flags = {**settings, 'max_iters': n, 'eval_interval': n, 'log_interval': max(1, n // 6),
                 'eval_tokens': few_tokens(settings), 'overwrite': True,
                 'data_dir': s.data_dir, 'out_dir': where}
        try:
            async with slots:
                await call(s, 'train.py', **flags)
            return load_record(where / 'record.json')['metrics']
        except SystemExit:  # which the run itself will report
            return {}
    of = {name: {**settings_of(c, name)[0], **how} for name in c['runs']}
    names = [name for name in of if costs.get(name, {}).get('of') != of[name]]
    turns = [await asyncio.gather(*map(one, names)) for _ in range(rounds)] if names else []
    for name, found in zip(names, zip(*turns)):
        if not all(found):
            continue
        rates = [metrics['tokens_per_s']['value'] for metrics in found]
        costs[name] = {'of': of[name], 'flops': found[0]['flops_per_token']['value'],
                       'seconds': 1 / statistics.median(rates)}
        say(f"{name}: {costs[name]['flops']:,.0f} FLOPs and {1e6 * costs[name]['seconds']:,.0f} "
            'microseconds a token')
    if costs:
        write_file(path, lambda f: f.write(json.dumps(costs).encode()))
    return costs

async def work(s, run, slots):
    """Do what is missing of a run, once a slot is free; what goes wrong is kept in run.error."""
    asked, samples = map(run.results.get, ('probe.json', 'samples.json'))
    last = run.folder / 'last.pt'
    async with slots:
        try:
            if run.error:
                raise SystemExit(run.error)
            if not run.has('record.json'):
                start = {'init_from': 'resume'} if last.exists() else {'overwrite': True}
                run.write('settings.json', run.settings)
                task = find_task(run.settings.get('task', 'text'))
                if 'data_dir' in defaults_of(task):
                    start['data_dir'] = s.data_dir
                await call(s, 'train.py', **{**run.settings, **start, 'out_dir': run.folder})
            require(run.has('record.json'), 'train.py was stopped before its end')
            if asked and not run.has('probe.json'):
                await call(s, 'probe.py', **asked, out_dir=last, data_dir=s.data_dir)
            if samples and not run.has('samples.json'):
                texts = [await call(s, 'sample.py', start=prompt.replace('\\', r'\\'), seed=1337,
                                    max_new_tokens=samples['new_tokens'], out_dir=last)
                         for prompt in samples['prompts']]
                run.write('samples.json', {'settings': samples, 'texts': texts})
        except (SystemExit, OSError) as error:
            run.error = str(error)
    state = f'failed: {run.error}' if run.error else 'complete'
    say(f'{run.name}, equal {run.budget}, seed {run.seed}: {state}')

async def work_on(s, runs):
    """Work on all runs, s.jobs at a time, and show how far they are; a signal ends it."""
    slots, before = asyncio.Semaphore(s.jobs), sum(run.done() for run in runs)
    progress = Progress('comparison', sum(run.tokens for run in runs) - before)
    jobs = {asyncio.create_task(work(s, run, slots)) for run in runs}
    stop = Stop()
    while jobs and not stop.wanted():
        _, jobs = await asyncio.wait(jobs, timeout=1)
        progress.at(sum(run.done() for run in runs) - before, f"{count(len(jobs), 'run')} to go")
    progress.close()
    stop.done()
    if stop.wanted():
        raise SystemExit('stopped; the same command goes on from here')

def main(s):
    at_least(s, jobs=0, threads=0)
    set_threads(s.threads)
    s = s.replace(jobs=s.jobs or (2 if pick_device(s.device) == 'cpu' else 1))
    require(not (s.record and s.quick), 'no --record with --quick: results/ is for real runs')
    c = read_comparison(s.comparison)
    if s.seeds:
        c['seeds'] = numbers('seeds', s.seeds)
    chosen = [text.strip() for text in s.only.split(';')] if s.only else c['runs']
    for text in chosen:
        require(text in c['runs'], f'only={text!r} is none of the runs: {"; ".join(c["runs"])}')
    name = os.path.basename(s.comparison).removesuffix('.py') + '_quick' * s.quick
    folder = s.out_dir or result_path(name, False)
    own_folder(folder)
    for file, mark in (('comparison.json', RECORD), ('report.md', b'# Side by side'),
                       ('loss.png', PICTURE), ('context.png', PICTURE), ('recall.png', PICTURE)):
        check_place(os.path.join(folder, file), mark)
    if s.record:
        check_place(result_path(f'{name}.json', True), RECORD)
    end_on_signals()  # until work_on() answers them, and short runs end, too
    needed = c['budgets'] and not s.quick
    runs = plan(c, folder, asyncio.run(calibrate(s, c, folder)) if needed else {}, s.quick)
    wanted = [run for run in runs if run.name in chosen]
    asyncio.run(work_on(s, wanted))
    require(any(run.complete() for run in wanted),
            f'no run is complete in {folder}; a report there is kept')
    result = report.make(c, runs, s)
    failed = [run for run in wanted if not run.complete()]
    save_record(os.path.join(folder, 'comparison.json'), result)
    report.write(result, folder)
    say(f'written to {os.path.relpath(folder)}{os.sep}: report.md, comparison.json and pictures')
    require(not failed, f'{len(failed)} of {len(wanted)} runs are not complete')
    if s.record:
        save_record(result_path(f'{name}.json', True), result)

if __name__ == '__main__':
    main(configure(globals(), positional='comparison'))
