"""Where an attention happens (Site) and what goes into it (Call)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from regard.core import Fact, Mask, State, attend, attend_and_measure
from regard.core.facts import Sums

from .denoising import Denoising


@dataclass(frozen=True)
class Site:
    """One attention module of a model.

    Attributes:
        index: place among all attention modules of the model, in order of definition.
        name: path of the module, as in `model.named_modules()`.
        layer: layer number within its part.
        part: the stack it belongs to, for example "model.layers" or "model.decoder.layers cross".
        kind: "self" or "cross"; "joint" where text and image attend to each other in one call.
        text: whether a denoiser's image reads its prompt here.
    """

    index: int
    name: str
    layer: int
    part: str
    kind: str
    text: bool = False


@dataclass(frozen=True)
class Facts:
    """Facts of a call that are summed up in the sweep which computes its State.

    Attributes:
        handler: who asked for them.
        offsets: position of the first query and of the first key, as the facts count them.
        record: what the handler knows of the run so far.
        state, sums: what came out; None before the call is computed.
    """

    handler: Any
    facts: Sequence[Fact]
    offsets: tuple[int, int]
    record: Any = None
    state: State | None = None
    sums: list[Sums] | None = None


@dataclass(frozen=True)
class Call:
    """One attention call, as a handler sees it.

    Attributes:
        q: `[batch, heads, queries, head_dim]`; k, v: `[batch, kv_heads, keys, head_dim]`, not
            repeated.
        mask: who sees whom; positions are aligned at the end (`core.Mask`).
        live: `[batch, queries]`, false for queries that are padding; None when all are tokens.
        query_offset, key_offset: absolute position of the first query and of the first key.
        heads: which of the module's query heads this call is about, `[heads]`, or `[batch, heads]`
            where every row of the batch has its own; None means all, in order.
        positions: `[batch, kv_heads, keys]`, absolute position of every key where they do not
            simply count up from `key_offset`: a method that keeps other keys for other heads.
        chunk: which part of a sequence this is, where one module is called several times in a
            forward pass, once an image or window; counted from 0.
        repeats: whether the last call of this module had the same queries and keys (DiffLlama: the
            same map for two halves of the values).
        joint: whether keys that are no tokens of this text follow those that are: an encoder's
            (T5Gemma 2), or summaries of many (DeepSeek-V4).
        past: tokens that the cache held as the forward pass began; None where that is not known.
        denoising: step, guidance and segments, when the call comes from a diffusion model.
        measured: facts that the computation of the State gave on the way, where asked for.
        phase: "prefill" when the first query is the first token, else "decode".
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask
    scale: float
    softcap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    live: Tensor | None = None
    query_offset: int = 0
    key_offset: int = 0
    heads: Tensor | None = None
    positions: Tensor | None = None
    chunk: int = 0
    repeats: bool = False
    joint: bool = False
    past: int | None = None
    denoising: Denoising | None = None
    measured: Facts | None = None

    @property
    def phase(self) -> str:
        return "decode" if self.query_offset else "prefill"

    def change(self, **fields: Any) -> Call:
        """The same call with other fields."""
        return replace(self, **fields)

    def attend(self) -> State:
        """The State of this call over all its keys."""
        return attend(
            self.q,
            self.k,
            self.v,
            mask=self.mask,
            scale=self.scale,
            softcap=self.softcap,
            bias=self.bias,
            sinks=self.sinks,
        )

    def attend_and_measure(self, asked: Facts) -> tuple[Call, State]:
        """The State, and the call that holds the facts which came with it."""
        state, sums = attend_and_measure(
            self.q,
            self.k,
            self.v,
            asked.facts,
            mask=self.mask,
            scale=self.scale,
            softcap=self.softcap,
            bias=self.bias,
            sinks=self.sinks,
            live=self.live,
            offsets=asked.offsets,
        )
        return self.change(measured=replace(asked, state=state, sums=sums)), state


class Handler:
    """What acts on attention calls: changes what goes in, watches or replaces what comes out.

    Attributes:
        stores_rows: whether the method puts layers of its own into the key-value cache, of which
            a cache takes one kind only.
    """

    stores_rows: bool = False

    def sites(self, sites: list[Site]) -> list[Site]:
        """Which sites to be called for; all by default. Raise here what cannot work."""
        return sites

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        """The session begins: install hooks of one's own on the model, for what no attention call
        shows (its inputs, hidden states); returns what removes each. Raise here what cannot work.
        """
        return ()

    def generation(self, config: Any) -> None:
        """A generation begins, with these settings (a `GenerationConfig`). Raise here what cannot
        work, before the first token.
        """

    def cache(self, cache: Any) -> None:
        """A forward pass of the model begins, with this key-value cache (None: without one).

        A method that stores keys and values in its own way puts its layers into an empty cache
        here.
        """

    def before(self, call: Call) -> Call | Sequence[Call] | None:
        """Change q, k, v or mask; None leaves the call as it is.

        A method whose heads look at different keys returns one call per group of heads; together
        they name every head of the given call once.
        """
        return None

    def measures(self, call: Call) -> Facts | None:
        """Facts to sum up while the State of this call is computed; `after` finds them in
        `call.measured`, unless another session's came first.
        """
        return None

    def after(self, call: Call, state: State) -> State | None:
        """Watch the State or return another; None leaves it as it is."""
        return None

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Mask | None = None,
        scale: float | None = None,
        layer: int = 0,
    ) -> State:
        """Attention under this method, without a model: one call of one self-attention layer.

        Args:
            q: `[batch, heads, queries, head_dim]`; k, v: `[batch, kv_heads, keys, head_dim]`.
            mask: who sees whom; causal when None.
            layer: the number of the layer that the method is told.

        What a method does to a cache, or learns from a model's inputs, does not show here.

        >>> import torch
        >>> q = k = v = torch.ones(1, 2, 3, 4)
        >>> Handler().attend(q, k, v).out.shape
        torch.Size([1, 2, 3, 4])
        """
        from .dispatch import gather

        sites = [Site(n, "attention", n, "attention", "self") for n in range(layer + 1)]
        site = sites[-1]
        handled = self.sites(sites)
        call = Call(
            site, q, k, v, mask or Mask.causal(), q.shape[-1] ** -0.5 if scale is None else scale
        )
        if site not in handled:
            return call.attend()
        given = self.before(call)
        calls = [call] if given is None else [given] if isinstance(given, Call) else list(given)
        states = [part.attend() for part in calls]
        states = [self.after(part, state) or state for part, state in zip(calls, states)]
        whole = len(calls) == 1 and calls[0].heads is None
        return states[0] if whole else gather(call, calls, states)
