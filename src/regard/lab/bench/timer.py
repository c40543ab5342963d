"""Time and peak memory of a call, and what the machine can do at most."""

from __future__ import annotations

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

QUANTILES = (0.2, 0.5, 0.8)
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def seconds(call: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds of one call; on a GPU by its own clock, after what came before has ended."""
    if device.startswith("cuda"):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 0.2, 0.5 and 0.8 quantiles.

    >>> quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    {'q20': 2.0, 'q50': 3.5, 'q80': 5.0}
    """
    points = torch.tensor(values, dtype=torch.float64).quantile(
        torch.tensor(QUANTILES, dtype=torch.float64)
    )
    return {f"q{round(100 * q)}": float(v) for q, v in zip(QUANTILES, points)}


def peak(call: Callable[[], Any], device: str = "cpu") -> tuple[int, str]:
    """(bytes at the peak of a call over those before it, how they were counted).

    On a GPU the allocator's count. On Linux the growth of the resident set, whose peak the kernel
    keeps; elsewhere, or where that is not allowed, samples of it.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, "allocator of the GPU"
    marked = mark()
    if marked is None:
        return _sampled(call), "samples of the resident set"
    call()
    return since(marked), "resident peak of the process"


def mark() -> int | None:
    """Bytes of the resident set now, from where its peak counts anew; None where it cannot."""
    if sys.platform.startswith("linux"):
        # freed memory is handed back, so that no call hides in what an earlier one left
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _field("VmRSS")


def since(marked: int) -> int:
    """Bytes at the peak of the resident set since `mark()`, over those there were then."""
    return max(0, _field("VmHWM") - marked)


def _field(name: str) -> int:
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name} in {_STATUS}")


def _sampled(call: Callable[[], Any]) -> int:
    import psutil

    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return int(most - before)


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What the machine reaches at most: a matrix product in FLOP/s, a copy in bytes/s (read and
    written), each the best of a few.
    """
    size, words = (8192, 2**28) if device.startswith("cuda") else (1024, 2**25)
    a = torch.randn(size, size, device=device).to(dtype)
    x = torch.empty(words, dtype=torch.uint8, device=device).fill_(1)
    y = torch.empty_like(x)
    product = min(seconds(lambda: a @ a, device) for _ in range(6))
    copy = min(seconds(lambda: y.copy_(x), device) for _ in range(6))
    return {"flops": 2 * size**3 / product, "bandwidth": 2 * words / copy}
