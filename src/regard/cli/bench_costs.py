"""regard bench decode and speech: what a method costs beside the plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import count
from regard.cli.pages import check_places
from regard.zoo.options import Loading

Model = Annotated[str, typer.Option(help="A name of `regard models`, a folder or a hub id.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timing rounds.")]
Out = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Result file; a run that was cut off goes on from it."),
]
Page = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the tables as a Markdown page.")
]


def app_commands(app: typer.Typer) -> None:
    """Add these commands to those of `regard bench`."""
    for command in (decode, speech):
        app.command(command.__name__)(command)


def decode(
    model: Model = "smollm2-135m",
    context: Annotated[str, typer.Option(help="Tokens of context: 8192 or 8k.")] = "8k",
    rounds: Rounds = 5,
    out: Out = None,
    page: Page = None,
    *,
    loading: Loading,
) -> None:
    """Decoding after a long context: stock transformers and methods that keep fewer keys, in turn.

    [bold]Example[/]

      regard bench decode --context 4k --out decode.json
    """
    from regard.lab.bench import decode as bench

    measure(bench, out, page, model, loading, context=count(context), rounds=rounds)


def speech(
    model: Model = "whisper-tiny.en",
    rounds: Rounds = 5,
    out: Out = None,
    page: Page = None,
    *,
    loading: Loading,
) -> None:
    """What facts of cross attention cost while a speech model transcribes.

    [bold]Example[/]

      regard bench speech --out speech.json
    """
    from regard.lab.bench import speech as bench

    measure(bench, out, page, model, loading, rounds=rounds)


def measure(
    bench: Any, out: Path | None, page: Path | None, model: str, loading: Loading, **settings: Any
) -> None:
    """Run a bench of one model, and say what became of its targets."""
    check_places(None, out, page)
    finish(bench, bench.run(model, loading=loading, out=out, **settings), out, page)


def finish(bench: Any, result: Any, out: Path | None, page: Path | None) -> None:
    """Write the page that was asked for, and say what became of every target."""
    from regard.lab.bench.record import targets
    from regard.report.screen import Console

    if page is not None:
        from regard.files import write_text

        write_text(page, bench.markdown(result, str(out or "a run")))
    Console().print(targets(bench.judge(result)))
