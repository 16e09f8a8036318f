"""
Kill a run with SIGKILL at random moments, resume it each time, and compare it with one that nobody disturbed.

    python tests/kill_and_resume.py        # ten kills
    python tests/kill_and_resume.py 3      # three
"""
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
STEPS = 15  # between two kills, at most
TEXT = ''.join(f'{a} times {b} is {a * b}.\n' for a in range(30) for b in range(7))
SETTINGS = dict(dataset='sums', device='cpu', threads=1, n_local=1, n_global=2, n_head=2, n_embd=32, segment_size=4,
                block_size=16, batch_size=4, gradient_accumulation_steps=2, dropout=0.1, stream=True, bptt_segments=3,
                recompute=True, eval_interval=7, checkpoint_interval=1, log_interval=1, warmup_iters=2)


def start(out_dir, data_dir, **settings):
    args = {**SETTINGS, 'out_dir': out_dir, 'data_dir': data_dir, **settings}
    return subprocess.Popen([sys.executable, '-u', os.path.join(ROOT, 'train.py'), *(f'--{k}={v}' for k, v in args.items())],
                            stdout=subprocess.PIPE, text=True)


def finish(process):
    output = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"error: train.py ended with code {process.returncode}\n{output[-2000:]}")


def kill_in_a_while(process, draw):
    """Let some steps pass, then some time that is no multiple of a step. Returns whether it was still running."""
    steps = draw.randrange(STEPS)
    for line in process.stdout:
        steps -= line.startswith('iter') and 'lr' in line
        if steps < 0:
            break
    time.sleep(draw.random() * 0.05)
    process.kill()
    process.communicate()
    return process.returncode < 0


def records(out_dir, key):
    with open(os.path.join(out_dir, 'log.jsonl')) as f:
        return [(line['iter'], line[key]) for line in map(json.loads, f) if key in line]


def main(kills, seed=0):
    """Raises AssertionError if the disturbed run ends with other weights, another state or another log."""
    from prepare import prepare
    draw, killed = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, 'sums.txt'), 'w') as f:
            f.write(TEXT)
        prepare('sums', file=os.path.join(folder, 'sums.txt'), data_dir=folder, quiet=True)
        whole, parts = os.path.join(folder, 'whole'), os.path.join(folder, 'parts')
        how = dict(data_dir=folder, max_iters=(kills + 1) * STEPS)
        finish(start(whole, **how))
        while killed < kills:
            saved = os.path.exists(os.path.join(parts, 'last.pt'))
            again = dict(init_from='resume') if saved else dict(overwrite=True)
            assert kill_in_a_while(start(parts, **again, **how), draw), "the run ended before it was killed"
            killed += 1
            at = 'before its first checkpoint'
            if os.path.exists(os.path.join(parts, 'last.pt')):
                at = f"at {torch.load(os.path.join(parts, 'last.pt'), weights_only=True)['iter_num']} of {how['max_iters']}"
            print(f"kill {killed} of {kills}: the checkpoint is whole, {at}")
        finish(start(parts, init_from='resume', **how))
        a, b = (torch.load(os.path.join(path, 'last.pt'), weights_only=True) for path in (whole, parts))
        assert a['iter_num'] == b['iter_num'] == how['max_iters']
        for name, value in a['model'].items():
            assert torch.equal(value, b['model'][name]), f"{name} differs after {killed} kills"
        assert all(torch.equal(a['stream'][key], b['stream'][key]) for key in ('at', 'fresh', 'carry'))
        for key in ('loss', 'val_loss', 'lr'):
            assert records(whole, key) == records(parts, key), f"the log's {key} differs after {killed} kills"
    print(f"{killed} kills, each followed by resume: weights, streams and log equal the undisturbed run's, bit for bit")


if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
