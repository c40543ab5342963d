"""What the bench was asked to show: rules stated before a run, verdicts computed from its cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .record import Result

GIB = 2**30
MIB = 2**20

# each rule is written into the result before the first cell is measured
TARGETS: list[dict[str, Any]] = [
    {
        "name": "kernel",
        "rule": "attend + received takes at most 2.2 times torch's fused attention, by the median, "
        "at 4k and at 8k tokens",
        "limit": 2.2,
    },
    {
        "name": "forward",
        "rule": "the whole forward with received and entropy watched takes at most 1.5 times the "
        "plain fused forward, by the median, at 4k tokens",
        "limit": 1.5,
    },
    {
        "name": "eager",
        "rule": "watching received and entropy is at least 3 times faster than "
        "output_attentions=True at 4k tokens; where those maps do not fit into the machine, "
        "than the eager route that reduces layer by layer",
        "limit": 3.0,
    },
    {
        "name": "linear",
        "rule": "memory over the plain forward grows linearly from 2k to 16k tokens: a power law "
        "through the differences of the peaks has an exponent of at most 1.15, or the difference "
        "stays below 1 % of what the plain forward takes at every length",
        "limit": 1.15,
    },
    {
        "name": "16k",
        "rule": "a process that watches received and entropy of 16k tokens, the logits of the "
        "last position computed, peaks below 6 GiB, libraries and weights included",
        "limit": 6 * GIB,
    },
]


def key_of(tokens: int, row: str, logits: str = "all") -> str:
    """Key of a cell of the model table.

    >>> key_of(4096, "eager")
    '4096/all/eager'
    """
    return f"{tokens}/{logits}/{row}"


def ratio(result: Result, tokens: int, row: str, logits: str = "all") -> dict[str, float] | None:
    """Median, low and high of row over plain time, or None."""
    cell = result.get(key_of(tokens, row, logits))
    spread: dict[str, float] | None = None if cell is None else cell.values.get("ratio")
    return spread


def over(result: Result, tokens: int, row: str, logits: str = "all") -> float | None:
    """Bytes that a row's forward takes over the plain one, or None."""
    cell = result.get(key_of(tokens, row, logits))
    plain = result.get(key_of(tokens, "plain", logits))
    if cell is None or plain is None:
        return None
    return float(cell.values["growth"] - plain.values["growth"])


def kernel_ratio(result: Result, tokens: int, name: str) -> dict[str, float] | None:
    """Median, low and high of an operation over torch's fused attention, or None."""
    from .record import spread

    cell = result.get(f"{tokens}/kernel")
    if cell is None or name not in cell.values["seconds"]:
        return None
    seconds = cell.values["seconds"]
    return dict(spread([a / b for a, b in zip(seconds[name], seconds["sdpa"])]))


def lengths_of(result: Result, logits: str = "all") -> list[int]:
    """Lengths with cells of one kind ("all", "last" or "kernel"), ascending."""
    parts = [key.split("/") for key in result.cells]
    return sorted({int(p[0]) for p in parts if p[1] == logits})


def rows_of(result: Result) -> list[str]:
    """Rows of the model table: the plain model, watch rows, then the other routes."""
    names = dict.fromkeys(k.split("/", 2)[2] for k in result.cells if k.split("/")[1] == "all")
    watched = [r for r in names if _route(result, r) == "watch"]
    others = [r for r in names if _route(result, r) not in ("watch", "plain")]
    order = ("received", "received + entropy", "all facts")
    watched.sort(key=lambda r: order.index(r) if r in order else len(order))
    return [*(r for r in names if _route(result, r) == "plain"), *watched, *others]


def _route(result: Result, row: str) -> str:
    cell = next(c for k, c in result.cells.items() if k.split("/", 2)[1:] == ["all", row])
    return str(cell.settings["route"])


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Slope of a straight line through the logarithms; None unless two positive points or more.

    >>> round(exponent([(1, 3), (2, 12), (4, 48)]), 6)
    2.0
    """
    if len(points) < 2 or any(y <= 0 for _, y in points):
        return None
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys)) / sum((x - mx) ** 2 for x in xs)


def fits(result: Result, row: str) -> dict[str, Any] | None:
    """Longest measured length whose process stays within the memory limit, and longest by a fit.

    The fit is the parabola through the peaks at the three greatest measured lengths: an
    extrapolation, and named as such wherever it is shown. None for a row without numbers.
    """
    limit = result.settings["memory_limit"]
    points = []
    for n in lengths_of(result):
        cell = result.get(key_of(n, row))
        if cell is not None:
            points.append((n, cell.values["total"]))
    if not points:
        return None
    inside = [n for n, total in points if total <= limit]
    # the longest length that fits is known only if a longer one was seen not to
    return {
        "measured": max(inside, default=None),
        "bounded": any(total > limit for _, total in points),
        "extrapolated": _reach(points[-3:], limit),
    }


def _reach(points: Sequence[tuple[int, float]], limit: float) -> int | None:
    """Where the parabola through three points meets the limit, or None."""
    if len(points) < 3:
        return None
    (x0, y0), (x1, y1), (x2, y2) = points
    d1, d2 = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    c = max(0.0, (d2 - d1) / (x2 - x0))  # memory never curves down; noise may
    b = d2 - c * (x1 + x2)
    a = y2 - b * x2 - c * x2 * x2
    root = b * b - 4 * c * (a - limit)
    # this form of the solution holds for a straight line (c = 0) too
    if root < 0 or b + math.sqrt(root) <= 0:
        return None
    return max(0, int(2 * (limit - a) / (b + math.sqrt(root))))


def judge(result: Result) -> list[dict[str, Any]]:
    """Every stated target with what was measured and "met", "missed" or "not measured"."""
    return [
        {"name": t["name"], "rule": t["rule"], **_JUDGES[t["name"]](result, t["limit"])}
        for t in result.targets
    ]


def _kernel(result: Result, limit: float) -> dict[str, Any]:
    ratios = {n: kernel_ratio(result, n, "attend + received") for n in (4096, 8192)}
    if any(r is None for r in ratios.values()):
        return _open()
    shown = ", ".join(f"{_times(r)} at {_k(n)}" for n, r in ratios.items() if r)
    return _closed(all(r["median"] <= limit for r in ratios.values() if r), shown)


def _forward(result: Result, limit: float) -> dict[str, Any]:
    measured = ratio(result, 4096, "received + entropy")
    if measured is None:
        return _open()
    shown = _times(measured)
    last = ratio(result, 4096, "received + entropy", "last")
    if last is not None:
        shown += f"; {_times(last)} when only the last logits are computed"
    return _closed(measured["median"] <= limit, shown)


def _eager(result: Result, limit: float) -> dict[str, Any]:
    watched = ratio(result, 4096, "received + entropy")
    for row in ("eager", "eager, layer by layer"):
        other = ratio(result, 4096, row)
        if watched is not None and other is not None:
            times = other["median"] / watched["median"]
            return _closed(times >= limit, f"{times:.1f} times faster than {row}")
    return _open()


def _linear(result: Result, limit: float) -> dict[str, Any]:
    row = "received + entropy"
    points = [(n, over(result, n, row, "last")) for n in lengths_of(result, "last")]
    known = [(n, y) for n, y in points if y is not None and n >= 2048]
    if len(known) < 3 or known[-1][0] < 16384:
        return _open()
    share = max(y / result.cells[key_of(n, "plain", "last")].values["growth"] for n, y in known)
    slope = exponent(known)
    each = ", ".join(f"{y / MIB:.0f} MiB at {_k(n)}" for n, y in known)
    shown = each + ("" if slope is None else f"; exponent {slope:.2f}")
    if share < 0.01:
        return _closed(True, f"{shown}; at most {100 * max(share, 0):.1f} % of the plain forward")
    return _closed(slope is not None and slope <= limit, shown)


def _16k(result: Result, limit: float) -> dict[str, Any]:
    cell = result.get(key_of(16384, "received + entropy", "last"))
    if cell is None:
        return _open()
    total = cell.values["total"]
    return _closed(total < limit, f"{total / GIB:.2f} GiB")


_JUDGES = {
    "kernel": _kernel,
    "forward": _forward,
    "eager": _eager,
    "linear": _linear,
    "16k": _16k,
}


def _closed(met: bool, shown: str) -> dict[str, Any]:
    return {"verdict": "met" if met else "missed", "measured": shown}


def _open() -> dict[str, Any]:
    return {"verdict": "not measured", "measured": ""}


def _times(r: dict[str, float]) -> str:
    return f"{r['median']:.2f} x ({r['low']:.2f} to {r['high']:.2f})"


def _k(n: int) -> str:
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)
