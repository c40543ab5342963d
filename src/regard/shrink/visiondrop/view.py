"""What the cuts left of the pictures, as a table and drawn on the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.report.patches import GONE, Colour


def place(cut: dict[str, Any]) -> str:
    """Where a cut lies, in words."""
    return f"layer {cut['before_layer']}" if cut["before_layer"] else "encoder"


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a cut, from `VisionDrop.report()`."""
    rows = []
    for number, image in enumerate(report["images"], 1):
        for cut in image["cuts"]:
            count, kept = len(cut["tokens"]), cut["dominant"]
            rows.append([number, place(cut), count, kept, count - kept])
    table: dict[str, Any] = {
        "title": "What the cuts left",
        "columns": ["picture", "cut", "tokens", "kept", "merged"],
        "rows": rows,
    }
    if report["mean_tokens"] is not None:
        table["note"] = f"{report['mean_tokens']:.1f} tokens a picture, mean over the layers."
    return [table]


def picture(report: dict[str, Any], views: Sequence[Any], image: Any) -> Any:
    """One panel a cut of the first picture: kept patches as they are, merged ones tinted by their
    token; a row for the whole and one for its tiles or crops, if it has any.
    """
    from regard.parts.vision import panels
    from regard.report.contact import sheet
    from regard.report.patches import outlined, tint

    cuts = report["images"][views[0].image]["cuts"]
    rows, names = [], []
    for _, name, members in panels(views):
        shown = [views[n] for n in members]
        row = [outlined(image, [view.box for view in shown])]
        for n in range(len(cuts)):
            parts = [
                (v.box, (v.rows, v.columns), _cells(report["images"][v.image]["cuts"][n], v))
                for v in shown
            ]
            row.append(tint(image, parts))
        rows.append(row)
        names.append(name)
    columns = [f"{place(cut)}: {len(cut['tokens'])} tokens" for cut in cuts]
    return sheet(rows, ["what the model sees", *columns], names)


def _cells(cut: dict[str, Any], view: Any) -> dict[int, Colour]:
    """The colours of the cells of a view after a cut of the image that it is in."""
    cells: dict[int, Colour] = dict.fromkeys(range(view.cells), GONE)
    for n, patches in enumerate(cut["tokens"]):
        merged = n >= cut["dominant"] or len(patches) > 1
        for patch in patches:
            if merged:
                tint = (97 * (n + 1)) % 200 + 30
                cells[patch - view.first] = (tint, (tint * 3) % 200 + 30, 255 - tint, 150)
            else:
                cells.pop(patch - view.first, None)
    return cells
