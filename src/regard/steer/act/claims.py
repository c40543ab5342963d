"""The claims of "Unveiling and Harnessing Hidden Attention Sinks" (Yu et al., 2024)."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.lab.intervals import Paired, bootstrap, mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, quiet, verdict
from regard.lab.reproduce.problems import problems
from regard.lab.trials.labels import TASKS, Example, labels, sentences

from .heads import HeadFilter, choose, shape_of
from .method import ACT

KINDS = ("English", "maths", "code")
CODE = ("json.decoder", "textwrap", "heapq")  # sources that every Python carries
TOKENS, THRESHOLD, EDGE = 100, 0.1, 8  # the last columns rest on few rows
BETA, ALPHA = 0.4, 5.0
SHARE = 0.2  # heads kept: the published list for classification has 184 of 928
HEADS_DRAWN, COLUMNS_DRAWN = 5, 3
SEED = 0

_BIG = "regard reproduce act --model {}"
CLAIMS = (
    Claim(
        "hidden-sinks",
        "Sinks appear not only at the first token but at later tokens too, whatever the input "
        "(share of layer and head pairs with a later token whose mean received attention exceeds "
        "0.1; the first two layers, the last one and the last 8 tokens left out)",
        "shown for Llama-2 on 17 data sets, no share given",
        "reproduced if the share exceeds 20 % on English, maths and code, each interval above it; "
        "partly if on one of them",
        lambda v: verdict(
            min(v[f"low_{k}"] for k in KINDS) > 20, max(v[f"low_{k}"] for k in KINDS) > 20
        ),
    ),
    Claim(
        "not-all-help",
        "Not every sink helps: shrinking the later sinks of one head alone raises the score for "
        "some heads and lowers it for others (change in the margin of the right label)",
        "a minority of heads is kept: 184 of 928 for classification in Llama-2-7B-chat",
        "reproduced if more than 5 % of the heads raise the margin with a 95 % interval above 0 "
        "and more than 5 % lower it likewise (chance gives 2.5 % each); partly if one of the two",
        lambda v: verdict(
            v["raising"] > 5 and v["lowering"] > 5, v["raising"] > 5 or v["lowering"] > 5
        ),
    ),
    Claim(
        "gain",
        "Heads chosen on training prompts, changed together, raise the score on other prompts "
        "(held-out margin of the right label, in nats)",
        "up to +7.30 points of accuracy on average (Llama-30B)",
        "reproduced if the held-out margin rises with an interval above 0, and by more than with "
        "as many random heads and with as many random later columns, both differences with "
        "intervals above 0; partly if it rises with an interval above 0",
        lambda v: verdict(
            v["low"] > 0 and v["over_heads_low"] > 0 and v["over_columns_low"] > 0, v["low"] > 0
        ),
    ),
    Claim(
        "first-token",
        "The first token's sink must be kept: shrinking it hurts far more than shrinking the later "
        "ones (rise of the log-perplexity of English, all heads)",
        "qualitative",
        "reproduced if shrinking token 0 costs at least twice what shrinking the later sinks "
        "costs, the interval of the difference above 0; partly if it costs more",
        lambda v: verdict(
            v["first"] >= 2 * max(v["later"], 0) and v["low"] > 0, v["first"] > v["later"]
        ),
    ),
    Claim(
        "accuracy",
        "Accuracy rises over several models and families of tasks",
        "+7.30 points on average (Llama-30B), Llama-2-7B-chat and Mistral-7B likewise",
        "needs the weights of a 7B to 30B model and the data sets",
        command=_BIG.format("huggyllama/llama-30b"),
    ),
    Claim(
        "few-shot",
        "It helps with examples in the prompt and in open-ended answers too",
        "0 to 16 shots; SQuAD v1 and v2; MT-Bench (third-party summary)",
        "needs a chat model of 7B and a judge of its answers",
        command=_BIG.format("meta-llama/Llama-2-7b-chat-hf"),
    ),
)


@dataclass(frozen=True)
class Size:
    """How much is measured: prompts of a kind, training and held-out prompts of a task, windows."""

    prompts: int = 12
    train: int = 16
    held_out: int = 60
    windows: int = 8
    skip_layers: tuple[int, int] = (2, 1)


class RandomColumns(ACT):
    """ACT on random later tokens, as many in each head as it has sinks: a control."""

    seed: int = 0

    def _above(self, total: Tensor, count: Tensor) -> Tensor:
        wanted = super()._above(total, count).sum(-1, keepdim=True)
        real = count > 0
        later = real & (real.cumsum(-1) > self.keep_first)
        draw = torch.rand(later.shape, generator=torch.Generator().manual_seed(self.seed))
        rank = draw.to(later.device).masked_fill(~later, 2.0).argsort(-1).argsort(-1)
        return later & (rank < wanted)


class FirstToken(ACT):
    """ACT on the first token where it is a sink, and on no other."""

    def _above(self, total: Tensor, count: Tensor) -> Tensor:
        real = count > 0
        return super()._above(total, count) & (real.cumsum(-1) == 1)


def measure(setup: Setup) -> Measured:
    """Sinks on three kinds of text, every head alone, the chosen heads together, and token 0."""
    count, _ = shape_of(setup.model)
    size = Size()
    if setup.quick:
        layers = count["layers"]
        size = Size(3, 4, 6, 2, (max(layers // 2 - 1, 0), layers - layers // 2 - 1))
    made: dict[str, Callable[[], Any]] = {k: partial(_sinks, setup, k, size) for k in KINDS}
    made["heads"] = partial(_heads, setup, size)
    made["gain"] = lambda: _gain(setup, size, setup.journal.parts["heads"])
    made["first"] = partial(_first, setup, size)
    with quiet("ACT: "):  # its word on many sinks: here the shares are what is measured
        parts = setup.parts("ACT", made)
    return Measured(
        claims=_settle(parts).values(),
        data=(
            f"Sinks: {size.prompts} prompts of {TOKENS} tokens each of northanger-abbey, of word "
            f"problems and of Python's own sources ({', '.join(CODE)}). Labels: sentences made "
            f"from templates, {size.train} of each task ({', '.join(TASKS)}) to choose heads on, "
            f"{size.held_out} others to measure on; the same templates make both. Perplexity: "
            f"{size.windows} windows of {2 * TOKENS} tokens of northanger-abbey. Intervals: "
            "bootstrap over prompts, sentences or windows."
        ),
        seeds={"data": SEED, "controls": SEED, "bootstrap": 0},
        settings={
            "beta": BETA,
            "alpha": ALPHA,
            "threshold": THRESHOLD,
            "heads kept": SHARE,
            "skip_layers": list(size.skip_layers),
            "head list": parts["heads"]["chosen"],
        },
    )


# -- what is measured ----------------------------------------------------------------------------
def _sinks(setup: Setup, kind: str, size: Size) -> dict[str, list[float]]:
    """Percent of (layer, head) pairs with a sink at a later token and at token 0, by prompt."""
    later, relative, first = [], [], []
    for ids in _windows(setup, kind, size.prompts, TOKENS):
        alpha = _received(setup.model, ids, size.skip_layers)[..., :-EDGE]
        later.append(100 * _share(alpha[..., 1:] > THRESHOLD))
        relative.append(100 * _share(alpha[..., 1:] > ALPHA / ids.shape[1]))
        first.append(100 * _share(alpha[..., :1] > THRESHOLD))
    return {"later": later, "relative": relative, "first": first}


def _share(sinks: Tensor) -> float:
    return float(sinks.any(-1).float().mean())


def _received(model: Any, ids: Tensor, skip: tuple[int, int]) -> Tensor:
    from regard.watching import watch

    with torch.no_grad(), watch(model, ["mean_received"]) as seen:
        model(ids, use_cache=False, logits_to_keep=1)
    found = [seen["mean_received"][n][0] for n in seen["mean_received"]]
    return torch.stack(found[skip[0] : len(found) - skip[1]])


def _windows(setup: Setup, kind: str, count: int, tokens: int) -> Iterator[Tensor]:
    """Prompts `[1, tokens]`: consecutive windows of the text."""
    from regard.zoo import text

    if kind == "English":
        whole = text("northanger-abbey")
    elif kind == "maths":
        whole = "\n\n".join(problems(6 * count, SEED))
    else:
        whole = "\n".join(inspect.getsource(importlib.import_module(n)) for n in CODE)
    ids = setup.tokenizer(whole[: 40 * tokens * count])["input_ids"]
    for n in range(count):
        yield torch.tensor([ids[n * tokens : (n + 1) * tokens]], device=setup.model.device)


def _heads(setup: Setup, size: Size) -> dict[str, Any]:
    """Every head alone on the training sentences, and the fifth of them that helps most."""
    train = {t: _examples(t, size)[: size.train] for t in TASKS}
    pairs = [(t, e) for t, own in train.items() for e in own]
    path = setup.journal.path
    records = None if path is None else Path(path).with_name(".act.heads.jsonl")
    found = HeadFilter(
        setup.model,
        setup.tokenizer,
        beta=BETA,
        alpha=ALPHA,
        skip_layers=size.skip_layers,
        records=records,
        progress=setup.show,
    )
    found.fit(
        [TASKS[t].template.replace("{text}", e.text) for t, e in pairs],
        [e.label for _, e in pairs],
        [TASKS[t].labels for t, _ in pairs],
    )
    count = max(1, round(SHARE * len(found.scores_)))
    intervals = [bootstrap(c, draws=2000) for c in found.changes_.values()]
    if records is not None:
        records.unlink(missing_ok=True)
    return {
        "chosen": {str(n): h for n, h in choose(found.scores_, top_k=count).items()},
        "baseline": found.baseline_,
        "margin": [r["margin"] for r in found.scores_],
        "accuracy": [r["accuracy"] for r in found.scores_],
        "where": [[r["layer"], r["head"]] for r in found.scores_],
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
    }


def _examples(task: str, size: Size) -> list[Example]:
    return sentences(task, size.train + size.held_out, SEED)


def _gain(setup: Setup, size: Size, found: dict[str, Any]) -> dict[str, Any]:
    """Held-out margins and hits: plain, chosen heads, random heads, random columns."""
    chosen = {int(n): heads for n, heads in found["chosen"].items()}
    fixed: dict[str, Any] = {"beta": BETA, "alpha": ALPHA, "skip_layers": size.skip_layers}
    runs: dict[str, list[Any]] = {"plain": [[]], "chosen": [[ACT(heads=chosen, **fixed)]]}
    count = sum(map(len, chosen.values()))
    draw = torch.Generator().manual_seed(SEED)
    runs["heads"], runs["columns"] = [], []
    for _ in range(HEADS_DRAWN):
        picks = torch.randperm(len(found["where"]), generator=draw)[:count].tolist()
        runs["heads"].append([ACT(heads=_listed([found["where"][n] for n in picks]), **fixed)])
    for seed in range(COLUMNS_DRAWN):
        control = RandomColumns(heads=chosen, **fixed)
        control.seed = seed
        runs["columns"].append([control])
    done: dict[str, Any] = {}
    for name, methods in runs.items():
        scored = [_held_out(setup, size, own) for own in methods]
        done[name] = {
            "margins": torch.tensor([s[0] for s in scored]).mean(0).tolist(),
            "correct": torch.tensor([s[1] for s in scored]).mean(0).tolist(),
        }
    return done


def _listed(pairs: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    heads: dict[int, list[int]] = {}
    for layer, head in sorted(map(tuple, pairs)):
        heads.setdefault(layer, []).append(head)
    return heads


def _held_out(setup: Setup, size: Size, methods: list[Any]) -> tuple[list[float], list[float]]:
    margins: list[float] = []
    correct: list[float] = []
    for task, how in TASKS.items():
        result = labels(
            setup.model,
            setup.tokenizer,
            _examples(task, size)[size.train :],
            how.labels,
            template=how.template,
            methods=methods,
        )
        margins += result.margins
        correct += map(float, result.correct)
    return margins, correct


def _first(setup: Setup, size: Size) -> dict[str, list[float]]:
    """Log-perplexity of every window: plain, later sinks, token 0, random later tokens shrunk."""
    from regard.watching import apply

    fixed: dict[str, Any] = {"beta": BETA, "alpha": ALPHA, "skip_layers": size.skip_layers}
    runs: dict[str, list[Any]] = {
        "plain": [],
        "later": [ACT(**fixed)],
        "first": [FirstToken(keep_first=0, **fixed)],
        "columns": [RandomColumns(**fixed)],
    }
    found: dict[str, list[float]] = {name: [] for name in runs}
    for ids in _windows(setup, "English", size.windows, 2 * TOKENS):
        for name, methods in runs.items():
            with torch.no_grad(), apply(setup.model, *methods):
                logits = setup.model(ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            found[name].append(float(loss))
    return found


# -- verdicts ------------------------------------------------------------------------------------
def _settle(parts: dict[str, Any]) -> dict[str, Claim]:
    stated = {c.key: c for c in CLAIMS}
    return {
        "hidden-sinks": _settle_sinks(stated["hidden-sinks"], parts),
        "not-all-help": _settle_heads(stated["not-all-help"], parts["heads"]),
        "gain": _settle_gain(stated["gain"], parts["gain"], parts["heads"]),
        "first-token": _settle_first(stated["first-token"], parts["first"]),
    }


def _settle_sinks(claim: Claim, parts: dict[str, Any]) -> Claim:
    values: dict[str, Any] = {}
    for kind in KINDS:
        values[kind] = mean(parts[kind]["later"])
        values[f"low_{kind}"], values[f"high_{kind}"] = bootstrap(parts[kind]["later"])
        values[f"relative_{kind}"] = mean(parts[kind]["relative"])
        values[f"first_{kind}"] = mean(parts[kind]["first"])
    low, high = bootstrap([x for k in KINDS for x in parts[k]["later"]])

    def shown(prefix: str) -> str:
        return ", ".join(f"{k} {values[prefix + k]:.0f} %" for k in KINDS)

    return claim.settle(
        values,
        here=shown(""),
        control="token 0: " + shown("first_"),
        interval=Interval("%, all prompts, bootstrap", low, high),
        note=f"above {ALPHA:g} / N: {shown('relative_')}",
    )


def _settle_heads(claim: Claim, found: dict[str, Any]) -> Claim:
    heads = len(found["margin"])
    raising = 100 * sum(x > 0 for x in found["low"]) / heads
    lowering = 100 * sum(x < 0 for x in found["high"]) / heads
    edges = [-torch.inf, -0.1, -0.03, -0.01, 0.0, 0.01, 0.03, 0.1, torch.inf]
    none = sum(x == 0 for x in found["margin"])
    histogram = {
        f"{low:g} to {high:g}": sum(low < x <= high and x != 0 for x in found["margin"])
        for low, high in pairwise(edges)
    }
    better = sum(x > 0 for x in found["accuracy"])
    worse = sum(x < 0 for x in found["accuracy"])
    return claim.settle(
        {
            "raising": raising,
            "lowering": lowering,
            "heads": heads,
            "unchanged": none,
            "histogram": histogram,
            "accuracy_better": better,
            "accuracy_worse": worse,
            "baseline": found["baseline"],
        },
        here=f"{raising:.0f} % of {heads} heads raise it, {lowering:.0f} % lower it",
        control="2.5 % each by chance",
        note="change in nats: "
        + ", ".join(f"{name}: {n}" for name, n in histogram.items())
        + f"; {none} heads without a sink. By accuracy (of {found['baseline']['accuracy']:.2f}) "
        f"{better} heads are better and {worse} worse",
    )


def _settle_gain(claim: Claim, found: dict[str, Any], heads: dict[str, Any]) -> Claim:
    def change(name: str, other: str, what: str = "margins") -> Paired:
        return paired(found[name][what], found[other][what])

    gain = change("chosen", "plain")
    over_heads = change("chosen", "heads")
    over_columns = change("chosen", "columns")
    hits = change("chosen", "plain", "correct")
    accuracy = {n: 100 * mean(found[n]["correct"]) for n in found}
    controls = {n: change(n, "plain").mean for n in ("heads", "columns")}
    count = sum(map(len, heads["chosen"].values()))
    return claim.settle(
        {
            "gain": gain.mean,
            **gain.limits(),
            **over_heads.limits("over_heads_{}"),
            **over_columns.limits("over_columns_{}"),
            "random_heads": controls["heads"],
            "random_columns": controls["columns"],
            "accuracy": accuracy,
            "heads": count,
        },
        here=f"{gain.mean:+.3f} nats; accuracy {accuracy['plain']:.1f} to "
        f"{accuracy['chosen']:.1f} %",
        control=f"random heads {controls['heads']:+.3f} ({accuracy['heads']:.1f} %), random "
        f"columns {controls['columns']:+.3f} ({accuracy['columns']:.1f} %)",
        interval=Interval("nats, bootstrap", gain.low, gain.high),
        note=f"{count} heads; change of the accuracy {100 * hits.low:+.1f} to "
        f"{100 * hits.high:+.1f} points",
    )


def _settle_first(claim: Claim, found: dict[str, list[float]]) -> Claim:
    rises = {n: paired(found[n], found["plain"]) for n in ("first", "later", "columns")}
    _, low, high, _ = paired(rises["first"].values, rises["later"].values)
    rise = {name: one.mean for name, one in rises.items()}
    return claim.settle(
        {**rise, "low": low, "high": high, "plain": mean(found["plain"])},
        here=f"token 0 {rise['first']:+.3f}, later sinks {rise['later']:+.3f} nats a token",
        control=f"random later tokens, as many: {rise['columns']:+.3f}",
        interval=Interval("token 0 over later sinks, bootstrap", low, high),
        note=f"log-perplexity of the plain model {mean(found['plain']):.3f}",
    )
