"""regard run recycled-attention: an answer written over the keys of the last full step, beside the
one over all keys.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from regard.cli.common import check_output, load, working
from regard.cli.run import shown
from regard.cli.run.answer import (
    Answer,
    Chat,
    Json,
    Model,
    Prompt,
    Question,
    Tokens,
    Words,
    parting,
    prompt_ids,
    prompt_text,
    timed_answer,
    timed_pair,
)
from regard.errors import InputError


def recycled(
    prompt: Prompt,
    question: Question = None,
    model: Model = "smollm2-135m",
    budget: Annotated[int, typer.Option(help="Keys kept for each key head.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="Every so many tokens read all keys (16 when left out).")
    ] = None,
    query_check: Annotated[
        int | None,
        typer.Option(help="Instead: look at every so many tokens whether the query has changed."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="With --query-check: cosine that counts as changed (0.8 if left out)."),
    ] = None,
    pool: Annotated[
        int | None, typer.Option(help="Rank by the greatest of so many neighbours, for example 7.")
    ] = None,
    evict: Annotated[
        str, typer.Option(help="Make room by the last full step (last_full), or by the current.")
    ] = "last_full",
    tokens: Tokens = 60,
    words: Words = None,
    chat: Chat = True,
    json: Json = None,
) -> None:
    """Recycled attention: read all keys now and then, and few in between; no token is lost.

    Shows the answer of transformers as it is and the recycled one, where they part, the speed of
    both after the first token, the keys read a token, and how much attention the kept keys held.

    [bold]Examples[/]

      regard run recycled-attention --prompt @long.txt --question "Who wrote the letter?"

      regard run recycled-attention --prompt @northanger-abbey --words 4000 --budget 512 --stride 8
    """
    from regard.shrink import Recycled

    if stride is not None and query_check is not None:
        raise InputError("--stride and --query-check are two ways to say when: give one")
    if threshold is not None and query_check is None:
        raise InputError("--threshold goes with --query-check: give both")
    check_output(json)
    settings: dict[str, Any] = {
        "budget": budget,
        "stride": 16 if stride is None else stride,
        "query_check": query_check,
        "threshold": 0.8 if threshold is None else threshold,
        "pool": pool,
        "evict": evict,
    }
    method = Recycled(**settings)
    content = prompt_text(prompt, question, words)
    loaded, tokenizer = load(model)
    ids = prompt_ids(content, loaded, tokenizer, tokens, chat)
    with working("answering, all keys"):
        plain = timed_answer(loaded, ids, tokens, [])
    with working("answering, recycled"):
        short = timed_answer(loaded, ids, tokens, [method])
    result = _result(tokenizer, ids.shape[1], plain, short, method)
    unused = ("stride",) if query_check is not None else ("query_check", "threshold")
    result["settings"] = {
        "model": model,
        **{name: None if name in unused else value for name, value in settings.items()},
    }
    notes = []
    if ids.shape[1] + tokens <= budget:
        notes.append(
            f"prompt and answer hold {ids.shape[1] + tokens} tokens at most and the budget is "
            f"{budget}, so every key was read: give a smaller --budget or a longer text"
        )
    result["notes"] = notes
    shown.finish(result, json, _show)


def _result(
    tokenizer: Any, tokens: int, plain: Answer, short: Answer, method: Any
) -> dict[str, Any]:
    """Both answers with speed and bytes, where they part, and what the layers read."""
    layers = [
        {
            "layer": number,
            "tokens": done.tokens,
            "full_steps": done.full,
            "entries_per_token": done.entries / done.tokens if done.tokens else None,
            "recovered": done.recovered,
        }
        for number, done in method.steps().items()
    ]
    steps = len(short.tokens) - 1
    return {
        **timed_pair(tokenizer, plain, "recycled", short),
        "prompt_tokens": tokens,
        "first_difference": parting(tokenizer, full=plain.tokens, recycled=short.tokens),
        "entries_per_token": method.entries_per_token if steps else None,
        "full_entries_per_token": tokens + (steps + 1) / 2 if steps else None,
        "recovered": method.recovered,
        "layers": layers,
    }


def _show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    full, short = result["full"], result["recycled"]
    shown.answers(console, {"all keys": full["answer"], "recycled": short["answer"]})
    said = shown.parted(result["first_difference"])
    console.print(Text(f"{said} The prompt has {result['prompt_tokens']} tokens."))
    rows = list(shown.speeds(full, short))
    if result["entries_per_token"] is not None:
        read = result["full_entries_per_token"], result["entries_per_token"]
        rows.append(("keys read a token", read, "{:.0f}".format, 3))
    held = [one["end_bytes"] / 2**20 for one in (full, short)]
    rows.append(("MiB held at the end", held, "{:.2f}".format, 3))
    shown.figures(console, ("all keys", "recycled", "recycled / all"), rows)
    _show_layers(result, console)


def _show_layers(result: dict[str, Any], console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    counts = {row["full_steps"] for row in result["layers"]}
    steps = result["recycled"]["tokens"] - 1
    if len(counts) == 1:
        console.print(Text(f"Every layer read all keys at {counts.pop()} of {steps} tokens."))
    else:
        table = Table(box=box.SIMPLE_HEAD, title="Full steps", title_justify="left")
        for name in ("layer", f"of {steps} tokens"):
            table.add_column(name, justify="right")
        for row in result["layers"]:
            table.add_row(str(row["layer"]), str(row["full_steps"]))
        console.print(table)
    if result["recovered"] is not None:
        least = min(
            (row for row in result["layers"] if row["recovered"]),
            key=lambda row: sum(row["recovered"]) / len(row["recovered"]),
        )
        share = 100 * sum(least["recovered"]) / len(least["recovered"])
        console.print(
            Text(
                "At a full step the kept keys and the token's own held "
                f"{100 * result['recovered']:.1f} % of the attention, least in layer "
                f"{least['layer']}: {share:.1f} %."
            )
        )
