"""The five schemes of context parallelism as one shape: a grid of ranks, and how keys travel on it.

Every scheme is a pair: `ulysses` ranks exchange rows for heads (all-to-all), and `ring` such groups
show their keys and values to each other, hop by hop or in one gather. Ulysses alone has a ring of
one; the ring family has one rank a group; USP and LoongTrain have both. Nothing here communicates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from regard.errors import nearest

SCHEMES = ("ulysses", "ring", "allgather", "usp", "loongtrain")
NODE = 8  # ranks that share a node, and so the most that exchange heads by default


@dataclass(frozen=True)
class Shape:
    """A scheme on so many ranks; rank `r * ulysses + u` is member u of ring place r.

    Attributes:
        ulysses: ranks of a group that exchanges rows for heads.
        ring: groups that pass keys and values on.
        windows: parts of a double ring; 1 is a plain ring.
        gather: keys and values are gathered at once in place of hops.
        zigzag: rows are cut in 2 x ring chunks and paired, so that causal work is equal.
    """

    name: str
    ulysses: int
    ring: int
    windows: int = 1
    gather: bool = False
    zigzag: bool = True

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring

    def check_heads(self, heads: int, kv_heads: int) -> int:
        """How often each key head is copied so that every rank of a group holds one; 1 mostly.

        Raises:
            ValueError: the heads cannot be shared out.
        """
        u = self.ulysses
        if heads % kv_heads:
            raise ValueError(f"{heads} query heads are not a multiple of {kv_heads} key heads")
        if heads % u:
            raise ValueError(
                f"{self.name} deals heads out to {u} ranks, but {heads} query heads are not a "
                f"multiple of {u}: take fewer ranks, a smaller ulysses degree, or the scheme ring"
            )
        if kv_heads % u == 0:
            return 1
        if u % kv_heads:
            raise ValueError(
                f"{self.name} deals key heads out to {u} ranks, but of {kv_heads} and {u} neither "
                "divides the other: take another ulysses degree, or the scheme ring"
            )
        return u // kv_heads


def shape(
    name: str,
    ranks: int,
    *,
    heads: tuple[int, int] | None = None,
    ulysses: int | None = None,
) -> Shape:
    """The grid of a scheme on `ranks` ranks.

    Args:
        heads: query and key heads; with them the default grid respects what the heads allow, and
            an impossible one is refused.
        ulysses: ranks a group of usp and loongtrain; by default the most, up to a node of 8, that
            leave a ring of 2 (usp) or 4 (loongtrain, whose double ring needs 4 places).

    >>> grid = shape("loongtrain", 96, heads=(64, 8))
    >>> grid.ulysses, grid.ring, grid.windows
    (8, 12, 3)
    """
    if name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}.{nearest(name, SCHEMES)}")
    if ranks < 1:
        raise ValueError(f"context parallelism takes at least one rank, got {ranks}")
    if ulysses is not None and name not in ("usp", "loongtrain"):
        raise ValueError(f"only usp and loongtrain take a ulysses degree, {name} has none")
    if name == "ulysses":
        shape = Shape(name, ranks, 1, zigzag=False)
    elif name in ("ring", "allgather"):
        shape = Shape(name, 1, ranks, gather=name == "allgather")
    else:
        least = 2 if name == "usp" else 4
        degree = ulysses or _degree(ranks, least, heads)
        if degree < 1 or ranks % degree:
            raise ValueError(
                f"{ranks} ranks do not divide in groups of {degree}: choose a ulysses degree "
                f"among {divisors(ranks)}"
            )
        ring = ranks // degree
        windows = 1
        if name == "loongtrain":
            windows = max(d for d in divisors(ring) if d * d <= ring)
        shape = Shape(name, degree, ring, windows)
    if heads is not None:
        shape.check_heads(*heads)
    return shape


def _degree(ranks: int, least: int, heads: tuple[int, int] | None) -> int:
    def fits(u: int) -> bool:
        if heads is None:
            return True
        return heads[0] % u == 0 and (heads[1] % u == 0 or u % heads[1] == 0)

    return max(
        u for u in divisors(ranks) if u == 1 or (u <= NODE and ranks // u >= least and fits(u))
    )


def divisors(n: int) -> list[int]:
    """Every size of equal groups that `n` ranks can form."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return [*small, *(n // d for d in reversed(small) if d * d != n)]


@dataclass(frozen=True)
class Load:
    """Sizes of one attention call: `rows` are the local rows of one rank, padding included."""

    rows: int
    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    batch: int = 1
    bytes_per_element: int = 2
    bytes_per_sum: int = 4  # log-sum-exps and gradients of keys and values are summed in float32


def sent(grid: Shape, load: Load, backward: bool = False) -> dict[str, int]:
    """Bytes that one rank sends in one attention call, by what they carry; exact.

    Forward: `heads` is the all-to-all of q, k, v and out, (U-1)/U of the local rows; `kv` the
    R-1 blocks of keys and values; `lse` the log-sum-exps on their way back to their rows. Backward:
    `heads` holds the gradients of out, q, k and v; `kv` the same R-1 blocks once more; `kv_grad`
    their gradients, which travel all the way home; `lse` the gradient of the log-sum-exps.

    >>> sent(shape("ring", 4), Load(1024, 8, 2, 64, 64))["kv"] == 3 * 1024 * 2 * 2 * 64 * 2
    True
    """
    copies = grid.check_heads(load.heads, load.kv_heads)
    kv_heads = load.kv_heads * copies
    u, r = grid.ulysses, grid.ring
    rows = load.rows * load.batch
    wide = load.dim + load.value_dim
    heads = rows * (load.heads + kv_heads) * wide * load.bytes_per_element * (u - 1) // u
    lse = rows * load.heads * load.bytes_per_sum * (u - 1) // u
    # a place of the ring holds the rows of its whole group, for its share of the heads
    block = rows * u * (kv_heads // u) * wide
    total = {"heads": heads, "lse": lse, "kv": (r - 1) * block * load.bytes_per_element}
    if backward:
        total["kv_grad"] = hops_home(grid) * block * load.bytes_per_sum
        # gradients of q, k and v leave in the type of the sums, the gradient of out comes as it is
        away = rows * load.heads * load.value_dim * load.bytes_per_element
        back = rows * (load.heads * load.dim + kv_heads * wide) * load.bytes_per_sum
        total["heads"] = away * (u - 1) // u + back * (u - 1) // u
    return {n: b for n, b in total.items() if b}


def hops_home(grid: Shape) -> int:
    """Blocks of key gradients that one rank sends in a backward pass."""
    if grid.gather:
        return grid.ring - 1
    inner = grid.ring // grid.windows
    return (grid.ring if inner > 1 else 0) + (grid.windows if grid.windows > 1 else 0)
