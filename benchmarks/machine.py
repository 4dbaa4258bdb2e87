"""The limits of the machine, measured in the same run: the best GEMM rate and the copy bandwidth."""

import ctypes
import platform
from pathlib import Path

import torch

from benchmarks.timing import warm

GEMMS = [(1024, 1024, 1024), (2048, 2048, 2048), (2048, 4096, 4096)]  # rows, columns, sum
COPY_BYTES = 1 << 28
DEFAULT_CACHE = 1 << 25
MMAP_MAX, TRIM_THRESHOLD = -4, -1  # glibc's numbers for mallopt


def describe(device="cpu"):
    """The processor's name, the number of torch threads and the torch version."""
    if device != "cpu":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}"


def gemm_rates(device="cpu", clock=warm, gemms=GEMMS, repeats=3):
    """{dtype: best FLOP/s over shapes and repeats}."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        best = 0.0
        for m, n, k in gemms:
            a, b = (torch.randn(s, k, device=device).to(dtype) for s in (m, n))
            out = torch.empty(m, n, dtype=dtype, device=device)
            seconds = min(
                clock(lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out), 1)
                for _ in range(repeats)
            )
            best = max(best, 2 * m * n * k / seconds)
        rates[str(dtype).removeprefix("torch.")] = best
    return rates


def bandwidth(device="cpu", clock=warm, size=COPY_BYTES, repeats=5):
    """Best bytes/s of a copy, counting both reads and writes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(clock(lambda: target.copy_(source), 1) for _ in range(repeats))


def cache_bytes(device="cpu"):
    """Size of the last-level cache."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # such as 32768K
    return int(size.read_text().strip()[:-1]) << 10 if size.exists() else DEFAULT_CACHE


def keep_memory():
    """Makes glibc keep freed memory, so that results are written to pages that the process already has.

    By default, glibc keeps or returns large blocks depending on their size and the history of the process;
    a result of megabytes takes up to three times as long if its pages are mapped and cleared again.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)


def limits(device="cpu", clock=warm, quick=False):
    small = {"gemms": [(128, 128, 128)], "repeats": 1} if quick else {}
    copy = {"size": 1 << 20, "repeats": 1} if quick else {}
    rates = gemm_rates(device, clock, **small)
    return {"gemm": rates, "bandwidth": bandwidth(device, clock, **copy)}


def best(one, other):
    """The higher of each number, in case the machine was briefly busy."""
    gemm = {dtype: max(rate, other["gemm"][dtype]) for dtype, rate in one["gemm"].items()}
    return {"gemm": gemm, "bandwidth": max(one["bandwidth"], other["bandwidth"])}
