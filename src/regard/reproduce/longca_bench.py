"""The claims of "Long-Context Attention Benchmark" (Bu et al., 2025) that one machine can check."""

from __future__ import annotations

import math
from typing import Any

import torch

from regard.bench import kernels as kernels_bench
from regard.core import Mask, attend, patterns
from regard.reproduce.harness import Claim, Interval, Measured, Setup, bootstrap, verdict

TITLE = (
    "Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism"
)
PAPER = "https://arxiv.org/abs/2510.17896"
SEED, SIZES, TOKENS, ROUNDS = 42, 20, 4096, 3
KERNELS = "attend,tiled,naive,sdpa"
HETEROGENEOUS = tuple(n for n, p in patterns.PATTERNS.items() if p.kind == "heterogeneous")
DENSITIES = (1.0, 0.5, 0.2)

_GPU = "regard bench kernels --masks all --lengths 1k,2k,4k,8k,16k,24k,32k,40k,48k --heads 64:8 "
CLAIMS = (
    Claim(
        "exact",
        "All kernels compared compute the same attention, on every mask they support",
        "a condition of the benchmark",
        "reproduced if every measured cell, forward and backward, is within 1e-4 of the float64 "
        "reference; partly if nine in ten are",
        lambda v: verdict(v["exact"] == v["cells"], v["exact"] >= 0.9 * v["cells"]),
    ),
    Claim(
        "area",
        "Work can be counted exactly from the description of a mask, without its matrix",
        "FLOPs from the area of slices",
        "reproduced if the area of all 14 masks equals the count of the boolean matrix at every "
        "random size; partly if for ten masks or more",
        lambda v: verdict(v["right"] == 14, v["right"] >= 10),
    ),
    Claim(
        "skipping",
        "Kernels that take a mask as a tensor lose throughput on heterogeneous masks; kernels that "
        "skip blocks keep it (throughput on allowed pairs over that of the full mask)",
        "curves",
        "reproduced if the mean share kept by the skipping kernel is at least 1.5 times that of "
        "the mask-tensor kernel and the interval of the ratio lies above 1; partly if the ratio "
        "is above 1",
        lambda v: verdict(v["ratio"] >= 1.5 and v["low"] > 1, v["ratio"] > 1),
    ),
    Claim(
        "sparse",
        "Block-sparse kernels save time in proportion to what they leave out",
        "curves",
        "reproduced if, for blocks of 64 and 128, time over that of density 1 lies within 0.5 to "
        "1.5 times the kept share plus 0.1; partly if time falls with the kept share",
        lambda v: verdict(v["outside"] == 0, v["falls"] == 1),
    ),
    Claim(
        "memory",
        "Memory of kernels that hold the matrix grows with the square of the length, that of "
        "blockwise kernels linearly (exponent of the peak in the length)",
        "curves, out-of-memory marks",
        "reproduced if the exponent is at most 1.25 blockwise and at least 1.7 with the matrix; "
        "partly if the two differ by 0.4",
        lambda v: verdict(
            v["blockwise"] <= 1.25 and v["matrix"] >= 1.7, v["matrix"] - v["blockwise"] > 0.4
        ),
    ),
    Claim(
        "gpu-order",
        "FlashAttention-3 is fastest on regular masks; it and cuDNN express no heterogeneous mask; "
        "FlexAttention expresses all, slower, and runs out of memory at length",
        "curves on H100",
        "needs an H100 and FlashAttention-3",
        command=_GPU + "--dim 128 --dtype bfloat16 --backward",
    ),
    Claim(
        "block-size",
        "Sparse kernels with blocks of 128 mostly beat those with 64, and backward is weak",
        "curves on H100",
        "needs a GPU: the order of CPU kernels says nothing of it",
        command="regard bench kernels --masks block_sparse:block=64,block_sparse:block=128 "
        "--lengths 16k,48k --heads 4:4 --dim 128 --dtype bfloat16 --backward",
    ),
    Claim(
        "context-parallel",
        "Hybrid schemes (USP, LoongTrain) win from 16 GPUs on; Ulysses is capped by its heads",
        "curves on up to 96 GPUs",
        "needs 16 GPUs or more",
        command="torchrun --nproc-per-node 8 -m regard bench parallel --tokens-per-rank 8192",
    ),
)


def measure(setup: Setup) -> Measured:
    """One table of kernels and masks, and the areas against brute force."""
    tokens = 1024 if setup.quick else TOKENS
    rounds = 1 if setup.quick else ROUNDS
    journal = setup.journal
    with setup.progress(5, "kernels") as step:
        area = journal.get("area", lambda: _areas(3 if setup.quick else SIZES))
        step()
        exact = journal.get("exact", lambda: _bench("all", [400], KERNELS, 1, backward=True))
        step()
        masks = ",".join(("full", *HETEROGENEOUS))
        speed = journal.get("speed", lambda: _bench(masks, [tokens], "attend,sdpa", rounds))
        step()
        names = ",".join(f"block_sparse:block={b},density={d}" for b in (64, 128)
                         for d in DENSITIES)  # fmt: skip
        sparse = journal.get("sparse", lambda: _bench(names, [tokens], "attend", rounds))
        step()
        lengths = [tokens // 4, tokens // 2, tokens]
        memory = journal.get(
            "memory", lambda: _bench("sliding_window_causal", lengths, "attend,naive", 1)
        )
        step()
    stated = {c.key: c for c in CLAIMS}
    settled = {
        "exact": _exact(stated["exact"], exact),
        "area": _area(stated["area"], area),
        "skipping": _skipping(stated["skipping"], speed),
        "sparse": _sparse(stated["sparse"], sparse),
        "memory": _memory(stated["memory"], memory),
    }
    return Measured(
        claims=[settled[c.key] if c.judge else c.unmeasured() for c in CLAIMS],
        data=(
            f"Standard normal q, k, v: 8 query heads and 2 key heads of 64, {tokens} tokens; the "
            "model above is not used. Documents are drawn from reconstructed histograms. "
            "Interval: bootstrap over masks."
        ),
        seeds={"masks and tensors": SEED, "bootstrap": 0},
        settings={"tokens": tokens, "rounds": rounds, "threads": torch.get_num_threads()},
    )


def _bench(masks: str, lengths: list[int], kernels: str, rounds: int, **more: Any) -> Any:
    result = kernels_bench.run(
        masks=masks,
        lengths=lengths,
        kernels=kernels,
        rounds=rounds,
        seed=SEED,
        device="cpu",
        progress=None,
        **more,
    )
    return [
        {**c.settings, **c.values, "outcome": c.outcome}
        for key, c in result.cells.items()
        if key != "machine"
    ]


def _areas(sizes: int) -> dict[str, int]:
    """How many masks have the right area everywhere, and how many sizes tell the variants apart."""
    make = torch.Generator().manual_seed(SEED)
    right, apart = dict.fromkeys(patterns.PATTERNS, True), 0
    for n in range(sizes):
        total = int(torch.randint(8, 600, (1,), generator=make))
        for name, pattern in patterns.PATTERNS.items():
            given: dict[str, Any] = {}
            if "seed" in pattern.parameters:
                given["seed"] = n
            if "block" in pattern.parameters:
                given["block"] = 2 + int(torch.randint(0, 60, (1,), generator=make))
            if name.startswith("sliding_window"):
                given["window"] = int(torch.randint(0, total, (1,), generator=make))
            mask = patterns.build(name, total, **given)
            count = int(mask.cells(total, total).sum())
            right[name] &= mask.area(total, total) == count
        prefix = total // 3
        off = Mask.prefix(prefix + 1) | Mask.causal()  # k <= P where the table says k < P
        apart += off.area(total, total) != patterns.build(
            "prefix_lm_causal", total, prefix=prefix
        ).area(total, total)
    return {"right": sum(right.values()), "sizes": sizes, "apart": int(apart)}


def _exact(claim: Claim, cells: list[dict[str, Any]]) -> Claim:
    done = [c for c in cells if c["outcome"] == "measured"]
    good = sum(c["exact"] for c in done)
    worst = max(c["error"] for c in done)
    tiny = patterns.build("sliding_window_causal", 300, window=30)
    wrong = patterns.build("sliding_window_causal", 300, window=29)
    make = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(1, 2, 300, 64, generator=make) for _ in range(3))
    gap = (attend(q, k, v, mask=tiny).out - attend(q, k, v, mask=wrong).out).abs().max()
    return claim.settle(
        {"cells": len(done), "exact": good, "worst": worst, "asked": len(cells)},
        here=f"{good} of {len(done)} cells, largest error {worst:.1e}",
        control=f"{float(gap):.2f}: a window off by one",
    )


def _area(claim: Claim, found: dict[str, int]) -> Claim:
    return claim.settle(
        found,
        here=f"{found['right']} of 14 masks, {found['sizes']} sizes each",
        control=f"{found['apart']} of {found['sizes']} sizes tell k <= P from k < P",
    )


def _skipping(claim: Claim, cells: list[dict[str, Any]]) -> Claim:
    speed = {(c["kernel"], c["mask"]): c["throughput"] for c in cells if "throughput" in c}
    kept = {kernel: [speed[kernel, m] / speed[kernel, "full"] for m in HETEROGENEOUS]
            for kernel in ("attend", "sdpa")}  # fmt: skip
    ratios = [a / b for a, b in zip(kept["attend"], kept["sdpa"])]
    low, high = bootstrap(ratios)
    means = {n: sum(v) / len(v) for n, v in kept.items()}
    return claim.settle(
        {"ratio": means["attend"] / means["sdpa"], "low": low, "high": high, **means},
        here=f"{means['attend']:.2f} of its full-mask throughput kept",
        control=f"{means['sdpa']:.2f} with the mask as a tensor",
        interval=Interval("bootstrap of the ratio over masks", low, high),
    )


def _sparse(claim: Claim, cells: list[dict[str, Any]]) -> Claim:
    rows: dict[int, dict[float, float]] = {64: {}, 128: {}}
    for c in cells:
        if "seconds" in c:
            rows[c["parameters"]["block"]][c["area_share"]] = c["seconds"]["q50"]
    shares = {b: {d: t / row[1.0] for d, t in sorted(row.items())} for b, row in rows.items()}
    outside = sum(not 0.5 * d <= r <= 1.5 * d + 0.1 for row in shares.values()
                  for d, r in row.items())  # fmt: skip
    falls = all(list(r.values()) == sorted(r.values()) for r in shares.values())
    words = "; ".join(
        f"block {b}: " + ", ".join(f"{r:.2f} at {d:.2f}" for d, r in row.items() if d < 1)
        for b, row in shares.items()
    )
    return claim.settle(
        {"outside": outside, "falls": int(falls)}, here=words, control="1 at density 1"
    )


def _memory(claim: Claim, cells: list[dict[str, Any]]) -> Claim:
    slopes = {}
    for name, kernel in (("blockwise", "attend"), ("matrix", "naive")):
        points = [(math.log(c["tokens"]), math.log(max(c["peak_bytes"], 1))) for c in cells
                  if c["kernel"] == kernel and "peak_bytes" in c]  # fmt: skip
        mx, my = (sum(p[n] for p in points) / len(points) for n in (0, 1))
        slopes[name] = sum((x - mx) * (y - my) for x, y in points) / sum(
            (x - mx) ** 2 for x, _ in points
        )
    return claim.settle(
        slopes,
        here=f"{slopes['blockwise']:.2f} blockwise",
        control=f"{slopes['matrix']:.2f} with the matrix",
    )
