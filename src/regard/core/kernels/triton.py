"""Sums over the columns and rows of the attention matrix, in one Triton program a block of keys.

The lse of every query is known, so a column is a plain sum: nothing is rescaled on the way. The
keys of a program stay where they are while the queries that may see them pass by; blocks that see
each other whole go without a mask. Row sums (entropy and distance) are added up in memory, one
number a query and block, so their last digits may differ from run to run. Half the products of an
attention call, whatever the number of sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..compound import Both
from ..mask import Band, Mask, Padding

CACHE = 2**25  # bytes of queries that stay in a GPU's cache

try:
    import triton
    import triton.language as tl

    INSTALLED = True
    # scores count in log 2, as the hardware's exponential does; a score of -FAR has no weight
    LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
    FAR: tl.constexpr = tl.constexpr(1e30)
except ImportError:
    INSTALLED = False


def available() -> str | None:
    """Why the kernel cannot run here, in words; None where it can."""
    if not INSTALLED:
        return "Triton is not installed (pip install triton)"
    if not (INTERPRETED or torch.cuda.is_available()):
        return "there is no CUDA device (set TRITON_INTERPRET=1 before the start to try it slowly)"
    return None


def supports(q: Tensor, k: Tensor, mask: Mask | None) -> bool:
    """Whether the kernel computes such a call: float32 or 16 bits, heads up to 256 wide, and a
    mask made of bands and padding.
    """
    return (
        q.dtype == k.dtype
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and q.shape[-1] <= 256
        and (q.is_cuda or INTERPRETED)
        and _split(mask) is not None
    )


def received(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None = None,
    scale: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Attention each key receives, sum_i w_i exp(scale q_i . k_j - lse_i) over the allowed pairs:
    float32 `[batch, heads, keys]`, without gradients. Arguments and errors as in `sums`.
    """
    return sums(q, k, lse, mask=mask, scale=scale, weights=weights)["received"]


def sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    mask: Mask | None = None,
    scale: float,
    weights: Tensor | None = None,
    entropy: bool = False,
    distance: bool = False,
    shift: int | None = None,
) -> dict[str, Tensor]:
    """Column sums "received" `[batch, heads, keys]` of P, and of its rows "entropy" and "distance"
    `[batch, heads, queries]` where they are asked for, from one visit of every tile; float32,
    without gradients.

    Args:
        q: `[batch, heads, queries, head_dim]`; k: `[batch, kv_heads, keys, head_dim]`, read in
            place by all heads of a group. Any strides.
        lse: `[batch, heads, queries]` of the same call; a query with -inf gives nothing.
        weights: per-query weights w `[batch, heads, queries]` (or broadcast), of any sign; of the
            columns only.
        shift: position of the first query among the keys; the last one stands at the last key
            when None.

    Call it where `available()` is None and `supports(q, k, mask)` is true.

    Raises:
        ValueError: a mask that is not made of bands and padding.
    """
    parts = _split(mask)
    if parts is None:
        raise ValueError(
            "kernel 'triton' knows bands and padding only, not this mask: leave kernel=None"
        )
    band, valid = parts
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    out = torch.empty(batch, heads, keys, dtype=torch.float32, device=q.device)
    rows = [lse.new_zeros(lse.shape if asked else (1,), dtype=torch.float32)
            for asked in (entropy, distance)]  # fmt: skip
    named = {n: r for n, r in zip(("entropy", "distance"), rows) if r.dim() > 1}
    if out.numel() == 0:
        return {"received": out, **named}
    q, k = q.detach(), k.detach()
    # in log 2; a query without keys stands where every p is 0
    lse = torch.where(lse.isneginf(), FAR.value, lse.detach().float() / math.log(2))
    if INTERPRETED and q.dtype == torch.bfloat16:
        q, k = q.float(), k.float()  # the interpreter multiplies the bits of bfloat16 as integers
    # without weights their pointer is never read, but it must point somewhere
    w = lse if weights is None else weights.detach().to(lse).expand(lse.shape)
    hidden = out if valid is None else valid.to(q.device, torch.int8).contiguous()
    hopper = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9
    sizes = _sizes(dim, q.element_size(), hopper)
    with torch.cuda.device_of(q):
        _kernel[(heads * -(-keys // sizes["KEYS"]), batch)](
            *(q, k, lse, w, hidden, out, *rows),
            *(*q.stride(), *k.stride(), *lse.stride(), *w.stride()),
            0 if valid is None or len(hidden) == 1 else hidden.stride(0),
            *(queries, keys, heads, _together(q), heads // k.shape[1]),
            keys - queries if shift is None else shift,
            *(band.before or 0, band.after or 0, float(scale) / math.log(2)),
            DIM=dim,
            BEFORE=band.before is not None,
            AFTER=band.after is not None,
            WEIGHTED=weights is not None,
            HIDDEN=valid is not None,
            ENTROPY=entropy,
            DISTANCE=distance,
            **sizes,
        )
    return {"received": out, **named}


def _sizes(dim: int, item: int, hopper: bool = False) -> dict[str, int]:
    """Head width as the kernel pads it, keys and queries a block for numbers of `item` bytes, and
    what the compiler is told.

    Larger blocks would not fit the shared memory of common GPUs or, in float32, their registers.
    On a Hopper (the fastest of 16 settings timed on an H100) narrow heads go in small blocks, so
    that four programs share a multiprocessor and one multiplies while others exponentiate.
    """
    padded = max(16, 1 << (dim - 1).bit_length())
    if item == 4:
        keys = queries = 64 if padded <= 64 else 32
    else:
        keys, queries = (64 if padded > 128 or (hopper and padded <= 64) else 128), 64
    sizes = {"PADDED": padded, "KEYS": keys, "QUERIES": queries, "num_warps": 4}
    return {**sizes, "maxnreg": 128} if hopper and item < 4 and padded <= 64 else sizes


def _together(q: Tensor) -> int:
    """How many heads go at a time: as many as have queries that the GPU's cache holds.

    All heads at once end evenly, but beyond the cache every block would fetch the queries anew.
    """
    heads = q.shape[1]
    most = max(1, CACHE // max(1, q[0, 0].numel() * q.element_size()))
    return next(n for n in range(min(most, heads), 0, -1) if heads % n == 0)


def _split(mask: Mask | None) -> tuple[Band, Tensor | None] | None:
    """The mask as one band and the real keys `[batch, keys]`; None where it is more than that."""
    if mask is None:
        return Band(None, None), None
    if isinstance(mask, Band):
        return mask, None
    if isinstance(mask, Padding):
        return Band(None, None), mask.valid
    if not isinstance(mask, Both):
        return None
    left, right = _split(mask.left), _split(mask.right)
    if left is None or right is None:
        return None
    band = left[0] & right[0]
    assert isinstance(band, Band)
    if left[1] is None or right[1] is None:
        return band, right[1] if left[1] is None else left[1]
    return band, left[1] & right[1]


def _columns(  # type: ignore[no-untyped-def]  # the compiler reads annotations as code
    q,
    k,
    lse,
    weights,
    hidden,
    out,
    entropy,
    distance,
    q_b,  # strides
    q_h,
    q_t,
    q_d,
    k_b,
    k_h,
    k_t,
    k_d,
    l_b,
    l_h,
    l_t,
    w_b,
    w_h,
    w_t,
    v_b,
    queries,
    keys,
    heads,
    together,
    group,
    shift,
    before,
    after,
    scale,  # in units of log 2, as all scores here
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HIDDEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    DISTANCE: tl.constexpr,
):
    # some heads at a time; in each the first keys, which most queries see, begin first
    share = together * tl.cdiv(keys, KEYS)
    place = tl.program_id(0) % share
    first = place // together * KEYS
    # offsets in 64 bits: a long batch holds more than 2^31 numbers
    h = (tl.program_id(0) // share * together + place % together).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    j = first + tl.arange(0, KEYS)
    d = tl.arange(0, PADDED)
    q += b * q_b + h * q_h
    k += b * k_b + (h // group) * k_h
    lse += b * l_b + h * l_h
    weights += b * w_b + h * w_h
    row_of = (b * heads + h) * queries
    real = j < keys
    at_k = k + j.to(tl.int64)[None, :] * k_t + d[:, None] * k_d
    block_k = tl.load(at_k, mask=real[None, :] & (d < DIM)[:, None], other=0.0)
    if HIDDEN:
        real = real & (tl.load(hidden + b * v_b + j, mask=real, other=0) != 0)
    # the queries that may see any key of the block: start <= ... < stop
    start, stop = 0, queries
    if AFTER:
        start = tl.maximum(first - after - shift, 0) // QUERIES * QUERIES
    if BEFORE:
        stop = tl.minimum(first + KEYS + before - shift, queries)
    # of them those that see all its keys, in whole blocks: low <= ... < high; none for a block with
    # a key that is not there or padding
    low, high = start, stop
    if AFTER:
        low += tl.maximum(tl.cdiv(first + KEYS - 1 - after - shift - start, QUERIES), 0) * QUERIES
    if BEFORE:
        high = tl.minimum(first + before - shift + 1, queries)
    high = low + tl.maximum(high - low, 0) // QUERIES * QUERIES
    high = tl.where(tl.min(real.to(tl.int32), 0) == 1, high, low)
    # a thread adds up its own cells: none waits for another one before the end
    total = tl.zeros((QUERIES, KEYS), dtype=tl.float32)
    for part in tl.static_range(3):  # before, inside and after those; only inside needs no mask
        begin = start if part == 0 else (low if part == 1 else tl.maximum(high, low))
        end = tl.minimum(low, stop) if part == 0 else (high if part == 1 else stop)
        wide = (begin + tl.arange(0, QUERIES)).to(tl.int64)
        at_q = q + wide[:, None] * q_t + d[None, :] * q_d
        at_row = lse + wide * l_t
        for at in range(begin, end, QUERIES):
            i = at + tl.arange(0, QUERIES)
            if part == 1:
                row = tl.load(at_row)
                if DIM == PADDED:
                    block_q = tl.load(at_q)
                else:
                    block_q = tl.load(at_q, mask=(d < DIM)[None, :], other=0.0)
            else:
                row = tl.load(at_row, mask=i < queries, other=FAR)
                block_q = tl.load(at_q, mask=(i < queries)[:, None] & (d < DIM)[None, :], other=0.0)
            at_q += QUERIES * q_t
            at_row += QUERIES * l_t
            s = tl.dot(block_q, block_k, input_precision="ieee") * scale - row[:, None]
            if part != 1:
                away = i[:, None] + shift - j[None, :]
                if BEFORE:
                    s = tl.where(away <= before, s, -FAR)
                if AFTER:
                    s = tl.where(away >= -after, s, -FAR)
                s = tl.where(real[None, :], s, -FAR)
            p = tl.exp2(s)
            if ENTROPY:
                amount = tl.sum(p * s, 1) * -LN_2
                tl.atomic_add(entropy + row_of + i, amount, mask=i < queries, sem="relaxed")
            if DISTANCE:
                gap = (i + shift).to(tl.float32)[:, None] - j.to(tl.float32)[None, :]
                amount = tl.sum(p * tl.abs(gap), 1)
                tl.atomic_add(distance + row_of + i, amount, mask=i < queries, sem="relaxed")
            if WEIGHTED:
                p *= tl.load(weights + i.to(tl.int64) * w_t, mask=i < queries, other=0.0)[:, None]
            total += p
    column = out + (b * heads + h) * keys + j
    tl.store(column, tl.sum(total, 0), mask=j < keys)


INTERPRETED = False
if INSTALLED:
    # lengths and limits change from call to call: code made for one value is made too often
    _kernel = triton.jit(
        _columns, do_not_specialize=["queries", "keys", "together", "shift", "before", "after"]
    )
    INTERPRETED = not isinstance(_kernel, triton.JITFunction)
