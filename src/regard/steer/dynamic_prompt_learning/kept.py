"""Finished steps of learning, kept in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from regard import files
from regard.errors import InputError

PLAN = "plan.json"


class KeptSteps:
    """Finished steps on disk, with the plan that they were made by; those of another are removed.

    Without a folder nothing is kept.
    """

    def __init__(self, path: str | Path | None, plan: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path).expanduser()
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = self.path / PLAN
            try:
                known = json.loads(file.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                known = None
            if known != plan:
                for old in self.path.glob("step-*.safetensors"):
                    old.unlink()
                files.write_text(file, json.dumps(plan, indent=1) + "\n")
        except OSError as problem:
            raise InputError(f"{self.path} cannot be written: {problem.strerror}") from None

    def _file(self, step: int) -> Path:
        assert self.path is not None
        return self.path / f"step-{step:03d}.safetensors"

    def read(self, step: int) -> dict[str, Tensor] | None:
        if self.path is None or not self._file(step).is_file():
            return None
        try:
            return load_file(self._file(step))
        except (SafetensorError, OSError):
            return None  # half a file is no file

    def write(self, step: int, tensors: dict[str, Tensor]) -> None:
        if self.path is not None:
            plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
            files.write_bytes(self._file(step), to_bytes(plain))
