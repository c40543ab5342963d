"""The claims of "When Attention Sink Emerges in Language Models" (Gu et al., 2024)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from regard.lab.intervals import bootstrap, mean
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.watching.sinks import EPSILON, uniform_alpha

from .method import TOKENS, Sinks, inputs, sinks

TEXT = "northanger-abbey"
SEQUENCES, BATCH, SEED = 100, 20, 0
ELSEWHERE = 8  # the token that serves as control: an ordinary one, not the first

_TRAIN = (
    "regard train lm --size 60m --attention {} --context 2048 --batch 512 --steps 20000 --lr 4e-4 "
    "--schedule constant_with_warmup --vocabulary 50432 --data DIR"
)
CLAIMS = (
    Claim(
        "text",
        "Small models have the sink too, on ordinary text (Sink_1)",
        "LLaMA3-8B 99.02 %, LLaMA2-7B 92.47 %, Mistral-7B 97.49 %",
        "reproduced if Sink_1 lies in 60 to 95 % and its interval above the largest Sink_k of the "
        "other positions; partly if Sink_1 exceeds 20 %",
        lambda v: verdict(60 <= v["rate"] <= 95 and v["low"] > v["elsewhere"], v["rate"] > 20),
    ),
    Claim(
        "random",
        "The sink needs no meaning: it is there on random tokens (Sink_1)",
        "LLaMA3-8B 91.23 %, GPT2-XL 70.29 %",
        "reproduced if Sink_1 lies in 55 to 90 % and its interval above the largest Sink_k of the "
        "other positions; partly if Sink_1 exceeds 20 %",
        lambda v: verdict(55 <= v["rate"] <= 90 and v["low"] > v["elsewhere"], v["rate"] > 20),
    ),
    Claim(
        "repeat",
        "One token repeated makes all states equal, and with RoPE the sink vanishes (Sink_1)",
        "about 0 %, except GPT-2",
        "reproduced if Sink_1 is at most 0.5 % and the norms of the hidden states differ by at "
        "most 1 %; partly if Sink_1 is below a tenth of that on text",
        lambda v: verdict(
            v["rate"] <= 0.5 and abs(v["massive"] - 1) <= 0.01, v["rate"] < v["text"] / 10
        ),
    ),
    Claim(
        "massive",
        "The first token's hidden state is massive where there is a sink, and only there "
        "(its norm over the mean of the others', largest layer)",
        "qualitative",
        "reproduced if the ratio exceeds 10 on text and stays below 1.05 on a repeated token; "
        "partly if only one of the two holds",
        lambda v: verdict(
            v["massive"] > 10 and v["repeat"] < 1.05, v["massive"] > 10 or v["repeat"] < 1.05
        ),
    ),
    Claim(
        "key-bias",
        "The first token acts as a key bias: its key is small but points where queries do "
        "(cosine with the queries, that of other keys taken off)",
        "qualitative",
        "reproduced if, in the sink heads, the cosine gap exceeds 0.25 and the key's norm is below "
        "0.6 of the median key; partly if the gap is positive and the key below the median",
        lambda v: verdict(v["gap"] > 0.25 and v["key"] < 0.6, v["gap"] > 0 and v["key"] < 1),
    ),
    Claim(
        "small-value",
        "It adds almost nothing to the output: its value is small (norm over the median value)",
        "qualitative",
        "reproduced if, in the sink heads, the value's norm is below 0.6 of the median; partly if "
        "below the median",
        lambda v: verdict(v["value"] < 0.6, v["value"] < 1),
    ),
    Claim(
        "open-models",
        "Every open model tested has it, 14M to 13B",
        "Sink_1 between 88 and 99 % for 7B to 13B",
        "needs the weights of larger models",
        command="regard reproduce sink-emergence --model meta-llama/Meta-Llama-3-8B",
    ),
    Claim(
        "instruction",
        "Instruction tuning changes it little",
        "LLaMA2-7B 92.47 to 92.88 %, LLaMA3-8B 99.02 to 98.85 %, Mistral-7B 97.49 to 88.34 %",
        "needs the weights before and after tuning",
        command="regard reproduce sink-emergence --model meta-llama/Llama-2-7b-chat-hf",
    ),
    Claim(
        "emergence",
        "Sinks emerge in training between 1k and 2k steps, later with small learning rates; weight "
        "decay up to 0.5 strengthens them",
        "Sink_1 2.90 to 32.23 % over learning rates, 15.20 to 41.08 % over weight decays",
        "needs the training of a 60M model on billions of tokens",
        command=_TRAIN.format("softmax"),
    ),
    Claim(
        "position",
        "The sink follows loss and data: a token fixed at position k draws it there",
        "74.11, 69.03, 69.64 % for a token fixed at 1, 2, 3",
        "needs the training of a 60M model",
        command=_TRAIN.format("softmax --fixed-token 2"),
    ),
    Claim(
        "bias",
        "A learned key bias with value zero takes the sink over",
        "Sink_* 73.34 %, Sink_1 0.00 %",
        "needs the training of a 60M model",
        command=_TRAIN.format("k_bias"),
    ),
    Claim(
        "sigmoid",
        "Sigmoid attention without normalisation has no sink, at a similar loss",
        "0.44 % (proxy) against 18.18 %, loss 3.70 against 3.73; at 1B 2.46 % against 45.11 %",
        "needs the training of 60M and 1B models",
        command=_TRAIN.format("sigmoid_no_norm"),
    ),
)


def measure(setup: Setup) -> Measured:
    """Sink rates and probes on text, on random ids and on a repeated token."""
    count = 8 if setup.quick else SEQUENCES
    kinds = ("text", "random", "repeat")
    made: dict[str, Callable[[], Any]] = {k: partial(_kind, setup, k, count) for k in kinds}
    made["control"] = lambda: _control(setup, count, setup.journal.parts["text"]["heads"])
    parts = setup.parts("sinks", made)
    begins = setup.tokenizer("a")["input_ids"][:1] == [setup.tokenizer.bos_token_id]
    return Measured(
        claims=_settle(parts).values(),
        data=(
            f"{count} sequences of {TOKENS} tokens of each kind: consecutive windows of {TEXT}, "
            f"uniform random ids, one random id repeated; start token: "
            f"{'as the tokenizer puts it' if begins else 'none, the tokenizer puts none'}. "
            "Intervals: bootstrap over sequences."
        ),
        seeds={"inputs": SEED, "bootstrap": 0},
        settings={"epsilon": EPSILON, "tokens": TOKENS, "sequences": count},
    )


def _kind(setup: Setup, kind: str, count: int) -> dict[str, Any]:
    found = sinks(setup.model, _batches(setup, kind, count))
    heads = found.sink_heads if kind == "text" else None
    return {
        "rate": 100 * found.rate,
        "every": (100 * found.per_sequence).tolist(),
        "epsilon": {str(e): 100 * r for e, r in found.by_epsilon.items()},
        "elsewhere": 100 * float(found.rates[1:].max()),
        "alpha": float(found.alpha.mean()),
        "massive": float(found.probes.massive.max()),
        "massive_median": float(found.probes.massive_median.max()),
        "massive_every": found.every["massive"].amax(1).tolist(),
        "heads": None if heads is None else heads.tolist(),
        "probes": None if heads is None else _probes(found, heads),
        "other_heads": None if heads is None else _probes(found, ~heads),
    }


def _control(setup: Setup, count: int, heads: list[list[bool]]) -> dict[str, Any]:
    """The same heads at an ordinary token."""
    batches = _batches(setup, "text", max(1, count // 4))
    return _probes(sinks(setup.model, batches, position=ELSEWHERE), torch.tensor(heads))


def _batches(setup: Setup, kind: str, count: int) -> list[torch.Tensor]:
    from regard.zoo import text

    vocabulary = setup.model.config.get_text_config().vocab_size
    words = text(TEXT) if kind == "text" else None
    tokenizer = setup.tokenizer if kind == "text" else None
    ids = inputs(
        kind, vocabulary=vocabulary, text=words, tokenizer=tokenizer, count=count, seed=SEED
    )
    return list(ids.split(BATCH))


def _probes(found: Sinks, heads: torch.Tensor) -> dict[str, list[float]]:
    """Means over the chosen heads, per sequence; the share of heads where each sign holds."""
    if not heads.any():
        return {}
    every = {n: v[:, heads] for n, v in found.every.items() if v.dim() == 3}
    gap = every["cosine"] - every["cosine_others"]
    made = {n: v.mean(1).tolist() for n, v in every.items()}
    means = {"gap": gap.mean(0) > 0, "key": every["key_ratio"].mean(0) < 1}
    means["value"] = every["value_ratio"].mean(0) < 1
    shares = {f"share_{n}": [float(v.float().mean())] for n, v in means.items()}
    return {**made, **shares, "gap": gap.mean(1).tolist(), "count": [float(heads.sum())]}


def _settle(parts: dict[str, Any]) -> dict[str, Claim]:
    stated = {c.key: c for c in CLAIMS}
    text, repeat, control = parts["text"], parts["repeat"], parts["control"]
    made = {}
    for kind in ("text", "random"):
        part = parts[kind]
        low, high = bootstrap(part["every"])
        made[kind] = stated[kind].settle(
            {
                "rate": part["rate"],
                "low": low,
                "high": high,
                "elsewhere": part["elsewhere"],
                "by_epsilon": part["epsilon"],
                "mean_alpha": part["alpha"],
            },
            here=f"{part['rate']:.1f} %",
            control=f"{part['elsewhere']:.1f} % at the next best position",
            interval=Interval("%, bootstrap", low, high),
            note="threshold "
            + ", ".join(f"{e}: {r:.1f} %" for e, r in part["epsilon"].items())
            + f"; mean attention on the first token {part['alpha']:.3f}, uniform attention would "
            f"give {uniform_alpha(TOKENS):.4f}",
        )
    low, high = bootstrap(repeat["every"])
    made["repeat"] = stated["repeat"].settle(
        {"rate": repeat["rate"], "text": text["rate"], "massive": repeat["massive"]},
        here=f"{repeat['rate']:.1f} %",
        control=f"{text['rate']:.1f} % on text",
        interval=Interval("%, bootstrap", low, high),
        note=f"largest ratio of hidden-state norms {repeat['massive']:.4f}",
    )
    low, high = bootstrap(text["massive_every"])
    made["massive"] = stated["massive"].settle(
        {
            "massive": text["massive"],
            "median": text["massive_median"],
            "random": parts["random"]["massive"],
            "repeat": repeat["massive"],
        },
        here=f"{text['massive']:.0f}",
        control=f"{repeat['massive']:.3f} on a repeated token",
        interval=Interval("largest layer of each sequence, bootstrap", low, high),
        note=f"over the median of the others {text['massive_median']:.0f}; "
        f"on random ids {parts['random']['massive']:.0f}",
    )
    made.update(_bias(stated, text, control))
    return made


def _bias(
    stated: dict[str, Claim], text: dict[str, Any], control: dict[str, Any]
) -> dict[str, Claim]:
    probes, others = text["probes"], text["other_heads"]
    if not probes:
        # without a single sink head there is nothing that could act as a bias
        none = {"gap": -1.0, "key": 9.0, "value": 9.0}
        names = ("key-bias", "small-value")
        return {n: stated[n].settle(none, here="no head has a sink", control="-") for n in names}

    gap, key, value = (mean(probes[n]) for n in ("gap", "key_ratio", "value_ratio"))
    low, high = bootstrap(probes["gap"])
    heads = f"{probes['count'][0]:.0f} sink heads"
    elsewhere = f"token {ELSEWHERE + 1}"
    rest = f"; in the other heads {{}} {mean(others['gap']):.2f}" if others else ""
    made = {
        "key-bias": stated["key-bias"].settle(
            {
                "gap": gap,
                "key": key,
                "cosine": mean(probes["cosine"]),
                "cosine_others": mean(probes["cosine_others"]),
                "norms": mean(probes["norms"]),
                "norms_others": mean(probes["norms_others"]),
                "share_of_heads_gap": probes["share_gap"][0],
                "share_of_heads_key": probes["share_key"][0],
                "control_gap": mean(control["gap"]),
                "control_key": mean(control["key_ratio"]),
            },
            here=f"gap {gap:.2f}, key {key:.2f} of the median ({heads})",
            control=f"{elsewhere}: gap {mean(control['gap']):.2f}, "
            f"key {mean(control['key_ratio']):.2f}",
            interval=Interval("gap, bootstrap", low, high),
            note=f"cosine {mean(probes['cosine']):.2f}, with other keys "
            f"{mean(probes['cosine_others']):.2f}; larger in "
            f"{100 * probes['share_gap'][0]:.0f} % of the sink heads" + rest.format("the gap is"),
        )
    }
    low, high = bootstrap(probes["value_ratio"])
    made["small-value"] = stated["small-value"].settle(
        {
            "value": value,
            "share_of_heads": probes["share_value"][0],
            "control_value": mean(control["value_ratio"]),
        },
        here=f"{value:.2f} ({heads})",
        control=f"{elsewhere}: {mean(control['value_ratio']):.2f}",
        interval=Interval("bootstrap", low, high),
        note=f"below the median in {100 * probes['share_value'][0]:.0f} % of the sink heads",
    )
    return made
