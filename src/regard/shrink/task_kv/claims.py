"""The claims of "Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of
Attention Heads" (He et al., 2025).
"""

from __future__ import annotations

import importlib
import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.lab.intervals import bootstrap, mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, quiet, verdict
from regard.parts.decoding.kept import Evicting, ends_and_best
from regard.reach import Call, Handler
from regard.shrink import RandomEviction, SnapKV, StreamingLLM

from .method import Plan, TaskKV, distances

KINDS = ("retrieval", "summary", "code")
CODE = ("textwrap", "heapq", "json.decoder", "json.encoder", "bisect", "shlex", "string")
SUMMARISE = "\n\nSummarise the passage above in one sentence.\nSummary:"
RATIOS = (0.3, 0.4, 0.6)
SHARE = 0.25  # of the query heads of a layer: those called far, or near
DRAWS = 3  # of random heads
CLOSE = 0.05  # nats a token: as good as the full cache
SEED = 0

_BIG = "regard reproduce task-kv --model {}"
CLAIMS = (
    Claim(
        "task",
        "Which heads differ most depends on the task (overlap of the quarter of query heads "
        "farthest from the centre of their layer, between prompts of one kind and of two: "
        "retrieval, summary, code)",
        "qualitative: a list fixed beforehand does not transfer between tasks",
        "reproduced if prompts of one kind overlap more than prompts of two in each of the kinds, "
        "the interval of the difference above 0 and p < 0.05 by shuffled kinds; partly if the "
        "interval is above 0",
        lambda v: verdict(
            v["low"] > 0 and v["p"] < 0.05 and min(v[f"gain_{k}"] for k in KINDS) > 0,
            v["low"] > 0,
        ),
    ),
    Claim(
        "far-heads",
        "Heads far from the centre carry more of the output (rise of the loss of the "
        "continuation when a quarter of the query heads of every layer is silenced: the "
        "farthest, random ones, the nearest)",
        "an upper bound on a head's contribution grows with its distance",
        "reproduced if the farthest cost more than random heads and these more than the nearest, "
        "both differences with intervals above 0; partly if the farthest cost more than the "
        "nearest with an interval above 0",
        lambda v: verdict(
            v["far_random_low"] > 0 and v["random_near_low"] > 0, v["far_near_low"] > 0
        ),
    ),
    Claim(
        "budget",
        "At equal memory it beats rules that give every head the same budget (loss of the "
        "continuation under Task-KV less that under StreamingLLM and SnapKV with as many entries)",
        "average score at 40 %: 7.94, against 7.60 (SnapKV) and 6.67 (StreamingLLM), Llama-2-7B; "
        "10.73, 10.31 and 9.37, Mistral-7B",
        "reproduced if the loss is lower than under both, at 40 and at 60 %, all four intervals "
        "below 0; partly if it is lower than under StreamingLLM at both, with intervals below 0",
        lambda v: verdict(
            max(v[f"high_{m}_{r}"] for m in ("SnapKV", "StreamingLLM") for r in (0.4, 0.6)) < 0,
            max(v[f"high_StreamingLLM_{r}"] for r in (0.4, 0.6)) < 0,
        ),
    ),
    Claim(
        "middle",
        "The middle tokens that the last queries look at matter (loss at 40 % with them, less that "
        "with none, and with as many more recent tokens)",
        "selected ones beat none and beat merged ones; 16 recover most of the score",
        "reproduced if the loss is lower than with none and than with as many more recent tokens, "
        "both intervals below 0; partly if it is lower than with none, with an interval below 0",
        lambda v: verdict(v["high_none"] < 0 and v["high_recent"] < 0, v["high_none"] < 0),
    ),
    Claim(
        "as-full",
        "At 40 % of the memory summaries and synthetic tasks match the full cache (rise of the "
        "loss of the continuation over the full cache)",
        "equal scores on the summarisation and synthetic tasks of LongBench",
        f"reproduced if the interval of the rise lies below {CLOSE:g} nats a token on retrieval "
        "and on passages of a novel; partly if on one of them",
        lambda v: verdict(
            max(v["high_retrieval"], v["high_summary"]) < CLOSE,
            min(v["high_retrieval"], v["high_summary"]) < CLOSE,
        ),
    ),
    Claim(
        "longbench",
        "It beats lists of heads fixed beforehand on LongBench and LooGLE",
        "7.94 against 7.80 (HeadKV-R2) at 40 %, Llama-2-7B; 10.73 against 10.63, Mistral-7B",
        "needs the weights of a 7B model, the data sets, and the fixed lists",
        command=_BIG.format("mistralai/Mistral-7B-Instruct-v0.2"),
    ),
    Claim(
        "haystack",
        "Heads near the centre gather and steer reasoning: without them passkeys are still found, "
        "and reasoning over a haystack fails",
        "37.15 against 36.85 (HeadKV-R2) at 50 %, Llama-2-7B",
        "needs a model that reasons over a haystack",
        command=_BIG.format("meta-llama/Llama-2-7b-chat-hf"),
    ),
)


@dataclass(frozen=True)
class Size:
    """How much is measured: prompts of a kind and their tokens, and the tokens that follow."""

    map_prompts: int = 8
    map_tokens: int = 400
    silent_prompts: int = 5
    silent_tokens: int = 384
    curve_prompts: int = 8
    curve_tokens: int = 900
    tail: int = 100
    sinks: int = 4
    recent: int = 32


@dataclass(frozen=True)
class Text:
    """A prompt `[1, tokens]` and what follows it."""

    prompt: Tensor
    tail: Tensor


class Reading(Handler):
    """Keeps the calls of the prompt and their States."""

    def __init__(self) -> None:
        self.seen: list[tuple[Call, State]] = []

    def after(self, call: Call, state: State) -> None:
        self.seen.append((call, state))


class Silent(Handler):
    """Query heads whose output is 0, by layer."""

    def __init__(self, heads: dict[int, list[int]]) -> None:
        self.heads = heads

    def after(self, call: Call, state: State) -> State:
        out = state.out.clone()
        out[:, self.heads[call.site.layer]] = 0
        return State(out, state.lse)


class NoMiddle(TaskKV):
    """Task-KV without middle tokens: fewer entries."""

    def keep(self, scores: Tensor, plan: Plan) -> Tensor:
        return ends_and_best(scores, plan.sinks, 0, plan.recent)


class MoreRecent(TaskKV):
    """Task-KV with as many more recent tokens in place of the middle ones."""

    def keep(self, scores: Tensor, plan: Plan) -> Tensor:
        return ends_and_best(scores, plan.sinks, 0, plan.recent + plan.middle)


class RandomMiddle(TaskKV):
    """Task-KV with middle tokens drawn at random."""

    def keep(self, scores: Tensor, plan: Plan) -> Tensor:
        draw = torch.Generator().manual_seed(SEED + int(scores.shape[-1]))
        drawn = torch.rand(scores.shape, generator=draw).to(scores.device)
        return ends_and_best(drawn, plan.sinks, plan.middle, plan.recent)


def measure(setup: Setup) -> Measured:
    """The map of far heads, silenced heads, and the loss over shortened caches."""
    size = Size()
    if setup.quick:
        size = Size(2, 60, 1, 60, 2, 80, 16, 2, 4)
    what: dict[str, Callable[..., Any]] = {"map": _far, "silent": _silenced, "curve": _curve}
    made = {f"{n} {k}": partial(what[n], setup, k, size) for n, k in product(what, KINDS)}
    with quiet("Task-KV: "):  # with three key heads a small budget holds no full head
        every = setup.parts("Task-KV", made)
    parts = {n: {k: every[f"{n} {k}"] for k in KINDS} for n in what}
    return Measured(
        claims=_settle(parts).values(),
        data=(
            "Three kinds of prompt. Retrieval: made-up facts and a question about some; the answer "
            "follows. Summary: a passage of northanger-abbey; for the map of heads a request to "
            "summarise it, else the novel follows. Code: Python's own sources "
            f"({', '.join(CODE)}). Of each kind {size.map_prompts} prompts of about "
            f"{size.map_tokens} tokens for the map, {size.silent_prompts} of {size.silent_tokens} "
            f"for silenced heads, {size.curve_prompts} of {size.curve_tokens} for the budgets, and "
            f"up to {size.tail} tokens after each of the latter two. The first of these is read "
            "off the prompt, which no method changes, and left out. Intervals: bootstrap over "
            "prompts."
        ),
        seeds={"prompts": SEED, "controls": SEED, "bootstrap": 0},
        settings={
            "ratios": list(RATIOS),
            "sinks": size.sinks,
            "recent": size.recent,
            "beta": 0.25,
            "m": 1,
            "window": 32,
            "pool": 7,
            "top": 256,
            "share of far heads": SHARE,
        },
    )


# -- what is measured ----------------------------------------------------------------------------
def _far(setup: Setup, kind: str, size: Size) -> list[list[list[int]]]:
    """The far query heads of every layer, prompt by prompt."""
    texts = _texts(setup, kind, size.map_prompts, size.map_tokens, 0, ask=True)
    return [_ranked(setup.model, t.prompt)[0] for t in texts]


def _ranked(model: Any, ids: Tensor) -> tuple[list[list[int]], list[list[int]], int]:
    """The farthest and the nearest quarter of the query heads of every layer, and their number.

    A head's vector is its mean output over the last 32 queries.
    """
    seen = _read(model, ids)
    apart = torch.stack([distances(s.out[:, :, -32:].float().mean(2))[0] for _, s in seen])
    count = max(1, round(SHARE * apart.shape[1]))
    order = apart.sort(dim=-1, descending=True, stable=True).indices
    far, near = order[:, :count], order[:, -count:]
    return far.sort(-1).values.tolist(), near.sort(-1).values.tolist(), apart.shape[1]


def _read(model: Any, ids: Tensor) -> list[tuple[Call, State]]:
    from regard.watching import apply

    with torch.no_grad(), apply(model, reading := Reading()):
        model(ids, use_cache=False, logits_to_keep=1)
    return reading.seen


def _silenced(setup: Setup, kind: str, size: Size) -> dict[str, list[float]]:
    """Loss of the continuation of every prompt: plain, far, random and near heads silenced."""
    found: dict[str, list[float]] = {n: [] for n in ("plain", "far", "random", "near")}
    draw = random.Random(SEED)
    for text in _texts(setup, kind, size.silent_prompts, size.silent_tokens, size.tail):
        far, near, heads = _ranked(setup.model, text.prompt)
        drawn = [[sorted(draw.sample(range(heads), len(f))) for f in far] for _ in range(DRAWS)]
        found["plain"].append(_loss(setup.model, text))
        found["far"].append(_loss(setup.model, text, far))
        found["near"].append(_loss(setup.model, text, near))
        found["random"].append(mean([_loss(setup.model, text, own) for own in drawn]))
    return found


def _loss(model: Any, text: Text, silent: list[list[int]] | None = None) -> float:
    """Nats a token of the continuation, read in one pass with the prompt."""
    from regard.watching import apply

    methods = [] if silent is None else [Silent(dict(enumerate(silent)))]
    ids = torch.cat([text.prompt, text.tail], 1)
    with torch.no_grad(), apply(model, *methods):
        logits = model(ids, use_cache=False, logits_to_keep=text.tail.shape[1]).logits
    return _nats(logits[:, :-1], text.tail)


def _nats(logits: Tensor, tail: Tensor) -> float:
    """Loss of the continuation but for its first token, from the logits of the tokens before."""
    return float(torch.nn.functional.cross_entropy(logits[0].float(), tail[0, 1:]))


def _curve(setup: Setup, kind: str, size: Size) -> dict[str, list[float]]:
    """Loss of the continuation over the caches that every method leaves, by prompt."""
    found: dict[str, list[float]] = {}
    for text in _texts(setup, kind, size.curve_prompts, size.curve_tokens, size.tail):
        seen = _read(setup.model, text.prompt)
        for name, method in _methods(size).items():
            found.setdefault(name, []).append(_over(setup.model, method, seen, text.tail))
    return found


def _methods(size: Size) -> dict[str, Evicting]:
    fixed: dict[str, Any] = {"beta": 0.25, "m": 1, "sinks": size.sinks, "recent": size.recent}
    made: dict[str, Evicting] = {"full": TaskKV(ratio=1, **fixed)}
    for ratio in RATIOS:
        made[f"Task-KV {ratio}"] = TaskKV(ratio=ratio, **fixed)
        made[f"StreamingLLM {ratio}"] = StreamingLLM(ratio=ratio, sinks=size.sinks)
        made[f"SnapKV {ratio}"] = SnapKV(ratio=ratio, window=size.recent)
        made[f"Random {ratio}"] = RandomEviction(ratio=ratio, seed=SEED)
    made["none"] = NoMiddle(ratio=0.4, **fixed)
    made["recent"] = MoreRecent(ratio=0.4, **fixed)
    made["drawn"] = RandomMiddle(ratio=0.4, **fixed)
    return made


def _over(model: Any, method: Evicting, seen: list[tuple[Call, State]], tail: Tensor) -> float:
    """Loss of the continuation after a prompt that was read once for all methods.

    The prompt reads alike under each of them, so each is shown the calls of that one reading.
    """
    from transformers import DynamicCache

    from regard.watching import apply

    with torch.no_grad(), apply(model, method):
        cache = DynamicCache(config=model.config)
        method.cache(cache)
        for call, state in seen:
            cache.update(call.k, call.v, call.site.layer)
            method.before(call)
            method.after(call, state)
        logits = model(tail[:, :-1], past_key_values=cache).logits
    return _nats(logits, tail)


# -- prompts -------------------------------------------------------------------------------------
_FIRST = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack")
_LAST = ("Reed", "Stone", "Mills", "Carter", "Hughes", "Price", "Ward", "Lane", "Cole", "Webb")


def _texts(
    setup: Setup, kind: str, count: int, tokens: int, tail: int, ask: bool = False
) -> Iterator[Text]:
    """Prompts of about so many tokens, each with up to `tail` tokens that follow."""
    from regard.zoo import text

    def ids(words: str, special: bool = False) -> list[int]:
        found: list[int] = setup.tokenizer(words, add_special_tokens=special)["input_ids"]
        return found

    def pack(prompt: list[int], rest: list[int]) -> Text:
        where = setup.model.device
        return Text(torch.tensor([prompt], device=where), torch.tensor([rest], device=where))

    lead = ids("", special=True)
    if kind == "retrieval":
        draw = random.Random(SEED)
        for _ in range(count):
            prompt, answer = _facts(draw, lambda words: len(ids(words)) + len(lead), tokens)
            yield pack(lead + ids(prompt), ids(answer)[: tail or None])
        return
    if kind == "summary":
        whole = ids(text("northanger-abbey")[: 12 * count * (tokens + tail)])
    else:
        sources = [inspect.getsource(importlib.import_module(n)) for n in CODE]
        whole = ids("\n".join(sources)[: 12 * count * (tokens + tail)])
    request = ids(SUMMARISE) if ask and kind == "summary" else []
    own = max(tokens - len(lead) - len(request), 1)
    for n in range(count):
        start = n * (tokens + tail)
        end = start + own
        yield pack([*lead, *whole[start:end], *request], whole[end : end + tail])


def _facts(draw: random.Random, length: Callable[[str], int], tokens: int) -> tuple[str, str]:
    """Facts that fill so many tokens with the question about some of them, and the answer."""
    people = [f"{a} {b}" for a, b in draw.sample(list(product(_FIRST, _LAST)), 100)]
    numbers = [draw.randint(10_000, 99_999) for _ in people]
    seed = draw.random()
    facts = [f"The badge number of {p} is {n}." for p, n in zip(people, numbers)]

    def made(count: int) -> tuple[str, str]:
        asked = sorted(random.Random(seed).sample(range(count), min(4, count)))
        names = ", ".join(people[n] for n in asked)
        answer = " " + ", ".join(f"{people[n]} has {numbers[n]}" for n in asked) + "."
        return (
            f"{' '.join(facts[:count])}\n\nQuestion: Who has which number: {names}?\nAnswer:",
            answer,
        )

    count = 1
    while count < len(facts) and length(made(count + 1)[0]) <= tokens:
        count += 1
    return made(count)


# -- verdicts ------------------------------------------------------------------------------------
def _settle(parts: dict[str, dict[str, Any]]) -> dict[str, Claim]:
    stated = {c.key: c for c in CLAIMS}
    curve = parts["curve"]
    return {
        "task": _settle_map(stated["task"], parts["map"]),
        "far-heads": _settle_silent(stated["far-heads"], parts["silent"]),
        "budget": _settle_budget(stated["budget"], curve),
        "middle": _settle_middle(stated["middle"], curve),
        "as-full": _settle_full(stated["as-full"], curve),
    }


def _joined(parts: dict[str, dict[str, list[float]]], name: str) -> list[float]:
    return [x for kind in KINDS for x in parts[kind][name]]


def _gains(overlap: Tensor, kinds: Sequence[str]) -> list[float]:
    """For every prompt, its mean overlap with its own kind less that with the others."""
    found = []
    for n, kind in enumerate(kinds):
        own = [float(overlap[n, m]) for m, k in enumerate(kinds) if k == kind and m != n]
        other = [float(overlap[n, m]) for m, k in enumerate(kinds) if k != kind]
        found.append(mean(own) - mean(other))
    return found


def _settle_map(claim: Claim, far: dict[str, list[list[list[int]]]]) -> Claim:
    kinds = [kind for kind in KINDS for _ in far[kind]]
    sets = [{(n, h) for n, own in enumerate(p) for h in own} for k in KINDS for p in far[k]]
    overlap = torch.tensor([[len(a & b) / len(a | b) for b in sets] for a in sets])
    gains = _gains(overlap, kinds)
    low, high = bootstrap(gains)
    draw, shuffled, draws = random.Random(SEED), list(kinds), 2000
    above = 0
    for _ in range(draws):
        draw.shuffle(shuffled)
        above += mean(_gains(overlap, shuffled)) >= mean(gains)
    p = (above + 1) / (draws + 1)
    pairs = [(a, b) for a in range(len(kinds)) for b in range(a)]
    within = mean([float(overlap[a, b]) for a, b in pairs if kinds[a] == kinds[b]])
    across = mean([float(overlap[a, b]) for a, b in pairs if kinds[a] != kinds[b]])
    by_kind = {k: mean([g for g, own in zip(gains, kinds) if own == k]) for k in KINDS}
    count = len(far[KINDS[0]][0][0])
    return claim.settle(
        {
            "within": within,
            "across": across,
            "low": low,
            "high": high,
            "p": p,
            **{f"gain_{k}": x for k, x in by_kind.items()},
            "heads": count,
        },
        here=f"{within:.3f} within a kind, {across:.3f} across",
        control="kinds shuffled: a difference of 0",
        interval=Interval("difference, bootstrap", low, high, p),
        note="difference by kind: "
        + ", ".join(f"{k} {x:+.3f}" for k, x in by_kind.items())
        + f"; {count} query heads of each layer. Prompts of the first two kinds share their last "
        "words, the request, which is part of what a task is",
    )


def _settle_silent(claim: Claim, parts: dict[str, dict[str, list[float]]]) -> Claim:
    loss = {name: _joined(parts, name) for name in ("plain", "far", "random", "near")}
    rise = {n: mean(loss[n]) - mean(loss["plain"]) for n in ("far", "random", "near")}
    values: dict[str, Any] = {"plain": mean(loss["plain"]), **rise}
    for a, b in (("far", "random"), ("random", "near"), ("far", "near")):
        values |= paired(loss[a], loss[b]).limits(f"{a}_{b}_{{}}")
    by_kind = {
        k: [mean(parts[k][n]) - mean(parts[k]["plain"]) for n in ("far", "random", "near")]
        for k in KINDS
    }
    return claim.settle(
        {**values, "by_kind": by_kind},
        here=f"far {rise['far']:+.3f}, near {rise['near']:+.3f} nats a token",
        control=f"random heads, mean of {DRAWS} draws: {rise['random']:+.3f}",
        interval=Interval(
            "far less near, bootstrap", values["far_near_low"], values["far_near_high"]
        ),
        note=f"plain loss {values['plain']:.3f}; far, random, near by kind: "
        + "; ".join(f"{k} " + ", ".join(f"{x:+.2f}" for x in own) for k, own in by_kind.items()),
    )


def _settle_budget(claim: Claim, parts: dict[str, dict[str, list[float]]]) -> Claim:
    full = _joined(parts, "full")
    values: dict[str, Any] = {"full": mean(full)}
    shown = []
    for ratio in RATIOS:
        own = _joined(parts, f"Task-KV {ratio}")
        row = [f"Task-KV {mean(own) - mean(full):+.3f}"]
        values[f"Task-KV_{ratio}"] = mean(own) - mean(full)
        for name in ("StreamingLLM", "SnapKV", "Random"):
            other = _joined(parts, f"{name} {ratio}")
            values[f"{name}_{ratio}"] = mean(other) - mean(full)
            apart = paired(own, other)
            values |= apart.limits(f"{{}}_{name}_{ratio}")
            shift = values[f"{name}_{ratio}"]
            row.append(f"{name} {shift:+.3f} ({apart.low:+.3f} to {apart.high:+.3f})")
        shown.append(f"{100 * ratio:.0f} %: {', '.join(row)}")
    for kind in KINDS:
        values[f"by_kind_{kind}"] = {n: mean(x) for n, x in parts[kind].items()}
    return claim.settle(
        values,
        here=f"rise over the full cache at 40 %: Task-KV {values['Task-KV_0.4']:+.3f}, SnapKV "
        f"{values['SnapKV_0.4']:+.3f}, StreamingLLM {values['StreamingLLM_0.4']:+.3f} nats a token",
        control=f"random rows {values['Random_0.4']:+.3f}",
        interval=Interval(
            "Task-KV less SnapKV at 40 %, bootstrap",
            values["low_SnapKV_0.4"],
            values["high_SnapKV_0.4"],
        ),
        note="rise, and the interval of Task-KV less the other: "
        + "; ".join(shown)
        + ". Of three key heads one is full at 40 and 60 %, none at 30 %",
    )


def _settle_middle(claim: Claim, parts: dict[str, dict[str, list[float]]]) -> Claim:
    own, full = _joined(parts, "Task-KV 0.4"), _joined(parts, "full")
    values: dict[str, Any] = {"selected": mean(own) - mean(full)}
    for name in ("none", "recent", "drawn"):
        other = _joined(parts, name)
        values[name] = mean(other) - mean(full)
        values |= paired(own, other).limits(f"{{}}_{name}")
    return claim.settle(
        values,
        here=f"selected {values['selected']:+.3f}, none {values['none']:+.3f}, more recent ones "
        f"{values['recent']:+.3f} nats a token over the full cache",
        control=f"as many drawn at random {values['drawn']:+.3f}",
        interval=Interval(
            "selected less more recent, bootstrap", values["low_recent"], values["high_recent"]
        ),
        note=f"selected less none: {values['low_none']:+.3f} to {values['high_none']:+.3f}; less "
        f"random ones: {values['low_drawn']:+.3f} to {values['high_drawn']:+.3f}. Merged tokens "
        "are not built here",
    )


def _settle_full(claim: Claim, parts: dict[str, dict[str, list[float]]]) -> Claim:
    values: dict[str, Any] = {}
    for kind in KINDS:
        rise = paired(parts[kind]["Task-KV 0.4"], parts[kind]["full"])
        values |= {kind: rise.mean, **rise.limits(f"{{}}_{kind}")}
        values[f"full_{kind}"] = mean(parts[kind]["full"])
    return claim.settle(
        values,
        here=", ".join(f"{k} {values[k]:+.3f}" for k in KINDS) + " nats a token",
        control="full cache: "
        + ", ".join(f"{k} {values[f'full_{k}']:.3f}" for k in KINDS)
        + " nats a token",
        interval=Interval(
            "retrieval, bootstrap", values["low_retrieval"], values["high_retrieval"]
        ),
        note="summary: the novel goes on after a passage, as a measured summary needs a larger "
        f"model; {values['low_summary']:+.3f} to {values['high_summary']:+.3f}",
    )
