"""What `regard run` prints: both answers, their figures side by side, and what the method did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.cli.common import err, write_json

if TYPE_CHECKING:
    from regard.report.screen import Console

Row = tuple[str, Sequence[float], Callable[[float], str], int]
"""A name, the figure without and with the method, how it is written, digits of their ratio."""


def finish(
    result: Mapping[str, Any],
    json: Path | None,
    method: Any,
    more: Callable[[Console], None] | None = None,
) -> None:
    """Write the result where it is asked for, show it unless it went to stdout, and its notes."""
    from rich.text import Text

    from regard.report.screen import Console

    write_json(result, json)
    if str(json) != "-":
        console = Console()
        both = {"plain": result["plain"], "changed": result["changed"]}
        answers(console, {"plain": both["plain"]["answer"], method.name: both["changed"]["answer"]})
        said = parted(result["first_difference"])
        console.print(
            Text(
                f"{said} KL of the first token's distribution: {result['kl']:.4f} nats. The prompt "
                f"has {result['prompt_tokens']} tokens; the model is {result['loaded']}."
            )
        )
        figures(console, ("plain", method.name, "ratio"), rows(**both))
        if more is not None:
            more(console)
        tables(console, method, result["report"])
    for note in result["notes"]:
        err().print(f"note: {note}", markup=False, highlight=False)


def tables(console: Console, method: Any, report: Mapping[str, Any]) -> None:
    """Print what the method did, as its view lays it out."""
    if not method.has("view"):
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for plain in method.load("view").tables(report):
        if plain["rows"]:
            table = Table(box=box.SIMPLE_HEAD, title=plain.get("title"), title_justify="left")
            for name in plain["columns"]:
                table.add_column(name)
            for row in plain["rows"]:
                table.add_row(*(Text(str(cell)) for cell in row))
            console.print(table)
        if plain.get("note"):
            console.print(Text(plain["note"]))


def named(report: Any, tokenizer: Any, ids: Sequence[int]) -> Any:
    """A report in which every {"position": n} says its token too."""
    from regard.watching.tokens import pieces

    words = pieces(reader(tokenizer), ids)

    def add(value: Any) -> Any:
        if isinstance(value, dict):
            told = {n: add(v) for n, v in value.items()}
            at = value.get("position")
            return {**told, "token": words[at]} if at is not None and at < len(words) else told
        return [add(v) for v in value] if isinstance(value, list) else value

    return add(report)


def answers(console: Console, named: Mapping[str, str]) -> None:
    """Print answers side by side, each under its name."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name in named:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*map(Text, named.values()))
    console.print(table)


def parted(apart: Mapping[str, Any] | None) -> str:
    """Where answers part, in words.

    >>> parted(None)
    'The answers are the same.'
    >>> parted({"token": 0, "plain": "No", "changed": "Yes"})
    "They part at token 1: 'No' became 'Yes'."
    """
    if apart is None:
        return "The answers are the same."
    return (
        f"They part at token {apart['token'] + 1}: {apart['plain']!r} became {apart['changed']!r}."
    )


def rows(plain: Mapping[str, Any], changed: Mapping[str, Any]) -> Iterable[Row]:
    """The rows of two timed answers, for `figures`."""
    pairs = {n: (plain[n], changed[n]) for n in plain if n != "answer"}
    yield "keys and values after the prompt", pairs["prompt_bytes"], size, 3
    yield "at the end", pairs["end_bytes"], size, 3
    if all(pairs["tokens_per_second"]):
        yield "tokens/s after the first", pairs["tokens_per_second"], "{:.1f}".format, 2
    yield "seconds to the first", pairs["prefill_seconds"], "{:.2f}".format, 2


def size(count: float) -> str:
    """Bytes as a person reads them.

    >>> size(512 * 1024), size(3 * 2**20)
    ('512.0 KiB', '3.00 MiB')
    """
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def figures(console: Console, names: Sequence[str], given: Iterable[Row]) -> None:
    """Print figures without and with a method, and their ratio; `names` are of these columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for name, (full, short), written, digits in given:
        ratio = f"{short / full:.{digits}f}" if full else "-"
        table.add_row(name, written(full), written(short), ratio)
    console.print(table)


def reader(tokenizer: Any) -> Any:
    """What turns text into tokens: of a processor, which reads pictures too, its tokenizer."""
    from regard.watching.tokens import reader as read

    return read(tokenizer)


def loaded_as(model: Any) -> str:
    """Dtype and device of a model, for the output."""
    from regard.zoo.options import placed

    return placed(model)
