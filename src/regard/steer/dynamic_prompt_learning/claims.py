"""The claims of "Dynamic Prompt Learning" (Wang et al., 2023), on drawn scenes with exact masks.

Scenes of two things of one colour, so that each distracts from the other; the edit gives one of
them another colour. The paper's photographs, CLIP scores and structure distance need large models:
here a judge of drawn scenes and the exact masks take their place.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy
import torch
from torch import Tensor

from regard.errors import InputError
from regard.lab.intervals import mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.lab.trials.scenes import read
from regard.zoo.scenes import COLORS, Scene, scene

from .card import BACKGROUND, BALANCE, DISJOINT, Term
from .editing import edit
from .learned import Learned
from .method import DynamicPromptLearning

MODEL = "shapes-sd"
FIRST = 20_000  # number of the first scene: training draws others
GUIDANCE = 4.0  # that with which this model is judged
THRESHOLDS = tuple(n / 40 for n in range(1, 40))
MOVED = 0.3  # share of a thing's pixels that its new colour covers at least
HUES = tuple(c for c in COLORS if c != "orange")  # it alone would need another article
OFF = Term(0.0, 25, 0.3)
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"inner_steps": 0},
    "full": {},
    "balance": {"disjoint": OFF, "background": OFF},
    "disjoint": {"balance": OFF, "background": OFF},
    "background": {"balance": OFF, "disjoint": OFF},
}
EDITED = ("plain", "full")

_BIG = (
    "regard run dynamic-prompt-learning --model CompVis/stable-diffusion-v1-4 --image cat-dog.png "
    '--caption "a cat and a dog" --edit "cat -> leopard" --steps 50 --inner-steps 21 '
    "--null-steps 51 --no-warm-start"
)
CLAIMS = (
    Claim(
        "leakage",
        "Learnt nouns leak less: their maps overlap less with each other and with the background",
        "shown as the cause; no figure",
        "reproduced if the cosine between the nouns and that with the true background both fall "
        "against plain null-text inversion, the intervals below 0; partly if one of them",
        lambda v: verdict(
            max(v["pairs_high"], v["ground_high"]) < 0, min(v["pairs_high"], v["ground_high"]) < 0
        ),
    ),
    Claim(
        "localisation",
        "The map of each noun lies on its thing (overlap with the exact mask, intersection over "
        "union, at the best of 39 thresholds for each arm)",
        "highest curve of all losses together (figure, no table)",
        "reproduced if the overlap rises by 5 points or more over plain null-text inversion, the "
        "interval above 0; partly if the interval is above 0",
        lambda v: verdict(v["gain"] >= 0.05 and v["low"] > 0, v["low"] > 0),
    ),
    Claim(
        "together",
        "All three losses together are best",
        "as in the figure (third-party summary)",
        "reproduced if the overlap with all three is at least that of each loss alone; partly if "
        "that of two of them",
        lambda v: verdict(v["beaten"] == 3, v["beaten"] == 2),
    ),
    Claim(
        "alone",
        "The balancing loss alone already helps, the disjoint or the background loss alone do not",
        "as in the figure (third-party summary)",
        "reproduced if the overlap rises with balancing alone, the interval above 0, and with "
        "neither of the others; partly if it rises with balancing alone",
        lambda v: verdict(
            v["balance_low"] > 0 and max(v["disjoint_low"], v["background_low"]) <= 0,
            v["balance_low"] > 0,
        ),
    ),
    Claim(
        "local",
        "Edits stay local (mean change of a pixel outside the edited thing's exact mask, edit "
        "against the source sampled beside it)",
        "structure distance .0312 against .0800 (third-party summary)",
        "reproduced if the change outside falls by 25 % or more against the same edit after plain "
        "null-text inversion, the interval of the difference below 0; partly if the interval is "
        "below 0",
        lambda v: verdict(v["fall"] >= 0.25 and v["high"] < 0, v["high"] < 0),
    ),
    Claim(
        "success",
        "Edits do what was asked (the judge sees the new colour on the thing that was named, and "
        "the other thing in its old one)",
        "CLIP score 32.23 against 31.50 (third-party summary)",
        "reproduced if the share rises against the same edit after plain null-text inversion, the "
        "interval above 0; partly if it rises",
        lambda v: verdict(v["low"] > 0, v["gain"] > 0),
    ),
    Claim(
        "users",
        "People prefer the edits, on photographs of several things",
        "87.2 % prefer them to null-text inversion (third-party summary)",
        "needs Stable Diffusion 1.4, photographs and people",
        command=_BIG,
    ),
)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    scenes: int = 10
    steps: int = 15
    inner: int = 10
    null: int = 10


def measure(setup: Setup) -> Measured:
    """Every scene with every arm; edits after plain and after full learning."""
    size = Size(2, 3, 2, 2) if setup.quick else Size()
    if not hasattr(setup.model, "unet"):
        raise InputError("these claims need a Stable Diffusion pipeline: name one, or shapes-sd")
    side = setup.model.unet.config.sample_size * setup.model.vae_scale_factor
    numbers = range(FIRST, FIRST + size.scenes)
    made = {str(n): partial(_one, setup.model, _scene(n), side, size) for n in numbers}
    parts = list(setup.parts("Dynamic Prompt Learning", made).values())
    return Measured(
        claims=_settle(parts).values(),
        data=(
            f"{size.scenes} drawn scenes of two things of one colour, {side} pixels, with their "
            "exact masks; the judge reads colours and outlines of images. Maps: average over the "
            f"{size.steps} steps, where the sampler stood, of the largest cross-attention grid. "
            "Intervals: bootstrap over scenes, differences paired."
        ),
        seeds={"first scene": FIRST, "k-means": 0, "bootstrap": 0},
        settings={
            "steps": size.steps,
            "updates of nouns": size.inner,
            "updates of the empty prompt": size.null,
            "warm start": True,
            "guidance": GUIDANCE,
            "losses (weight, alpha, beta)": {
                name: [t.weight, t.alpha, t.beta]
                for name, t in zip(
                    ("balance", "disjoint", "background"), (BALANCE, DISJOINT, BACKGROUND)
                )
            },
        },
        picture=_picture(parts[:4]),
    )


def _scene(number: int) -> Scene:
    """Two things of the same colour and of different shape."""
    return scene(number, things=(2,), held_out=None, colors=[HUES[number % len(HUES)]])


def recolored(drawn: Scene) -> tuple[str, str, tuple[str, str], str]:
    """Caption, edited caption, the edited words on both sides, and the new colour.

    >>> recolored(_scene(FIRST))[2]
    ('red cross', 'green cross')
    """
    thing = drawn.things[1]
    new = HUES[(HUES.index(thing.color) + 1) % len(HUES)]
    words = f"{thing.color} {thing.shape}", f"{new} {thing.shape}"
    caption = drawn.caption()
    return caption, caption.replace(*words), words, new


def _one(pipe: Any, drawn: Scene, side: int, size: Size) -> dict[str, Any]:
    """What one scene gave in each arm, as plain numbers."""
    from PIL import Image

    picture = Image.fromarray(drawn.draw(side))
    caption, target, words, new = recolored(drawn)
    nouns = [t.shape for t in drawn.things]
    base = DynamicPromptLearning(
        nouns,
        inner_steps=size.inner,
        null_steps=size.null,
        steps=size.steps,
        guidance=GUIDANCE,
        warm_start=True,
    )
    arms: dict[str, Any] = {}
    shots = [picture]
    for name, changes in ARMS.items():
        learned = replace(base, **changes).learn(pipe, picture, caption)
        arms[name] = _maps(learned, drawn)
        if name in EDITED:
            made = edit(pipe, learned, target, local=words)
            arms[name] |= _edit(picture, made.source, made.image, drawn.masks(side), new, drawn)
            shots += [made.source, made.image]
    return {"caption": caption, "target": target, "arms": arms, "shots": [*map(_text, shots)]}


def _maps(learned: Learned, drawn: Scene) -> dict[str, Any]:
    """Overlap of each threshold with the exact masks, and the two cosines."""
    from torch.nn.functional import cosine_similarity

    maps = learned.maps.float().cpu()
    masks = _shrunk(drawn, maps.shape[-2:])
    flat = maps.flatten(1)
    ground = (~masks.any(0)).float().flatten()
    return {
        "overlap": overlaps(maps, masks),
        "pairs": float(cosine_similarity(flat[0], flat[1], dim=0)),
        "ground": float(cosine_similarity(flat, ground[None], dim=1).mean()),
        "updates": sum(x["updates"] for x in learned.losses),
    }


def _shrunk(drawn: Scene, grid: Sequence[int]) -> Tensor:
    """The exact masks on the grid of the maps."""
    return (
        torch.from_numpy(drawn.masks(max(16, *grid)))
        .float()[:, :: max(1, 16 // grid[0]), :: max(1, 16 // grid[1])]
        .bool()
    )


def overlaps(maps: Tensor, masks: Tensor) -> list[float]:
    """Intersection over union of map / maximum above each threshold with the masks, their mean.

    >>> overlaps(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[True, False]]]))[0]
    1.0
    """
    shares = maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-12)
    found = []
    for threshold in THRESHOLDS:
        inside = shares > threshold
        both, either = (inside & masks).sum((1, 2)), (inside | masks).sum((1, 2))
        found.append(float((both / either.clamp_min(1)).mean()))
    return found


def _edit(
    picture: Any, source: Any, image: Any, masks: numpy.ndarray, new: str, drawn: Scene
) -> dict[str, float]:
    """How far an edit reached, and whether it did what was asked."""
    own, one, two = (
        numpy.asarray(x.convert("RGB"), dtype=float) / 255 for x in (picture, source, image)
    )
    outside = ~masks[1]
    found = read(image)[1]

    def covered(color: str, mask: numpy.ndarray) -> float:
        seen = [f.mask for f in found if f.color == color]
        return float(numpy.any(seen, 0)[mask].mean()) if seen else 0.0

    return {
        "outside": float(abs(one - two)[outside].mean()),
        "inside": float(abs(one - two)[masks[1]].mean()),
        "again": float(abs(one - own).mean()),
        "done": float(
            covered(new, masks[1]) >= MOVED and covered(drawn.things[0].color, masks[0]) >= MOVED
        ),
    }


def _text(image: Any) -> str:
    kept = io.BytesIO()
    image.save(kept, format="PNG")
    return base64.b64encode(kept.getvalue()).decode()


def _picture(parts: list[dict[str, Any]]) -> tuple[Any, str]:
    """The first scenes as a contact sheet."""
    from PIL import Image

    from regard.report.contact import sheet

    rows = [[Image.open(io.BytesIO(base64.b64decode(s))) for s in p["shots"]] for p in parts]
    columns = ("scene", "plain: source", "plain: edit", "learnt: source", "learnt: edit")
    said = "; ".join(f"{n + 1}: {p['target']!r}" for n, p in enumerate(parts))
    return (
        sheet(rows, columns, [str(n + 1) for n in range(len(rows))]),
        f"The first scenes, sampled again and edited, without and with learnt nouns. {said}.",
    )


def _settle(parts: list[dict[str, Any]]) -> dict[str, Claim]:
    stated = {c.key: c for c in CLAIMS}

    def of(arm: str, name: str) -> list[float]:
        return [p["arms"][arm][name] for p in parts]

    curves = {arm: numpy.asarray(of(arm, "overlap")) for arm in ARMS}
    best = {arm: int(curve.mean(0).argmax()) for arm, curve in curves.items()}
    at = {arm: [float(x) for x in curves[arm][:, best[arm]]] for arm in ARMS}
    overlap = {arm: mean(values) for arm, values in at.items()}
    gains = {arm: paired(at[arm], at["plain"]) for arm in ARMS if arm != "plain"}
    table = {
        arm: {
            "overlap": overlap[arm],
            "threshold": THRESHOLDS[best[arm]],
            "overlap at 0.3": float(curves[arm].mean(0)[THRESHOLDS.index(0.3)]),
            "pairs": mean(of(arm, "pairs")),
            "ground": mean(of(arm, "ground")),
            "updates": mean(of(arm, "updates")),
        }
        for arm in ARMS
    }
    made = {}
    pairs, ground = (paired(of("full", n), of("plain", n)) for n in ("pairs", "ground"))
    made["leakage"] = stated["leakage"].settle(
        {
            "pairs": pairs.mean,
            "pairs_high": pairs.high,
            "ground": ground.mean,
            "ground_high": ground.high,
            "arms": table,
        },
        here=f"nouns {table['full']['pairs']:.3f}, background {table['full']['ground']:.3f}",
        control=f"plain {table['plain']['pairs']:.3f}, {table['plain']['ground']:.3f}",
        interval=Interval("change of the cosine of nouns, bootstrap", pairs.low, pairs.high),
        note=f"change with the background {ground.mean:+.3f}: {ground.low:+.3f} to "
        f"{ground.high:+.3f}",
    )
    gain, low, high, _ = gains["full"]
    made["localisation"] = stated["localisation"].settle(
        {"gain": gain, "low": low, "high": high, "overlap": overlap},
        here=f"{overlap['full']:.3f}",
        control=f"plain {overlap['plain']:.3f}",
        interval=Interval("gain, bootstrap", low, high),
        note="at the fixed threshold 0.3: "
        f"{table['full']['overlap at 0.3']:.3f} against {table['plain']['overlap at 0.3']:.3f}",
    )
    singles = [a for a in ARMS if a not in EDITED]
    alone = ", ".join(f"{a} {overlap[a]:.3f}" for a in singles)
    made["together"] = stated["together"].settle(
        {"beaten": sum(overlap["full"] >= overlap[a] for a in singles), **overlap},
        here=f"{overlap['full']:.3f}",
        control=alone,
    )
    made["alone"] = stated["alone"].settle(
        {f"{a}_low": gains[a].low for a in singles} | {a: gains[a].mean for a in singles},
        here=f"balance {gains['balance'].mean:+.3f}",
        control=f"disjoint {gains['disjoint'].mean:+.3f}, background "
        f"{gains['background'].mean:+.3f}",
        interval=Interval("gain of balance, bootstrap", *gains["balance"][1:3]),
    )
    before, after = mean(of("plain", "outside")), mean(of("full", "outside"))
    change, low, high, _ = paired(of("full", "outside"), of("plain", "outside"))
    again = {arm: mean(of(arm, "again")) for arm in EDITED}
    made["local"] = stated["local"].settle(
        {
            "fall": -change / before if before else 0.0,
            "low": low,
            "high": high,
            "before": before,
            "after": after,
            "inside": {arm: mean(of(arm, "inside")) for arm in EDITED},
            "again": again,
        },
        here=f"{after:.4f} of 1",
        control=f"plain {before:.4f}",
        interval=Interval("change, bootstrap", low, high),
        note=f"source against the scene: {again['full']:.4f} learnt, {again['plain']:.4f} plain",
    )
    gain, low, high, _ = paired(of("full", "done"), of("plain", "done"))
    made["success"] = stated["success"].settle(
        {"gain": gain, "low": low, "high": high},
        here=f"{100 * mean(of('full', 'done')):.0f} %",
        control=f"plain {100 * mean(of('plain', 'done')):.0f} %",
        interval=Interval("gain, bootstrap", low, high),
    )
    return made
