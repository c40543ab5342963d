"""regard run localist: a question about documents, answered at dial 0 and with the dial turned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import err, load, read_text, working, write_json
from regard.cli.pages import check_places
from regard.errors import InputError, nearest
from regard.files import write_text
from regard.zoo.options import Loading

from .card import Settings


def run(
    settings: Settings,
    loading: Loading,
    docs: Annotated[
        list[str],
        typer.Option(help="Text file of a block; all that follow, or once for each."),
    ],
    question: Annotated[str, typer.Option(help="The question itself, or @file.")],
    toward: Annotated[
        str, typer.Option(help="Documents to look at, by the name of the file; by commas.")
    ] = "",
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    model: Annotated[
        str, typer.Option(help="A name of `regard models`, a folder or a hub id.")
    ] = "smollm2-135m",
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Length of answers.")] = 24,
    metadata: Annotated[
        list[str] | None, typer.Option(help="key=value of the request, which rules may ask for.")
    ] = None,
    leakage: Annotated[
        float | None,
        typer.Option(help="Find the strength for this mean leakage, in place of --beta."),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if any.")] = True,
    html: Annotated[Path | None, typer.Option(help="Write the audit sheet here.")] = None,
    json: Annotated[Path | None, typer.Option(help="Everything as JSON; - for stdout.")] = None,
) -> None:
    """Answer a question about documents at dial 0 and at the dial, toward some of the documents.

    Shows both answers, and at each setting leakage, fidelity, entropy and whether the bounds held.
    """
    check_places(json, html)
    names = [*docs, *(more or [])]
    documents = _read(names)
    wanted = [w.strip() for w in toward.split(",") if w.strip()]
    if not wanted and settings.rules is None:
        raise InputError("--toward names the documents to look at; or give --rules")
    for one in wanted:
        if one not in documents:
            raise InputError(
                f"--toward {one} is none of {', '.join(documents)}.{nearest(one, documents)}"
            )
    if settings.bias == "distance" or leakage is not None:
        if settings.bias == "distance":
            raise InputError("documents are blocks: leave --bias at blocks")
        if not 0 < (leakage or 0) < 1:
            raise InputError(f"--leakage lies between 0 and 1, not {leakage}")
    if not settings.locality:
        raise InputError("--locality is above 0: the answer at 0 is shown beside it")
    from .answering import answered

    asked, given = read_text(question), _metadata(metadata)
    content = {"documents": documents, "question": asked, "toward": wanted, "metadata": given}
    loaded, tokenizer = load(model, loading)
    with working("answering at both settings"):
        result = answered(
            loaded, tokenizer, settings, tokens=tokens, leakage=leakage, chat=chat, **content
        )
    result["settings"]["model"] = model
    write_json(result, json)
    if html is not None:
        from .sheet import sheet

        write_text(html, sheet(result).html())
        err().print(f"audit sheet: {html}", markup=False, highlight=False)
    if str(json) != "-":
        _show(result)


def _show(result: dict[str, Any]) -> None:
    from regard.report.document import show
    from regard.report.table import Table

    from .sheet import figures_table
    from .view import ranges

    settings = [("0", result["plain"]), (f"{result['locality']:g}", result["dialled"])]
    show(Table(["dial", "answer"], [[name, one["answer"]] for name, one in settings]))
    show(figures_table(result["figures"]))
    fired = result["dialled"]["report"]["fired"]
    for one in fired:
        show(f"rule {one['rule']} fired on tokens {ranges(one['queries'])}")
    show(
        f"beta {result['beta']:.3g} nats; figures are of question and answer tokens, over all "
        "layers and heads."
    )


def _read(names: list[str]) -> dict[str, str]:
    """The documents by name of their file."""
    documents: dict[str, str] = {}
    for name in names:
        label = Path(name.removeprefix("@")).stem or name
        if label in documents:
            raise InputError(f"two documents are called {label}: rename one of the files")
        documents[label] = read_text(name if name.startswith("@") else f"@{name}")
    if len(documents) < 2:
        raise InputError("the dial chooses among documents: give two at least, --docs a.txt b.txt")
    return documents


def _metadata(given: list[str] | None) -> dict[str, str]:
    made = {}
    for one in given or []:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise InputError(f"--metadata is key=value, not {one[:40]!r}")
        made[key] = value
    return made


COMMANDS = {"run": run}
