"""regard run act: an answer with the later sinks shrunk, beside the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import check_output, load, read_text, working
from regard.cli.run import shown
from regard.cli.run.answer import (
    Chat,
    Json,
    Model,
    Prompt,
    Tokens,
    divergence,
    greedy_answer,
    noted,
    parting,
    prompt_ids,
)
from regard.errors import InputError


def act(
    prompt: Prompt,
    model: Model = "smollm2-135m",
    heads: Annotated[
        Path | None, typer.Option(help="Head list of `regard calibrate act`; all heads without.")
    ] = None,
    beta: Annotated[float, typer.Option(help="Share of its attention a sink keeps.")] = 0.4,
    alpha: Annotated[
        float | None, typer.Option(help="A sink receives over alpha / N (5 when left out).")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="A sink receives over this, instead of alpha / N.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="While answering: keep the sinks of the prompt (prefill), or dynamic."),
    ] = "prefill",
    tokens: Tokens = 60,
    chat: Chat = True,
    json: Json = None,
) -> None:
    """ACT: shrink the later attention sinks while the model answers, no weight touched.

    Shows the plain and the steered answer, where they part, and which tokens were sinks. Without a
    head list all heads are changed, which the paper advises against.

    [bold]Examples[/]

      regard run act --prompt "Name three rivers of France."

      regard run act --prompt @long.txt --heads heads.json --threshold 0.1
    """
    from regard.steer.act import ACT

    if alpha is not None and threshold is not None:
        raise InputError("--alpha and --threshold are two ways to say it: give one")
    check_output(json)
    file = None if heads is None else str(heads)
    method = ACT(
        beta=beta, alpha=5.0 if alpha is None else alpha, threshold=threshold, heads=file, mode=mode
    )
    content = read_text(prompt)
    loaded, tokenizer = load(model)
    ids = prompt_ids(content, loaded, tokenizer, tokens, chat)
    inputs = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
    with working("answering, plain"):
        plain = greedy_answer(loaded, inputs, tokens, [])
    with noted("ACT") as notes, working("answering, steered"):
        steered = greedy_answer(loaded, inputs, tokens, [method])
    result = _result(tokenizer, ids, plain, steered, method)
    result["settings"] = {
        "model": model,
        "heads": file,
        "beta": beta,
        "alpha": None if threshold else method.alpha,
        "threshold": threshold,
        "mode": mode,
    }
    result["notes"] = notes
    shown.finish(result, json, _show)


def _result(
    tokenizer: Any,
    ids: Any,
    plain: tuple[list[int], Any],
    steered: tuple[list[int], Any],
    method: Any,
) -> dict[str, Any]:
    """Both answers, what changed, and where."""
    from regard.see import tokens

    (a, p), (b, q) = plain, steered
    pieces = tokens.pieces(tokenizer, ids[0].tolist())
    layers = []
    for layer, sinks in method.found().items():
        at = sinks[0, :, : len(pieces)].sum(0)
        named = [n for n in at.argsort(descending=True, stable=True).tolist() if at[n]]
        layers.append(
            {
                "layer": layer,
                "heads": sinks.shape[1],
                "heads_with_sinks": int(sinks[0].any(-1).sum()),
                "sinks": [{"position": n, "token": pieces[n], "heads": int(at[n])} for n in named],
            }
        )
    return {
        "plain": tokenizer.decode(a),
        "steered": tokenizer.decode(b),
        "prompt_tokens": len(pieces),
        "first_difference": parting(tokenizer, plain=a, steered=b),
        "kl": divergence(p, q),
        "layers": layers,
    }


def _show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    shown.answers(console, {name: result[name] for name in ("plain", "steered")})
    said = shown.parted(result["first_difference"])
    console.print(Text(f"{said} KL of the first token's distribution: {result['kl']:.4f} nats."))
    if not result["layers"]:
        return
    table = Table(box=box.SIMPLE_HEAD, title="Sinks of the prompt", title_justify="left")
    for name in ("layer", "heads with sinks", "sinks", "token at position (heads)"):
        table.add_column(name, justify="left" if name.startswith("token") else "right")
    for row in result["layers"]:
        first = [f"{s['token']!r} at {s['position']} ({s['heads']})" for s in row["sinks"][:4]]
        table.add_row(
            str(row["layer"]),
            f"{row['heads_with_sinks']} of {row['heads']}",
            str(len(row["sinks"])),
            Text(", ".join(first)),
        )
    console.print(table)
