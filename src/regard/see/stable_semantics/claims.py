"""The claims of "StableSemantics: A Synthetic Language-Vision Dataset of Semantic Representations
in Naturalistic Images" (Zawar et al., 2024), where true masks can be read off the images.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import State
from regard.lab.intervals import bootstrap, mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.lab.trials.scenes import Found, read
from regard.parts.text.expressions import words
from regard.reach import Call, Session
from regard.reach.denoising import denoising
from regard.report.contact import heat, sheet
from regard.zoo.scenes import Scene, scene

from .build import build, load
from .method import ChunkMaps, Recipe
from .prompts import Prompt, chunks, seed_of
from .stats import TAUS, binarised, iou

MODEL = "shapes-sd"
STEPS, GUIDANCE = 15, 4.0
GRID = 64
SEED = 0
KINDS = ("average", "finest", "last", "centre")
SHOWN = 6
ROUNDS = 5  # of drawing with and without maps, for what they cost

CLAIMS = (
    Claim(
        "maps",
        "Maps of noun chunks show where in the image the chunk is (area under the curve of the map "
        "against the pixels of the chunk's colour, as the judge of drawn scenes reads them off the "
        "image that was made)",
        "not measured: the paper has no true masks",
        "reproduced if the mean is .85 or more and above that of the last step alone, the interval "
        "of the difference above 0; partly if it is above a centre prior, the interval of that "
        "difference above 0",
        lambda v: verdict(v["average"] >= 0.85 and v["last_low"] > 0, v["centre_low"] > 0),
    ),
    Claim(
        "places",
        "Objects lie where captions put them (the caption says that the first thing is left of, "
        "right of, above or below the second: share of images in which the centroids of their maps "
        "stand so)",
        "qualitative: average maps of roots follow their usual place",
        "reproduced if more than 80 % do, the interval above 50 %; partly if the interval is above "
        "50 %",
        lambda v: verdict(v["share"] > 0.8 and v["low"] > 0.5, v["low"] > 0.5),
    ),
    Claim(
        "seeds",
        "A chunk is drawn alike from seed to seed (mean cosine of its centred maps over the seeds "
        "of its caption, and with the maps of another caption's chunk)",
        "qualitative: ten generations of each caption",
        "reproduced if maps of one chunk are more alike over seeds than those of different "
        "captions, the interval of the difference above 0",
        lambda v: verdict(v["low"] > 0),
    ),
    Claim(
        "chunks",
        "Captions are cut into their noun chunks (share of the phrases of a drawn scene's caption "
        "that are found exactly, and of what is found that is one)",
        "10 million maps of 224 thousand captions",
        "reproduced if the F1 of the parser is .95 or more; partly at .8",
        lambda v: verdict(v["f1"] >= 0.95, v["f1"] >= 0.8),
    ),
    Claim(
        "builder",
        "Every image has its maps (rows and maps of a small build as announced; a build that was "
        "stopped in the middle ends with the same bytes; rows come back as they were made)",
        "2 million images, 10 million maps",
        "reproduced if all three hold",
        lambda v: verdict(v["counts"] == 1 and v["resumed"] == 1 and v["reloaded"] == 1),
    ),
    Claim(
        "scale",
        "224 thousand curated prompts, over 2 million images, 10 million maps; leader boards of "
        "captioning and open-vocabulary segmentation",
        "224 K, 2 M, 10 M",
        "needs SDXL-Lightning, curated prompts and GPUs",
        command="regard build stable-semantics --model stabilityai/stable-diffusion-xl-base-1.0 "
        "--prompts prompts.jsonl --out dataset --images-per-prompt 10 --ray auto",
    ),
)


class Last(ChunkMaps):
    """The maps of the last step alone."""

    def after(self, call: Call, state: State) -> None:
        if denoising(call).step == STEPS - 1:
            super().after(call, state)


def measure(setup: Setup) -> Measured:
    """Draw captions with relations, score their maps, and build a small set twice."""
    pipe = setup.model
    count, images = (3, 2) if setup.quick else (100, 5)
    wanted = scenes(count)
    made: dict[str, Callable[[], Any]] = {
        f"caption {n}": partial(_caption, pipe, one, images) for n, one in enumerate(wanted)
    }
    made["build"] = partial(_built, pipe, wanted[:3])
    made["time"] = partial(_longer, pipe, wanted[0], images)
    *found, built, taken = setup.parts("StableSemantics", made).values()
    picture = _picture(pipe, wanted[:SHOWN], images)
    claims = {c.key: c for c in CLAIMS}
    return Measured(
        [
            _maps(claims["maps"], found),
            _places(claims["places"], found),
            _seeds(claims["seeds"], found),
            _chunks(claims["chunks"]),
            claims["builder"].settle(
                built,
                here=f"{built['rows']} rows, {built['maps']} maps; resumed byte for byte: "
                f"{'yes' if built['resumed'] else 'no'}; reloaded: "
                f"{'yes' if built['reloaded'] else 'no'}",
                control=f"{built['rows wanted']} rows, {built['maps wanted']} maps announced",
                note=f"images with their maps take {sorted(taken)[ROUNDS // 2]:.2f} times as long "
                f"as without ({min(taken):.2f} to {max(taken):.2f}, {ROUNDS} rounds by turns)",
            ),
        ],
        data=f"{count} captions of two drawn things with their relation, {images} images each",
        seeds={"images": SEED, "bootstrap": SEED},
        settings={
            "steps": STEPS,
            "guidance": GUIDANCE,
            "grid": GRID,
            "parser": "rules",
        },
        picture=picture,
    )


def scenes(count: int) -> list[Scene]:
    """Scenes of two things of different colours whose caption says where.

    >>> all(s.relation for s in scenes(3))
    True
    """
    found: list[Scene] = []
    number = 0
    while len(found) < count:
        one = scene(number, things=(2,), relations=1.0)
        if one.relation is not None and one.things[0].color != one.things[1].color:
            found.append(one)
        number += 1
    return found


def _spans(one: Scene) -> list[list[tuple[int, int]]]:
    """For each thing of a scene the words of its chunk, by the characters of the caption."""
    phrases = [c for c in chunks(one.caption(), "rules") if c.root != "background"]
    found = [next(c for c in phrases if t.color in c.text) for t in one.things]
    return [
        [(c.start + w.start, c.start + w.end) for w in words(c.text)
         if w.content and w.text not in ("left", "right")]
        for c in found
    ]  # fmt: skip


def _drawn(pipe: Any, caption: str, images: int, *seen: ChunkMaps) -> list[Any]:
    """So many images of a caption, from its own seeds, with these watching."""
    noise = [torch.Generator().manual_seed(seed_of(caption, n, SEED)) for n in range(images)]
    with Session(pipe, list(seen)), torch.no_grad():
        made: list[Any] = pipe(
            [caption] * images,
            generator=noise,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        ).images
    return made


def _of_color(things: Sequence[Found], color: str) -> Any:
    """What the judge sees of a colour, boolean `[height, width]`; None where it sees none."""
    own = [t.mask for t in things if t.color == color]
    return np.logical_or.reduce(own) if own else None


def _caption(pipe: Any, one: Scene, images: int) -> list[dict[str, Any]]:
    """For every image: areas under the curve, best overlap, centroids and small maps."""
    caption, spans = one.caption(), _spans(one)
    recipe = Recipe(grid=GRID, parser="rules")
    seen = {
        "average": ChunkMaps(spans, recipe),
        "finest": ChunkMaps(spans, Recipe(grid=GRID, parser="rules", finest=True)),
        "last": Last(spans, recipe),
    }
    made = _drawn(pipe, caption, images, *seen.values())
    maps = {name: handler.maps() for name, handler in seen.items()}
    height, width = maps["average"].shape[-2:]
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    maps["centre"] = -torch.hypot(x, y).expand_as(maps["average"])
    out = []
    for n, image in enumerate(made):
        things = read(image)[1]
        row: dict[str, Any] = {"auc": [], "iou": [], "relation": one.relation}
        for at, thing in enumerate(one.things):
            own = _of_color(things, thing.color)
            if own is not None:
                mask = torch.from_numpy(own)[None, None].float()
                mask = F.interpolate(mask, (height, width))[0, 0] > 0.5
                row["auc"].append({k: auc(maps[k][n, at], mask) for k in KINDS})
                row["iou"].append([iou(binarised(maps["average"][n, at], t), mask) for t in TAUS])
        small = F.adaptive_avg_pool2d(maps["average"][n], 8).flatten(1)
        row["small"] = [[float(f"{v:.5g}") for v in m] for m in small.tolist()]
        row["centroids"] = [_centroid(maps["average"][n, at]) for at in range(2)]
        out.append(row)
    return out


def _picture(pipe: Any, some: Sequence[Scene], images: int) -> tuple[Any, str]:
    """The first image of each caption, with the maps of its chunks and the judge's masks."""
    from PIL import Image

    rows = []
    for one in some:
        seen = ChunkMaps(_spans(one), Recipe(grid=GRID, parser="rules"))
        image = _drawn(pipe, one.caption(), images, seen)[0]
        things, nothing = read(image)[1], np.zeros((image.height, image.width), bool)
        row = [image]
        for thing, values in zip(one.things, seen.maps()[0]):
            own = _of_color(things, thing.color)
            shown = Image.fromarray(nothing if own is None else own)
            row += [heat(values, image.size), shown]
        rows.append(row)
    columns = ["image", "first chunk", "its colour", "second chunk", "its colour"]
    says = (
        "One caption a row, the first of its images: each noun chunk's map, dark where it is "
        "greatest, beside what the judge sees of the chunk's colour in that image, all black where "
        "it sees none."
    )
    return sheet(rows, columns, [_phrase(one) for one in some]), says


def _phrase(one: Scene) -> str:
    """A caption without its background."""
    return one.caption().split(" on a ")[0]


def _centroid(values: Tensor) -> list[float]:
    share = (values - values.min()).double()
    share = share / share.sum().clamp_min(1e-12)
    across, along = (torch.arange(n, dtype=torch.double) / n for n in values.shape[::-1])
    return [float(share.sum(0) @ across), float(share.sum(1) @ along)]


def auc(values: Tensor, mask: Tensor) -> float:
    """Chance that a pixel inside has a higher value than one outside; half where they are equal.

    >>> auc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True]))
    1.0
    """
    flat, inside = values.flatten().double(), mask.flatten()
    _, place, many = flat.unique(return_inverse=True, return_counts=True)
    rank = (many.cumsum(0) - (many - 1) / 2)[place]
    n, m = int(inside.sum()), int((~inside).sum())
    return float((rank[inside].sum() - n * (n + 1) / 2) / (n * m)) if n and m else 0.5


def _maps(claim: Claim, found: list[list[dict[str, Any]]]) -> Claim:
    """Means over captions, so that images of one caption count as one."""
    rows = [[a for image in caption for a in image["auc"]] for caption in found]
    rows = [r for r in rows if r]
    if not rows:  # no image shows a colour of its caption
        rows = [[dict.fromkeys(KINDS, 0.5)]]
    means = {k: [mean([a[k] for a in r]) for r in rows] for k in KINDS}
    values: dict[str, Any] = {k: mean(v) for k, v in means.items()}
    for other in ("last", "centre"):
        values |= paired(means["average"], means[other], seed=SEED).limits(f"{other}_{{}}")
    overlap = [o for caption in found for image in caption for o in image["iou"]]
    best = [mean([o[n] for o in overlap]) for n in range(len(TAUS))] if overlap else [0.0]
    values |= {"iou": max(best), "tau": TAUS[best.index(max(best))], "chunks": len(overlap)}
    values["shown"] = len(overlap) / (2 * sum(len(c) for c in found))
    return claim.settle(
        values,
        here=f"{values['average']:.3f} over {values['chunks']} chunks whose colour the image shows "
        f"({100 * values['shown']:.0f} %); finest resolution alone {values['finest']:.3f}; best "
        f"overlap {values['iou']:.2f} at tau {values['tau']}",
        control=f"last step {values['last']:.3f}, centre prior {values['centre']:.3f}",
        interval=Interval(
            "bootstrap over captions, less the last step", values["last_low"], values["last_high"]
        ),
    )


def _places(claim: Claim, found: list[list[dict[str, Any]]]) -> Claim:
    def right(image: dict[str, Any]) -> float:
        (ax, ay), (bx, by) = image["centroids"]
        said = {"left of": ax < bx, "right of": ax > bx, "above": ay < by, "below": ay > by}
        return float(said[image["relation"]])

    shares = [mean([right(image) for image in caption]) for caption in found]
    low, high = bootstrap(shares, seed=SEED)
    return claim.settle(
        {"share": mean(shares), "low": low, "high": high},
        here=f"{100 * mean(shares):.1f} % of images",
        control="50 % by chance",
        interval=Interval("bootstrap over captions", low, high),
    )


def _seeds(claim: Claim, found: list[list[dict[str, Any]]]) -> Claim:
    """Each caption's first chunk over its seeds, against the first chunk of the next caption."""
    unit = []
    for caption in found:
        maps = torch.tensor([image["small"][0] for image in caption])
        unit.append(F.normalize(maps - maps.mean(1, keepdim=True), dim=1))
    same, other = [], []
    for n, own in enumerate(unit):
        pairs = own @ own.T
        same.append(float((pairs.sum() - pairs.diagonal().sum()) / (len(own) * (len(own) - 1))))
        other.append(float((own @ unit[n - 1].T).mean()))
    _, low, high, _ = paired(same, other, seed=SEED)
    return claim.settle(
        {"same": mean(same), "other": mean(other), "low": low, "high": high},
        here=f"mean cosine {mean(same):.3f} over seeds",
        control=f"{mean(other):.3f} between captions",
        interval=Interval("bootstrap over captions", low, high),
    )


def _chunks(claim: Claim) -> Claim:
    """The plain rule, and spaCy where it is installed, on 50 captions."""

    def f1(parser: str) -> float:
        hit = said = true = 0
        for number in range(50):
            one = scene(number)
            wanted = set(one.phrases())
            if "background" in one.named:
                wanted.add(f"a {one.background} background")
            got = {c.text for c in chunks(one.caption(), parser)}
            hit, said, true = hit + len(wanted & got), said + len(got), true + len(wanted)
        return 2 * hit / (said + true)

    rules = f1("rules")
    try:
        spacy = f1("spacy")
    except ImportError:
        spacy = None
    values = {"f1": rules if spacy is None else spacy, "rules": rules}
    return claim.settle(
        values,
        here=f"F1 {values['f1']:.3f} ({'plain rule' if spacy is None else 'spaCy'})",
        control=f"{rules:.3f} (plain rule)",
    )


def _longer(pipe: Any, one: Scene, images: int) -> list[float]:
    """How many times as long images take with their maps, each round by turns."""
    found = []
    for n in range(ROUNDS + 1):  # the first one warms up
        seconds = []
        for seen in ([], [ChunkMaps(_spans(one), Recipe(grid=GRID, parser="rules"))]):
            start = time.perf_counter()
            _drawn(pipe, one.caption(), images, *seen)
            seconds.append(time.perf_counter() - start)
        if n:
            found.append(seconds[1] / seconds[0])
    return found


def _built(pipe: Any, wanted: Sequence[Scene]) -> dict[str, float]:
    """Build once in one go, once with its second shard lost, and read both."""
    recipe = Recipe(images=2, batch=2, steps=2, grid=16, parser="rules", captions=2)
    prompts = [Prompt(s.caption(), "drawn", "CC0-1.0") for s in wanted]
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / name for name in ("whole", "stopped")]
        for folder in folders:
            build(pipe, prompts, folder, recipe, progress=False)
        last = sorted((folders[1] / "data").glob("*.parquet"))[-1]
        last.unlink()
        build(pipe, prompts, folders[1], recipe, progress=False)
        bytes_of = [
            {p.name: p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file()} for f in folders
        ]
        rows = list(load(folders[0]))
        again = list(load(folders[1]))
    maps = sum(c["map"] is not None for r in rows for c in r["chunks"])
    announced = recipe.images * sum(len(chunks(p.text, "rules")) for p in prompts)
    same = all(
        a["chunks"] == b["chunks"] and a["image"].tobytes() == b["image"].tobytes()
        for a, b in zip(rows, again)
    )
    return {
        "rows": len(rows),
        "rows wanted": recipe.images * len(prompts),
        "maps": maps,
        "maps wanted": announced,
        "counts": float(len(rows) == recipe.images * len(prompts) and maps == announced),
        "resumed": float(bytes_of[0] == bytes_of[1]),
        "reloaded": float(same and len(rows) == len(again)),
    }
