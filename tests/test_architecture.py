"""The arrows between the packages point one way, and importing stays cheap."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from regard.catalog import methods

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "regard"


def test_import_contracts_hold(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("importlinter", reason="import-linter is part of the extra 'test'")
    from importlinter.cli import lint_imports

    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
    shown = capfd.readouterr()
    assert code == 0, shown.out + shown.err


def test_a_turned_arrow_is_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The contracts can fail: core importing the zoo, at any depth, breaks one of them."""
    pytest.importorskip("importlinter", reason="import-linter is part of the extra 'test'")
    copy = tmp_path / "src" / "regard"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__", "texts"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (copy / "core").mkdir(exist_ok=True)
    (copy / "core" / "turned.py").write_text("def f():\n    from regard.zoo import load\n")
    (copy / "core" / "__init__.py").touch()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path.insert(0, 'src'); from importlinter.cli import lint_imports;"
            "sys.exit(lint_imports(config_filename='pyproject.toml', no_cache=True))",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "regard.core.turned" in done.stdout


def imported(path: Path) -> set[str]:
    """Return the modules of regard that a file names in its import statements."""
    package = path.relative_to(SOURCE.parent).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def test_methods_do_not_import_each_other() -> None:
    modules = {m.module for m in methods()}
    sideways = []
    for module in modules:
        start = SOURCE.parent / Path(*module.split("."))
        for path in [start.with_suffix(".py"), *start.rglob("*.py")]:
            if path.is_file():
                others = imported(path) & (modules - {module})
                sideways += [f"{module} imports {other}" for other in others]
    assert not sideways, f"move what both need down into core or reach: {sideways}"


@pytest.mark.parametrize(
    "line",
    ["from regard.see import refam", "from .refam import x", "from . import refam"],
)
def test_sideways_imports_are_found(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", tmp_path / "regard")
    (tmp_path / "regard" / "see").mkdir(parents=True)
    (tmp_path / "regard" / "see" / "sink_emergence.py").write_text(line + "\n")
    with pytest.raises(AssertionError, match="sink_emergence imports regard"):
        test_methods_do_not_import_each_other()


def test_no_file_is_too_long() -> None:
    long = {
        str(file.relative_to(ROOT)): lines
        for file in SOURCE.rglob("*.py")
        if (lines := len(file.read_text(encoding="utf-8").splitlines())) > 650
    }
    assert not long


@pytest.mark.parametrize("module", ["regard.zoo", "regard.catalog", "regard.errors"])
def test_importing_loads_no_heavy_package(module: str) -> None:
    heavy = ("transformers", "diffusers", "plotly", "gguf")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
