"""regard run task-kv: an answer over part of the key-value cache, beside that over all of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import check_output, err, load, read_text, working, write_json
from regard.cli.run.answer import Answer, first_difference, prompt_ids, timed_answer


def task_kv(
    prompt: Annotated[str, typer.Option(help="The text itself, or @file, or @name.")],
    question: Annotated[
        str | None, typer.Option(help="What to ask about the text; put after it.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="A name of `regard models`, a folder or a hub id.")
    ] = "smollm2-135m",
    ratio: Annotated[float, typer.Option(help="Share of keys and values kept.")] = 0.4,
    beta: Annotated[float, typer.Option(help="Share of full heads in the first layer.")] = 0.25,
    m: Annotated[
        int | None, typer.Option(help="Full heads in the last layer; an eighth when left out.")
    ] = None,
    window: Annotated[
        int, typer.Option(help="Queries at the end of the prompt that say what matters.")
    ] = 32,
    top: Annotated[
        int, typer.Option(help="Tokens of the semantic vector; 0 takes them all.")
    ] = 256,
    sinks: Annotated[int, typer.Option(help="First tokens that every head keeps.")] = 16,
    recent: Annotated[int, typer.Option(help="Last tokens that every head keeps.")] = 256,
    distance: Annotated[str, typer.Option(help="euclidean or cosine.")] = "euclidean",
    tokens: Annotated[
        int, typer.Option("-n", "--tokens", min=1, help="Length of the answer.")
    ] = 60,
    words: Annotated[
        int | None, typer.Option(min=1, help="Read only so many words of the prompt.")
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")
    ] = True,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
) -> None:
    """Task-KV: keep the whole cache only for heads that say something different on this prompt.

    Shows the answer with the full cache (transformers as it is) and with Task-KV, the bytes held,
    the speed of both after the first token, and which heads kept everything.

    [bold]Examples[/]

      regard run task-kv --ratio 0.4 --prompt @long.txt --question "Who wrote the letter?"

      regard run task-kv --prompt @northanger-abbey --words 1200 --question "Who is the heroine?"
    """
    from regard.shrink import TaskKV

    check_output(json)
    settings: dict[str, Any] = {
        "ratio": ratio,
        "beta": beta,
        "m": m,
        "window": window,
        "top": top or None,
        "sinks": sinks,
        "recent": recent,
        "distance": distance,
    }
    method = TaskKV(**settings)
    content = _content(prompt, question, words)
    loaded, tokenizer = load(model)
    ids = prompt_ids(content, loaded, tokenizer, tokens, chat)
    _check(loaded, method, ids.shape[1])
    with working("answering, full cache"):
        plain = timed_answer(loaded, ids, tokens, [])
    with warnings.catch_warnings(record=True) as caught, working("answering, Task-KV"):
        warnings.simplefilter("always")
        short = timed_answer(loaded, ids, tokens, [method])
    result = _result(tokenizer, ids.shape[1], plain, short, method)
    result["settings"] = {"model": model, **settings}
    result["notes"] = [str(w.message) for w in caught if str(w.message).startswith("Task-KV: ")]
    write_json(result, json)
    if json is None or str(json) != "-":
        _show(result)
    for note in result["notes"]:
        err().print(f"note: {note}", markup=False, highlight=False)


def _content(prompt: str, question: str | None, words: int | None) -> str:
    """The text, its first words if so many are asked for, and the question."""
    content = read_text(prompt)
    if words is not None:
        pieces = content.split(" ")
        content = " ".join(pieces[:words])
    return content if question is None else f"{content.rstrip()}\n\n{question}"


def _check(model: Any, method: Any, tokens: int) -> None:
    """Refuse a budget that some layer cannot meet, before anything is computed."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        method.plan(heads, tokens, layer, config.num_hidden_layers)


def _result(
    tokenizer: Any, tokens: int, plain: Answer, short: Answer, method: Any
) -> dict[str, Any]:
    """Both answers with bytes and speed, where they part, and the heads."""
    answers = {
        name: {
            "answer": tokenizer.decode(one.tokens),
            "tokens": len(one.tokens),
            "prompt_bytes": one.prompt_bytes,
            "end_bytes": one.end_bytes,
            "prefill_seconds": one.prefill_seconds,
            "tokens_per_second": one.tokens_per_second,
        }
        for name, one in (("full", plain), ("task_kv", short))
    }
    rates = plain.tokens_per_second, short.tokens_per_second
    return {
        **answers,
        "prompt_tokens": tokens,
        "bytes_ratio": short.prompt_bytes / plain.prompt_bytes,
        "speed_ratio": rates[1] / rates[0] if rates[0] and rates[1] else None,
        "first_difference": first_difference(plain.tokens, short.tokens),
        "layers": [
            {
                "layer": number,
                "full": split.full[0].tolist(),
                "distances": split.distances[0].tolist(),
                "sinks": split.plan.sinks,
                "middle": split.plan.middle,
                "recent": split.plan.recent,
            }
            for number, split in method.heads().items()
        ],
    }


def _show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    full, short = result["full"], result["task_kv"]
    answers = Table(box=box.SIMPLE_HEAD)
    for name in ("full cache", "Task-KV"):
        answers.add_column(name, ratio=1, overflow="fold")
    answers.add_row(Text(full["answer"]), Text(short["answer"]))
    console.print(answers)
    apart = result["first_difference"]
    said = (
        "The answers are the same." if apart is None else f"They part at token {apart + 1}."
    ) + f" The prompt has {result['prompt_tokens']} tokens."
    console.print(Text(said))
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "full cache", "Task-KV", "Task-KV / full"):
        table.add_column(name, justify="right" if name else "left")
    for name, key in (("bytes after the prompt", "prompt_bytes"), ("at the end", "end_bytes")):
        table.add_row(name, _mib(full[key]), _mib(short[key]), f"{short[key] / full[key]:.3f}")
    rates = [x["tokens_per_second"] for x in (full, short)]
    if result["speed_ratio"] is not None:
        shown = [f"{rate:.1f}" for rate in rates]
        table.add_row("tokens/s after the first", *shown, f"{result['speed_ratio']:.2f}")
    seconds = [x["prefill_seconds"] for x in (full, short)]
    row = [f"{s:.2f}" for s in (*seconds, seconds[1] / seconds[0])]
    table.add_row("seconds to the first", *row)
    console.print(table)
    heads = Table(box=box.SIMPLE_HEAD, title="Key heads", title_justify="left")
    for name in ("layer", "full ●", "distance from the centre", "the others keep"):
        heads.add_column(name, justify="right" if name == "layer" else "left")
    for row in result["layers"]:
        marks = " ".join("●" if h in row["full"] else "·" for h in range(len(row["distances"])))
        kept = f"{row['sinks']} + {row['middle']} + {row['recent']}"
        apart = " ".join(f"{d:.3f}" for d in row["distances"])
        heads.add_row(str(row["layer"]), marks, apart, kept)
    console.print(heads)
    console.print(Text("The others keep sinks + middle + recent tokens."))


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
