"""The picture of what is measured on speech: heads, deletion, and one sentence to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from regard.report.chart import PANEL, Line, Panel, chart, ticks
from regard.report.grid import EDGE, SIDE, grid, stacked

Rows = Sequence[Mapping[str, Any]]

ARMS = {
    "saliency": "saliency, every cell",
    "pooled": "saliency, attention's grid",
    "attention": "attention",
    "random steps": "chance, by time",
    "random cells": "chance, by cell",
}


def speech_sheet(found: Mapping[str, Rows], example: Mapping[str, Any]) -> tuple[Any, str]:
    """The picture and what it shows.

    Args:
        found: for each model what was measured of every sentence, as `Explanation.as_dict` has it.
        example: of one sentence `pieces`, `spectrogram` and `maps` as `overview` has them, the
            `words` with their true times, the `spans` of these in steps, and the `model`.
    """
    count = len(next(iter(found.values())))
    sheet = stacked([_heads(found), [_deletion(found)], [_sound(example)], _maps(example)])
    return sheet, (
        f"Top: correlation of each head's cross attention with the saliency of the sound, mean "
        f"over {count} sentences; all: the heads of a layer averaged. Middle: share of the pieces "
        "that the model no longer says next when the highest-ranked part of the sound is taken "
        f"out, mean over {count} sentences. Bottom: one sentence as {example['model']} hears it; "
        "orange: the true place of each word; darker is more, from the least to the most of a row."
    )


def _heads(found: Mapping[str, Rows]) -> list[Any]:
    """Layer by head for each model, all in one scale of colours."""
    tables = {n: _table([row["input"]["pearson"] for row in rows]) for n, rows in found.items()}
    span = (0.0, max(v for table in tables.values() for row in table for v in row))
    made = []
    for name, table in tables.items():
        heads = len(table[0]) - 1
        below = [(n + 0.5, f"head {n}" if n == 0 else str(n)) for n in range(heads)]
        whole = fmean(row["input"]["pearson"]["all"] or 0.0 for row in found[name])
        made.append(
            grid(
                table,
                (PANEL[0], 90 + 60 * len(table)),
                title=f"{name}: agreement with saliency (all heads {whole:.2f})",
                rows=[f"layer {n}" for n in range(len(table))],
                below=[*below, (heads + 0.5, "all")],
                span=span,
                numbers=True,
            )
        )
    return made


def _table(found: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Mean correlation of every head, and of each layer's heads averaged in the last column; a
    constant map explains nothing.
    """
    return [
        [fmean(one["heads"][n][h] or 0.0 for one in found) for h in range(len(layer))]
        + [fmean(one["layers"][n] or 0.0 for one in found)]
        for n, layer in enumerate(found[0]["heads"])
    ]


def _deletion(found: Mapping[str, Rows]) -> Any:
    def line(arm: str, rows: Rows) -> Line:
        curves = [row["deletion"]["errors"][arm] for row in rows]
        means = [fmean(points) for points in zip(*curves)]
        return Line(ARMS[arm], list(zip(rows[0]["deletion"]["percent"], means)))

    return chart(
        [
            Panel("sound taken out (%)", f"{name}: pieces lost (%)", [line(a, rows) for a in ARMS])
            for name, rows in found.items()
        ]
    )


def _sound(example: Mapping[str, Any]) -> Any:
    """The spectrogram, low pitches at the bottom, with the true words."""
    rows = example["spectrogram"][::-1]
    stride = round(len(rows[0]) / len(example["maps"]["attention"][0]))
    per_second = stride / example["seconds_per_step"]
    words = [(w, a * per_second, b * per_second) for w, a, b in example["words"]]
    return grid(
        rows,
        (2 * PANEL[0], 330),
        title="sound (log-mel spectrogram)",
        rows=[""] * len(rows),
        above=[((a + b) / 2, word) for word, a, b in words],
        frames=[(a, 0, min(b, len(rows[0])), len(rows)) for _, a, b in words],
    )


def _maps(example: Mapping[str, Any]) -> list[Any]:
    """Attention and both saliencies, piece by time, with the true place of each piece's word."""
    pieces, step = [p.strip() or "␣" for p in example["pieces"]], example["seconds_per_step"]
    frames = [(span[0], n, span[1], n + 1) for n, span in enumerate(example["spans"] or []) if span]
    made, wide = [], (2 * PANEL[0] - SIDE - 5 * EDGE) // 3
    for n, (name, cells) in enumerate(example["maps"].items()):
        marks = ticks(0, step * len(cells[0]), 4)
        made.append(
            grid(
                cells,
                (wide + EDGE + (EDGE if n else SIDE), 100 + 40 * len(cells)),
                title=name.replace("’", "'"),
                rows=[] if n else pieces,
                below=[(t / step, f"{t:g} s") for t in marks],
                frames=frames,
            )
        )
    return made
