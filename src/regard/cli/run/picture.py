"""regard run METHOD on pictures: the answer of the model with and without the method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import Loading, read_text, working
from regard.cli.pages import check_places, check_png
from regard.cli.pictures import ask, load_vlm, seen_by_model
from regard.cli.run import shown
from regard.cli.run.text import Chat, Json, Model
from regard.errors import InputError
from regard.files import write_bytes
from regard.zoo.pictures import read_all

Question = Annotated[str, typer.Option(help="The question itself, or @file.")]
Images = Annotated[list[Path], typer.Option(help="A picture; may be given several times.")]
Answer = Annotated[
    int, typer.Option("-n", "--answer", "--tokens", min=1, help="Length of the answer.")
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Draw on the first picture what the method did, as a PNG here."
    ),
]


def picture(
    method: Any,
    loading: Loading,
    prompt: Question,
    image: Images,
    model: Model = "",
    answer: Answer = 60,
    chat: Chat = True,
    out: Out = None,
    json: Json = None,
) -> None:
    """Shows the plain answer and the changed one, where they part, the bytes of keys and values
    held, the seconds until the first token, the speed after it, and what the method did.
    """
    from regard.lab import answers
    from regard.parts.vision import locate

    check_places(json, out)
    check_png(out)
    card = method.card
    view = card.load("view") if card.has("view") else None
    if out is not None and not hasattr(view, "picture"):
        raise InputError(f"{card.name} draws no picture: leave --out out")
    pictures, question = read_all(image), read_text(prompt)
    loaded, processor = load_vlm(model, loading)
    inputs = ask(loaded, processor, pictures, question, answer, chat)
    places = locate(loaded, inputs)
    grids = [None if g is None else list(g) for g in places.grids[0]]
    if out is not None and (not grids or len(grids[0] or ()) != 2):
        raise InputError("the patches of this picture form no known grid: leave --out out")
    if hasattr(method, "prepare"):
        with working(f"preparing {card.name}"):
            method.prepare(loaded, inputs)

    def timed(*methods: Any) -> answers.Answer:
        answers.answer(loaded, inputs, 1, methods)  # the first pass of a shape is a slow one
        return answers.answer(loaded, inputs, answer, methods)

    with answers.noted(card.method) as notes, working(f"answering, {card.name}"):
        changed = timed(method)
    with working("answering, plain"):
        plain = timed()
    ids = inputs["input_ids"]
    result = {
        "method": card.slug,
        "settings": {"model": model, **method.settings()},
        "loaded": shown.loaded_as(loaded),
        "prompt_tokens": ids.shape[1],
        "image_tokens": [end - start for start, end in places.spans(0)],
        "grids": grids,
        **answers.compared(shown.reader(processor), plain, changed),
        "report": shown.named(method.report(), processor, ids[0].tolist()),
        "notes": notes,
    }
    if out is not None and view is not None:
        from regard.report.contact import png

        drawn = view.picture(result["report"], seen_by_model(processor, inputs, 0, pictures[0]))
        write_bytes(out, png(drawn))
    shown.finish(result, json, card)
