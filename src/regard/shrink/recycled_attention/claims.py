"""The claims of "Recycled Attention" (Xu et al., 2024; v2: RefreshKV, 2025)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from regard.core import State
from regard.core.kernels.reference import probabilities
from regard.errors import InputError
from regard.lab.intervals import mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.parts.decoding.cache import Rows
from regard.reach import Call, Handler, Site
from regard.watching import apply

from .method import Recycled

STRIDES = (5, 10, 25, 50)
BELOW = (5, 10, 25)  # strides that shall be better than sinks and recent tokens
ONE = 10  # the stride of the controls
SINKS = 4
CHECK, THRESHOLDS = 5, (0.8, 0.6)
NEVER = 10**9
SEED = 0

_BIG = "regard reproduce recycled-attention --model {}"
CLAIMS = (
    Claim(
        "mass",
        "The keys that one token looks at most hold most of the attention of the next ones, far "
        "more than sinks and recent tokens of the same number (share of the attention held by the "
        "kept keys and the tokens written since, over 64 tokens, all layers and heads)",
        "over 90 % against about 65 % after a prompt of 8k tokens",
        "reproduced if it exceeds sinks and recent tokens by more than 3 points, the interval "
        "above 3, and falls by less than 10 points from the first 8 tokens to the last 8; partly "
        "if the interval of the difference lies above 0",
        lambda v: verdict(v["low"] > 3 and v["fall"] < 10, v["low"] > 0),
    ),
    Claim(
        "perplexity",
        "Reading every key at every S-th token keeps the perplexity closer to full attention than "
        "sinks and recent tokens of the same number do; the smaller S, the closer",
        "Arxiv, 16k tokens, 2048 kept: 2.22 full, 2.36 with S = 10, 2.62 StreamingLLM",
        f"reproduced if the loss is below that of sinks and recent tokens for S in {BELOW}, each "
        "interval of the difference above 0, and never falls by more than 0.005 nats from one S "
        "to the next larger; partly if below for at least one S",
        lambda v: verdict(
            min(v[f"gain_low_{s}"] for s in BELOW) > 0 and v["worst_fall"] <= 0.005,
            max(v[f"gain_low_{s}"] for s in BELOW) > 0,
        ),
    ),
    Claim(
        "refresh",
        "Choosing the kept keys anew is what matters: full steps that leave them as they are lose "
        f"most of the gain (S = {ONE})",
        "Arxiv perplexity 2.50 without, 2.32 with the choice alone, 2.27 with both",
        "reproduced if the loss without choosing anew is higher, the interval of the difference "
        "above 0, and at least half of the gain over sinks and recent tokens with full steps as "
        "often is lost; partly if the interval lies above 0",
        lambda v: verdict(v["low"] > 0 and v["lost"] >= 0.5, v["low"] > 0),
    ),
    Claim(
        "dynamic",
        "Deciding by the similarity of queries when to read every key gives a lower loss than a "
        f"fixed stride with as many full steps (looked at every {CHECK} tokens, cosine "
        f"{THRESHOLDS[0]})",
        "Arxiv perplexity 2.32 against 2.36, at less time",
        "reproduced if the loss lies below that of the fixed strides, interpolated at the same "
        "number of full steps, the interval of the difference below 0; partly if the interval "
        "holds 0",
        lambda v: verdict(v["high"] < 0, v["low"] <= 0),
    ),
    Claim(
        "entries",
        "A written token reads (L + (S - 1) K) / S keys on average, and takes about the time it "
        "takes with sinks and recent tokens alone",
        "1.27 s against 1.23 s (RULER, 32k tokens, S = 50); 1.71 s with full attention",
        "reproduced if the keys counted agree with the formula to 2 % for every S and the median "
        "step with S = 50 takes at most 1.15 times that of sinks and recent tokens; partly if "
        "only the count agrees",
        lambda v: verdict(v["error"] <= 0.02 and v["time"] <= 1.15, v["error"] <= 0.02),
    ),
    Claim(
        "ruler",
        "It solves long retrieval tasks that eviction cannot (RULER), and questions whose key "
        "changes while the model writes (chain of keys)",
        "RULER at 32k: 63 against 22 (StreamingLLM) and 21 (H2O), full 90; chain of keys 25 "
        "against 12, full 56",
        "needs a model that solves these tasks with full attention, and 32k tokens",
        command=_BIG.format("meta-llama/Llama-3.1-8B-Instruct"),
        built=False,
    ),
    Claim(
        "training",
        "Training on with the recycled pattern improves the trade-off further, most at large S",
        "S = 50: 2.96 to 2.87, S = 25: 2.90 to 2.81 (Arxiv perplexity)",
        "needs 120k documents and the training of a model of 7B",
        command=_BIG.format("Qwen/Qwen2-7B"),
        built=False,
    ),
)


@dataclass(frozen=True)
class Size:
    """How much is measured: documents, tokens of a prompt, tokens after it, tokens over which the
    mass is followed.
    """

    documents: int = 12
    prompt: int = 1024
    after: int = 128
    reach: int = 64

    @property
    def budget(self) -> int:
        return self.prompt // 8


def measure(setup: Setup) -> Measured:
    """The mass over the next tokens, and the loss of forced decoding in every arm."""
    size = Size(2, 64, 20, 16) if setup.quick else Size()
    ids = _documents(setup, size)
    cache: list[Any] = []

    def start(row: int | None = None) -> Any:
        """A copy of the cache that has read the prompts (one of them); they are read when first
        asked for.
        """
        if not cache:
            cache.append(_prompt(setup.model, ids[:, : size.prompt], size))
        own = copy.deepcopy(cache[0])
        if row is not None:
            own.batch_select_indices(torch.tensor([row], device=ids.device))
        return own

    given = (setup.model, ids, size)
    made: dict[str, Callable[[], Any]] = {"mass": partial(_mass, *given)}
    made |= {name: partial(_forced, *given, start, arm) for name, arm in _arms(size).items()}
    made |= {f"dynamic {t:g}": partial(_dynamic, *given, start, t) for t in THRESHOLDS}
    parts = setup.parts("recycled attention", made)
    return Measured(
        claims=_settle(parts, size).values(),
        data=(
            f"{size.documents} passages of northanger-abbey, none twice: {size.prompt} tokens are "
            f"read, the next {size.after} are given one by one (forced decoding), and the loss is "
            "that of the token after each. All arms go on from one reading of the prompts, in one "
            "batch; the dynamic ones one passage at a time, since a batch takes a full step when "
            f"one row asks for it. Kept: {size.budget} keys of each key head in every arm, and "
            "the token's own. Intervals: bootstrap over passages, differences paired."
        ),
        seeds={"random keys": SEED, "bootstrap": 0},
        settings={
            "budget": size.budget,
            "strides": list(STRIDES),
            "sinks": SINKS,
            "query_check": CHECK,
            "thresholds": list(THRESHOLDS),
        },
    )


def _documents(setup: Setup, size: Size) -> Tensor:
    """Token ids `[documents, prompt + after + 1]`, spread over the text."""
    from regard.zoo import text

    whole = text("northanger-abbey")
    tokens = size.prompt + size.after + 1
    ids = torch.tensor(setup.tokenizer(whole)["input_ids"])
    if len(ids) < size.documents * tokens:
        raise InputError(
            f"the text has {len(ids)} tokens with this tokenizer, and {size.documents * tokens} "
            "are needed: name another model"
        )
    apart = len(ids) // size.documents
    rows = [ids[n * apart : n * apart + tokens] for n in range(size.documents)]
    return torch.stack(rows).to(setup.model.device)


# -- the premise ---------------------------------------------------------------------------------
SETS = ("recycled", "local", "h2o", "random", "best")


class Premise(Handler):
    """The share of the attention of the tokens after `prompt` that sets of `budget` keys hold, by
    set, as `[layers][distance]`.
    """

    def __init__(self, prompt: int, budget: int, seed: int) -> None:
        self.prompt, self.budget = prompt, budget
        self.draw = torch.Generator().manual_seed(seed)
        self.found: dict[str, list[list[float]]] = {name: [] for name in SETS}

    def sites(self, sites: list[Site]) -> list[Site]:
        own = [s for s in sites if s.kind == "self"]
        return [s for s in own if s.part == own[-1].part]

    def after(self, call: Call, state: State) -> None:
        keys = call.k.shape[2]
        rows = _grouped(call, call.q[:, :, self.prompt - 1 :])
        order = rows[:, 0].amax(1)[:, : self.prompt].argsort(-1, descending=True)
        heads, ways = len(order), keys - self.prompt
        random = torch.stack(
            [torch.randperm(self.prompt, generator=self.draw) for _ in range(heads)]
        ).to(order.device)
        heavy = self._received(call)
        p = rows[:, 1:]  # [kv_heads, distance, group, keys]
        best = p.amax(2).argsort(-1, descending=True)
        for name in SETS:
            held = []
            for d in range(ways):
                at = self.prompt + d  # the token itself
                new = torch.arange(self.prompt, at + 1).expand(heads, -1).to(order.device)
                if name in ("recycled", "random"):  # the lowest make room for the new ones
                    ranks = order if name == "recycled" else random
                    kept = torch.cat([ranks[:, : max(self.budget - d, 0)], new], -1)
                    kept = kept[:, -(self.budget + 1) :]
                elif name == "local":
                    kept = ends(at + 1, self.budget + 1).expand(heads, -1).to(order.device)
                elif name == "h2o":
                    recent = torch.arange(at - self.budget // 2, at + 1).to(order.device)
                    old = heavy[heavy < at - self.budget // 2].view(heads, -1)
                    kept = torch.cat([old[:, : self.budget // 2], recent.expand(heads, -1)], -1)
                else:
                    kept = best[:, d, : self.budget + 1]
                held.append(_share(p[:, d], kept))
            self.found[name].append(held)

    def _received(self, call: Call) -> Tensor:
        """The prompt's keys by the attention they received in all, `[kv_heads, prompt]`."""
        total = torch.zeros(call.k.shape[1], self.prompt, dtype=torch.float64)
        for start in range(0, self.prompt, 256):
            end = min(start + 256, self.prompt)
            part = call.change(k=call.k[:, :, :end], v=call.v[:, :, :end])
            rows = _grouped(part, call.q[:, :, start:end])
            total[:, :end] += rows.sum((1, 2)).cpu()
        return total.argsort(-1, descending=True).to(call.k.device)


def _grouped(call: Call, q: Tensor) -> Tensor:
    """Attention of the last queries of a call of one row, `[kv_heads, queries, group, keys]`."""
    p = probabilities(q, call.k, call.mask, call.scale, call.softcap)[0]
    return p.unflatten(0, (call.k.shape[1], -1)).transpose(1, 2)


def _share(p: Tensor, kept: Tensor) -> float:
    """Percent of the attention `[kv_heads, group, keys]` on the kept keys `[kv_heads, kept]`."""
    return 100 * float(p.gather(-1, kept[:, None].expand(-1, p.shape[1], -1)).sum(-1).mean())


def ends(length: int, count: int) -> Tensor:
    """Positions of the sinks, and then of the most recent tokens, newest first."""
    if length <= count:
        return torch.arange(length)
    sinks = min(SINKS, count - 1)
    recent = torch.arange(length - 1, length - 1 - (count - sinks), -1)
    return torch.cat([torch.arange(sinks), recent])


def _mass(model: Any, ids: Tensor, size: Size) -> dict[str, list[list[float]]]:
    """Percent held by every set, `[documents][distance]`, the mean over layers and heads."""
    found: dict[str, list[list[float]]] = {name: [] for name in SETS}
    for n, row in enumerate(ids):
        seen = Premise(size.prompt, size.budget, SEED + n)
        with torch.no_grad(), apply(model, seen):
            model(row[None, : size.prompt + size.reach], use_cache=False, logits_to_keep=1)
        for name in SETS:
            found[name].append(torch.tensor(seen.found[name]).mean(0).tolist())
    return found


# -- forced decoding -----------------------------------------------------------------------------
class Unrefreshed(Recycled):
    """Full steps as often, but the kept keys stay those of the prompt: v2's ablation."""

    def _choose(self, layer: Any, call: Call, row: Tensor, allowed: Any) -> Tensor | None:
        if layer.count == 0:
            return super()._choose(layer, call, row, allowed)
        layer.take(call, self.budget)  # the token of a full step is kept like any other
        return None


class Ends(Unrefreshed):
    """Sinks and recent tokens: StreamingLLM at its original positions, and as many keys as any
    other arm (what ends with the prompt, as in `regard.StreamingLLM`, would keep every new one).
    """

    def before(self, call: Call) -> Call | None:
        layer = self._layers.get(call.site.layer)
        # new rows overwrite the oldest; before the turn of the sinks all are laid anew
        if layer is not None and call.q.shape[2] == 1 and layer.since >= self.budget // 2:
            layer.keep(self.first(layer, layer.length - 1))
        return super().before(call)

    def first(self, layer: Any, length: int) -> Tensor:
        """The kept positions of a layer that has read `length` tokens."""
        batch, heads = layer.rows[0].data.shape[:2]
        return ends(length, self.budget).to(layer.rows[0].data.device).expand(batch, heads, -1)


class Random(Recycled):
    """Random keys, drawn anew at every full step: a control."""

    def _choose(self, layer: Any, call: Call, row: Tensor, allowed: Any) -> Tensor | None:
        return self.first(layer, layer.length)

    def first(self, layer: Any, length: int) -> Tensor:
        """Random positions of a layer that has read `length` tokens."""
        batch, heads = layer.rows[0].data.shape[:2]
        draw = torch.Generator().manual_seed(SEED + length + 7919 * layer.number)
        order = torch.rand(batch, heads, length, generator=draw).argsort(-1)
        return order[..., : self.budget].to(layer.rows[0].data.device)


def _arms(size: Size) -> dict[str, Callable[[], Recycled]]:
    """The arms in one batch, by name."""
    keep = size.budget
    return {
        "full": partial(Recycled, keep, 1),
        **{f"stride {s}": partial(Recycled, keep, s) for s in STRIDES},
        "ends": partial(Ends, keep, NEVER),
        f"ends, full {ONE}": partial(Ends, keep, ONE),
        f"unrefreshed {ONE}": partial(Unrefreshed, keep, ONE),
        f"random {ONE}": partial(Random, keep, ONE),
    }


def _prompt(model: Any, ids: Tensor, size: Size) -> Any:
    """A cache that has read the prompts, with what each kind of arm needs at its start."""
    whole: Any = None
    # a schedule by queries remembers the last query too; the other arms do not look at it
    with torch.no_grad(), apply(model, Recycled(size.budget, query_check=CHECK)):
        for part in ids.split(4):
            cache: Any = DynamicCache(config=model.config)
            model(part, past_key_values=cache, logits_to_keep=1)
            for layer, more in zip(whole.layers if whole else (), cache.layers):
                _join(layer, more)
            whole = whole or cache
    for number, layer in enumerate(whole.layers):
        layer.number = number
    return whole


def _join(layer: Any, more: Any) -> None:
    """Batch rows of one layer that has read a prompt, added to those of another."""
    if not hasattr(layer, "rows"):
        raise InputError("a layer with a sliding window takes no part here: name another model")

    def both(a: Any, b: Any) -> Rows:
        return Rows(torch.cat([a.data, b.data]))

    layer.rows = tuple(map(both, layer.rows, more.rows))
    layer.kept = tuple(map(both, layer.kept, more.kept))
    layer.positions = both(layer.positions, more.positions)
    layer.query = torch.cat([layer.query, more.query])


def _dynamic(
    model: Any, ids: Tensor, size: Size, start: Callable[..., Any], threshold: float
) -> dict[str, Any]:
    """Every passage alone: its loss and its full steps, the mean over layers."""
    found: dict[str, Any] = {"loss": [], "full": [], "entries": []}
    for n in range(len(ids)):
        make = partial(Recycled, size.budget, query_check=CHECK, threshold=threshold)
        own = _forced(model, ids[n : n + 1], size, partial(start, n), make)
        found["loss"] += own["loss"]
        found["full"].append(own["full"])
        found["entries"].append(own["entries"])
    return found


def _forced(
    model: Any, ids: Tensor, size: Size, start: Callable[[], Any], make: Callable[[], Recycled]
) -> dict[str, Any]:
    """Mean loss of every passage, full steps and keys read a token (means over layers), recovered
    mass, seconds of every step.
    """
    cache, method = start(), make()
    first = getattr(method, "first", None)
    losses, seconds = [], []
    with torch.no_grad(), apply(model, method):
        if first is not None:
            for layer in cache.layers:
                layer.keep(first(layer, size.prompt))
        for t in range(size.prompt, size.prompt + size.after):
            began = time.perf_counter()
            logits = model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1]
            seconds.append(time.perf_counter() - began)
            losses.append(cross_entropy(logits.float(), ids[:, t + 1], reduction="none"))
    logs = [layer.log for layer in cache.layers]
    shares = [x for log in logs for x in log.recovered]
    return {
        "loss": torch.stack(losses).mean(0).tolist(),
        "full": mean([log.full for log in logs]),
        "entries": mean([log.entries / log.tokens for log in logs]),
        "recovered": mean(shares) if shares else None,
        "seconds": sorted(seconds)[len(seconds) // 2],
        "total": sum(seconds),
    }


# -- verdicts ------------------------------------------------------------------------------------
def _settle(parts: dict[str, Any], size: Size) -> dict[str, Claim]:
    stated = {c.key: c for c in CLAIMS}
    return {
        "mass": _settle_mass(stated["mass"], parts["mass"]),
        "perplexity": _settle_perplexity(stated["perplexity"], parts),
        "refresh": _settle_refresh(stated["refresh"], parts),
        "dynamic": _settle_dynamic(stated["dynamic"], parts, size),
        "entries": _settle_entries(stated["entries"], parts, size),
    }


def _settle_mass(claim: Claim, found: dict[str, list[list[float]]]) -> Claim:
    own = {name: [mean(row) for row in rows] for name, rows in found.items()}
    share = {name: mean(values) for name, values in own.items()}
    over = paired(own["recycled"], own["local"])
    h2o = paired(own["recycled"], own["h2o"])
    curve = {name: [mean(at) for at in zip(*rows)] for name, rows in found.items()}
    near, far = mean(curve["recycled"][:8]), mean(curve["recycled"][-8:])
    return claim.settle(
        {
            **share,
            **over.limits(),
            **h2o.limits("over_h2o_{}"),
            "fall": near - far,
            "curves": {name: [round(x, 2) for x in values] for name, values in curve.items()},
        },
        here=f"{share['recycled']:.1f} % against {share['local']:.1f} %; {near:.1f} % over the "
        f"first 8 tokens, {far:.1f} % over the last 8",
        control=f"random keys {share['random']:.1f} %, H2O {share['h2o']:.1f} %, the best possible "
        f"{share['best']:.1f} %",
        interval=Interval("points over sinks and recent tokens, bootstrap", over.low, over.high),
        note=f"over H2O {h2o.low:+.1f} to {h2o.high:+.1f} points; H2O here keeps the keys that the "
        "prompt looked at most in all, and as many recent ones",
    )


def _settle_perplexity(claim: Claim, parts: dict[str, Any]) -> Claim:
    arms = ["full", *(f"stride {s}" for s in STRIDES)]
    loss = {name: mean(parts[name]["loss"]) for name in (*arms, "ends", f"random {ONE}")}
    gains = {s: paired(parts["ends"]["loss"], parts[f"stride {s}"]["loss"]) for s in STRIDES}
    rises = [loss[b] - loss[a] for a, b in pairwise(arms)]
    shown = ", ".join(f"S = {s}: {_shown(loss[f'stride {s}'])}" for s in STRIDES)
    of_full = {s: paired(parts[f"stride {s}"]["loss"], parts["full"]["loss"]) for s in STRIDES}
    return claim.settle(
        {
            **{f"loss_{name}": value for name, value in loss.items()},
            **{f"gain_{s}": gain.mean for s, gain in gains.items()},
            **{f"gain_low_{s}": gain.low for s, gain in gains.items()},
            **{f"gain_high_{s}": gain.high for s, gain in gains.items()},
            "worst_fall": max(0.0, *(-x for x in rises)),
        },
        here=f"perplexity {_shown(loss['full'])} full; {shown}; sinks and recent tokens "
        f"{_shown(loss['ends'])}",
        control=f"random keys, S = {ONE}: {_shown(loss[f'random {ONE}'])}",
        interval=Interval(
            f"nats below sinks and recent tokens, S = {ONE}, bootstrap",
            gains[ONE].low,
            gains[ONE].high,
        ),
        note="nats below sinks and recent tokens: "
        + ", ".join(f"S = {s} {x.low:+.3f} to {x.high:+.3f}" for s, x in gains.items())
        + "; nats above full attention: "
        + ", ".join(f"S = {s} {x.low:+.3f} to {x.high:+.3f}" for s, x in of_full.items()),
    )


def _shown(loss: float) -> str:
    return f"{math.exp(loss):.2f}"


def _settle_refresh(claim: Claim, parts: dict[str, Any]) -> Claim:
    names = {
        "recycled": f"stride {ONE}",
        "unrefreshed": f"unrefreshed {ONE}",
        "ends": f"ends, full {ONE}",
        "random": f"random {ONE}",
    }
    losses = {name: parts[arm]["loss"] for name, arm in names.items()}
    loss = {name: mean(values) for name, values in losses.items()}
    _, low, high, _ = paired(losses["unrefreshed"], losses["recycled"])
    gain = loss["ends"] - loss["recycled"]
    lost = (loss["unrefreshed"] - loss["recycled"]) / gain if gain > 0 else 0.0
    return claim.settle(
        {**loss, "low": low, "high": high, "gain": gain, "lost": lost},
        here=f"perplexity {_shown(loss['recycled'])} with, {_shown(loss['unrefreshed'])} without; "
        f"sinks and recent tokens with full steps as often {_shown(loss['ends'])}",
        control=f"random keys drawn anew at every full step {_shown(loss['random'])}",
        interval=Interval("nats lost without choosing anew, bootstrap", low, high),
        note="without choosing anew, new tokens still take the place of the lowest",
    )


def _settle_dynamic(claim: Claim, parts: dict[str, Any], size: Size) -> Claim:
    arms = ["full", *(f"stride {s}" for s in STRIDES)]
    steps = [parts[name]["full"] for name in arms]
    shown, said, values = [], [], dict[str, Any]()
    for threshold in THRESHOLDS:
        found = parts[f"dynamic {threshold:g}"]
        fixed = [
            _between(full, steps, [parts[name]["loss"][n] for name in arms])
            for n, full in enumerate(found["full"])
        ]
        apart, low, high, _ = paired(found["loss"], fixed)
        full = mean(found["full"])
        values[f"{threshold:g}"] = {"loss": mean(found["loss"]), "full": full,
                                    "apart": apart, "low": low, "high": high}  # fmt: skip
        shown.append(f"{_shown(mean(found['loss']))} with {full:.1f} full steps at {threshold:g}")
        said.append(f"{threshold:g}: {low:+.4f} to {high:+.4f}")
    main = values[f"{THRESHOLDS[0]:g}"]
    curve = ", ".join(
        f"{_shown(mean(parts[name]['loss']))} with {n:.0f}" for name, n in zip(arms, steps)
    )
    return claim.settle(
        {**values, "low": main["low"], "high": main["high"]},
        here=f"perplexity {'; '.join(shown)} (of {size.after} tokens)",
        control=f"fixed strides: {curve}",
        interval=Interval("nats from the fixed strides, bootstrap", main["low"], main["high"]),
        note="by cosine, " + ", ".join(said),
    )


def _between(full: float, steps: Sequence[float], losses: Sequence[float]) -> float:
    """The loss of fixed strides at so many full steps, straight between them in log(1 + steps)."""
    points = sorted(zip([math.log1p(s) for s in steps], losses))
    at = min(max(math.log1p(full), points[0][0]), points[-1][0])
    for (a, x), (b, y) in pairwise(points):
        if at <= b:
            return x if b == a else x + (y - x) * (at - a) / (b - a)
    return points[-1][1]


def _settle_entries(claim: Claim, parts: dict[str, Any], size: Size) -> Claim:
    counted, formula = {}, {}
    for s in (1, *STRIDES):
        counted[s] = parts["full" if s == 1 else f"stride {s}"]["entries"]
        formula[s] = _formula(s, size)
    error = max(abs(counted[s] / formula[s] - 1) for s in counted)
    seconds = {name: parts[name]["seconds"] for name in ("full", "ends", "stride 50")}
    ratio = seconds["stride 50"] / seconds["ends"]
    wall = parts["full"]["total"] / parts["stride 50"]["total"]
    return claim.settle(
        {
            **{f"entries_{s}": value for s, value in counted.items()},
            **{f"formula_{s}": value for s, value in formula.items()},
            "entries_ends": parts["ends"]["entries"],
            "error": error,
            "time": ratio,
            "full_over_50": wall,
            **{f"seconds_{name}": value for name, value in seconds.items()},
        },
        here="keys a token: "
        + ", ".join(f"S = {s}: {value:.0f}" for s, value in counted.items())
        + f"; time of a step with S = 50 {ratio:.2f} of sinks and recent tokens",
        control=f"full attention takes {wall:.2f} times the time of S = 50 in all",
        note="the formula with the full steps that fall into the run; "
        f"L grows from {size.prompt} to {size.prompt + size.after}, {size.documents} passages "
        f"in a batch; medians of {size.after} steps, the arms one after the other, so no interval "
        "(the bench of decoding takes turns, at 8k tokens and one text)",
    )


def _formula(stride: int, size: Size) -> float:
    """(L + (S - 1) K) / S with the length at each full step, and the token's own key."""
    read = [
        size.prompt + t if t % stride == 0 else size.budget + 1 for t in range(1, size.after + 1)
    ]
    return mean(read)
