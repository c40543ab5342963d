"""regard run METHOD where a method measures and changes nothing: a text, or an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regard.cli.common import Loading, check_output, load, working, write_json
from regard.cli.run import shown
from regard.cli.run.text import (
    Chat,
    Json,
    Model,
    Prompt,
    Question,
    Tokens,
    Words,
    prompt_ids,
    prompt_text,
)


def tokens(
    method: Any,
    loading: Loading,
    prompt: Prompt,
    model: Model = "",
    words: Words = None,
    json: Json = None,
) -> None:
    """Shows what was measured on the tokens of one text."""
    check_output(json)
    content = prompt_text(prompt, None, words)
    loaded, tokenizer = load(model, loading)
    ids = prompt_ids(content, loaded, tokenizer, 0, False)
    with working("measuring"):
        report = method(loaded, ids).as_dict()
    _finish(method, report, model, loaded, tokenizer, ids, json)


def answered(
    method: Any,
    loading: Loading,
    prompt: Prompt,
    question: Question = None,
    model: Model = "",
    answer: Tokens = 60,
    words: Words = None,
    chat: Chat = True,
    json: Json = None,
) -> None:
    """Shows what was measured on the greedy answer to a prompt."""
    import torch

    from regard.lab.answers import answer as greedy
    from regard.watching.tokens import pieces

    check_output(json)
    content = prompt_text(prompt, question, words)
    loaded, tokenizer = load(model, loading)
    ids = prompt_ids(content, loaded, tokenizer, answer, chat)
    with working("answering"):
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        new = greedy(loaded, inputs, answer).tokens
    whole = torch.cat([ids, ids.new_tensor([new])], 1)
    with working("measuring"):
        report = method(loaded, whole, ids.shape[1]).as_dict()
    read = shown.reader(tokenizer)
    report |= {"answer": read.decode(new), "pieces": pieces(read, new)}
    _finish(method, report, model, loaded, tokenizer, ids, json)


def _finish(
    method: Any,
    report: dict[str, Any],
    model: str | None,
    loaded: Any,
    tokenizer: Any,
    ids: Any,
    json: Path | None,
) -> None:
    from rich.text import Text

    from regard.report.screen import Console

    card = method.card
    result = {
        "method": card.slug,
        "settings": {"model": model, **method.keywords},
        "loaded": shown.loaded_as(loaded),
        "prompt_tokens": ids.shape[1],
        "report": shown.named(report, tokenizer, ids[0].tolist()),
    }
    write_json(result, json)
    if str(json) != "-":
        console = Console()
        if "answer" in report:
            console.print(Text(report["answer"]))
        shown.tables(console, card, result["report"])
        console.print(
            Text(f"The prompt has {ids.shape[1]} tokens; the model is {result['loaded']}.")
        )
