"""Preplan and anchor: the rhythm of a model's reasoning, read from its attention.

Paper: "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained
Policy Optimization", Li et al., 2025, https://arxiv.org/abs/2510.13554 (no official code found).

Local heads look near and chunk phrases; global heads look far and single out tokens. WAAD, the
windowed look-back of the local heads, peaks where a phrase is planned (preplan tokens); FAI, the
attention that later tokens of the global heads pay, peaks at the tokens the rest hangs on
(anchor tokens). `rhythm(model, input_ids, response_start)` measures one response, `couplings`
asks over many whether the two beats go together, `perturb` what forcing another token changes.
The training half of the paper (credit for reinforcement learning) is not here.

Row t of a map is the query at token t, which predicts t + 1; the paper calls it "when generating
t", and so do we. The entropy of token t is that of the distribution it was drawn from, at t - 1.

Deviations:
    - The maps are never built: WAAD and FAI are linear in them, so per-head facts are averaged.
    - Peaks (reconstructed): strict local maxima above the median of the response; the top 40 % on
      request. The paper states no rule, and the first gives its chance levels.
    - Receiver heads (count reconstructed): the 30 % of heads of largest kurtosis over the keys.
    - The last 10 tokens of a response are left out of peaks and couplings (reconstructed): hardly
      any later token sees them.
    - Models that mix window and full attention: only the full-attention layers are compared.
    - `exclude_first` measures the attention that does not fall on token 0, renormalised: global
      heads are largely sink heads. An addition, not in the paper.
    - Perturbation compares greedy continuations after each alternative with the greedy one after
      the response's own token, of the same length (reconstructed).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from regard.core import Columns, Distance, Fact, Influence, Mask, State, WindowedDistance
from regard.errors import InputError
from regard.reach import Call, Collector, Session
from regard.watching.heads import QUANTILE, TOP, Head, Heads, head_split, peaks

from .card import Settings


def middle_layers(count: int) -> list[int]:
    """Five layers evenly spaced over the middle third, the paper's choice for training.

    >>> middle_layers(30)
    [10, 12, 15, 18, 20]
    """
    spaced = torch.linspace(count // 3, 2 * count // 3, 5, dtype=torch.float64).round()
    return sorted({int(n) for n in spaced if n < count})


def kurtosis(values: Tensor) -> Tensor:
    """Fourth standardised moment along the last axis; 3 for a normal, large for rare high peaks.

    >>> float(kurtosis(torch.tensor([-1.0, 1.0, -1.0, 1.0])))
    1.0
    """
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return centred.pow(4).mean(-1) / variance.square().clamp_min(1e-30)


@dataclass(frozen=True)
class Rhythm:
    """The rhythm of one response; every list runs over its tokens, the first is `start`.

    Attributes:
        start: position of the response's first token, padding not counted.
        tokens: ids of the response.
        waad, fai: windowed look-back of the local heads (tokens), future influence of the global
            heads (share); receiver: the same influence in the receiver heads.
        entropy: of the distribution that produced each token, in nats.
        preplan, anchor, receiver_peaks: peaks as indices into the lists.
        counted: how many tokens take part in peaks and couplings; the last ones do not.
        span: mean look-back of every head, `[layers][heads]`, for the layers in `layers`.
        sink_mass: share of attention on token 0, in the local and in the global heads.
        rule: how peaks were taken.
    """

    start: int
    tokens: list[int]
    waad: list[float]
    fai: list[float]
    receiver: list[float]
    entropy: list[float]
    preplan: list[int]
    anchor: list[int]
    receiver_peaks: list[int]
    counted: int
    layers: list[int]
    span: list[list[float]]
    local: list[Head]
    far: list[Head]
    receivers: list[Head]
    sink_mass: dict[str, float]
    window: int
    horizon: tuple[int, int | None]
    rule: str

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, ready for JSON; the far heads are called "global" there."""
        plain = {n: list(v) if isinstance(v, tuple) else v for n, v in self.__dict__.items()}
        plain["global"] = plain.pop("far")
        for name in ("local", "global", "receivers"):
            plain[name] = [list(pair) for pair in plain[name]]
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Rhythm:
        """The reverse of `as_dict`."""
        fields = {"far" if n == "global" else n: v for n, v in plain.items()}
        for name in ("local", "far", "receivers"):
            fields[name] = [(int(a), int(b)) for a, b in fields[name]]
        return cls(**{**fields, "horizon": tuple(fields["horizon"])})

    def with_rule(self, rule: str, top: float = TOP) -> Rhythm:
        """The same measurement with peaks taken by another rule."""
        marks: dict[str, Any] = _marks(self.waad, self.fai, self.receiver, self.counted, rule, top)
        return replace(self, rule=_named(rule, top), **marks)


def rhythm(
    model: Any,
    input_ids: Any,
    response_start: int,
    *,
    attention_mask: Any = None,
    heads: Heads | None = None,
    **settings: Any,
) -> Rhythm:
    """Measure one prompt with its response, in one forward.

    Args:
        input_ids: `[tokens]` or `[1, tokens]`; padding is allowed with its `attention_mask`, and
            taken out. Distances are in tokens of the sequence.
        response_start: index of the response's first token in `input_ids` as given.
        heads: a split to use in place of this response's own, see `calibrated`.
        settings: those of `Settings` in card.py. The paper's analysis takes all later tokens as the
            horizon, its training (10, 50), in the revision (10, 100).

    >>> import regard
    >>> seen = regard.rhythm(regard.zoo.tiny("llama"), torch.arange(3, 63), 20)
    >>> len(seen.waad), seen.counted, seen.rule
    (40, 30, 'strict local maximum above the median')

    Raises:
        InputError: no response, one of less than two tokens, a window or horizon that cannot be,
            more than one row, a model that is not causal.
    """
    asked = Settings(**settings)
    low, high = asked.horizon
    if low < 0 or (high is not None and high < low):
        raise InputError(
            f"the horizon is (lo, hi) tokens later with 0 <= lo <= hi, not {asked.horizon}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError("the rhythm is about causal language models: this one has an encoder too")
    ids, start = _one_row(input_ids, attention_mask, response_start)
    total = len(ids)
    band = (low, total if high is None else high)
    facts: list[Fact] = [
        Distance(),
        WindowedDistance(asked.window),
        Influence(band=band, queries=(start, total)),
        Columns((0,)),
    ]
    session, collector = _session(model, facts, asked.layers, asked.exclude_first)
    with session, torch.no_grad():
        logits = _logits(model, ids, start)
    records = [collector.records[n] for n in sorted(collector.records)]
    numbers = [r.site.layer for r in records]
    distance, waad, fai, first = (_stack(collector, records, fact) for fact in facts)
    first = first[..., 0]
    if asked.exclude_first:
        first = torch.stack([collector.first[n] for n in numbers])
    span = distance[:, :, start:].mean(-1)
    split = head_split(span, numbers, asked.quantile) if heads is None else heads
    counted = max(0, total - start - max(asked.tail, low))
    received = fai[:, :, start:]
    chosen = _receivers(received[:, :, :counted], numbers, asked.quantile, asked.receivers)
    back = _mean(waad[:, :, start:], split.local, numbers)
    ahead = _mean(received, split.far, numbers)
    receiver = _mean(received, chosen, numbers)
    marks = _marks(back, ahead, receiver, counted, asked.rule, asked.top)
    log_p = logits.float().log_softmax(-1)
    return Rhythm(
        start=start,
        tokens=ids[start:].tolist(),
        waad=back,
        fai=ahead,
        receiver=receiver,
        entropy=(-(log_p.exp() * log_p).sum(-1)).tolist(),
        **marks,
        counted=counted,
        layers=numbers,
        span=span.tolist(),
        local=list(split.local),
        far=list(split.far),
        receivers=list(chosen),
        sink_mass=_sink_mass(first[:, :, start:], split, numbers),
        window=asked.window,
        horizon=(low, high),
        rule=_named(asked.rule, asked.top),
    )


def calibrated(rhythms: Iterable[Rhythm], quantile: float = QUANTILE) -> Heads:
    """One split for all responses, from the mean of their spans; pass it as `rhythm(heads=...)`."""
    known = list(rhythms)
    if not known:
        raise InputError("a calibrated split needs at least one measured response")
    if any(r.layers != known[0].layers for r in known):
        raise InputError("the responses were measured on different layers: measure all on the same")
    span = torch.tensor([r.span for r in known]).mean(0)
    return head_split(span, known[0].layers, quantile)


class _Facts(Collector):
    """The collector, which can leave token 0 out, and then notes how much attention it had."""

    def __init__(self, facts: Sequence[Fact], layers: Sequence[int] | None, without: bool) -> None:
        super().__init__(facts, layers)
        self.without = without
        self.first: dict[int, Tensor] = {}  # layer -> [heads, queries]

    def after(self, call: Call, state: State) -> State | None:
        queries, keys = call.q.shape[2], call.k.shape[2]
        ahead = (call.mask & Mask.band(-1, None)).area(queries, keys)
        if call.site.kind != "self" or (any(ahead) if isinstance(ahead, list) else ahead):
            raise InputError(
                f"the rhythm is about causal attention, and {call.site.name} looks ahead: "
                "take a causal language model"
            )
        if self.without:
            others = torch.arange(keys, device=call.k.device)[None] > 0
            call = call.change(mask=call.mask & Mask.padding(others))
            left = call.attend()
            self.first[call.site.layer] = 1 - (left.lse - state.lse).exp()[0].float().cpu()
            state = left
        super().after(call, state)
        return None


def _session(
    model: Any, facts: list[Fact], layers: str | Sequence[int], without: bool
) -> tuple[Session, _Facts]:
    numbers = chosen_layers(model, layers)
    collector = _Facts(facts, numbers, without)
    return Session(model, [collector]), collector


def chosen_layers(model: Any, layers: str | Sequence[int]) -> list[int]:
    """The layers by number: all, five of the middle third, or those named; where windows bound the
    distance in some of them, the others.
    """
    probe = Session(model)
    numbers = sorted({s.layer for s in probe.sites if s.kind == "self"})
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    if layers == "middle":
        numbers = [n for n in middle_layers(len(numbers)) if n in numbers]
    elif isinstance(layers, str) and layers != "all":
        raise InputError(f'layers is "all", "middle" or a list of numbers, not {layers!r}')
    elif not isinstance(layers, str):
        numbers = list(layers)
    if kinds and len(set(kinds)) > 1:  # a window bounds the distance: not comparable with full
        full = [n for n in numbers if n < len(kinds) and kinds[n] == "full_attention"]
        numbers = full or numbers
    if not numbers:
        raise InputError("no layer is left to look at: name at least one")
    return numbers


def _one_row(input_ids: Any, attention_mask: Any, start: int) -> tuple[Tensor, int]:
    """The real tokens of one row, and where the response starts among them."""
    ids = torch.as_tensor(input_ids)
    if ids.dim() == 2 and len(ids) != 1:
        raise InputError(f"one response at a time: pass one row, not {len(ids)}")
    ids = ids.reshape(-1)
    if not 0 < start < len(ids):
        raise InputError(
            "the response starts after a prompt and holds a token: response_start lies between 1 "
            f"and {len(ids) - 1}, not {start}"
        )
    if attention_mask is not None:
        real = torch.as_tensor(attention_mask).reshape(-1).to(ids.device) != 0
        if len(real) != len(ids):
            raise InputError(f"attention_mask has {len(real)} entries for {len(ids)} tokens")
        start, ids = int(real[:start].sum()), ids[real]
        if start < 1:
            raise InputError(
                "the prompt is all padding: pass at least one token before the response"
            )
    if len(ids) - start < 2:
        raise InputError("the response has less than two tokens: there is no rhythm to read")
    return ids, start


def _logits(model: Any, ids: Tensor, start: int) -> Tensor:
    """Logits that produced the response's tokens, `[response, vocabulary]`."""
    ids = ids[None].to(model.device)
    keep = ids.shape[1] - start + 1
    extra = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = keep
    output = model(ids, use_cache=False, **extra)
    if getattr(output, "logits", None) is None:
        raise InputError(
            f"{type(model).__name__} gives no logits: load the model with its language-model head"
        )
    return output.logits[0, -keep:-1].cpu()


def _stack(collector: Collector, records: list[Any], fact: Fact) -> Tensor:
    """One fact over layers, `[layers, heads, tokens]`."""
    values = [collector.value(r, fact)[0].float().cpu() for r in records]
    if len({v.shape for v in values}) > 1:
        raise InputError(
            "the layers differ in their number of heads: name like ones with layers=[...]"
        )
    return torch.stack(values)


def _mean(values: Tensor, heads: Sequence[Head], layers: list[int]) -> list[float]:
    place = {layer: n for n, layer in enumerate(layers)}
    missing = [h for h in heads if h[0] not in place or not 0 <= h[1] < values.shape[1]]
    if missing:
        raise InputError(
            f"head {missing[0]} was not measured: calibrate on this model and its layers"
        )
    return torch.stack([values[place[a], b] for a, b in heads]).mean(0).tolist()


def _receivers(
    received: Tensor, layers: list[int], quantile: float, count: int | None
) -> tuple[Head, ...]:
    flat = (
        kurtosis(received).flatten()
        if received.shape[-1] > 1
        else received.new_zeros(received.shape[0] * received.shape[1])
    )
    wanted = max(1, round(quantile * len(flat))) if count is None else count
    if not 1 <= wanted <= len(flat):
        raise InputError(f"receivers is between 1 and {len(flat)} heads, not {wanted}")
    best = flat.argsort(descending=True, stable=True)[:wanted].tolist()
    return tuple((layers[n // received.shape[1]], n % received.shape[1]) for n in best)


def _sink_mass(first: Tensor, heads: Heads, layers: list[int]) -> dict[str, float]:
    def share(chosen: Sequence[Head]) -> float:
        values = _mean(first, chosen, layers)
        return sum(values) / len(values)

    return {"local": share(heads.local), "global": share(heads.far)}


def _marks(
    waad: list[float], fai: list[float], receiver: list[float], counted: int, rule: str, top: float
) -> dict[str, list[int]]:
    series = {"preplan": waad, "anchor": fai, "receiver_peaks": receiver}
    return {n: peaks(torch.tensor(v[:counted]), rule, top) for n, v in series.items()}


def _named(rule: str, top: float) -> str:
    return f"largest {top:.0%}" if rule == "top" else "strict local maximum above the median"
