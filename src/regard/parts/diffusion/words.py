"""Word maps: where in the image each word or phrase of the prompt is looked at.

The attention of image tokens on the key columns of a word, averaged over heads, layers and steps.
Columns are computed as `exp(score - lse)`, for the words' own keys alone, and added up as they
come: what is kept is `[elements, words, height, width]` for each resolution, however many steps
run. The idea is that of DAAM (Tang et al., 2022, arXiv 2210.04885) for UNets; for joint attention
the text columns of the image queries take the place of cross-attention.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError, nearest
from regard.parts.text.phrases import Phrase, locate
from regard.reach import Call, Handler, Site
from regard.reach.denoising import Denoising, Prompts, columns, denoising

Grid = tuple[int, ...]  # height and width, in a video after the frames


@dataclass
class _Sums:
    total: Tensor  # [elements, words, *grid], float32
    count: int


@dataclass(frozen=True)
class _Layout:
    """Which key columns make which word, in every row of the conditional half."""

    names: list[str]
    keys: Tensor  # [elements, columns]
    weights: Tensor  # [elements, columns, words], 0 where the column is no part of the word
    known: Tensor  # [elements, words], whether the prompt of the row has the word
    cut: dict[str, str]  # words behind what the text encoder reads, with what is to be said

    def over(self, frames: int, device: Any) -> _Layout:
        """The same on a device, for rows that hold one frame each."""
        keys, weights = (
            x.repeat_interleave(frames, 0).to(device) for x in (self.keys, self.weights)
        )
        return replace(self, keys=keys, weights=weights)


@dataclass(eq=False)
class WordMaps(Handler):
    """One map for each word or phrase while a pipeline makes its images.

    A run of the pipeline replaces the last. Only rows that the prompt drives are counted, so under
    classifier-free guidance the empty prompt's half stays out, and so does a perturbed pass. Where
    encoders read different texts (`prompt_2`), a word has the columns of each that reads it. Words
    behind what the text encoder reads have no map; `notes` names them.

    Args:
        words: words or phrases of the prompt; every word of it when None. A word that stands twice
            in the prompt is given twice; the second is then called "word (2)". In a batch of
            several prompts a word may be in some of them only.
        tokens: for a denoiser without its pipeline, name -> key columns.
        combine: a word of several tokens is their "mean" (as in DAAM) or "sum".
        layers: layer numbers to average; all when None.
        heads: heads to average; all when None.
        steps: first step and the one after the last; all when None.
        by: "step" or "layer" keeps one map for each beside the average; memory then grows with
            their number.

    >>> import regard
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe, maps = tiny_pipeline("sd"), WordMaps(["circle", "a red circle"])
    >>> with regard.apply(pipe, maps):
    ...     _ = pipe("a red circle and a blue square", num_inference_steps=2)
    >>> maps["circle"].shape, maps.grids
    (torch.Size([1, 16, 16]), [(16, 16), (8, 8), (4, 4)])

    Raises:
        InputError: a word that is not in the prompt; no word that the text encoder reads; a
            pipeline that was given embeddings; a denoiser alone without `tokens`.
        ReachError: a model whose image does not look at text, or whose tokens are not known.
    """

    words: Sequence[str] | None = None
    tokens: Mapping[str, Sequence[int]] | None = None
    combine: str = "mean"
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    steps: tuple[int, int] | None = None
    by: str | None = None
    _sums: dict[Grid, _Sums] = field(default_factory=dict, init=False, repr=False)
    _each: dict[tuple[int, Grid], _Sums] = field(default_factory=dict, init=False, repr=False)
    _layout: _Layout | None = field(default=None, init=False, repr=False)
    _placed: dict[Any, _Layout] = field(default_factory=dict, init=False, repr=False)
    _of: Any = field(default=None, init=False, repr=False)
    _run: int = field(default=-1, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.words, str):
            raise InputError(f"words is a list: give [{self.words!r}]")
        if self.words is not None and self.tokens is not None:
            raise InputError("words and tokens are mutually exclusive")
        if self.combine not in ("mean", "sum"):
            raise InputError(f"combine is 'mean' or 'sum', not {self.combine!r}")
        if self.by not in (None, "step", "layer"):
            raise InputError(f"by is 'step', 'layer' or None, not {self.by!r}")
        if self.steps is not None and not 0 <= self.steps[0] < self.steps[1]:
            raise InputError(f"steps is (first, after the last), not {self.steps}")

    def sites(self, sites: list[Site]) -> list[Site]:
        text_sites = [s for s in sites if s.text]
        if not text_sites:
            raise ReachError(
                "word maps need cross-attention or joint attention of an image to text, and this "
                "model has none: use a diffusion pipeline"
            )
        wrong = sorted(set(self.layers or []) - {s.layer for s in text_sites})
        if wrong:
            raise InputError(
                f"layer {wrong[0]} does not look at text: choose from "
                f"{sorted({s.layer for s in text_sites})}"
            )
        self._clear()
        self._run = -1
        return [s for s in text_sites if self.layers is None or s.layer in self.layers]

    def _clear(self) -> None:
        self._sums, self._each, self._layout, self._of = {}, {}, None, None
        self._placed = {}

    def after(self, call: Call, state: State) -> None:
        place = denoising(call)
        if place.run != self._run:
            self._clear()
            self._run = place.run
        if place.unknown:
            raise ReachError(
                f"{place.unknown}, so words have no columns: regard.watch measures its facts"
            )
        rows = place.conditional
        if not len(rows) or place.grid is None or not self._in_steps(place.step):
            return
        layout = self._columns(place, call)
        with torch.no_grad():
            share = columns(call, state, layout.keys, rows)
            share = share.float() if self.heads is None else self._some(share.float(), call)
            maps = torch.bmm(share.mean(1), layout.weights)
        maps = maps.transpose(1, 2).unflatten(2, place.grid)
        grid = place.grid
        if place.frames > 1:
            maps, grid = (
                maps.unflatten(0, (-1, place.frames)).transpose(1, 2),
                (place.frames, *grid),
            )
        _add(self._sums, grid, maps)
        if self.by is not None:
            label = place.step if self.by == "step" else call.site.index
            _add(self._each, (label, grid), maps)
        self._beside(call, state, layout)

    def _beside(self, call: Call, state: State, layout: _Layout) -> None:
        """What else is to be seen in this call."""

    def _some(self, share: Tensor, call: Call) -> Tensor:
        wrong = [h for h in self.heads or [] if not 0 <= h < share.shape[1]]
        if wrong:
            raise InputError(
                f"head {wrong[0]} is out of range: {call.site.name} has heads 0 to "
                f"{share.shape[1] - 1}"
            )
        return share[:, list(self.heads or [])]

    def _in_steps(self, step: int) -> bool:
        return self.steps is None or self.steps[0] <= step < self.steps[1]

    # -- words to columns -------------------------------------------------------------------------
    def _columns(self, place: Denoising, call: Call) -> _Layout:
        elements = len(place.conditional) // place.frames
        key = place.prompts if self.tokens is None else elements
        if self._layout is None or key != self._of:
            self._placed = {}
            if self.tokens is not None:
                assert place.text is not None
                room = place.text.stop - place.text.start
                self._layout = self._given(elements, room)
            elif place.prompts is None:
                raise InputError(
                    "the prompt is not known: pass the whole pipeline and give it the prompt as "
                    "text, or name key columns with tokens={...}"
                )
            else:
                self._layout = self._read(place.prompts, elements)
            self._of = key
        at = (place.frames, call.k.device)
        if at not in self._placed:  # moved once: a copy in every layer would hold up a GPU
            self._placed[at] = self._layout.over(*at)
        return self._placed[at]

    def _given(self, elements: int, room: int) -> _Layout:
        tokens = {
            name: [int(c) for c in word_columns]
            for name, word_columns in (self.tokens or {}).items()
        }
        wrong = [c for word_columns in tokens.values() for c in word_columns if not 0 <= c < room]
        if wrong:
            raise InputError(f"column {wrong[0]} is out of range: there are {room} text tokens")
        return self._lay([tokens] * elements)

    def _read(self, prompts: Prompts, elements: int) -> _Layout:
        per_prompt: list[dict[str, list[int]]] = []
        missing: dict[str, int] = {}
        cut: dict[str, str] = {}
        several = len(set(prompts.texts or []))
        for element in range(elements):
            word_columns: dict[str, list[int]] = {}
            reads = prompts.reads(element)
            places: list[tuple[str, Phrase, str]] = []
            for text in reads if self.words is None else []:
                hits = re.finditer(r"[\w'-]+", text)
                named = _named([Phrase(m.group(), m.start(), m.end()) for m in hits])
                places += [(n, p, text) for n, p in named if n not in {name for name, *_ in places}]
            for name, count in _counted(self.words or []):
                spot = _spot(name, count, reads)
                if spot is not None:
                    places.append((name, *spot))
                elif several < 2:
                    locate([_plain(name)] * count, reads[0])  # says why not
                else:
                    missing[name] = missing.get(name, 0) + 1
            if not places and self.words is None:
                raise InputError(f"the prompt {reads[0]!r} holds no word to map: name some words")
            for name, phrase, text in places:
                try:
                    word_columns[name] = prompts.columns(element, phrase.start, phrase.end, text)
                except InputError as problem:
                    cut[name] = str(problem)
            per_prompt.append(word_columns)
        for name, count in missing.items():
            if count == elements:
                raise InputError(f"{name!r} is in none of the prompts: name a word of them")
        if not any(per_prompt):
            raise InputError(next(iter(cut.values())))
        return self._lay(per_prompt, cut)

    def _lay(
        self, per_prompt: list[dict[str, list[int]]], cut: dict[str, str] | None = None
    ) -> _Layout:
        names = list(dict.fromkeys(name for word_columns in per_prompt for name in word_columns))
        width = max(sum(map(len, word_columns.values())) for word_columns in per_prompt)
        keys = torch.zeros(len(per_prompt), width, dtype=torch.long)
        weights = torch.zeros(len(per_prompt), width, len(names))
        known = torch.zeros(len(per_prompt), len(names), dtype=torch.bool)
        for row, word_columns in enumerate(per_prompt):
            at = 0
            for name, cols in word_columns.items():
                word = names.index(name)
                keys[row, at : at + len(cols)] = torch.tensor(cols)
                weights[row, at : at + len(cols), word] = (
                    1 / len(cols) if self.combine == "mean" else 1.0
                )
                known[row, word] = True
                at += len(cols)
        gone = {n: why for n, why in (cut or {}).items() if n not in names}
        return _Layout(names, keys, weights, known, gone)

    # -- results ----------------------------------------------------------------------------------
    @property
    def names(self) -> list[str]:
        """The words and phrases that were mapped."""
        return list(self._seen().names)

    @property
    def notes(self) -> list[str]:
        """What was left out: words behind what the text encoder reads."""
        cut = list(self._seen().cut)
        if not cut:
            return []
        return [f"not read by the text encoder, so without a map: {', '.join(map(repr, cut))}"]

    @property
    def grids(self) -> list[Grid]:
        """Resolutions at which the image looked at text, finest first."""
        return sorted(self._sums, key=_cells)

    @property
    def labels(self) -> list[int]:
        """With `by`: the steps, or the indices of the sites, that have a map of their own."""
        return sorted({label for label, _ in self._each})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, word: object) -> bool:
        return self._layout is not None and word in self._layout.names

    def __getitem__(self, word: str) -> Tensor:
        """The map at the finest resolution: see `map`."""
        return self.map(word)

    def map(
        self,
        word: str,
        *,
        grid: Grid | str = "finest",
        size: tuple[int, int] | None = None,
        label: int | None = None,
    ) -> Tensor:
        """Mean attention on a word, `[elements, height, width]`, float32; one element an image. Of
        a video `[elements, frames, height, width]`.

        Rows of a batch whose prompt lacks the word are NaN.

        Args:
            grid: "finest", the resolution where maps are sharpest; one of `grids`; or "all", every
                layer counted alike after resizing to the finest.
            size: resize to this height and width.
            label: with `by`, the step or the site index; the average over all when None.
        """
        layout = self._seen()
        if word in layout.cut:
            raise InputError(layout.cut[word])
        if word not in layout.names:
            raise InputError(f"no map of {word!r} was made.{nearest(word, layout.names)}")
        sums = dict(self._sums)
        if label is not None:
            sums = {g: s for (n, g), s in self._each.items() if n == label}
            if not sums:
                raise InputError(f"no map for {label}: there are {self.labels}")
        grids = sorted(sums, key=_cells)
        if grid == "finest":
            grids = grids[:1]
        elif grid != "all":
            if grid not in sums:
                raise InputError(f"no resolution {grid}: there are {grids}")
            grids = [grid]
        at = layout.names.index(word)
        target = size or grids[0][-2:]
        total = sum(_resize(sums[g].total[:, at], target) for g in grids)
        out = total / sum(sums[g].count for g in grids)
        assert isinstance(out, Tensor)
        known = layout.known[:, at].to(out.device)
        out = torch.where(known.view(-1, *[1] * (out.dim() - 1)), out, torch.nan)
        if not bool(torch.isfinite(out[known]).all()):
            raise InputError("the attention scores are not finite: the weights hold NaN or inf")
        return out

    def image(
        self,
        word: str,
        element: int = 0,
        *,
        over: Any = None,
        size: tuple[int, int] | None = None,
        frame: int = 0,
    ) -> Any:
        """The map as a PIL image, from its least value (black) to its most (white).

        Args:
            frame: of a video.
            over: a PIL image of the scene, shown dimmed where the word is not looked at.
            size: height and width; the size of `over`, or eight pixels a cell, when None.
        """
        from PIL import Image

        if over is not None:
            size = size or (over.height, over.width)
        height, width = self.grids[0][-2:]
        size = size or (8 * height, 8 * width)
        values = self.map(word, size=size)[element]
        grey = scaled(values[frame] if values.dim() == 3 else values)
        if over is None:
            return Image.fromarray((255 * grey).round().to(torch.uint8).cpu().numpy(), "L")
        import numpy as np

        scene = np.asarray(over.convert("RGB").resize((size[1], size[0])), dtype=np.float32)
        shown = scene * (0.25 + 0.75 * grey.cpu().numpy()[..., None])
        return Image.fromarray(shown.round().clip(0, 255).astype(np.uint8), "RGB")

    def _seen(self) -> _Layout:
        if self._layout is None:
            raise RuntimeError("nothing was seen yet: run the pipeline inside the `with`")
        return self._layout


def scaled(values: Tensor) -> Tensor:
    """From 0, the least, to 1, the most; a map without differences is 0.

    >>> scaled(torch.tensor([2.0, 3.0, 4.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    low, high = values.min(), values.max()
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)


def _add(sums: dict[Any, _Sums], key: Any, maps: Tensor) -> None:
    if key in sums and sums[key].total.shape == maps.shape:
        sums[key].total += maps
        sums[key].count += 1
    else:
        sums[key] = _Sums(maps.clone(), 1)


def _resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """`[..., height, width]` at another height and width."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    fine = torch.nn.functional.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return fine.view(*maps.shape[:-2], *size)


def _cells(grid: Grid) -> int:
    """What sorts the finest grid first."""
    return -math.prod(grid)


def _spot(name: str, count: int, texts: list[str]) -> tuple[Phrase, str] | None:
    """Where the `count`-th such phrase stands, in the first text that has it."""
    for text in texts:
        try:
            return locate([_plain(name)] * count, text)[-1], text
        except InputError:
            continue
    return None


def _named(phrases: list[Phrase]) -> list[tuple[str, Phrase]]:
    """Each phrase under a name of its own: the second "a" is "a (2)"."""
    seen: dict[str, int] = {}
    named = []
    for phrase in phrases:
        count = seen[phrase.text] = seen.get(phrase.text, 0) + 1
        named.append((phrase.text if count == 1 else f"{phrase.text} ({count})", phrase))
    return named


def _counted(words: Sequence[str]) -> list[tuple[str, int]]:
    """Name and which of its occurrences is meant, for words as a person gives them."""
    named = _named([Phrase(word, 0, 0) for word in words])
    seen: dict[str, int] = {}
    out = []
    for name, phrase in named:
        seen[phrase.text] = seen.get(phrase.text, 0) + 1
        out.append((name, seen[phrase.text]))
    return out


def _plain(name: str) -> str:
    return re.sub(r" \(\d+\)$", "", name)
