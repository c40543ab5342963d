"""regard trial explanation: the table of `regard explain` over many utterances."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from regard.cli.common import Loading, check_output, load, write_json
from regard.cli.see_speech import check_words, chosen
from regard.errors import InputError

from .card import CARD, Settings
from .command import Language, Model, Task, number


def explanation(
    data: Annotated[
        str, typer.Option(help="Folder of audio files, or @sentences: those that are shipped.")
    ],
    settings: Settings,
    loading: Loading,
    model: Model = CARD.model,
    language: Language = None,
    task: Task = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many utterances.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            "--out",
            metavar="FILE|-",
            help="Write everything as JSON here, unfinished work beside; -.",
        ),
    ] = None,
) -> None:
    """How well cross attention agrees with saliency, over many utterances.

    A text file beside an audio file (talk.txt beside talk.wav) is what was said. With --json an
    interrupted run goes on where it stopped.

    [bold]Examples[/]

      regard trial explanation --data recordings/ --masks 2000 --json out.json

      regard trial explanation --data @sentences --frames real --masks 120 --segments 120,240
    """
    check_output(json)
    check_words(None, task)
    items = _items(data)[:limit]
    loaded, processor = load(model, loading)
    how: dict[str, Any] = {**settings.settings(), **chosen(loaded, language, task)}
    how["segments"] = list(settings.segments)  # as the journal's JSON has it
    from regard.lab.fingerprint import fingerprint
    from regard.lab.journal import Journal
    from regard.progress import bar

    from .method import explain

    source = fingerprint(explain.__module__)
    key = {"trial": "explanation", "model": model, "settings": how, "source": source}
    journal = Journal.beside(json, key)
    rows: list[dict[str, Any]] = []
    with bar(len(items), "utterances") as tick:
        for name, place in items:
            try:
                clip = _read(place)
                make = partial(_row, explain, loaded, processor, clip, how)
                row = journal.get(f"{name} {_mark(clip)}", make)
            except InputError as problem:  # the others are still worth the run
                row = {"problem": str(problem)}
            rows.append({"name": name, **row})
            tick()
    if all("problem" in row for row in rows):
        raise InputError(f"nothing could be explained: {rows[0]['name']}: {rows[0]['problem']}")
    result = {"model": model, "settings": how, "utterances": rows, "means": means(rows)}
    write_json(result, json)
    if json is None or str(json) != "-":
        _show(result)
    journal.clear()
    journal.close()


def _items(data: str) -> list[tuple[str, Any]]:
    """Names and places of the utterances, in order of their names."""
    if data == "@sentences":
        from regard.zoo.sentences import sentences

        return [(s.name, s) for s in sentences()]
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise InputError(f"{data} is no folder: name one with audio files, or @sentences")
    from regard.zoo.audio import SUFFIXES

    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"{data} holds no audio file: WAV, FLAC, Ogg and MP3 are looked for")
    return [(p.name, p) for p in found]


def _row(explain: Any, model: Any, processor: Any, clip: Any, settings: Any) -> dict[str, Any]:
    row: dict[str, Any] = explain(model, processor, **clip, **settings, progress=False).as_dict()
    return row


def _mark(clip: dict[str, Any]) -> str:
    """The same for the same sound and text, so that what was changed is not taken for done."""
    return hashlib.sha256(clip["audio"].tobytes() + repr(clip["reference"]).encode()).hexdigest()


def _read(place: Any) -> dict[str, Any]:
    """Sound, and what is known of it."""
    if not isinstance(place, Path):
        return {"audio": place.audio, "reference": place.text, "words": place.words}
    from regard.zoo import audio as sound

    beside = place.with_suffix(".txt")
    try:
        said = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
    except UnicodeDecodeError:
        raise InputError(f"{beside.name} is not UTF-8 text: convert it, or remove it") from None
    return {"audio": sound.read(place).samples, "reference": said or None, "words": None}


def means(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the utterances that could be explained, each with its 95 % bootstrap interval."""
    from regard.lab.intervals import bootstrap

    good = [r for r in rows if "problem" not in r]
    columns: dict[str, list[float | None]] = {
        "sound": [r["input"]["pearson"]["all"] for r in good],
        "encoding": [r["states"]["pearson"]["all"] for r in good],
        "mixing": [r["mixing"]["gap"] for r in good],
        "reliability": [r["reliability"]["pooled"][1] for r in good],
        "reliability of the encoding": [r["reliability"]["states"][1] for r in good],
    }
    for name in ("attention", "pooled", "saliency", "random steps", "random cells"):
        columns[f"deletion, {name}"] = [
            r["deletion"]["scores"][name] if r["deletion"] else None for r in good
        ]
    made: dict[str, Any] = {}
    for name, values in columns.items():
        known = [v for v in values if v is not None]
        if known:
            made[name] = {"mean": fmean(known), "interval": bootstrap(known), "of": len(known)}
    return made


def _show(result: dict[str, Any]) -> None:
    from regard.report.document import show
    from regard.report.table import Table, right

    rows: list[list[Any]] = []
    for row in result["utterances"]:
        if "problem" in row:
            rows.append([row["name"], None, None, None, None, row["problem"]])
            continue
        deletion = row["deletion"]["scores"]["attention"] if row["deletion"] else None
        figures = [*(row[on]["pearson"]["all"] for on in ("input", "states"))]
        figures += [row["reliability"]["pooled"][1], deletion]
        rows.append([row["name"], *figures, row["transcript"]])
    names = ("sound", "encoding", "reliability", "deletion")
    utterances = ["utterance", *(right(name, number) for name in names), "transcript"]
    means = [
        [name, value["mean"], "{:.3f} to {:.3f}".format(*value["interval"]), value["of"]]
        for name, value in result["means"].items()
    ]
    columns = ["", right("mean", number), right("95 % interval"), right("utterances")]
    show(Table(utterances, rows), Table(columns, means, "Means"))
