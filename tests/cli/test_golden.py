"""No command loses an option that people type: what there was is on record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from regard.cli.app import build

GOLDEN = json.loads((Path(__file__).parent / "golden" / "options.json").read_text("utf-8"))
# None stood for a default that the method's own code filled in; now the option says it
FILLED_IN = {
    "run act": ["--alpha"],
    "run recycled-attention": ["--stride", "--threshold"],
    "run refam": ["--magnets"],
    # the same numbers, as a tuple
    "explain": ["--segments"],
    "trial explanation": ["--segments"],
    # older names of --variant and of --ratio, which have the default
    "run var": ["--rule"],
    "run visiondrop": ["--tokens"],
}


def commands() -> dict[str, dict[str, Any]]:
    """Every command with its options: all names of one -> its default."""
    known: dict[str, dict[str, Any]] = {}

    def walk(command: Any, path: tuple[str, ...]) -> None:
        for name, below in getattr(command, "commands", {}).items():
            walk(below, (*path, name))
        if not hasattr(command, "commands"):
            known[" ".join(path)] = {
                name: parameter.default
                for parameter in command.params
                for name in (*parameter.opts, *parameter.secondary_opts)
            }

    walk(typer.main.get_command(build()), ())
    return known


def test_nothing_is_lost() -> None:
    now = commands()
    assert set(GOLDEN) <= set(now)
    lost = [
        f"{command} {name}"
        for command, options in GOLDEN.items()
        for names in options
        for name in names.split()
        if name not in now[command]
    ]
    assert not lost


def test_defaults_stay() -> None:
    now = commands()
    changed = []
    for command, options in GOLDEN.items():
        for names, was in options.items():
            name = names.split()[0]
            default = now[command].get(name)
            same = was["default"] == (None if default is None else str(default))
            if not same and not was["required"] and name not in FILLED_IN.get(command, []):
                changed.append(f"{command} {name}: {was['default']} became {default}")
    assert not changed
