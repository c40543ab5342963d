"""The claims of "Graph-Aware Isomorphic Attention" (Buehler, 2025), on models trained here.

The trainings are a queue of `regard train lm`; its result is read from `benchmarks/results`.
"""

from __future__ import annotations

import json
from typing import Any

from regard.errors import InputError
from regard.lab.intervals import bootstrap, mean
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, root, verdict

from . import method  # noqa: F401  # a change of the method is a change of the runs

TITLE = "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers"
PAPER = "https://arxiv.org/abs/2501.02393"
MODEL = None
FILE = "benchmarks/results/graph-attention.json"
ARMS = ("standard", "gin", "pna", "differential")
TRAIN = (
    f"regard train lm --attention {','.join(ARMS)} --seeds 3 --recall 0.25 --tokens 200000 "
    f"--steps 3000 --measure-every 250 --matched --out runs/graph-attention --json {FILE}"
)

CLAIMS = (
    Claim(
        "gin-gap",
        "GIN attention generalises better than standard attention at equal parameters (validation "
        "less training loss)",
        "curves; no number",
        "reproduced if the gap of GIN is below that of standard attention in every seed and its "
        "validation loss is no higher on average; partly if the gap is smaller on average",
        lambda v: verdict(v["most"] < 0 and v["loss"] <= 0, v["gap"] < 0),
    ),
    Claim(
        "gin-learns",
        "GIN attention learns better than standard attention (validation loss)",
        "curves; said to give the largest gain of the variants",
        "reproduced if its validation loss is below standard's in every seed and PNA's is not "
        "lower still; partly if it is below on average",
        lambda v: verdict(v["most"] < 0 and v["pna"] >= 0, v["mean"] < 0),
    ),
    Claim(
        "sparse-gin",
        "Sparse-GIN fine-tunes better than LoRA of as many parameters",
        "perplexity, qualitative",
        "needs fine-tuning on the paper's sets with a model of 3B",
        command="regard train adapter sparse-gin --model meta-llama/Llama-3.2-3B-Instruct "
        "--hidden 155 --context 1024 --steps 54000 --data orca-math.txt",
    ),
)


def measure(setup: Setup) -> Measured:
    """The trainings of the queue; there is no short form of them."""
    place = root()
    if place is None or not (place / FILE).is_file():
        raise InputError(f"{FILE} is not there: make it with `{TRAIN}`")
    return settled(json.loads((place / FILE).read_text(encoding="utf-8")))


def settled(runs: dict[str, Any]) -> Measured:
    """The verdicts of finished trainings.

    Raises:
        InputError: an arm is missing.
    """
    by: dict[str, list[dict[str, Any]]] = {}
    for run in runs.values():
        by.setdefault(run["variant"]["mixer"], []).append(run)
    missing = set(ARMS[:3]) - set(by)
    if missing:
        raise InputError(f"the trainings lack {sorted(missing)[0]}: finish them with `{TRAIN}`")
    gaps = {
        m: [r["final"]["loss"] - r["final"]["train_loss"] for r in own] for m, own in by.items()
    }
    losses = {m: [r["final"]["loss"] for r in own] for m, own in by.items()}
    apart = [x - y for x, y in zip(gaps["gin"], gaps["standard"])]
    above = [x - y for x, y in zip(losses["gin"], losses["standard"])]
    pna = mean(losses["pna"]) - mean(losses["gin"])
    sizes = {m: own[0]["final"]["parameters"]["total"] for m, own in by.items()}
    note = "parameters " + ", ".join(f"{m} {n:,}" for m, n in sizes.items())
    first = next(iter(runs.values()))
    return Measured(
        [
            CLAIMS[0].settle(
                {"most": max(apart), "gap": mean(apart), "loss": mean(above)},
                here=f"gap {mean(gaps['gin']):.3f}",
                control=f"standard {mean(gaps['standard']):.3f}",
                interval=Interval("difference, bootstrap over seeds", *bootstrap(apart)),
                note=note,
            ),
            CLAIMS[1].settle(
                {"most": max(above), "mean": mean(above), "pna": pna},
                here=f"loss {mean(losses['gin']):.3f}",
                control=f"standard {mean(losses['standard']):.3f}, pna {mean(losses['pna']):.3f}",
                interval=Interval("difference, bootstrap over seeds", *bootstrap(above)),
            ),
            CLAIMS[2].unmeasured(),
        ],
        f"{len(by['standard'])} seeds, {first['steps']} steps on {first['settings']['data']}",
        {"first": 0, "bootstrap": 0},
        first["settings"],
    )
