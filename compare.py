"""
Side by side: train models on the same corpus, probe and sample each, and write a report on who wins what.

    python compare.py config/compare_shakespeare.py             # an hour and a half on two CPU cores
    python compare.py config/compare_shakespeare.py --quick=True  # the same way with a few updates a run, to try it out
    python compare.py config/compare_shakespeare.py --only_report=True  # the report again, of the runs that are there
    python compare.py config/compare_shakespeare.py --only="fold; GPT, window 12"  # these runs; the report keeps the others

Runs are those of train.py, in folders of their own. Ctrl-C stops, and the same command goes on from there; a run that
fails is reported and does not stop the others, and is tried again by the next call.
"""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from configurator import at_least, configure, hint, is_helper, numbers, run_file

comparison = ''      # the file that lists the runs, such as config/compare_shakespeare.py
out_dir = ''         # folder of the runs; '' is out/NAME of the comparison file
results_dir = ''     # folder of the report; '' is results/NAME
jobs = 2             # runs at a time
threads = 1          # CPU threads of each
seeds = ''           # in place of the file's, separated by commas
quick = False        # a few updates a run and small probes, into folders of their own
only = ''            # names of the runs to work on, separated by semicolons; '' is all
only_report = False  # train nothing, report what is there
data_dir = 'data'    # folder of the prepared data sets
device = 'auto'      # 'auto' takes cuda, mps or cpu, the first that is there
if __name__ == '__main__':
    config = configure(globals(), positional='comparison')

ROOT = os.path.dirname(os.path.abspath(__file__))
QUICK = dict(eval_tokens=3000, log_interval=1, warmup_iters=1)  # with 4 updates
QUICK_PROBE = dict(histories='0,12,24', swaps='', targets=10, words=5, draws=20, bins='12,24,48')


@dataclass
class Run:
    """One model to train: `name` in the tables, the settings of train.py, and the folder of all that comes of it."""
    name: str
    seed: int
    settings: dict
    folder: str
    ablation: bool
    sampled: bool  # whether it goes on from the prompts: one seed of each model does
    error: str = ''

    def log(self):
        """The records of its log.jsonl, none if there is no log yet."""
        try:
            with open(os.path.join(self.folder, 'log.jsonl')) as f:
                return [json.loads(line) for line in f if line.endswith('\n')]
        except OSError:
            return []

    def done(self):
        """Tokens it has been trained on."""
        return max((record.get('tokens', 0) for record in self.log()), default=0)

    def trained(self):
        return any(record.get('iter') == self.settings['max_iters'] and 'val_loss' in record for record in self.log())

    def has(self, name):
        return os.path.exists(os.path.join(self.folder, name))

    def another(self):
        """What its folder holds in place of it: a run with another setting; '' if there is none."""
        if not self.has('last.pt'):
            return ''
        if self.has('settings.json'):  # what is given in neither is what train.py takes
            before = self.read('settings.json')
            keys = {*before, *self.settings}
        else:  # a folder of an earlier version; its log names the data set that was taken, not the one wanted
            before = next((record['config'] for record in self.log()[::-1] if record.get('event') == 'start'), {})
            keys = before.keys() & self.settings.keys() - {'dataset'}
        for key in sorted(keys):
            then, now = (f"{s[key]!r}" if key in s else "train.py's own" for s in (before, self.settings))
            if then != now:
                return (f"{os.path.relpath(self.folder, ROOT)} holds a run with another {key}, {then} in place of {now}: "
                        f"delete it, or take another out_dir")
        return ''

    def read(self, name):
        """What write left in a file of its folder; None if there is none."""
        if self.has(name):
            with open(os.path.join(self.folder, name)) as f:
                return json.load(f)

    def stale(self, name, how):
        """Whether a result has to be made: it is missing, or was made in another way than `how`."""
        return not self.has(name) or self.read(f'how_{name}') not in (None, how)

    def complete(self):
        return self.trained() and self.has('last.pt') and self.has('probe.json') and (self.has('samples.json') or not self.sampled)


def read_comparison(name):
    """What a comparison file says, checked. Raises SystemExit, in one line, for what cannot be meant."""
    default = dict(seeds=[1337], tokens=0, ablation_tokens=0, common={}, runs={}, ablations={}, probe={}, prompts=[],
                   new_tokens=200, same_window='', full_window='')
    if not name:
        raise SystemExit("error: name a comparison: python compare.py config/compare_shakespeare.py")
    given = {key: value for key, value in run_file(name, ROOT).items() if not is_helper(value)}
    for key, value in given.items():
        if key not in default:
            raise SystemExit(f"error: {name}: unknown key {key!r}: {hint(key, default)}")
        if type(value) is not type(default[key]):
            raise SystemExit(f"error: {name}: {key} must be of type {type(default[key]).__name__}, not {value!r}")
    c = {**default, **given}
    if not c['runs'] or not c['seeds'] or any(type(seed) is not int for seed in c['seeds']) or len(set(c['seeds'])) < len(c['seeds']):
        raise SystemExit(f"error: {name}: runs must name at least one run, and seeds be different whole numbers")
    for kind, of in ((dict, [*c['runs'].values(), *c['ablations'].values()]), (str, c['prompts'])):
        for value in of:
            if type(value) is not kind:
                raise SystemExit(f"error: {name}: a run must be a dict of settings and a prompt a text, not {value!r}")
    for key in ('same_window', 'full_window'):
        if c[key] and c[key] not in c['runs']:
            raise SystemExit(f"error: {name}: {key}={c[key]!r} is none of the runs")
    return c


def plan(c, folder):
    """All runs of a comparison, the ablations last. Raises SystemExit if one cannot see exactly the tokens of the others."""
    found = []
    wanted = [(name, s, over, c['tokens'], False) for s in c['seeds'] for name, over in c['runs'].items()]
    wanted += [(name, c['seeds'][0], over, c['ablation_tokens'], True) for name, over in c['ablations'].items()]
    for name, s, over, total, ablation in wanted:
        settings = {'batch_size': 16, 'block_size': 192, 'gradient_accumulation_steps': 1, **c['common'], **over}
        for key in ('batch_size', 'block_size', 'gradient_accumulation_steps'):
            if type(settings[key]) is not int or settings[key] < 1:
                raise SystemExit(f"error: run {name!r}: {key} must be a whole number from 1 on, not {settings[key]!r}")
        update = settings['batch_size'] * settings['block_size'] * settings['gradient_accumulation_steps']
        if total < update or total % update:
            raise SystemExit(f"error: run {name!r} has {update} tokens an update, which must divide the {total} of "
                             f"{'ablation_tokens' if ablation else 'tokens'}")
        iters = 4 if quick else total // update
        settings.update(seed=s, max_iters=iters, eval_interval=max(1, iters // 6), checkpoint_interval=max(1, iters // 20))
        if quick:
            settings.update(QUICK)
        slug = re.sub(r'\W+', '_', name).strip('_')
        found.append(Run(name, s, settings, os.path.join(folder, f"{'ablation_' * ablation}{slug}_{s}"), ablation,
                         sampled=s == c['seeds'][0]))
    if len({run.folder for run in found}) < len(found):
        raise SystemExit("error: two runs have names that differ in no letter or digit: rename one")
    return found


# --- training, probing, sampling --------------------------------------------------------------------------------

children, stopping = set(), threading.Event()


def call(run, *command):
    """Run a script with its output in the run's files; returns what it printed, and its peak memory in MB, or None.

    Raises RuntimeError with its last line of complaint if it fails, KeyboardInterrupt if all is to stop.
    """
    if stopping.is_set():
        raise KeyboardInterrupt
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)} if threads else None
    paths = [os.path.join(run.folder, name) for name in ('output.txt', 'errors.txt')]
    with open(paths[0], 'w') as out, open(paths[1], 'w') as err:  # a session of its own: Ctrl-C reaches it through stop
        child = subprocess.Popen([sys.executable, *command], stdout=out, stderr=err, cwd=ROOT, env=environment,
                                 start_new_session=True)
    children.add(child)
    if stopping.is_set():  # it came to be while the others were told
        child.terminate()
    peak = None
    if hasattr(os, 'wait4'):
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss / (1e6 if sys.platform == 'darwin' else 1e3)
    child.wait()
    children.discard(child)
    if stopping.is_set():
        raise KeyboardInterrupt
    printed, complaints = (open(path, encoding='utf-8', errors='replace').read() for path in paths)
    if child.returncode:
        raise RuntimeError((complaints.strip().splitlines() or [f"ended with code {child.returncode}"])[-1])
    return printed, peak


def flags(settings):
    return [f'--{key}={value}' for key, value in settings.items()]


def train(run):
    """Bring a run's training to its end, from wherever it stands."""
    if run.another():
        raise RuntimeError(run.another())
    if run.trained() and run.has('last.pt'):
        return
    write(run, 'settings.json', run.settings)
    how = '--init_from=resume' if run.has('last.pt') else '--overwrite=True'
    where = [f'--out_dir={run.folder}', f'--data_dir={os.path.join(ROOT, data_dir)}', f'--threads={threads}', f'--device={device}']
    begun = time.time()
    _, peak = call(run, 'train.py', *flags(run.settings), *where, how)
    write(run, 'training.json', {'seconds': time.time() - begun, 'peak_mb': peak, 'resumed': how == '--init_from=resume'})


def probe(run, c):
    """Probe the weights that training ended with, unless that is done."""
    settings = {**c['probe'], **(QUICK_PROBE if quick else {})}
    fold = run.settings.get('model_type', 'fold') != 'gpt'
    if fold and run.settings.get('segment_size', 12) != 12:  # histories are whole segments
        l = run.settings['segment_size']
        kept = sorted({-(-h // l) * l for h in numbers('histories', settings.get('histories', '0'))})
        settings['histories'] = ','.join(map(str, kept))
    if not run.stale('probe.json', settings):
        return
    call(run, 'probe.py', f"--out_dir={os.path.join(run.folder, 'last.pt')}", f"--results_file={os.path.join(run.folder, 'probe.json')}",
         f'--data_dir={os.path.join(ROOT, data_dir)}', f'--threads={threads}', f'--device={device}', *flags(settings))
    write(run, 'how_probe.json', settings)


def sample(run, c):
    """Let the model go on from every prompt, unless that is done; the same draws for all models."""
    how = {'prompts': c['prompts'], 'new_tokens': 20 if quick else c['new_tokens']}
    if not run.stale('samples.json', how):
        return
    texts = [call(run, 'sample.py', f"--out_dir={os.path.join(run.folder, 'last.pt')}", f'--start={prompt}', f'--device={device}',
                  f"--max_new_tokens={how['new_tokens']}", '--seed=1337')[0] for prompt in c['prompts']]
    write(run, 'samples.json', texts)
    write(run, 'how_samples.json', how)


def write(run, name, value):
    path = os.path.join(run.folder, name)
    with open(path + '.tmp', 'w') as f:
        json.dump(value, f)
    os.replace(path + '.tmp', path)


def work(run, c):
    """Everything that is missing of a run; what goes wrong is kept in run.error."""
    try:
        os.makedirs(run.folder, exist_ok=True)
        train(run)
        probe(run, c)
        if run.sampled:
            sample(run, c)
    except KeyboardInterrupt:
        pass
    except (RuntimeError, OSError) as error:
        run.error = str(error)
        print(f"{run.name}, seed {run.seed}, failed: {error}", flush=True)


def run_all(found, c):
    """Work on all runs, `jobs` at a time, with a line of progress every half a minute."""
    begun, first = time.time(), {id(run): run.done() for run in found}
    total = sum(tokens_of(run) - first[id(run)] for run in found)
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(work, run, c) for run in found]
        try:
            while wait(pending, timeout=30).not_done:
                print_progress(found, sum(run.done() - first[id(run)] for run in found) / max(1, total), begun)
        except KeyboardInterrupt:
            stopping.set()
            for job in pending:
                job.cancel()
            for child in list(children):
                child.send_signal(signal.SIGTERM)  # train.py finishes its update and saves
            raise


def tokens_of(run):
    s = run.settings
    return s['max_iters'] * s['batch_size'] * s['block_size'] * s['gradient_accumulation_steps']


def print_progress(found, share, begun):
    going = [f"{run.name} {run.seed}: {run.done() / tokens_of(run):.0%}" for run in found
             if run.log() and not run.complete() and not run.error]
    left = (time.time() - begun) * (1 / share - 1) / 60 if share > 0.01 else None
    print(f"{sum(run.complete() for run in found)} of {len(found)} runs complete; {', '.join(going)}"
          f"{f'; about {left:.0f} minutes left' if left is not None else ''}", flush=True)


def main():
    global out_dir, results_dir
    at_least(config, jobs=1, threads=0)
    c = read_comparison(comparison)
    if seeds:
        c['seeds'] = numbers('seeds', seeds)
    name = os.path.basename(comparison).removesuffix('.py') + '_quick' * quick
    out_dir = os.path.join(ROOT, out_dir or os.path.join('out', name))
    results_dir = os.path.join(ROOT, results_dir or os.path.join('out' if quick else 'results', name))
    found = plan(c, out_dir)
    chosen = [name.strip() for name in only.split(';') if name.strip()]
    names = list(dict.fromkeys(run.name for run in found))
    unknown = set(chosen or [only] * bool(only)) - set(names)
    if unknown:
        raise SystemExit(f"error: only={sorted(unknown)[0]!r} is none of the runs, which are {'; '.join(names)}")
    wanted = [run for run in found if not chosen or run.name in chosen]
    if not only_report:
        for name in {'SIGTERM', 'SIGHUP'} & set(dir(signal)):  # the runs are to end with this process
            signal.signal(getattr(signal, name), signal.default_int_handler)
        try:
            run_all(wanted, c)
        except KeyboardInterrupt:
            raise SystemExit("stopped; the same command goes on from here") from None
    if all(run.error or not run.complete() for run in wanted):
        raise SystemExit(f"error: {'none of the runs asked for' if chosen else 'no run'} is complete in {out_dir}; a report that "
                         f"was there is kept")
    import torch

    import report
    if threads:  # speeds of generation as those of training, and no waiting for a core that is busy
        torch.set_num_threads(threads)
    rows = report.write_report(found, c, results_dir, device)
    failed = [run for run, row in zip(found, rows) if 'failed' in row and run in wanted]
    print(f"written to {os.path.relpath(results_dir, ROOT)}{os.sep}: report.md, report.json and pictures"
          f"{f'; {len(failed)} of {len(wanted)} runs are not complete' if failed else ''}")
    raise SystemExit(1 if failed else 0)


if __name__ == '__main__':
    main()
