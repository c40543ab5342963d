"""regard see on a picture: what the words of a question and of its answer look at."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from regard import catalog
from regard.cli.common import Loading, err, working, write_json
from regard.cli.pages import check_places
from regard.cli.pictures import ask, load_vlm, seen_by_model
from regard.errors import InputError
from regard.zoo.pictures import read

DEFAULT = "shapes-vlm"


def see(
    given: str, question: str | None, model: str, loading: Loading, *, html: Path | None,
    json: Path | None, tokens: int = 24,
) -> None:  # fmt: skip
    """Answer the question about the picture, and show where each word looked.

    Raises:
        InputError: no question, a file that is no picture, a model that reads none, an output that
            cannot be written.
    """
    check_places(json, html)
    if question is None or not question.strip():
        raise InputError('ask something about the picture: regard see photo.png "what is this?"')
    pictures = [read(given)]
    loaded, processor = load_vlm(model, loading)
    inputs = ask(loaded, processor, pictures, question, tokens)
    result, looks, sinks = _look(loaded, processor, inputs, tokens)
    result |= {
        "picture": Path(given).name,
        "question": question,
        "model": model,
        "command": "regard " + " ".join(shlex.quote(a) for a in sys.argv[1:]),
    }
    if json is None or str(json) != "-":
        _show(result)
    write_json(result, json)
    if html is not None:
        from regard.files import write_text

        shown = seen_by_model(processor, inputs, 0, pictures[0])
        write_text(html, _page(result, looks, sinks, shown))
        err().print(f"report: {html}", markup=False, highlight=False)


def _look(loaded: Any, processor: Any, inputs: Any, tokens: int) -> tuple[dict[str, Any], Any, Any]:
    """The answer, what every word looked at, the sinks of each layer, and the cuts' bias."""
    from regard.lab.answers import answer
    from regard.parts.pictures import PictureLooks
    from regard.watching.tokens import pieces

    looks = PictureLooks()
    sinks, why = _seen_by("sinks", loaded, inputs, (None, "no method marks sinks"))
    handlers = [looks] if sinks is None else [looks, sinks]
    with working("answering"):
        ids = answer(loaded, inputs, tokens, handlers).tokens
    names = [said.strip() or "·" for said in pieces(processor.tokenizer, looks.tokens)]
    asked = len(names) - max(0, len(ids) - 1)
    by_word = looks.by_word()
    words = []
    for n, name in enumerate(names):
        peak = int(by_word[n].argmax())
        words.append(
            {
                "word": name,
                "generated": n >= asked,
                "on picture": round(float(by_word[n].sum()), 5),
                "peak": [peak // looks.grid[1], peak % looks.grid[1]],
                "map": [float(f"{v:.4g}") for v in by_word[n].tolist()],
            }
        )
    mass = looks.mass()
    best = divmod(int(mass.argmax()), mass.shape[1])
    found = {} if sinks is None else sinks.found()
    image = {n: (f.sinks & f.image)[0] for n, f in found.items()}
    result = {
        "answer": processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "grid": list(looks.grid),
        "words": words,
        "most on the picture": {
            "layer": sorted(looks.heads)[best[0]], "head": best[1],
            "share": round(float(mass.max()), 4),
        },
        "share by layer": {str(n): round(float(m.mean()), 4)
                           for n, m in zip(sorted(looks.heads), mass)},
        "sinks": {str(n): int(s.sum()) for n, s in image.items()},
        "rows": _seen_by("rows", loaded, inputs, {}),
        "notes": [] if sinks is not None else [why],
    }  # fmt: skip
    return result, looks, found


def _seen_by(name: str, loaded: Any, inputs: Any, nothing: Any) -> Any:
    """What a method's `see_picture.py` tells under this name; `nothing` where none does."""
    for method in catalog.everything():
        if method.has("see_picture") and hasattr(method.load("see_picture"), name):
            return getattr(method.load("see_picture"), name)(loaded, inputs)
    return nothing


def _show(result: dict[str, Any]) -> None:
    from regard.report.document import show
    from regard.report.table import Cell, Table, right

    rows = [
        [
            Cell(word["word"], "bold" if word["generated"] else ""),
            word["on picture"],
            "{}, {}".format(*word["peak"]),
        ]
        for word in result["words"]
    ]
    shares = right("share on the picture", "{:.1%}".format)
    table = Table(["word", shares, "looks most at (row, column)"], rows)
    best = result["most on the picture"]
    lines = [
        f"Head {best['head']} of layer {best['layer']} looks at the picture most: "
        f"{100 * best['share']:.0f} % of its attention."
    ]
    if marked := {n: c for n, c in result["sinks"].items() if c}:
        told = ", ".join(f"layer {n}: {c}" for n, c in marked.items())
        lines.append(f"Sinks among the patches: {told}")
    if result["rows"]:
        told = ", ".join(f"{n} {v:.2f}" for n, v in result["rows"].items())
        lines.append(f"Mean row of the half that a cut would keep (0 top, 1 bottom): {told}.")
    show(Cell(result["answer"], "bold"), table, *lines)
    for note in result["notes"]:
        err().print(f"note: {note}", markup=False, highlight=False)


def _page(result: dict[str, Any], looks: Any, found: dict[int, Any], shown: Any) -> str:
    """The picture under the look of every word, of every layer, and with its sinks marked."""
    from regard.report.contact import figure, heat, page
    from regard.report.patches import over

    by_word = looks.by_word()
    base = shown.resize((256, 256)) if shown.width < 256 else shown
    first = [figure(base, f"the picture as the model gets it: {result['answer']}", 256)]
    words = [
        figure(
            over(base, by_word[n].view(looks.grid)),
            f"{word['word']}: {100 * word['on picture']:.1f} % on the picture",
            160,
        )
        for n, word in enumerate(result["words"])
    ]
    layers = [
        figure(over(base, looks.words[n].mean(0).view(looks.grid)), f"layer {n}", 160)
        for n in sorted(looks.words)
    ]
    sections = {
        "Answer": first,
        "Every word of the question and of the answer, mean over layers and heads": words,
        "Every layer, mean over words": layers,
    }
    marked = []
    for n, one in found.items():
        image = one.image[0].nonzero()[:, 0]
        sinks = one.sinks[0][image].float()[: looks.grid[0] * looks.grid[1]]
        if bool(sinks.any()) and len(sinks) == looks.grid[0] * looks.grid[1]:
            text = f"layer {n}: {int(sinks.sum())} sinks"
            marked.append(figure(over(base, sinks.view(looks.grid)), text, 160))
    if marked:
        sections["Sinks: patches with massive activation"] = marked
    mass = looks.mass()
    table = mass.float()

    size = (max(120, 24 * table.shape[1]), max(120, 12 * table.shape[0]))
    sections["Share of each head on the picture (rows: layers, columns: heads)"] = [
        figure(heat(table, size), f"from {100 * float(table.min()):.0f} % to "
               f"{100 * float(table.max()):.0f} %")
    ]  # fmt: skip
    told = ", ".join(f"{n} {v:.2f}" for n, v in result["rows"].items())
    notes = [
        f"{result['model']} on {result['picture']}: {result['question']}",
        "Each map runs from its own least value to its greatest. Attention says where information "
        "was fetched from, not what was done with it.",
        f"Mean row of the half of the patches that a cut would keep, 0 top to 1 bottom: {told}."
        if told
        else "",
        *result["notes"],
    ]
    return page(result["question"], [n for n in notes if n], sections)
