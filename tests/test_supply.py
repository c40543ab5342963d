"""What regard asks for: bounds above known holes, constraints within them, every extra tried."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("packaging")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bounds_lie_above_known_holes_and_constraints_within_them() -> None:
    from packaging.version import Version

    audit = script("audit")
    bounds = {n: Version(v) for n, v in audit.bounds().items()}
    assert bounds["torch"] >= Version("2.10")  # CVE-2026-24747: weights_only of 2.9 can be led out
    assert bounds["pillow"] >= Version("12.2")
    assert audit.unsatisfied() == []
    pins = audit.pinned()
    assert len(pins) > 100 and Version(pins["torch"]) >= bounds["torch"]


def test_every_extra_is_tried() -> None:
    import re

    text = (ROOT / "pyproject.toml").read_text("utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^([\w-]+) = ", table, re.M)) - {"test", "dev", "all"}
    # triton comes with torch, where it can be used
    assert extras - {"triton"} == set(script("extras").USES)
