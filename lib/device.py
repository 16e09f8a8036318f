"""The machine: which device computes, what multiplies on a CPU, what is compiled, and threads."""
import os
import platform
import re
import statistics
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from lib.console import brief, count, require, say, write
from lib.contract import unit
from model import Block, band, rotary

PRODUCTS = 'auto', 'onednn', 'torch'
COMPILE = 'auto', 'off', 'kernels', 'graph'
LONG = 5000  # updates of a run that is worth the minutes of compiling, by estimate

def pick_device(device='auto'):
    """'auto' -> 'cuda', 'mps' or 'cpu', the first that is there. Raises SystemExit for a device
    that is not."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, in recurrent layers too
    torch.backends.cuda.matmul.allow_tf32 = False  # where the environment says otherwise
    if device == 'auto':
        if torch.cuda.is_available():
            return 'cuda'
        return 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        known = device == 'cpu' or device.split(':')[0] in ('cuda', 'mps')
        if not known or device == 'cuda' and not torch.cuda.is_available():
            raise ValueError
        if device != 'cuda':  # which of several processes is to have is not settled yet
            torch.empty(1, device=device)
        if device.startswith('cuda:'):
            torch.cuda.set_device(device)
    except Exception:  # torch raises RuntimeError, AssertionError or its own kinds, by device
        raise SystemExit(f'error: device={device!r} is not available here; --device=auto finds '
                         f'one that is') from None
    return device

def usable_cores():
    """CPU cores that this process may use: an affinity mask and a cgroup's quota count."""
    affinity = hasattr(os, 'sched_getaffinity')
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or 'max', which is no limit
        limit, period = map(int, Path('/sys/fs/cgroup/cpu.max').read_text().split())
        cores = min(cores, max(1, round(limit / period)))
    return cores

def idle_cores(load='/proc/loadavg'):
    """CPU cores of the machine on which nothing runs just now; all where it is not said."""
    cores, running = os.cpu_count() or 1, []
    if not os.path.exists(load):
        return cores
    for _ in range(9):
        busy = int(Path(load).read_text().split()[3].split('/')[0])
        running.append(busy - 1)  # without this process
        time.sleep(0.01)
    return cores - statistics.median(running)

def set_threads(threads):
    """Take so many CPU threads; 0 takes what torch would, but no more than there are idle cores:
    beside other work, threads that wait for each other take ten times as long as one alone.
    Raises SystemExit beyond what the machine can use."""
    cores = usable_cores()
    require(threads <= max(64, cores), f'threads={threads} is more than this machine can use, '
            f'which has {count(cores, "core")}: --threads=0 takes as many as are of use')
    usual = min(cores, torch.get_num_threads())
    if not threads and usual > 1 and 'OMP_NUM_THREADS' not in os.environ:
        threads = min(usual, max(1, idle_cores()))
        if threads < usual:
            write(sys.stderr, f'{count(threads, "thread")}, as other work is running: '
                              f'--threads={usual} takes more\n')
    torch.set_num_threads(threads or usual)

def set_up(device, threads, products='auto'):
    """Take a device and so many CPU threads, and on a CPU what computes fastest there. Returns the
    device. Raises SystemExit for what is not there."""
    set_threads(threads)
    device = pick_device(device)
    if device == 'cpu':
        choose_products(products)
    return device

def choose_products(products):
    """Who multiplies float32 matrices on this CPU from now on: 'onednn' or 'torch'.

    oneDNN is 1.4 to 2 times as fast on AMD's processors with AVX-512, which torch's MKL leaves
    unused. torch lets it multiply only where it may round to bfloat16, which it does not do without
    matrix units for that: tried out here, with numbers that would not survive it.
    """
    mkldnn = torch.backends.mkldnn
    serves = (products != 'torch' and mkldnn.is_available() and mkldnn.enabled
              and torch.backends.cpu.get_cpu_capability() == 'AVX512'
              and 'AuthenticAMD' in cpu_info())
    if serves:
        before = mkldnn.matmul.fp32_precision
        mkldnn.matmul.fp32_precision = 'bf16'
        tried = [torch.full(shape, 1 + 2 ** -10) for shape in ((64, 64), (1024, 1024), (8, 99, 99))]
        exact = [x.double().square().sum(-1, keepdim=True).float() for x in tried]
        serves = all(torch.allclose(x @ x, y, rtol=1e-5) for x, y in zip(tried, exact))
        if not serves:
            mkldnn.matmul.fp32_precision = before
    if products == 'onednn' and not serves:
        say("oneDNN's products do not serve on this machine; going on with torch's")
    return 'onednn' if serves else 'torch'

def cpu_info():
    """What the system says of its processor, as text."""
    with suppress(OSError):
        return Path('/proc/cpuinfo').read_text()[:4096]
    return platform.processor() or platform.machine()

def takes_bfloat16(dtype, device):
    """Whether training is to compute in bfloat16, by the setting dtype of train.py: 'auto' is so on
    a GPU that has it, and one that has not is refused it: emulated, it is slower than float32."""
    cuda = device.startswith('cuda')
    native = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    require(dtype != 'bfloat16' or native or not cuda,
            'this GPU has no bfloat16 of its own: --dtype=float32')
    return dtype == 'bfloat16' or dtype == 'auto' and native

def choose_compile(compile, device, updates):
    """'auto' -> what a run of so many updates of the same shapes is to compile: 'kernels' if it is
    long and on CUDA, else 'off', so that none compiles longer than it trains. Not 'graph': captured
    updates have not run on a GPU yet, and what they are worth is not measured
    (tests/gpu/session.sh). Raises SystemExit for 'graph' without CUDA."""
    cuda = device.startswith('cuda')
    require(compile != 'graph' or cuda, f"compile='graph' takes CUDA, not {device}: 'kernels' "
            f"compiles elsewhere as well, 'off' does not")
    if compile == 'auto':
        return 'kernels' if cuda and updates >= LONG else 'off'
    return compile

def compile_blocks(model, compile, device, B=2):
    """Compile the model's blocks in place, by a setting that choose_compile returned. Returns what
    is compiled: they are tried out on B rows, backward too; if that fails, a line says so. Those of
    'graph' are compiled where lib/graphs.py captures, for its shapes, and nowhere else."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if compile == 'off' or not blocks:
        return 'off' if compile == 'kernels' else compile
    say('compiling the blocks: a minute or more, the first time')
    torch.compiler.set_stance('default')  # which a trial before may have left otherwise
    torch._dynamo.config.recompile_limit = 64  # all shapes of all kinds of blocks count as one
    for table in (band, rotary):  # said here alone: it imports the compiler, which takes a second
        torch.compiler.assume_constant_result(table)
    for block in blocks:
        block.compile(dynamic=False)
    if compile == 'graph':
        torch.compiler.set_stance('force_eager')
        return compile
    T = min(max(1, 768 // unit(model)) * unit(model), model.config.block_size)
    idx = torch.zeros(B, T, dtype=torch.int64, device=device)
    try:
        with torch.random.fork_rng([idx.device] if idx.is_cuda else []):
            model(idx, idx)[1].backward()
        return compile
    except Exception as error:  # a compiler can fail in any way
        write(sys.stderr, f'torch.compile does not work here ({brief(error)}); going on without '
                          'it\n')
        torch.compiler.set_stance('force_eager')
        return 'off'
    finally:
        model.zero_grad(set_to_none=True)

def uncompiled(compile):
    """A context in which nothing of what compile_blocks() returned is compiled."""
    return torch.compiler.set_stance('force_eager') if compile == 'kernels' else nullcontext()

def peak_mb(device):
    """The most memory there was: of the CUDA allocator, else of this process; in MB, or None where
    the system does not tell."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_reserved() / 1e6
    with suppress(OSError, TypeError):  # no such file, or no such line
        status = Path('/proc/self/status').read_text()
        return int(re.search(r'VmHWM:\s*(\d+) kB', status)[1]) * 1024 / 1e6
