"""Modality-mutual attention (MMA): image tokens may look at the question that follows them.

Paper: "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for
Multimodal LLMs", Wang et al., 2025, arXiv 2503.02597.

Deviations:
- The question ends before the assistant's role token; the released code opens that token too
  (`rule="released_code"` does so).
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
from regard.parts.vision import decoder, locate
from regard.reach import Call, Handler, Site

# the layers that an MMA acts on now, whichever way it got there
_taken: weakref.WeakSet[Any] = weakref.WeakSet()
GENERATED = -1  # stands for the id of a token that the model wrote itself


@dataclass(frozen=True)
class Roles:
    """Who is who in a batch, `[batch, tokens]` each.

    Attributes:
        image: 1 + turn of image tokens, 0 elsewhere.
        question: 1 + turn of text that is no answer, 0 elsewhere.
        answer: tokens of answers, from the assistant's role token on.
    """

    image: Tensor
    question: Tensor
    answer: Tensor

    def opened(self, turns: str) -> Tensor:
        """For every image token, whether a later question token is open to it."""
        later = [self.question.flip(-1).eq(t).cumsum(-1).flip(-1) > 0 for t in self._turns()]
        found = torch.zeros_like(self.answer)
        for t, has in zip(self._turns(), later):
            sees = self.image == t if turns == "first" else (self.image > 0) & (self.image <= t)
            found |= sees & has
        return found

    def _turns(self) -> list[int]:
        return list(range(1, int(max(self.image.max(), self.question.max())) + 1))

    def pairs(self, turns: str, mutual: str) -> Iterator[tuple[Tensor, Tensor]]:
        """The rectangles: which queries and which keys, disjoint, to be cut to keys > queries."""
        for t in self._turns():
            if turns == "first":
                yield self.image == t, self.question == t
            else:
                yield (self.image > 0) & (self.image <= t), self.question == t
            if mutual == "both":
                yield self.question == t, self.image == t


@dataclass(eq=False)
class MMA(Handler):
    """Open the rectangle image tokens x question of the causal mask; no new parameters.

    The answer stays hidden from the image: that would leak labels in training, and cannot happen in
    generation. A model must be trained with it: switched on in a causally trained model it only
    disturbs.

    Two forms give the same numbers. "merge" adds the State of the rectangle to ordinary causal
    attention, under `regard.apply`. "mask" goes through transformers' own mask factory: under
    `regard.apply`, or with `on(model)` and the model's own attention (sdpa, eager,
    flex_attention), which is the way to train with the ordinary `Trainer`.

    Args:
        marker: token ids of the assistant's role; the answer begins there. When None, answers are
            what `labels` mark, and while generating what the model writes.
        user: token ids that begin a user's turn and end an answer; when None nothing after the
            first marker is open.
        turns: "first", an image sees the question of its turn, or "all", those of later turns too.
        mutual: "image_to_text", or "both": text may look at later images of its turn too.
        layers: which layers; all when None.
        rule: "paper", or "released_code": the first token of the marker is open too.
        form: "merge" or "mask".

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

    marker: int | Sequence[int] | None = None
    user: int | Sequence[int] | None = None
    turns: str = "first"
    mutual: str = "image_to_text"
    layers: Sequence[int] | None = None
    rule: str = "paper"
    form: str = "merge"
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
        for name, value, known in (
            ("turns", self.turns, ("first", "all")),
            ("mutual", self.mutual, ("image_to_text", "both")),
            ("rule", self.rule, ("paper", "released_code")),
            ("form", self.form, ("merge", "mask")),
        ):
            if value not in known:
                raise InputError(f"{name} is one of {', '.join(known)}, not {value!r}")
        self._marker, self._user = _ids(self.marker, "marker"), _ids(self.user, "user")
        if self._user and not self._marker:
            raise InputError("user ends an answer that marker begins: give marker too")
        if self.rule == "released_code" and not self._marker:
            raise InputError('rule="released_code" is about the role token: give marker')

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
        own = {body.layers[n] for n in wanted}
        names = {id(m): n for n, m in model.named_modules()}
        prefixes = tuple(names[id(layer)] + "." for layer in own)
        self._sites = {s.index for s in self._all if s.name.startswith(prefixes)}
        hooks = [model.register_forward_pre_hook(self._enter, with_kwargs=True)]
        hooks.append(model.register_forward_hook(self._leave))
        if self.form == "mask":
            hooks.append(body.register_forward_pre_hook(self._make, with_kwargs=True))
            for n in wanted:
                hooks.append(body.layers[n].register_forward_pre_hook(self._give, with_kwargs=True))
        _taken.update(own)
        return [*(hook.remove for hook in hooks), lambda: _taken.difference_update(own)]

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
        if not start and bool(image.any()) and not bool(roles.opened(self.turns).any()):
            self._warn("MMA: no question follows the image, so attention stays causal")

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
        if labels is not None and labels.shape != ids.shape:
            raise InputError(
                f"labels {tuple(labels.shape)} and input_ids {tuple(ids.shape)} differ in shape"
            )
        labelled = torch.zeros_like(live) if labels is None else (labels != -100) & live
        answer = ids == GENERATED
        for row in range(len(ids)):
            if not self._marker:
                answer[row] |= labelled[row]
                continue
            starts = _find(ids[row], self._marker)
            if not starts and bool(image[row].any()):
                raise InputError(
                    f"row {row} has an image but no assistant marker {list(self._marker)}, so "
                    "where its answer begins is not known: check marker against the chat template"
                )
            ends = _find(ids[row], self._user) if self._user else []
            for start in starts:
                end = next((e for e in ends if e > start), ids.shape[1])
                answer[row, start + (self.rule == "released_code") : end] = True
        if bool((labelled & ~answer).any()):
            row = int((labelled & ~answer).any(-1).int().argmax())
            raise InputError(
                f"row {row} has labels before its assistant marker: an image that sees them would "
                "know the answer; mask them with -100"
            )
        begins = answer[:, 1:] < answer[:, :-1]  # a turn ends where an answer does
        turn = 1 + torch.nn.functional.pad(begins.long().cumsum(-1), (1, 0))
        text = live & ~image & ~answer
        return Roles(turn * image, turn * text, answer)

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

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, stacklevel=2)


def mma_mask(roles: Roles, turns: str = "first", mutual: str = "image_to_text") -> Mask:
    """The whole mask as a `core.Mask`, to look at.

    >>> image, question = torch.tensor([[0, 1, 1, 0, 0]]), torch.tensor([[1, 0, 0, 1, 0]])
    >>> print(mma_mask(Roles(image, question, torch.tensor([[0, 0, 0, 0, 1]]) > 0)).draw(5))
    ■ ⬚ ⬚ ⬚ ⬚
    ■ ■ ⬚ ■ ⬚
    ■ ■ ■ ■ ⬚
    ■ ■ ■ ■ ⬚
    ■ ■ ■ ■ ■
    """
    count = roles.image.shape[1]
    allowed = torch.ones(count, count, dtype=torch.bool).tril()[None]
    for rows, keys in roles.pairs(turns, mutual):
        allowed = allowed | (rows[:, :, None] & keys[:, None])
    return Mask.dense(allowed[:, None])


def _ids(given: int | Sequence[int] | None, name: str) -> tuple[int, ...]:
    if given is None:
        return ()
    found = (given,) if isinstance(given, int) else tuple(int(n) for n in given)
    if not found:
        raise InputError(f"{name} is empty: give the token ids of the role, or leave it out")
    return found


def _find(ids: Tensor, pattern: tuple[int, ...]) -> list[int]:
    """Where the pattern begins."""
    if len(ids) < len(pattern):
        return []
    windows = ids.unfold(0, len(pattern), 1)
    found: list[int] = (
        (windows == torch.tensor(pattern, device=ids.device)).all(-1).nonzero()[:, 0].tolist()
    )
    return found
