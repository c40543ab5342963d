"""regard run METHOD on pictures: the answer of the model with and without the method."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import Loading, err, read_text, working
from regard.cli.pages import check_places, check_png
from regard.cli.pictures import ask, load_vlm, placed, small
from regard.cli.run import shown
from regard.cli.run.text import Chat, Json, Model
from regard.errors import InputError
from regard.files import write_bytes
from regard.zoo.frames import read_frames

Question = Annotated[str, typer.Option(help="The question itself, or @file.")]
Images = Annotated[
    list[Path],
    typer.Option(help="A picture, a folder of them, or a video; may be given several times."),
]
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

    check_places(json, out)
    check_png(out)
    card = method.card
    view = card.load("view") if card.has("view") else None
    if out is not None and not hasattr(view, "picture"):
        raise InputError(f"{card.name} draws no picture: leave --out out")
    question, pictures = read_text(prompt), []
    for path in image:
        named, note = read_frames(path)
        pictures += [one for _, one in named]
        if note:
            err().print(f"note: {note}", markup=False, highlight=False)
    if not pictures:
        raise InputError("name at least one picture: --image photo.png")
    loaded, processor = load_vlm(model, loading)
    inputs = ask(loaded, processor, pictures, question, answer, chat)
    places = placed(loaded, processor, inputs, pictures)
    grids = [None if g is None else list(g) for g in places.grids[0]]
    drawn = [v for v in places.views[0] if v.picture == 0]
    if out is not None and (not drawn or any(v.box is None for v in drawn)):
        raise InputError(
            f"where the patches of {type(loaded).__name__} lie on a picture is not known: leave "
            "--out out"
        )
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
        "views": [asdict(view) for view in places.views[0]],
        **answers.compared(shown.reader(processor), plain, changed),
        "report": shown.named(method.report(), processor, ids[0].tolist()),
        "notes": notes,
    }
    if out is not None and view is not None:
        from regard.report.contact import png

        write_bytes(out, png(view.picture(result["report"], drawn, small(pictures[0]))))
    shown.finish(result, json, card)
