"""Five schemes of context parallelism and those of peers, in one table; run under torchrun.

Each rank holds its rows of the same random q, k, v. Time is that of the slowest rank; bytes are
counted as they are sent and compared with the formula; output and gradients are compared with one
process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from regard.core import Mask, attend
from regard.core.parallel import (
    SCHEMES,
    Comm,
    Load,
    Parallel,
    RankLost,
    Shape,
    device,
    pieces,
    place,
    sent,
    shape,
)
from regard.core.parallel.schemes import divisors
from regard.core.patterns import PATTERNS, documents
from regard.errors import InputError, nearest

from .record import (
    FAILED,
    MEASURED,
    NOT_INSTALLED,
    UNSUPPORTED,
    Cell,
    Result,
    environment,
    resume,
    show_progress,
    spread,
)

Times = dict[str, list[float]]
WRONG = 0.05  # beyond what any dtype rounds
TYPES = {t: getattr(torch, t) for t in ("float64", "float32", "bfloat16", "float16")}
# the reference is float64 in one process: it takes as long as all ranks together and longer
CHECKED = {"cpu": 8192, "cuda": 65536}


def run(
    schemes: Sequence[str] = SCHEMES,
    *,
    mask: str = "causal_document",
    tokens_per_rank: int = 1024,
    heads: tuple[int, int] = (8, 2),
    dim: int = 64,
    dtype: str = "float32",
    lengths: Sequence[int] | None = None,
    ulysses: int | None = None,
    repeats: int = 5,
    backward: bool = True,
    peer: bool = True,
    out: str | Path | None = None,
    timeout: float = 600.0,
    progress: Callable[[str], None] = show_progress,
) -> Result:
    """Measure every scheme on the ranks of the running process group; the same on every rank.

    Args:
        mask: a name of `core.patterns.PATTERNS`.
        lengths: document lengths that add up to all tokens; drawn like a corpus when None.
        ulysses: ranks of a group of usp and loongtrain; their defaults when None.
        out: JSON that rank 0 writes after every cell; a run that was cut off goes on from it.

    Raises:
        InputError: an unknown scheme, mask or dtype, heads or documents that do not fit, a ulysses
            degree that does not divide the ranks.
    """
    check(schemes, mask, heads, dtype)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    _check_degree(ulysses, ranks, schemes)
    comm = Comm(Shape("ring", 1, ranks), timeout)
    tokens = tokens_per_rank * ranks
    packed = "document" in mask or mask in ("share_question", "causal_blockwise")
    if lengths is not None and not packed:
        raise InputError(f"the mask {mask} has no documents: leave their lengths out")
    parts = (list(lengths) if lengths else documents(tokens)) if packed else None
    if mask == "block_causal_document":
        parts = None  # its documents are whole blocks of its own
    given = {"lengths": parts} if parts is not None else {}
    described = PATTERNS[mask].build(tokens, **given)
    settings = {
        "mask": mask,
        "tokens": tokens,
        "ranks": ranks,
        "heads": list(heads),
        "dim": dim,
        "dtype": dtype,
        "documents": parts,
        "backward": backward,
        "device": device().type,
        "timing": f"slowest rank; median of {repeats} after one warm-up",
    }
    result = _begin(comm, out, Result("parallel", settings, environment(torch.get_num_threads())))
    data = _Data(tokens, heads, dim, TYPES[dtype], described, backward, comm.rank)
    names = [*dict.fromkeys(schemes), *(PEERS if peer else [])]
    settled = _same(comm, [result.settled(name) for name in names])
    for name, done in zip(names, settled):
        if done:
            continue
        if comm.rank == 0:
            progress(f"{name} on {ranks} ranks, {tokens} tokens, {mask}")
        if name in PEERS:
            cell = _peer(comm, name, data, mask, repeats)
        else:
            cell = _scheme(comm, name, data, parts, ulysses, repeats, timeout)
        result.cells[name] = cell
        if comm.rank == 0:
            result.save(out)
    return result


def check(schemes: Sequence[str], mask: str, heads: tuple[int, int], dtype: str) -> None:
    """Refuse what no run could do, before any process waits for another."""
    if not schemes:
        raise InputError(f"name at least one scheme: {', '.join(SCHEMES)}")
    for name in schemes:
        if name not in SCHEMES:
            raise InputError(f"unknown scheme {name!r}.{nearest(name, SCHEMES)}")
    known = [n for n, p in PATTERNS.items() if p.kind != "dynamic"]
    if mask not in known:
        raise InputError(f"unknown mask {mask!r}.{nearest(mask, known)}")
    if dtype not in TYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(TYPES)}")
    if min(heads) < 1 or heads[0] % heads[1]:
        raise InputError(f"{heads[0]} query heads are not a multiple of {heads[1]} key heads")


def _check_degree(ulysses: int | None, ranks: int, schemes: Sequence[str]) -> None:
    """A degree that somebody asks for must be possible; what heads forbid is a scheme's outcome."""
    if ulysses is None:
        return
    if not {"usp", "loongtrain"} & set(schemes):
        raise InputError(
            f"--ulysses {ulysses} is for usp and loongtrain, and neither is measured: leave it out"
        )
    if ulysses < 1 or ranks % ulysses:
        raise InputError(
            f"{ranks} ranks do not divide in groups of {ulysses}: choose --ulysses among "
            f"{', '.join(map(str, divisors(ranks)))}"
        )


class _Data:
    """The same random q, k, v on every rank, and what one process makes of them."""

    def __init__(
        self,
        tokens: int,
        heads: tuple[int, int],
        dim: int,
        dtype: torch.dtype,
        mask: Mask,
        backward: bool,
        rank: int,
    ) -> None:
        self.tokens, self.heads, self.dim, self.dtype = tokens, heads, dim, dtype
        self.mask, self.backward, self.rank = mask, backward, rank
        self.area = int(mask.area(tokens, tokens))
        self.whole: list[Tensor] = []
        self.checked = tokens <= CHECKED[device().type]
        if self.checked:
            make = torch.Generator().manual_seed(42)
            counts = (heads[0], heads[1], heads[1], heads[0])
            self.whole = [
                torch.randn(1, n, tokens, dim, generator=make).to(dtype).to(device())
                for n in counts
            ]
        self._want: list[Tensor] | None = None

    def rows(self, dispatch: Callable[[Tensor], Tensor], rows: int) -> list[Tensor]:
        """q, k, v and the gradient of out of one rank."""
        if self.checked:
            return [dispatch(x) for x in self.whole]
        counts = (self.heads[0], self.heads[1], self.heads[1], self.heads[0])
        make = torch.Generator(device()).manual_seed(42 + self.rank)
        return [
            torch.randn(1, n, rows, self.dim, generator=make, device=device(), dtype=self.dtype)
            for n in counts
        ]

    @property
    def want(self) -> list[Tensor]:
        """out, dq, dk, dv of one process, float64."""
        if self._want is None:
            q, k, v, grad = (x.double() for x in self.whole)
            leaves = [x.requires_grad_(self.backward) for x in (q, k, v)]
            state = attend(*leaves, mask=self.mask)
            grads = torch.autograd.grad(state.out, leaves, grad) if self.backward else ()
            self._want = [state.out.detach(), *grads]
        return self._want

    def copied(self) -> list[Tensor]:
        """All rows of q, k, v and the gradient of out, as many key heads as query heads."""
        return [x.repeat_interleave(self.heads[0] // x.shape[1], 1) for x in self.whole]

    def errors(self, results: Sequence[Tensor]) -> list[float]:
        """Largest difference from one process, as a share of its largest value."""
        return [
            float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(results, self.want)
        ]


def _scheme(
    comm: Comm,
    name: str,
    data: _Data,
    parts: list[int] | None,
    ulysses: int | None,
    repeats: int,
    timeout: float,
) -> Cell:
    degree = ulysses if name in ("usp", "loongtrain") else None
    try:
        grid = shape(name, comm.size, heads=data.heads, ulysses=degree)
    except ValueError as error:
        return Cell({"scheme": name}, UNSUPPORTED, str(error))
    settings = {
        "scheme": name,
        "ulysses": grid.ulysses,
        "ring": grid.ring,
        "windows": grid.windows,
    }
    scheme_comm = Comm(grid, timeout)
    run = Parallel(grid, data.tokens, data.mask, documents=parts, comm=scheme_comm)
    q, k, v, grad = data.rows(run.dispatch, run.placement.local)
    leaves = [x.requires_grad_(data.backward) for x in (q, k, v)]
    times: Times = {"forward": [], "backward": []}
    bytes_: dict[str, dict[str, int]] = {}
    results: list[Tensor] = []
    for turn in range(repeats + 1):
        scheme_comm.sent.clear()
        out, seconds = _timed(comm, lambda: run.attend(*leaves).out)
        bytes_["forward"] = dict(scheme_comm.sent)
        if turn:
            times["forward"].append(seconds)
        results = [out.detach()]
        if data.backward:
            scheme_comm.sent.clear()
            grads, seconds = _timed(comm, partial(torch.autograd.grad, out, leaves, grad))
            bytes_["backward"] = dict(scheme_comm.sent)
            if turn:
                times["backward"].append(seconds)
            results += grads
    wholes = [run.undispatch(x) for x in results]
    size = torch.finfo(data.dtype).bits // 8
    load_ = Load(
        run.placement.local,
        *data.heads,
        data.dim,
        data.dim,
        1,
        size,
        8 if data.dtype == torch.float64 else 4,
    )
    values: dict[str, Any] = {"rows": run.placement.local, "padding": run.placement.padding}
    # a rank's share of the heads is equal, so the work of its place is its work
    areas = _numbers(comm, run.area())
    values["balance"] = max(areas) / (sum(areas) / len(areas))
    values["balance_unplaced"] = _unplaced(grid, data)
    for way, spent in times.items():
        if not spent:
            continue
        expected = sent(grid, load_, backward=way == "backward")
        sums = _numbers(comm, sum(bytes_[way].values()))
        flops = (4.0 if way == "forward" else 10.0) * data.area * data.heads[0] * data.dim
        values[way] = {
            "ms": {n: 1e3 * x for n, x in spread(spent).items()},
            "sent": bytes_[way],
            "sent_most": int(max(sums)),
            "formula": expected,
            "as_formula": all(s == sum(expected.values()) for s in sums)
            and bytes_[way] == expected,
            "gflops_per_rank": flops / comm.size / spread(spent)["median"] / 1e9,
        }
    values |= _errors(comm, data, wholes)
    scheme_comm.close()
    return Cell(settings, MEASURED, "" if data.checked else _UNCHECKED, values)


_UNCHECKED = "too long for the float64 reference in one process, so no error is stated"


def _errors(comm: Comm, data: _Data, wholes: Sequence[Tensor]) -> dict[str, Any]:
    if not data.checked:
        return {"error": None}
    # one rank computes the reference, and the others wait for its word
    local = data.errors(wholes) if comm.rank == 0 else [0.0] * len(wholes)
    errors = comm.sum(torch.tensor(local, dtype=torch.float64, device=device())).tolist()
    return {"error": dict(zip(("out", "dq", "dk", "dv"), errors))}


def _unplaced(grid: Shape, data: _Data) -> float:
    """Balance if the rows were dealt out in order, without zigzag."""
    placement = place(grid, data.tokens, None, zigzag=False)
    areas = [
        sum(
            p.mask.area(p.queries.stop - p.queries.start, p.keys.stop - p.keys.start)
            for b in range(grid.ring)
            for p in pieces(data.mask, placement, a, b)
        )
        for a in range(grid.ring)
    ]
    return max(areas) * len(areas) / sum(areas)


@dataclass(frozen=True)
class Peer:
    """Another library's context parallelism: what it takes, and how to run it."""

    masks: tuple[str, ...]
    chunks: int  # the tokens divide by so many times the ranks
    run: Callable[[Comm, _Data, bool, int], tuple[Times, list[Tensor]]]


def _peer(comm: Comm, name: str, data: _Data, mask: str, repeats: int) -> Cell:
    """A peer over the same q, k, v, whose key heads are copied: none of them takes grouped ones."""
    settings, peer = {"scheme": name}, PEERS[name]
    if mask not in peer.masks:
        takes = " and ".join(peer.masks)
        return Cell(settings, UNSUPPORTED, f"it takes {takes} attention, not {mask}")
    if not data.checked:
        return Cell(settings, UNSUPPORTED, "it shards whole tensors, which are too long here")
    if comm.size == 1:
        return Cell(settings, UNSUPPORTED, "it needs two ranks or more")
    if data.tokens % (peer.chunks * comm.size):
        by = f"{peer.chunks} x the ranks" if peer.chunks > 1 else "the ranks"
        return Cell(settings, UNSUPPORTED, f"{data.tokens} tokens do not divide by {by}")
    try:
        times, results = peer.run(comm, data, mask == "causal", repeats)
    except ModuleNotFoundError as error:
        return Cell(settings, NOT_INSTALLED, f"pip install {error.name}")
    except (RuntimeError, ValueError, NotImplementedError, ImportError, TypeError) as error:
        if isinstance(error, RankLost):
            raise
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        no = isinstance(error, (NotImplementedError, ImportError))
        return Cell(settings, UNSUPPORTED if no else FAILED, line)
    values: dict[str, Any] = {
        way: {"ms": {n: 1e3 * x for n, x in spread(spent).items()}}
        for way, spent in times.items()
        if spent
    }
    copies = data.heads[0] // data.heads[1]
    folded = [x.unflatten(1, (-1, copies)).sum(2) for x in results[2:]]
    values |= _errors(comm, data, [*results[:2], *folded])
    worst = max(values["error"].values())
    if worst > WRONG:
        return Cell(settings, FAILED, f"it differs from one process by {worst:.1e}", values)
    return Cell(settings, MEASURED, "", values)


def _turns(
    comm: Comm,
    data: _Data,
    shards: Sequence[Tensor],
    attend: Callable[..., Tensor],
    repeats: int,
) -> tuple[Times, list[Tensor]]:
    """Seconds of a peer's calls after a warm-up, and its last out, dq, dk and dv, of own rows."""
    *rows, grad = shards
    leaves = [x.detach().requires_grad_(data.backward) for x in rows]
    times: Times = {"forward": [], "backward": []}
    results: list[Tensor] = []
    for turn in range(repeats + 1):
        out, seconds = _timed(comm, partial(attend, *leaves))
        if turn:
            times["forward"].append(seconds)
        results = [out.detach()]
        if data.backward:
            grads, seconds = _timed(comm, partial(torch.autograd.grad, out, leaves, grad))
            if turn:
                times["backward"].append(seconds)
            results += grads
    return times, results


def _torch(comm: Comm, data: _Data, causal: bool, repeats: int) -> tuple[Times, list[Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import context_parallel_unshard
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mesh = init_device_mesh(device().type, (comm.size,))
    functional = torch.nn.functional  # context_parallel replaces the function in this module
    shards = data.copied()
    flash = SDPBackend.FLASH_ATTENTION
    backend = SDPBackend.EFFICIENT_ATTENTION if data.dtype == torch.float32 else flash
    if device().type == "cpu":
        backend = flash
    with context_parallel(mesh, buffers=shards, buffer_seq_dims=[2] * 4), sdpa_kernel([backend]):
        fused: Callable[..., Tensor] = functional.scaled_dot_product_attention
        # the shards themselves are resized at the end, which leaves of a graph may not be
        times, results = _turns(comm, data, shards, partial(fused, is_causal=causal), repeats)
        return times, context_parallel_unshard(mesh, results, [2] * len(results))


def _diffusers(
    scheme: str, comm: Comm, data: _Data, causal: bool, repeats: int
) -> tuple[Times, list[Tensor]]:
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
    from torch.distributed.device_mesh import init_device_mesh

    on_gpu = device().type == "cuda"
    if scheme == "ring" and not (on_gpu and data.dtype in (torch.bfloat16, torch.float16)):
        raise NotImplementedError("its ring takes kernels with an lse: cuDNN's, in 16 bits on GPUs")
    if data.heads[0] % comm.size and scheme == "ulysses":
        raise NotImplementedError(f"{data.heads[0]} heads do not divide by {comm.size} ranks")
    degrees = (comm.size, 1) if scheme == "ring" else (1, comm.size)
    config = ContextParallelConfig(ring_degree=degrees[0], ulysses_degree=degrees[1])
    mesh = init_device_mesh(device().type, config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    parallel = ParallelConfig(context_parallel_config=config)
    parallel.setup(comm.rank, comm.size, device(), mesh=mesh)
    attend = partial(
        dispatch_attention_fn,
        is_causal=causal,
        backend=AttentionBackendName("_native_cudnn" if scheme == "ring" else "native"),
        parallel_config=parallel,
    )
    # it has rows before heads
    shards = [x.transpose(1, 2).chunk(comm.size, 1)[comm.rank].contiguous() for x in data.copied()]
    times, results = _turns(comm, data, shards, attend, repeats)
    return times, [torch.cat(comm.gather_all(x.contiguous()), 1).transpose(1, 2) for x in results]


# torch.distributed.tensor.experimental.context_parallel, and the schemes of diffusers' dispatcher
PEERS = {
    "torch": Peer(("causal", "full"), 2, _torch),
    "diffusers ulysses": Peer(("full",), 1, partial(_diffusers, "ulysses")),
    "diffusers ring": Peer(("full",), 1, partial(_diffusers, "ring")),
}


def _timed(comm: Comm, call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call gives, and the seconds of the slowest rank."""
    comm.barrier()
    _settle()
    begun = time.perf_counter()
    value = call()
    _settle()
    return value, max(_numbers(comm, time.perf_counter() - begun))


def _settle() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def _numbers(comm: Comm, value: float) -> list[float]:
    """One number of every rank."""
    x = torch.tensor([float(value)], dtype=torch.float64, device=device())
    return [float(part) for part in comm.gather_all(x)]


def _same(comm: Comm, flags: Sequence[bool]) -> list[bool]:
    """Rank 0's flags, on every rank."""
    x = torch.tensor([float(f) for f in flags], device=device())
    return (comm.sum(x if comm.rank == 0 else torch.zeros_like(x)) > 0).tolist()


def _begin(comm: Comm, out: str | Path | None, new: Result) -> Result:
    """The result to go on from; where rank 0 cannot read it, every rank stops."""
    failure: InputError | None = None
    result = new
    if comm.rank == 0:
        try:
            result = resume(out, new, __name__)
        except InputError as error:
            failure = error
    if _same(comm, [failure is not None])[0]:
        raise failure or InputError("rank 0 could not go on from the result file: see its message")
    return result


if __name__ == "__main__":
    import sys

    from regard.files import write_text

    from .parallel_page import page

    write_text(Path(sys.argv[1]), page(sys.argv[2:]))
