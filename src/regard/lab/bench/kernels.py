"""bench kernels: kernels x masks x lengths, forward and backward, in one table.

Every cell ends in one of the outcomes of `record`: measured, out of memory (predicted or met),
unsupported, not installed, failed. None is dropped, and none is a number that stands for something
else. The kernels of one row (mask, length, direction) are measured in turns, one call each a round,
so that the machine's moods hit all alike.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core.kernels import flex, reference
from regard.errors import InputError

from . import timer
from .cases import Case, gib, masks
from .kernel import Attention, Kernel
from .record import (
    FAILED,
    NO_MEMORY,
    Cell,
    Result,
    environment,
    outcome_of,
    pick_device,
    resume,
    show_progress,
)
from .registry import chosen, kernels, why_not

GIB = 2**30
EXACT = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}
DTYPES = {str(d).removeprefix("torch."): d for d in EXACT}
CHECKED = 333  # tokens at which a kernel is compared with the truth: odd, and more than two blocks
WARM, ROUNDS = 1, 5
BROKEN = (Exception, SystemExit)  # a user's own kernel may call sys.exit
PATIENCE = 4.0  # seconds after which a kernel gets no further round
TARGETS = [
    {
        "key": "exact",
        "rule": "every measured cell (but a user's own) is within 1e-4 (float32) of the float64 "
        "reference",
    },
    {
        "key": "sparse",
        "rule": "block-sparse: time of attend over that at density 1 lies within 0.5 to 1.5 times "
        "the kept share, plus 0.1 for what every call costs",
    },
    {"key": "linear", "rule": "peak memory of attend grows with an exponent of at most 1.25 in T"},
    {
        "key": "faster",
        "rule": "windowed, document and prefix masks, longest length measured from 8k on: attend's "
        "forward is at least 3 times as fast as sdpa's with its dense mask",
    },
    {"key": "matrix", "rule": "attend's peak stays below the bytes of a boolean T x T mask there"},
]


@dataclass
class Live:
    """A kernel that takes part in a row: its prepared call and what has been measured so far."""

    kernel: Kernel
    case: Case
    call: Callable[[], Any]
    setup: float
    first: float
    times: list[float]


def key_of(kernel: str, mask: str, total: int, backward: bool) -> str:
    """Key of a cell: `kernel | mask | tokens | direction`."""
    return f"{kernel} | {mask} | {total} | {'backward' if backward else 'forward'}"


def run(
    *,
    masks: str = "all",
    lengths: Sequence[int] = (1024,),
    kernels: str | Sequence[str] = "all",
    extra: Iterable[Kernel] = (),
    heads: tuple[int, int] = (8, 2),
    dim: int = 64,
    dtype: str = "float32",
    device: str | None = None,
    backward: bool = False,
    rounds: int = ROUNDS,
    seed: int = 42,
    memory_limit: float = 4.0,
    threads: int | None = None,
    out: str | Path | None = None,
    progress: Callable[[str], None] | None = show_progress,
) -> Result:
    """Measure every kernel on every mask at every length; `extra` kernels beside the registry's.

    Args:
        masks: names, groups ("regular", "all", ...) or `name:parameter=value`, by commas.
        heads: query heads and key heads. dim: of one head. dtype: by name.
        memory_limit: GiB; a call that would build more than this is not started.
        out: JSON file, written after every row; a run that was cut off goes on from it.

    Raises:
        InputError: unknown names, heads that do not fit, a file of another run.

    >>> run(masks="causal", lengths=[64], kernels="attend,naive", progress=None).name
    'kernels'
    """
    device = pick_device(device)
    cores = os.cpu_count() or 1
    if threads is not None and not 1 <= threads <= cores:
        raise InputError(f"threads are 1 to the {cores} cores of this machine, got {threads}")
    cases, pool, settings = _plan(
        masks, lengths, kernels, extra, heads, dim, dtype, device, backward, rounds, seed,
        memory_limit,
    )  # fmt: skip
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        machine = environment(torch.get_num_threads(), device)
        fresh = Result("kernels", settings, machine, [dict(t) for t in TARGETS])
        result = resume(out, fresh, __name__)
        _forget_edited(result, pool)
        result.save(out)  # no space or no permission shows before any work
        if "machine" not in result.cells:
            peaks = timer.ceilings(device, DTYPES[dtype])
            result.cells["machine"] = Cell({"device": device}, values=peaks)
        checked: dict[tuple[str, str, bool], Any] = {}
        for n, case in enumerate(cases):
            todo = [k for k in pool if not result.settled(_key(k, case))]
            if todo:
                if progress is not None:
                    way = "backward" if case.backward else "forward"
                    progress(f"{n + 1}/{len(cases)}  {case.name}  {case.total}  {way}")
                with flex.many_graphs():  # compiled kernels: one a mask, backward often
                    row = _row(case, todo, rounds, memory_limit, checked)
                result.cells.update(row)
                result.save(out)
    finally:
        torch.set_num_threads(before)
    return result


def _plan(
    masks_: str,
    lengths: Sequence[int],
    kernels_: str | Sequence[str],
    extra: Iterable[Kernel],
    heads: tuple[int, int],
    dim: int,
    dtype: str,
    device: str,
    backward: bool,
    rounds: int,
    seed: int,
    memory_limit: float,
) -> tuple[list[Case], list[Kernel], dict[str, Any]]:
    if heads[1] < 1 or heads[0] < 1 or heads[0] % heads[1]:
        raise InputError(
            f"{heads[0]} query heads are not a multiple of {heads[1]} key heads: write, say, 8:2"
        )
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose from {', '.join(DTYPES)}")
    if dim < 1 or rounds < 1 or not lengths or min(lengths) < 2:
        raise InputError("lengths are at least 2 tokens, dim and rounds at least 1")
    if not 0 < memory_limit < math.inf:
        raise InputError(f"the memory limit is a number of GiB above 0, got {memory_limit}")
    chosen_names = list(extra)
    known = kernels()
    names = chosen(kernels_, known, "kernel") if kernels_ or not chosen_names else []
    pool = [known[n] for n in names] + chosen_names
    twice = [name for name, count in Counter(k.name for k in pool).items() if count > 1]
    if twice:
        raise InputError(f"two kernels are named {twice[0]}: rename one file or function")
    cases = [
        Case(name, total, heads[0], heads[1], dim, DTYPES[dtype], device, way, seed)
        for total in sorted(set(lengths))
        for name in masks(masks_)
        for way in ((False, True) if backward else (False,))
    ]
    for case in cases:
        if case.total == min(lengths) and case.held <= memory_limit * GIB:
            case.mask  # noqa: B018  what cannot be built is refused before any work
    # which kernels, masks and lengths is not part of it: later runs add to the same table
    settings = {
        "heads": heads[0],
        "kv_heads": heads[1],
        "dim": dim,
        "dtype": dtype,
        "device": device,
        "seed": seed,
        "rounds": rounds,
        "warm_up": WARM,
        "memory_limit_gib": memory_limit,
        "checked_at": CHECKED,
    }
    return cases, pool, settings


def _forget_edited(result: Result, pool: list[Kernel]) -> None:
    """Drop the cells of kernels whose file has changed: they are another kernel's."""
    now = {kernel.name: kernel.source for kernel in pool}
    for key, cell in list(result.cells.items()):
        name = cell.settings.get("kernel")
        if name in now and cell.settings.get("source", "") != now[name]:
            del result.cells[key]


def _key(kernel: Kernel, case: Case) -> str:
    return key_of(kernel.name, case.name, case.total, case.backward)


def _row(
    case: Case,
    pool: list[Kernel],
    rounds: int,
    limit: float,
    checked: dict[tuple[str, str, bool], Any],
) -> dict[str, Cell]:
    """All kernels on one mask, length and direction."""
    cells: dict[str, Cell] = {}

    def end(kernel: Kernel, outcome: str, reason: str) -> None:
        settings = _settings(kernel, case)
        del settings["parameters"]  # of what was not computed; keeps the file small
        cells[_key(kernel, case)] = Cell(settings, outcome, reason)

    live: list[Live] = []
    if case.held > limit * GIB:  # not even the mask is built
        told = f"predicted: q, k, v and out take {gib(case.held)}, more than the limit of "
        return {
            _key(k, case): Cell(_sizes(k, case), NO_MEMORY, f"{told}{limit:g} GiB") for k in pool
        }
    q, k, v = case.tensors()
    for kernel in pool:
        refused = why_not(kernel, case)
        if refused is not None:
            end(kernel, refused[0], refused[1].removeprefix("not installed: "))
        elif kernel.need(case) > limit * GIB:
            needs = f"needs about {gib(kernel.need(case))} beside its input"
            end(kernel, NO_MEMORY, f"predicted: {needs}, more than the limit of {limit:g} GiB")
        else:
            try:
                _error(kernel, case, checked)
                live.append(_start(kernel, case, (q, k, v)))
            except BROKEN as problem:
                end(kernel, *outcome_of(problem))
    for _ in range(rounds):
        for runner in list(live):
            if len(runner.times) and sum(runner.times) > PATIENCE:
                continue
            try:
                runner.times.append(timer.seconds(runner.call, case.device))
            except BROKEN as problem:
                end(runner.kernel, *outcome_of(problem))
                live.remove(runner)
    for runner in live:
        runner.call = lambda: None  # lets go of the graph and the masks it holds
    shared = case.__dict__
    for name in ("sdpa", "mask"):
        shared.pop(name, None)  # so that each kernel's memory counts its own mask
    gc.collect()
    for runner in live:
        try:
            amount, counter = timer.peak(
                partial(_whole, runner.kernel, case, (q, k, v)), case.device
            )
        except BROKEN as problem:
            end(runner.kernel, *outcome_of(problem))
            continue
        finally:
            for name in ("sdpa", "mask"):
                shared.pop(name, None)
        cells[_key(runner.kernel, case)] = _measured(runner, amount, counter, checked)
    return {_key(kernel, case): cells[_key(kernel, case)] for kernel in pool}


def _start(kernel: Kernel, case: Case, given: tuple[Tensor, ...]) -> Live:
    """Prepare and warm up; the first call is kept apart, it may compile."""
    begin = time.perf_counter()
    fn = kernel.prepare(case)
    setup = time.perf_counter() - begin
    call = _call(fn, case, given)
    first = timer.seconds(call, case.device)
    for _n in range(WARM):
        if first < PATIENCE:
            timer.seconds(call, case.device)
    return Live(kernel, case, call, setup, first, [])


def _call(fn: Attention, case: Case, given: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The timed part: a forward without gradients, or the backward alone of one forward."""
    if not case.backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return _out(fn(*given), case)

        return forward
    out = _out(fn(*given), case)
    grad = torch.ones_like(out)
    # autograd.grad returns gradients and adds them up nowhere
    return lambda: torch.autograd.grad(out, given, grad, retain_graph=True)


def _whole(kernel: Kernel, case: Case, given: tuple[Tensor, ...]) -> None:
    """Everything a call needs, its masks included: what the memory pass counts."""
    _call(kernel.prepare(case), case, given)()


def _out(result: Any, case: Case) -> Tensor:
    out = result[0] if isinstance(result, (tuple, list)) else getattr(result, "out", result)
    expected = (1, case.heads, case.total, case.dim)
    if not isinstance(out, Tensor) or tuple(out.shape) != expected:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"a kernel returns out {expected}, or (out, lse); this one gave {shape}")
    return out


def _error(kernel: Kernel, case: Case, checked: dict[tuple[str, str, bool], Any]) -> None:
    """Notes the largest absolute difference from the float64 reference, of out or of dq, dk, dv."""
    key = (kernel.name, case.name, case.backward)
    if key not in checked:
        small = replace(case, total=min(CHECKED, case.total))
        given = small.tensors()
        exact = tuple(t.detach().double().requires_grad_(case.backward) for t in given)
        true = reference.attend(exact[0], exact[1], exact[2], small.mask, small.dim**-0.5)[0]
        out = _out(kernel.prepare(small)(*given), small)
        pairs = [(out, true)]
        if case.backward:
            make = torch.Generator().manual_seed(case.seed + 1)
            grad = torch.randn(true.shape, generator=make, dtype=torch.float64).to(true.device)
            pairs += zip(
                torch.autograd.grad(out, given, grad.to(out.dtype)),
                torch.autograd.grad(true, exact, grad),
            )
        gap = max(float((a.detach().double() - b.detach()).abs().nan_to_num(torch.inf).max())
                  for a, b in pairs)  # fmt: skip
        checked[key] = gap


def _measured(
    runner: Live, amount: int, counter: str, checked: dict[tuple[str, str, bool], Any]
) -> Cell:
    case = runner.case
    gap = float(checked[(runner.kernel.name, case.name, case.backward)])
    if gap == float("inf"):
        reason = "wrong: its result holds NaN or infinities where the reference has none"
        return Cell(_settings(runner.kernel, case), FAILED, reason)
    middle = timer.quantiles(runner.times)
    values = {
        "seconds": middle,
        "rounds": len(runner.times),
        "setup_seconds": runner.setup,
        "first_seconds": runner.first,
        "flops": case.flops(),
        "throughput": case.flops() / middle["q50"],
        "peak_bytes": amount,
        "peak_counted": counter,
        "error": gap,
        "exact": gap <= EXACT[case.dtype],
        "area": case.area,
    }
    return Cell(_settings(runner.kernel, case), values=values)


def _settings(kernel: Kernel, case: Case) -> dict[str, Any]:
    return {
        **_sizes(kernel, case),
        "parameters": case.parameters,
        "area_share": case.area / case.total**2,
    }


def _sizes(kernel: Kernel, case: Case) -> dict[str, Any]:
    """What is known of a cell before its mask is built."""
    return {
        "kernel": kernel.name,
        "origin": kernel.origin,
        "mask": case.name,
        "tokens": case.total,
        "backward": case.backward,
        **({"source": kernel.source} if kernel.source else {}),
    }
