"""Sink emergence: in which heads of a language model one token is an attention sink.

Paper: "When Attention Sink Emerges in Language Models: An Empirical View", Gu et al., 2024,
https://arxiv.org/abs/2410.10781; official code: https://github.com/sail-sg/Attention-Sink.

`sinks(model, batches)` measures; `sink_rate` and its neighbours work on any received attention,
for example `seen["mean_received"]` of a `regard.watch`. The training half of the paper (other
attention operations, learned key biases) is not here.

Deviations:
    - The paper's maps are never built: alpha is the fact "mean_received", computed tile by tile.
    - Under a sliding window a key is averaged over the queries that may look at it, where the
      paper divides by all later tokens. Up to the window's length both are the same.
    - Hidden sinks leave out the last 16 tokens (reconstructed): few queries see those, so that
      their mean says little.
    - The ratios of norms are given against the mean of the other tokens, as in the paper, and
      against their median, which one large token cannot move.
    - The attention logit is split into product of norms and cosine as means over queries, so the
      two means do not multiply to the mean logit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import MeanReceived
from regard.errors import InputError, nearest
from regard.reach import Collector, Session
from regard.watching.sinks import (
    checked,
    hidden_sinks,
    per_sequence,
    sink_map,
    sink_rate,
    sink_rates,
    stacked,
    uniform_alpha,
)

from .card import Settings
from .probes import Probe, Probes, on_layer

EPSILONS = (0.2, 0.3, 0.4)
TOKENS = 64
KINDS = ("text", "random", "repeat")


@dataclass
class Sinks:
    """What `sinks` measured.

    Attributes:
        rate: share of heads for which the token at `position` is a sink, mean over sequences.
        per_sequence: the same for every sequence, `[sequences]`.
        rates: sink rate of every position, `[tokens]`.
        by_epsilon: the rate at other thresholds.
        alpha: mean attention that `position` receives, `[layers, heads]`.
        mean_received: mean over heads and layers, `[tokens]`.
        hidden: later tokens that are sinks, see `hidden_sinks`.
        layers: the layer numbers that the first axis of `[layers, heads]` counts.
        uniform: what the first token would receive if attention were uniform.
        probes: why; `every` holds them for each sequence, for intervals.
    """

    epsilon: float
    position: int
    sequences: int
    tokens: int
    layers: list[int]
    rate: float
    per_sequence: Tensor
    rates: Tensor
    by_epsilon: dict[float, float]
    alpha: Tensor
    mean_received: Tensor
    hidden: list[dict[str, Any]]
    uniform: float
    probes: Probes
    every: dict[str, Tensor] = field(repr=False)

    @property
    def sink_heads(self) -> Tensor:
        """Which heads have the token as their sink on average, `[layers, heads]`, boolean."""
        return self.alpha > self.epsilon

    def as_dict(self, most: int = 50) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON; of the hidden sinks the `most` common."""
        plain = {
            n: _plain(v) for n, v in self.__dict__.items() if n not in ("every", "probes", "hidden")
        }
        probes = {n: _plain(v) for n, v in self.probes.__dict__.items()}
        return {**plain, "hidden": self.hidden[:most], "probes": probes}


def sinks(
    model: Any,
    batches: Any,
    **settings: Any,
) -> Sinks:
    """Measure the attention sinks of a causal language model.

    Args:
        model: a loaded transformers model.
        batches: token ids `[batch, tokens]`, a tokenizer's output with `attention_mask`, or several
            of them. Padding is taken out before the model sees a sequence. Position 0 is whatever
            the sequence begins with, a start token included if the tokenizer puts one.
        settings: those of `Settings` in card.py. Without `tokens`, sequences of different lengths
            are refused.

    >>> import regard
    >>> measured = regard.sinks(regard.zoo.tiny("llama"), torch.arange(40).view(2, 20))
    >>> measured.alpha.shape, measured.tokens, 0 <= measured.rate <= 1
    (torch.Size([2, 4]), 20, True)

    Raises:
        InputError: empty, short or unequal sequences, a threshold outside (0, 1), a position out of
            range, a model that is not causal.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(
            "the sink metric is about causal language models: this one has an encoder too"
        )
    asked = Settings(**settings)
    epsilon, position = asked.epsilon, asked.position
    layers = None if asked.layers is None else list(asked.layers)
    received: list[Tensor] = []
    every: dict[str, list[Tensor]] = {}
    numbers: list[int] = []
    for ids in _sequences(batches, asked.tokens):
        alpha, probes, numbers = _measure(model, ids, position, layers)
        checked(alpha, epsilon, position)
        received.append(alpha)
        for name, value in probes.items():
            every.setdefault(name, []).append(value)
    if not received:
        raise InputError("there is no sequence to measure: pass token ids [batch, tokens]")
    alpha = torch.cat(received)
    joined = {n: torch.cat(v) for n, v in every.items()}
    return Sinks(
        epsilon=epsilon,
        position=position,
        sequences=len(alpha),
        tokens=alpha.shape[-1],
        layers=numbers,
        rate=sink_rate(alpha, epsilon, position),
        per_sequence=per_sequence(alpha, epsilon, position),
        rates=sink_rates(alpha, epsilon),
        by_epsilon={e: sink_rate(alpha, e, position) for e in sorted({*EPSILONS, epsilon})},
        alpha=sink_map(alpha, position),
        mean_received=alpha.mean((0, 1, 2)),
        hidden=hidden_sinks(alpha, epsilon, position),
        uniform=uniform_alpha(alpha.shape[-1]),
        probes=Probes(**{n: v.mean(0) for n, v in joined.items()}),
        every=joined,
    )


def inputs(
    kind: str,
    *,
    vocabulary: int | None = None,
    text: str | None = None,
    tokenizer: Any = None,
    count: int = 100,
    tokens: int = TOKENS,
    seed: int = 0,
) -> Tensor:
    """Token ids `[count, tokens]` of one of the paper's kinds.

    "text": consecutive windows of `text`, each with the start token if the tokenizer puts one;
    "random": ids drawn uniformly from the vocabulary; "repeat": one random id over and over, with
    no start token before it (that would make the states differ).

    >>> inputs("repeat", vocabulary=9, count=2, tokens=3, seed=1).unique(dim=1).shape
    torch.Size([2, 1])
    """
    if kind not in KINDS:
        raise InputError(f"there is no kind of input {kind!r}.{nearest(kind, KINDS)}")
    if tokens < 2 or count < 1:
        raise InputError(f"at least one sequence of two tokens is needed, not {count} of {tokens}")
    if kind == "text":
        return _windows(text, tokenizer, count, tokens)
    if vocabulary is None and tokenizer is not None:
        vocabulary = len(tokenizer)
    if not vocabulary or vocabulary < 1:
        raise InputError(
            "random ids need the size of the vocabulary: vocabulary=model.config.vocab_size"
        )
    random = torch.Generator().manual_seed(seed)
    if kind == "random":
        return torch.randint(vocabulary, (count, tokens), generator=random)
    return torch.randint(vocabulary, (count, 1), generator=random).repeat(1, tokens)


def _windows(text: str | None, tokenizer: Any, count: int, tokens: int) -> Tensor:
    if not text or tokenizer is None:
        raise InputError("windows of text need both text= and tokenizer=")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = getattr(tokenizer, "bos_token_id", None)
    # a start token may exist without being put before a text: look at what the tokenizer does
    first = list(tokenizer("a")["input_ids"])[:1]
    begin = [start] if start is not None and first == [start] else []
    step = tokens - len(begin)
    if len(ids) < count * step:
        raise InputError(
            f"the text has {len(ids)} tokens, too few for {count} windows of {tokens}: "
            "take a longer text or fewer windows"
        )
    return torch.tensor([begin + ids[n * step : (n + 1) * step] for n in range(count)])


_UNEQUAL = (
    "the sequences differ in length, and received attention depends on it: "
    "pass tokens=N to cut all to the same length"
)


def _sequences(batches: Any, tokens: int | None) -> Iterable[Tensor]:
    """Batches of real tokens, `[batch, tokens]`, all of one length."""
    if torch.is_tensor(batches) or isinstance(batches, Mapping) or hasattr(batches, "input_ids"):
        batches = [batches]
    cut = tokens is not None
    for batch in batches:
        ids = batch if torch.is_tensor(batch) else torch.as_tensor(batch["input_ids"])
        ids = torch.atleast_2d(ids)
        mask = None if torch.is_tensor(batch) else batch.get("attention_mask")
        real = torch.ones_like(ids) if mask is None else torch.atleast_2d(torch.as_tensor(mask))
        rows = [row[keep] for row, keep in zip(ids, real.to(ids.device) != 0)]
        if not rows:
            raise InputError("a batch holds no sequence: pass token ids [batch, tokens]")
        tokens = len(rows[0]) if tokens is None else tokens
        short = min(map(len, rows))
        if cut and short < tokens:
            raise InputError(
                f"a sequence has {short} tokens where {tokens} are asked for: "
                f"leave it out, or pass tokens={short}"
            )
        if not cut and any(len(row) != tokens for row in rows):
            raise InputError(_UNEQUAL)
        if tokens < 2:
            raise InputError("a sequence of one token looks at itself alone: give at least two")
        yield torch.stack([row[:tokens] for row in rows])


def _measure(
    model: Any, ids: Tensor, position: int, layers: list[int] | None
) -> tuple[Tensor, dict[str, Tensor], list[int]]:
    """One batch: alpha `[batch, layers, heads, keys]`, probes `[batch, layers, ...]`, numbers."""
    collector = Collector([MeanReceived()], layers)
    probe = Probe(position, {})
    states: dict[int, dict[str, Tensor]] = {}
    with Session(model, [collector, probe]) as session, torch.no_grad():
        undo = []
        try:
            for site in session.sites:
                if layers is None or site.layer in layers:
                    undo.append(on_layer(model, site.part, site.layer, position, states))
            # without the head: logits over a vocabulary would be the largest tensor of all
            model.base_model(ids.to(model.device), use_cache=False)
        finally:
            for hook in undo:
                hook.remove()
    records = [collector.records[n] for n in sorted(collector.records)]
    numbers = [r.site.layer for r in records]
    alpha = stacked({r.site.layer: collector.value(r, collector.facts[0]) for r in records})
    each = [{**probe.facts[r.site.index], **states[r.site.layer]} for r in records]
    return alpha.cpu(), {n: torch.stack([f[n] for f in each], 1).cpu() for n in each[0]}, numbers


def _plain(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.tolist()
    if isinstance(value, dict):
        return {str(n): _plain(v) for n, v in value.items()}
    return value
