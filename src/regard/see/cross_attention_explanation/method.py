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
from regard.reach import Call, Handler, Session, Site
from regard.watching import tokens

from .deletion import Deletion, check_step, decoded_errors, deletion, forced_errors, words_of
from .forced import Clip, Forced, features, prompt
from .saliency import SEGMENTS, Saliency, divergence, saliency


# -- maps ----------------------------------------------------------------------------------------
class _Cross(Handler):
    """Keeps the cross attention of every layer, `[heads, pieces, steps]`, of one short clip."""

    def __init__(self, rows: slice) -> None:
        self.rows, self.maps = rows, dict[int, Tensor]()

    def sites(self, sites: list[Site]) -> list[Site]:
        cross = [s for s in sites if s.kind == "cross"]
        if not cross:
            raise InputError(
                "this model has no cross attention: name an encoder-decoder, such as "
                "whisper-tiny.en"
            )
        return cross

    def after(self, call: Call, state: Any) -> None:
        q = call.q[0, :, self.rows].float()
        k = call.k[0].float().repeat_interleave(len(q) // call.k.shape[1], 0)
        scores = q @ k.transpose(1, 2) * call.scale
        self.maps[call.site.layer] = (scores - state.lse[0, :, self.rows, None].float()).exp().cpu()


def cross_attention(forced: Forced) -> tuple[Tensor, float]:
    """Cross attention of all layers and heads, and the mean share that falls on padding.

    Returns `[layers, heads, pieces, steps]` over the steps that hear sound, not rescaled.

    Raises:
        InputError: a model without cross attention.
    """
    seen = _Cross(forced.rows)
    with torch.inference_mode(), Session(forced.clip.model, [seen]):
        forced.log_probs(forced.clip.states[None])
    whole = torch.stack([seen.maps[n] for n in sorted(seen.maps)])
    kept = whole[..., : forced.clip.steps]
    return kept.clone(), float(1 - kept.sum(-1).mean())


def pool(found: Tensor, stride: int, steps: int) -> Tensor:
    """2-D max pooling: `[pieces, rows, frames]` -> `[pieces, steps]`, over all rows and the
    `stride` frames of each step; the last step takes what there is.

    >>> pool(torch.tensor([[[1.0, 5.0, 2.0], [0.0, 3.0, 4.0]]]), 2, 2)
    tensor([[5., 4.]])
    """
    most = found.amax(1)
    short = steps * stride - most.shape[1]
    if short > 0:
        most = torch.nn.functional.pad(most, (0, short), value=-torch.inf)
    return most[:, : steps * stride].unflatten(1, (steps, stride)).amax(-1)


def standardised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows less their mean, over their population deviation, float64; constant rows become zeros.

    Returns the rows and which of them were constant.

    >>> standardised(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))[0]
    tensor([[-1.,  1.],
            [ 0.,  0.]], dtype=torch.float64)
    """
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    flat = spread <= 1e-12 * x.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    return torch.where(flat, 0.0, centred / spread.clamp_min(1e-300)), flat[..., 0]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of row-standardised maps `[..., pieces, steps]`, flattened: `[...]`.

    Without constant rows it is the mean of the correlations of the rows. NaN when all rows of one
    of the two are constant.

    >>> x = torch.tensor([[1.0, 2.0, 4.0], [3.0, 1.0, 0.0]])
    >>> float(pearson(x, 2 * x + 1)), float(pearson(x, -x))
    (1.0, -1.0)
    """
    a, b = standardised(a)[0], standardised(b)[0]
    top = (a * b).sum((-2, -1))
    return top / (a.square().sum((-2, -1)) * b.square().sum((-2, -1))).sqrt()


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, ties sharing their mean.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([1.5000, 0.0000, 1.5000], dtype=torch.float64)
    """
    ordered, _ = x.sort(-1)
    below = torch.searchsorted(ordered.contiguous(), x.contiguous())
    upto = torch.searchsorted(ordered.contiguous(), x.contiguous(), right=True)
    return (below + upto - 1).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """The same with each row replaced by its ranks."""
    return pearson(ranks(a), ranks(b))


def split_half(halves: Tensor) -> tuple[float, float]:
    """Reliability of a map from two halves `[2, pieces, steps]`: their correlation r, and what it
    comes to for the whole by Spearman and Brown, 2 r / (1 + r).

    The correlation of anything with a map of reliability R stays below the root of R. A map whose
    halves are constant tells nothing: its reliability is 0.

    >>> x = torch.tensor([[1.0, 2.0, 4.0]])
    >>> split_half(torch.stack([x, x]))
    (1.0, 1.0)
    """
    r = float(pearson(halves[0], halves[1]).nan_to_num(0.0))
    return r, 2 * r / (1 + r) if r > -1 else -1.0


def groups(cross: Tensor) -> dict[str, Tensor]:
    """Cross attention `[layers, heads, pieces, steps]` averaged over groups of heads: every head
    alone, heads of a layer, a head's place over the layers, the last third of the layers, all.
    """
    last = max(1, len(cross) // 3)
    return {
        "heads": cross,
        "layers": cross.mean(1),
        "places": cross.mean(0),
        "last": cross[-last:].mean((0, 1)),
        "all": cross.mean((0, 1)),
    }


def compare(cross: Tensor, found: Tensor) -> dict[str, Any]:
    """Correlations of cross attention with a saliency map `[pieces, steps]`, by group of heads.

    Returns lists of numbers as `groups` names them, None where a map is constant; for Pearson's
    and for Spearman's; and how many rows were constant.
    """
    made: dict[str, Any] = {}
    grouped = groups(cross)
    for name, measure in (("pearson", pearson), ("spearman", spearman)):
        made[name] = {n: _plain(measure(x, found)) for n, x in grouped.items()}
    made["constant_rows"] = {
        "attention": int(standardised(cross)[1].sum()),
        "saliency": int(standardised(found)[1].sum()),
    }
    return made


def _plain(x: Tensor) -> Any:
    """Nested lists, with None for NaN."""
    if x.dim():
        return [_plain(row) for row in x]
    return None if bool(torch.isnan(x)) else float(x)


def in_span(found: Tensor, spans: Sequence[tuple[int, int]]) -> dict[str, float]:
    """How far a map `[pieces, steps]` points at the true place of each piece's word.

    Args:
        spans: first step and the one after the last of each piece's word.

    Returns:
        mass: mean share of a row, above its minimum, that falls within; hit: share of rows whose
        highest step lies within; chance: mean length of the spans over all steps.
    """
    steps = found.shape[-1]
    within = torch.zeros(found.shape, dtype=torch.bool)
    for n, (a, b) in enumerate(spans):
        within[n, a : max(b, a + 1)] = True
    above = (found - found.amin(-1, keepdim=True)).double()
    total = above.sum(-1)
    share = torch.where(total > 0, (above * within).sum(-1) / total.clamp_min(1e-300), 0.0)
    best = found.argmax(-1)
    return {
        "mass": float(share.mean()),
        "hit": float(within[torch.arange(len(found)), best].double().mean()),
        "chance": float(within.double().mean()) if steps else 0.0,
    }


# -- one utterance -------------------------------------------------------------------------------
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
    masks: int = 2000,
    state_masks: int | None = None,
    segments: Sequence[int] = SEGMENTS,
    width: int = 1,
    baseline: str = "mean",
    antithetic: bool = False,
    margin: int | None = None,
    step: int | None = 5,
    language: str = "en",
    task: str = "transcribe",
    seed: int = 0,
    batch: int = 16,
    state: str | Path | None = None,
    progress: bool = True,
) -> Explanation:
    """Lay a speech model's cross attention beside its saliency, for one utterance.

    Args:
        model, processor: as `regard.load("whisper-tiny.en")` gives them.
        audio: mono samples at the processor's sampling rate.
        transcript: what the model is made to say; its own greedy transcript when None.
        reference: what was said, for the word error rates of the deletion curves; the explained
            transcript when None, and with a cut window.
        words: each word with its start and end in seconds, where they are known.
        masks: on the input; state_masks: on the encoder's output, the same number when None.
        width: encoder steps that are taken out together, on the encoder's output.
        segments, baseline, antithetic, seed, batch, state: as in `saliency`; the file of the
            encoder's output gets ".states" behind its name.
        margin: cut the window to the sound and so many frames (see `Clip`); None leaves it whole.
            With a cut window, deletion counts the pieces that the model would no longer say next
            under the forced transcript, since a free one repeats itself there.
        step: percent between two points of the deletion curves; None leaves them out.

    Raises:
        InputError: silent, empty or too long audio, no cross attention, a transcript that does not
            fit, a setting out of range.
    """
    found, frames = features(model, processor, audio)
    start = prompt(model, processor, language, task)
    clip = Clip(model, found, frames, start, margin)
    return explain_clip(
        clip,
        processor,
        transcript=transcript,
        reference=reference,
        words=words,
        masks=masks,
        state_masks=state_masks,
        segments=segments,
        width=width,
        baseline=baseline,
        antithetic=antithetic,
        step=step,
        seed=seed,
        batch=batch,
        state=state,
        progress=progress,
    )


def explain_clip(
    clip: Clip,
    processor: Any,
    *,
    transcript: str | None = None,
    reference: str | None = None,
    words: Sequence[tuple[str, float, float]] | None = None,
    masks: int = 2000,
    state_masks: int | None = None,
    segments: Sequence[int] = SEGMENTS,
    width: int = 1,
    baseline: str = "mean",
    antithetic: bool = False,
    step: int | None = 5,
    seed: int = 0,
    batch: int = 16,
    state: str | Path | None = None,
    progress: bool = True,
) -> Explanation:
    """The same for a clip that is there already. The transcript of a clip whose window is cut
    still comes from the whole window.
    """
    if step is not None:
        check_step(step)
    tokenizer = getattr(processor, "tokenizer", processor)
    full = clip.uncut
    own = full.transcribe()[0]
    ids = own
    if transcript is not None:  # Whisper's words begin with a space, the first one too
        text = " " + " ".join(transcript.split())
        ids = list(tokenizer.encode(text, add_special_tokens=False))
    forced = Forced(clip, ids)
    if clip.steps < 2:
        raise InputError("the clip fills a single encoder step: give one of at least 0.1 s")
    pieces = tokens.pieces(tokenizer, forced.text)
    said = tokenizer.decode(forced.text).strip()
    shared: dict[str, Any] = {"antithetic": antithetic, "seed": seed, "batch": batch}
    settings = {
        **{"masks": masks, "state_masks": state_masks or masks, "segments": list(segments)},
        "width": width,
        **{"baseline": baseline, "margin": clip.margin, "step": step, **shared},
    }
    files = (state, None if state is None else Path(f"{state}.states"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        on_input = saliency(
            forced,
            masks=masks,
            segments=segments,
            baseline=baseline,
            state=files[0],
            progress=progress,
            **shared,
        )
        on_states = saliency(
            forced,
            on="states",
            masks=state_masks or masks,
            width=width,
            state=files[1],
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
    if transcript is not None and tokenizer.decode(own).strip() != said:
        notes.append(f"left alone, the model would say: {tokenizer.decode(own).strip()}")
    cross, dropped = cross_attention(forced)
    stride, steps = clip.stride, clip.steps
    pooled, top = pool(on_input.map, stride, steps), on_states.map.amax(1)
    reliability = {
        "input": split_half(on_input.halves.flatten(2)),
        "pooled": split_half(torch.stack([pool(h, stride, steps) for h in on_input.halves])),
        "states": split_half(on_states.halves.amax(2)),
    }
    curves = None
    if step is not None:
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
            step=step,
            baseline=baseline,
            seed=seed,
            batch=batch,
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
        settings,
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
        "attention": _plain(pearson(a, b)),
    }


def _seconds(processor: Any, stride: int) -> float:
    """Length of an encoder step; 10 ms a frame where the processor does not say."""
    extractor = getattr(processor, "feature_extractor", processor)
    hop, rate = getattr(extractor, "hop_length", 160), getattr(extractor, "sampling_rate", 16000)
    return stride * hop / rate


def place_words(
    pieces: Sequence[str],
    words: Sequence[tuple[str, float, float]],
    seconds: float,
    steps: int,
) -> list[tuple[int, int] | None] | None:
    """First and end step of the word that each piece belongs to; None for pieces of punctuation.
    None in all when the pieces do not spell the words.

    >>> place_words([" A", " cat", "."], [("a", 0.0, 0.1), ("cat", 0.1, 0.5)], 0.02, 25)
    [(0, 5), (5, 25), None]
    """

    def letters(text: str) -> str:
        return "".join(words_of(text)).replace("'", "")

    owner: list[int] = []
    for n, (word, _, _) in enumerate(words):
        owner += [n] * len(letters(word))
    if "".join(map(letters, pieces)) != "".join(letters(w) for w, _, _ in words):
        return None
    made: list[tuple[int, int] | None] = []
    at = 0
    for piece in pieces:
        size = len(letters(piece))
        if not size:
            made.append(None)
            continue
        first, last = words[owner[at]], words[owner[at + size - 1]]
        begin = min(round(first[1] / seconds), steps - 1)
        made.append((begin, min(max(round(last[2] / seconds), begin + 1), steps)))
        at += size
    return made
