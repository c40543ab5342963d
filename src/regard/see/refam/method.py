"""RefAM: point at what an expression refers to, from a diffusion transformer's joint attention.

Paper: "RefAM: Attention Magnets for Zero-Shot Referral Segmentation", Kukleva, Simsar et al., 2025,
arXiv 2509.22650.

A real image is noised and read once with the expression beside it. How much each image token looks
at each word, among all words, is the word's map. Stop words are magnets: they take surplus
attention, most of it from the background, so more of them are added to the text, and their columns
are dropped after the softmax. Global attention sinks, tokens that all queries look at alike, are
taken out of it.

Deviations. The paper's method section was not at hand, so these are ours (reconstructed): the time
and number of noises, the range of layers, the test for a sink (`kappa`, `gamma`, judged on the mean
over heads), the ramp of place words, the magnets of the default. The pooled vector is always that
of the expression alone, so magnets act through attention only. Clips are read frame by frame.
Maps over padding are never made: its share is reported instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.errors import InputError
from regard.parts.diffusion.noised import denoise_once, size_of
from regard.parts.text.expressions import STOP_WORDS, Word, head, places, ramp, words
from regard.parts.text.phrases import Parser, default_parser
from regard.reach import Session

from .card import Segmenter, Settings
from .maps import Sink, WordShares
from .segment import around, sam


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where an expression points.

    Attributes:
        heat: `[height, width]` at the resolution of the image tokens, from 0 to 1.
        point: column and row of the pixel of greatest heat.
        mask: boolean `[image height, image width]`.
        words: every word of the expression and every magnet, in order, with its map
            `[height, width]`; one that occurs twice is there twice.
        content: which of them were summed.
        sinks: the tokens that were judged, layer by layer.
        padding: share of the image's attention to text that falls on padding.
        notes: what was done otherwise than asked.
    """

    heat: Tensor
    point: tuple[int, int]
    mask: Tensor
    words: list[tuple[str, Tensor]]
    content: list[str]
    sinks: list[Sink]
    padding: float
    notes: list[str]

    def report(self) -> dict[str, Any]:
        """Plain data of one image: point, share of the mask, heat map, words, sinks."""
        return {
            "content": self.content,
            "point": list(self.point),
            "share": float(self.mask.float().mean()),
            "heat": [[float(f"{v:.4g}") for v in row] for row in self.heat.tolist()],
            "words": [{"word": word, "mean": float(one.mean())} for word, one in self.words],
            "sinks": [asdict(sink) for sink in self.sinks],
            "padding": self.padding,
            "notes": self.notes,
        }


class RefAM(Settings):
    """Point at what an expression refers to: settings, and `ground`, which applies them.

    >>> import regard
    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> scene = Image.linear_gradient("L").resize((32, 32))
    >>> method = regard.RefAM(parser="rules")
    >>> grounding = method.ground(tiny_pipeline("sd3"), scene, "the red circle")
    >>> grounding.heat.shape, grounding.content, grounding.mask.shape
    (torch.Size([8, 8]), ['red', 'circle'], torch.Size([32, 32]))

    Raises:
        InputError: a setting out of range.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.magnets, str):
            raise InputError(f"magnets is a list: write [{self.magnets!r}]")

    @cached_property
    def segment(self) -> Segmenter | None:
        """The segmenter, loaded; None for the threshold.

        Raises:
            InputError: its checkpoint cannot be loaded.
        """
        if isinstance(self.segmenter, str):
            return None if self.segmenter == "threshold" else sam(self.segmenter)
        return self.segmenter

    @cached_property
    def parser_and_note(self) -> tuple[str | Parser, list[str]]:
        """The parser, and a note where it is not the one that is tried first."""
        if self.parser is not None:
            return self.parser, []
        parser, missing = default_parser()
        return parser, [f"noun phrases by rules: {missing}"] if missing else []

    def chosen(self, text: str) -> list[Word]:
        """The words of an expression whose maps are summed.

        Raises:
            InputError: there are none.
        """
        stop_words = STOP_WORDS if self.stop_words is None else self.stop_words
        every = words(text, stop_words)
        content = [w for w in every if w.content]
        if not content:
            raise InputError(f"no content words in the expression {text!r}: name what is meant")
        return head(text, every, self.parser_and_note[0]) if self.noun_phrase else content

    def ground(self, pipe: Any, image: Any, text: str) -> Grounding:
        """Point at what the expression refers to in a PIL image.

        Raises:
            InputError: no content words, an expression that the text encoder cuts off, a map
                without differences.
            ReachError: a pipeline without joint attention (Stable Diffusion 3, Flux).
        """
        chosen = self.chosen(text)
        size_of(pipe, image)
        shares = self._forward(pipe, image, text, chosen)
        notes = list(self.parser_and_note[1]) if self.noun_phrase else []
        if self.gas == "redirect" and any(s.sink and s.content for s in shares.sinks):
            shares = self._forward(pipe, image, text, chosen, front=True)
            if any(s.sink and s.content for s in shares.sinks):
                notes.append("a content word stayed a sink beside the magnet put in front of it")
        every, maps = words(text), shares.maps()
        heat = _scaled([maps[n] for n in _places_of(chosen, every)])
        if self.spatial_bias:
            for name in places(text):
                heat = heat * ramp(name, *heat.shape)
        fine = F.interpolate(
            heat[None, None], (image.height, image.width), mode="bicubic", align_corners=False
        )[0, 0]
        at = int(fine.argmax())  # the first of equals
        point = (at % image.width, at // image.width)
        return Grounding(
            heat,
            point,
            self._mask(image, fine, point),
            list(zip([*(w.text for w in every), *self.magnets], maps)),
            [w.text for w in chosen],
            shares.sinks,
            shares.padding,
            notes,
        )

    def _forward(
        self, pipe: Any, image: Any, text: str, chosen: Sequence[Word], front: bool = False
    ) -> WordShares:
        """One forward; with `front`, a magnet stands before the expression too."""
        shares = WordShares(self, text, chosen, front)
        with Session(pipe, [shares]):
            denoise_once(
                pipe,
                image,
                shares.prompt,
                pooled_text=text,
                noise=self.noise,
                draws=self.draws,
                seed=self.seed,
            )
        return shares

    def _mask(self, image: Any, fine: Tensor, point: tuple[int, int]) -> Tensor:
        if self.segment is None:
            return around(fine, point, self.threshold)
        mask = torch.as_tensor(self.segment(image, point)).bool()
        if mask.shape != fine.shape:
            raise InputError(
                f"the segmenter gave a mask of {tuple(mask.shape)} for an image of "
                f"{tuple(fine.shape)} (height, width)"
            )
        return mask


def _places_of(chosen: Sequence[Word], every: Sequence[Word]) -> list[int]:
    spans = [(w.start, w.end) for w in every]
    return [spans.index((w.start, w.end)) for w in chosen]


def _scaled(maps: Sequence[Tensor]) -> Tensor:
    """The sum of some maps, from 0 to 1.

    Raises:
        InputError: NaN or inf, or a map without differences.
    """
    heat = sum(maps)
    assert isinstance(heat, Tensor)
    if not bool(torch.isfinite(heat).all()):
        raise InputError("the attention scores are not finite: the weights hold NaN or inf")
    low, high = heat.min(), heat.max()
    if float(high - low) <= 1e-5 * float(high.abs()):
        raise InputError(
            "the map has no differences: every text token was summed, so each pixel gives 1; "
            "keep stop words, magnets or end marks out of the sum"
        )
    return (heat - low) / (high - low)
