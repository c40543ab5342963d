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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, State
from regard.errors import InputError, ReachError
from regard.parts.decoding.cache import layers
from regard.parts.vision import Encoded, Images, decoder, layer_sites, locate
from regard.reach import Call, Handler, Site
from regard.reach.dispatch import capture
from regard.reach.transformers import Handed

from .cache import NAME, ShortLayer
from .card import RATIO, Settings, Size
from .frame import Frame, Groups
from .plan import (
    Kept,
    Plan,
    choose,
    one_cut,
    random_score,
    schedule,
    text_score,
    visual_score,
)
from .tower import TowerCut, has_cut


@dataclass(eq=False)
class VisionDrop(Settings, Handler):
    """Keep the image tokens that image tokens look at, and merge the others into a few.

    At each cut the best `dominant` tokens stay, in their order; the others go to `contextual`
    targets among them by cosine of their keys, and each target grows by their mean. One cut lies in
    the vision encoder (LLaVA-1.5; by attention of the class token, or of all patches), the others
    between layers of the language model. No training. `budget` or `ratio` gives a schedule of cuts
    (`plan.schedule`); `encoder` (whose dominant tokens count the class token) and `cuts` name them
    by hand.

    After a run `kept()` tells what every cut left of every image, `counts()` the image tokens of
    every layer.

    >>> import regard
    >>> from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs
    >>> model = tiny_vlm("llava")
    >>> with torch.no_grad(), regard.apply(model, method := VisionDrop(budget=7)):
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

    _sites: list[Site] = field(default_factory=list, init=False, repr=False)
    _wanted: list[Site] = field(default_factory=list, init=False, repr=False)
    _frame: Frame | None = field(default=None, init=False, repr=False)
    _kept: list[list[list[Kept]]] = field(default_factory=list, init=False, repr=False)
    _counts: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False)
    _images: Images | None = field(default=None, init=False, repr=False)
    _encoded: Encoded = field(init=False, repr=False)
    _cache: Any = field(default=None, init=False, repr=False)
    _tower: TowerCut | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        by_hand = self.encoder is not None or self.cuts is not None
        given = [n for n in (self.budget, self.ratio, self.tokens) if n is not None]
        if len(given) + by_hand > 1:
            raise InputError("give budget, or ratio, or encoder and cuts by hand: one of the three")
        if self.tokens is not None and self.tokens < 1:
            self.ratio, self.tokens = self.tokens, None
        elif self.tokens is not None:
            whole = int(self.tokens) == self.tokens
            self.budget, self.tokens = int(self.tokens) if whole else self.tokens, None  # type: ignore[assignment]
        elif not given and not by_hand:
            self.ratio = RATIO
        self._by_hand = Plan(self.encoder, dict(self.cuts or {})) if by_hand else None
        self._mean = float(self.budget or self.ratio or 0)
        self._idle = self.ratio == 1

    # -- the model ---------------------------------------------------------------------------------
    def sites(self, sites: list[Site]) -> list[Site]:
        self._sites = [s for s in sites if s.kind == "self"]
        self._frame, self._kept, self._counts, self._images = None, [], {}, None
        return self._sites

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        body = decoder(model, NAME)
        if self._idle:
            return ()
        vision, kinds = model.config.vision_config, getattr(body.config, "layer_types", None) or []
        if any("sliding" in kind for kind in kinds):
            raise ReachError(
                f"this language model has layers with a sliding window, and {NAME} changes which "
                "tokens lie in it: name a model without"
            )
        self._body, self._depth = body, len(body.layers)
        self._wanted = [s for _, s in sorted(layer_sites(model, body, self._sites).items())]
        if len(self._wanted) != self._depth:
            raise ReachError(f"{NAME} needs one attention in each layer of the language model")
        rope = getattr(body.config, "rope_parameters", None) or {}
        by_rows = "mrope_section" in rope or hasattr(vision, "spatial_merge_size")
        if self.positions == "renumber" and by_rows:
            raise InputError(
                "this model gives rows and columns of an image positions of their own, which "
                'cannot be renumbered: use positions="keep"'
            )
        self._renumber = self.positions == "renumber" or (self.positions == "auto" and not by_rows)
        self._first = max(1, len(getattr(vision, "deepstack_visual_indexes", None) or []))
        self._encodes = not by_rows and self._cuts_encoder() and has_cut(model)
        self._tower, undo = None, []
        if self._encodes:
            plan = self._plan((vision.image_size // vision.patch_size) ** 2)
            if plan.encoder is not None:
                self._tower = TowerCut(model, self._sites, plan.encoder, self)
                undo += self._tower.attach()
        elif self.encoder is not None or self.stages == "encoder":
            raise InputError(
                f"the encoder of {type(model).__name__} cannot be cut (LLaVA-1.5 with one feature "
                "layer can): give cuts alone, or a budget with the progressive stages"
            )
        self._check_layers(self._by_hand or Plan(None, {}))
        self._encoded = Encoded(model)
        undo.append(self._encoded.remove)
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

    def _cuts_encoder(self) -> bool:
        """Whether the settings ask for a cut at the encoder where a model has one."""
        return self.stages != "fastv" and (self._by_hand is None or self.encoder is not None)

    def _plan(self, image_tokens: int) -> Plan:
        """The cuts of an image of so many tokens."""
        if self._by_hand is not None:
            plan = self._by_hand
        elif self.stages == "progressive":
            plan = schedule(self._mean, image_tokens, self._depth, self._encodes)
        else:
            layer = 0 if self.stages == "encoder" else 2
            plan = one_cut(self._mean, image_tokens, self._depth, layer)
        plan.check(image_tokens, self.merge)
        self._check_layers(plan)
        return plan

    def _check_layers(self, plan: Plan) -> None:
        for layer in plan.cuts:
            if not 0 < layer < self._depth:
                raise InputError(
                    f"cuts lie inside the model, at layers 1 to {self._depth - 1}, not {layer}"
                )
            if layer < self._first:
                raise InputError(
                    f"this model adds image features to its first {self._first} layers: cut from "
                    f"layer {self._first} on, not {layer}"
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
        images = locate(module, self._encoded.complete({**kwargs, "input_ids": ids}))
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
        frame = Frame.of(images, self._renumber)
        self._counts, self._kept, self._images = {}, frame.kept, images
        if images.count:
            for length in frame.lengths:
                self._plan(length)  # raises before any layer runs
            self._frame = frame

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
                    x = self._tower.drop_filled(frame, x)
            elif any(n in self._plan(length).cuts for length in frame.lengths):
                x = self._cut(frame, n, layer, x, kwargs)
            self._counts[n] = frame.counts
            if not frame.changed:
                return None
            if self._cache is not None:
                held = self._cache[self._wanted[n].layer]
                held.live = frame.live
                held.removed = frame.images.live.sum(-1) - frame.live.sum(-1)
                held.gap = frame.images.live.shape[1] - x.shape[1]
            kwargs = {**kwargs, **frame.given(kwargs)}
            if args:
                return (x, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": x}

        return before

    def _go_on(self, n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer of a pass that goes on with a cache: its own positions, mask and length."""
        held = None if self._cache is None else self._cache[self._wanted[n].layer]
        if held is None or held.live is None or held.removed is None:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        before, batch, new = held.live.shape[1], len(x), x.shape[1]
        held.live = torch.cat([held.live, self._new.to(held.live.device)], 1)
        mask = Mask.causal() & Mask.padding(held.live)
        live = None if bool(self._new.all()) else self._new
        changed: dict[str, Any] = {
            "attention_mask": Handed.of(mask, live, (before, 0), (batch, new, before + new))
        }
        ids = kwargs.get("position_ids")
        if self._renumber:
            if not torch.is_tensor(ids) or ids.dim() != 2:
                raise ReachError(
                    "this language model does not tell its layers the positions, which "
                    'renumbering needs: use positions="keep"'
                )
            ids = ids.expand(batch, -1) - held.removed[:, None]
            changed["position_ids"] = ids
            changed["position_embeddings"] = self._body.rotary_emb(x, position_ids=ids)
        return args, {**kwargs, **changed}

    def _leave(self, layer: Any, args: tuple[Any, ...], out: Any) -> Any:
        """After the last layer."""
        frame, self._frame = self._frame, None
        if frame is None or not frame.changed:
            return None
        if isinstance(out, tuple):
            return (frame.restored(out[0]), *out[1:])
        return frame.restored(out)

    def after(self, call: Call, state: State) -> State | None:
        if self._tower is not None and call.site.index == self._tower.site.index:
            self._tower.look(call, state)
        return None

    # -- a cut -------------------------------------------------------------------------------------
    def _cut(self, frame: Frame, n: int, layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The cut before layer n of the language model."""
        with torch.no_grad():
            call = None
            if self.score != "random" or self.merge:
                call = self._call(frame, n, layer, x, kwargs)
            chosen: list[list[Groups | None]] = []
            for row, spans in enumerate(frame.spans):
                chosen.append([])
                for image, (whole, span) in enumerate(zip(frame.images.spans(row), spans)):
                    size = self._plan(whole[1] - whole[0]).cuts.get(n)
                    groups = None
                    if size is not None:
                        groups = self._groups(frame, call, n, row, span, size)
                        dominant = size[0] if self.merge else sum(size)
                        frame.record(n, row, image, groups, dominant)
                    chosen[-1].append(groups)
        return frame.shorten(x, chosen)

    def _groups(
        self, frame: Frame, call: Call | None, n: int, row: int, span: Size, size: Size
    ) -> Groups:
        """Which tokens of an image make up each new one."""
        start = int(frame.live[row].int().argmax())
        if self.score == "random" or call is None:
            score = random_score(self.seed, n, span[1] - span[0])
        elif self.score == "text":
            score = text_score(call, row, start, span)
        else:
            score = visual_score(call, row, start, span, self.score_mask)
        keys = None if call is None else call.k[row, :, span[0] : span[1]].mean(0)
        return choose(score, keys, *size, merge=self.merge)

    def _call(self, frame: Frame, n: int, layer: Any, x: Tensor, kwargs: dict[str, Any]) -> Call:
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
            settings |= frame.given(kwargs)
        return capture(attention, lambda: attention(hidden_states=norm(x), **settings))

    # -- what was done -----------------------------------------------------------------------------
    def kept(self) -> list[list[list[Kept]]]:
        """Of every row and image of the last prompt what each cut left, in order."""
        return self._kept

    def counts(self) -> list[list[int]]:
        """Image tokens of every image (rows in order) in every layer of the last prompt."""
        return [list(one) for one in zip(*(self._counts[n] for n in sorted(self._counts)))]

    def mean_tokens(self) -> float:
        """Image tokens of one image, averaged over layers and images."""
        each = self.counts()
        if not each:
            raise InputError("nothing was cut yet: run the model on an image first")
        return sum(map(sum, each)) / sum(map(len, each))

    def report(self) -> dict[str, Any]:
        """Plain data of the last prompt (row 0): image tokens by layer, and of every image what
        each cut left, as the patches that each token stands for.
        """
        counts, images = self.counts(), []
        if counts and self._images is not None:
            spans = self._images.spans(0)
            patch = self._images.patch[0].tolist()
            for grid, (a, b), tokens, cuts in zip(
                self._images.grids[0], spans, counts, self._kept[0]
            ):
                shows = patch[a:b]  # of each token, which a separator of rows does not
                images.append(
                    {
                        "grid": None if grid is None else list(grid),
                        "tokens_by_layer": tokens,
                        "cuts": [
                            {
                                "before_layer": cut.layer,
                                "dominant": cut.dominant,
                                "tokens": [
                                    [shows[n] for n in group if shows[n] >= 0]
                                    for group in cut.groups
                                ],
                            }
                            for cut in cuts
                        ],
                    }
                )
        return {"mean_tokens": self.mean_tokens() if counts else None, "images": images}
