"""regard see on a picture: what the words of a question and of its answer look at."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regard import catalog
from regard.cli.common import Loading, err, working, write_json
from regard.cli.pages import check_places
from regard.cli.pictures import ask, load_vlm, placed, small
from regard.errors import InputError
from regard.zoo.frames import read_frames

DEFAULT = "shapes-vlm"


def see(
    given: str, question: str | None, model: str, loading: Loading, *, html: Path | None,
    json: Path | None, tokens: int = 24,
) -> None:  # fmt: skip
    """Answer the question about the picture, or about all of a folder or video, and show where each
    word looked.

    Raises:
        InputError: no question, a file that is no picture, a model that reads none, an output that
            cannot be written.
    """
    check_places(json, html)
    if question is None or not question.strip():
        raise InputError('ask something about the picture: regard see photo.png "what is this?"')
    named, note = read_frames(given)
    names, pictures = [name for name, _ in named], [picture for _, picture in named]
    loaded, processor = load_vlm(model, loading)
    inputs = ask(loaded, processor, pictures, question, tokens)
    views = placed(loaded, processor, inputs, pictures).views[0]
    result, looks, sinks = _look(loaded, processor, inputs, views, tokens)
    if not views:
        result["notes"].append(
            f"how {type(loaded).__name__} lays its patches out is not known, so there is no map: "
            "shares of attention on the picture are exact"
        )
    elif any(view.box is None for view in views):
        result["notes"].append(
            "where some crops lie on the picture is not known, so they are not drawn"
        )
    if note:
        result["notes"].append(note)
    result |= {
        "pictures": names,
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

        shown = [small(picture) for picture in pictures]
        write_text(html, _page(result, looks, views, sinks, shown))
        err().print(f"report: {html}", markup=False, highlight=False)


def _look(
    loaded: Any, processor: Any, inputs: Any, views: list[Any], tokens: int
) -> tuple[dict[str, Any], Any, Any]:
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
        words.append(
            {
                "word": name,
                "generated": n >= asked,
                "on picture": round(float(by_word[n].sum()), 5),
                **_peak(int(by_word[n].argmax()), views),
                "map": [float(f"{v:.4g}") for v in by_word[n].tolist()],
            }
        )
    mass = looks.mass()
    best = divmod(int(mass.argmax()), mass.shape[1])
    found = {} if sinks is None else sinks.found()
    image = {n: f.sinks[0][looks.places] for n, f in found.items()}
    result = {
        "answer": processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "grid": list(looks.grid) if looks.grid else None,
        "views": [asdict(view) for view in views],
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


def _peak(place: int, views: list[Any]) -> dict[str, Any]:
    """The view, row and column of a patch."""
    for n, view in enumerate(views):
        if place < view.cells:
            return {"view": n, "peak": list(divmod(place, view.columns))}
        place -= view.cells
    return {}


def _where(word: dict[str, Any], result: dict[str, Any]) -> str:
    """The same in words; the row and the column alone where there is one view."""
    if "peak" not in word:
        return ""
    view, place = result["views"][word["view"]], "{}, {}".format(*word["peak"])
    many = result["pictures"][view["picture"]] if len(result["pictures"]) > 1 else ""
    part = view["name"] if len(result["views"]) > len(result["pictures"]) else ""
    return ": ".join(filter(None, [", ".join(filter(None, [many, part])), place]))


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
            _where(word, result),
        ]
        for word in result["words"]
    ]
    shares = right("share on the picture", "{:.1%}".format)
    table = Table(["word", shares, "looks most at (row, column)"], rows)
    best = result["most on the picture"]
    if not result["views"]:
        table = Table(["word", shares], [row[:2] for row in rows])
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


def _page(
    result: dict[str, Any], looks: Any, views: list[Any], found: dict[int, Any], shown: list[Any]
) -> str:
    """The pictures under the look of every word, of every layer, and with their sinks marked."""
    from regard.parts.vision import panels
    from regard.report.contact import figure, heat, page
    from regard.report.patches import outlined, spread

    starts = [sum(view.cells for view in views[:n]) for n in range(len(views))]
    drawn = panels([view for view in views if view.box is not None])
    known = [n for n, view in enumerate(views) if view.box is not None]
    drawn = [(picture, name, [known[n] for n in members]) for picture, name, members in drawn]

    def named(picture: int, name: str) -> str:
        many = result["pictures"][picture] if len(shown) > 1 else ""
        part = name if len(drawn) > len(shown) else ""
        return ", ".join(filter(None, [many, part]))

    def maps(values: Any, text: str) -> list[Any]:
        figures = []
        for picture, name, members in drawn:
            parts = []
            for n in members:
                view, start = views[n], starts[n]
                cells = values[start : start + view.cells].view(view.rows, view.columns)
                parts.append((view.box, cells))
            caption = ": ".join(filter(None, [text, named(picture, name)]))
            figures.append(figure(spread(shown[picture], parts), caption, 160))
        return figures

    first = [
        figure(
            outlined(shown[picture], [views[n].box for n in members]),
            ": ".join(filter(None, [named(picture, name), _grids([views[n] for n in members])])),
            256,
        )
        for picture, name, members in drawn
    ] or [figure(picture, name, 256) for picture, name in zip(shown, result["pictures"])]
    by_word = looks.by_word()
    words = [
        one
        for n, word in enumerate(result["words"])
        for one in maps(
            by_word[n], f"{word['word']}: {100 * word['on picture']:.1f} % on the picture"
        )
    ]
    layers = [one for n in sorted(looks.words)
              for one in maps(looks.words[n].mean(0), f"layer {n}")]  # fmt: skip
    sections = {
        f"Answer: {result['answer']}": first,
        "Every word of the question and of the answer, mean over layers and heads": words,
        "Every layer, mean over words": layers,
    }
    marked = []
    for n, one in found.items():
        sinks = one.sinks[0][looks.places].float()
        if bool(sinks.any()):
            marked += maps(sinks, f"layer {n}: {int(sinks.sum())} sinks")
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
        "Lines show what the model saw of the picture: the whole, a crop, or tiles; grey is what "
        "it did not see.",
        *result["notes"],
    ]
    sections = {heading: figures for heading, figures in sections.items() if figures}
    return page(result["question"], [n for n in notes if n], sections)


def _grids(views: list[Any]) -> str:
    """What the model saw, in words: the tiles and their patches."""
    size = f"{views[0].rows} x {views[0].columns} patches"
    return f"{len(views)} parts of {size}" if len(views) > 1 else size
