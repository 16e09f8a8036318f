"""Measure a trained model by its task: how far back it uses text, or how well it remembers.

    python probe.py --out_dir=out/fold_shakespeare
    python probe.py out/fold_shakespeare --file=book.txt --targets=500

Text: the loss of the validation split. Context curve: the loss of the tokens of a segment if all
but the c tokens before it is taken away. Preserved context: the largest c beyond which history is
still worth 0.005 nats per token. Remote co-occurrence: the loss of a word with and without the one
place where it stood last. Copying: the loss of a word but its first character, with that place and
with another word in it. Needle, track, facts: right answers against distance. Pairs, mqar: against
their number.
"""
import lib.start  # noqa: F401 (before torch)
import os
import re
from glob import glob
from pathlib import Path

from configurator import Settings, at_least, configure, defaults_of, merge
from lib import checkpoint as ckpt
from lib.console import require, say
from lib.contract import count_parameters
from lib.device import set_up
from lib.files import PICTURE, RECORD, check_place
from lib.pictures import curves
from lib.records import ROOT, make_record, metric, result_path, save_record
from lib.streaming import check_reading
from prepare import load_meta
from tasks import find_task

# run
out_dir = ''        # run's folder or checkpoint; '' takes the newest run under out/
init_from = ''      # in place of a run: weights of another program, as train.py takes them; with
                    # --file, and the result goes into out_dir, or out/probe_NAME
record = False      # write into results/, which the docs are made from, not the run's folder
data_dir = 'data'   # folder of the prepared data sets
seed = 1337         # of the bootstrap, and of the keys hidden in a file
device = 'auto'     # 'auto' takes cuda, mps or cpu, the first that is there
threads = 0         # CPU threads; 0: as many as there are idle cores
# text
file = ''           # text to score, or to hide a key in, with a result of its own under out/; ''
                    # is what belongs to the run
histories = '0,12,24,36,48,60,72,96,120,144,168,192,240,288'  # tokens before a segment, rounded up
                    # to whole segments; the last is the reference
segment = 12        # tokens of a target segment, where the model has no segments of its own
targets = 2000      # segments that are scored under every history, evenly spread over the text
words = 400         # words scored in every bin of remote co-occurrence and of copying
bins = '12,24,48,96,150,336,1000'  # borders of these bins, tokens back to where the word stood last
stretches = 100     # contiguous parts of the text that the bootstrap draws from
resamples = 2000    # bootstrap samples
# needle, track, facts, pairs and mqar
sequences = 200     # fresh sequences at each distance, or for each number of pairs
# needle, track and facts
distances = '12,48,192,768,3072,12288,49152,1000000'  # tokens read before the question
far = 100000        # from this distance on there are far_sequences
far_sequences = 100  # fresh sequences at far distances
keys = 1            # hidden in a file, one in each of so many copies
# pairs
most = 32           # recall is measured for 1, 2, ... pairs up to so many
wait = 0            # segments of filler between the last pair and the questions

def main(p):
    at_least(p, segment=1, targets=2, words=2, stretches=2, resamples=20, threads=0, sequences=1,
             far_sequences=1, keys=1, most=1, wait=0)
    require(p.resamples <= 10 ** 6, f'resamples={p.resamples} must be at most 1,000,000')
    require(not p.file or os.path.exists(p.file), f'{p.file} is not there: give a text with --file')
    device = set_up(p.device, p.threads)
    path = os.path.abspath(ckpt.find_file(p.init_from or p.out_dir or ckpt.newest_run()))
    saved = ckpt.load(path)
    task, config = find_task(saved['task'], 'probe'), saved.get('config', {})
    needed = {'segment_size': 12, 'seed': 1337, **defaults_of(task)}
    missing = [key for key in needed if key not in config and saved['task'] != 'text']
    require(not missing, f'{path} does not say its {", ".join(missing)}: probe runs of train.py')
    merge(config, Settings(needed))  # refuses values of other kinds
    require(not p.file or saved['task'] == 'text' or saved.get('tokenizer'), f'{path} knows no '
            f'text: file is for text, facts, and needles trained with --filler=text')
    model = ckpt.load_model(saved, device=device).eval()
    check_reading(model)
    folder, data = os.path.dirname(path), saved.get('data', {})
    name = os.path.basename(folder) + (p.file and f'_{Path(p.file).stem}')
    if p.file or p.init_from or os.path.basename(path) not in ckpt.FILES:  # not a run's own result
        folder = (p.init_from and p.out_dir) or result_path(f'probe_{name}', False)
        os.makedirs(folder, exist_ok=True)
    corpus = os.path.basename(p.file) or data.get('dataset', saved['task'])
    kind = 'probe' if saved['task'] == 'text' else saved['task']
    place = os.path.join(folder, 'probe.json')
    target = result_path(f'{kind}/{name}.json', True) if p.record else place
    check_place(target, RECORD)
    for picture in ('probe.png', *glob('probe_*.png', root_dir=folder)):
        check_place(os.path.join(folder, picture), PICTURE)
    saved['config'] = Settings({**config, 'data_dir': p.data_dir})  # of this machine
    if {'dataset', 'sha256'} <= data.keys() and not p.file:
        text = os.path.join(ROOT, p.data_dir, str(data['dataset']))
        meta = load_meta(text)
        require((meta['sha256'], meta['tokenizer']) == (data['sha256'], saved.get('tokenizer')),
                f'{text} has another text or tokenizer than the model: prepare that again')
    say(f"{os.path.relpath(path)}: {saved['model_type']}, update {saved.get('iter_num', 0)}, "
        f"task {saved['task']!r}, measured on {corpus}")
    found = task.probe(model, saved, p, device)
    metrics = {**found['metrics'], 'parameters': metric(count_parameters(model)),
               'updates': metric(saved.get('iter_num'))}
    seed = config.get('seed', p.seed)  # the model's; the probe has one of its own
    settings = {**config, **p.as_dict(), 'seed': seed, 'probe_seed': p.seed, 'data': corpus,
                'model_args': saved['model_args']}
    save_record(target, make_record(found['what'], settings, [seed], metrics, found['curves'],
                                    found['notes'], device=device))
    say(f'written to {os.path.relpath(target)}')
    for i, (title, curve) in enumerate(found['curves'].items()):
        if curve['points']:
            picture = f"probe_{re.sub('[^a-z]+', '_', title)}.png" if i else 'probe.png'
            curves(os.path.join(folder, picture), f'{title}, {corpus}', {name: curve})

if __name__ == '__main__':
    main(configure(globals(), positional='out_dir'))
