"""What every kernel is asked: a mask by name, at one length, with one shape of heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, patterns
from regard.core.compound import Inverse, Pair
from regard.core.mask import Band, Predicate, Prefix, Segments
from regard.errors import InputError, nearest

MOST = 2**62  # of a mask's parameter: positions are added to it in 64 bits


@dataclass
class Case:
    """One mask at one length with one shape of heads: what every kernel is asked.

    Attributes:
        name: the mask as the user wrote it, `pattern` or `pattern:parameter=value,...`.
        total: tokens. heads, kv_heads, dim: of the call, batch 1.
        backward: whether gradients of q, k and v are wanted.
    """

    name: str
    total: int
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward: bool = False
    seed: int = 42

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """What the mask is built from: as written, drawn lengths, and a seed for the rest."""
        return parameters(self.name, self.total, self.seed)

    @property
    def pattern(self) -> str:
        """Name of the pattern, without parameters."""
        return self.name.partition(":")[0]

    @cached_property
    def mask(self) -> Mask:
        """The mask itself."""
        return patterns.build(self.pattern, self.total, **self.parameters)

    @cached_property
    def area(self) -> int:
        """Allowed pairs, exact."""
        return int(self.mask.area(self.total, self.total))

    @cached_property
    def sdpa(self) -> dict[str, Any]:
        """Arguments of torch's attention, the dense mask among them where one is needed."""
        return self.mask.sdpa(self.total, self.total, self.device)

    def flops(self, backward: bool | None = None) -> float:
        """4 area heads dim forward, 2.5 times that backward: only allowed pairs count.

        >>> Case("causal", 4, heads=1, kv_heads=1, dim=1).flops()
        40.0
        """
        once = 4.0 * self.area * self.heads * self.dim
        return once * (2.5 if (self.backward if backward is None else backward) else 1.0)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal q, k, v, the same for every kernel."""
        make = torch.Generator().manual_seed(self.seed)
        return tuple(  # type: ignore[return-value]
            torch.randn(1, h, self.total, self.dim, generator=make)
            .to(self.device, self.dtype)
            .requires_grad_(self.backward)
            for h in (self.heads, self.kv_heads, self.kv_heads)
        )

    @property
    def held(self) -> int:
        """Bytes of q, k, v and out, and of their gradients."""
        once = 2 * (self.heads + self.kv_heads) * self.total * self.dim * self.dtype.itemsize
        return once * (2 if self.backward else 1)

    @property
    def matrix(self) -> int:
        """Bytes of one score matrix of every head."""
        return self.heads * self.total**2 * max(4, self.dtype.itemsize)


def parameters(name: str, total: int, seed: int) -> dict[str, Any]:
    """The parameters of a mask by name: what was written, and drawn document lengths.

    Windows and blocks are 1024 tokens, as in the paper, but at most an eighth of the length:
    otherwise short ones would all be the full mask.

    >>> parameters("sliding_window:window=5", 100, 0), parameters("sliding_window", 2048, 0)
    ({'window': 5}, {'window': 256})
    """
    pattern, _, written = name.partition(":")
    if pattern not in patterns.PATTERNS:
        raise InputError(f"unknown mask {pattern!r}.{nearest(pattern, patterns.PATTERNS)}")
    known = patterns.PATTERNS[pattern].parameters
    values: dict[str, Any] = {"seed": seed} if "seed" in known else {}
    short = max(2, min(1024, total // 8))
    if pattern.startswith("sliding_window"):
        values["window"] = short
    if pattern == "block_causal_document":
        values["block"] = short
    if "block" in known and patterns.PATTERNS[pattern].kind == "dynamic":
        values["block"] = min(64 if pattern == "block_sparse" else 128, max(2, total // 4))
    for piece in filter(None, written.split(",")):
        key, _, value = piece.partition("=")
        if key not in known or key == "lengths":
            choices = ", ".join(k for k in known if k != "lengths") or "no parameter"
            raise InputError(f"the mask {pattern} takes {choices}, not {piece!r}")
        try:
            values[key] = float(value) if key == "density" else int(value)
        except ValueError:
            raise InputError(f"{piece!r} in the mask {name!r} is no number") from None
        if abs(values[key]) >= MOST:
            raise InputError(f"{piece!r} in the mask {name!r} is too large: stay below 2**62")
    if "lengths" in known and pattern != "block_causal_document":
        values["lengths"] = patterns.documents(total, seed=values.get("seed", seed))
    return values


def masks(names: str) -> list[str]:
    """Masks by name, "all", "regular", "heterogeneous", "static" or "dynamic", or with parameters.

    Several are separated by commas; a piece with "=" belongs to the mask before it.

    >>> masks("causal,block_sparse:block=64,density=0.1")
    ['causal', 'block_sparse:block=64,density=0.1']
    """
    pieces: list[str] = []
    for piece in (p.strip() for p in names.split(",")):
        if pieces and "=" in piece and ":" not in piece:
            pieces[-1] += f",{piece}"
        elif piece:
            pieces.append(piece)
    chosen: list[str] = []
    for piece in pieces:
        group = [
            n
            for n, p in patterns.PATTERNS.items()
            if piece in ("all", p.kind) or (piece == "static" and p.kind != "dynamic")
        ]
        if not group:
            parameters(piece, 64, 0)  # refuses what is unknown
        chosen += group or [piece]
    if not chosen:
        raise InputError("no mask was named: write all, or names of `regard bench masks show`")
    return list(dict.fromkeys(chosen))


def pointwise(mask: Mask, device: str = "cpu") -> Predicate:
    """The mask as a rule on single indices, in operations that FlexAttention can compile."""
    if isinstance(mask, Band):
        before, after = mask.before, mask.after

        def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            ok = i == i
            if before is not None:
                ok = ok & (i - j <= before)
            return ok if after is None else ok & (i - j >= -after)

        return band
    if isinstance(mask, Prefix):
        return lambda b, h, i, j: j < mask.n
    if isinstance(mask, Segments):
        queries, keys = mask.queries[0].to(device), mask.keys[0].to(device)
        return lambda b, h, i, j: (queries[i] == keys[j]) & (queries[i] >= 0)
    if isinstance(mask, patterns.Steps):
        return lambda b, h, i, j: j // mask.size <= i // mask.size
    if isinstance(mask, patterns.Blocks):
        keep = mask.keep.to(device)
        rows, cols = (
            torch.repeat_interleave(torch.arange(len(e) - 1), e.diff()).to(device)
            for e in (mask.edges_q, mask.edges_k)
        )
        return lambda b, h, i, j: keep[rows[i], cols[j]]
    if isinstance(mask, Inverse):
        inner = pointwise(mask.inner, device)
        return lambda b, h, i, j: ~inner(b, h, i, j)
    if isinstance(mask, Pair):
        join, left, right = mask.join, pointwise(mask.left, device), pointwise(mask.right, device)
        return lambda b, h, i, j: join(left(b, h, i, j), right(b, h, i, j))
    raise NotImplementedError(f"no pointwise rule for a {type(mask).__name__} mask")


def gib(amount: float) -> str:
    """Bytes in words.

    >>> gib(3 * 2**30), gib(2**20)
    ('3.0 GiB', '1 MiB')
    """
    unit, name = (2**30, "GiB") if amount >= 2**29 else (2**20, "MiB")
    return f"{amount / unit:.1f} {name}" if name == "GiB" else f"{math.ceil(amount / unit)} {name}"
