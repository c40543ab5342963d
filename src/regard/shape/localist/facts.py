"""What the dial does to a row of attention: leakage, fidelity, entropy, and the bounds C1 to C3.

Every row of scores is taken apart into its relevant and its other keys by plain sums, block of rows
by block of rows; the States that the dial recombines are not used, so that bounds and figures check
them. All scores are divided by the temperature, which then appears nowhere else. With s relevant of
n visible keys, margin d = (least relevant score) - (greatest other score):

    C1  leakage  <= (n-s) e^-d / (s + (n-s) e^-d)
    C2  fidelity >= s / (s + (n-s) e^-d)
    C3  entropy  <= h2(leakage) + (1 - leakage) log2 s + leakage log2 (n-s)      in bits

The dial adds its shift to d and to nothing else (C4).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from regard.reach import Call

SLACK = 1e-5  # of bounds in float32
CELLS = 2**22  # scores at once


@dataclass(frozen=True)
class Rows:
    """Facts of rows before the dial; tensors are `[batch, heads, queries]`.

    Attributes:
        lse_in, lse_out: of the relevant and of the other visible keys.
        entropy_in, entropy_out: within each, in nats.
        least_in, most_out: the scores that make the margin.
        count_in, count_out: how many keys.
        lse_free, lse_first: of block 0, and of the first token alone.
        free_in: whether block 0 is relevant, `[batch, 1, queries]`.
    """

    lse_in: Tensor
    lse_out: Tensor
    entropy_in: Tensor
    entropy_out: Tensor
    least_in: Tensor
    most_out: Tensor
    count_in: Tensor
    count_out: Tensor
    lse_free: Tensor
    lse_first: Tensor
    free_in: Tensor

    @property
    def split(self) -> Tensor:
        """Rows with keys on both sides: the others have no margin."""
        return (self.count_in > 0) & (self.count_out > 0)

    @property
    def margin(self) -> Tensor:
        return self.least_in - self.most_out

    @property
    def odds(self) -> Tensor:
        """Log odds of the leakage before the dial."""
        return self.lse_out - self.lse_in


@dataclass(frozen=True)
class Dialled:
    """The same rows under a shift of the other scores; nothing but `split` rows is meant.

    Attributes:
        leakage, fidelity: shares; entropy: in bits.
        leakage_bound, fidelity_bound, entropy_bound: C1, C2, C3.
        entropy_bound_c1: C3 at the leakage of C1, inf where the margin is below 0.
    """

    leakage: Tensor
    fidelity: Tensor
    entropy: Tensor
    leakage_bound: Tensor
    fidelity_bound: Tensor
    entropy_bound: Tensor
    entropy_bound_c1: Tensor

    def excess(self) -> dict[str, Tensor]:
        """By how much each bound is passed; at most 0 but for rounding."""
        over = torch.maximum(
            self.entropy - self.entropy_bound, self.entropy - self.entropy_bound_c1
        )
        return {
            "C1": self.leakage - self.leakage_bound,
            "C2": self.fidelity_bound - self.fidelity,
            "C3": over,
        }


def of_scores(scores: Tensor, inside: Tensor, outside: Tensor) -> dict[str, Tensor]:
    """`Rows` of score rows `[..., keys]`, less what is about block 0; `inside` and `outside` are
    disjoint booleans that broadcast.
    """
    found: dict[str, Tensor] = {}
    for name, member in (("in", inside), ("out", outside)):
        z = scores.masked_fill(~member, -torch.inf)
        top = z.amax(-1)
        level = top.masked_fill(top == -torch.inf, 0.0)
        centred = (z - level[..., None]).clamp_min(-1e4)  # times 0 below: finite, so no NaN
        weight = centred.exp() * member
        total = weight.sum(-1)
        some = total > 0
        lse = torch.where(some, level + total.clamp_min(1e-38).log(), -torch.inf)
        mean = (weight * centred).sum(-1) / total.clamp_min(1e-38)
        entropy = torch.where(some, total.clamp_min(1e-38).log() - mean, 0.0).clamp_min(0.0)
        found |= {f"lse_{name}": lse, f"entropy_{name}": entropy}
        found[f"count_{name}"] = member.expand(scores.shape).sum(-1)
        if name == "out":
            found["most_out"] = top
    found["least_in"] = scores.masked_fill(~inside, torch.inf).amin(-1)
    return found


def row_facts(call: Call, key_blocks: Tensor, relevant: Tensor, tau: float = 1.0) -> Rows:
    """The facts of every row of a call, without a matrix.

    Args:
        key_blocks: block of each key, `[batch, keys]`.
        relevant: which blocks each query looks at, boolean `[batch, queries, blocks]`.
    """
    parts = [
        _rows(scores, allowed, relevant[:, rows], key_blocks)
        for rows, scores, allowed in _scores(call, tau)
    ]
    joined = {f.name: torch.cat([getattr(p, f.name) for p in parts], 2) for f in fields(Rows)}
    return Rows(**joined)


def _scores(call: Call, tau: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, scores `[batch, heads, rows, keys]`, which are visible) of blocks of rows."""
    batch, heads, queries, _ = call.q.shape
    keys, kv_heads = call.k.shape[2], call.k.shape[1]
    work = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    k = call.k.to(work)[:, :, None].mT
    step = max(1, CELLS // max(1, batch * heads * keys))
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        q = call.q[:, :, rows].to(work).unflatten(1, (kv_heads, heads // kv_heads))
        scores = (q * call.scale @ k).flatten(1, 2)
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        if call.bias is not None:
            scores = scores + call.bias[..., rows, :]
        allowed = call.mask.cells(queries, keys, rows, device=call.q.device)
        yield rows, scores / tau, allowed & (scores > -torch.inf)


def _rows(scores: Tensor, allowed: Tensor, relevant: Tensor, blocks: Tensor) -> Rows:
    at = blocks[:, None].expand(-1, relevant.shape[1], -1)
    inside = relevant.gather(-1, at)[:, None]
    free = (blocks == 0)[:, None, None]
    first = torch.zeros_like(free)
    first[..., :1] = True
    visible = scores.masked_fill(~allowed, -torch.inf)
    # the first key that the last row sees: with padding on the left it is not key 0
    begins = allowed[..., -1:, :].to(torch.int8).argmax(-1, keepdim=True)
    return Rows(
        **of_scores(scores, allowed & inside, allowed & ~inside),
        lse_free=visible.masked_fill(~free, -torch.inf).logsumexp(-1),
        lse_first=visible.gather(-1, begins.expand(*scores.shape[:3], 1))[..., 0],
        free_in=relevant[:, None, :, 0],
    )


def dialled(rows: Rows, shift: Tensor | float) -> Dialled:
    """Leakage, fidelity, entropy and bounds once the dial lowers the other scores by `shift`.

    >>> z = torch.tensor([[2.0, 2.0, 0.0]])
    >>> inside = torch.tensor([True, True, False])
    >>> none = torch.zeros(1)
    >>> rows = Rows(**of_scores(z, inside, ~inside), lse_free=none, lse_first=none, free_in=none)
    >>> made = dialled(rows, 0.0)
    >>> torch.allclose(made.leakage, made.leakage_bound)  # equal scores on either side: C1 is tight
    True
    """
    shift = torch.as_tensor(shift, dtype=rows.lse_in.dtype, device=rows.lse_in.device)
    if shift.dim() == 2:  # [batch, queries]
        shift = shift[:, None]
    inside, outside = (c.clamp_min(1).to(shift.dtype) for c in (rows.count_in, rows.count_out))
    odds = torch.where(rows.split, rows.odds, 0.0) - shift
    level = outside.log() - inside.log() - torch.where(rows.split, rows.margin, 0.0) - shift
    leakage, fidelity = odds.sigmoid(), (-odds).sigmoid()
    bound, least = level.sigmoid(), (-level).sigmoid()

    def ceiling(share: Tensor, kept: Tensor) -> Tensor:
        return h2(share, kept) + kept * inside.log2() + share * outside.log2()

    entropy = h2(leakage, fidelity)
    entropy = entropy + (fidelity * rows.entropy_in + leakage * rows.entropy_out) / math.log(2)
    wide = (torch.where(rows.split, rows.margin, 0.0) + shift) < 0
    return Dialled(
        leakage,
        fidelity,
        entropy,
        bound,
        least,
        ceiling(leakage, fidelity),
        ceiling(bound, least).masked_fill(wide, torch.inf),
    )


def h2(share: Tensor, kept: Tensor | None = None) -> Tensor:
    """Binary entropy in bits; `kept` is 1 - share where that is known more exactly."""
    kept = 1 - share if kept is None else kept
    return -(torch.special.xlogy(share, share) + torch.special.xlogy(kept, kept)) / math.log(2)


def needed(rows: Rows, leakage: float) -> Tensor:
    """The shift that guarantees a leakage by C4: ln((n-s)/s (1-e)/e) - d, `[batch, heads,
    queries]`; 0 where there is no margin.
    """
    ratio = rows.count_out.clamp_min(1).double().log() - rows.count_in.clamp_min(1).double().log()
    shift = ratio + math.log((1 - leakage) / leakage) - rows.margin
    return torch.where(rows.split, shift, 0.0).clamp_min(0.0)


@dataclass
class Totals:
    """Sums over the rows of one layer, of one kind of token; all calls of a run join."""

    rows: int = 0
    closed: int = 0
    undefined: int = 0
    leakage: float = 0.0
    entropy: float = 0.0
    free: float = 0.0
    first: float = 0.0
    violations: dict[str, int] | None = None
    excess: dict[str, float] | None = None
    by_head: Tensor | None = None
    head_rows: int = 0

    def add(self, rows: Rows, made: Dialled, shift: Tensor, chosen: Tensor) -> None:
        """Add the chosen queries, `[batch, queries]`."""
        chosen = chosen[:, None]
        counted = rows.split & chosen
        self.undefined += int(((rows.count_in == 0) & (rows.count_out > 0) & chosen).sum())
        self.closed += int(((rows.count_out == 0) & (rows.count_in > 0) & chosen).sum())
        self.rows += int(counted.sum())
        self.leakage += float(made.leakage[counted].double().sum())
        self.entropy += float(made.entropy[counted].double().sum())
        whole = torch.logaddexp(rows.lse_in, rows.lse_out - shift[:, None])
        lowered = torch.where(rows.free_in, 0.0, shift[:, None])
        for name, lse in (("free", rows.lse_free), ("first", rows.lse_first)):
            share = (lse - lowered - whole).exp()[counted].double().sum()
            setattr(self, name, getattr(self, name) + float(share))
        kept = torch.where(counted, made.fidelity.double(), 0.0).sum((0, 2)).cpu()
        self.by_head = kept if self.by_head is None else self.by_head + kept
        self.head_rows += int(counted[:, 0].sum())
        over = made.excess()
        self.violations = self.violations or dict.fromkeys(over, 0)
        self.excess = self.excess or dict.fromkeys(over, -math.inf)
        for name, by in over.items():
            by = by[counted]
            slack = SLACK * (made.entropy[counted].clamp_min(1) if name == "C3" else 1)
            self.violations[name] += int((by > slack).sum())
            if by.numel():
                self.excess[name] = max(self.excess[name], float(by.max()))

    def as_dict(self) -> dict[str, Any]:
        """Means, the least of the heads, and what became of the bounds."""
        count = max(self.rows, 1)
        heads = [] if self.by_head is None else (self.by_head / max(self.head_rows, 1)).tolist()
        least = min(range(len(heads)), key=heads.__getitem__) if self.rows else None
        excess = {n: v for n, v in (self.excess or {}).items() if math.isfinite(v)}
        return {
            "rows": self.rows,
            "rows_without_other_keys": self.closed,
            "rows_without_relevant_keys": self.undefined,
            "leakage": self.leakage / count if self.rows else None,
            "fidelity": 1 - self.leakage / count if self.rows else None,
            "entropy_bits": self.entropy / count if self.rows else None,
            "free_mass": self.free / count if self.rows else None,
            "first_token_mass": self.first / count if self.rows else None,
            "fidelity_by_head": heads if self.rows else [],
            "least_head": least,
            "violations": self.violations or dict.fromkeys(("C1", "C2", "C3"), 0),
            "largest_excess": excess,
        }


def joined(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of several layers as one: means over rows, sums of counts."""
    some = [one for one in layers if one["rows"]]
    total = sum(one["rows"] for one in some)
    means = ("leakage", "fidelity", "entropy_bits", "free_mass", "first_token_mass")
    whole: dict[str, Any] = {
        n: sum(one[n] * one["rows"] for one in some) / total if total else None for n in means
    }
    counts = ("rows", "rows_without_other_keys", "rows_without_relevant_keys")
    whole |= {n: sum(one[n] for one in layers) for n in counts}
    whole["violations"] = {n: sum(o["violations"][n] for o in layers) for n in ("C1", "C2", "C3")}
    heads = [f for one in some for f in one["fidelity_by_head"]]
    return whole | {"least_head_fidelity": min(heads) if heads else None}
