"""What context parallelism would cost on ranks that are not here: time, memory and walls, computed.

Bytes come from the formulas that `bench parallel` confirms message by message; work from the area
of the mask; speed of device and links from what the user gives. Nothing is measured here, and
nothing here stands for a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from regard.core.parallel import NODE, SCHEMES, Load, Shape, divisors, local_rows, sent, shape
from regard.core.patterns import documents
from regard.errors import InputError, nearest
from regard.report.document import Section
from regard.report.table import Cell, Table, right

GIB = 2**30
# published figures, one direction for links: dense bf16 TFLOP/s and GiB of a device, GB/s of a link
DEVICES = {"a100": (312.0, 80.0), "h100": (989.0, 80.0), "h200": (989.0, 141.0)}
LINKS = {
    "nvlink3": 300.0,
    "nvlink4": 450.0,
    "pcie4": 32.0,
    "pcie5": 64.0,
    "ib-hdr": 25.0,
    "ib-ndr": 50.0,
}
MOST = 2**40  # ranks and heads
DRAWN = 2**28  # tokens for which documents are drawn; longer sequences have more of the same
MASKS = ("causal", "full", "causal_document", "full_document")


@dataclass(frozen=True)
class Machine:
    """Ranks and what joins them.

    Attributes:
        tflops: peak of one device; `efficiency` is the share of it that attention reaches.
        memory: GiB of one device, of which `reserve` GiB hold the model and all else.
        inside, between: GB/s that one rank sends within a node and to another node.
        node: ranks of a node.
        latency: microseconds before a message begins.
    """

    tflops: float
    memory: float
    inside: float
    between: float
    node: int = NODE
    latency: float = 10.0
    efficiency: float = 0.6
    reserve: float = 0.0


@dataclass(frozen=True)
class Estimate:
    """One scheme on one machine; times in milliseconds of one attention call of one layer."""

    scheme: str
    grid: Shape | None
    wall: str = ""
    compute_ms: float = 0.0
    traffic_ms: float = 0.0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    sent_forward: int = 0
    sent_backward: int = 0
    memory_gib: float = 0.0
    most_tokens: int = 0
    most_ranks: int | None = None

    @property
    def possible(self) -> bool:
        return self.grid is not None and not self.wall

    @property
    def total_ms(self) -> float:
        return self.forward_ms + self.backward_ms


def machine(device: str, link: str, **others: Any) -> Machine:
    """A machine from names or numbers.

    Args:
        device: a name of `DEVICES`, or TFLOP/s and GiB as "400:80".
        link: links within and between nodes, "nvlink4:ib-ndr" or GB/s as "450:50"; one for both.

    >>> machine("h100", "450:50").between
    50.0
    """
    if device in DEVICES:
        tflops, memory = DEVICES[device]
    else:
        tflops, memory = _pair(
            device, "--device", f"{', '.join(DEVICES)}, or TFLOP/s and GiB as 400:80", DEVICES
        )
    speeds = [LINKS[x] if x in LINKS else _number(x, link) for x in link.split(":")]
    if len(speeds) not in (1, 2):
        raise InputError(f"--link takes one or two links, such as nvlink4:ib-ndr, not {link!r}")
    measured = Machine(tflops, memory, speeds[0], speeds[-1], **others)
    if not 0 < measured.efficiency <= 1:
        raise InputError(
            f"the efficiency is a share above 0 and up to 1, got {measured.efficiency}"
        )
    if measured.node < 1 or not 0 <= measured.latency < math.inf:
        raise InputError("ranks of a node are at least 1, latency at least 0 and finite")
    if not 0 <= measured.reserve < measured.memory:
        raise InputError(
            f"the reserve lies from 0 to below the {measured.memory:g} GiB of the device, "
            f"got {measured.reserve:g}"
        )
    return measured


def plan(
    ranks: int,
    tokens: int,
    on: Machine,
    *,
    heads: tuple[int, int] = (64, 8),
    dim: int = 128,
    mask: str = "causal",
    schemes: Sequence[str] = SCHEMES,
    bytes_per_element: int = 2,
    ulysses: int | None = None,
) -> list[Estimate]:
    """An estimate for every scheme, the fastest possible one first, those that hit a wall last.

    >>> found = plan(96, 2**20, machine("h100", "nvlink4:ib-ndr"), heads=(64, 8))
    >>> [e.scheme for e in found if not e.possible]
    ['ulysses']
    """
    if not schemes:
        raise InputError(f"name at least one scheme: {', '.join(SCHEMES)}")
    if mask not in MASKS:
        raise InputError(f"unknown mask {mask!r}.{nearest(mask, MASKS)}")
    if ranks < 1 or tokens < ranks or dim < 1 or min(heads) < 1:
        raise InputError("ranks, heads and dim are at least 1, and there is a token for every rank")
    if max(ranks, *heads) > MOST:
        raise InputError(f"ranks and heads are at most {MOST:,}, got {max(ranks, *heads)}")
    if heads[0] % heads[1]:
        raise InputError(f"{heads[0]} query heads are not a multiple of {heads[1]} key heads")
    part, more = tokens, 1.0
    if "document" in mask and tokens > DRAWN:
        part, more = DRAWN, tokens / DRAWN
    lengths = documents(part) if "document" in mask else [tokens]
    work = round(more * _area(lengths, causal=mask.startswith("causal")))
    schedules = []
    for name in dict.fromkeys(schemes):
        limit = most_ranks(name, heads)
        degree = ulysses if name in ("usp", "loongtrain") else None
        try:
            grid = shape(name, ranks, heads=heads, ulysses=degree)
        except ValueError as error:
            if name not in SCHEMES:
                raise InputError(str(error)) from None
            schedules.append(Estimate(name, None, f"heads: {error}", most_ranks=limit))
            continue
        rows = round(more * local_rows(grid, lengths, grid.zigzag))
        load = Load(rows, *heads, dim, dim, 1, bytes_per_element, 4)
        estimate = _estimate(grid, load, work, tokens, on)
        schedules.append(replace(estimate, most_ranks=limit))
    return sorted(schedules, key=lambda e: (not e.possible, e.total_ms))


def most_ranks(name: str, heads: tuple[int, int]) -> int | None:
    """The most ranks that the heads allow; None where they set no limit."""
    if name != "ulysses":
        return None
    return max(p for p in divisors(heads[0]) if heads[1] % p == 0 or p % heads[1] == 0)


def _area(lengths: list[int], causal: bool) -> int:
    return sum(n * (n + 1) // 2 if causal else n * n for n in lengths)


def _estimate(grid: Shape, load: Load, area: int, tokens: int, on: Machine) -> Estimate:
    speed = on.tflops * 1e9 * on.efficiency  # FLOPs a millisecond
    compute = 4.0 * area * load.heads * load.dim / grid.ranks / speed
    ahead, back = sent(grid, load), sent(grid, load, backward=True)
    swap = _swap(grid, ahead.get("heads", 0) + ahead.get("lse", 0), on, calls=5)
    swap_back = _swap(grid, back.get("heads", 0) + back.get("lse", 0), on, calls=5)
    block = ahead.get("kv", 0) / max(grid.ring - 1, 1)
    forward = swap + _ring(grid, compute, block, on)
    grads = block * load.bytes_per_sum / load.bytes_per_element
    backward = swap_back + _ring(grid, 2.5 * compute, block, on) + _home(grid, grads, on)
    memory = _memory(grid, load) / GIB
    room = on.memory - on.reserve
    wall = ""
    if memory > room:
        wall = f"memory: {_short(memory)} GiB a rank, of which {_short(room)} are free"
    return Estimate(
        grid.name,
        grid,
        wall,
        compute,
        swap + _ring(grid, 0.0, block, on),
        forward,
        backward,
        sum(ahead.values()),
        sum(back.values()),
        memory,
        max(0, int(tokens * room / memory)),
    )


def _ms(count: float, gbytes_per_second: float, on: Machine, messages: int = 1) -> float:
    return count / (gbytes_per_second * 1e6) + messages * on.latency / 1e3


def _swap(grid: Shape, count: float, on: Machine, calls: int) -> float:
    """All-to-alls within a group: none of it is hidden behind work."""
    u = grid.ulysses
    if u == 1:
        return 0.0
    outside = max(0, u - on.node) / (u - 1)
    inside = _ms(count * (1 - outside), on.inside, on, calls)
    return inside if not outside else max(inside, _ms(count * outside, on.between, on, calls))


def _hop(grid: Shape, block: float, on: Machine, span: int) -> float:
    """One hop within `span` places: the slowest rank sets the pace, and it may cross nodes."""
    crosses = span * grid.ulysses > on.node
    return _ms(block, on.between if crosses else on.inside, on)


def _ring(grid: Shape, compute: float, block: float, on: Machine) -> float:
    """Keys pass by while they are worked on: each step takes the longer of hop and work."""
    r, windows = grid.ring, grid.windows
    if r == 1:
        return compute
    if grid.gather:
        return (r - 1) * _hop(grid, block, on, r) + compute
    inner = r // windows
    near, step = _hop(grid, block, on, inner), compute / r
    if windows == 1:
        return (r - 1) * max(near, step) + step
    far = _hop(grid, block, on, r)
    window = (inner - 1) * max(near, step) + step
    # an outer hop has a whole window to arrive; it shares the wire with hops that leave the node
    shared = (inner - 1) * near if inner * grid.ulysses > on.node else 0.0
    return (windows - 1) * max(window, far + shared) + window


def _home(grid: Shape, block: float, on: Machine) -> float:
    """Gradients of keys follow the work, so their hops are not hidden."""
    r, windows = grid.ring, grid.windows
    if r == 1:
        return 0.0
    if grid.gather:
        return _ms((r - 1) * block, on.between if grid.ranks > on.node else on.inside, on)
    inner = r // windows
    near = r * _hop(grid, block, on, inner) if inner > 1 else 0.0
    return near + (windows * _hop(grid, block, on, r) if windows > 1 else 0.0)


def _memory(grid: Shape, load: Load) -> float:
    """Bytes that the tensors of forward and backward of one call take on one rank."""
    e, s = load.bytes_per_element, load.bytes_per_sum
    kv = load.kv_heads * grid.check_heads(load.heads, load.kv_heads)
    rows, dims = load.rows * load.batch, load.dim + load.value_dim
    local = rows * (load.heads * dims + load.kv_heads * dims) * e  # q, out, k, v
    dealt = rows * (load.heads * dims + kv * dims) * e if grid.ulysses > 1 else 0
    block = rows * kv * dims  # a place's keys and values for its heads: U rows, 1/U of the heads
    flying = grid.ring if grid.gather else min(grid.ring, 2 + (grid.windows > 1))
    work = rows * load.heads * (load.dim + 2 * load.value_dim) * s + rows * load.heads * s
    grads = local + (flying if grid.gather else 2) * block * s
    return local + dealt + flying * block * e + work + grads


def _number(text: str, whole: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise InputError(
            f"{text!r} in {whole!r} is no number of GB/s and no link.{nearest(text, LINKS)}"
        ) from None
    if not 0 < value < float("inf"):
        raise InputError(f"a speed is positive and finite, got {text!r}")
    return value


def _pair(text: str, option: str, hint: str, names: dict[str, Any]) -> tuple[float, float]:
    parts = text.split(":")
    try:
        first, second = (float(x) for x in parts)
    except ValueError:
        raise InputError(f"{option} takes {hint}, not {text!r}.{nearest(text, names)}") from None
    if not (0 < first < float("inf") and 0 < second < float("inf")):
        raise InputError(f"{option} takes positive figures, such as 400:80, not {text!r}")
    return first, second


def _short(x: float) -> str:
    if x >= 1e7:
        return f"{x:.2g}"
    return f"{x / 1e3:,.0f}k" if x >= 1e5 else f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


# -- showing -------------------------------------------------------------------------------------
def as_dict(estimates: Sequence[Estimate], on: Machine) -> dict[str, Any]:
    """Everything as plain data."""
    rows = [asdict(e) | {"possible": e.possible, "total_ms": e.total_ms} for e in estimates]
    return {"computed": True, "machine": asdict(on), "schemes": rows}


def table(estimates: Sequence[Estimate], title: str) -> Section:
    """The estimates for a terminal, the best first."""
    heads = ("scheme", "grid", "work", "traffic", "fwd", "bwd", "sent", "memory", "fits", "ranks")
    rows: list[list[Any]] = []
    for e in estimates:
        limit = "any" if e.most_ranks is None else str(e.most_ranks)
        if e.grid is None:
            rows.append([e.scheme, *[""] * (len(heads) - 2), limit])
            continue
        grid = f"{e.grid.ulysses}x{e.grid.ring}"
        grid += f"/{e.grid.windows}" if e.grid.windows > 1 else ""
        rows.append(
            [
                e.scheme,
                grid,
                *(_short(x) for x in (e.compute_ms, e.traffic_ms, e.forward_ms, e.backward_ms)),
                _short((e.sent_forward + e.sent_backward) / GIB),
                _short(e.memory_gib),
                f"{e.most_tokens / 2**20:.3g}M",
                limit,
            ]
        )
    styled = [
        [Cell(text, "" if e.possible else "dim") for text in row] for e, row in zip(estimates, rows)
    ]
    lines = [f"{e.scheme} hits a wall: {e.wall}" for e in estimates if not e.possible]
    able = [e for e in estimates if e.possible]
    if able:
        same = [e.scheme for e in able if e.total_ms <= 1.005 * able[0].total_ms]
        lines.append("best: " + (" and ".join(same) if len(same) > 1 else same[0]))
    else:
        lines.append("no scheme is possible here: take more ranks, or fewer tokens")
    lines.append(
        "Computed from formulas and the figures given, for one attention call; not measured."
    )
    lines.append(
        "grid: ranks that share heads x places of the ring / windows of a double ring; work, "
        "traffic, fwd, bwd: ms, the first two of a forward; sent, memory: GiB of one rank, forward "
        "and backward; fits: tokens in this memory; ranks: the most that the heads allow"
    )
    table = Table([*heads[:2], *map(right, heads[2:])], styled, keys=1)
    return Section(title, [table, *lines])
