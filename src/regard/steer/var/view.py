"""The sinks of every layer, as a table and on the picture."""

from __future__ import annotations

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
            f"The last token of the prompt gives {before:.1f} % of its attention to the first "
            f"picture before, {after:.1f} % after (mean over heads and acting layers)."
        )
    return [table]


def picture(report: dict[str, Any], image: Any) -> Any:
    """The picture, its sinks (the redder, the more layers), and the attention on it."""
    from collections import Counter

    import numpy as np

    from regard.report.contact import sheet
    from regard.report.patches import over, paint

    layers = [row["image_sinks"] for row in report["layers"]]
    count = Counter(s["patch"] for sinks in layers for s in sinks if s["image"] == 0)
    cells = {n: (220, 20, 20, 80 + round(150 * k / len(layers))) for n, k in count.items()}
    size = (report["grid"][0], report["grid"][1])
    plain = paint(image, size, {})
    panels = {
        "what the model sees": plain,
        f"sink patches ({len(count)})": paint(image, size, cells),
    }
    attention = report["attention"].items()
    maps = {n: np.reshape(v[: size[0] * size[1]], size) for n, v in attention}
    top = max(float(m.max()) for m in maps.values())
    panels |= {f"attention {n}": over(plain, m, (0.0, top)) for n, m in maps.items()}
    return sheet([[*panels.values()]], [*panels])
