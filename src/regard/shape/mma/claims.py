"""The claims of "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention
for Multimodal LLMs" (Wang et al., 2025), measured by training small models side by side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.lab.intervals import bootstrap, mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, root, verdict
from regard.report.grid import grid

from . import train as trainings

MODEL = None  # models of its own
FILE = "benchmarks/results/mma-training.json"
ROUNDS = 5  # of short trainings by turns, for the cost of a step
SHOWS = (
    "Share of right answers by kind of question, a column a training: each arm with its seeds; "
    "kinds from the top are those about several things."
)
MANY = ("relation", "neighbour", "comparison", "count")  # questions about more than one thing
CLAIMS = (
    Claim(
        "mechanism",
        "Under a causal mask image states are the same for every question; under MMA they depend "
        "on it, and never on the answer (largest change of an image state)",
        "by construction",
        "reproduced if the change by question is 0 causally and above 0.001 under MMA, and the "
        "change by answer is 0 in every run; partly if the answer never shows",
        lambda v: verdict(
            v["causal by question"] == 0 and v["mma by question"] > 1e-3 and v["by answer"] == 0,
            v["by answer"] == 0,
        ),
    ),
    Claim(
        "accuracy",
        "MMA answers more questions right than causal attention with the same data, steps and "
        "parameters (accuracy on new scenes, mean over seeds)",
        "+7.2 % on average over 12 benchmarks (abstract; +6.2 % in a later version)",
        "reproduced if the difference is above 0 for every seed and above 1 point on average; "
        "partly if it is above 0 on average",
        lambda v: verdict(v["least"] > 0 and v["difference"] > 0.01, v["difference"] > 0),
    ),
    Claim(
        "several",
        "The gain is clearest where a question is about several things",
        "qualitative",
        "reproduced if the gain on questions about several things is above 0 and above that on the "
        "others, for every seed; partly on average",
        lambda v: verdict(
            v["least gain"] > 0 and v["least more"] > 0, v["gain"] > 0 and v["more"] > 0
        ),
    ),
    Claim(
        "order",
        "Putting the question before the image does not reach it (MMA over text first)",
        "I&T, T&I and both orders are all below MMA",
        "reproduced if MMA is above for every seed, of two at least; partly if it is on average",
        lambda v: verdict(v["least"] > 0 and v["seeds"] > 1, v["difference"] > 0),
    ),
    Claim(
        "cost",
        "No parameters and no longer training (time of a step, MMA over causal)",
        "no additional parameters, no longer training",
        "reproduced if the parameters are equal and a step takes at most 1.05 times as long; "
        "partly if the parameters are",
        lambda v: verdict(v["counts"] == 1 and v["step"] <= 1.05, v["counts"] == 1),
    ),
    Claim(
        "benchmarks",
        "Twelve benchmarks rise over three language models",
        "MMBench 64.9 to 71.8, MME-P 1226 to 1364, CV-Bench-3D 54.3 to 64.1",
        "needs training of a model of 4B on its data",
        command="regard train mma --steps 50000 --device cuda",
    ),
)


def measure(setup: Setup) -> Measured:
    """The committed trainings, or new ones where there are none."""
    found = setup.journal.get("trainings", lambda: _trainings(setup))
    runs = list(found["runs"].values())
    seeds = sorted({r["seed"] for r in runs})
    by = {(r["arm"], r["seed"]): r for r in runs}
    kinds = tuple(k for k in runs[0]["accuracy"] if k not in ("all", "asked"))
    few = tuple(k for k in kinds if k not in MANY)

    def accuracy(arm: str, seed: int, of: tuple[str, ...] = ("all",)) -> float:
        return mean([by[arm, seed]["accuracy"][k] for k in of if k in by[arm, seed]["accuracy"]])

    def gain(over: str, of: tuple[str, ...] = ("all",)) -> list[float]:
        return [accuracy("mma", s, of) - accuracy(over, s, of) for s in seeds]

    def right(arm: str, of: tuple[str, ...] = ("all",)) -> float:
        return 100 * mean([accuracy(arm, s, of) for s in seeds if (arm, s) in by])

    def interval(values: list[float]) -> Interval:
        return Interval(f"difference, bootstrap over {len(seeds)} seeds", *bootstrap(values))

    apart = gain("causal")
    both = [s for s in seeds if ("text first", s) in by]  # fewer seeds than the main comparison
    order = [accuracy("mma", s) - accuracy("text first", s) for s in both]
    several, others = gain("causal", MANY), gain("causal", few)
    more = paired(several, others).values
    each = "; ".join(
        f"{a}: " + ", ".join(f"{k} {right(a, (k,)):.0f}" for k in kinds) for a in trainings.ARMS
    )
    shown = {
        "causal by question": max(by["causal", s]["change by question"] for s in seeds),
        "mma by question": min(by["mma", s]["change by question"] for s in seeds),
        "by answer": max(by[a, s]["change by answer"] for a in ("causal", "mma") for s in seeds),
    }
    # the long trainings may have shared the machine: short ones in turns tell what a step costs
    ratios = setup.journal.get("steps", lambda: _steps(1 if setup.quick else ROUNDS))
    slower = sorted(ratios)[len(ratios) // 2]
    claims = [
        CLAIMS[0].settle(
            shown,
            here=f"by question {shown['mma by question']:.3f}, by answer {shown['by answer']:g}",
            control=f"causal, by question {shown['causal by question']:g}",
        ),
        CLAIMS[1].settle(
            {"difference": mean(apart), "least": min(apart), "each": apart},
            here=f"{right('mma'):.1f} % right",
            control=f"causal {right('causal'):.1f} %",
            interval=interval(apart),
            note=f"right answers in %: {each}",
        ),
        CLAIMS[2].settle(
            {
                "gain": mean(several),
                "more": mean(more),
                "least gain": min(several),
                "least more": min(more),
            },
            here=f"{100 * mean(several):+.1f} points on {', '.join(MANY)}",
            control=f"{100 * mean(others):+.1f} on {', '.join(few)}",
            interval=interval(more),
        ),
        CLAIMS[3].settle(
            {"difference": mean(order), "least": min(order), "seeds": len(both)},
            here=f"{100 * mean([accuracy('mma', s) for s in both]):.1f} % right",
            control=f"text first {right('text first'):.1f} %",
            interval=Interval(f"difference, bootstrap over {len(both)} seeds", *bootstrap(order)),
        ),
        CLAIMS[4].settle(
            {"step": slower, "counts": len({r["parameters"] for r in runs})},
            here=f"a step takes {slower:.3f} times as long",
            control="causal: 1",
            interval=Interval("range of rounds", min(ratios), max(ratios)),
            note=f"{runs[0]['parameters']:,} parameters in every arm",
        ),
    ]
    s = found["settings"]
    data = (
        f"{len(seeds)} seeds, {s['steps']} steps of {s['batch']} questions about drawn scenes of "
        f"two or three things, on {found['device']}; a vision tower of {(64 // s['patch']) ** 2} "
        f"patches, trained once, and a body of {s['layers']} layers of width {s['hidden']}. "
        f"Accuracy over {runs[0]['accuracy']['asked']} questions about new scenes. Trained by "
        f"`regard train mma`; read from {FILE} where it is there."
    )
    seeded = {"trainings": 0, "bootstrap": 0}
    return Measured(claims, data, seeded, dict(s), (picture(found), SHOWS))


def picture(found: dict[str, Any]) -> Any:
    """Accuracy of every training by kind of question, from what `regard train mma` wrote."""
    columns = sorted(
        found["runs"].values(), key=lambda r: (trainings.ARMS.index(r["arm"]), r["seed"])
    )
    known = [k for k in columns[0]["accuracy"] if k not in ("all", "asked")]
    kinds = [*(k for k in MANY if k in known), *(k for k in known if k not in MANY), "all"]
    cells = [[run["accuracy"][kind] for run in columns] for kind in kinds]
    arms = [run["arm"] for run in columns]
    above = [(arms.index(arm) + arms.count(arm) / 2, arm) for arm in dict.fromkeys(arms)]
    below = [(n + 0.5, f"seed {run['seed']}") for n, run in enumerate(columns)]
    size = (200 + 130 * len(columns), 110 + 56 * len(kinds))
    return grid(cells, size, rows=kinds, above=above, below=below, numbers=True)


def _steps(rounds: int) -> list[float]:
    """Seconds of a step with MMA over those without, in short trainings by turns."""
    import tempfile

    found = []
    with tempfile.TemporaryDirectory() as folder:
        tower = Path(folder) / "tower"
        trainings.train_tower(tower, steps=1, batch=8, patch=trainings.PATCH, width=64, layers=3)
        for _ in range(rounds):
            each = [
                trainings.train_arm(arm, tower, steps=8, batch=64, seed=0, checked=64, pool=256)
                for arm in ("causal", "mma")
            ]
            found.append(each[1]["seconds a step"] / each[0]["seconds a step"])
    return found


def _trainings(setup: Setup) -> dict[str, Any]:
    place = root()
    if place is not None and (place / FILE).is_file() and not setup.quick:
        found: dict[str, Any] = json.loads((place / FILE).read_text(encoding="utf-8"))
        wanted = {(a, s) for a in ("causal", "mma") for s in range(3)} | {("text first", 0)}
        if {(r["arm"], r["seed"]) for r in found["runs"].values()} >= wanted:
            return found
        raise InputError(f"{FILE} is not complete: finish it with `regard train mma --out {FILE}`")
    import tempfile

    small: dict[str, Any] = {
        "steps": 2, "batch": 8, "seeds": (0,), "tower_steps": 1, "checked": 64, "pool": 64,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "trainings.json"
        return trainings.compare(out, **(small if setup.quick else {}))
