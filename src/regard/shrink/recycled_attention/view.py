"""How many steps read all keys, and what the others had of the attention."""

from __future__ import annotations

from typing import Any


def tables(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One sentence where all layers agree, else a row a layer; from `Recycled.report()`."""
    layers = report["layers"]
    counts = {(row["full_steps"], row["tokens"]) for row in layers}
    rows, said = [], []
    if len(counts) == 1:
        full, tokens = counts.pop()
        said.append(f"Every layer read all keys at {full} of {tokens} tokens.")
    else:
        rows = [[row["layer"], row["full_steps"], row["tokens"]] for row in layers]
    if report["entries_per_token"] is not None:
        read, there = report["entries_per_token"], report["full_entries_per_token"]
        said.append(f"Keys read a token: {read:.0f} of {there:.0f}.")
        if read == there:
            said.append("Every key was read: give a smaller --budget or a longer text.")
    if report["recovered"] is not None:
        means = {
            r["layer"]: sum(r["recovered"]) / len(r["recovered"]) for r in layers if r["recovered"]
        }
        least = min(means, key=lambda layer: means[layer])
        said.append(
            "At a full step the kept keys and the token's own held "
            f"{100 * report['recovered']:.1f} % of the attention, least in layer {least}: "
            f"{100 * means[least]:.1f} %."
        )
    columns = ["layer", "full steps", "of tokens"]
    return [{"title": "Full steps", "columns": columns, "rows": rows, "note": " ".join(said)}]
