"""The claims of "Steering Language Generation: Harnessing Contrastive Expert Guidance and Negative
Prompting for Coherent and Diverse Synthetic Data Generation" (O'Neill et al., 2023).

A LoRA expert of SmolLM2 that writes sentences of a novel is sampled on a grid of gamma and eta.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch

from regard.errors import InputError
from regard.lab.intervals import mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.report.chart import Line, Panel, chart

from .method import ContrastiveExpertGuidance
from .sampling import clean

GAMMAS, ETAS = (0.0, 0.4, 0.8), (0.0, 0.3, 0.6, 1.0)
SAMPLES, TOKENS, NEGATIVES, BATCH, SEED = 64, 32, 5, 32, 0
CONTEXT = 12  # held-out sentences that the scorer reads first
NUCLEUS = "nucleus"
SHOWS = (
    "Coherence against diversity, better upwards and to the right: a line a gamma, along it rising "
    "eta, and as controls nucleus sampling and the held-out sentences, which nothing tells from "
    "themselves (AUROC 0.5)."
)

_BIG = (
    "regard run steer --expert YOUR-LORA --base tiiuae/falcon-7b --negatives real.txt "
    "--prompt @task.txt --gamma 0.2 --eta 0.6 -n 1000 --out synth.jsonl"
)
CLAIMS = (
    Claim(
        "coherence",
        "Contrastive expert guidance keeps samples in the domain (gain in log-likelihood per token "
        "under a held-out scorer, gamma 0.8 against 0; real against synthetic AUROC)",
        "qualitative",
        "reproduced if the interval of the gain lies above 0 and the AUROC falls; partly if one of "
        "the two holds",
        lambda v: verdict(v["low"] > 0 and v["auroc"] < v["auroc_0"], _one(v)),
    ),
    Claim(
        "cost",
        "Guidance alone costs diversity (distinct-3, gamma 0.8 against 0)",
        "released samples, counted anew: .699 at gamma 1 against .916",
        "reproduced if distinct-3 falls with p < 0.05; partly if it falls",
        lambda v: verdict(v["change"] < 0 and v["p"] < 0.05, v["change"] < 0),
    ),
    Claim(
        "distance",
        "Negative prompting moves samples away from the negatives (largest cosine to one's own "
        "negatives, eta 0.6 against 0, gamma 0.4)",
        "qualitative",
        "reproduced if the interval of the change lies below 0, also after the change towards "
        "other samples' negatives is taken off; partly if the change does",
        lambda v: verdict(v["high"] < 0 and v["own_high"] < 0, v["high"] < 0),
    ),
    Claim(
        "diversity",
        "Moderate negative prompting raises diversity (distinct-3, the better of eta 0.3 and 0.6 "
        "against 0, gamma 0.4)",
        "released samples, counted anew: .907 at eta 0.4 against .830",
        "reproduced if distinct-3 rises with p < 0.025, two cells being tried; partly if it rises",
        lambda v: verdict(v["change"] > 0 and v["p"] < 0.025, v["change"] > 0),
    ),
    Claim(
        "collapse",
        "At eta 1 coherence breaks down (loss in log-likelihood per token, eta 1 against 0, gamma "
        "0.4; AUROC)",
        "released samples: loops and foreign scripts at eta 1",
        "reproduced if the interval of the change lies below 0 and the AUROC rises; partly if one "
        "of the two holds",
        lambda v: verdict(
            v["high"] < 0 and v["auroc"] > v["auroc_0"],
            v["high"] < 0 or v["auroc"] > v["auroc_0"],
        ),
    ),
    Claim(
        "nucleus",
        "The two together beat nucleus sampling (0.92) on diversity at equal or better coherence",
        "released hypotheses, counted anew: distinct-3 .710 against .588; comments .799 against "
        ".885",
        "reproduced if a cell with gamma and eta above 0 has a higher distinct-3 with p < 0.05 / 6 "
        "(six cells are tried) and an AUROC no higher; partly if one is better on both by value",
        lambda v: verdict(v["sure"] > 0, v["better"] > 0),
    ),
    Claim(
        "tasks",
        "Better than earlier decoding on hypotheses, comments and multiple-choice questions, with "
        "falcon-7b",
        "no figure at hand",
        "needs a tuned 7B model for each task",
        command=_BIG,
    ),
)


def _one(v: dict[str, float]) -> bool:
    return v["low"] > 0 or v["auroc"] < v["auroc_0"]


@dataclass
class Parts:
    """What a run needs: the expert, its task, sentences, and a sentence encoder."""

    expert: Any
    tokenizer: Any
    prompt: str
    real: list[str]
    held_out: list[str]
    embed: Callable[[list[str]], numpy.ndarray]


def parts(setup: Setup) -> Parts:
    """The shipped expert on the model of the run."""
    from regard.zoo import load
    from regard.zoo.expert import BASE, load_expert, prompt, sentences

    if setup.model_name != BASE:
        raise InputError(f"the expert was tuned from {BASE}: leave --model out")
    expert, tokenizer = load_expert("austen")
    encoder, words = load("minilm")

    known: dict[str, numpy.ndarray] = {}

    def embed(texts: list[str]) -> numpy.ndarray:
        new = [t for t in dict.fromkeys(texts) if t not in known]
        for first in range(0, len(new), 64):
            rows = new[first : first + 64]
            given = words(rows, padding=True, truncation=True, return_tensors="pt")
            with torch.no_grad():
                hidden = encoder(**given).last_hidden_state
            real = given["attention_mask"][..., None]
            mean = (hidden * real).sum(1) / real.sum(1)
            known.update(zip(rows, torch.nn.functional.normalize(mean, dim=-1).numpy()))
        return numpy.stack([known[t] for t in texts])

    real, held_out = sentences()
    return Parts(expert, tokenizer, prompt(), real, held_out, embed)


def measure(setup: Setup) -> Measured:
    """The grid, then nucleus sampling."""
    have = parts(setup)
    count = 8 if setup.quick else SAMPLES
    tokens = 8 if setup.quick else TOKENS
    draw = random.Random(SEED)
    own = [draw.sample(have.real, NEGATIVES) for _ in range(count)]
    made = {key(g, e): partial(_cell, have, own, g, e, 1.0, tokens) for g in GAMMAS for e in ETAS}
    made[NUCLEUS] = partial(_cell, have, own, 0.0, 0.0, 0.92, tokens)
    cells = setup.parts("cells", made)
    real_scores = setup.journal.get("real", lambda: _score(have, have.held_out[CONTEXT:]))
    claims = _settle(cells, have, real_scores)
    return Measured(
        claims=claims,
        data=(
            f"{count} samples of at most {tokens} tokens a cell from a LoRA expert of SmolLM2-135M "
            f"(sentences of Northanger Abbey); {NEGATIVES} training sentences as negatives of each "
            f"sample, the same in all cells (samples do not join the pool). Likelihood: the base "
            f"without the adapter, after reading {CONTEXT} held-out sentences. AUROC: logistic "
            f"regression on MiniLM embeddings, 5 folds, against {len(have.held_out)} held-out "
            "sentences. Intervals: bootstrap over samples; p: permutation of samples."
        ),
        seeds={"negatives": SEED, "sampling": SEED, "folds": 42, "bootstrap": 0},
        settings={
            "gammas": list(GAMMAS),
            "etas": list(ETAS),
            "samples": count,
            "tokens": tokens,
            "negatives": NEGATIVES,
            "top_k": 10,
            "temperature": 1.0,
        },
        picture=(picture(claims[0].values), SHOWS),
    )


def key(gamma: float, eta: float) -> str:
    """The name of a cell.

    >>> key(0.4, 1)
    'gamma 0.4, eta 1'
    """
    return f"gamma {gamma:g}, eta {eta:g}"


def picture(values: dict[str, Any]) -> Any:
    """Both measures of coherence over distinct-3, from the values of the claim "coherence"."""
    cells = values["cells"]
    names = ["eta 0", *(f"{e:g}" for e in ETAS[1:])]

    def panel(y: str, of: Callable[[dict[str, Any]], float], real: float) -> Panel:
        def line(name: str, keys: list[str], labels: Sequence[str] = (), corners: int = 24) -> Line:
            points = [(cells[k]["distinct_3"], of(cells[k])) for k in keys]
            return Line(name, points, labels, corners)

        rows = [line(f"gamma {g:g}", [key(g, e) for e in ETAS], names) for g in GAMMAS]
        nucleus = line("nucleus sampling", [NUCLEUS], corners=4)
        held_out = Line("held-out sentences", [(values["real_distinct_3"], real)], corners=3)
        return Panel("distinct-3", y, [*rows, nucleus, held_out])

    likelihood = panel(
        "log-likelihood per token, nats", lambda c: c["likelihood"], values["real_likelihood"]
    )
    apart = panel("1 - AUROC against held-out sentences", lambda c: 1 - c["auroc"], 0.5)
    return chart([likelihood, apart])


def _cell(
    have: Parts, own: list[list[str]], gamma: float, eta: float, top_p: float, tokens: int
) -> dict[str, Any]:
    """The samples of one setting, and what is measured of each."""
    ids = have.tokenizer(have.prompt, return_tensors="pt").input_ids
    texts: list[str] = []
    for first in range(0, len(own), BATCH):
        rows = own[first : first + BATCH]
        guide = ContrastiveExpertGuidance(
            have.expert, None, rows if eta else (), gamma, eta, tokenizer=have.tokenizer
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(SEED + first)
            out = have.expert.generate(
                input_ids=ids.expand(len(rows), -1),
                attention_mask=torch.ones_like(ids).expand(len(rows), -1),
                max_new_tokens=tokens,
                do_sample=True,
                temperature=1.0,
                top_k=10 if top_p == 1 else 0,
                top_p=top_p,
                renormalize_logits=True,
                logits_processor=[guide],
                pad_token_id=have.tokenizer.eos_token_id,
            )
        made = have.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        texts += map(clean, made)
    vectors = have.embed(texts)
    near = [float((have.embed(n) @ v).max()) for n, v in zip(own, vectors)]
    other = [float((have.embed(n) @ v).max()) for n, v in zip(own[1:] + own[:1], vectors)]
    return {
        "texts": texts,
        "ids": [have.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts],
        "own": near,
        "other": other,
        "likelihood": _score(have, texts),
        "auroc": auroc(have.embed(have.held_out), vectors),
    }


def _score(have: Parts, texts: list[str]) -> list[float]:
    """Log-likelihood per token of each text under the base that has read held-out sentences."""
    head = have.tokenizer("\n".join(have.held_out[:CONTEXT]) + "\n")["input_ids"]
    found = [have.tokenizer(t or ".", add_special_tokens=False)["input_ids"] for t in texts]
    means: list[float] = []
    with torch.no_grad(), have.expert.disable_adapter():
        for first in range(0, len(found), BATCH):
            rows = found[first : first + BATCH]
            prefix = have.expert(input_ids=torch.tensor([head]), use_cache=True)
            cache = prefix.past_key_values
            cache.batch_repeat_interleave(len(rows))
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            logits = have.expert(input_ids=ids, past_key_values=cache).logits
            start = prefix.logits[:, -1:].expand(len(rows), 1, -1)
            log_p = torch.cat([start, logits[:, :-1]], 1).float().log_softmax(-1)
            of = log_p.gather(-1, ids[..., None])[..., 0]
            means += [float(of[n, : len(row)].mean()) for n, row in enumerate(rows)]
    return means


def auroc(real: numpy.ndarray, made: numpy.ndarray) -> float:
    """Area under the curve of real against synthetic, out of fold; 0.5 when alike."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
    except ImportError:
        raise InputError("this needs scikit-learn: pip install 'regard[steer]'") from None
    x = numpy.concatenate([real, made])
    y = numpy.array([0] * len(real) + [1] * len(made))
    folds = StratifiedKFold(5, shuffle=True, random_state=42)
    model = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
    # the folds are scored one by one: their models' scores are not on one scale
    score = cross_val_predict(model, x, y, cv=folds, method="decision_function")
    return float(numpy.mean([roc_auc_score(y[t], score[t]) for _, t in folds.split(x, y)]))


def distinct(rows: list[list[int]], limit: int, n: int = 3) -> float:
    """Unique n-grams over all n-grams of the rows in a line, cut to `limit` tokens.

    >>> distinct([[1, 2, 3], [1, 2, 3]], 6)
    0.75
    """
    line = [token for row in rows for token in row][:limit]
    grams = list(zip(*(line[k:] for k in range(n))))
    return len(set(grams)) / max(1, len(grams))


def distinct_change(
    a: list[list[int]], b: list[list[int]], draws: int = 1000
) -> tuple[float, float, float, float]:
    """distinct-3 of `a` and of `b` at the same length, b - a, and the p-value of a permutation."""
    limit = min(sum(map(len, a)), sum(map(len, b)))
    one, two = distinct(a, limit), distinct(b, limit)
    chance = random.Random(SEED)
    beyond = 0
    for _ in range(draws):
        mixed = [pair if chance.random() < 0.5 else pair[::-1] for pair in zip(a, b)]
        x, y = ([m[side] for m in mixed] for side in (0, 1))
        short = min(sum(map(len, x)), sum(map(len, y)))
        beyond += abs(distinct(y, short) - distinct(x, short)) >= abs(two - one) - 1e-12
    return one, two, two - one, (beyond + 1) / (draws + 1)


def _settle(cells: dict[str, Any], have: Parts, real_scores: list[float]) -> list[Claim]:
    stated = {c.key: c for c in CLAIMS}
    plain, strong = cells[key(0, 0)], cells[key(0.8, 0)]
    middle, far, last = (cells[key(0.4, e)] for e in (0, 0.6, 1))
    shared = min(sum(map(len, c["ids"])) for c in cells.values())
    table = {
        name: {
            "distinct_3": distinct(c["ids"], shared),
            **{n: mean(c[n]) for n in ("own", "other", "likelihood")},
            "auroc": c["auroc"],
            "example": c["texts"][0],
        }
        for name, c in cells.items()
    }
    real = mean(real_scores)
    ids = [have.tokenizer(t, add_special_tokens=False)["input_ids"] for t in have.held_out]
    real_distinct = distinct(ids, shared)
    made = {}

    gain, low, high, _ = paired(strong["likelihood"], plain["likelihood"])
    made["coherence"] = stated["coherence"].settle(
        {
            "gain": gain,
            "low": low,
            "high": high,
            "auroc": strong["auroc"],
            "auroc_0": plain["auroc"],
            "real_likelihood": real,
            "real_distinct_3": real_distinct,
            "shared_tokens": shared,
            "cells": table,
        },
        here=f"{gain:+.3f} nats a token, AUROC {strong['auroc']:.3f}",
        control=f"gamma 0: AUROC {plain['auroc']:.3f}; held-out sentences {real:.2f} nats",
        interval=Interval("gain, bootstrap", low, high),
        note="the scorer is the base, which guidance moves away from: this works against the claim",
    )
    one, two, change, p = distinct_change(plain["ids"], strong["ids"])
    made["cost"] = stated["cost"].settle(
        {"change": change, "p": p, "before": one, "after": two},
        here=f"{two:.3f}",
        control=f"{one:.3f} at gamma 0; held-out sentences {real_distinct:.3f}",
        interval=Interval("permutation of samples", p=p),
    )
    moved, low, high, own_moves = paired(far["own"], middle["own"])
    other, _, _, other_moves = paired(far["other"], middle["other"])
    _, own_low, own_high, _ = paired(own_moves, other_moves)
    made["distance"] = stated["distance"].settle(
        {
            "change": moved,
            "low": low,
            "high": high,
            "other": other,
            "own_low": own_low,
            "own_high": own_high,
        },
        here=f"{moved:+.3f}",
        control=f"{other:+.3f} to the negatives of other samples",
        interval=Interval("change, bootstrap", low, high),
        note=f"own less other: interval {own_low:+.3f} to {own_high:+.3f}",
    )
    tried = {e: distinct_change(middle["ids"], cells[key(0.4, e)]["ids"]) for e in (0.3, 0.6)}
    best = max(tried, key=lambda e: tried[e][2])
    one, two, change, p = tried[best]
    made["diversity"] = stated["diversity"].settle(
        {"change": change, "p": p, "before": one, "after": two, "eta": best},
        here=f"{two:.3f} at eta {best:g}",
        control=f"{one:.3f} at eta 0",
        interval=Interval("permutation of samples", p=p),
    )
    gain, low, high, _ = paired(last["likelihood"], middle["likelihood"])
    made["collapse"] = stated["collapse"].settle(
        {
            "gain": gain,
            "low": low,
            "high": high,
            "auroc": last["auroc"],
            "auroc_0": middle["auroc"],
        },
        here=f"{gain:+.3f} nats a token, AUROC {last['auroc']:.3f}",
        control=f"eta 0: AUROC {middle['auroc']:.3f}",
        interval=Interval("change, bootstrap", low, high),
    )
    made["nucleus"] = _beats(stated["nucleus"], cells)
    return list(made.values())


def _beats(claim: Claim, cells: dict[str, Any]) -> Claim:
    """Every cell with both guidances against nucleus sampling."""
    nucleus = cells[NUCLEUS]
    rows = {}
    for name in (key(g, e) for g in GAMMAS[1:] for e in ETAS[1:]):
        one, two, change, p = distinct_change(nucleus["ids"], cells[name]["ids"])
        rows[name] = {
            "change": change,
            "p": p,
            "auroc": cells[name]["auroc"],
            "nucleus": one,
            "here": two,
        }
    good = {n: r for n, r in rows.items() if r["change"] > 0 and r["auroc"] <= nucleus["auroc"]}
    sure = [n for n, r in good.items() if r["p"] < 0.05 / len(rows)]
    best = max(good or rows, key=lambda n: rows[n]["change"])
    shown = rows[best]
    return claim.settle(
        {"better": len(good), "sure": len(sure), "auroc_nucleus": nucleus["auroc"], "cells": rows},
        here=f"{best}: distinct-3 {shown['here']:.3f}, AUROC {shown['auroc']:.3f}",
        control=f"nucleus {shown['nucleus']:.3f}, AUROC {nucleus['auroc']:.3f}",
        interval=Interval("distinct-3, permutation of samples", p=shown["p"]),
        note=f"{len(good)} of {len(rows)} cells better on both, {len(sure)} of them surely",
    )
