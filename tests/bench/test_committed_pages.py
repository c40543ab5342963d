"""The pages of committed results are what the results give."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from regard.lab.bench import decode, speech
from regard.lab.bench.record import load
from regard.steer.act import cost as act

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("bench", [act, decode, speech], ids=lambda m: m.__name__.split(".")[-1])
def test_the_committed_page_is_generated(bench: ModuleType) -> None:
    name = bench.__name__.split(".")[-1]
    source = f"benchmarks/results/{name}.json"
    if not (ROOT / source).is_file():
        pytest.skip("benchmarks/ is not here: this is an installed package, not a clone")
    page = (ROOT / "docs" / f"bench-{name}.md").read_text(encoding="utf-8")
    assert page == bench.markdown(load(ROOT / source), source), "run `make docs`"
