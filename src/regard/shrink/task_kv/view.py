"""Which key heads kept the whole prompt, as a table."""

from __future__ import annotations

from typing import Any


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer, from `TaskKV.report()`."""
    rows = []
    for row in report["layers"]:
        heads = range(len(row["distances"]))
        marks = " ".join("●" if h in row["full"] else "·" for h in heads)
        apart = " ".join(f"{d:.3f}" for d in row["distances"])
        kept = f"{row['sinks']} + {row['middle']} + {row['recent']}"
        rows.append([str(row["layer"]), marks, apart, kept])
    return [
        {
            "title": "Key heads",
            "columns": ["layer", "full ●", "distance from the mean", "the others keep"],
            "rows": rows,
            "note": "The others keep sinks + middle + recent tokens.",
        }
    ]
