"""regard run task-kv: an answer over part of the key-value cache, beside that over all of it."""

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
    first_difference,
    noted,
    prompt_ids,
    prompt_text,
    timed_answer,
    timed_pair,
)


def task_kv(
    prompt: Prompt,
    question: Question = None,
    model: Model = "smollm2-135m",
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
    tokens: Tokens = 60,
    words: Words = None,
    chat: Chat = True,
    json: Json = None,
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
    content = prompt_text(prompt, question, words)
    loaded, tokenizer = load(model)
    ids = prompt_ids(content, loaded, tokenizer, tokens, chat)
    _check(loaded, method, ids.shape[1])
    with working("answering, full cache"):
        plain = timed_answer(loaded, ids, tokens, [])
    with noted("Task-KV") as notes, working("answering, Task-KV"):
        short = timed_answer(loaded, ids, tokens, [method])
    result = _result(tokenizer, ids.shape[1], plain, short, method)
    result["settings"] = {"model": model, **settings}
    result["notes"] = notes
    shown.finish(result, json, _show)


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
    return {
        **timed_pair(tokenizer, plain, "task_kv", short),
        "prompt_tokens": tokens,
        "bytes_ratio": short.prompt_bytes / plain.prompt_bytes,
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
    shown.answers(console, {"full cache": full["answer"], "Task-KV": short["answer"]})
    said = shown.parted(result["first_difference"])
    console.print(Text(f"{said} The prompt has {result['prompt_tokens']} tokens."))
    held: list[shown.Row] = [
        ("bytes after the prompt", (full["prompt_bytes"], short["prompt_bytes"]), _mib, 3),
        ("at the end", (full["end_bytes"], short["end_bytes"]), _mib, 3),
    ]
    names = ("full cache", "Task-KV", "Task-KV / full")
    shown.figures(console, names, [*held, *shown.speeds(full, short)])
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


def _mib(count: float) -> str:
    return f"{count / 2**20:.2f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
