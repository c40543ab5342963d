"""regard run act: an answer with the later sinks shrunk, beside the plain one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import check_output, err, load, read_text, working, write_json
from regard.cli.run.answer import prompt_ids
from regard.errors import InputError


def act(
    prompt: Annotated[str, typer.Option(help="The text itself, or @file, or @name.")],
    model: Annotated[
        str, typer.Option(help="A name of `regard models`, a folder or a hub id.")
    ] = "smollm2-135m",
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
    tokens: Annotated[
        int, typer.Option("-n", "--tokens", min=1, help="Length of the answer.")
    ] = 60,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")
    ] = True,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
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
    with working("answering, plain"):
        plain = _answer(loaded, ids, tokens, [])
    with warnings.catch_warnings(record=True) as caught, working("answering, steered"):
        warnings.simplefilter("always")
        steered = _answer(loaded, ids, tokens, [method])
    notes = [str(w.message) for w in caught if str(w.message).startswith("ACT: ")]
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
    write_json(result, json)
    if json is None or str(json) != "-":
        _show(result)
    for note in notes:
        err().print(f"note: {note}", markup=False, highlight=False)


def _answer(model: Any, ids: Any, tokens: int, methods: list[Any]) -> tuple[list[int], Any]:
    """The greedy answer, and the log-probabilities of its first token."""
    import torch

    from regard.api import apply

    with torch.no_grad(), apply(model, *methods):
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[0, ids.shape[1] :].tolist(), out.logits[0][0].double().log_softmax(-1)


def _result(
    tokenizer: Any,
    ids: Any,
    plain: tuple[list[int], Any],
    steered: tuple[list[int], Any],
    method: Any,
) -> dict[str, Any]:
    """Both answers, what changed, and where."""
    (a, p), (b, q) = plain, steered
    apart = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), None)
    if apart is None and len(a) != len(b):
        apart = min(len(a), len(b))
    pieces = [tokenizer.decode([n]) for n in ids[0].tolist()]
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
        "first_difference": None
        if apart is None
        else {
            "token": apart,
            "plain": tokenizer.decode(a[apart : apart + 1]),
            "steered": tokenizer.decode(b[apart : apart + 1]),
        },
        "kl": max(float((p.exp() * (p - q)).sum()), 0.0),
        "layers": layers,
    }


def _show(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    answers = Table(box=box.SIMPLE_HEAD)
    for name in ("plain", "steered"):
        answers.add_column(name, ratio=1, overflow="fold")
    answers.add_row(Text(result["plain"]), Text(result["steered"]))
    console.print(answers)
    apart = result["first_difference"]
    if apart is None:
        said = "The answers are the same."
    else:
        said = (
            f"They part at token {apart['token'] + 1}: {apart['plain']!r} became "
            f"{apart['steered']!r}."
        )
    console.print(Text(f"{said} KL of the first token's distribution: {result['kl']:.4f} nats."))
    table = Table(box=box.SIMPLE_HEAD, title="Sinks of the prompt", title_justify="left")
    for name in ("layer", "heads with sinks", "sinks", "token at position (heads)"):
        table.add_column(name, justify="left" if name.startswith("token") else "right")
    for row in result["layers"]:
        shown = [f"{s['token']!r} at {s['position']} ({s['heads']})" for s in row["sinks"][:4]]
        table.add_row(
            str(row["layer"]),
            f"{row['heads_with_sinks']} of {row['heads']}",
            str(len(row["sinks"])),
            Text(", ".join(shown)),
        )
    console.print(table)
