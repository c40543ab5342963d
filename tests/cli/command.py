"""The command line, run inside the test's own process."""

from __future__ import annotations

from typing import Any

import pytest

from regard.cli import main
from regard.zoo import Loading

from ..models import Words, deep


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; a traceback is never what a person should see."""
    try:
        main(list(args))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def stand_in(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """Whatever model is named, a tiny one that never stops by itself is loaded."""

    def load(self: Any, name: str) -> tuple[Any, Words]:
        model = deep(layers, steep=60)
        model.generation_config.eos_token_id = None
        return model, Words()

    monkeypatch.setattr(Loading, "load", load)
