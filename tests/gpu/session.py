"""What session.sh runs: all that is tried and measured on one GPU, in so many seconds.

One line a check, and OUT/session.json, a record as lib/records.py has it, written after each line,
so that what ends early has lost nothing. A metric that is missing there was not measured.
"""
import fcntl
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from glob import glob
from importlib.util import find_spec

from pieces import BATCH, BATCHES, DATASET, DEVICE, SIDES, SIZE, TINY, bench, torch
from steps import COMPARISON, NEEDED, PIECES, gradient_chains, smoke_chains

from lib.contract import flops_per_token
from lib.records import ROOT, make_record, metric, save_record

BUDGET = float(os.environ.get('BUDGET') or (600 if TINY else 520))
BEGUN = float(os.environ.get('BEGUN') or time.time())
OUT = os.environ.get('OUT') or os.path.join(ROOT, 'out', 'gpu_session')
CORPUS = os.environ.get('CORPUS', '')
PARTS = (os.environ.get('PARTS') or 'smoke,gradients,speed,train').split(',')
SHARES = dict(zip(('smoke', 'gradients', 'speed', 'train'),  # of the budget
                  (0.8, 0.06, 0.06, 0.08) if TINY else (0.25, 0.1, 0.35, 0.3)))
WAYS = ['off'] if TINY else ['graph', 'kernels', 'off']
SPEED = ', tokens per second'
alive, lock, record = set(), threading.Lock(), {}

# --- what is found, and processes -----------------------------------------------------------------

def left(until=BUDGET):
    """Seconds until then; none once the session is stopped."""
    return min(until, BUDGET) - (time.time() - BEGUN)

def note(name, result, reason='', seconds=None):
    """Tell and keep the result of a check: ok, FAILED, skipped or not measured."""
    with lock:
        record['checks'][name] = {'result': result, 'reason': reason, 'seconds': seconds}
        begun, why = time.time() - BEGUN, f': {reason}' if reason else ''
        print(f'[{begun:4.0f} s] {result:<12} {name}{why}', flush=True)
        save_record(os.path.join(OUT, 'session.json'), record)

def start(words, out):
    process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=out, cwd=ROOT,
                               stdin=subprocess.DEVNULL, start_new_session=True)
    alive.add(process)
    return process

def end(process):
    """Kill a process and all that it started."""
    with suppress(OSError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    alive.discard(process)

def stop(number, frame):
    """End all that runs; what is still to come is not measured."""
    global BUDGET
    BUDGET = 0.0
    for process in [*alive]:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)

def call(words, seconds):
    """A script's exit code, None if it took longer and was stopped, and the lines it printed."""
    with tempfile.TemporaryFile('w+', errors='replace') as out:
        process, code = start(words, out), None
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(max(0.1, seconds))
        if code is None:
            process.terminate()  # what trains saves, and stops
            with suppress(subprocess.TimeoutExpired):
                process.wait(8)
        end(process)
        out.seek(0)
        return code, [line for line in out.read().splitlines() if line.strip()] or ['']

def answers(lines):
    """What a piece printed, without a line that is still being written."""
    found = []
    for line in lines:
        with suppress(ValueError):
            if line.startswith('@@'):
                found.append(json.loads(line[2:]))
    return found

def judge(name, words, wanted, until):
    """Whether a script ends well and prints what is wanted of it; an error is to end it."""
    begun, most = time.monotonic(), min(left(until) - 8, 170)
    code, lines = call(words, most)
    for found in answers(lines):
        note(*found)
    without = [line for line in lines if 'does not work here' in line]
    good = code == wanted.startswith('error: ') and any(wanted in line for line in lines)
    why = 'out of time' if code is None else f'exit code {code}: {lines[-1]}'
    if without or good:
        why = ''.join(without[:1])
    result = 'ok' if not why else 'not measured' if code is None and most < 170 else 'FAILED'
    note(name, result, why[:200], round(time.monotonic() - begun, 1))
    return not why

def run_chain(chain, until):
    failed = ''
    for name, words, wanted in chain:
        if find_spec(NEEDED.get(name, 'torch')) is None:
            note(name, 'skipped', f'{NEEDED[name]} is missing')
        elif failed or left(until) < 10:
            note(name, 'not measured', failed or 'no time was left')
        elif not judge(name, words, wanted, until):
            failed = f'after {name}'

def run_chains(chains, until):
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        list(pool.map(lambda chain: run_chain(chain, until), chains))

# --- speed, and training --------------------------------------------------------------------------

def keep_speed(name, way, found, flops):
    """Keep a speed, unless it is of something else than it should be; and all efficiencies."""
    label, rate, metrics = f'{name}, {way}', found['rate'], record['metrics']
    if found['compiled'] == way:
        curve = {'x': 'batch', 'y': 'tokens per second', 'points': []}
        points = record['curves'].setdefault(f'tokens per second, {label}', curve)['points']
        points.append({'x': found['batch'], 'value': rate})
        metrics.setdefault(f'{label}, seconds to start', metric(found['ready']))
        if rate == max(point['value'] for point in points):
            metrics[label + SPEED] = metric(rate)
            metrics[f'{label}, batch'] = metric(found['batch'])
            metrics[f'{label}, peak MB'] = metric(found['mb'])
    done = {(side, key): metrics[f'{side}, {key}{SPEED}']['value'] * flops[side]
            for side in SIDES for key in WAYS if f'{side}, {key}{SPEED}' in metrics}
    best = max((value for (side, _), value in done.items() if side == 'GPT'), default=None)
    for (side, key), value in done.items():
        metrics[f'{side}, {key}, efficiency'] = metric(value / best if best else None)
    note(f"speed {label}, batch {found['batch']}", 'ok' if found['compiled'] == way else 'FAILED',
         f"{rate:,.0f} tokens/s, ready in {found['ready']:.0f} s, compiled: {found['compiled']}")

def lines_of(work, name, way):
    with open(f'{work}/{name}, {way}', errors='replace') as out:
        return out.read().splitlines()

def speed(work, until):
    """At every batch all sides get ready at once, in processes that compile side by side; then they
    take turns. One that is not ready for the first by half of the time is not waited for."""
    flops, sides, heard, half = {}, {}, {}, left(until) / 2
    for name, (kind, l, T) in SIDES.items():
        with torch.device('meta'):
            s = bench.Settings({'segment_size': l, 'vocab_size': 65})
            flops[name] = flops_per_token(bench.make_side(kind, SIZE, T, s)[0], T)
    gates = [open(f'{work}/gate{number}', 'w') for number in range(1, 2 * BATCHES + 1)]
    for gate in gates:
        fcntl.flock(gate, fcntl.LOCK_EX)  # copies of this process have these files, too
    for key in [(name, way) for way in WAYS for name in SIDES]:
        with open(f'{work}/{key[0]}, {key[1]}', 'w') as out:
            sides[key] = start([PIECES, 'speed', *key, f'{work}/gate'], out)
    running = True
    while running and left(until) > 1:
        time.sleep(0.2)
        running = [key for key, process in sides.items() if process.poll() is None]
        found = {key: answers(lines_of(work, *key)) for key in sides}
        for key, rows in found.items():
            for row in rows[heard.get(key, 0):]:
                if 'rate' in row:
                    keep_speed(*key, row, flops)
            heard[key] = len(rows)
        waited = [heard[key] for key in running if heard[key] or left(until) > half]
        for gate in gates[:min(waited, default=0)]:
            fcntl.flock(gate, fcntl.LOCK_UN)
    for key, process in sides.items():
        if process.poll() is None and heard.get(key):
            note(f'speed {key[0]}, {key[1]}, a larger batch', 'not measured', 'no time was left')
        end(process)
        if f'{key[0]}, {key[1]}{SPEED}' not in record['metrics']:
            last = ['', *lines_of(work, *key)][-1][:200]
            note(f'speed {key[0]}, {key[1]}', 'FAILED' if process.poll() == 1 else 'not measured',
                 last)

def fastest(name):
    """Tokens per second, way and seconds to start of a side, by its speed; a guess without."""
    found = [(record['curves'][f'tokens per second, {name}, {way}']['points'][0]['value'], way,
              record['metrics'][f'{name}, {way}, seconds to start']['value'])
             for way in WAYS if f'tokens per second, {name}, {way}' in record['curves']]
    return max(found, default=(200_000, 'off', 30))

def trainings(work, until):
    """nanoGPT's Shakespeare setting, all sides side by side: 5000 updates, as there, or as many as
    there is time for; the same number for each."""
    plans = {name: fastest(name) for name in SIDES}
    update = sum(BATCH * SIDES[name][2] / plans[name][0] for name in SIDES)  # seconds
    time_left = left(until) - 30 - max(ready for _, _, ready in plans.values())
    n = 8 if TINY else min(5000, max(100, int(0.7 * time_left / update)))
    common = runpy.run_path(os.path.join(ROOT, 'config/compare_shakespeare_gpu.py'))['common']
    tiny = dict(n_local=1, n_global=1, n_layer=2, n_head=2, n_embd=16, batch_size=2,
                eval_tokens=2000)

    def train(name):
        (kind, l, T), folder = SIDES[name], f'{work}/trained {name}'
        settings = {**common, **(tiny if TINY else {}), 'model_type': kind, 'segment_size': l,
                    'block_size': T, 'max_iters': n, 'eval_interval': max(1, n // 4),
                    'log_interval': max(1, n // 50), 'compile': plans[name][1], 'threads': 1,
                    'device': DEVICE, 'out_dir': folder, 'data_dir': f'{work}/data',
                    'dataset': DATASET}
        words = [f'--{key}={value}' for key, value in settings.items()]
        code, lines = call(['train.py', *words], left(until) - 12)
        keep_training(name, folder, n, code, lines[-1][:150])
    with ThreadPoolExecutor(len(SIDES)) as pool:
        list(pool.map(train, SIDES))

def keep_training(name, folder, n, code, last):
    """Keep the losses of a run, as far as it came."""
    log = []
    with suppress(OSError, ValueError), open(f'{folder}/log.jsonl') as f:
        log += [json.loads(line) for line in f]
    points = [{'x': line['tokens'], 'value': line['val_loss']}
              for line in log if 'val_loss' in line]
    if not points:
        note(f'train {name}', 'not measured' if code is None else 'FAILED', last)
        return
    best = min(point['value'] for point in points)
    record['curves'][f'validation loss, {name}'] = {
        'x': 'tokens', 'y': 'nats per token', 'points': points}
    record['metrics'][f'{name}, validation loss'] = metric(best)
    updates = max(line.get('iter', 0) for line in log)
    record['metrics'][f'{name}, updates'] = metric(updates)
    note(f'train {name}', 'ok' if code in (0, None) else 'FAILED',
         f'validation loss {best:.4f}, {updates} of {n} updates')

# --- all of it ------------------------------------------------------------------------------------

def run_parts(work):
    """What is asked for, each part until its share of the time is over; what one leaves is the
    next one's."""
    whole = sum(SHARES[part] for part in {*PARTS})
    until = {part: BUDGET * SHARES[part] / whole * (part in PARTS) for part in SHARES}
    chains = gradient_chains() if 'gradients' in PARTS else []
    chains += smoke_chains(work) if 'smoke' in PARTS else []
    checked = until['smoke'] + until['gradients']
    run_chains(chains, checked)
    if 'speed' in PARTS:
        speed(work, checked + until['speed'])
    if 'train' in PARTS:
        trainings(work, BUDGET)

def main():
    known = [part in SHARES for part in PARTS]
    if not all(known):
        raise SystemExit(f"error: PARTS={','.join(PARTS)}: its parts are {', '.join(SHARES)}")
    if not TINY and not torch.cuda.is_available():
        raise SystemExit('error: there is no CUDA device here: TINY=1 tries this on the CPU')
    settings = {'budget': BUDGET, 'parts': ','.join(PARTS), 'tiny': TINY, 'size': SIZE}
    record.update(make_record('gpu session', settings, [1337], {}, {}, device=DEVICE), checks={})
    work = tempfile.mkdtemp(prefix='gpu_session_')
    os.environ['TORCHINDUCTOR_CACHE_DIR'] = f'{work}/inductor'  # what is killed leaves torn files
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with open(f'{work}/comparison.py', 'w') as f:
        f.write(COMPARISON)
    with open(CORPUS, 'rb') as text, open(f'{work}/text', 'wb') as f:
        f.write(text.read(30_000 if TINY else -1))
    try:
        prepare = ['prepare.py', DATASET, f'--file={work}/text', f'--data_dir={work}/data']
        if judge('prepare', prepare, '', BUDGET):
            run_parts(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for path in glob(os.path.join(ROOT, 'out', '*_gpu_session.json')):
            os.remove(path)
    results = [check['result'] for check in record['checks'].values()]
    print(', '.join(f'{results.count(kind)} {kind}' for kind in sorted({*results})), flush=True)
    sys.exit(int('FAILED' in results))

if __name__ == '__main__':
    main()
