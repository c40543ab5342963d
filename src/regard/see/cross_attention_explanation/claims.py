"""The claims of "Cross-Attention is Half Explanation in Speech-to-Text Models" (Papi et al., 2025).

Two real Whispers, tiny.en and base, and the shipped spoken sentences, whose words and word times
are known. On one thread the full window of 30 s would take days, so the window is cut to the sound
and a second behind it: how near that comes to the whole model is measured and told. The masks are
coarse, and as few as make the saliency reliable; what they leave uncertain is measured as
split-half reliability, and every rule on a correlation takes it into account.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, median
from typing import Any

from regard.lab.intervals import bootstrap, paired
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.zoo.sentences import Sentence, sentences

from .maps import place_words
from .method import Explanation, explain
from .sheet import speech_sheet

MODEL = None  # two models are compared; which, is part of the claims
MODELS = ("whisper-tiny.en", "whisper-base")
SMALL, LARGE = "tiny.en", "base"
SEED, MASKS, STATE_MASKS, SEGMENTS, WIDTH = 0, 180, 240, (120, 240), 4
MARGIN, STEP, BATCH = 100, 20, 8
RELIABLE = 0.8
QUICK = 2  # utterances of a quick run

_HELD = (
    f"; at most partly when the split-half reliability of the saliency that is used is below "
    f"{RELIABLE} on either model"
)


def _capped(name: str, whole: bool, half: bool, v: dict[str, Any]) -> str:
    """The verdict, held down when the saliency is not reliable enough."""
    sure = all(v[f"{n} reliability {name}"] >= RELIABLE for n in (SMALL, LARGE))
    return verdict(whole and sure, half or whole)


def _both(test: Callable[[str], bool]) -> tuple[bool, bool]:
    """Whether a test holds on both models, and on either."""
    held = [test(n) for n in (SMALL, LARGE)]
    return all(held), any(held)


def _average(v: dict[str, Any]) -> str:
    return _capped("pooled", *_both(lambda n: v[f"{n} low"] > 0), v)


def _moderate(v: dict[str, Any]) -> str:
    return _capped("pooled", *_both(lambda n: v[f"{n} low"] > 0.3 and v[f"{n} high"] < 0.8), v)


def _mixing(v: dict[str, Any]) -> str:
    whole, half = _both(lambda n: v[f"{n} low"] > 0)
    sure = _capped("states", True, True, v) == "reproduced"
    return verdict(_capped("pooled", whole, half, v) == "reproduced" and sure, half)


def _deletion(v: dict[str, Any]) -> str:
    whole, _ = _both(
        lambda n: (
            v[f"{n} saliency - pooled low"] > 0
            and v[f"{n} pooled - attention"] >= 0
            and v[f"{n} attention - random low"] > 0
        )
    )
    _, half = _both(lambda n: v[f"{n} saliency"] > v[f"{n} attention"] > v[f"{n} random steps"])
    return verdict(whole, half)


def _deeper(v: dict[str, Any]) -> str:
    # two models that differ in more than depth settle this at most in part
    return verdict(False, v["low"] > 0)


CLAIMS = [
    Claim(
        "average",
        "Attention averaged over heads agrees better with input saliency than single heads do",
        "averages agree best, single heads are noisy",
        "reproduced if, on both models, the 95 % interval of (correlation of the mean over all "
        "heads - median correlation of a single head) lies above 0; partly if on one" + _HELD,
        _average,
    ),
    Claim(
        "moderate",
        "Cross attention agrees moderately to strongly with input saliency, but not fully",
        "0.45 to 0.55 over models, 0.59 to 0.64 at best",
        "reproduced if, on both models, the 95 % interval of the correlation of the mean over all "
        "heads lies within 0.3 to 0.8; partly if on one" + _HELD,
        _moderate,
    ),
    Claim(
        "mixing",
        "Cross attention agrees better with the saliency of the encoder's output than with that "
        "of the sound: the encoder mixes",
        "0.03 to 0.18 more, 6.6 to 16.7 %",
        "reproduced if, on both models, the 95 % interval of the paired difference lies above 0; "
        "partly if on one" + _HELD,
        _mixing,
    ),
    Claim(
        "deletion",
        "Taking out what saliency ranks highest breaks the transcript sooner than taking out what "
        "attention ranks highest, and both sooner than chance",
        "area 91.3 for full saliency, 52.9 for it on attention's grid, 41.2 for attention",
        "reproduced if, on both models, full saliency > saliency on attention's grid >= attention "
        "> random steps, with the 95 % intervals of the first and the last difference above 0; "
        "partly if full saliency > attention > random steps in the mean on either model",
        _deletion,
    ),
    Claim(
        "deeper",
        "An encoder that mixes more widens the gap between the two agreements",
        "not tested as such",
        "partly if the gap of base (6 encoder layers) exceeds that of tiny.en (4), 95 % interval "
        "of the paired difference above 0; never more, since the two differ in width and training "
        "data too, and no encoder here was made to mix",
        _deeper,
    ),
    Claim(
        "scale",
        "The same with 20,000 fine masks, the whole window and recorded speech",
        "52 to 75 % of the encoder output's saliency at best",
        "20,000 forward passes an utterance: hours each on one thread",
        command="regard trial explanation --data DIR --model openai/whisper-small --masks 20000 "
        "--segments 2000,2500,3000 --frames all",
    ),
]


def measure(setup: Setup) -> Measured:
    """Explain every sentence with both models, and settle the claims."""
    chosen = sentences()[:: 26 if setup.quick else 1][: QUICK if setup.quick else None]
    masks = 12 if setup.quick else MASKS
    found: dict[str, list[dict[str, Any]]] = {}
    for name in MODELS:
        missing = [s for s in chosen if f"{name} {s.name}" not in setup.journal.parts]
        model, processor = _loaded(name) if missing else (None, None)
        with setup.progress(len(chosen), name) as step:
            rows = []
            for sentence in chosen:
                make = partial(one, model, processor, sentence, masks)
                rows.append(setup.journal.get(f"{name} {sentence.name}", make))
                step()
        found[name.removeprefix("whisper-")] = rows
    right = (n for n, row in enumerate(found[SMALL]) if row["word_errors"] == 0)
    example = setup.journal.get("example", partial(_example, chosen[next(right, 0)], masks))
    return Measured(
        settled(found),
        f"{len(chosen)} sentences spoken by eSpeak NG in nine voices, "
        f"{sum(len(s.audio) for s in chosen) / 16000:.0f} s in all.",
        {"masks": SEED},
        {
            **{"models": list(MODELS), "masks": masks, "segments": list(SEGMENTS)},
            **{"state_masks": STATE_MASKS * masks // MASKS, "width": WIDTH, "baseline": "mean"},
            **{"margin": MARGIN, "step": STEP},
            "utterances": len(chosen),
        },
        speech_sheet(found, example),
    )


def _loaded(name: str) -> tuple[Any, Any]:
    from regard.zoo import load

    return load(name)


def one(model: Any, processor: Any, sentence: Sentence, masks: int = MASKS) -> dict[str, Any]:
    """What is measured of one sentence."""
    from .deletion import word_errors, words_of

    made = _explained(model, processor, sentence, masks, STEP)
    said = word_errors(words_of(sentence.text), words_of(made.transcript))
    return {**made.as_dict(), "text": sentence.text, "word_errors": said}


def _explained(
    model: Any, processor: Any, sentence: Sentence, masks: int, step: int | None
) -> Explanation:
    return explain(
        model,
        processor,
        sentence.audio,
        words=sentence.words,
        masks=masks,
        state_masks=STATE_MASKS * masks // MASKS,
        segments=SEGMENTS,
        width=WIDTH,
        batch=BATCH,
        margin=MARGIN,
        step=step,
        seed=SEED,
        progress=False,
    )


def _example(sentence: Sentence, masks: int) -> dict[str, Any]:
    """The maps of one sentence for the picture, with the true word times."""
    from .overview import overview

    model, processor = _loaded(MODELS[0])
    made = _explained(model, processor, sentence, masks, None)
    seen = overview(made)
    kept = {name: seen[name] for name in ("pieces", "spectrogram", "maps", "seconds_per_step")}
    steps = made.forced.clip.steps
    placed = place_words(made.pieces, sentence.words, made.seconds, steps)
    return {**kept, "model": SMALL, "words": sentence.words, "spans": placed}


# -- from utterances to claims -------------------------------------------------------------------
def _all(row: dict[str, Any], on: str, kind: str = "pearson") -> float:
    return float(row[on][kind]["all"] or 0.0)


def _single(row: dict[str, Any]) -> float:
    """Median correlation of a single head; one whose rows are all constant explains nothing."""
    return median(float(r or 0.0) for layer in row["input"]["pearson"]["heads"] for r in layer)


def settled(found: dict[str, list[dict[str, Any]]]) -> list[Claim]:
    """The claims with their measurements, from the utterances of both models."""
    stated = {c.key: c for c in CLAIMS}
    reliable = {
        f"{n} reliability {kind}": fmean(r["reliability"][kind][1] for r in rows)
        for n, rows in found.items()
        for kind in ("input", "pooled", "states")
    }

    def over(measure: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
        return {n: [measure(r) for r in rows] for n, rows in found.items()}

    def said(values: dict[str, list[float]]) -> str:
        return ", ".join(f"{n} {fmean(v):.3f}" for n, v in values.items())

    def limits(values: dict[str, list[float]], name: str = "") -> dict[str, float]:
        made: dict[str, float] = {}
        for n, v in values.items():
            low, high = bootstrap(v)
            made |= {f"{n} {name}low": low, f"{n} {name}high": high}
        return made

    def shown(values: dict[str, list[float]], what: str) -> Interval:
        bounds = {n: bootstrap(v) for n, v in values.items()}
        other = "; ".join(f"{n} {a:.3f} to {b:.3f}" for n, (a, b) in bounds.items() if n != SMALL)
        return Interval(f"{what}, {SMALL}, bootstrap; {other}", *bounds[SMALL])

    trust = "split-half reliability of the saliency " + ", ".join(
        f"{n} {reliable[f'{n} reliability pooled']:.2f} (encoder output "
        f"{reliable[f'{n} reliability states']:.2f})"
        for n in found
    )
    on_input = over(lambda r: _all(r, "input"))
    on_states = over(lambda r: _all(r, "states"))
    ranked = over(lambda r: _all(r, "input", "spearman"))
    single = over(_single)
    gain = over(lambda r: _all(r, "input") - _single(r))
    gap = over(lambda r: _all(r, "states") - _all(r, "input"))
    square = ", ".join(f"{n} {fmean(v) ** 2:.2f}" for n, v in on_input.items())
    made = [
        stated["average"].settle(
            {**limits(gain), **reliable, **{f"{n} gain": fmean(v) for n, v in gain.items()}},
            here=f"all heads {said(on_input)}",
            control=f"median single head {said(single)}",
            interval=shown(gain, "difference"),
            note=trust,
        ),
        stated["moderate"].settle(
            {**limits(on_input), **reliable, **{f"{n} rho": fmean(v) for n, v in on_input.items()}},
            here=said(on_input),
            control=f"most that this saliency allows {_bounds(found)}",
            interval=shown(on_input, "correlation"),
            note=f"{trust}; squared {square}; by ranks {said(ranked)}; {_quality(found)}",
        ),
        stated["mixing"].settle(
            {**limits(gap), **reliable, **{f"{n} gap": fmean(v) for n, v in gap.items()}},
            here=f"encoder output {said(on_states)}",
            control=f"sound {said(on_input)}",
            interval=shown(gap, "difference"),
            note=trust + "; the two saliencies differ in noise, which the gap contains",
        ),
        _deleted(stated["deletion"], found, limits, said, shown),
    ]
    _, low, high, apart = paired(gap[LARGE], gap[SMALL])
    made.append(
        stated["deeper"].settle(
            {"difference": fmean(apart), "low": low, "high": high},
            here=f"{LARGE} {fmean(gap[LARGE]):.3f}",
            control=f"{SMALL} {fmean(gap[SMALL]):.3f}",
            interval=Interval("difference, bootstrap over sentences", low, high),
            note=trust,
        )
    )
    return made


def _bounds(found: dict[str, list[dict[str, Any]]]) -> str:
    return ", ".join(f"{n} {fmean(r['bound'] for r in rows):.2f}" for n, rows in found.items())


def _quality(found: dict[str, list[dict[str, Any]]]) -> str:
    """How good the transcripts are, what the cut window costs, and the true word spans."""
    parts = []
    for n, rows in found.items():
        spans = [r["spans"] for r in rows if r["spans"]]
        words = f"{n}: word errors {fmean(r['word_errors'] for r in rows):.0f} %"
        near = [r["agreement"] for r in rows if r["agreement"]]
        if near:
            words += (
                f", cut and whole window prefer the same piece "
                f"{100 * fmean(a['same'] for a in near):.0f} % of the time"
            )
        if spans:
            hits = ", ".join(
                f"{name} {100 * fmean(s[name]['hit'] for s in spans):.0f} %"
                for name in ("attention", "input", "states")
            )
            chance = 100 * fmean(s["attention"]["chance"] for s in spans)
            words += f", peak within the true word in {len(spans)} right ones: {hits} (chance "
            words += f"{chance:.0f} %)"
        parts.append(words)
    return "; ".join(parts)


def _deleted(
    claim: Claim,
    found: dict[str, list[dict[str, Any]]],
    limits: Callable[..., dict[str, float]],
    said: Callable[[dict[str, list[float]]], str],
    shown: Callable[[dict[str, list[float]], str], Interval],
) -> Claim:
    names: Sequence[str] = ("saliency", "pooled", "attention", "random steps", "random cells")
    scores = {
        m: {n: [float(r["deletion"]["scores"][m]) for r in rows] for n, rows in found.items()}
        for m in names
    }

    def less(a: str, b: str) -> dict[str, list[float]]:
        return {n: [x - y for x, y in zip(scores[a][n], scores[b][n])] for n in found}

    first, second = less("saliency", "pooled"), less("pooled", "attention")
    last = less("attention", "random steps")
    values = {f"{n} {m}": fmean(scores[m][n]) for m in names for n in found}
    values |= {f"{n} pooled - attention": fmean(v) for n, v in second.items()}
    values |= limits(first, "saliency - pooled ") | limits(second, "pooled - attention ")
    values |= limits(last, "attention - random ")
    return claim.settle(
        values,
        here="; ".join(f"{m}: {said(scores[m])}" for m in ("saliency", "pooled", "attention")),
        control=f"random steps: {said(scores['random steps'])}; "
        f"random cells: {said(scores['random cells'])}",
        interval=shown(last, "attention - random steps"),
        note="with the cut window a free transcript repeats itself, so what is counted is the "
        "share of the explained pieces that the model would no longer say next, all before them "
        "given; the paper counts word errors of free transcripts",
    )
