"""The rules of the claims about training, older than any run: what a queue of `regard train lm`
must show. The claims are settled by them once the results of the trainings are there.
"""

from __future__ import annotations

from typing import Any

STEPS = 5000
FOLDER = "benchmarks/results"
_ALL = "--seeds 3 --steps {steps} --measure-every 100 --schedule constant_with_warmup --lr 1e-3"
_OUT = " --out runs/sinks-{name} --json " + FOLDER + "/sinks-{name}.json"


def _command(name: str, words: str) -> str:
    return f"regard train lm {words} {_ALL.format(steps=STEPS)}{_OUT.format(name=name)}"


COMMANDS = {
    "attention": _command("attention", "--attention softmax,sigmoid_no_norm,sigmoid_norm,k_bias,"
                          "kv_bias,v_bias,sink_token"),
    "fixed-2": _command("fixed-2", "--attention softmax --fixed-token 2"),
    "slow": _command("slow", "--attention softmax").replace("--lr 1e-3", "--lr 1e-4"),
    "decay-0": _command("decay-0", "--attention softmax --weight-decay 0"),
    "decay-half": _command("decay-half", "--attention softmax --weight-decay 0.5"),
}  # fmt: skip
"""The queues, by the name of their result."""

EARLY = 500  # steps: before effective optimisation

RULES = {
    "emergence": "reproduced if the mean weight of the first token exceeds 1.5 times that of "
    "uniform attention (0.111) at the end in every seed, and not at step 500, and is smaller at "
    "the end with a tenth of the learning rate; partly if it grows from step 500 to the end in "
    "every seed",
    "position": "reproduced if a token fixed at position 2 has the largest Sink_k there, above "
    "20 %, in every seed, while no position has that without it; partly if position 2 has the "
    "largest Sink_k on average",
    "bias": "reproduced if the mean weight of a learned key exceeds that of the first token by a "
    "factor of 3 in every seed, and the first token has less than under softmax; partly if it "
    "exceeds it on average",
    "sigmoid": "reproduced if the first token's mean (normalised) weight under sigmoid without "
    "norm is below that under softmax in every seed, and the validation loss within 0.1 nat; "
    "partly if one of the two holds",
}
"""How the numbers of the trainings become verdicts, in words; `judged` is the same."""

UNIFORM = 0.0741  # mean weight of the first of 64 tokens under uniform attention


def judged(key: str, v: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the whole rule of a claim holds, and whether that of "partly" does.

    `v` holds lists over seeds by arm, as `numbers` gives them.

    >>> judged("sigmoid", {"sigmoid": [0.05], "softmax": [0.3], "apart": 0.05})
    (True, True)
    """
    if key == "emergence":
        emerged = all(x > 1.5 * UNIFORM for x in v["end"]) and all(
            x <= 1.5 * UNIFORM for x in v["early"]
        )
        slower = sum(v["slow"]) / len(v["slow"]) < sum(v["end"]) / len(v["end"])
        return emerged and slower, all(a > b for a, b in zip(v["end"], v["early"]))
    if key == "position":
        there = all(x > 20 and x > other for x, other in zip(v["second"], v["elsewhere"]))
        mean, rest = (sum(v[n]) / len(v[n]) for n in ("second", "elsewhere"))
        return there and max(v["without"]) <= 20, mean > rest
    if key == "bias":
        takes = all(star > 3 * first for star, first in zip(v["star"], v["first"]))
        less = sum(v["first"]) < sum(v["softmax"])
        return takes and less, sum(v["star"]) > sum(v["first"])
    if key == "sigmoid":
        lower = all(x < y for x, y in zip(v["sigmoid"], v["softmax"]))
        near = abs(v["apart"]) <= 0.1
        return lower and near, lower or near
    raise ValueError(f"no rule for {key!r}")
