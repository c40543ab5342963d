"""The rhythm of an answer, as a table."""

from __future__ import annotations

from typing import Any


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a token with a mark, from `Rhythm.as_dict()`."""
    marks = {n: set(report[n]) for n in ("preplan", "anchor", "receiver_peaks")}
    words = report.get("pieces", report["tokens"])
    rows = []
    for n in sorted(set().union(*marks.values())):
        names = [name.removesuffix("_peaks") for name, at in marks.items() if n in at]
        facts = [f"{report[key][n]:.3f}" for key in ("waad", "fai", "receiver", "entropy")]
        rows.append([n, words[n], ", ".join(names), *facts])
    heads = {n: len(report[n]) for n in ("local", "global", "receivers")}
    sinks = {n: f"{100 * share:.0f} %" for n, share in report["sink_mass"].items()}
    return [
        {
            "title": "Preplan and anchor tokens of the answer",
            "columns": ["token", "text", "mark", "WAAD", "FAI", "receivers", "entropy"],
            "rows": rows,
            "note": f"{heads['local']} local and {heads['global']} global heads, "
            f"{heads['receivers']} receivers; on token 0 falls {sinks['local']} of the attention "
            f"of the local and {sinks['global']} of the global heads.",
        }
    ]
