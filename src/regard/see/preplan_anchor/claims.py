"""The claims of "Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm" (2025)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from regard.lab.intervals import mean, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.lab.reproduce.problems import problems

from .coupling import Coupling, couplings, perturb
from .method import Rhythm, rhythm

PROBLEMS, BATCH, NEW_TOKENS, TEMPERATURE, SEED = 36, 12, 128, 0.7, 0
SHORTEST = 48  # a response of fewer tokens has too few peaks to count
FORCED, EACH, TAIL_TOKENS = 20, 3, 40
SHUFFLES = 2000

_RULE = (
    "reproduced if the lift is positive with p < 0.05 against shuffled marks, and still positive "
    "when the largest 40 % count as peaks; partly if only the first holds"
)
_TRAIN = "regard train grpo --credit {} --model Qwen/Qwen3-4B-Base --dataset DAPO-Math-17k"


def _judge(v: dict[str, float]) -> str:
    first = v["lift"] > 0 and v["p"] < 0.05
    return verdict(first and v["top_lift"] > 0, first)


CLAIMS = (
    Claim(
        "entropy",
        "Tokens are less certain where the local heads look back (entropy at WAAD peaks)",
        "0.3608 against 0.2386, lift +51 % (Qwen3-4B-Base, GSM8K)",
        _RULE,
        _judge,
    ),
    Claim(
        "receiver",
        "Global heads and receiver heads mark the same anchors (overlap of FAI peaks)",
        "60.84 % against 22.41 %, lift +171 %",
        _RULE,
        _judge,
    ),
    Claim(
        "follow",
        "An anchor comes with or right after a look-back (FAI peaks at or after WAAD peaks)",
        "52.53 % against 36.87 %, lift +42 %",
        _RULE,
        _judge,
    ),
    Claim(
        "perturb",
        "Forcing another token at an anchor changes the continuation more (Jaccard of content "
        "words, highest against lowest FAI)",
        "0.534 against 0.631, lower in 87.14 % of 70 problems",
        "reproduced if the mean difference per problem is below 0 with its whole interval; partly "
        "if only the mean is",
        lambda v: verdict(v["high"] < 0, v["difference"] < 0),
    ),
    Claim(
        "scale",
        "The couplings hold in 4B and 8B models",
        "lifts of 28 to 199 % (Llama-3.1-8B)",
        "needs the weights of larger models",
        command="regard reproduce preplan-anchor --model Qwen/Qwen3-4B-Base",
    ),
    Claim(
        "credit",
        "Credit on the tokens of the rhythm trains better than uniform, random or entropy credit",
        "4B, 1K: 39.2 against GRPO 37.1; 8B, 1K: 43.2 against 39.4; Countdown 63.1 against 52.6",
        "needs reinforcement learning of a 4B model on 8 GPUs",
        command=_TRAIN.format("coupled"),
        built=False,
    ),
    Claim(
        "bottom",
        "Credit on the bottom tokens does worse than the rhythm's",
        "37.6 (local), 33.1 (global), 32.5 (coupled)",
        "needs reinforcement learning of a 4B model on 8 GPUs",
        command=_TRAIN.format("bottom"),
        built=False,
    ),
)


def measure(setup: Setup) -> Measured:
    """Generate responses, read their rhythm, and force other tokens at high and low FAI."""
    count, length = (6, 64) if setup.quick else (PROBLEMS, NEW_TOKENS)
    forced = 2 if setup.quick else FORCED
    asked = problems(count, SEED)
    starts = range(0, count, BATCH)
    written: list[dict[str, Any]] = []
    with setup.progress(len(starts), "writing responses") as step:
        for start in starts:
            chunk = asked[start : start + BATCH]
            make = partial(_generate, setup, chunk, SEED + start, length)
            written += setup.journal.get(f"responses {start}", make)
            step()
    shortest = SHORTEST // 2 if setup.quick else SHORTEST
    kept = [w for w in written if len(w["ids"]) - w["start"] >= shortest]
    seen: dict[bool, list[Rhythm]] = {False: [], True: []}
    with setup.progress(len(kept), "reading the rhythm") as step:
        for number, one in enumerate(kept):
            for without in seen:
                read = partial(_rhythm, setup, one, without)
                found = setup.journal.get(f"rhythm {number} {without}", read)
                seen[without].append(Rhythm.from_dict(found))
            step()
    changes = []
    with setup.progress(min(forced, len(kept)), "forcing other tokens") as step:
        for number, (one, read_out) in enumerate(zip(kept[:forced], seen[False])):
            force = partial(_force, setup, one, read_out)
            changes.append(setup.journal.get(f"forced {number}", force))
            step()
    return Measured(
        claims={**_couplings(seen), "perturb": _perturb(changes)}.values(),
        data=(
            f"{count} word problems from templates; one response each of at most {length} tokens "
            f"at temperature {TEMPERATURE}; {len(kept)} of them have at least {shortest} tokens "
            "and count. All layers, influence up to the end of the response. p: marks thrown at "
            f"random places of the same response, {SHUFFLES} times, one-sided; intervals: "
            "bootstrap over problems."
        ),
        seeds={"problems": SEED, "sampling": SEED, "shuffles": 0, "bootstrap": 0},
        settings={
            "problems": count,
            "responses": len(kept),
            "new_tokens": length,
            "temperature": TEMPERATURE,
            "forced_problems": len(changes),
            "alternatives": EACH,
            "tail_tokens": TAIL_TOKENS,
            "shuffles": SHUFFLES,
            "peaks": seen[False][0].rule,
        },
    )


def _generate(setup: Setup, asked: list[str], seed: int, length: int) -> list[dict[str, Any]]:
    """Responses of one batch; the padding that it needs is taken out again."""
    tokenizer = setup.tokenizer
    if getattr(tokenizer, "chat_template", None):
        asked = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": one}], tokenize=False, add_generation_prompt=True
            )
            for one in asked
        ]
    prompts = [list(tokenizer(one)["input_ids"]) for one in asked]
    longest = max(map(len, prompts))
    ends = _ends(setup)
    pad = ends[0] if ends else 0
    rows = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    device = setup.model.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        made = setup.model.generate(
            rows.to(device),
            attention_mask=mask.to(device),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
            max_new_tokens=length,
            pad_token_id=pad,
        )
    written = []
    for prompt, row in zip(prompts, made[:, longest:].tolist()):
        stop = next((n for n, token in enumerate(row) if token in ends), len(row))
        written.append({"ids": prompt + row[:stop], "start": len(prompt)})
    return written


def _ends(setup: Setup) -> list[int]:
    ends = setup.model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _rhythm(setup: Setup, one: dict[str, Any], without: bool) -> dict[str, Any]:
    ids = torch.tensor(one["ids"])
    return rhythm(setup.model, ids, one["start"], exclude_first=without).as_dict()


def _force(setup: Setup, one: dict[str, Any], seen: Rhythm) -> dict[str, Any]:
    """Mean Jaccard at the highest and at the lowest FAI of one response."""
    order = torch.tensor(seen.fai[: seen.counted]).argsort(stable=True).tolist()
    found: dict[str, Any] = {}
    for name, places in (("low", order[:EACH]), ("high", order[-EACH:])):
        shares = [
            perturb(
                setup.model,
                setup.tokenizer,
                one["ids"],
                seen.start + place,
                alternatives=EACH,
                new_tokens=TAIL_TOKENS,
            )
            for place in places
        ]
        found[name] = sum(shares) / len(shares)
        found[f"{name}_place"] = sum(places) / len(places)
        found[f"{name}_entropy"] = sum(seen.entropy[p] for p in places) / len(places)
    return found


def _couplings(seen: dict[bool, list[Rhythm]]) -> dict[str, Claim]:
    stated = {c.key: c for c in CLAIMS}
    plain = couplings(seen[False], shuffles=SHUFFLES)
    top = couplings([r.with_rule("top") for r in seen[False]], shuffles=SHUFFLES)
    turned = couplings(seen[False], shuffles=SHUFFLES, control="rotate")
    without = couplings(seen[True], shuffles=SHUFFLES)
    mass = {
        n: sum(r.sink_mass[n] for r in seen[False]) / len(seen[False]) for n in ("local", "global")
    }
    made = {}
    for name, one in plain.items():
        others = {"top": top[name], "turned": turned[name], "without_first": without[name]}
        values: dict[str, Any] = {n: getattr(one, n) for n in ("observed", "random", "lift", "p")}
        values["marks"] = one.marks
        for label, other in others.items():
            values |= {f"{label}_lift": other.lift, f"{label}_p": other.p}
        made[name] = stated[name].settle(
            {**values, **{f"{n}_heads_on_token_0": share for n, share in mass.items()}},
            here=f"{_figure(name, one.observed)}, lift {100 * one.lift:+.0f} % ({one.marks} peaks)",
            control=f"{_figure(name, one.random)} at random places",
            interval=Interval("lift in %, bootstrap", 100 * one.low, 100 * one.high, one.p),
            note=f"largest 40 % as peaks: {_short(top[name])}; against marks turned round as a "
            f"whole, which keeps their spacing: {_short(turned[name])}; attention on token 0 left "
            f"out: {_short(without[name])} (the global heads put {100 * mass['global']:.0f} % of "
            f"their attention there, the local ones {100 * mass['local']:.0f} %)",
        )
    return made


def _perturb(changes: list[dict[str, Any]]) -> Claim:
    stated = next(c for c in CLAIMS if c.key == "perturb")
    means = {n: mean([c[n] for c in changes]) for n in changes[0]}
    difference, low, high, each = paired(*([c[n] for c in changes] for n in ("high", "low")))
    lower = sum(d < 0 for d in each) / len(each)

    return stated.settle(
        {
            "difference": difference,
            "low": low,
            "high": high,
            "at_high_fai": means["high"],
            "at_low_fai": means["low"],
            "lower_in": lower,
            "place_high": means["high_place"],
            "place_low": means["low_place"],
            "entropy_high": means["high_entropy"],
            "entropy_low": means["low_entropy"],
        },
        here=f"{means['high']:.3f}, lower in {100 * lower:.0f} % of {len(each)} problems",
        control=f"{means['low']:.3f} at the lowest FAI",
        interval=Interval("difference, bootstrap", low, high),
        note=f"the tokens compared stand at {means['high_place']:.0f} (high) and "
        f"{means['low_place']:.0f} (low) of the response on average, with entropy "
        f"{means['high_entropy']:.2f} and {means['low_entropy']:.2f}: place and certainty are not "
        "held equal",
    )


def _figure(name: str, value: float) -> str:
    return f"{value:.3f} nats" if name == "entropy" else f"{100 * value:.1f} %"


def _short(one: Coupling) -> str:
    return f"{100 * one.lift:+.0f} %, p = {one.p:.2g}"
