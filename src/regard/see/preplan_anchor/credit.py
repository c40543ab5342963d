"""Credit for tokens: weights of the advantages in reinforcement learning, read off attention.

The heads with the shortest mean look-back tell where a chunk begins (WAAD), those with the longest
which tokens later ones return to (FAI). Row t of the map is the query at token t; the entropy of
token t is that of the distribution it was drawn from.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from regard.core import Distance, Fact, Influence, Mask, State, WindowedDistance, measure
from regard.errors import InputError
from regard.reach import Call, Handler, Session, Site

from .card import CreditSettings
from .method import chosen_layers

FAR = 1 << 30  # no end of the horizon


def credit_weights(
    model: Any,
    input_ids: Tensor,
    response_mask: Tensor,
    *,
    attention_mask: Tensor | None = None,
    step: int = 0,
    **settings: Any,
) -> Tensor:
    """Weight of each token in a policy-gradient loss, float32 `[batch, tokens]`; 1 off responses.

    One forward pass without gradients over the fused attention; no map is built.

    Args:
        model: a causal language model, with or without PEFT adapters.
        input_ids: `[batch, tokens]`, prompt and response; padding on either side.
        response_mask: `[batch, tokens]`, 1 for tokens of the response (not the tools' words).
        attention_mask: 0 for padding; all are tokens when None.
        step: joins the seed of the credit called random.
        settings: those of `CreditSettings` in card.py.

    >>> import regard
    >>> ids = torch.arange(3, 63)[None]
    >>> response = (torch.arange(60) >= 20)[None]
    >>> weights = credit_weights(regard.zoo.tiny("llama"), ids, response)
    >>> weights.shape, float(weights[0, :20].max()), float(weights[0, 20:].max()) > 1
    (torch.Size([1, 60]), 1.0, True)

    Raises:
        InputError: shapes that do not fit, a row without response, padding in a response, a model
            that is not causal.
    """
    asked = CreditSettings(**settings)
    ids, response, live = _checked(model, input_ids, response_mask, attention_mask)
    weights = torch.ones(ids.shape, dtype=torch.float32, device=ids.device)
    if asked.credit == "uniform":
        return weights
    entropy = None
    if asked.credit in ("coupled", "local", "global", "bottom", "bottom-local"):
        waad, fai, eligible = read_rhythm(model, ids, response, live, asked)
    else:
        waad = fai = torch.zeros(ids.shape)
        eligible = torch.ones(ids.shape, dtype=torch.bool)
        if asked.credit == "entropy":
            entropy = _entropy(model, ids, live)
    make = torch.Generator().manual_seed(asked.seed + 1_000_003 * step)
    for row in range(len(ids)):
        at = response[row].nonzero()[:, 0].cpu()
        one = token_credit(
            waad[row, at],
            fai[row, at],
            eligible[row, at],
            entropy=None if entropy is None else entropy[row, at],
            generator=make,
            settings=asked,
        )
        weights[row, at.to(ids.device)] = one.to(weights)
    return weights


def token_credit(
    waad: Tensor,
    fai: Tensor,
    eligible: Tensor | None = None,
    *,
    entropy: Tensor | None = None,
    generator: torch.Generator | None = None,
    settings: CreditSettings | None = None,
    **changes: Any,
) -> Tensor:
    """The weights of one response, `[tokens]`, from its look-back and its influence.

    Args:
        eligible: tokens that some query of the horizon follows; all when None.
        settings, changes: a `CreditSettings`, or fields of one.

    >>> waad = torch.tensor([1.0, 5.0, 1.0, 1.0, 1.0])
    >>> fai = torch.tensor([0.0, 0.0, 0.9, 0.0, 0.8])
    >>> token_credit(waad, fai, credit="coupled", top=0.4, alpha=0.5, lead=1).tolist()
    [1.0, 1.25, 1.25, 1.0, 1.5]
    """
    asked = settings or CreditSettings(**changes)
    count, bonus = len(waad), asked.amplify - 1
    weights = torch.ones(count, dtype=torch.float64)
    if count < 2 or asked.credit == "uniform" or bonus == 0:
        return weights
    eligible = torch.ones(count, dtype=torch.bool) if eligible is None else eligible.bool()
    waad, fai = waad.double(), fai.double()
    change = torch.cat([(waad[:-1] - waad[1:]).abs(), waad.new_zeros(1)])
    every = torch.ones(count, dtype=torch.bool)
    if asked.credit == "coupled":
        weights += bonus * _coupled(waad, change, top_of(fai, asked.top, eligible), asked)
    else:
        if asked.credit == "entropy" and entropy is None:
            raise InputError("credit by entropy needs the entropy of each token")
        score, among = {
            "local": (change, every),
            "global": (fai, eligible),
            "bottom": (-fai, eligible),
            "bottom-local": (-change, every),
            "entropy": (change if entropy is None else entropy.double(), every),
            "random": (torch.rand(count, generator=generator, dtype=torch.float64), every),
        }[asked.credit]
        weights += bonus * top_of(score, asked.top, among)
    return weights / weights.mean() if asked.normalize else weights


def _coupled(waad: Tensor, change: Tensor, anchors: Tensor, asked: CreditSettings) -> Tensor:
    """Shares of the bonus: of an anchor that a preplan token leads up to, alpha goes there."""
    low = waad.quantile(0.5) if asked.low_waad is None else asked.low_waad
    high = change.quantile(1 - asked.top) if asked.high_change is None else asked.high_change
    padded = torch.nn.functional.pad(change, (asked.lead, 0), value=-torch.inf)
    before = padded.unfold(0, asked.lead, 1)[: len(change)]  # row t: the tokens before t
    most, place = before.max(-1)
    dominated = anchors & (waad <= low) & (most >= high)
    intro = torch.zeros_like(anchors)
    intro[(torch.arange(len(change)) - asked.lead + place)[dominated]] = True
    alone = (anchors & ~dominated).double()
    return alone + (1 - asked.alpha) * dominated.double() + asked.alpha * intro.double()


def top_of(score: Tensor, share: float, eligible: Tensor) -> Tensor:
    """The ceil(share * tokens) largest of the eligible, the earlier of equals first; boolean.

    >>> top_of(torch.zeros(5), 0.4, torch.ones(5, dtype=torch.bool)).tolist()
    [True, True, False, False, False]
    """
    count = min(math.ceil(share * len(score) - 1e-9), int(eligible.sum()))
    order = score.masked_fill(~eligible, -torch.inf).argsort(descending=True, stable=True)
    chosen = torch.zeros_like(eligible)
    chosen[order[:count]] = True
    return chosen


def read_rhythm(
    model: Any, ids: Tensor, response: Tensor, live: Tensor, asked: CreditSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """WAAD, FAI and which tokens can be anchors, `[batch, tokens]` on the CPU; every response is
    read by its own local and global heads.
    """
    low, high = asked.horizon
    band = (low, FAR if high is None else high)
    reader = _Reader(response, asked.window, band, chosen_layers(model, asked.layers))
    _forward(model, ids, live, reader, logits=1)
    layers = sorted(reader.found)
    shapes = {reader.found[n][0].shape for n in layers}
    if len(shapes) != 1:
        raise InputError("the layers differ in their number of heads: name like ones with layers=")
    # [batch, layers * heads, tokens]
    span, waad, fai = (torch.cat([reader.found[n][i] for n in layers], 1) for i in range(3))
    counted = response.cpu()[:, None]
    mean = (span * counted).sum(-1) / counted.sum(-1).clamp_min(1)
    heads = mean.shape[1]
    if heads < 2:
        raise InputError("local and global heads are two at least: look at more layers")
    chosen = max(1, round(asked.quantile * heads))
    order = mean.argsort(dim=-1, stable=True)
    near, far = order[:, :chosen], order[:, -chosen:]

    def over(values: Tensor, which: Tensor) -> Tensor:
        return values.gather(1, which[..., None].expand(-1, -1, values.shape[-1])).mean(1)

    total = torch.nn.functional.pad(counted[:, 0].cumsum(-1), (1, 0))
    at = torch.arange(ids.shape[1])
    start = (at + low).clamp_max(ids.shape[1])
    stop = (at + min(band[1], ids.shape[1]) + 1).clamp_max(ids.shape[1])
    return over(waad, near), over(fai, far), total[:, stop] > total[:, start]


class _Reader(Handler):
    """Facts of the response's queries, one layer at a time: `[batch, heads, tokens]`, float32."""

    def __init__(
        self, response: Tensor, window: int, band: tuple[int, int], layers: list[int]
    ) -> None:
        self.response, self.layers = response, layers
        self.facts: list[Fact] = [Distance(), WindowedDistance(window), Influence(band=band)]
        self.found: dict[int, list[Tensor]] = {}

    def sites(self, sites: list[Site]) -> list[Site]:
        return [s for s in sites if s.kind == "self" and s.layer in self.layers]

    def after(self, call: Call, state: State) -> None:
        queries, keys = call.q.shape[2], call.k.shape[2]
        ahead = (call.mask & Mask.band(-1, None)).area(queries, keys)
        if any(ahead) if isinstance(ahead, list) else ahead:
            raise InputError(
                f"credit is about causal attention, and {call.site.name} looks ahead: take a "
                "causal language model"
            )
        sums = measure(
            call.q, call.k, state.lse, self.facts, mask=call.mask, scale=call.scale,
            softcap=call.softcap, bias=call.bias, sinks=call.sinks,
            live=self.response.to(call.q.device),
        )  # fmt: skip
        self.found[call.site.layer] = [f.finish(s).float().cpu() for f, s in zip(self.facts, sums)]


def _entropy(model: Any, ids: Tensor, live: Tensor) -> Tensor:
    """Entropy in nats of the distribution that each token was drawn from, on the CPU."""
    found = torch.zeros(ids.shape)
    logits = _forward(model, ids, live, None, logits=0)
    for row in range(len(ids)):
        log_p = logits[row, :-1].float().log_softmax(-1)
        found[row, 1:] = -(log_p.exp() * log_p).sum(-1).cpu()
    return found


def _forward(model: Any, ids: Tensor, live: Tensor, reader: Handler | None, logits: int) -> Any:
    """One pass in evaluation mode, which is left as it was found."""
    given: dict[str, Any] = {"use_cache": False}
    if not bool(live.all()):
        given["attention_mask"] = live.long()
    inner = getattr(model, "get_base_model", lambda: model)()
    if "logits_to_keep" in inspect.signature(inner.forward).parameters and logits:
        given["logits_to_keep"] = logits
    training = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad(), Session(model, [reader] if reader else []):
            return getattr(model(input_ids=ids, **given), "logits", None)
    finally:
        for module in training:
            module.training = True


def _checked(
    model: Any, input_ids: Any, response_mask: Any, attention_mask: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError("credit is for causal language models: this one has an encoder too")
    device = next(model.parameters()).device
    ids = torch.as_tensor(input_ids).to(device)
    response = torch.as_tensor(response_mask).to(device)
    if ids.dim() != 2 or response.shape != ids.shape:
        raise InputError(
            f"input_ids and response_mask are [batch, tokens], not {list(ids.shape)} and "
            f"{list(response.shape)}"
        )
    response = response != 0
    live = torch.ones_like(response) if attention_mask is None else (
        torch.as_tensor(attention_mask).to(device) != 0
    )  # fmt: skip
    if live.shape != ids.shape:
        raise InputError(f"attention_mask is {list(ids.shape)}, not {list(live.shape)}")
    if not bool(response.any(-1).all()):
        row = int(response.any(-1).int().argmin())
        raise InputError(f"row {row} has no token of a response: mark some in response_mask")
    if bool((response & ~live).any()):
        raise InputError("response_mask marks padding: a response is made of tokens")
    return ids, response, live
