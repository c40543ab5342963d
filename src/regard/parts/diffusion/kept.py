"""Tensors that are kept while they are learnt, with the plan that they were made by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from regard import files


def read(file: Path | None, plan: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is missing, damaged, or made by another plan."""
    if file is None or not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as held:
            if (held.metadata() or {}).get("plan") != plan:
                return None
            return {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        return None


def write(file: Path | None, tensors: Mapping[str, Tensor], plan: str) -> None:
    """Write tensors whole or not at all; nothing where no file is named."""
    if file is not None:
        plain = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        files.write_bytes(file, save(plain, {"plan": plan}))
