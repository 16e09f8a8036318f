"""Kill runs with SIGKILL at random moments, resume them, and compare with undisturbed ones.

    python tests/kill_and_resume.py 3      # three kills of a text run and of a needle run; or ten
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ROOT, TEXT, flags
from test_train import assert_same_runs

from prepare import prepare

STEPS = 15  # between two kills, at most
OF_TEXT = dict(stream=True, bptt_segments=3, recompute=True, gradient_accumulation_steps=2)

def start(task, out_dir, folder, kills, **settings):
    words = flags(out_dir, folder, task, max_iters=(kills + 1) * STEPS, eval_interval=7,
                  checkpoint_interval=1, **(OF_TEXT if task == 'text' else {}), **settings)
    return subprocess.Popen([sys.executable, os.path.join(ROOT, 'train.py'), *words],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

def finish(process):
    output = process.communicate()[0]
    assert process.returncode == 0, output[-2000:]

def kill_in_a_while(process, generator):
    """Let some updates pass, then some time that is no multiple of an update's."""
    steps, printed = generator.randrange(STEPS), []
    for line in process.stdout:
        printed.append(line)
        steps -= line.startswith('iter') and 'lr' in line
        if steps < 0:
            break
    time.sleep(generator.random() * 0.05)
    process.kill()
    process.communicate()
    assert process.returncode < 0, f'it ended before it was killed: {"".join(printed[-5:])}'

def disturbed_and_not(task, folder, kills, generator):
    """Raises AssertionError if the disturbed run ends with other weights, optimizer, random
    numbers, state of the task or log."""
    whole, parts = (Path(folder, f'{task}_{name}') for name in ('whole', 'parts'))
    undisturbed = start(task, whole, folder, kills)  # beside the other, which has its own folder
    for killed in range(kills):
        saved = any((parts / name).exists() for name in ('last.pt', 'ckpt.pt'))
        kill_in_a_while(start(task, parts, folder, kills,
                              init_from='resume' if saved else 'scratch'), generator)
        print(f'{task}: killed {killed + 1} of {kills} times')
    finish(start(task, parts, folder, kills, init_from='resume'))
    finish(undisturbed)
    assert_same_runs(whole, parts)
    assert (whole / 'loss.png').stat().st_size > 1000 and not list(parts.glob('.*.tmp'))
    print(f"{task}: resumed after each, all is the undisturbed run's, bit for bit")

def main(kills, tasks=('text', 'needle'), seed=0):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, 'tiny.txt').write_text(TEXT)
        prepare('tiny', file=f'{folder}/tiny.txt', data_dir=folder)
        for task in tasks:
            disturbed_and_not(task, folder, kills, random.Random(f'{seed} {task}'))

if __name__ == '__main__':
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
