"""The cut at the vision encoder (LLaVA-1.5): between the tower and the projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError
from regard.parts.vision import has_class_token
from regard.reach import Call, Site

from .card import Settings, Size
from .frame import Frame, Groups
from .plan import Kept, choose, gather, random_score, tower_score


def has_cut(model: Any) -> bool:
    """Whether the encoder of a model can be cut: images of one size, one feature layer."""
    config, vision = model.config, model.config.vision_config
    if hasattr(config, "image_grid_pinpoints") or hasattr(vision, "spatial_merge_size"):
        return False
    sizes = all(isinstance(getattr(vision, n, None), int) for n in ("image_size", "patch_size"))
    single = isinstance(getattr(config, "vision_feature_layer", None), int)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    fits = (strategy == "default") == has_class_token(model)
    inner = getattr(model, "model", model)
    return sizes and single and fits and hasattr(inner, "multi_modal_projector")


class TowerCut:
    """Hands on `size` (dominant, contextual) tokens of every image.

    The language model still gets as many rows as it has image tokens: those in front are filled,
    and dropped before its first layer.
    """

    def __init__(self, model: Any, sites: list[Site], size: Size, settings: Settings) -> None:
        inner = getattr(model, "model", model)
        vision, feature = model.config.vision_config, model.config.vision_feature_layer
        names = {id(m): n for n, m in model.named_modules()}
        tower = [s for s in sites if s.name.startswith(names[id(inner.vision_tower)] + ".")]
        index = len(tower) + feature if feature < 0 else feature - 1
        if not 0 <= index < len(tower):
            raise InputError(f"the vision tower has no layer for vision_feature_layer={feature}")
        self.site, self.size, self.settings = tower[index], size, settings
        self.patches = (vision.image_size // vision.patch_size) ** 2
        self.has_class = has_class_token(model)
        self.with_class = settings.keep_cls and self.has_class
        self.groups: list[Groups] = []
        self._scores: Tensor | None = None
        self._metric: Tensor | None = None
        self._class: Tensor | None = None
        self._block = model.get_submodule(self.site.name.rsplit(".", 1)[0])
        self._projector = inner.multi_modal_projector

    def attach(self) -> list[Callable[[], None]]:
        """Install the hooks; returns what removes each."""
        return [
            self._block.register_forward_hook(self._see_class).remove,
            self._projector.register_forward_pre_hook(self._cut).remove,
            self._projector.register_forward_hook(self._fill).remove,
        ]

    @torch.no_grad()
    def look(self, call: Call, state: State) -> None:
        """Score the patches by the attention of the layer whose features are projected."""
        self._scores = tower_score(call, state.lse, self.has_class)
        self._metric = call.k.mean(1)[:, int(self.has_class) :]

    def _see_class(self, block: Any, args: tuple[Any, ...], out: Any) -> None:
        x = out[0] if isinstance(out, tuple) else out
        self._class = x[:, :1] if self.has_class else None

    def _cut(self, projector: Any, args: tuple[Any, ...]) -> Any:
        """Cut the features `[images, patches, dim]` before they are projected."""
        assert self._scores is not None and self._metric is not None
        x, (dominant, contextual) = args[0], self.size
        scores = self._scores
        if self.settings.score == "random":
            drawn = random_score(self.settings.seed, 0, scores.shape[-1])
            scores = drawn.expand(len(x), -1)
        size = (dominant - self.with_class, contextual)
        self.groups = [
            choose(score, metric, *size, merge=self.settings.merge)
            for score, metric in zip(scores, self._metric)
        ]
        short = torch.stack([gather(image, groups) for image, groups in zip(x, self.groups)])
        if self.with_class:
            assert self._class is not None
            short = torch.cat([self._class.to(short.dtype), short], 1)
        return (short, *args[1:])

    def _fill(self, projector: Any, args: tuple[Any, ...], out: Tensor) -> Tensor:
        """As many rows as there are image tokens. Until they are dropped, those in front say which
        image this is: beam search may repeat images.
        """
        full = torch.nn.functional.pad(out, (0, 0, self.patches - out.shape[1], 0))
        numbers = torch.arange(len(out), device=out.device)
        # small numbers, which every dtype holds exactly
        full[:, 0, :3] = torch.stack([numbers % 100, numbers // 100, numbers * 0 - 1], -1).to(out)
        return full

    def drop_filled(self, frame: Frame, x: Tensor) -> Tensor:
        """Drop the filled rows before the first layer, and note what the cut left."""
        count = sum(self.size)
        dominant = self.size[0] if self.settings.merge else count
        chosen: list[list[Groups | None]] = []
        for row, spans in enumerate(frame.spans):
            chosen.append([])
            for image, (a, b) in enumerate(spans):
                mark = x[row, a].detach()
                turn = int(mark[0]) + 100 * int(mark[1])
                if float(mark[2]) != -1 or bool(mark[3:].any()) or turn >= len(self.groups):
                    raise InputError(
                        "these image features were encoded without VisionDrop: pass the pixels"
                    )
                groups = self.groups[turn]
                chosen[-1].append([[m] for m in range(b - a - count, b - a)])
                members = ((),) * self.with_class + tuple(tuple(sorted(g)) for g in groups)
                frame.kept[row][image].append(Kept(0, dominant, members))
                # the positions that the patches had; the class token takes the first
                places = frame.place[row, a:b].clone()
                firsts = [0] * self.with_class + [g[0] for g in groups]
                frame.place[row, b - count : b] = places[firsts]
        return frame.shorten(x, chosen)
