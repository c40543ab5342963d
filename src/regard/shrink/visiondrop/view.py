"""What the cuts left of the pictures, as a table and drawn on the first of them."""

from __future__ import annotations

from typing import Any


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


def picture(report: dict[str, Any], image: Any) -> Any:
    """One panel a cut: kept patches as they are, merged ones tinted by their token."""
    from regard.report.contact import sheet
    from regard.report.patches import GONE, Colour, paint

    first = report["images"][0]
    size = (first["grid"][0], first["grid"][1])
    panels = {"what the model sees": paint(image, size, {})}
    for cut in first["cuts"]:
        cells: dict[int, Colour] = dict.fromkeys(range(size[0] * size[1]), GONE)
        for n, patches in enumerate(cut["tokens"]):
            merged = n >= cut["dominant"] or len(patches) > 1
            for patch in patches:
                if merged:
                    tint = (97 * (n + 1)) % 200 + 30
                    cells[patch] = (tint, (tint * 3) % 200 + 30, 255 - tint, 150)
                else:
                    cells.pop(patch, None)
        panels[f"{place(cut)}: {len(cut['tokens'])} tokens"] = paint(image, size, cells)
    return sheet([[*panels.values()]], [*panels])
