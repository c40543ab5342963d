"""The sinks of every layer, as a table and on the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer, from `VAR.report()`."""
    rows = [
        [
            row["layer"],
            len(row["text_sinks"]),
            len(row["image_sinks"]),
            f"{row['rows_changed']} of {row['rows']}",
            f"{100 * row['moved']:.1f} %",
        ]
        for row in report["layers"]
    ]
    columns = ["layer", "text sinks", "image sinks", "rows changed", "attention moved"]
    table: dict[str, Any] = {"title": "Sinks", "columns": columns, "rows": rows}
    if "attention" in report:
        before, after = (100 * sum(report["attention"][n]) for n in ("before", "after"))
        table["note"] = (
            f"The last token of the prompt gives {before:.1f} % of its attention to the "
            f"pictures before, {after:.1f} % after (mean over heads and acting layers)."
        )
    return [table]


def picture(report: dict[str, Any], views: Sequence[Any], image: Any) -> Any:
    """The first picture, its sinks (the redder, the more layers), and the attention on it: a row
    for the whole and one for its tiles or crops, if it has any.
    """
    from collections import Counter

    import numpy as np

    from regard.parts.vision import panels
    from regard.report.contact import sheet
    from regard.report.patches import outlined, spread, tint

    layers = [row["image_sinks"] for row in report["layers"]]
    count = Counter((s["image"], s["patch"]) for sinks in layers for s in sinks)
    starts = np.cumsum([0, *(view.cells for view in views)])
    rows, names = [], []
    for _, name, members in panels(views):
        marks, number = [], 0
        for view in (views[n] for n in members):
            cells = {
                patch - view.first: (220, 20, 20, 80 + round(150 * k / len(layers)))
                for (stretch, patch), k in count.items()
                if stretch == view.image and 0 <= patch - view.first < view.cells
            }
            marks.append((view.box, (view.rows, view.columns), cells))
            number += len(cells)
        row = [outlined(image, [views[n].box for n in members]), tint(image, marks)]
        maps = {}
        for kind, given in report["attention"].items():
            maps[kind] = [
                (views[n].box, np.reshape(given[starts[n] : starts[n + 1]],
                                          (views[n].rows, views[n].columns)))
                for n in members
            ]  # fmt: skip
        top = max(float(values.max()) for parts in maps.values() for _, values in parts)
        rows.append(row + [spread(image, parts, (0.0, top)) for parts in maps.values()])
        names.append(f"{name}, {number} sinks")
    columns = ["what the model sees", "sink patches", *(f"attention {n}" for n in maps)]
    return sheet(rows, columns, names)
