"""The pages of the benches that `regard bench act`, `decode`, `speech` and `facts` run, from their
committed results: `python -m regard.lab.bench.pages`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from regard.files import write_text

from .record import load

RESULTS = {"act": "act", "decode": "decode", "speech": "speech", "facts-h100": "facts"}
"""Committed results, and the modules that measured them."""


def page(bench: str, source: str | Path, target: str | Path) -> Path:
    """Write the Markdown page of a saved result of `regard.lab.bench.<bench>`."""
    markdown = import_module(f"regard.lab.bench.{bench}").markdown
    write_text(Path(target), markdown(load(source), Path(source).as_posix()))
    return Path(target)


if __name__ == "__main__":
    for name, bench in RESULTS.items():
        page(bench, f"benchmarks/results/{name}.json", f"docs/bench-{name}.md")
