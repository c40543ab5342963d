"""Modality-mutual attention (MMA): image tokens may look at the question that follows them.

Paper: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for
Multimodal LLMs", Wang et al., 2025, arXiv 2503.02597.

Deviations:
- The question ends before the assistant's role token; the released code opens that token too
  (`variant="released"` does so).
- Several images: each sees the question tokens after it (ours; the code takes one image).
- Several turns: an image sees the question of its own turn (`turns="first"`), or those of later
  turns too (`turns="all"`); answers never. The paper's printed rule has no answers in it.
- Without a marker the question is all text of the prompt that carries no label; the released code
  then runs causally without a word.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, State, merge
from regard.errors import InputError, ReachError
from regard.parts.decoding.picks import over, put, take_queries
from regard.parts.vision import decoder, layer_sites, locate
from regard.reach import Call, Handler, Site

from .card import Settings
from .roles import GENERATED, Roles, read_roles, token_ids

# the layers that an MMA acts on now, whichever way it got there
_taken: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(eq=False)
class MMA(Settings, Handler):
    """Open the rectangle image tokens x question of the causal mask; no new parameters.

    The answer stays hidden from the image: that would leak labels in training, and cannot happen in
    generation. A model must be trained with it: switched on in a causally trained model it only
    disturbs.

    Two forms give the same numbers. "merge" adds the State of the rectangle to ordinary causal
    attention, under `regard.apply`. "mask" goes through transformers' own mask factory: under
    `regard.apply`, or with `on(model)` and the model's own attention (sdpa, eager,
    flex_attention), which is the way to train with the ordinary `Trainer`.

    A new turn goes on with the cache: images keep what they saw of their first question. To let
    them see a new question, read the conversation again with a new cache and `turns="all"`.

    >>> import regard
    >>> from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs
    >>> model = tiny_vlm("llava")
    >>> with torch.no_grad(), MMA(form="mask").on(model):
    ...     model(**vlm_inputs("llava", model)).logits.shape
    torch.Size([2, 26, 128])

    Raises:
        InputError: a second MMA on a layer; no marker in a row with an image; labels inside the
            question; a cache of an image whose question is cut off or was read without MMA (its
            states depend on the question: a prefix cache must not be shared between questions);
            packed rows.
        ReachError: an attention that ignores masks (flash attention), layers with a sliding
            window.
    """

    _sites: set[int] = field(default_factory=set, init=False, repr=False)
    _ids: Tensor | None = field(default=None, init=False, repr=False)
    _live: Tensor | None = field(default=None, init=False, repr=False)
    _image: Tensor | None = field(default=None, init=False, repr=False)
    _roles: Roles | None = field(default=None, init=False, repr=False)
    _start: int = field(default=0, init=False, repr=False)
    _cache: Any = field(default=None, init=False, repr=False)
    _mask: Any = field(default=None, init=False, repr=False)
    _all: list[Site] = field(default_factory=list, init=False, repr=False)
    _warned: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule is not None:
            self.variant, self.rule = self.rule.removesuffix("_code"), None
        self._marker, self._user = token_ids(self.marker, "marker"), token_ids(self.user, "user")
        if self._user and not self._marker:
            raise InputError("user ends an answer that marker begins: give marker too")
        if self.variant == "released" and not self._marker:
            raise InputError('variant="released" is about the role token: give marker')

    def sites(self, sites: list[Site]) -> list[Site]:
        self._ids = self._roles = self._cache = self._mask = None
        self._all = [s for s in sites if s.kind == "self"]
        return self._all

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        body = decoder(model, "MMA")
        kinds = getattr(body.config, "layer_types", None) or []
        if any("sliding" in kind for kind in kinds):
            raise ReachError(
                "this language model has layers with a sliding window, and whether an image may "
                "look past it is not settled: MMA takes models without"
            )
        wanted = list(range(len(body.layers))) if self.layers is None else list(self.layers)
        wrong = [n for n in wanted if not 0 <= n < len(body.layers)]
        if wrong:
            raise InputError(
                f"layer {wrong[0]} is out of range: this model has layers 0 to "
                f"{len(body.layers) - 1}"
            )
        twice = [n for n in wanted if body.layers[n] in _taken]
        if twice:
            raise InputError(
                f"MMA acts on layer {twice[0]} already, and a second one would count the question "
                "again: apply one of them"
            )
        layers = {body.layers[n] for n in wanted}
        sites = layer_sites(model, body, self._all)
        self._sites = {sites[n].index for n in wanted if n in sites}
        hooks = [model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        hooks.append(model.register_forward_hook(self._leave))
        if self.form == "mask":
            hooks.append(body.register_forward_pre_hook(self._make, with_kwargs=True))
            for n in wanted:
                hooks.append(body.layers[n].register_forward_pre_hook(self._give, with_kwargs=True))
        _taken.update(layers)
        return [*(hook.remove for hook in hooks), lambda: _taken.difference_update(layers)]

    @contextmanager
    def on(self, model: Any) -> Iterator[MMA]:
        """The model with its own attention and this mask, for training; form "mask" only."""
        if self.form != "mask":
            raise InputError('on(model) goes through masks: make it with form="mask"')
        self.sites([])
        undo = self.attach(model)
        try:
            yield self
        finally:
            for remove in undo:
                remove()

    def report(self) -> dict[str, Any]:
        """Plain data of the last prompt, by row: tokens of images and of questions, and how many
        image tokens a later question is open to.
        """
        roles = self._roles
        if roles is None:
            return {"rows": []}
        columns = (roles.image > 0, roles.question > 0, roles.opened(self.turns))
        counts = zip(*(x.sum(-1).tolist() for x in columns))
        return {"rows": [dict(zip(("image", "question", "opened"), row)) for row in counts]}

    # -- who is who --------------------------------------------------------------------------------
    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins."""
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        start = int(cache.get_seq_length()) if cache is not None else 0
        images = locate(module, {**kwargs, "input_ids": ids})
        positions: Any = kwargs.get("position_ids")
        mask = kwargs.get("attention_mask")
        plain = torch.is_tensor(positions) and positions.dim() == 2 and mask is None
        if plain and bool((positions.diff(dim=-1) != 1).any()):
            raise InputError(
                "these position_ids pack several samples into a row, which MMA would open to each "
                "other: give one sample a row"
            )
        written = start > 0 and ids.shape[1] == 1
        new = torch.full_like(ids, GENERATED) if written else ids.clone()
        image, live = images.number >= 0, images.live
        if start:
            self._go_on(cache, start, len(ids))
            assert self._ids is not None and self._live is not None and self._image is not None
            new = torch.cat([self._ids[:, :start], new], 1)
            image = torch.cat([self._image[:, :start], image], 1)
            live = torch.cat([self._live[:, :start], live], 1)
        self._ids, self._image, self._live, self._start = new, image, live, start
        self._roles = roles = self.roles(new, image, live, kwargs.get("labels"))
        if start and not written:
            # the rows of cached images needed keys that come only now
            old, late = roles.image[:, :start], roles.question[:, start:]
            for turn in range(1, int(old.max()) + 1 if old.numel() else 1):
                if bool(((old == turn).any(-1) & (late == turn).any(-1)).any()):
                    raise InputError(
                        "the image was read before its question was complete, and its states must "
                        "see the question: pass image and question in one forward pass (a prefix "
                        "cache of the image alone cannot be used; if this is no question, name "
                        "marker)"
                    )
        closed = not start and bool(image.any()) and not bool(roles.opened(self.turns).any())
        if closed and not self._warned:
            self._warned = True
            warnings.warn(
                "MMA: no question follows the image, so attention stays causal", stacklevel=2
            )

    def _leave(self, module: Any, args: tuple[Any, ...], out: Any) -> None:
        """Remember which cache this prompt is in."""
        cache = getattr(out, "past_key_values", None)
        self._cache = None if cache is None else weakref.ref(cache)

    def _go_on(self, cache: Any, start: int, batch: int) -> None:
        known = self._cache() if self._cache is not None else None
        if (
            self._ids is None
            or cache is not known
            or len(self._ids) != batch
            or self._ids.shape[1] < start
        ):
            raise InputError(
                "the prompt in this cache is not the last one that MMA read: read it again under "
                "MMA, with a new cache"
            )
        if self._ids.shape[1] > start and self._roles is not None:
            cut = self._roles
            kept = Roles(*(x[:, :start] for x in (cut.image, cut.question, cut.answer)))
            for turn in range(1, int(kept.image.max()) + 1 if kept.image.numel() else 1):
                seen = kept.image == turn
                keys = cut.question[:, start:]
                gone = keys == turn if self.turns == "first" else keys >= turn
                if bool((seen.any(-1) & gone.any(-1)).any()):
                    raise InputError(
                        "the cache was cut inside the question that its image states have seen: "
                        "under MMA a cached image belongs to its question, so read image and "
                        "question again"
                    )

    def roles(
        self, ids: Tensor, image: Tensor, live: Tensor, labels: Tensor | None = None
    ) -> Roles:
        """Read the roles off the tokens, `[batch, tokens]` each; public, to look at and to draw."""
        released = self.variant == "released"
        return read_roles(ids, image, live, labels, self._marker, self._user, released)

    # -- the two forms -----------------------------------------------------------------------------
    def _make(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the mask of this pass with transformers' own factory."""
        from transformers.masking_utils import create_causal_mask

        self._mask = None
        roles, embeds = self._roles, kwargs.get("inputs_embeds")
        if roles is None or embeds is None or not self._acts(roles):
            return
        how = str(body.config._attn_implementation)
        if "flash" in how:
            raise ReachError(
                f'{how} ignores masks: load the model with attn_implementation="sdpa", or use '
                'form="merge" under regard.apply'
            )
        given = kwargs.get("attention_mask")
        if isinstance(given, dict) or (given is not None and given.dim() != 2):
            raise InputError(
                "the attention mask is ready-made (a static cache does that), and MMA cannot open "
                'it: use a dynamic cache, or form="merge"'
            )
        turns = list(roles.pairs(self.turns, self.mutual))
        rows = torch.stack([r for r, _ in turns], -1)
        keys = torch.stack([k for _, k in turns], -1)

        def opened(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            return (rows[b, q] & keys[b, kv]).any(-1)

        self._mask = create_causal_mask(
            config=body.config,
            inputs_embeds=embeds,
            attention_mask=given,
            past_key_values=kwargs.get("past_key_values"),
            or_mask_function=opened,
        )

    def _give(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._mask is None:
            return None
        return args, {**kwargs, "attention_mask": self._mask}

    def _acts(self, roles: Roles) -> bool:
        """Whether this pass has a query with a rectangle of its own."""
        return any(
            bool((rows[:, self._start :].any(-1) & keys[:, self._start :].any(-1)).any())
            for rows, keys in roles.pairs(self.turns, self.mutual)
        )

    def after(self, call: Call, state: State) -> State | None:
        roles = self._roles
        if self.form == "mask" or call.site.index not in self._sites or roles is None:
            return None
        if not self._acts(roles):
            return None
        if call.positions is not None:
            raise ReachError(
                f"the heads of {call.site.name} look at different keys under another method, which "
                "MMA cannot follow: apply MMA without it"
            )
        if call.query_offset != self._start or (
            call.query_offset + call.q.shape[2] != roles.image.shape[1]
        ):
            raise ReachError(
                "another method changed which tokens this layer reads, and MMA knows image and "
                "question by their place in the prompt: apply MMA without it"
            )
        own = slice(call.query_offset, call.query_offset + call.q.shape[2])
        seen = slice(call.key_offset, call.key_offset + call.k.shape[2])
        # only later keys: the earlier ones are in the causal State already
        ahead = call.change(mask=Mask.band(-1, None))
        for rows, keys in roles.pairs(self.turns, self.mutual):
            rows, keys = rows[:, own], keys[:, seen]
            if not bool((rows.any(-1) & keys.any(-1)).any()):
                continue
            few, places, ok = take_queries(ahead, rows)
            out, lse = state.out, state.lse
            at = places[:, None].expand(-1, lse.shape[1], -1)
            before = State(
                out.gather(2, at[..., None].expand(-1, -1, -1, out.shape[-1])), lse.gather(2, at)
            )
            both = merge(before, over(few, keys))
            state = State(put(out, both.out, places, ok), put(lse, both.lse, places, ok))
        return state
