"""Whatever is typed wrongly gets one clear message that names it, and nothing is left behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from regard.errors import InputError
from regard.zoo import Loading
from regard.zoo.train import loop

from . import bad_inputs
from .bad_inputs import LOADED, Attempt, attempts, fault, tried

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bounds memory as Linux does")
EVERY = list(attempts())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, with one application for all commands and no model behind it."""
    from regard.cli import app

    def asked(*_: Any) -> Any:
        raise InputError(LOADED)

    ready = typer.main.get_command(app.build())  # once: it takes longer than most commands
    monkeypatch.setattr(app, "build", lambda words=None: ready)
    monkeypatch.setattr(Loading, "load", asked)
    monkeypatch.setattr(Loading, "pipeline", asked)
    monkeypatch.setattr(loop, "Clock", asked)  # of a training
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    bad_inputs.files(tmp_path)
    return tmp_path


def refused(some: list[Attempt], place: Path) -> None:
    wrong = [f"{one}: {said}" for one in some if (said := fault(one, tried(one.words, place)))]
    assert not wrong, "\n".join([f"{len(wrong)} of {len(some)}", *wrong])


def test_every_command_and_option_is_tried() -> None:
    assert len(EVERY) >= 300
    tried_with = {(a.command, a.names) for a in EVERY}
    for command, parameters in bad_inputs.commands().items():
        for one in parameters:
            if bad_inputs.kind_of(one) is not bool:
                assert any(c == command and one.name in n for c, n in tried_with), one.name


def test_a_sample_is_refused(place: Path) -> None:
    refused(EVERY[::97], place)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted(bad_inputs.commands()))
def test_bad_inputs_are_refused(command: str, place: Path) -> None:
    refused([a for a in EVERY if a.command == command], place)
