"""What a fingerprint notices, and what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from regard import catalog
from regard.lab import fingerprint as module
from regard.lab.fingerprint import fingerprint, sources

FILES = {
    "__init__": "",
    "shrink/__init__": "",
    "shrink/own/__init__": "",
    "shrink/own/card": "CARD = dict(does='words')\nratio = setting(0.5, 'help', least=0)",
    "shrink/own/method": "from .card import ratio\nfrom regard.parts import kept",
    "parts/__init__": "",
    "parts/kept": "def keep(x):\n    from regard.core.sums import total\n    return total(x)",
    "core/__init__": "",
    "core/sums": '"""Sums."""\n\ndef total(x):\n    if not x:\n        '
    'raise ValueError("nothing")\n    return sum(x)\n',
    "core/other": "x = 1",
    "report/__init__": "",
    "report/table": "x = 1",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package of this name, in place of the true one."""
    for name, text in FILES.items():
        path = tmp_path / "regard" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "regard")
    return tmp_path / "regard"


def mark() -> str:
    module._read.cache_clear()
    return fingerprint("regard.shrink.own.method")


def change(package: Path, name: str, old: str, new: str) -> None:
    path = package / f"{name}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("shrink/own/method", "kept", "kept as others"),
        ("shrink/own/card", "0.5", "0.4"),
        ("shrink/own/card", "least=0", "least=1"),
        ("parts/kept", "return total(x)", "return total(x) + 1"),
        ("core/sums", "sum(x)", "max(x)"),  # two imports away, within a function
    ],
)
def test_a_change_that_counts(package: Path, name: str, old: str, new: str) -> None:
    before = mark()
    change(package, name, old, new)
    assert mark() != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("core/sums", "def total", "# a comment\n\ndef total"),
        ("core/sums", "Sums.", "All sums."),
        ("core/sums", "def total(x):\n", "def total(x):\n    'The total.'\n"),
        ("core/sums", "return sum(x)", "return (\n        sum(x)\n    )"),
        ("core/sums", '"nothing"', '"there is nothing to sum"'),
        ("shrink/own/card", "words", "other words"),
        ("shrink/own/card", "help", "better help"),
        ("core/other", "1", "2"),
        ("report/table", "1", "2"),
    ],
)
def test_a_change_that_does_not(package: Path, name: str, old: str, new: str) -> None:
    change(package, "parts/kept", "def keep", "from regard.report import table\n\ndef keep")
    before = mark()
    change(package, name, old, new)
    assert mark() == before


def test_data_counts() -> None:
    assert fingerprint("regard.core.state", data=["a"]) != fingerprint("regard.core.state", data=[])


@pytest.mark.parametrize("method", [m for m in catalog.methods() if m.has("claims")])
def test_claims_are_followed_to_their_method(method: catalog.Method) -> None:
    used = sources([f"{method.package}.claims"])
    if method.has("method"):
        assert f"{method.package}.method" in used
    assert "regard.lab.reproduce.harness" in used
    assert not any(n.startswith(("regard.report", "regard.cli", "regard.catalog")) for n in used)


def test_helpers_are_followed() -> None:
    used = sources(["regard.steer.act.claims", "regard.shrink.snapkv.method"])
    assert {"regard.steer.act.heads", "regard.parts.decoding.kept"} <= set(used)
    used = sources(["regard.lab.bench.see", "regard.lab.bench.worker"])
    assert {"regard.watching.session", "regard.lab.bench.peers"} <= set(used)
