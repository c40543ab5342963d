"""The claims of "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment" (Xu et
al., 2025), measured on a small vision-language model and drawn scenes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from regard import watching as api
from regard.lab.intervals import bootstrap, mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.lab.trials import vqa
from regard.parts.decoding.cache import held_bytes
from regard.parts.vision import decoder
from regard.report.chart import Line, Panel, chart
from regard.report.contact import sheet
from regard.report.grid import stacked
from regard.report.patches import GONE, paint
from regard.zoo import vlm as zoo

from .method import VisionDrop
from .plan import height, prefill_flops

MODEL = "shapes-vlm"
KINDS = ("color", "count", "neighbour", "place")
EACH, SEED, BATCH = 100, 13, 50
SHARES = (0.5, 0.25, 0.12, 0.09)  # 6 % is less than the least that the schedule can do
ALIVE = 0.8  # share of the full accuracy from which on a control has not collapsed
ROUNDS = 7
RIVALS: dict[str, dict[str, Any]] = {
    "visual": {},
    "text": {"score": "text"},
    "random": {"score": "random", "seed": SEED},
    "encoder only": {"stages": "encoder"},
}
DRAWN, EXAMPLE = 0.25, 2  # the share whose survivors are drawn, and in which question's image
SHOWS = (
    "Top: right answers against the image tokens kept, for tokens judged by image tokens (visual), "
    "by the last text token, at random, and in one cut at the encoder. Below: what each cut leaves "
    "of one image at a quarter of its tokens; dark patches are merged with others."
)
_BIG = (
    "regard run visiondrop --model llava-hf/llava-1.5-7b-hf --budget 64 --image a.jpg "
    "--prompt @question.txt"
)
CLAIMS = (
    Claim(
        "control",
        "The experiment can tell methods apart: one random image token instead of all makes "
        "answers wrong",
        "no such control",
        "reproduced if the accuracy with one random token handed on by the encoder, and with one "
        "left after layer 2, are both below 80 % of the full one; partly if one is",
        lambda v: verdict(
            max(v["encoder"], v["layer 2"]) < ALIVE * v["full"],
            min(v["encoder"], v["layer 2"]) < ALIVE * v["full"],
        ),
    ),
    Claim(
        "visual",
        "Judging image tokens by image tokens keeps more right answers than judging them by the "
        "last text token, all else equal (mean over the budgets)",
        "GQA at 192 tokens: 59.99 against 57.27 (PyramidDrop)",
        "reproduced if the interval of the difference lies above 0; partly if it is above 0 at "
        "the two smallest budgets on average",
        lambda v: verdict(v["low"] > 0, v["small"] > 0),
    ),
    Claim(
        "gap",
        "The gap between the two grows as fewer tokens stay",
        "widens with compression",
        "reproduced if the interval of (gap at the two smallest budgets - gap at the two largest) "
        "lies above 0; partly if that difference is above 0",
        lambda v: verdict(v["low"] > 0, v["growth"] > 0),
    ),
    Claim(
        "random",
        "Visual judgement keeps more right answers than keeping tokens at random",
        "implied",
        "reproduced if the interval of the difference, mean over the budgets, lies above 0; partly "
        "if the difference does",
        lambda v: verdict(v["low"] > 0, v["difference"] > 0),
    ),
    Claim(
        "progressive",
        "Cuts in stages keep more right answers than one cut at the encoder with the same mean",
        "both single-stage ends are worse",
        "reproduced if the interval of the difference, mean over the budgets, lies above 0; partly "
        "if the difference does",
        lambda v: verdict(v["low"] > 0, v["difference"] > 0),
    ),
    Claim(
        "bias",
        "The last text token favours what lies low in the image, the part read last (mean row of "
        "the survivors of the first cut in the language model, 0 top to 1 bottom)",
        "survivors cluster at the bottom",
        "reproduced if the interval of the text-guided mean row lies above 0.5; partly if it lies "
        "above the visual one's mean",
        lambda v: verdict(v["low"] > 0.5, v["low"] > v["visual"]),
    ),
    Claim(
        "cost",
        "Reading the prompt gets faster in proportion to the tokens (a quarter of them)",
        "LLaVA-NeXT: 2.7 times lower latency, 6 times fewer operations",
        "reproduced if reading the prompts takes at most 1/1.5 of the plain time in the median "
        "round; partly if it takes less than all of it",
        lambda v: verdict(v["faster"] >= 1.5, v["faster"] > 1),
    ),
    Claim(
        "cost at size",
        "The same where attention and MLP dominate: LLaVA-1.5's number of image tokens before "
        "SmolLM2-135M (a quarter of them; the tower is untrained, which costs the same)",
        "LLaVA-1.5: 2.0 times lower latency at a ninth of the tokens",
        "reproduced if reading the prompt takes at most 1/1.5 of the plain time in the median "
        "round; partly if it takes less than all of it",
        lambda v: verdict(v["faster"] >= 1.5, v["faster"] > 1),
    ),
    Claim(
        "benchmarks",
        "95.7 % of the performance stays at a ninth of LLaVA-NeXT's tokens, over nine benchmarks",
        "2880 to 320 tokens: 95.71 %",
        "needs models of 7B and the benchmarks' images",
        command=_BIG,
    ),
)


def arms() -> dict[str, Callable[[], VisionDrop] | None]:
    """What is compared, by name."""
    made: dict[str, Callable[[], VisionDrop] | None] = {
        "full": None,
        "one at the encoder": lambda: VisionDrop(
            encoder=(1, 0), score="random", merge=False, keep_cls=False, seed=SEED
        ),
        "one after layer 2": lambda: VisionDrop(
            cuts={2: (1, 0)}, score="random", merge=False, seed=SEED
        ),
    }
    for share in SHARES:
        for name, more in RIVALS.items():
            made[f"{name} {share:g}"] = partial(VisionDrop, ratio=share, **more)
    return made


def measure(setup: Setup) -> Measured:
    """Every arm on the same questions; differences are those of the same question."""
    each = 4 if setup.quick else EACH
    given = vqa.items(each, KINDS, seed=SEED, held_out=False)
    made: dict[str, Callable[[], Any]] = {
        **{name: partial(_right, setup, given, make) for name, make in arms().items()},
        "rows": partial(_rows, setup, given),
        "cost": partial(_cost, setup.model, setup.tokenizer, given[:16]),
        "cost at size": lambda: _cost(*_of_size(), given[:1]),
    }
    right = setup.parts("VisionDrop", made)
    rows, cost, at_size = (right.pop(n) for n in ("rows", "cost", "cost at size"))
    shares = {n: mean(v) for n, v in right.items()}

    def difference(a: str, b: str, kept: tuple[float, ...] = SHARES) -> list[float]:
        columns = [paired(right[f"{a} {s:g}"], right[f"{b} {s:g}"]).values for s in kept]
        return [mean(each) for each in zip(*columns)]

    def settle(claim: Claim, values: list[float], here: str, control: str, **more: Any) -> Claim:
        low, high = bootstrap(values)
        kind = "difference, bootstrap over questions"
        return claim.settle(
            {"difference": mean(values), "low": low, "high": high, **more},
            here=here, control=control, interval=Interval(kind, low, high),
        )  # fmt: skip

    def curve(name: str) -> str:
        return ", ".join(f"{100 * s:g} % {100 * shares[f'{name} {s:g}']:.0f}" for s in SHARES)

    small, large = SHARES[2:], SHARES[:2]
    by_text, by_chance = difference("visual", "text"), difference("visual", "random")
    small_gap, large_gap = difference("visual", "text", small), difference("visual", "text", large)
    growth = paired(small_gap, large_gap)
    low, high = bootstrap(rows["text"])
    claims = [
        CLAIMS[0].settle(
            {"full": shares["full"], "encoder": shares["one at the encoder"],
             "layer 2": shares["one after layer 2"]},
            here=f"right: {100 * shares['one at the encoder']:.0f} % with one token of the "
            f"encoder, {100 * shares['one after layer 2']:.0f} % with one after layer 2",
            control=f"all tokens {100 * shares['full']:.0f} %",
            note="where one token is enough, the text has read the image before the cut",
        ),
        settle(CLAIMS[1], by_text, f"right, by tokens kept: {curve('visual')}",
               f"by text {curve('text')}", small=mean(small_gap)),
        settle(CLAIMS[2], growth.values, f"gap {100 * sum(small_gap) / len(small_gap):+.1f} points "
               "at the smaller budgets", f"{100 * sum(large_gap) / len(large_gap):+.1f} at the "
               "larger", growth=growth.mean),
        settle(CLAIMS[3], by_chance, f"right: {curve('visual')}", f"random {curve('random')}"),
        settle(CLAIMS[4], difference("visual", "encoder only"), f"right: {curve('visual')}",
               f"encoder only {curve('encoder only')}"),
        CLAIMS[5].settle(
            {"low": low, "high": high, "visual": mean(rows["visual"]),
             "two ways": mean(rows["bidirectional"])},
            here=f"by text {mean(rows['text']):.2f}",
            control=f"visual {mean(rows['visual']):.2f}, visual without the "
            f"causal mask {mean(rows['bidirectional']):.2f}",
            interval=Interval("mean row by text, bootstrap over images", low, high),
            note="the causal visual score favours early tokens, the top of the image",
        ),
        *(_settle_cost(claim, found) for claim, found in zip(CLAIMS[6:8], (cost, at_size))),
    ]  # fmt: skip
    data = (
        f"{each} questions each of {', '.join(KINDS)} about drawn scenes of two or three things. "
        "An answer is right when each of its tokens is the first choice. Intervals: bootstrap over "
        "questions, differences paired."
    )
    settings = {"each": each, "shares": list(SHARES), "right": shares}
    seeds = {"scenes": SEED, "random": SEED, "bootstrap": 0}
    shown = (picture(setup, given[EXAMPLE], shares), SHOWS)
    return Measured(claims, data, seeds, settings, shown)


def picture(setup: Setup, item: vqa.Item, right: dict[str, float]) -> Any:
    """Accuracies by budget, from the settings of the result, over the survivors in one image."""

    def line(name: str) -> Line:
        points = [(100 * s, 100 * right[f"{name} {s:g}"]) for s in SHARES]
        return Line(name, [(100, 100 * right["full"]), *points])

    curves = chart([Panel("image tokens kept, %", "right answers, %", [*map(line, RIVALS)])])
    batch = vqa.read(setup.tokenizer, [item], setup.model.device)
    vision = setup.model.config.vision_config
    side = vision.image_size // vision.patch_size
    rows, names = [], ("visual", "text", "random")
    for name in names:
        method = VisionDrop(ratio=DRAWN, **RIVALS[name])
        with torch.no_grad(), api.apply(setup.model, method):
            setup.model(**batch.inputs, use_cache=True)
        cuts = method.kept()[0][0]
        alone = [{g[0] for g in cut.groups if len(g) == 1} for cut in cuts]
        gone = [dict.fromkeys(set(range(side * side)) - kept, GONE) for kept in alone]
        rows.append([paint(item.picture, (side, side), cells, 192) for cells in gone])
    where = [f"layer {cut.layer}" if cut.layer else "the encoder" for cut in cuts]
    return stacked([[curves], [sheet(rows, where, names)]])


def _right(
    setup: Setup, given: list[vqa.Item], make: Callable[[], VisionDrop] | None
) -> list[float]:
    def method() -> Any:
        assert make is not None
        return api.apply(setup.model, make())

    scores = vqa.score(
        setup.model, setup.tokenizer, given, None if make is None else method, batch_size=BATCH
    )
    return [s["right"] for s in scores]


def _rows(setup: Setup, given: list[vqa.Item]) -> dict[str, list[float]]:
    """Mean row, 0 to 1, of what the first cut of the language model leaves of whole images."""
    some, found = given[:: max(1, len(given) // 100)], dict[str, list[float]]()
    batch = vqa.read(setup.tokenizer, some, setup.model.device)
    depth = len(decoder(setup.model, "VisionDrop").layers)
    where = max(1, depth // 4)
    vision = setup.model.config.vision_config
    side = vision.image_size // vision.patch_size
    half = side * side // 2
    ways: dict[str, dict[str, Any]] = {
        "visual": {},
        "text": {"score": "text"},
        "bidirectional": {"score_mask": "bidirectional"},
    }
    for name, more in ways.items():
        method = VisionDrop(cuts={where: (half, 0)}, merge=False, **more)
        with torch.no_grad(), api.apply(setup.model, method):
            setup.model(**batch.inputs, use_cache=True)
        found[name] = [height(cuts[0][-1], (side, side)) for cuts in method.kept()]
    return found


def _of_size() -> tuple[Any, Any]:
    """LLaVA-1.5's image (336 pixels, patches of 14) before SmolLM2's body, and its processor."""
    model, words = zoo.assemble_smol(zoo.tower(patch=14, side=336), rank=None)
    return model.eval(), words.processor


def _settle_cost(claim: Claim, cost: dict[str, float]) -> Claim:
    return claim.settle(
        cost,
        here=f"{cost['faster']:.2f} times as fast; operations {100 * cost['operations']:.0f} %, "
        f"bytes of the cache {100 * cost['bytes']:.0f} %",
        control="plain: 1",
        interval=Interval("range of rounds", cost["least"], cost["most"]),
        note=f"prompts of {cost['length']} tokens, {cost['batch']} at once",
    )


def _cost(model: Any, processor: Any, given: list[vqa.Item]) -> dict[str, float]:
    """Time, operations and bytes of reading prompts with a quarter of the image tokens."""
    batch = vqa.read(processor, given, model.device)
    body = decoder(model, "VisionDrop")
    length = int(batch.inputs["input_ids"].shape[1])
    seconds: dict[str, list[float]] = {"plain": [], "quarter": []}
    held: dict[str, int] = {}
    method = VisionDrop(ratio=0.25)
    for n in range(ROUNDS + 1):
        for name in seconds:
            handlers = [method] if name == "quarter" else []
            with torch.no_grad(), api.apply(model, *handlers):
                start = time.perf_counter()
                out = model(**batch.inputs, use_cache=True, logits_to_keep=1)
                spent = time.perf_counter() - start
            held[name] = held_bytes(out.past_key_values)
            if n:
                seconds[name].append(spent)
    counts = method.counts()[0]
    text = length - model.config.image_seq_length
    ratios = sorted(a / b for a, b in zip(seconds["plain"], seconds["quarter"]))
    return {
        "faster": ratios[len(ratios) // 2],
        "least": ratios[0],
        "most": ratios[-1],
        "operations": prefill_flops(body, [text + c for c in counts])
        / prefill_flops(body, [length] * len(counts)),
        "bytes": held["quarter"] / held["plain"],
        "batch": len(batch.inputs["input_ids"]),
        "length": length,
    }
