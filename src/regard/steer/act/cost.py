"""What ACT costs: a whole prefill with a fifth of the heads and with all, and one long head.

`regard bench act --out benchmarks/results/act.json` measures, and goes on where it was interrupted.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regard.errors import InputError
from regard.lab.bench.decode import opening
from regard.lab.bench.record import (
    Cell,
    Result,
    environment,
    judged,
    machine_md,
    median,
    ratios,
    resume,
    show_progress,
    spread,
    targets_md,
)
from regard.lab.bench.timer import peak, seconds

SHARE = 0.2  # the published list for classification has 184 of 928 heads
LONG = 8192
MB = 1e6
ROWS = {"few": "a fifth of the heads", "all": "all heads"}
TARGETS: list[dict[str, Any]] = [
    {"row": "few", "most": 1.2, "rule": "a fifth of the heads: at most 1.2 times the plain model"},
    {"row": "all", "most": 1.6, "rule": "all heads: at most 1.6 times the plain model"},
    {"row": "head", "most": 200.0, "rule": f"{LONG} tokens in one head: less than 200 MB"},
]


def run(
    model: str = "smollm2-135m",
    *,
    tokens: int = 4096,
    rounds: int = 5,
    out: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Any = show_progress,
) -> Result:
    """Time plain, few and all in turn, so many rounds, and the memory of one long head.

    Args:
        model: a name of `regard.models()`, a folder or a hub id.
        tokens: length of the prompt, the beginning of northanger-abbey.
        out: JSON file, written after every round.
        seed: which heads are the fifth.

    Raises:
        InputError: a length or number of rounds that cannot be, a file that holds another run.
    """
    from regard.watching import apply

    from .heads import shape_of
    from .method import ACT

    if tokens < 16 or rounds < 1:
        raise InputError("tokens is at least 16 and rounds at least 1")
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    loaded, ids = opening(model, tokens, tokens)
    shape, _ = shape_of(loaded)
    inner = [(n, h) for n in range(2, shape["layers"] - 1) for h in range(shape["heads"])]
    drawn = random.Random(seed).sample(inner, round(SHARE * len(inner)))
    heads = {n: sorted(h for m, h in drawn if m == n) for n in sorted({m for m, _ in drawn})}
    settings = {
        "model": Path(model).name,
        **shape,
        "tokens": tokens,
        "seed": seed,
        "beta": 0.4,
        "alpha": 5.0,
        "heads few": len(drawn),
        "heads all": len(inner),
        "dtype": "float32",
        "logits": "all",
    }
    fresh = Result("act", settings, environment(threads), [dict(t) for t in TARGETS])
    result = resume(out, fresh)
    ways: dict[str, list[Any]] = {"plain": [], "few": [ACT(heads=heads)], "all": [ACT()]}
    for name in ways:
        result.cells.setdefault(name, Cell({"row": name}, values={"seconds": []}))
    result.save(out)

    def forward(methods: list[Any]) -> None:
        with torch.no_grad(), apply(loaded, *methods):
            loaded(ids, use_cache=False)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ACT: ")
        if len(result.cells["all"].values["seconds"]) < rounds:
            forward([])  # the first forward also pays for what is made once
        while (done := len(result.cells["all"].values["seconds"])) < rounds:
            taken = {name: seconds(partial(forward, methods)) for name, methods in ways.items()}
            for name, value in taken.items():
                result.cells[name].values["seconds"].append(round(value, 4))
            for name, method in (("few", ways["few"][0]), ("all", ways["all"][0])):
                found = method.found()
                marked = sum(int(s.sum()) for s in found.values())
                cells = sum(s.numel() for s in found.values())
                result.cells[name].values["sinks"] = round(marked / cells, 4)
            result.save(out)
            progress(f"round {done + 1} of {rounds}: {_words(taken)}")
    if not result.settled("head"):
        result.cells["head"] = Cell({"row": "head", "tokens": LONG}, values=_apart())
        result.save(out)
    return result


def judge(result: Result) -> list[dict[str, str]]:
    """Every target with what was measured."""

    def measured(target: dict[str, Any]) -> tuple[float, str] | None:
        if target["row"] != "head":
            return median(ratios(result, target["row"]))
        cell = result.get("head")
        if cell is None:
            return None
        amount = cell.values["bytes"] / MB
        return amount, f"{amount:.0f} MB"

    return judged(result, measured)


def markdown(result: Result, source: str) -> str:
    """The page as text; the same result gives the same text."""
    s = result.settings
    lines = [
        "# What ACT costs",
        "",
        f"<!-- Generated from {source} by `regard bench act`; do not edit. -->",
        "",
        f"Prefill of {s['tokens']} tokens through {s['model']} ({s['layers']} layers of "
        f"{s['heads']} heads, {s['dtype']}, logits of every token), the plain model on torch's "
        "fused attention and both rows in turn in one process. The heads are those of the layers "
        f"that ACT may change; the fifth is drawn at random ({s['heads few']} of "
        f"{s['heads all']}). Sinks by alpha / N with alpha = {s['alpha']:g}, beta = {s['beta']:g}.",
        "",
        *targets_md(judge(result)),
        "## Time",
        "",
        "| | seconds | range | times the plain model | range | keys that are sinks |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row, name in {"plain": "plain model", **ROWS}.items():
        cell = result.cells.get(row)
        if cell is None or not cell.values["seconds"]:
            continue
        took, of = spread(cell.values["seconds"]), spread(ratios(result, row))
        many = f"{100 * cell.values['sinks']:.0f} %" if "sinks" in cell.values else "-"
        lines.append(
            f"| {name} | {took['median']:.2f} | {took['low']:.2f} to {took['high']:.2f} | "
            f"{of['median']:.2f} | {of['low']:.2f} to {of['high']:.2f} | {many} |"
        )
    rounds = len(result.cells["all"].values["seconds"])
    lines += [
        "",
        f"Medians of {rounds} rounds. The memory target is the growth of a process of its own in "
        f"one call: finding the sinks of one head of {LONG} tokens and changing it.",
        *machine_md(result),
    ]
    return "\n".join(lines)


def long_head(tokens: int = LONG, dim: int = 64) -> dict[str, Any]:
    """Bytes at the peak of finding the sinks of one head and changing it, over those before."""
    from regard.core import Mask, attend
    from regard.reach import Call, Site

    from .method import ACT

    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens, dim, generator=make) for _ in range(3))
    k[:, :, 50::100] = 3 * q.mean(2, keepdim=True) + 1.5 * k[:, :, 50::100]
    site = Site(0, "layer", 0, "layers", "self")
    call = Call(site, q, k, v, Mask.causal(), dim**-0.5)
    method = ACT(alpha=1.5, skip_layers=(0, 0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = attend(q, k, v, mask=Mask.causal())
        short = call.change(q=q[:, :, :64], k=k[:, :, :64], v=v[:, :, :64])
        method.after(short, short.attend())  # what is made once
        grown, how = peak(lambda: method.after(call, state))
    return {"bytes": grown, "how": how, "sinks": int(method.found()[0].sum())}


def _apart() -> dict[str, Any]:
    """`long_head` in a process of its own."""
    code = (
        "import json; from regard.steer.act.cost import long_head; print(json.dumps(long_head()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the memory could not be measured: {done.stderr.strip()[-200:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _words(taken: dict[str, float]) -> str:
    return ", ".join(f"{n} {t:.2f} s ({t / taken['plain']:.2f})" for n, t in taken.items())
