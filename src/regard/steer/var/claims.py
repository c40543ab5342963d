"""The claims of "See What You Are Told: Visual Attention Sink in Large Multimodal Models" (Kang et
al., 2025), measured on a small vision-language model with SmolLM2's real attention sinks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard import watching as api
from regard.core import Mask, State, mass
from regard.errors import InputError
from regard.lab.intervals import Paired, bootstrap, mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.lab.trials import vqa
from regard.parts.decoding.picks import over, take_queries
from regard.reach import Call
from regard.report.contact import sheet
from regard.report.patches import MARK, paint
from regard.report.patches import over as laid_over

from .dims import find_sink_dims
from .edit import at_queries
from .method import VAR

MODEL = "smol-vlm"
KINDS = ("existence", "relation", "neighbour")
EACH, SEED, BATCH = 60, 11, 20
BAR = 0.5  # of the greatest phi, sqrt(hidden size): the card's range is 0.31 to 0.8
RHO = 0.5  # the paper's value against hallucination
SHOWN = 4  # questions in the picture
SHOWS = (
    "One question a row: the picture as the model gets it; red, the patches that are sinks in at "
    "least half of the acting layers; and what the last token of the prompt gives each patch, mean "
    "over heads and acting layers, before and after VAR on one scale from dim to bright."
)
_BIG = (
    "regard run var --model llava-hf/llava-1.5-7b-hf --preset hallucination --image a.jpg "
    "--prompt @question.txt"
)
CLAIMS = (
    Claim(
        "sinks",
        "Some image tokens carry massive activation in the dims of the first token's sink, and the "
        "text looks at them more than at others (attention a visual sink gets from text, over that "
        "of an average image token)",
        "irrelevant to the question, high attention throughout",
        "reproduced if such tokens exist in half of the acting layers and the interval of the "
        "ratio lies above 2; partly if it lies above 1",
        lambda v: verdict(v["layers"] >= 0.5 and v["low"] > 2, v["layers"] > 0 and v["low"] > 1),
    ),
    Claim(
        "knockout",
        "Hiding the visual sinks from the text costs less than hiding as many random image tokens "
        "(change of the right answer's log-probability)",
        "performance does not change without the sinks",
        "reproduced if the interval of the difference lies above 0; partly if the difference does",
        lambda v: verdict(v["low"] > 0, v["difference"] > 0),
    ),
    Claim(
        "gain",
        "Giving the sinks' attention to the other image tokens makes answers better, without "
        "training (change of the right answer's log-probability)",
        "POPE, CHAIR and others rise; GQA 62.0 to 63.5",
        "reproduced if the interval of the change lies above 0 and so does that of the change over "
        "random image tokens as sinks; partly if the first does",
        lambda v: verdict(v["low"] > 0 and v["over_low"] > 0, v["low"] > 0),
    ),
    Claim(
        "selection",
        "The choice of image-centric heads is needed: in every head the same edit destroys answers "
        "(change of the right answer's log-probability, all heads)",
        "scores fall to 0",
        "reproduced if the interval of the change lies below 0 and below that of the chosen heads; "
        "partly if the change is below that of the chosen heads",
        lambda v: verdict(v["high"] < 0 and v["gap_high"] < 0, v["gap"] < 0),
    ),
    Claim(
        "receiver",
        "The attention must go to the image: given to the text it does not help (image over text "
        "as receiver)",
        "to text: worse than the plain model; to image: best",
        "reproduced if the interval of the difference lies above 0; partly if the difference does",
        lambda v: verdict(v["low"] > 0, v["difference"] > 0),
    ),
    Claim(
        "benchmarks",
        "General, hallucination and vision-centric benchmarks rise over five models",
        "GQA +1.5, VizWiz +3.7, MM-Vet +2.6 (LLaVA-1.5-7B)",
        "needs models of 7B and the benchmarks' images",
        command=_BIG,
    ),
)


class _Looks(VAR):
    """Changes nothing: what text gives visual sinks, over their share of the image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.ratios: dict[int, list[float]] = {}
        self.counts: dict[int, int] = {}

    def after(self, call: Call, state: State) -> State | None:
        seen = self.seen(call)
        if seen is None or self._text is None:
            return None
        image, sinks = seen
        few, places, ok = take_queries(call, self._text)
        part = at_queries(state, places)
        w_sink, w_image = (mass(over(few, g), part) for g in (image & sinks, image))
        counts, total = (image & sinks).sum(1), image.sum(1)
        layer = call.site.layer
        self.counts[layer] = self.counts.get(layer, 0) + int(counts.sum())
        for row in range(len(counts)):
            if counts[row]:
                real = ok[row].expand(w_sink.shape[1], -1)
                on_image = w_image[row][real].mean().clamp_min(1e-9)
                share = w_sink[row][real].mean() / on_image
                ratio = float(share / (counts[row] / total[row]))
                self.ratios.setdefault(layer, []).append(ratio)
        return None


class SinkKnockout(VAR):
    """Text may not look at the visual sinks any more; nothing is given to anyone.

    With `random_sinks` as many random image tokens are hidden instead. Every query keeps at least
    itself, so no row is left empty.
    """

    def before(self, call: Call) -> Call | None:
        seen, text = self.seen(call), self._text
        if seen is None or text is None:
            return None
        hidden, shift = seen[0] & seen[1], call.k.shape[2] - call.q.shape[2]
        if not bool(hidden.any()):
            return None

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ~(text[b, i - shift] & hidden[b, j])

        return call.change(mask=call.mask & Mask.predicate(visible, len(call.q)))

    def after(self, call: Call, state: State) -> State | None:
        return None


def arms(tau: float, rho: float = RHO) -> dict[str, Callable[[], VAR] | None]:
    """What is compared, by name; each makes its method anew."""
    shared: dict[str, Any] = {"tau": tau, "nonsink_ratio": rho}
    return {
        "plain": None,
        "var": lambda: VAR(**shared),
        "random tokens": lambda: VAR(**shared, random_sinks=SEED),
        "all heads": lambda: VAR(**shared, heads="all"),
        "to text": lambda: VAR(**shared, give="text"),
        "knockout": lambda: SinkKnockout(**shared),
        "random knockout": lambda: SinkKnockout(**shared, random_sinks=SEED),
    }


def measure(setup: Setup) -> Measured:
    """Every arm on the same questions; differences are those of the same question."""
    each = 3 if setup.quick else EACH
    given = vqa.items(each, KINDS, seed=SEED, held_out=None)
    size = int(setup.model.config.get_text_config().hidden_size)
    tau = BAR * size**0.5
    dims = _dims(setup, given)
    made: dict[str, Callable[[], Any]] = {"looks": partial(_looks, setup, given, tau, dims)}
    made |= {n: partial(_scores, setup, given, make, dims) for n, make in arms(tau).items()}
    scores = setup.parts("VAR", made)
    looked = scores.pop("looks")
    log = {n: [s["log_probability"] for s in own] for n, own in scores.items()}
    right = {n: mean([s["right"] for s in own]) for n, own in scores.items()}

    def change(a: str, b: str = "plain") -> Paired:
        return paired(log[a], log[b])

    gain, over = change("var"), change("var", "random tokens")
    every, gap = change("all heads"), change("all heads", "var")
    give, probe = change("var", "to text"), change("knockout", "random knockout")
    ratios = looked["ratios"]
    low, high = bootstrap(ratios) if ratios else (0.0, 0.0)
    ratio = mean(ratios) if ratios else 0.0
    kind = "bootstrap over questions"
    accuracy = ", ".join(f"{n} {100 * v:.0f} %" for n, v in right.items())
    values = {"accuracy": right, "by kind": _by_kind(given, scores)}
    claims = [
        CLAIMS[0].settle(
            {"ratio": ratio, "low": low, "layers": looked["layers"], **looked},
            here=f"{ratio:.1f} times; {looked['tokens']:.1f} visual sinks an image and layer, in "
            f"{100 * looked['layers']:.0f} % of the layers",
            control="1 (an average image token)",
            interval=Interval("ratio, bootstrap over images and layers", low, high),
            note=f"tau {tau:.1f}, half of the greatest value that phi can have; dims {dims}",
        ),
        CLAIMS[1].settle(
            {"difference": probe.mean, "low": probe.low, "high": probe.high, **values},
            here=f"{change('knockout').mean:+.3f} nats",
            control=f"random tokens {change('random knockout').mean:+.3f}",
            interval=Interval(f"difference, {kind}", probe.low, probe.high),
            note=f"answers that are right: {accuracy}",
        ),
        CLAIMS[2].settle(
            {"change": gain.mean, "low": gain.low, "high": gain.high, "over": over.mean,
             "over_low": over.low, "over_high": over.high},
            here=f"{gain.mean:+.4f} nats; right answers {100 * right['plain']:.0f} to "
            f"{100 * right['var']:.0f} %",
            control=f"random tokens {change('random tokens').mean:+.4f}",
            interval=Interval(f"change, {kind}", gain.low, gain.high),
        ),
        CLAIMS[3].settle(
            {"change": every.mean, "low": every.low, "high": every.high, "gap": gap.mean,
             "gap_high": gap.high},
            here=f"{every.mean:+.3f} nats; right answers {100 * right['all heads']:.0f} %",
            control=f"image-centric heads {gain.mean:+.4f}",
            interval=Interval(f"change, {kind}", every.low, every.high),
        ),
        CLAIMS[4].settle(
            {"difference": give.mean, "low": give.low, "high": give.high},
            here=f"to the image {gain.mean:+.4f} nats",
            control=f"to the text {change('to text').mean:+.4f}",
            interval=Interval(f"difference, {kind}", give.low, give.high),
        ),
    ]  # fmt: skip
    data = (
        f"{each} questions each of {', '.join(KINDS)} about drawn scenes of two or three things, "
        "half of the existence questions about things that are not there; right answers are read "
        "along with the question. Intervals: bootstrap over questions, differences paired."
    )
    settings = {"each": each, "tau": tau, "dims": dims, "move": 0.6, "nonsink_ratio": RHO,
                "image_mass": 0.2}  # fmt: skip
    shown = picture(setup, given[:: len(given) // SHOWN][:SHOWN], tau, dims)
    seeds = {"scenes": SEED, "controls": SEED, "bootstrap": 0}
    return Measured(claims, data, seeds, settings, (shown, SHOWS))


def picture(setup: Setup, given: Sequence[vqa.Item], tau: float, dims: list[int]) -> Any:
    """Pictures with their sinks, and the attention on them before and after, a question a row."""
    rows = []
    for item in given:
        method = VAR(tau=tau, dims=dims, nonsink_ratio=RHO)
        method.record_last = True
        batch = vqa.read(setup.tokenizer, [item], setup.model.device)
        with torch.no_grad(), api.apply(setup.model, method):
            setup.model(**batch.inputs, use_cache=False)
        found = list(method.found().values())
        at = found[0].image[0].nonzero()[:, 0]
        side = round(len(at) ** 0.5)
        often = torch.stack([f.sinks[0, at] for f in found]).float().mean(0)
        marks = dict.fromkeys((often >= 0.5).nonzero()[:, 0].tolist(), MARK)
        before, after = (
            torch.stack([given[0].mean(0)[at] for given in each.values()]).mean(0).view(side, side)
            for each in (method.last_before, method.last_after)
        )
        span = (0.0, float(torch.maximum(before, after).max()))
        seen, marked = (paint(item.picture, (side, side), m, 192) for m in ({}, marks))
        rows.append([seen, marked, *(laid_over(seen, m.cpu(), span) for m in (before, after))])
    labels = [item.question.removesuffix(" ?") + "?" for item in given]
    return sheet(rows, ["picture", "sinks", "before", "after"], labels)


def _dims(setup: Setup, given: Sequence[vqa.Item]) -> list[int]:
    batch = vqa.read(setup.tokenizer, given[:4], setup.model.device)
    try:
        return find_sink_dims(setup.model, [batch.inputs])
    except InputError:  # a model without massive activation: the first dim stands in
        return [0]


def _scores(
    setup: Setup, given: Sequence[vqa.Item], make: Callable[[], VAR] | None, dims: list[int]
) -> list[dict[str, float]]:
    def method() -> Any:
        assert make is not None
        one = make()
        one.dims = dims
        return api.apply(setup.model, one)

    chosen = None if make is None else method
    return vqa.score(setup.model, setup.tokenizer, given, chosen, batch_size=BATCH)


def _looks(setup: Setup, given: Sequence[vqa.Item], tau: float, dims: list[int]) -> dict[str, Any]:
    """Where visual sinks are and what they get, over a third of the questions."""
    some = list(given)[::3]
    every: list[_Looks] = []

    def method() -> Any:
        every.append(_Looks(tau=tau, dims=dims))
        return api.apply(setup.model, every[-1])

    vqa.score(setup.model, setup.tokenizer, some, method, batch_size=BATCH)
    layers = sorted({n for one in every for n in one.counts})
    counts = {n: sum(one.counts.get(n, 0) for one in every) / len(some) for n in layers}
    ratios = [r for one in every for own in one.ratios.values() for r in own]
    return {
        "layers": sum(c >= 1 for c in counts.values()) / max(1, len(layers)),
        "tokens": sum(counts.values()) / max(1, len(layers)),
        "by layer": {str(n): round(c, 3) for n, c in counts.items()},
        "ratios": ratios,
    }


def _by_kind(
    given: Sequence[vqa.Item], scores: dict[str, list[dict[str, float]]]
) -> dict[str, dict[str, float]]:
    found = {}
    for name, own in scores.items():
        summed = vqa.summary(given, own)
        found[name] = {kind: round(one["right"], 4) for kind, one in summed.items()}
    return found
