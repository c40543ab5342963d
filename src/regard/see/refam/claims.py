"""The claims of "RefAM: Attention Magnets for Zero-Shot Referral Segmentation" (Kukleva, Simsar et
al., 2025), on drawn scenes with true masks.

The small model was taught to look at a thing's words from that thing; large ones come to it by
themselves. So what is claimed of attention as it is can be shown partly at most here. What the
method adds to it is measured as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.lab.intervals import mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.reach import Call, Handler, Session, Site
from regard.reach.denoising import denoising
from regard.report.contact import heat, marked, sheet

from .method import Grounding, RefAM

MODEL = "shapes-dit"
ARMS: dict[str, dict[str, Any]] = {
    "all words": {"stop_words": frozenset(), "magnets": ()},
    "stop-word filter": {"magnets": ()},
    "+ magnets": {},
    "+ GAS": {"gas": "suppress"},
    "+ NP": {"gas": "suppress", "noun_phrase": True},
    "+ SB": {"gas": "suppress", "noun_phrase": True, "spatial_bias": True},
}
BASE = RefAM(gas="off", noun_phrase=False, spatial_bias=False, parser="rules")
SHARE = 0.7  # of every query's attention that the planted key gets
SEED = 0
SHOWN = 6

CLAIMS = (
    Claim(
        "grounding",
        "Attention of a diffusion transformer grounds language without training (point accuracy of "
        "the full method for the thing that is meant, beside that of the same point for the other "
        "things of its scene)",
        "68.9 % of points inside the mask on Ref-DAVIS17, FLUX and Mochi",
        "partly if the thing that is meant is hit more often than the mean other thing, the "
        "interval of the difference above 0, and in at least half of the scenes; never more, for "
        "this model was taught to look at words from their things",
        lambda v: verdict(False, v["low"] > 0 and v["hit"] >= 0.5),
    ),
    Claim(
        "filter",
        "Filtering stop words cleans the map (point accuracy with the filter, less that of all "
        "words of the expression)",
        "qualitative; all parts together: 52.5 % to 68.9 % of points",
        "reproduced if the filter adds 5 points or more and the interval is above 0; partly if the "
        "interval is above 0",
        lambda v: verdict(v["gain"] >= 0.05 and v["low"] > 0, v["low"] > 0),
    ),
    Claim(
        "magnets",
        "Appended stop words sharpen the target (point accuracy with magnets, less that without)",
        "59.8 % of points without magnets, 68.9 % with, all other parts on",
        "reproduced if magnets add accuracy with an interval above 0; partly if they do not lower "
        "it: a gain of 0 or more, the interval not below -5 points",
        lambda v: verdict(v["low"] > 0, v["gain"] >= 0 and v["low"] >= -0.05),
    ),
    Claim(
        "background",
        "Stop words take up attention of the background (share of a word's attention that falls "
        "outside all things, as a share per pixel relative to inside: stop words and magnets, and "
        "content words)",
        "qualitative",
        "partly if more than 60 % of the attention of discarded words would fall on the background "
        "were both areas alike, and more than of content words with an interval above 0; never "
        "more, for this model was taught where content words are looked at",
        lambda v: verdict(False, v["stop"] > 0.6 and v["low"] > 0),
    ),
    Claim(
        "planted",
        "A global attention sink can be found and taken out (a text key at which all queries look "
        "is planted in what is recorded of the deep layers; the map without it against the "
        "unplanted map without that key)",
        "sinks are absent in early layers and can be suppressed without harm",
        "reproduced if the planted key, and no other, is found in every planted layer, and the map "
        "returns within 1e-3; partly if it is found in every planted layer",
        lambda v: verdict(
            v["found"] == 1 and v["false"] == 0 and v["distance"] <= 1e-3, v["found"] == 1
        ),
    ),
    Claim(
        "real-sinks",
        "Deep layers of large models have global attention sinks of their own",
        "layers 20 to 47 of the 48 of Mochi",
        "needs a large model; what this one has is among the planted claim's numbers",
        command='regard run refam "the man in the red hat" --image street.jpg --model '
        "black-forest-labs/FLUX.1-dev --json sinks.json",
    ),
    Claim(
        "benchmarks",
        "Best zero-shot results on referring segmentation",
        "oIoU 46.9 / 52.3 / 43.9 on RefCOCO val / testA / testB; J&F 57.6 on Ref-DAVIS17",
        "needs FLUX or Mochi, SAM, and the benchmarks",
        command='regard run refam "the man in the red hat" --image street.jpg --model '
        "black-forest-labs/FLUX.1-dev --segmenter sam --mask mask.png",
    ),
)


@dataclass(frozen=True)
class Referred:
    """One drawn scene and an expression for one of its things."""

    text: str
    image: Any
    masks: Tensor  # [things, side, side]
    meant: int


def referred(number: int) -> Referred:
    """A scene of 3 or 4 things, no two alike, and an expression: by its name alone, with its place,
    or with where it stands to another, each as often where it can be said.

    >>> referred(0).text.startswith("the ")
    True
    """
    from PIL import Image

    from regard.zoo.scenes import relation_of, scene

    drawn = scene(number, things=(3, 4))
    meant = number % len(drawn.things)
    thing, other = drawn.things[meant], drawn.things[meant - 1]
    text = f"the {thing.color} {thing.shape}"
    relation = relation_of(thing, other)
    across, along = thing.x - 0.5, thing.y - 0.5
    if number % 3 == 1 and max(abs(across), abs(along)) > 0.12:
        if abs(across) > abs(along):
            text += " on the right" if across > 0 else " on the left"
        else:
            text += " at the bottom" if along > 0 else " at the top"
    elif number % 3 == 2 and relation is not None:
        text += f" {relation} the {other.color} {other.shape}"
    masks = torch.from_numpy(drawn.masks(64))
    return Referred(text, Image.fromarray(drawn.draw(64)), masks, meant)


def measure(setup: Setup) -> Measured:
    """Ground every expression under every arm, then the planted sink."""
    pipe = setup.model
    count, planted = (9, 2) if setup.quick else (300, 12)
    scenes = {f"scene {n}": partial(_scene, pipe, referred(n)) for n in range(count)}
    found = list(setup.parts("RefAM, scenes", scenes).values())
    planting = {f"sink {n}": partial(_planted, pipe, referred(n)) for n in range(planted)}
    sinks = list(setup.parts("RefAM, planted sinks", planting).values())
    picture = _picture(pipe, [referred(n) for n in range(min(count, SHOWN))])
    claims = {c.key: c for c in CLAIMS}
    return Measured(
        [
            _grounding(claims["grounding"], found),
            _gain(claims["filter"], found, "stop-word filter", "all words"),
            _gain(claims["magnets"], found, "+ magnets", "stop-word filter"),
            _background(claims["background"], found),
            _sink(claims["planted"], sinks),
        ],
        data=f"{count} drawn scenes of 3 or 4 things, 64 x 64 pixels, one expression each",
        seeds={"noise": SEED, "bootstrap": SEED},
        settings={
            "noise": BASE.noise,
            "draws": BASE.draws,
            "kappa": BASE.kappa,
            "gamma": BASE.gamma,
            "magnets": list(BASE.magnets),
            "share of the planted sink": SHARE,
        },
        picture=picture,
    )


def _scene(pipe: Any, one: Referred) -> dict[str, Any]:
    """Point and overlap under every arm; how the words of the fullest text spread."""
    arms: dict[str, Any] = {}
    for name, changed in ARMS.items():
        got = replace(BASE, **changed).ground(pipe, one.image, one.text)
        x, y = got.point
        hits = one.masks[:, y, x].float().tolist()
        meant = one.masks[one.meant]
        arms[name] = {
            "hit": hits[one.meant],
            "other": (sum(hits) - hits[one.meant]) / (len(hits) - 1),
            "inter": int((got.mask & meant).sum()),
            "union": int((got.mask | meant).sum()),
        }
        if name == "+ magnets":
            arms["spread"] = _spread(got, one)
            arms["padding"] = got.padding
    return arms


def _picture(pipe: Any, some: Sequence[Referred]) -> tuple[Any, str]:
    """The first expressions, one a row, with the maps of the plain arm and of the full method."""
    from PIL import Image

    plain, *_, full = ARMS
    rows = []
    for one in some:
        got = {n: replace(BASE, **ARMS[n]).ground(pipe, one.image, one.text) for n in (plain, full)}
        rows.append(
            [
                one.image,
                *(heat(got[n].heat, one.image.size) for n in (plain, full)),
                marked(Image.fromarray(got[full].mask.numpy()), got[full].point),
                Image.fromarray(one.masks[one.meant].numpy()),
            ]
        )
    columns = ["image", plain, "RefAM", "its mask, point", "true mask"]
    says = (
        "One expression a row: the image, the map of all its words, that of RefAM "
        f"({full.removeprefix('+ ')} and all before it), both dark where the words get most, "
        "RefAM's mask with its point in red, and the true mask."
    )
    return sheet(rows, columns, [one.text for one in some]), says


def _spread(got: Grounding, one: Referred) -> dict[str, float]:
    """Share of attention outside all things, both areas weighed alike."""
    inside = one.masks.any(0).float()
    inside = torch.nn.functional.adaptive_avg_pool2d(
        inside[None], (got.heat.shape[0], got.heat.shape[1])
    )[0]

    def share(maps: Sequence[Tensor]) -> float:
        total = torch.stack(list(maps)).sum(0).double()
        on = float((total * inside).sum() / inside.sum())
        off = float((total * (1 - inside)).sum() / (1 - inside).sum())
        return off / (on + off)

    chosen = [m for w, m in got.words if w in got.content and w not in BASE.magnets]
    dropped = [m for w, m in got.words if w not in got.content or w in BASE.magnets]
    return {"content": share(chosen), "stop": share(dropped)}


class Plant(Handler):
    """One text key gets the same share of every query's attention: in what is recorded of the deep
    layers, not in what the model computes. One more feature, `lse_i` and so much more on query i,
    carries the score.
    """

    def __init__(self, column: int, share: float = SHARE) -> None:
        self.column, self.share = column, share
        self._call: Call | None = None

    def sites(self, sites: list[Site]) -> list[Site]:
        joint = [s for s in sites if s.kind == "joint"]
        return joint[int(0.4 * len(joint)) :]

    def before(self, call: Call) -> Call:
        place = denoising(call)
        assert place.text is not None
        at = place.text.start + self.column
        others = [n for n in range(call.k.shape[2]) if n != at]
        rest = call.change(k=call.k[:, :, others], v=call.v[:, :, others]).attend().lse
        self._call = call
        # no share at all: far below, but finite
        more = math.log(self.share / (1 - self.share)) if self.share else -1e3
        q, k, v = (_wider(x) for x in (call.q, call.k, call.v))
        q[..., -1] = (rest + more).to(q)
        k[:, :, at] = 0
        k[:, :, at, -1] = 1 / call.scale
        return call.change(q=q, k=k, v=v)

    def after(self, call: Call, state: State) -> State:
        assert self._call is not None
        return self._call.attend()


def _wider(x: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros_like(x[..., :1])], -1)


def _planted(pipe: Any, one: Referred) -> dict[str, Any]:
    """Is the key found, is another, and does the map return?"""
    plain = replace(BASE, gas="suppress").ground(pipe, one.image, one.text)
    wanted = "to"  # a magnet: no content word is lost with it
    columns = [s.column for s in plain.sinks if s.word == wanted]
    column = columns[-1]
    method = replace(BASE, gas="suppress")
    with Session(pipe, [Plant(column)]):
        got = method.ground(pipe, one.image, one.text)
    with Session(pipe, [Plant(column, 0.0)]):
        bare = replace(BASE, gas="off").ground(pipe, one.image, one.text)
    own = [s for s in got.sinks if s.column == column]
    return {
        "found": sum(s.sink for s in own) / len(own),
        "false": sum(s.sink for s in got.sinks if s.column != column),
        "distance": float((got.heat - bare.heat).abs().max()),
        "own": sum(s.sink for s in plain.sinks),
        "ratio": max(s.ratio for s in plain.sinks),
        "spread": min(s.spread for s in plain.sinks),
    }


def _iou(found: list[dict[str, Any]], arm: str) -> tuple[float, float]:
    """Overall and mean overlap."""
    inter, union = ([f[arm][k] for f in found] for k in ("inter", "union"))
    return sum(inter) / max(1, sum(union)), mean([i / max(1, u) for i, u in zip(inter, union)])


def _hits(found: list[dict[str, Any]], arm: str, which: str = "hit") -> list[float]:
    return [f[arm][which] for f in found]


def _grounding(claim: Claim, found: list[dict[str, Any]]) -> Claim:
    full = list(ARMS)[-1]
    _, low, high, _ = paired(_hits(found, full), _hits(found, full, "other"), seed=SEED)
    values: dict[str, Any] = {"hit": mean(_hits(found, full)), "low": low, "high": high}
    values["other"] = mean(_hits(found, full, "other"))
    for arm in ARMS:
        overall, each = _iou(found, arm)
        values |= {f"hit, {arm}": mean(_hits(found, arm)), f"oIoU, {arm}": overall}
        values[f"IoU, {arm}"] = each
    arms = "; ".join(
        f"{arm} {100 * values[f'hit, {arm}']:.1f} % / {values[f'oIoU, {arm}']:.3f}" for arm in ARMS
    )
    return claim.settle(
        values,
        here=f"{100 * values['hit']:.1f} % of points inside (point accuracy / oIoU: {arms})",
        control=f"{100 * values['other']:.1f} % inside another thing",
        interval=Interval("bootstrap over scenes", low, high),
    )


def _gain(claim: Claim, found: list[dict[str, Any]], arm: str, against: str) -> Claim:
    a, b = _hits(found, arm), _hits(found, against)
    gain, low, high, _ = paired(a, b, seed=SEED)
    values = {"gain": gain, "low": low, "high": high, "with": mean(a), "without": mean(b)}
    return claim.settle(
        values,
        here=f"{100 * values['with']:.1f} % of points inside",
        control=f"{100 * values['without']:.1f} % ({against})",
        interval=Interval("bootstrap over scenes", low, high),
    )


def _background(claim: Claim, found: list[dict[str, Any]]) -> Claim:
    stop = [f["spread"]["stop"] for f in found]
    content = [f["spread"]["content"] for f in found]
    _, low, high, _ = paired(stop, content, seed=SEED)
    values = {"stop": mean(stop), "content": mean(content), "low": low, "high": high}
    values["padding"] = mean([f["padding"] for f in found])
    return claim.settle(
        values,
        here=f"{100 * values['stop']:.1f} % of the discarded words' attention",
        control=f"{100 * values['content']:.1f} % of the content words'",
        interval=Interval("bootstrap over scenes", low, high),
        note=f"padding has {100 * values['padding']:.1f} % of the attention to text",
    )


def _sink(claim: Claim, sinks: list[dict[str, Any]]) -> Claim:
    values = {
        "found": min(s["found"] for s in sinks),
        "false": max(s["false"] for s in sinks),
        "distance": max(s["distance"] for s in sinks),
        "own": sum(s["own"] for s in sinks),
        "ratio": max(s["ratio"] for s in sinks),
        "spread": min(s["spread"] for s in sinks),
    }
    return claim.settle(
        values,
        here=f"found in {100 * values['found']:.0f} % of the planted layers, {values['false']} "
        f"others; the map returns within {values['distance']:.1e}",
        control=f"unplanted: {values['own']} sinks, at most {values['ratio']:.1f} times the "
        "median token's attention",
    )
