"""The claims of "Deconstructing Attention" (Xue et al., 2025), on models trained here.

The trainings are a queue of `regard train lm` that a stopped process goes on with; its result is
read from `benchmarks/results`, or made where it is not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.lab.intervals import bootstrap, mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, root, verdict
from regard.parts.mixers import SEVEN
from regard.parts.training.settings import Training

from . import command, method  # noqa: F401  # a change of the method is a change of the runs

TITLE = "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling"
PAPER = "https://arxiv.org/abs/2510.11602"
MODEL = None
FILE = "benchmarks/results/deconstructed-attention.json"
TRAIN = (
    f"regard train lm --mixer {','.join(SEVEN)} --keep none,even --seeds 3 --recall 0.25 "
    f"--steps 3000 --measure-every 250 --out runs/deconstructed-attention --json {FILE}"
)
SETTINGS: dict[str, Any] = {"recall": 0.25, "steps": 3000, "measure_every": 250}
QUICK: dict[str, Any] = {
    "recall": 0.25, "steps": 2, "size": "nano", "data": "novel", "context": 64, "batch": 4,
    "checked": 4, "tokens": 20_000,
}  # fmt: skip
CHANCE = 1 / 26  # of a recall answer: one of so many letters
HYBRIDS = tuple(f"{m}-keep-even" for m in SEVEN[1:])

CLAIMS = (
    Claim(
        "mixing",
        "Token mixing is indispensable: MLPs alone recall nothing and gain nothing from context",
        "NLU 40.0 against random 39.9; perplexity 993.5 at every context length",
        "reproduced if MLPs alone recall at most 3 points above chance, less than every other "
        "mixer, and their loss falls by at most 0.02 nat from the first to the last quarter of a "
        "block while that of standard attention falls by more; partly if they recall least",
        lambda v: verdict(
            v["recall"] <= CHANCE + 0.03
            and v["recall"] < v["next"]
            and v["fall"] <= 0.02 < v["standard fall"],
            v["recall"] < v["next"],
        ),
    ),
    Claim(
        "hybrids",
        "Form and sequence dependency can be relaxed where every second layer keeps attention",
        "WikiText perplexity 38.1 standard; hybrids 38.5 to 45.8, each below its uniform model",
        "reproduced if the validation loss of each of six hybrids is at most 0.2 nat above that of "
        "standard attention and below that of its uniform model (means over seeds); partly if that "
        "holds for four",
        lambda v: verdict(v["hold"] == 6, v["hold"] >= 4),
    ),
    Claim(
        "interleaved",
        "A mixer that fails alone works between standard layers (non_approximate, recall)",
        "NLU 39.3 alone, 52.9 in the hybrid, standard 51.9",
        "reproduced if the hybrid recalls at least 10 points more than the uniform model in every "
        "seed and has the lower loss on average; partly if it does both on average",
        lambda v: verdict(
            v["least"] >= 0.1 and v["loss"] > 0, v["recall"] >= 0.1 and v["loss"] > 0
        ),
    ),
    Claim(
        "skip",
        "The simple layers matter: without them a trained hybrid collapses (loss added)",
        "NLU at most 39.8, perplexity at least 2e4",
        "reproduced if leaving them out costs more than 1 nat in every run of six hybrids; partly "
        "if it does on average",
        lambda v: verdict(v["least"] > 1, v["mean"] > 1),
    ),
    Claim(
        "fixed-maps",
        "Maps from noise or from a fixed text are the same for every input (largest change of the "
        "mean weight of a token)",
        "by construction",
        "reproduced if no such map differs by more than 1e-6 between two texts, and those of "
        "standard attention do",
        lambda v: verdict(v["fixed"] <= 1e-6 < v["free"]),
    ),
    Claim(
        "bounded-logits",
        "Hybrids keep logits bounded where the uniform model's grow (non_approximate)",
        "below 10 against above 1000, at 24 layers",
        "reproduced if the largest logit of the uniform model is more than ten times the hybrid's; "
        "partly if it is larger in every seed",
        lambda v: verdict(v["ratio"] > 10, v["least"] > 1),
    ),
    Claim(
        "benchmarks",
        "Seven zero-shot tasks and perplexities at 70M to 1.7B",
        "NLU 51.9 standard, 40.0 to 50.2 uniform, 48.7 to 52.9 hybrid, at 500M",
        "needs training of models of 500M on 15B tokens",
        command="regard train lm --layout qwen2 --size 500m --mixer rnd_emb_qk --keep even "
        "--context 2048 --batch 256 --steps 30000 --vocabulary 50304 --data "
        "hub:cerebras/SlimPajama-627B",
    ),
)


def measure(setup: Setup) -> Measured:
    """The trainings of the queue, read or made."""
    runs = _trainings(setup)
    by: dict[str, list[dict[str, Any]]] = {}
    for run in runs.values():
        by.setdefault(run["arm"], []).append(run["final"])
    missing = {*SEVEN, *HYBRIDS} - set(by)
    if missing:
        raise InputError(f"the trainings lack {sorted(missing)[0]}: finish them with `{TRAIN}`")

    def of(arm: str, name: str) -> list[float]:
        return [x[name] for x in by[arm]]

    def fall(arm: str) -> float:
        return mean([x["by_context"][0] - x["by_context"][-1] for x in by[arm]])

    standard = mean(of("standard", "loss"))
    others = {m: mean(of(m, "recall")) for m in SEVEN if m != "mlp"}
    recall = of("mlp", "recall")
    mixing = CLAIMS[0].settle(
        {
            "recall": mean(recall),
            "next": min(others.values()),
            "fall": fall("mlp"),
            "standard fall": fall("standard"),
            "each": others,
        },
        here=f"recall {100 * mean(recall):.1f} %, loss falls by {fall('mlp'):.3f} nat",
        control=f"standard: {100 * others['standard']:.1f} %, {fall('standard'):.3f} nat",
        interval=_over("recall", recall),
        note="recall " + ", ".join(f"{m} {100 * x:.0f} %" for m, x in others.items()),
    )
    losses = {h: mean(of(h, "loss")) for h in HYBRIDS}
    alone = {h: mean(of(h.removesuffix("-keep-even"), "loss")) for h in HYBRIDS}
    hold = [h for h in HYBRIDS if losses[h] - standard <= 0.2 and losses[h] < alone[h]]
    apart = [x - y for h in HYBRIDS for x, y in zip(of(h, "loss"), of("standard", "loss"))]
    hybrids = CLAIMS[1].settle(
        {"hold": len(hold), "standard": standard, "hybrids": losses, "uniform": alone},
        here=f"{len(hold)} of 6; " + ", ".join(f"{h} {x:.3f}" for h, x in losses.items()),
        control=f"standard {standard:.3f}",
        interval=_over("loss above standard", apart),
        note="uniform " + ", ".join(f"{h} {x:.3f}" for h, x in alone.items()),
    )
    kept, lone = "non_approximate-keep-even", "non_approximate"
    more = paired(of(kept, "recall"), of(lone, "recall"))
    less = paired(of(lone, "loss"), of(kept, "loss"))
    interleaved = CLAIMS[2].settle(
        {"least": min(more.values), "recall": more.mean, "loss": less.mean},
        here=f"{100 * mean(of(kept, 'recall')):.1f} %, loss {losses[kept]:.3f}",
        control=f"uniform {100 * mean(of(lone, 'recall')):.1f} %, loss {alone[kept]:.3f}",
        interval=Interval("recall gained, bootstrap over seeds", more.low, more.high),
    )
    cost = [x["skip_loss"] - x["loss"] for h in HYBRIDS for x in by[h]]
    skip = CLAIMS[3].settle(
        {"least": min(cost), "mean": mean(cost)},
        here=f"{mean(cost):+.2f} nat, least {min(cost):+.2f}",
        control="0 with them",
        interval=_over("loss added", cost),
    )
    fixed = max(x["map_change"]["fixed"] for m in ("rnd_emb_qk", "fixed_seq_qk") for x in by[m])
    free = min(x["map_change"]["free"] for x in by["standard"])
    maps = CLAIMS[4].settle(
        {"fixed": fixed, "free": free}, here=f"{fixed:.1g}", control=f"standard {free:.3g}"
    )
    ratios = [x / max(y, 1e-6) for x, y in zip(of(lone, "max_logit"), of(kept, "max_logit"))]
    bounded = CLAIMS[5].settle(
        {"ratio": mean(ratios), "least": min(ratios)},
        here=f"uniform {mean(of(lone, 'max_logit')):.1f}",
        control=f"hybrid {mean(of(kept, 'max_logit')):.1f}",
        interval=_over("ratio", ratios),
    )
    first = next(iter(runs.values()))
    seeds = len(by["standard"])
    data = (
        f"{seeds} seeds of 13 models of {first['final']['parameters']['total']:,} parameters, "
        f"{first['steps']} steps on {first['settings']['data']} and recall tasks; losses and "
        "recall on held-out blocks. Intervals: bootstrap over runs."
    )
    return Measured(
        [mixing, hybrids, interleaved, skip, maps, bounded, CLAIMS[6].unmeasured()],
        data,
        {"first": 0, "bootstrap": 0},
        first["settings"],
    )


def _over(what: str, values: list[float]) -> Interval:
    return Interval(f"{what}, bootstrap", *bootstrap(values))


def _trainings(setup: Setup) -> dict[str, Any]:
    place = root()
    if not setup.quick and place is not None and (place / FILE).is_file():
        found: dict[str, Any] = json.loads((place / FILE).read_text(encoding="utf-8"))
        return found
    queue = command.variants(",".join(SEVEN), "none,even", 1 if setup.quick else 3)
    if not setup.quick:
        out = (place or Path.cwd()) / "runs" / "deconstructed-attention"
        return command.run(out, Training(**SETTINGS), queue, progress=setup.show)
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return command.run(Path(folder) / "runs", Training(device="cpu", **QUICK), queue)
