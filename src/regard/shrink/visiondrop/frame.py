"""The prompt as it stands between two layers: which tokens are left, and where they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask
from regard.parts.vision import Images
from regard.reach.transformers import Handed

from .card import Size
from .plan import Kept, gather

Groups = list[list[int]]
Part = tuple[Tensor, Tensor, Tensor]
"""States, sources and places of some tokens."""


@dataclass
class Frame:
    """The tokens of a batch of prompts that are left.

    Attributes:
        images: where the images were when the pass began.
        source: `[batch, now]`, the column a token had then; -1 for padding, -2 for image tokens.
        place: `[batch, now]`, the column whose position a token takes.
        spans: of every row and image its tokens now.
        renumber: whether positions count on without gaps.
        kept: of every row and image what each cut left.
        changed: whether anything was cut yet.
    """

    images: Images
    source: Tensor
    place: Tensor
    spans: list[list[Size]]
    renumber: bool
    kept: list[list[list[Kept]]]
    changed: bool = False
    mask: Any = None
    rotary: Any = None

    @classmethod
    def of(cls, images: Images, renumber: bool) -> Frame:
        """The whole prompt."""
        rows, count = images.number.shape
        columns = torch.arange(count, device=images.number.device).expand(rows, -1)
        source = columns.masked_fill(images.number >= 0, -2).masked_fill(~images.live, -1)
        spans = [images.spans(row) for row in range(rows)]
        kept: list[list[list[Kept]]] = [[[] for _ in row] for row in spans]
        return cls(images, source, columns.clone(), spans, renumber, kept)

    @property
    def live(self) -> Tensor:
        return self.source != -1

    @property
    def lengths(self) -> set[int]:
        """How many tokens the images had when the pass began."""
        rows = range(len(self.spans))
        return {b - a for row in rows for a, b in self.images.spans(row)}

    @property
    def counts(self) -> list[int]:
        """Image tokens of every image now, rows in order."""
        return [b - a for row in self.spans for a, b in row]

    def given(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a layer gets beside the shortened states: positions and mask."""
        batch, count = self.source.shape
        place = self.place.clamp_min(0)
        rotary = tuple(
            x.expand(batch, -1, -1).gather(1, place[..., None].expand(-1, -1, x.shape[-1]))
            for x in self.rotary
        )
        if self.mask is None:
            live = self.live
            whole = bool(live.all())
            mask = Mask.causal() if whole else Mask.causal() & Mask.padding(live)
            self.mask = Handed.of(mask, None if whole else live, (0, 0), (batch, count, count))
        changed: dict[str, Any] = {"position_embeddings": rotary, "attention_mask": self.mask}
        ids = kwargs.get("position_ids")
        if torch.is_tensor(ids) and ids.dim() == 2:
            changed["position_ids"] = ids.expand(batch, -1).gather(1, place)
        return changed

    def record(self, layer: int, row: int, image: int, groups: Groups, dominant: int) -> None:
        """Note which patches the new tokens of an image stand for."""
        a, b = self.spans[row][image]
        cuts = self.kept[row][image]
        before = cuts[-1].groups if cuts else tuple((m,) for m in range(b - a))
        members = tuple(tuple(sorted(m for g in tokens for m in before[g])) for tokens in groups)
        cuts.append(Kept(layer, dominant, members))

    def shorten(self, x: Tensor, chosen: list[list[Groups | None]]) -> Tensor:
        """Put the new tokens of every image between the texts of its row, padding to the left."""
        rows: list[Part] = []
        spans: list[list[Size]] = []
        for row, images in enumerate(self.spans):
            parts: list[Part] = []
            spans.append([])
            at = length = 0
            # the text before each image, the image, and the text after the last
            for image, (a, b) in enumerate([*images, (x.shape[1], x.shape[1])]):
                live = self.live[row, at:a]
                text = (t[row, at:a][live] for t in (x, self.source, self.place))
                parts.append((next(text), next(text), next(text)))
                length, at = length + len(parts[-1][0]), b
                if image == len(images):
                    break
                groups = chosen[row][image]
                groups = [[m] for m in range(b - a)] if groups is None else groups
                source = self.source.new_full((len(groups),), -2)
                place = self.place[row, a:b][[g[0] for g in groups]]
                parts.append((gather(x[row, a:b], groups), source, place))
                spans[-1].append((length, length + len(groups)))
                length += len(groups)
            states, source, place = (torch.cat(columns) for columns in zip(*parts))
            rows.append((states, source, place))
        return self._pack(rows, spans)

    def _pack(self, rows: list[Part], spans: list[list[Size]]) -> Tensor:
        """One rectangle of the rows' states, sources and places."""
        fill = torch.nn.functional.pad
        most = max(len(states) for states, _, _ in rows)
        pad = [most - len(states) for states, _, _ in rows]
        x = torch.stack([fill(states, (0, 0, p, 0)) for (states, _, _), p in zip(rows, pad)])
        self.source = torch.stack([fill(s, (p, 0), value=-1) for (_, s, _), p in zip(rows, pad)])
        self.place = torch.stack([fill(at, (p, 0)) for (_, _, at), p in zip(rows, pad)])
        if self.renumber:
            first = self.images.live.int().argmax(-1, keepdim=True)
            self.place = (first + self.live.cumsum(-1) - 1).clamp_min(0)
        self.spans = [[(a + p, b + p) for a, b in row] for row, p in zip(spans, pad)]
        self.changed, self.mask = True, None
        return x

    def restored(self, x: Tensor) -> Tensor:
        """Every token back at the place it had; dropped ones are zeros."""
        full = x.new_zeros(len(x), self.images.live.shape[1], x.shape[-1])
        target = self.source.clone()
        for row, spans in enumerate(self.spans):
            for (a, b), (_, end) in zip(spans, self.images.spans(row)):
                target[row, a:b] = torch.arange(end - (b - a), end, device=target.device)
        rows, columns = (target >= 0).nonzero(as_tuple=True)
        return full.index_put((rows, target[rows, columns]), x[rows, columns])
