"""Samples on disk: beside the output while they are made, so that a stopped run goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from regard.files import beside, write_text


class KeptSamples:
    """The samples of one run; of an interrupted run of the same settings, its whole batches.

    Args:
        out: JSON lines in the end; None keeps nothing.
        settings: what the run is made of, with "batch" and "count".
    """

    def __init__(self, out: Path | None, settings: dict[str, Any]) -> None:
        self.out, self.settings = out, settings
        self.part = None if out is None else beside(out, ".partial")
        self.rows = self._found()

    def _found(self) -> list[dict[str, Any]]:
        if self.part is None or not self.part.is_file():
            return []
        try:
            lines = self.part.read_text("utf-8").split("\n")  # samples may hold other line breaks
            first, *rows = [json.loads(line) for line in lines if line]
        except ValueError:
            return []
        if first != self.settings:
            return []
        return rows[: len(rows) - len(rows) % self.settings["batch"]]

    def add(self, row: dict[str, Any]) -> None:
        """One more sample; written after every batch."""
        self.rows.append(row)
        many, last = len(self.rows), len(self.rows) == self.settings["count"]
        if self.part is not None and (many % self.settings["batch"] == 0 or last):
            write_text(self.part, _lines([self.settings, *self.rows]))

    def finish(self) -> None:
        """Write the output, and remove what was kept beside it."""
        if self.out is not None and self.part is not None:
            write_text(self.out, _lines(self.rows))
            self.part.unlink(missing_ok=True)


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
