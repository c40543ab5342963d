"""How much of what a speech model hears its cross attention really shows.

Cross attention is laid beside saliency: of the spectrogram, and of the encoder's output, which
leaves out what the encoder has mixed. Their correlation, the reliability of the saliency that
bounds it, and what deleting the best-ranked frames does to the transcript, say how far the picture
can be trusted.

Paper: "Cross-Attention is Half Explanation in Speech-to-Text Models", Papi, Fucci, Gaido, Negri,
Bentivogli, 2025, arXiv 2509.18010.

Deviations:
- The transcript that is explained is the greedy one; the paper's comes from beam search.
- Correlations are of one utterance; averages over utterances are taken by whoever has several
  (our reading, as is the denominator of the relative gap).
- Reliability of the saliency from two halves of the masks, and the bound it sets, are ours.
- Attention over what a model pads behind the sound is left out; the share dropped is told.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.watching import tokens

from .card import Settings
from .deletion import Deletion, check_step, decoded_errors, deletion, forced_errors, words_of
from .forced import Clip, Forced, features, prompt
from .maps import (
    compare,
    cross_attention,
    in_span,
    pearson,
    place_words,
    plain,
    pool,
    split_half,
)
from .saliency import Saliency, divergence, saliency


@dataclass
class Explanation:
    """Cross attention of one utterance beside its saliency.

    Attributes:
        pieces: the word pieces of the transcript; transcript: as text.
        cross: `[layers, heads, pieces, steps]`; dropped: share of attention on padding.
        input, states: saliency of the spectrogram and of the encoder's output; pooled: the
            first on the grid of cross attention, `[pieces, steps]`.
        versus_input, versus_states: what `compare` gives.
        reliability: of `input` (full), `pooled` and `states`: [halves, whole].
        deletion: curves and scores, None when left out.
        spans: for each map, what `in_span` gives, empty without word times.
        seconds: length of an encoder step.
        agreement: of a cut window with the whole one, None where nothing was cut.
        notes: what a reader should know.
    """

    forced: Forced
    pieces: list[str]
    transcript: str
    cross: Tensor
    dropped: float
    input: Saliency
    states: Saliency
    pooled: Tensor
    versus_input: dict[str, Any]
    versus_states: dict[str, Any]
    reliability: dict[str, tuple[float, float]]
    deletion: Deletion | None
    spans: dict[str, dict[str, float]]
    seconds: float
    settings: dict[str, Any]
    agreement: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def mixing(self) -> dict[str, Any]:
        """How much closer attention is to the encoder's output than to the sound: the gap, and
        the gap over the larger of the two.
        """
        x, h = (v["pearson"]["all"] for v in (self.versus_input, self.versus_states))
        if x is None or h is None:
            return {"gap": None, "relative": None}
        return {"gap": h - x, "relative": (h - x) / h if h else None}

    def as_dict(self) -> dict[str, Any]:
        """All numbers but the maps, as plain JSON values."""
        return {
            "transcript": self.transcript,
            "pieces": self.pieces,
            "fit": self.forced.fit,
            "frames": self.forced.clip.frames,
            "steps": self.forced.clip.steps,
            "stride": self.forced.clip.stride,
            "dropped": self.dropped,
            "input": self.versus_input,
            "states": self.versus_states,
            "mixing": self.mixing,
            "reliability": {n: list(r) for n, r in self.reliability.items()},
            "bound": max(0.0, self.reliability["pooled"][1]) ** 0.5,
            "deletion": None if self.deletion is None else self.deletion.as_dict(),
            "spans": self.spans,
            "settings": self.settings,
            "agreement": self.agreement,
            "notes": self.notes,
        }


def explain(
    model: Any,
    processor: Any,
    audio: Any,
    *,
    transcript: str | None = None,
    reference: str | None = None,
    words: Sequence[tuple[str, float, float]] | None = None,
    language: str = "en",
    task: str = "transcribe",
    state: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Explanation:
    """Lay a speech model's cross attention beside its saliency, for one utterance.

    Args:
        model, processor: as `regard.load("whisper-tiny.en")` gives them.
        audio: mono samples at the processor's sampling rate.
        transcript: what the model is made to say; its own greedy transcript when None.
        reference: what was said, for the word error rates of the deletion curves; the explained
            transcript when None, and with a cut window.
        words: each word with its start and end in seconds, where they are known.
        language, task: of a Whisper of many languages.
        state: keep the work in this file, and go on from it; that of the encoder's output gets
            ".states" behind its name.
        settings: those of `Settings` in card.py. With a cut window, deletion counts the pieces that
            the model would no longer say next under the forced transcript, since a free one repeats
            itself there.

    >>> import regard
    >>> model, processor = regard.load("whisper-tiny.en")  # doctest: +SKIP
    >>> regard.explain(model, processor, samples, masks=300, frames="real")  # doctest: +SKIP

    Raises:
        InputError: silent, empty or too long audio, no cross attention, a transcript that does not
            fit, a setting out of range.
    """
    cut = Settings(**settings).cut
    field, frames = features(model, processor, audio)
    clip = Clip(model, field, frames, prompt(model, processor, language, task), cut)
    return explain_clip(
        clip,
        processor,
        transcript=transcript,
        reference=reference,
        words=words,
        state=state,
        progress=progress,
        **settings,
    )


def explain_clip(
    clip: Clip,
    processor: Any,
    *,
    transcript: str | None = None,
    reference: str | None = None,
    words: Sequence[tuple[str, float, float]] | None = None,
    state: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Explanation:
    """The same for a clip that is there already. The transcript of a clip whose window is cut
    still comes from the whole window.
    """
    asked = Settings(**settings)
    if asked.step is not None:
        check_step(asked.step)
    tokenizer = getattr(processor, "tokenizer", processor)
    full = clip.uncut
    greedy = full.transcribe()[0]
    ids = greedy
    if transcript is not None:  # Whisper's words begin with a space, the first one too
        text = " " + " ".join(transcript.split())
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    forced = Forced(clip, ids)
    if clip.steps < 2:
        raise InputError("the clip fills a single encoder step: give one of at least 0.1 s")
    pieces = tokens.pieces(tokenizer, forced.text)
    said = tokenizer.decode(forced.text).strip()
    shared = {n: getattr(asked, n) for n in ("antithetic", "seed", "batch")}
    state_masks = asked.state_masks or asked.masks
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        on_input = saliency(
            forced,
            masks=asked.masks,
            segments=asked.segments,
            baseline=asked.baseline,
            state=state,
            progress=progress,
            **shared,
        )
        on_states = saliency(
            forced,
            on="states",
            masks=state_masks,
            width=asked.width,
            state=None if state is None else Path(f"{state}.states"),
            progress=progress,
            **shared,
        )
    said_of_cells = (str(w.message) for w in caught if "cells were out" in str(w.message))
    notes = list(dict.fromkeys(said_of_cells))  # the same may hold of both saliencies
    agreement = None
    if full is not clip:
        agreement = _agreement(Forced(full, ids), forced)
        notes.append(
            f"the window was cut to the sound and {clip.margin} frames: another model, which under "
            f"the same transcript prefers the same piece {100 * agreement['same']:.0f} % of the "
            f"time (mean divergence {agreement['divergence']:.2f} nats)"
        )
    if len(pieces) == 1:
        notes.append("the transcript has one piece: every correlation rests on one row")
    if transcript is not None and tokenizer.decode(greedy).strip() != said:
        notes.append(f"left alone, the model would say: {tokenizer.decode(greedy).strip()}")
    cross, dropped = cross_attention(forced)
    stride, steps = clip.stride, clip.steps
    pooled, top = pool(on_input.map, stride, steps), on_states.map.amax(1)
    reliability = {
        "input": split_half(on_input.halves.flatten(2)),
        "pooled": split_half(torch.stack([pool(h, stride, steps) for h in on_input.halves])),
        "states": split_half(on_states.halves.amax(2)),
    }
    curves = None
    if asked.step is not None:
        maps = {"attention": cross.mean((0, 1)), "pooled": pooled, "saliency": on_input.map}
        if clip.margin is None:
            right = words_of(reference if reference is not None else said)
            errors = decoded_errors(
                clip,
                lambda row: words_of(tokenizer.decode(row, skip_special_tokens=True)),
                right,
                len(forced.text) + 12,
            )
        else:
            errors = forced_errors(forced)
        curves = deletion(
            clip,
            maps,
            errors,
            step=asked.step,
            baseline=asked.baseline,
            seed=asked.seed,
            batch=asked.batch,
            counted="words" if clip.margin is None else "pieces",
            progress=progress,
        )
    seconds = _seconds(processor, stride)
    spans = {}
    placed = None if words is None else place_words(pieces, words, seconds, steps)
    if placed is not None:
        rows = [n for n, span in enumerate(placed) if span is not None]
        where = [span for span in placed if span is not None]
        named = {"attention": cross.mean((0, 1)), "input": pooled, "states": top}
        spans = {n: in_span(x[rows], where) for n, x in named.items()} if rows else {}
    elif words is not None:
        notes.append("the transcript differs from the known words, so their times were not used")
    if dropped > 0.2:
        notes.append(f"{100 * dropped:.0f} % of the cross attention falls on padding")
    return Explanation(
        forced,
        pieces,
        said,
        cross,
        dropped,
        on_input,
        on_states,
        pooled,
        compare(cross, pooled),
        compare(cross, top),
        reliability,
        curves,
        spans,
        seconds,
        {
            **asked.settings(),
            **{"segments": [*asked.segments], "state_masks": state_masks, "margin": clip.margin},
        },
        agreement,
        notes,
    )


def _agreement(full: Forced, cut: Forced) -> dict[str, Any]:
    """How near a cut window comes to the whole one under the same transcript: share of pieces that
    both prefer, mean divergence in nats, and the correlation of their cross attention.
    """
    same = (full.plain.argmax(-1) == cut.plain.argmax(-1)).double().mean()
    a, b = (cross_attention(x)[0].mean((0, 1)) for x in (full, cut))
    return {
        "same": float(same),
        "divergence": float(divergence(full.plain, cut.plain).mean()),
        "attention": plain(pearson(a, b)),
    }


def _seconds(processor: Any, stride: int) -> float:
    """Length of an encoder step; 10 ms a frame where the processor does not say."""
    extractor = getattr(processor, "feature_extractor", processor)
    hop, rate = getattr(extractor, "hop_length", 160), getattr(extractor, "sampling_rate", 16000)
    return stride * hop / rate
