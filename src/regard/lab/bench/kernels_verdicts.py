"""What a result of bench kernels says: its rows, and the targets that were stated before it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from .kernels import key_of
from .record import Cell, Result

OURS, DENSE = "attend", "sdpa"
FASTER, LONG = 3.0, 8192  # times as fast as the dense mask, and from which length on
SPARSE_LOW, SPARSE_HIGH, SPARSE_FIXED = 0.5, 1.5, 0.1
LINEAR = 1.25
# masks of the target "faster": windows, documents and prefixes
SKIPPING = (
    "sliding_window",
    "sliding_window_causal",
    "full_document",
    "causal_document",
    "prefix_lm_causal",
    "prefix_lm_document",
)


def cells(result: Result) -> Iterator[Cell]:
    """The cells that are kernels' (one holds the machine's ceilings)."""
    return (c for key, c in result.cells.items() if key != "machine")


def values(result: Result, what: str) -> list[Any]:
    """Every `kernel`, `mask`, `tokens` or `backward` that occurs, in order."""
    distinct = list(dict.fromkeys(c.settings[what] for c in cells(result)))
    return sorted(distinct) if what in ("tokens", "backward") else distinct


def seconds(result: Result, kernel: str, mask: str, total: int, backward: bool = False) -> float:
    """Median seconds, NaN where the cell was not measured."""
    cell = result.get(key_of(kernel, mask, total, backward))
    return cell.values["seconds"]["q50"] if cell else math.nan


def ratio(result: Result, mask: str, total: int, kernel: str = OURS, against: str = DENSE) -> float:
    """How many times as fast as `against` the kernel's forward is; NaN if one was not measured."""
    return seconds(result, against, mask, total) / seconds(result, kernel, mask, total)


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of log y over log x by least squares; NaN for fewer than two lengths.

    >>> round(exponent([(1, 1), (2, 4), (4, 16)]), 6)
    2.0
    """
    logs = [(math.log(x), math.log(max(y, 1.0))) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        return math.nan
    mx, my = (sum(p[n] for p in logs) / len(logs) for n in (0, 1))
    return sum((x - mx) * (y - my) for x, y in logs) / sum((x - mx) ** 2 for x, _ in logs)


def densities(result: Result, kernel: str = OURS) -> dict[tuple[int, int], dict[float, float]]:
    """{(tokens, block): {kept share: time over that of density 1}} of the block-sparse rows."""
    by_case: dict[tuple[int, int], dict[float, float]] = {}
    for cell in cells(result):
        s = cell.settings
        sparse = s["mask"].startswith("block_sparse:") and not s["backward"]
        if cell.ok and sparse and s["kernel"] == kernel:
            at = (s["tokens"], s["parameters"]["block"])
            by_case.setdefault(at, {})[s["area_share"]] = cell.values["seconds"]["q50"]
    return {at: {d: t / row[1.0] for d, t in sorted(row.items())}
            for at, row in by_case.items() if 1.0 in row and len(row) > 1}  # fmt: skip


def memory(result: Result, kernel: str, mask: str) -> list[tuple[int, int]]:
    """(tokens, peak bytes) of the forward."""
    rows = []
    for total in values(result, "tokens"):
        cell = result.get(key_of(kernel, mask, total, False))
        if cell:
            rows.append((total, cell.values["peak_bytes"]))
    return rows


def judge(result: Result) -> list[dict[str, Any]]:
    """The targets with `verdict` ("met", "missed", "not measured") and `measured`, in words."""
    rules = {"exact": _exact, "sparse": _sparse, "linear": _linear, "faster": _faster,
             "matrix": _matrix}  # fmt: skip
    return [{**t, **rules[t["key"]](result)} for t in result.targets if t["key"] in rules]


def _verdict(met: bool, words: str) -> dict[str, Any]:
    return {"verdict": "met" if met else "missed", "measured": words}


def _none() -> dict[str, Any]:
    return {"verdict": "not measured", "measured": "no such rows"}


def _exact(result: Result) -> dict[str, Any]:
    done = [c for c in cells(result) if c.ok and c.settings["origin"] != "user"]
    if not done:
        return _none()
    wrong = [c for c in done if not c.values["exact"]]
    worst = max(done, key=lambda c: c.values["error"])
    words = f"{len(done) - len(wrong)} of {len(done)} cells; largest error "
    return _verdict(not wrong, f"{words}{worst.values['error']:.1e} ({worst.settings['kernel']})")


def _sparse(result: Result) -> dict[str, Any]:
    by_case = densities(result)
    if not by_case:
        return _none()
    least = [SPARSE_LOW * d <= r <= SPARSE_HIGH * d + SPARSE_FIXED
             for row in by_case.values() for d, r in row.items()]  # fmt: skip
    words = "; ".join(
        f"block {block} at {k(total)}: "
        + ", ".join(f"{d:.2f} kept {r:.2f} of the time" for d, r in row.items() if d < 1)
        for (total, block), row in by_case.items()
    )
    return _verdict(all(least), words)


def _linear(result: Result) -> dict[str, Any]:
    growth = {}
    for mask in values(result, "mask"):
        slope = exponent([p for p in memory(result, OURS, mask) if p[0] >= 1024])
        if not math.isnan(slope):
            growth[mask] = slope
    if not growth:
        return _none()
    worst = max(growth, key=lambda m: growth[m])
    return _verdict(
        growth[worst] <= LINEAR,
        f"{min(growth.values()):.2f} to {growth[worst]:.2f} (most on {worst}), {len(growth)} masks",
    )


def _longest(result: Result) -> tuple[int, dict[str, float]]:
    for total in reversed([n for n in values(result, "tokens") if n >= LONG]):
        speedups = {m: ratio(result, m, total) for m in SKIPPING}
        speedups = {m: r for m, r in speedups.items() if not math.isnan(r)}
        if speedups:
            return total, speedups
    return 0, {}


def _faster(result: Result) -> dict[str, Any]:
    total, speedups = _longest(result)
    if not speedups:
        return _none()
    words = ", ".join(
        f"{m} {r:.1f}x ({ceiling(result, m, total):.1f}x by its area)" for m, r in speedups.items()
    )
    return _verdict(min(speedups.values()) >= FASTER, f"at {k(total)}: {words}")


def ceiling(result: Result, mask: str, total: int) -> float:
    """How many times as fast a kernel gets by leaving out what the mask forbids, and nothing else.

    Work over all pairs by work over allowed ones, from the exact area. A kernel can be above it
    where the other must read a mask besides.
    """
    share = result.cells[key_of(OURS, mask, total, False)].settings["area_share"]
    return 1 / share if share else math.inf


def within_reach(result: Result) -> tuple[int, list[list[str]]]:
    """(length, table) of the target "faster", mask by mask; (0, []) where it was not measured."""
    total, speedups = _longest(result)
    if not speedups:
        return 0, []
    grid = [["mask", "kept", "most by its area", "target", "measured", "verdict"]]
    for mask, times in speedups.items():
        most = ceiling(result, mask, total)
        beyond = most < FASTER and times < FASTER
        word = "met" if times >= FASTER else "beyond its area" if beyond else "missed"
        grid.append(
            [mask, f"{1 / most:.3f}", f"{most:.1f}x", f"{FASTER:g}x", f"{times:.1f}x", word]
        )
    return total, grid


def _matrix(result: Result) -> dict[str, Any]:
    total, speedups = _longest(result)
    if not speedups:
        return _none()
    peaks = {m: dict(memory(result, OURS, m))[total] for m in speedups}
    worst = max(peaks, key=lambda m: peaks[m])
    return _verdict(
        peaks[worst] < total**2,
        f"at {k(total)}: at most {peaks[worst] / 2**20:.0f} MiB ({worst}), a boolean mask has "
        f"{total**2 / 2**20:.0f} MiB",
    )


def k(n: int) -> str:
    """A length in short.

    >>> k(4096), k(1000)
    ('4k', '1000')
    """
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)
