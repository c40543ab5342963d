"""The sinks of the prompt, as a table."""

from __future__ import annotations

from typing import Any


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer, from `ACT.report()`; a sink is named where the tokens are known."""
    rows = []
    for row in report["layers"]:
        named = [
            f"{s['token']!r} at {s['position']} ({s['heads']})"
            if "token" in s
            else f"{s['position']} ({s['heads']})"
            for s in row["sinks"][:4]
        ]
        with_sinks = f"{row['heads_with_sinks']} of {row['heads']}"
        rows.append([row["layer"], with_sinks, len(row["sinks"]), ", ".join(named)])
    columns = ["layer", "heads with sinks", "sinks", "token at position (heads)"]
    return [{"title": "Sinks of the prompt", "columns": columns, "rows": rows}]
