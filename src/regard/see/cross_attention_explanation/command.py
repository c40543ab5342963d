"""regard explain: how much of what a speech model hears its cross attention really shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import check_file, err, load, working
from regard.cli.pages import check_outputs, command, deliver
from regard.cli.see_speech import check_words, chosen
from regard.errors import InputError

MODEL = "whisper-tiny.en"
Model = Annotated[str, typer.Option(help="A name of `regard models`, a folder or a hub id.")]
Masks = Annotated[int, typer.Option(min=2, help="Masks on the sound; the paper: 20000.")]
StateMasks = Annotated[
    int | None, typer.Option(min=2, help="Masks on the encoder's output; as many if left out.")
]
Segments = Annotated[str, typer.Option(help="Segments per 5 s of sound, one number a granularity.")]
Width = Annotated[
    int, typer.Option(min=1, help="Encoder steps taken out together; more need fewer masks.")
]
Frames = Annotated[
    str, typer.Option(help="all: the model's window; real: cut to the sound, far faster.")
]
Baseline = Annotated[str, typer.Option(help="What stands in: mean of a mel bin, or zero.")]
Language = Annotated[str | None, typer.Option(help="Language that is spoken; en when left out.")]
Task = Annotated[str | None, typer.Option(help="transcribe, or translate into English.")]
Step = Annotated[int, typer.Option(help="Percent between points of deletion; 0: none.")]
Seed = Annotated[int, typer.Option(help="Seed of the masks.")]
Batch = Annotated[int, typer.Option(min=1, help="Masks run at once.")]


def explain(
    audio: Annotated[str, typer.Argument(help="An audio file, or @name of a shipped clip.")],
    model: Model = MODEL,
    masks: Masks = 2000,
    state_masks: StateMasks = None,
    segments: Segments = "2000,2500,3000",
    width: Width = 1,
    frames: Frames = "all",
    baseline: Baseline = "mean",
    antithetic: Annotated[bool, typer.Option(help="Draw each mask with its complement.")] = False,
    transcript: Annotated[
        str | None, typer.Option(help="Explain these words; the model's own when left out.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="What was said, for the word errors of deletion.")
    ] = None,
    language: Language = None,
    task: Task = None,
    step: Step = 5,
    gradients: Annotated[
        bool, typer.Option(help="Also gradient x input and integrated gradients (captum).")
    ] = False,
    seed: Seed = 0,
    batch: Batch = 16,
    resume: Annotated[
        Path | None, typer.Option(help="Keep the work in this file, and go on from it.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report page here.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
) -> None:
    """Cross attention beside saliency: what the model looked at, and what mattered.

    [bold]Examples[/]

      regard explain talk.wav --model whisper-base --masks 2000 --html out.html

      regard explain @minutes --frames real --masks 300 --segments 120,240 --width 4
    """
    check_outputs(html, json)
    check_file(resume)
    check_words(transcript, task)
    counts, margin = segment_list(segments), margin_of(frames)
    from regard.zoo import audio as sound

    clip = sound.read(audio)
    loaded, processor = load(model)
    from regard.see.cross_attention_explanation.method import explain as run
    from regard.see.cross_attention_explanation.overview import overview, references

    made = run(
        loaded,
        processor,
        clip.samples,
        transcript=transcript,
        reference=reference or (clip.spoken or {}).get("text"),
        words=known_words(clip.spoken or {}),
        masks=masks,
        state_masks=state_masks,
        segments=counts,
        width=width,
        baseline=baseline,
        antithetic=antithetic,
        margin=margin,
        step=step or None,
        **chosen(loaded, language, task),
        seed=seed,
        batch=batch,
        state=resume,
    )
    made.notes[:0] = clip.notes
    extra = references(made) if gradients else None
    meta = {"model": model, "clip": clip.name, "command": command()}
    with working("putting it together"):
        view = overview(made, references=extra, meta=meta)
    from regard.report.explain import write_page

    deliver(view, view["notes"], show=_show, write_page=write_page, json=json, html=html)


def segment_list(given: str) -> list[int]:
    """ "2000,2500" as numbers."""
    pieces = [p.strip() for p in given.split(",") if p.strip()]
    if not pieces or not all(p.isdecimal() and int(p) > 0 for p in pieces):
        raise InputError(f"--segments takes numbers such as 2000,2500,3000, not {given!r}")
    return [int(p) for p in pieces]


def margin_of(frames: str) -> int | None:
    """What `--frames` means for the window."""
    if frames not in ("all", "real"):
        raise InputError(f"--frames is all or real, not {frames!r}")
    from regard.see.cross_attention_explanation.forced import MARGIN

    return None if frames == "all" else MARGIN


def known_words(spoken: dict[str, Any]) -> list[tuple[str, float, float]] | None:
    """Words of a shipped clip with start and end in seconds, where the synthesiser told them.

    >>> known_words({"words": ["A", "cat."], "times": [[0.1, 0.2], [0.2, 0.6]]})
    [('A', 0.1, 0.2), ('cat.', 0.2, 0.6)]
    """
    words, times = spoken.get("words") or [], spoken.get("times") or []
    if not words or len(words) != len(times):
        return None
    return [(str(w), float(a), float(b)) for w, (a, b) in zip(words, times)]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show(view: dict[str, Any]) -> None:
    from regard.report.document import show
    from regard.report.explain import NAMES, badge
    from regard.report.table import Column, Table, right

    def row(name: str, key: str, at: int | None = None) -> list[Any]:
        cells: list[Any] = [name]
        for on in ("input", "states"):
            for kind in ("pearson", "spearman"):
                value = view[on][kind][key]
                value = value[at] if at is not None else value
                cells.append(value)
                if on == "input" and kind == "pearson":
                    cells.append(value and value**2)
        return cells

    rows = [row(f"layer {n}", "layers", n) for n in range(len(view["input"]["pearson"]["layers"]))]
    rows += [row("last third", "last"), row("all", "all")]
    names = ("the sound", "squared", "ranks", "its encoding", "ranks")
    columns = [Column("heads averaged"), *(right(name, number) for name in names)]
    lines = []
    flat = [
        (value, layer, head)
        for layer, heads in enumerate(view["input"]["pearson"]["heads"])
        for head, value in enumerate(heads)
        if value is not None
    ]
    if flat:
        value, layer, head = max(flat)
        lines.append(f"Best single head: layer {layer}, head {head}: {value:.3f}.")
    gap = view["mixing"]["gap"]
    if gap is not None:
        lines.append(f"Encoding less sound (context mixing): {gap:+.3f}.")
    lines.append(" ".join(badge(view)))
    if view["deletion"]:
        scores = ", ".join(f"{NAMES[n]} {v:.1f}" for n, v in view["deletion"]["scores"].items())
        lines.append(f"Deletion scores ({view['deletion']['counted']}): {scores}.")
    for name, value in (view["references"] or {}).items():
        lines.append(
            f"{name.replace('_', ' ')}: {number(value['attention'])} with attention, "
            f"{number(value['saliency'])} with saliency."
        )
    table = Table(columns, rows, "Correlation of attention with")
    show(f"“{view['transcript']}”", table, *lines)
    for note in view["notes"]:
        err().print(f"note: {note}", markup=False, highlight=False)


def _commands() -> dict[str, Any]:
    from .trial import explanation

    return {"explain": explain, "trial explanation": explanation}


COMMANDS = _commands()
