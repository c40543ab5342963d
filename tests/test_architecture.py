"""The arrows between the packages point one way, and importing stays cheap."""

from __future__ import annotations

import ast
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from regard import catalog

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


def folders() -> dict[Path, catalog.Method]:
    return {m.folder: m for m in catalog.everything()}


def test_methods_do_not_import_each_other() -> None:
    """What two need lies in parts/. Claims may compare with the baselines."""
    packages = {m.package: m for m in catalog.everything()}
    names = {f"regard.{m.verb}.{n}": m for m in catalog.everything() for n in m.names}
    sideways = []
    for folder, method in folders().items():
        for path in folder.rglob("*.py"):
            for module in imported(path):
                other = names.get(module) or next(
                    (m for p, m in packages.items() if module == p or module.startswith(p + ".")),
                    None,
                )
                compared = other is not None and other.baseline and path.name in COMPARING
                if other is not None and other.slug != method.slug and not compared:
                    sideways.append(f"{path.relative_to(SOURCE)} imports {module}")
    assert not sideways, f"move what both need into parts: {sideways}"


COMPARING = ("claims.py", "cost.py")


@pytest.mark.parametrize(
    "line",
    ["from regard.see.refam.method import RefAM", "from regard.see import RefAM"],
)
def test_sideways_imports_are_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[__name__]
    act = catalog.method("act")
    target = line.split()[1] + "." + line.split()[3]
    monkeypatch.setattr(module, "folders", lambda: {act.folder: act})
    plain = imported
    monkeypatch.setattr(module, "imported", lambda path: plain(path) | {target})
    with pytest.raises(AssertionError, match=r"imports regard\.see"):
        test_methods_do_not_import_each_other()


# slugs that are words of the language, or of the code, as well
WORDS = {"act", "var", "steer", "random", "pooling"}


def test_a_method_is_named_in_its_own_folder_alone() -> None:
    """Its slug in quotes and its class stand nowhere else in the source."""
    named = []
    for method in catalog.everything():
        quoted = re.compile(rf"""["'`]{re.escape(method.slug)}["'`]|run {method.slug}\b""")
        cls = method.card.method
        word = re.compile(rf"\b{cls}\b") if cls and cls[0].isupper() else None
        for path in SOURCE.rglob("*.py"):
            if method.folder in path.parents:
                continue
            compared = method.baseline and path.name in (*COMPARING, "card.py")
            text = path.read_text(encoding="utf-8")
            hits = [] if method.slug in WORDS else quoted.findall(text)
            hits += word.findall(re.sub(r'f?"VAR [^"]*"', "", text)) if word else []
            if hits and not compared:
                named.append(f"{path.relative_to(SOURCE)} names {method.slug}: {hits[0]}")
    assert not named


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_no_file_is_too_long() -> None:
    long = {str(f.relative_to(ROOT)): n for f in SOURCE.rglob("*.py") if (n := lines(f)) > 600}
    assert not long


def test_a_method_reads_on_a_few_screens() -> None:
    assert (
        statistics.median(
            lines(m.folder / "method.py") for m in catalog.everything() if m.has("method")
        )
        <= 300
    )


@pytest.mark.parametrize("module", ["regard.zoo", "regard.catalog", "regard.errors"])
def test_importing_loads_no_heavy_package(module: str) -> None:
    assert loaded(f"import {module}") == []


@pytest.mark.parametrize("words", ["methods", "models", "--help", "run act --help", "see --help"])
def test_commands_that_only_tell_load_no_model_library(words: str) -> None:
    given = words.split()
    assert (
        loaded(f"from regard.cli import main\ntry: main({given!r})\nexcept SystemExit: pass") == []
    )


def loaded(code: str) -> list[str]:
    """Which heavy packages are there after some code has run in a process of its own."""
    heavy = ("torch", "transformers", "diffusers", "plotly", "gguf")
    code = f"import sys\n{code}\nprint([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "src", capture_output=True, text=True, check=True
    )
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])
