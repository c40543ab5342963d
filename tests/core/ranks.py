"""What every rank of `test_parallel` runs: all cases of one number of ranks, against one process.

Rank 0 writes the largest differences of every case as JSON to the path it is given.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from regard.core import (
    Collision,
    Columns,
    Distance,
    Entropy,
    Influence,
    Mask,
    Mass,
    MeanReceived,
    Received,
    Thumbnail,
    TopKeys,
    WindowedDistance,
    attend,
)
from regard.core import measure as measure_alone
from regard.core.parallel import (
    Load,
    Parallel,
    RankLost,
    Shape,
    measure,
    sent,
    shape,
    started,
)

FACTS = [
    Received(),
    MeanReceived(),
    Influence(band=(2, 9)),
    Entropy(),
    Distance(),
    WindowedDistance(window=5),
    Mass({"start": (0, 7), "middle": (9, 30)}),
    Collision(),
    Columns(keys=(0, 11)),
    Thumbnail(cells=8),
]
DOCUMENTS = [19, 1, 7, 10]
MASKS = {
    "full": Mask.full(),
    "causal": Mask.causal(),
    "full_document": Mask.documents(DOCUMENTS),
    "causal_document": Mask.documents(DOCUMENTS) & Mask.causal(),
    "window": Mask.band(6, 0),
    "prefix": Mask.prefix(5) | Mask.causal(),
}


def grids(ranks: int) -> list[Shape]:
    found = [shape(n, ranks) for n in ("ulysses", "ring", "allgather", "usp", "loongtrain")]
    if ranks == 4:
        found.append(Shape("usp", 4, 1))
        found.append(shape("loongtrain", 4, ulysses=2))
    else:
        found.append(shape("usp", 2, ulysses=2))
    return found


def heads(grid: Shape) -> list[tuple[int, int]]:
    """Equal, grouped, and where the scheme deals heads out also fewer key heads than ranks."""
    return [(4, 4), (8, 2), (4, 1)] if grid.ulysses > 1 else [(4, 4), (6, 2)]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, where -inf equals -inf."""
    if a.shape != b.shape:
        return float("inf")
    same = a == b
    return float(torch.where(same, 0.0, (a - b).abs()).max())


def case(grid: Shape, comm: Any, name: str, counts: tuple[int, int], softcap: float | None) -> dict:
    """One call forward and backward, and all facts, on the ranks and alone."""
    mask, tokens = MASKS[name], sum(DOCUMENTS)
    torch.manual_seed(len(name))
    q = torch.randn(2, counts[0], tokens, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, counts[1], tokens, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, counts[1], tokens, 6, dtype=torch.float64, requires_grad=True)
    want = attend(q, k, v, mask=mask, softcap=softcap)
    go, gl = torch.randn_like(want.out), torch.randn_like(want.lse)
    grads = torch.autograd.grad([want.out, want.lse], [q, k, v], [go, gl])
    documents = DOCUMENTS if "document" in name else None
    run = Parallel(grid, tokens, mask, documents=documents, comm=comm)
    own = [run.dispatch(x.detach()).requires_grad_() for x in (q, k, v)]
    comm.sent.clear()
    state = run.attend(*own, softcap=softcap)
    load = Load(run.placement.local, *counts, 8, 6, 2, 8, 8)
    forward = dict(comm.sent) == sent(grid, load)
    comm.sent.clear()
    out = [state.out, state.lse]
    mine = torch.autograd.grad(out, own, [run.dispatch(go), run.dispatch(gl)])
    backward = dict(comm.sent) == sent(grid, load, backward=True)
    result = {
        "out": difference(run.undispatch(state.out), want.out.detach()),
        "lse": difference(run.undispatch(state.lse), want.lse.detach()),
        "bytes": 0.0 if forward and backward else 1.0,
    }
    for label, a, b in zip(("dq", "dk", "dv"), mine, grads):
        result[label] = difference(run.undispatch(a), b)
    if softcap is None:
        q, k = q.detach(), k.detach()
        lse = want.lse.detach()
        alone = measure_alone(q, k, lse, FACTS, mask=mask)
        shared = measure(run, own[0].detach(), own[1].detach(), state.lse.detach(), FACTS)
        for fact, a, b in zip(FACTS, shared, alone):
            result[fact.name] = difference(fact.finish(a), fact.finish(b))
    return result


def refusals() -> dict[str, str]:
    """Messages of what must be refused, by what was wrong."""
    ranks = dist.get_world_size()
    found: dict[str, str] = {}

    def ask(name: str, fn: Any) -> None:
        try:
            fn()
        except ValueError as error:
            found[name] = str(error)

    x = torch.randn(1, 3, 8, 4)
    run = Parallel(shape("ulysses", ranks), 8 * ranks)
    ask("heads", lambda: run.attend(x, x, x))
    ask("rows", lambda: run.attend(x[:, :, :5], x[:, :, :5], x[:, :, :5]))
    ask("grid", lambda: Parallel(shape("ring", ranks + 1), 32))
    dense = Mask.dense(torch.ones(1, 2, 8, 8, dtype=torch.bool))
    ask("mask", lambda: Parallel(run.grid, 8, dense, comm=run.comm))
    y = torch.randn(1, 4, 8, 4)
    ask("fact", lambda: measure(run, y, y, y[..., 0], [TopKeys()]))
    return found


def everything(path: Path) -> None:
    from regard.core.parallel import Comm

    results: dict[str, Any] = {}
    with started(timeout=60):
        for grid in grids(dist.get_world_size()):
            comm = Comm(grid, 60)
            label = f"{grid.name}-{grid.ulysses}x{grid.ring}w{grid.windows}"
            for turn, name in enumerate(MASKS):
                for counts in heads(grid)[turn % 2 :: 2]:
                    softcap = 3.0 if name == "full" else None
                    at = f"{label} {name} {counts[0]}:{counts[1]}"
                    results[at] = case(grid, comm, name, counts, softcap)
        results["refused"] = refusals()
        if dist.get_rank() == 0:
            path.write_text(json.dumps(results))


def lost(how: str) -> None:
    """The last rank ends or sleeps in the middle; all others must say so in time."""
    import os

    with started(timeout=6):
        ranks, rank = dist.get_world_size(), dist.get_rank()
        run = Parallel(shape("ring", ranks), 16, timeout=3)
        x = torch.randn(1, 2, run.placement.local, 4)
        run.attend(x, x, x)
        if rank == ranks - 1:
            if how == "stuck":
                time.sleep(60)
            os._exit(7)
        begun = time.monotonic()
        try:
            for _ in range(3):
                run.attend(x, x, x)
        except RankLost as error:
            print(f"{time.monotonic() - begun:.1f} {error}", flush=True)
            os._exit(2)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "lost":
        lost(sys.argv[2])
    else:
        everything(Path(sys.argv[2]))
