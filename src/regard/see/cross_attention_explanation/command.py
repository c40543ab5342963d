"""regard explain: how much of what a speech model hears its cross attention really shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import Loading, err, load, working
from regard.cli.pages import check_outputs, command, deliver
from regard.cli.see_speech import check_words, chosen

from .card import CARD, Settings

Model = Annotated[str, typer.Option(help="A name of `regard models`, a folder or a hub id.")]
Language = Annotated[str | None, typer.Option(help="Language that is spoken; en when left out.")]
Task = Annotated[str | None, typer.Option(help="transcribe, or translate into English.")]


def explain(
    audio: Annotated[str, typer.Argument(help="An audio file, or @name of a shipped clip.")],
    settings: Settings,
    loading: Loading,
    model: Model = CARD.model,
    transcript: Annotated[
        str | None, typer.Option(help="Explain these words; the model's own when left out.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="What was said, for the word errors of deletion.")
    ] = None,
    language: Language = None,
    task: Task = None,
    gradients: Annotated[
        bool, typer.Option(help="Also gradient x input and integrated gradients (captum).")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the work in this file, and go on from it."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report page here.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE|-", help="Write everything as JSON here; - for stdout."),
    ] = None,
) -> None:
    """Cross attention beside saliency: what the model looked at, and what mattered.

    [bold]Examples[/]

      regard explain talk.wav --model whisper-base --masks 2000 --html out.html

      regard explain @minutes --frames real --masks 300 --segments 120,240 --width 4
    """
    check_outputs(html, json, resume)
    check_words(transcript, task)
    from regard.zoo import audio as sound

    clip = sound.read(audio)
    loaded, processor = load(model, loading)
    from regard.report.explain import write_page

    from .method import explain as run
    from .overview import overview, references

    explanation = run(
        loaded,
        processor,
        clip.samples,
        transcript=transcript,
        reference=reference or (clip.spoken or {}).get("text"),
        words=known_words(clip.spoken or {}),
        **chosen(loaded, language, task),
        state=resume,
        **settings.settings(),
    )
    explanation.notes[:0] = clip.notes
    extra = references(explanation) if gradients else None
    meta = {"model": model, "clip": clip.name, "command": command()}
    with working("putting it together"):
        view = overview(explanation, references=extra, meta=meta)
    deliver(view, view["notes"], show=_show, write_page=write_page, json=json, html=html)


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
