"""regard see on sound: what was heard, when, and where each word looked."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from regard.cli.common import Loading, load, working
from regard.cli.pages import check_outputs, command, deliver
from regard.errors import InputError

DEFAULT = "whisper-tiny.en"


def see_speech(
    given: str,
    model: str,
    loading: Loading,
    *,
    html: Path | None,
    json: Path | None,
    transcript: str | None = None,
    language: str | None = None,
    task: str | None = None,
    compare: bool = False,
) -> None:
    """Transcribe the clip, or take the transcript, and show what each word looks at.

    Raises InputError for a file that is no audio, empty, silent or too long, a model without cross
    attention, a transcript that does not fit.
    """
    check_outputs(html, json)
    check_words(transcript, task)
    from regard.zoo import audio as sound

    clip = sound.read(given)
    loaded, processor = load(model, loading)
    from regard.parts.speech.cross_attention import cross_attention, prepare
    from regard.parts.speech.overview import overview
    from regard.zoo.convert import errors_only

    notes = list(clip.notes)
    tokens = None if transcript is None else _tokens(processor, transcript)
    choices = chosen(loaded, language, task)
    started = time.perf_counter()
    with working("listening"), errors_only():
        seen = cross_attention(loaded, processor, clip, tokens, maps=True, **choices)
    seconds = time.perf_counter() - started
    plain, theirs = (None, None)
    if compare:
        label = "comparing with the plain model and transformers' own time stamps"
        with working(label), errors_only():
            plain, theirs = _compared(loaded, processor, clip, seen, choices)
        if theirs is None:
            notes.append("transformers gives this model no token time stamps to compare with")
    if seen.fit is not None:
        if seen.fit < -math.log(loaded.config.vocab_size) - 1:  # a nat of leeway
            raise InputError(
                f"the transcript does not fit the sound (mean log-probability {seen.fit:.1f} a "
                "token, less than tokens drawn at random): leave it out, or give the right one"
            )
        notes.append(
            f"the transcript was given; its tokens have a mean log-probability of {seen.fit:.2f}"
        )
    if transcript is not None and language is None and _speaks_many(loaded):
        notes.append("the model was told that the clip is English: name another with --language")
    inputs, _ = prepare(loaded, processor, clip)
    page = overview(
        seen,
        spectrogram=_spectrogram(loaded, inputs, clip),
        theirs=theirs,
        truth=clip.spoken or None,
        meta={
            "model": model,
            "clip": clip.name,
            "seconds": clip.seconds,
            "notes": notes,
            "command": command(),
            "cost": _cost(loaded, seen, seconds, plain, clip),
        },
    )
    from regard.report.speech import write_page

    deliver(page, notes, show=_show, write_page=write_page, json=json, html=html)


def _speaks_many(model: Any) -> bool:
    return bool(getattr(getattr(model, "generation_config", None), "is_multilingual", False))


def check_words(transcript: str | None, task: str | None) -> None:
    """Refuse an empty transcript, and a task that no speech model has."""
    if task not in (None, "transcribe", "translate"):
        raise InputError(f"--task is transcribe or translate, not {task!r}")
    if transcript is not None and not transcript.strip():
        raise InputError("--transcript is empty: give the words, or leave it out")


def chosen(model: Any, language: str | None, task: str | None) -> dict[str, Any]:
    """The language and the task that were asked for, where the model has a choice.

    Raises:
        InputError: a model of one language, a language that it does not know.
    """
    made = {k: v for k, v in (("language", language), ("task", task)) if v is not None}
    if made and not _speaks_many(model):
        raise InputError(
            f"--{next(iter(made))} needs a Whisper of many languages, such as whisper-base"
        )
    if language is not None:
        from regard.parts.speech.cross_attention import default_prompt

        default_prompt(model, None, language, task)  # refuses a language that it does not know
    return made


def _tokens(processor: Any, transcript: str) -> list[int]:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise InputError("the model came without a tokenizer, so it cannot take a transcript")
    # Whisper's words begin with a space, the first one too.
    text = " " + " ".join(transcript.split())
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _compared(model: Any, processor: Any, clip: Any, seen: Any, choices: dict[str, Any]) -> Any:
    """Seconds of the plain transcription, and transformers' own start of every token."""
    import torch

    from regard.parts.speech.cross_attention import prepare

    with torch.no_grad():
        started = time.perf_counter()
        inputs, _ = prepare(model, processor, clip)
        model.generate(**inputs, **choices)
        plain = time.perf_counter() - started
        if not getattr(model.generation_config, "alignment_heads", None):
            return plain, None
        made = model.generate(
            **inputs, **choices, return_token_timestamps=True, return_dict_in_generate=True
        )
    ids, times = made["sequences"][0].tolist(), made["token_timestamps"][0].tolist()
    skip = len(seen.prompt) if ids[: len(seen.prompt)] == seen.prompt else 0
    if ids[skip : skip + len(seen.tokens)] != seen.tokens:
        return plain, None
    return plain, times[skip : skip + len(seen.tokens)]


def _spectrogram(model: Any, inputs: dict[str, Any], clip: Any) -> Any:
    """The model's input over the sound, `[mel bins, frames]`; None where it takes samples."""
    found = inputs.get("input_features")
    if found is None:
        return None
    rows = found[0] if hasattr(model.config, "num_mel_bins") else found[0].T
    return rows[:, : max(1, round(clip.seconds * 100))]  # 10 ms a frame, in all of them


def _cost(model: Any, seen: Any, seconds: float, plain: float | None, clip: Any) -> dict[str, Any]:
    import torch
    import transformers

    ratio = f", {plain:.2f} s without: {seconds / plain:.2f} times" if plain else ""
    every = len(seen.layers) * seen.entropy.shape[1] * (len(seen.tokens) + len(seen.prompt))
    return {
        "Attention": f"{len(seen.layers)} decoder layers, {seen.entropy.shape[1]} heads each",
        "Sound": f"{clip.seconds:.2f} s, {seen.frames} of {seen.all_frames} encoder steps",
        "Transcript": f"{len(seen.tokens)} tokens after {len(seen.prompt)} of the prompt",
        "Device": f"{model.device}, {str(model.dtype).removeprefix('torch.')}",
        "Time": f"{seconds:.2f} s to transcribe and to look{ratio}",
        "Kept": f"{seen.kept_bytes / 1e6:.2f} MB with every head for this page; "
        f"the whole matrices take {4e-6 * every * seen.all_frames:.2f} MB",
        "Versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def _show(page: dict[str, Any]) -> None:
    """Print the transcript, the words with their times, and the notes."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from regard.report.speech import cards

    console = Console()
    console.print(Text(str(page["transcript"]), style="bold"))
    console.print()
    for big, words in cards(page):
        console.print(Text.assemble("  ", (big, "bold cyan"), " ", words))
    console.print()
    table = Table(box=None, pad_edge=False)
    columns = [("from", "start"), ("to", "end"), ("true start", "true_start"),
               ("transformers", "theirs"), ("looks at", "peak"), ("spread", "spread")]  # fmt: skip
    shown = [c for c in columns if any(w.get(c[1]) is not None for w in page["words"])]
    table.add_column("word")
    for name, _ in shown:
        table.add_column(f"{name} (s)", justify="right")
    for word in page["words"]:
        cells = ["–" if word.get(k) is None else f"{word[k]:.2f}" for _, k in shown]
        table.add_row(Text(str(word["text"])), *cells)
    console.print(table)
    console.print()
    rows = Table.grid(padding=(0, 2))
    for name, value in page["meta"]["cost"].items():
        rows.add_row(Text(str(name), style="dim"), Text(str(value)))
    for note in page["meta"]["notes"]:
        rows.add_row(Text("Note", style="dim"), Text(str(note)))
    console.print(rows)
