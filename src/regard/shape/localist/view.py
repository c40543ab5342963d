"""What the dial did, as tables."""

from __future__ import annotations

from typing import Any

KINDS = {"outside": "question and answer", "inside": "documents"}


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a layer and kind of token, one a rule that fired: of `LocalityDial.report()`."""
    rows = []
    for kind, name in KINDS.items():
        for one in report["layers"][kind]:
            rows.append([name, one["layer"], *_figures(one)])
        if report[kind]["rows"]:
            rows.append([name, "all", *_figures(report[kind])])
    whole = report["outside"]["violations"], report["inside"]["violations"]
    count = sum(sum(v.values()) for v in whole)
    made = [
        {
            "title": "The dial by layer",
            "columns": [
                "tokens", "layer", "leakage", "fidelity", "least head", "entropy, bits",
                "on free tokens", "on the first", "bounds passed",
            ],
            "rows": rows,
            "note": f"C1 to C3 were checked in float32 on every row: {count} violations.",
        }
    ]  # fmt: skip
    if report["fired"]:
        fired = [[f["rule"], f["row"], ranges(f["queries"])] for f in report["fired"]]
        made.append(
            {"title": "Rules that fired", "columns": ["rule", "row", "tokens"], "rows": fired}
        )
    return made


def _figures(one: dict[str, Any]) -> list[str]:
    heads = one.get("fidelity_by_head")
    least = min(heads) if heads else one.get("least_head_fidelity")
    values = [one["leakage"], one["fidelity"], least]
    values += [one["entropy_bits"], one["free_mass"], one["first_token_mass"]]
    shown = ["–" if v is None else f"{v:.4f}" for v in values]
    return [*shown, str(sum(one["violations"].values()))]


def ranges(spans: list[list[int]]) -> str:
    """Ranges of tokens as a person reads them.

    >>> ranges([[0, 1], [20, 24]])
    '0, 20-23'
    """
    return ", ".join(str(a) if b == a + 1 else f"{a}-{b - 1}" for a, b in spans)
