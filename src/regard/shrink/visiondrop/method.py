"""VisionDrop: drop and merge image tokens in stages, judged by how image tokens look at each other.

Paper: "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", Xu et al., 2025
(AAAI 2026), arXiv 2506.22283.

Deviations:
- Several images: every image is cut by itself, and keeps as many tokens as a single one.
- Key heads of grouped-query attention are shared by their queries; the released code stops there.
- A row of the batch without images is left as it is; padding is masked in every layer.
- The last layer's states are put back to the places that the tokens had, dropped ones as zeros: so
  logits, labels and `generate` keep the shape of the prompt.
- Models with positions of their own for rows and columns (Qwen-VL) keep them; renumbering, the
  released way, would tear the picture apart. These models, and tiled images, have no encoder cut.
- The schedule for other means than 32 tokens is the released one scaled (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, State
from regard.errors import InputError, ReachError
from regard.parts.decoding.cache import check_number, check_whole, layers
from regard.parts.vision import Images, decoder, has_class_token, locate
from regard.reach import Call, Handler, Site
from regard.reach.dispatch import capture
from regard.reach.transformers import Handed

from .cache import NAME, ShortLayer
from .plan import (
    Kept,
    Plan,
    Size,
    choose,
    gather,
    one_cut,
    schedule,
    text_score,
    tower_score,
    visual_score,
)

Groups = list[list[int]]


@dataclass
class _Frame:
    """The prompt as it stands between two layers.

    Attributes:
        images: where the images were when the pass began.
        source: `[batch, now]`, the column a token had then; -1 for padding, -2 for image tokens.
        place: `[batch, now]`, the column whose position a token takes.
        spans: of every row and image its tokens now.
        changed: whether anything was cut yet.
    """

    images: Images
    source: Tensor
    place: Tensor
    spans: list[list[Size]]
    kept: list[list[list[Kept]]]
    changed: bool = False
    mask: Any = None
    rotary: Any = None

    @property
    def live(self) -> Tensor:
        return self.source != -1


@dataclass(eq=False)
class VisionDrop(Handler):
    """Keep the image tokens that image tokens look at, and merge the others into a few.

    At each cut the best `dominant` tokens stay, in their order; the others go to `contextual`
    targets among them by cosine of their keys, and each target grows by their mean. One cut lies in
    the vision encoder (LLaVA-1.5; by attention of the class token, or of all patches), the others
    between layers of the language model. No training.

    Args:
        tokens: image tokens of one image averaged over the layers, as a count, or below 1 as a
            share; gives the schedule (`visiondrop_plan.schedule`). None with neither encoder nor
            cuts leaves the model as it is.
        encoder: instead, (dominant, contextual) of the encoder cut; dominant counts the class
            token.
        cuts: instead, layer -> (dominant, contextual), cut before that layer, from 1 on.
        stages: with `tokens`: "progressive", "encoder" (one cut, there), or "fastv" (one cut before
            layer 2).
        score: "visual"; or the rivals "text" (attention of the last token: PyramidDrop, FastV) and
            "random".
        merge: false drops the others instead (as many tokens stay, all dominant).
        score_mask: "causal" as released, which favours early tokens, or "bidirectional".
        positions: "renumber" (the tokens left count on without gaps), "keep" (their own), or
            "auto": renumber where positions are plain numbers.
        keep_cls: hand on the class token at the encoder cut, as released.
        seed: of the random score, which takes the same places of every image.

    After a run `kept()` tells what every cut left of every image, `counts()` the image tokens of
    every layer, and `visiondrop_cache.nbytes(cache)` what is held.

    >>> import regard
    >>> from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs
    >>> model = tiny_vlm("llava")
    >>> with torch.no_grad(), regard.apply(model, method := VisionDrop(tokens=7)):
    ...     model(**vlm_inputs("llava", model)).logits.shape
    torch.Size([2, 26, 128])
    >>> method.counts()[0], method.mean_tokens()
    ([10, 8, 6, 4], 7.0)

    Raises:
        InputError: a setting out of range, budgets that do not decrease, an encoder cut in a model
            without one, labels on image tokens, images in a later turn.
        ReachError: layers with a sliding window, gradient checkpointing.
    """

    stores_rows = True

    tokens: float | None = None
    encoder: Size | None = None
    cuts: Mapping[int, Size] | None = None
    stages: str = "progressive"
    score: str = "visual"
    merge: bool = True
    score_mask: str = "causal"
    positions: str = "auto"
    keep_cls: bool = True
    seed: int = 0
    _sites: list[Site] = field(default_factory=list, init=False, repr=False)
    _wanted: list[Site] = field(default_factory=list, init=False, repr=False)
    _frame: _Frame | None = field(default=None, init=False, repr=False)
    _kept: list[list[list[Kept]]] = field(default_factory=list, init=False, repr=False)
    _counts: dict[int, list[list[int]]] = field(default_factory=dict, init=False, repr=False)
    _cache: Any = field(default=None, init=False, repr=False)
    _tower: Site | None = field(default=None, init=False, repr=False)
    _scores: Tensor | None = field(default=None, init=False, repr=False)
    _metric: Tensor | None = field(default=None, init=False, repr=False)
    _class: Tensor | None = field(default=None, init=False, repr=False)
    _groups: list[Groups] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        by_hand = self.encoder is not None or self.cuts is not None
        if self.tokens is not None and by_hand:
            raise InputError("tokens makes a schedule: give it, or encoder and cuts by hand")
        if self.tokens is not None:
            check_number("tokens", self.tokens)
            if self.tokens <= 0:
                raise InputError(
                    f"tokens is a count, or a share between 0 and 1, not {self.tokens}"
                )
        check_whole("seed", self.seed, 0)
        for name, value, known in (
            ("stages", self.stages, ("progressive", "encoder", "fastv")),
            ("score", self.score, ("visual", "text", "random")),
            ("score_mask", self.score_mask, ("causal", "bidirectional")),
            ("positions", self.positions, ("auto", "renumber", "keep")),
        ):
            if value not in known:
                raise InputError(f"{name} is one of {', '.join(known)}, not {value!r}")
        self._by_hand = Plan(self.encoder, dict(self.cuts or {})) if by_hand else None
        self._idle = not by_hand and self.tokens is None

    # -- the model ---------------------------------------------------------------------------------
    def sites(self, sites: list[Site]) -> list[Site]:
        self._sites = [s for s in sites if s.kind == "self"]
        self._frame, self._kept, self._counts = None, [], {}
        return self._sites

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        body = decoder(model, NAME)
        if self._idle:
            return ()
        kinds = getattr(body.config, "layer_types", None) or []
        if any("sliding" in kind for kind in kinds):
            raise ReachError(
                f"this language model has layers with a sliding window, and {NAME} changes which "
                "tokens lie in it: name a model without"
            )
        self._body, self._depth = body, len(body.layers)
        names = {id(m): n for n, m in model.named_modules()}
        prefixes = [names[id(layer)] + "." for layer in body.layers]
        self._wanted = [s for p in prefixes for s in self._sites if s.name.startswith(p)]
        if len(self._wanted) != self._depth:
            raise ReachError(f"{NAME} needs one attention in each layer of the language model")
        rope = getattr(body.config, "rope_parameters", None) or {}
        own = "mrope_section" in rope or hasattr(model.config.vision_config, "spatial_merge_size")
        if self.positions == "renumber" and own:
            raise InputError(
                "this model gives rows and columns of an image positions of their own, which "
                'cannot be renumbered: use positions="keep"'
            )
        self._renumber = self.positions == "renumber" or (self.positions == "auto" and not own)
        deep = getattr(model.config.vision_config, "deepstack_visual_indexes", None) or []
        self._first = max(1, len(deep))
        self._tower, self._fixed, undo = None, None, []
        if self._has_encoder_cut(model, own):
            vision = model.config.vision_config
            self._fixed = (vision.image_size // vision.patch_size) ** 2
            self._plan(self._fixed)
            undo += self._attach_tower(model)
        elif self.encoder is not None or self.stages == "encoder":
            raise InputError(
                f"the encoder of {type(model).__name__} cannot be cut (LLaVA-1.5 with one feature "
                "layer can): give cuts alone, or tokens with the progressive stages"
            )
        for n in (self._by_hand or Plan(None, {})).cuts:
            self._check_layer(n)
        undo.append(model.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        for n, layer in enumerate(body.layers):
            undo.append(layer.register_forward_pre_hook(self._at(n), with_kwargs=True).remove)
        undo.append(body.layers[-1].register_forward_hook(self._leave).remove)
        undo.append(self._close)
        return undo

    def _close(self) -> None:
        """No layer of the cache stays open after a pass that an error ended."""
        for layer in (self._cache or {}).values():
            layer.open = False

    def _has_encoder_cut(self, model: Any, own: bool) -> bool:
        config = model.config
        if self._by_hand is not None and self._by_hand.encoder is None:
            return False
        if self.stages == "fastv" or own or hasattr(config, "image_grid_pinpoints"):
            return False
        vision = config.vision_config
        plain = all(isinstance(getattr(vision, n, None), int) for n in ("image_size", "patch_size"))
        single = isinstance(getattr(config, "vision_feature_layer", None), int)
        strategy = getattr(config, "vision_feature_select_strategy", None)
        fits = (strategy == "default") == has_class_token(model)
        inner = getattr(model, "model", model)
        return plain and single and fits and hasattr(inner, "multi_modal_projector")

    def _attach_tower(self, model: Any) -> list[Callable[[], None]]:
        inner = getattr(model, "model", model)
        names = {id(m): n for n, m in model.named_modules()}
        own = [s for s in self._sites if s.name.startswith(names[id(inner.vision_tower)] + ".")]
        feature = model.config.vision_feature_layer
        index = len(own) + feature if feature < 0 else feature - 1
        if not 0 <= index < len(own):
            raise InputError(f"the vision tower has no layer for vision_feature_layer={feature}")
        self._tower, self._has_class = own[index], has_class_token(model)
        block = model.get_submodule(own[index].name.rsplit(".", 1)[0])
        return [
            block.register_forward_hook(self._see_class).remove,
            inner.multi_modal_projector.register_forward_pre_hook(self._cut_tower).remove,
            inner.multi_modal_projector.register_forward_hook(self._fill).remove,
        ]

    def _plan(self, image_tokens: int) -> Plan:
        """The cuts of an image of so many tokens."""
        tower = self._fixed is not None
        if self._by_hand is not None:
            plan = self._by_hand
        elif self.stages == "progressive":
            plan = schedule(self._mean(), image_tokens, self._depth, tower)
        else:
            layer = 0 if self.stages == "encoder" else 2
            plan = one_cut(self._mean(), image_tokens, self._depth, layer)
        plan.check(image_tokens, self._depth, self.merge)
        for n in plan.cuts:
            self._check_layer(n)
        return plan

    def _mean(self) -> float:
        assert self.tokens is not None
        return self.tokens

    def _check_layer(self, layer: int) -> None:
        if not 0 < layer < self._depth:
            raise InputError(
                f"cuts lie inside the model, at layers 1 to {self._depth - 1}, not {layer}"
            )
        if layer < self._first:
            raise InputError(
                f"this model adds image features to its first {self._first} layers: cut from layer "
                f"{self._first} on, not {layer}"
            )

    def cache(self, cache: Any) -> None:
        self._cache = None
        if not self._idle and cache is not None:
            self._cache = layers(cache, self._wanted, NAME, lambda site: ShortLayer())

    # -- a pass ------------------------------------------------------------------------------------
    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._body.training and getattr(self._body, "gradient_checkpointing", False):
            raise ReachError(
                f"{NAME} cannot repeat a layer whose input it shortened: turn gradient "
                "checkpointing off"
            )
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        images = locate(module, {**kwargs, "input_ids": ids})
        self._frame, self._new = None, images.live
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            if images.count:
                raise InputError(
                    "an image in a later turn cannot be cut over the cache of an earlier one: read "
                    "the whole conversation with a new cache"
                )
            return
        labels = kwargs.get("labels")
        if labels is not None and bool((labels[images.number >= 0] != -100).any()):
            raise InputError("labels lie on image tokens, which are dropped: set them to -100")
        self._counts, self._kept = {}, [[[] for _ in row] for row in images.grids]
        if not images.count:
            return
        columns = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
        source = columns.masked_fill(images.number >= 0, -2).masked_fill(~images.live, -1)
        spans = [images.spans(row) for row in range(len(ids))]
        for a, b in {s for row in spans for s in row}:
            self._plan(b - a)  # raises before any layer runs
        self._frame = _Frame(images, source, columns.clone(), spans, self._kept)

    def _at(self, n: int) -> Callable[..., Any]:
        """The hook before layer n."""

        def before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            frame = self._frame
            if frame is None:
                return self._go_on(n, args, kwargs)
            x = args[0] if args else kwargs["hidden_states"]
            if n == 0:
                frame.rotary = kwargs["position_embeddings"]
                if self._tower is not None:
                    x = self._after_tower(frame, x)
            elif any(n in self._plan(b - a).cuts for a, b in self._whole(frame)):
                x = self._cut(frame, n, layer, x, kwargs)
            self._counts[n] = [[b - a for a, b in row] for row in frame.spans]
            if self._cache is not None:
                own = self._cache[self._wanted[n].layer]
                if frame.changed:
                    own.live = frame.live
                    own.removed = frame.images.live.sum(-1) - frame.live.sum(-1)
                    own.gap = frame.images.live.shape[1] - x.shape[1]
            if not frame.changed:
                return None
            kwargs = {**kwargs, **self._settings(frame, kwargs)}
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x}

        return before

    @staticmethod
    def _whole(frame: _Frame) -> list[Size]:
        return [s for row in range(len(frame.spans)) for s in frame.images.spans(row)]

    def _settings(self, frame: _Frame, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What a layer gets beside the shortened states."""
        batch, count = frame.source.shape
        at = frame.place.clamp_min(0)[..., None]
        rotary = tuple(
            x.expand(batch, -1, -1).gather(1, at.expand(-1, -1, x.shape[-1])) for x in frame.rotary
        )
        if frame.mask is None:
            live = frame.live
            whole = bool(live.all())
            mask = Mask.causal() if whole else Mask.causal() & Mask.padding(live)
            frame.mask = Handed.of(mask, None if whole else live, (0, 0), (batch, count, count))
        made: dict[str, Any] = {"position_embeddings": rotary, "attention_mask": frame.mask}
        ids = kwargs.get("position_ids")
        if torch.is_tensor(ids) and ids.dim() == 2:
            made["position_ids"] = ids.expand(batch, -1).gather(1, frame.place.clamp_min(0))
        return made

    def _go_on(self, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer of a pass that goes on with a cache: its own positions, mask and length."""
        own = None if self._cache is None else self._cache[self._wanted[n].layer]
        if own is None or own.live is None or own.removed is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        held, batch, new = own.live.shape[1], len(x), x.shape[1]
        own.live = torch.cat([own.live, self._new.to(own.live.device)], 1)
        mask = Mask.causal() & Mask.padding(own.live)
        live = None if bool(self._new.all()) else self._new
        made: dict[str, Any] = {
            "attention_mask": Handed.of(mask, live, (held, 0), (batch, new, held + new))
        }
        ids = kwargs.get("position_ids")
        if self._renumber:
            if not torch.is_tensor(ids) or ids.dim() != 2:
                raise ReachError(
                    "this language model does not tell its layers the positions, which "
                    'renumbering needs: use positions="keep"'
                )
            ids = ids.expand(batch, -1) - own.removed[:, None]
            made["position_ids"] = ids
            made["position_embeddings"] = self._body.rotary_emb(x, position_ids=ids)
        return args, {**kwargs, **made}

    def _leave(self, layer: Any, args: tuple[Any, ...], out: Any) -> Any:
        """After the last layer: every token back at the place it had; dropped ones are zeros."""
        frame, self._frame = self._frame, None
        if frame is None or not frame.changed:
            return None
        x = out[0] if isinstance(out, tuple) else out
        full = x.new_zeros(len(x), frame.images.live.shape[1], x.shape[-1])
        target = frame.source.clone()
        for row, spans in enumerate(frame.spans):
            for (a, b), (_, end) in zip(spans, frame.images.spans(row)):
                target[row, a:b] = torch.arange(end - (b - a), end, device=target.device)
        rows, columns = (target >= 0).nonzero(as_tuple=True)
        full = full.index_put((rows, target[rows, columns]), x[rows, columns])
        return (full, *out[1:]) if isinstance(out, tuple) else full

    # -- the cuts ----------------------------------------------------------------------------------
    def _cut(self, frame: _Frame, n: int, layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The cut before layer n of the language model."""
        call = None
        if self.score != "random" or self.merge:
            with torch.no_grad():
                call = self._call(frame, n, layer, x, kwargs)
        chosen: list[list[Groups | None]] = []
        for row, spans in enumerate(frame.spans):
            chosen.append([])
            start = int(frame.live[row].int().argmax())
            for image, (whole, span) in enumerate(zip(frame.images.spans(row), spans)):
                size = self._plan(whole[1] - whole[0]).cuts.get(n)
                groups = None
                if size is not None:
                    with torch.no_grad():
                        score = self._score(call, row, start, span, n)
                        key = None if call is None else call.k[row, :, span[0] : span[1]].mean(0)
                    groups = self._choose(score, key, size)
                    self._record(frame, n, row, image, groups, size)
                chosen[-1].append(groups)
        return self._shorten(frame, x, chosen)

    def _score(self, call: Call | None, row: int, start: int, span: Size, n: int) -> Tensor:
        if self.score == "random" or call is None:
            return self._random(n, span[1] - span[0])
        if self.score == "text":
            return text_score(call, row, start, span)
        return visual_score(call, row, start, span, self.score_mask)

    def _random(self, n: int, count: int) -> Tensor:
        make = torch.Generator().manual_seed(self.seed * 1_000_003 + n)
        return torch.rand(count, generator=make)

    def _choose(self, score: Tensor, key: Tensor | None, size: Size) -> Groups:
        if not self.merge or key is None:
            return choose(score, score[:, None], sum(size), 0)
        return choose(score, key, *size)

    def _record(
        self, frame: _Frame, n: int, row: int, image: int, groups: Groups, size: Size
    ) -> None:
        """Note which patches the new tokens of an image stand for."""
        a, b = frame.spans[row][image]
        done = frame.kept[row][image]
        before = done[-1].groups if done else tuple((m,) for m in range(b - a))
        members = tuple(tuple(sorted(m for g in own for m in before[g])) for own in groups)
        done.append(Kept(n, size[0] if self.merge else sum(size), members))

    def _call(self, frame: _Frame, n: int, layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Call:
        """The attention call that layer n would make of these states, before the cut."""
        norm = getattr(layer, "input_layernorm", None)
        if norm is None:
            raise ReachError(
                f"{type(layer).__name__} has no input_layernorm, and {NAME} needs its queries and "
                "keys before the layer runs"
            )
        attention = getattr(layer, self._wanted[n].name.split(".")[-1])
        settings = {k: v for k, v in kwargs.items() if k not in ("hidden_states", "use_cache")}
        settings["past_key_values"] = None
        if frame.changed:
            settings |= self._settings(frame, kwargs)
        return capture(attention, lambda: attention(hidden_states=norm(x), **settings))

    def _shorten(self, frame: _Frame, x: Tensor, chosen: list[list[Groups | None]]) -> Tensor:
        """Put the new tokens of every image between the texts of its row, padding to the left."""
        rows: list[tuple[Tensor, Tensor, Tensor]] = []
        spans: list[list[Size]] = []
        for row, own in enumerate(frame.spans):
            parts: list[tuple[Tensor, Tensor, Tensor]] = []
            spans.append([])
            at = length = 0
            # the text before each image, the image, and the text after the last
            for image, (a, b) in enumerate([*own, (x.shape[1], x.shape[1])]):
                live = frame.live[row, at:a]
                here = (x[row, at:a], frame.source[row, at:a], frame.place[row, at:a])
                parts.append((here[0][live], here[1][live], here[2][live]))
                length, at = length + len(parts[-1][0]), b
                if image == len(own):
                    break
                groups = chosen[row][image]
                groups = [[m] for m in range(b - a)] if groups is None else groups
                source = frame.source.new_full((len(groups),), -2)
                place = frame.place[row, a:b][[g[0] for g in groups]]
                parts.append((gather(x[row, a:b], groups), source, place))
                spans[-1].append((length, length + len(groups)))
                length += len(groups)
            made = [torch.cat([p[part] for p in parts]) for part in range(3)]
            rows.append((made[0], made[1], made[2]))
        return self._pack(frame, rows, spans)

    def _pack(
        self,
        frame: _Frame,
        rows: list[tuple[Tensor, Tensor, Tensor]],
        spans: list[list[Size]],
    ) -> Tensor:
        """One rectangle of the rows' states, sources and places."""
        fill = torch.nn.functional.pad
        most = max(len(states) for states, _, _ in rows)
        pad = [most - len(states) for states, _, _ in rows]
        x = torch.stack([fill(states, (0, 0, p, 0)) for (states, _, _), p in zip(rows, pad)])
        frame.source = torch.stack([fill(s, (p, 0), value=-1) for (_, s, _), p in zip(rows, pad)])
        frame.place = torch.stack([fill(at, (p, 0)) for (_, _, at), p in zip(rows, pad)])
        if self._renumber:
            first = frame.images.live.int().argmax(-1, keepdim=True)
            frame.place = (first + frame.live.cumsum(-1) - 1).clamp_min(0)
        frame.spans = [[(a + p, b + p) for a, b in row] for row, p in zip(spans, pad)]
        frame.changed, frame.mask = True, None
        return x

    # -- the encoder -------------------------------------------------------------------------------
    def after(self, call: Call, state: State) -> State | None:
        if self._tower is not None and call.site.index == self._tower.index:
            with torch.no_grad():
                self._scores = tower_score(call, state.lse, self._has_class)
                self._metric = call.k.mean(1)[:, int(self._has_class) :]
        return None

    def _see_class(self, block: Any, args: tuple[Any, ...], out: Any) -> None:
        x = out[0] if isinstance(out, tuple) else out
        self._class = x[:, :1] if self._has_class else None

    def _cut_tower(self, projector: Any, args: tuple[Any, ...]) -> Any:
        """Cut the features `[images, patches, dim]` before they are projected."""
        assert self._scores is not None and self._metric is not None and self._fixed is not None
        plan, x = self._plan(self._fixed), args[0]
        self._groups = []
        if plan.encoder is None:
            return None
        dominant, contextual = plan.encoder
        with_class = self.keep_cls and self._class is not None
        made = []
        for image in range(len(x)):
            score = self._scores[image]
            if self.score == "random":
                score = self._random(0, len(score))
            size = (dominant - with_class, contextual)
            groups = self._choose(score, self._metric[image], size)
            self._groups.append(groups)
            made.append(gather(x[image], groups))
        short = torch.stack(made)
        if with_class:
            assert self._class is not None
            short = torch.cat([self._class.to(short.dtype), short], 1)
        return (short, *args[1:])

    def _fill(self, projector: Any, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        """As many rows as there are image tokens; those in front are dropped before layer 0, and
        until then say which image this is: beam search may repeat images.
        """
        assert self._fixed is not None
        if not self._groups:
            return None
        full = torch.nn.functional.pad(out, (0, 0, self._fixed - out.shape[1], 0))
        numbers = torch.arange(len(out), device=out.device)
        # small numbers, which every dtype holds exactly
        full[:, 0, :3] = torch.stack([numbers % 100, numbers // 100, numbers * 0 - 1], -1).to(out)
        return full

    def _after_tower(self, frame: _Frame, x: Tensor) -> Tensor:
        """Drop the rows that `_fill` added."""
        assert self._fixed is not None
        size = self._plan(self._fixed).encoder
        if not self._groups or size is None:
            return x
        with_class = self.keep_cls and self._class is not None
        count = sum(size)
        chosen: list[list[Groups | None]] = []
        for row, spans in enumerate(frame.spans):
            chosen.append([])
            for image, (a, b) in enumerate(spans):
                mark = x[row, a].detach()
                turn = int(mark[0]) + 100 * int(mark[1])
                if float(mark[2]) != -1 or bool(mark[3:].any()) or turn >= len(self._groups):
                    raise InputError(
                        "these image features were encoded without VisionDrop: pass the pixels"
                    )
                groups = self._groups[turn]
                chosen[-1].append([[m] for m in range(b - a - count, b - a)])
                members = ((),) * with_class + tuple(tuple(sorted(g)) for g in groups)
                dominant = size[0] if self.merge else count
                frame.kept[row][image].append(Kept(0, dominant, members))
                # the positions that the patches had; the class token takes the first
                own = frame.place[row, a:b].clone()
                frame.place[row, b - count : b] = own[[0] * with_class + [g[0] for g in groups]]
        return self._shorten(frame, x, chosen)

    # -- what was done -----------------------------------------------------------------------------
    def kept(self) -> list[list[list[Kept]]]:
        """Of every row and image of the last prompt what each cut left, in order."""
        return self._kept

    def counts(self) -> list[list[int]]:
        """Image tokens of every image (rows in order) in every layer of the last prompt."""
        each = [[n for row in self._counts[layer] for n in row] for layer in sorted(self._counts)]
        return [list(one) for one in zip(*each)]

    def mean_tokens(self) -> float:
        """Image tokens of one image, averaged over layers and images."""
        each = self.counts()
        if not each:
            raise InputError("nothing was cut yet: run the model on an image first")
        return sum(map(sum, each)) / sum(map(len, each))
