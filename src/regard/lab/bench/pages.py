"""The pages of the benches of decoding, speech, facts and single methods, from their committed
results: `python -m regard.lab.bench.pages`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from regard import catalog
from regard.files import write_text

from .record import load

COSTS: dict[str, ModuleType] = {
    m.slug: cost
    for m in catalog.methods()
    if m.has("cost") and hasattr(cost := m.load("cost"), "markdown")
}
RESULTS = {**{n: n for n in COSTS}, "decode": "decode", "speech": "speech", "facts-h100": "facts"}
"""Committed results, and the benches that measured them."""


def page(bench: str, source: str | Path, target: str | Path) -> Path:
    """Write the Markdown page of a saved result of `regard bench <bench>`."""
    module = COSTS.get(bench) or import_module(f"regard.lab.bench.{bench}")
    write_text(Path(target), module.markdown(load(source), Path(source).as_posix()))
    return Path(target)


if __name__ == "__main__":
    for name, bench in RESULTS.items():
        page(bench, f"benchmarks/results/{name}.json", f"docs/bench-{name}.md")
