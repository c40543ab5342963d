"""One attention call over a sequence that is dealt out to ranks: States, merged as keys come by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..attend import attend
from ..kernels import tiled
from ..mask import Mask
from ..state import State, merge
from .comm import TIMEOUT, Comm
from .placement import Piece, Placement, pieces, place
from .schemes import Shape, shape

_INNER, _OUTER, _GRADIENT = 1, 2, 3  # message tags


class Parallel:
    """A scheme, set up for one sequence: `dispatch`, `attend`, `undispatch`, on every rank alike.

    Args:
        scheme: one of `SCHEMES`, or a `Shape` from `shape(...)`.
        tokens: length of the sequence.
        mask: who sees whom, over the whole sequence; causal when None. Any `Mask` but one that
            differs between heads.
        documents: lengths of packed documents; the ring family pads and cuts each on its own. They
            place the rows and do not mask: join `Mask.documents(lengths)` to the mask for that.
        comm: messages of another `Parallel` on the same grid, to share its groups.
        timeout: seconds after which a silent rank counts as lost.

    Without a process group it is a single rank.

    >>> q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    >>> run = Parallel("ring", 6)
    >>> state = run.attend(run.dispatch(q), run.dispatch(k), run.dispatch(v))
    >>> whole = attend(q, k, v, mask=Mask.causal())
    >>> torch.allclose(run.undispatch(state.out), whole.out, atol=1e-6)
    True
    """

    def __init__(
        self,
        scheme: str | Shape,
        tokens: int,
        mask: Mask | None = None,
        *,
        documents: Sequence[int] | None = None,
        comm: Comm | None = None,
        zigzag: bool | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        if isinstance(scheme, str):
            scheme = comm.grid if comm is not None else shape(scheme, _ranks())
        self.grid = scheme
        self.comm = comm if comm is not None else Comm(scheme, timeout)
        self.mask = Mask.causal() if mask is None else mask
        self.tokens = tokens
        self.placement: Placement = place(scheme, tokens, documents, zigzag)
        self.positions = self.placement.positions(self.comm.rank)
        _check_mask(self.mask, tokens)
        self._pieces: dict[tuple[int, int, Mask], list[Piece]] = {}

    # -- rows --------------------------------------------------------------------------------------
    def dispatch(self, x: Tensor, dim: int = 2) -> Tensor:
        """The rows of this rank, padding filled with zeros, of a tensor over the whole sequence."""
        if x.shape[dim] != self.tokens:
            raise ValueError(
                f"dimension {dim} has {x.shape[dim]} rows, the sequence {self.tokens} tokens"
            )
        at = self.positions.to(x.device)
        rows = x.index_select(dim, at.clamp_min(0))
        empty = (at < 0).view([-1 if d == dim % x.dim() else 1 for d in range(x.dim())])
        return rows.masked_fill(empty, 0)

    def undispatch(self, x: Tensor, dim: int = 2) -> Tensor:
        """The tensor over the whole sequence, on every rank, from the rows of each; no
        gradients.
        """
        parts = self.comm.gather_all(x.detach())
        size = list(x.shape)
        size[dim] = self.tokens
        whole = x.new_zeros(size)
        for rank, part in enumerate(parts):
            at = self.placement.positions(rank).to(x.device)
            real = (at >= 0).nonzero()[:, 0]
            whole.index_copy_(dim, at[real], part.index_select(dim, real))
        return whole

    # -- attention ---------------------------------------------------------------------------------
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> State:
        """The State of this rank's rows over all keys; exact, with gradients to q, k and v.

        Args:
            q: `[batch, heads, rows, head_dim]`; k, v: `[batch, kv_heads, rows, dim]`, own rows
                only. Rows that are padding give out 0 and lse -inf.
            mask: another mask over the whole sequence than the one given at the start.

        Raises:
            ValueError: heads that the scheme cannot deal out, or rows of another length.
            RankLost: another rank did not answer in time.
        """
        self._check(q, k)
        if mask is not None and mask is not self.mask:
            _check_mask(mask, self.tokens)
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        out, lse = _Attend.apply(q, k, v, self, self.mask if mask is None else mask, scale, softcap)
        return State(out, lse)

    def area(self, place: int | None = None) -> int:
        """Allowed pairs that the queries of one place of the ring have; the work of its ranks."""
        own = self.comm.place if place is None else place
        return sum(
            p.mask.area(p.queries.stop - p.queries.start, p.keys.stop - p.keys.start)
            for other in range(self.grid.ring)
            for p in self.pieces(own, other)
        )

    def pieces(self, own: int, other: int, mask: Mask | None = None) -> list[Piece]:
        """The rectangles that the queries of one place and the keys of another make."""
        mask = self.mask if mask is None else mask
        key = (own, other, mask)
        if key not in self._pieces:
            self._pieces[key] = pieces(mask, self.placement, own, other)
        return self._pieces[key]

    def share(self, q: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        """Own rows of all heads to all rows of the group for this rank's heads."""
        copies = self.grid.check_heads(q.shape[1], keys[0].shape[1])
        if copies > 1:
            keys = tuple(x.repeat_interleave(copies, 1) for x in keys)
        return tuple(self.comm.to_heads(x) for x in (q, *keys))

    def rounds(self, block: Tensor, label: str = "kv") -> Iterator[tuple[int, Tensor]]:
        """(place it comes from, block) for the block of every place of the ring, own first.

        The double ring passes blocks on inside a window and, meanwhile, from window to window.
        """
        comm, windows = self.comm, self.grid.windows
        inner = self.grid.ring // windows
        a, b = divmod(comm.place, inner)
        if self.grid.gather:
            if self.grid.ring > 1:
                yield from enumerate(comm.gather(block, label))
            else:
                yield 0, block
            return
        for o in range(windows):
            far = self._outward(block, label, _OUTER) if o < windows - 1 else None
            for i in range(inner):
                near = self._onward(block, label, _INNER) if i < inner - 1 else None
                yield (a - o) % windows * inner + (b - i) % inner, block
                block = near.wait() if near is not None else block
            block = far.wait() if far is not None else block

    def rounds_home(
        self, block: Tensor, contribute: Callable[[int, Tensor], Tensor], zero: Tensor
    ) -> Tensor:
        """As `rounds`; what every place contributes to a block is summed and brought home to it."""
        comm, windows = self.comm, self.grid.windows
        if self.grid.gather:
            parts = [contribute(src, x) for src, x in self.rounds(block)]
            if len(parts) == 1:
                return parts[0]
            return comm.scatter_sum(torch.stack(parts), "kv_grad")
        inner = self.grid.ring // windows
        a, b = divmod(comm.place, inner)
        total = zero
        for o in range(windows):
            far = self._outward(block, "kv", _OUTER) if o < windows - 1 else None
            for i in range(inner):
                near = self._onward(block, "kv", _INNER) if i < inner - 1 else None
                source = (a - o) % windows * inner + (b - i) % inner
                total = total + contribute(source, block)
                if inner > 1:
                    total = self._onward(total, "kv_grad", _GRADIENT).wait()
                block = near.wait() if near is not None else block
            if windows > 1:
                total = self._outward(total, "kv_grad", _GRADIENT).wait()
            block = far.wait() if far is not None else block
        return total

    def _onward(self, x: Tensor, label: str, tag: int) -> Any:
        inner = self.grid.ring // self.grid.windows
        a, b = divmod(self.comm.place, inner)
        return self.comm.hop(
            x, a * inner + (b + 1) % inner, a * inner + (b - 1) % inner, label, tag
        )

    def _outward(self, x: Tensor, label: str, tag: int) -> Any:
        inner = self.grid.ring // self.grid.windows
        place, ring = self.comm.place, self.grid.ring
        return self.comm.hop(x, (place + inner) % ring, (place - inner) % ring, label, tag)

    def _check(self, q: Tensor, k: Tensor) -> None:
        if q.dim() != 4 or k.dim() != 4:
            raise ValueError("q, k and v are [batch, heads, rows, head_dim]")
        local = self.placement.local
        if q.shape[2] != local or k.shape[2] != local:
            raise ValueError(
                f"this rank holds {local} rows, but q has {q.shape[2]} and k {k.shape[2]}: "
                "dispatch(...) gives the rows of a rank"
            )
        self.grid.check_heads(q.shape[1], k.shape[1])


def _ranks() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def _check_mask(mask: Mask, tokens: int) -> None:
    if mask.heads > 1:
        raise ValueError(
            "this mask differs between heads, and the schemes deal heads out to ranks: give a mask "
            "that holds for all heads, or run the heads it holds for on their own"
        )


def _forward(
    run: Parallel,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
) -> State:
    """The State of all rows of this place over all keys, for this rank's heads."""
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=work)
    lse = out.new_full(q.shape[:3], -torch.inf)
    for source, block in run.rounds(torch.cat([k, v], -1)):
        keys, values = block.split([k.shape[-1], v.shape[-1]], -1)
        for piece in run.pieces(run.comm.place, source, mask):
            rows, cols = piece.queries.rows, piece.keys.rows
            part = attend(
                q[:, :, rows],
                keys[:, :, cols],
                values[:, :, cols],
                mask=piece.mask,
                scale=scale,
                softcap=softcap,
            )
            both = merge(State(out[:, :, rows], lse[:, :, rows]), part)
            out[:, :, rows], lse[:, :, rows] = both.out, both.lse
    return State(out.to(q.dtype), lse)


class _Attend(torch.autograd.Function):
    """Forward merges States as keys come by; backward sends the keys round once more, and their
    gradients with them. Every rank sends the same messages in the same order, whatever its work.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        run: Parallel,
        mask: Mask,
        scale: float,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.kv_heads = k.shape[1]
        q, k, v = run.share(q, k, v)
        state = _forward(run, q, k, v, mask, scale, softcap)
        ctx.save_for_backward(q, k, v, state.out, state.lse)
        ctx.settings = (run, mask, scale, softcap)
        return run.comm.to_rows(state.out), run.comm.to_rows(state.lse, "lse")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        run, mask, scale, softcap = ctx.settings
        dtype, work = q.dtype, lse.dtype
        grad_out = run.comm.to_heads(grad_out)
        grad_lse = run.comm.to_heads(grad_lse, "lse")
        # rounding happens once, at the end
        q, out, grad_out = q.to(work), out.to(work), grad_out.to(work)
        dq = torch.zeros_like(q)
        wide = [k.shape[-1], v.shape[-1]]

        def contribute(source: int, block: Tensor) -> Tensor:
            grads = torch.zeros_like(block, dtype=work)
            keys, values = block.to(work).split(wide, -1)
            for piece in run.pieces(run.comm.place, source, mask):
                rows, cols = piece.queries.rows, piece.keys.rows
                part = tiled.backward(
                    grad_out[:, :, rows],
                    grad_lse[:, :, rows],
                    q[:, :, rows],
                    keys[:, :, cols],
                    values[:, :, cols],
                    out[:, :, rows],
                    lse[:, :, rows],
                    piece.mask,
                    scale,
                    softcap,
                    None,
                )
                dq[:, :, rows] += part[0]
                grads[:, :, cols] += torch.cat([part[1], part[2]], -1)
            return grads

        block = torch.cat([k, v], -1)
        total = run.rounds_home(block, contribute, torch.zeros_like(block, dtype=work))
        dk, dv = total.split(wide, -1)
        dq, dk, dv = (run.comm.to_rows(x) for x in (dq, dk, dv))
        if dk.shape[1] != ctx.kv_heads:  # the copies of a key head add up
            dk, dv = (x.unflatten(1, (ctx.kv_heads, -1)).sum(2) for x in (dk, dv))
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), None, None, None, None
