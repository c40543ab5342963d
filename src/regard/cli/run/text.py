"""regard run METHOD on a text: the answer of the model with and without the method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import Loading, check_output, first_tokens, load, read_text, working
from regard.cli.run import shown
from regard.errors import InputError

Prompt = Annotated[str, typer.Option(help="The text itself, or @file, or @name.")]
Question = Annotated[str | None, typer.Option(help="What to ask about the text; put after it.")]
Words = Annotated[int | None, typer.Option(min=1, help="Read only so many words of the prompt.")]
Tokens = Annotated[int, typer.Option("-n", "--tokens", min=1, help="Length of the answer.")]
Chat = Annotated[
    bool, typer.Option(help="Put the prompt into the model's chat template, if it has one.")
]
Json = Annotated[
    Path | None, typer.Option(metavar="FILE|-", help="Write everything as JSON here; - for stdout.")
]
Model = Annotated[str, typer.Option(help="A name of `regard models`, a folder or a hub id.")]


def text(
    method: Any,
    loading: Loading,
    prompt: Prompt,
    question: Question = None,
    model: Model = "",
    tokens: Tokens = 60,
    words: Words = None,
    chat: Chat = True,
    json: Json = None,
) -> None:
    """Shows the plain answer and the changed one, where they part, the bytes of keys and values
    held, the speed of both after the first token, and what the method did.
    """
    from regard.lab.answers import answer, compared, noted

    check_output(json)
    content = prompt_text(prompt, question, words)
    loaded, tokenizer = load(model, loading)
    ids = prompt_ids(content, loaded, tokenizer, tokens, chat)
    if hasattr(method, "fits"):
        method.fits(loaded, ids.shape[1])
    inputs = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
    with working("answering, plain"):
        plain = answer(loaded, inputs, tokens)
    with noted(method.card.name) as notes, working(f"answering, {method.card.name}"):
        changed = answer(loaded, inputs, tokens, [method])
    result = {
        "method": method.card.slug,
        "settings": {"model": model, **method.settings()},
        "loaded": shown.loaded_as(loaded),
        "prompt_tokens": ids.shape[1],
        **compared(shown.reader(tokenizer), plain, changed),
        "report": shown.named(method.report(), tokenizer, ids[0].tolist()),
        "notes": notes,
    }
    shown.finish(result, json, method.card)


def prompt_text(prompt: str, question: str | None, words: int | None) -> str:
    """The text, its first words if so many are asked for, and the question."""
    content = read_text(prompt)
    if words is not None:
        content = " ".join(content.split(" ", words)[:words])
    return content if question is None else f"{content.rstrip()}\n\n{question}"


def prompt_ids(content: str, model: Any, tokenizer: Any, tokens: int, chat: bool) -> Any:
    """Token ids of the prompt, `[1, tokens]`."""
    import torch

    from regard.parts.labels import check_model

    tokenizer = shown.reader(tokenizer)
    check_model(model, tokenizer)
    template = chat and bool(getattr(tokenizer, "chat_template", None))
    if template:
        content = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # the template writes its own special tokens
    limit = len(content) + 8 if room is None else max(1, room - tokens + 1)
    ids, total = first_tokens(tokenizer, content, limit, add_special_tokens=not template)
    if room is not None and len(ids) + tokens > room:
        has = f"{total}" if total is not None else f"more than {len(ids)}"
        raise InputError(
            f"the prompt has {has} tokens and the answer {tokens}, but the model has "
            f"{room} positions: shorten one of them"
        )
    return torch.tensor([ids], device=model.device)
