"""Attention sinks by layer, as tables."""

from __future__ import annotations

from typing import Any


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer, from `Sinks.as_dict()`; and the later sinks."""
    epsilon, rows = report["epsilon"], []
    for n, (layer, alpha) in enumerate(zip(report["layers"], report["alpha"])):
        norms = report["probes"]
        rows.append(
            [
                layer,
                f"{sum(a > epsilon for a in alpha)} of {len(alpha)}",
                f"{sum(alpha) / len(alpha):.3f}",
                f"{max(alpha):.3f}",
                f"{norms['massive'][n]:.1f}",
            ]
        )
    columns = ["layer", "heads with the sink", "mean attention", "highest", "norm over the mean"]
    sinks = {
        "title": f"Attention on token {report['position']}",
        "columns": columns,
        "rows": rows,
        "note": f"Sink rate {report['rate']:.3f}: share of heads whose mean attention on the token "
        f"exceeds {epsilon:g}. Uniform attention would give {report['uniform']:.3f}.",
    }
    later = [
        [one["position"], repr(one.get("token", "")), one["heads"], f"{one['alpha']:.3f}"]
        for one in report["hidden"][:8]
    ]
    columns = ["position", "token", "heads", "highest"]
    return [sinks, {"title": "Later sinks", "columns": columns, "rows": later}]
