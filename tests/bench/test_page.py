"""Page, plot and verdicts come from the numbers of the result, and change with them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from regard.lab.bench import page, verdicts
from regard.lab.bench.record import Cell, Result, load
from regard.lab.bench.verdicts import GIB, MIB, TARGETS, exponent, fits, judge

LENGTHS = (1024, 2048, 4096, 8192)


def forward(n: int, route: str, growth: float, ratio: float | None, **more: Any) -> Cell:
    values: dict[str, Any] = {"growth": int(growth), "total": int(GIB + growth)} | more
    if ratio is not None:
        values["pairs"] = [[1.0, ratio]]
        values["ratio"] = {"median": ratio, "low": ratio * 0.9, "high": ratio * 1.1}
    return Cell({"route": route, "tokens": n}, values=values)


@pytest.fixture
def result() -> Result:
    """A made-up run in which every target is met."""
    cells: dict[str, Cell] = {}
    for n in LENGTHS:
        cells[f"{n}/all/plain"] = forward(n, "plain", 0.1 * n * MIB, None)
        cells[f"{n}/all/received + entropy"] = forward(n, "watch", 0.11 * n * MIB, 1.3)
        matrix = 0.1 * n * MIB + 30 * n * n
        cells[f"{n}/all/eager"] = forward(n, "eager", matrix, 4.2)
        cells[f"{n}/all/nnsight"] = forward(n, "peer", matrix, 4.0, peer_version="0.8")
        cells[f"{n}/all/nnsight"].settings["peer"] = "nnsight"
        one = [0.01] * 5
        cells[f"{n}/kernel"] = Cell(
            {"tokens": n}, values={"seconds": {"sdpa": one, "attend + received": [0.02] * 5}}
        )
    for n in (*LENGTHS[1:], 16384):
        cells[f"{n}/last/plain"] = forward(n, "plain", 0.05 * n * MIB, None)
        cells[f"{n}/last/received + entropy"] = forward(n, "watch", 0.06 * n * MIB, 1.4)
    shape = {"layers": 30, "heads": 9, "kv_heads": 3, "positions": 8192, "text": True}
    settings = {
        "model": "<b>m|n",
        "repeats": 3,
        "seed": 0,
        "dtype": "float32",
        "memory_limit": 8 * GIB,
        "shape": shape,
    }
    return Result("see", settings, {"cpu": "x & y"}, [dict(t) for t in TARGETS], cells)


def verdict(result: Result, name: str) -> str:
    return str(next(v["verdict"] for v in judge(result) if v["name"] == name))


def test_all_met(result: Result) -> None:
    assert {v["name"]: v["verdict"] for v in judge(result)} == dict.fromkeys(
        ("kernel", "forward", "eager", "linear", "16k"), "met"
    )


def test_each_verdict_can_turn(result: Result) -> None:
    watched = "received + entropy"
    result.cells["8192/kernel"].values["seconds"]["attend + received"] = [0.023] * 5
    assert verdict(result, "kernel") == "missed"
    result.cells[f"4096/all/{watched}"].values["ratio"]["median"] = 1.51
    assert verdict(result, "forward") == "missed"
    assert verdict(result, "eager") == "missed"
    for n in (2048, 4096, 8192, 16384):
        result.cells[f"{n}/last/{watched}"].values["growth"] = 0.05 * n * MIB + 4 * n * n
    assert verdict(result, "linear") == "missed"
    result.cells[f"16384/last/{watched}"].values["total"] = 6 * GIB
    assert verdict(result, "16k") == "missed"


def test_nothing_measured_is_not_a_verdict(result: Result) -> None:
    result.cells.clear()
    assert {v["verdict"] for v in judge(result)} == {"not measured"}


def test_a_difference_lost_in_noise_is_linear(result: Result) -> None:
    for n in (2048, 4096, 8192, 16384):
        plain = result.cells[f"{n}/last/plain"].values["growth"]
        result.cells[f"{n}/last/received + entropy"].values["growth"] = plain - 3 * MIB
    assert verdict(result, "linear") == "met"


def test_where_maps_do_not_fit_the_lean_route_decides(result: Result) -> None:
    result.cells["4096/all/eager"] = Cell({"route": "eager"}, "out of memory", "needs 20 GiB")
    assert verdict(result, "eager") == "not measured"
    result.cells["4096/all/eager, layer by layer"] = forward(4096, "eager_lean", 1, 2.0)
    found = next(v for v in judge(result) if v["name"] == "eager")
    assert found["verdict"] == "missed" and "1.5 times faster" in found["measured"]


def test_what_fits_is_measured_or_named_extrapolated(result: Result) -> None:
    plain = fits(result, "plain")
    assert plain is not None
    assert plain["measured"] == 8192 and not plain["bounded"]
    assert plain["extrapolated"] == pytest.approx(7 * 1024 / 0.1, rel=1e-3)  # a straight line
    eager = fits(result, "eager")
    assert eager is not None
    n = eager["extrapolated"]
    assert 0.1 * n * MIB + 30 * n * n == pytest.approx(7 * GIB, rel=1e-3)
    assert fits(result, "no such row") is None


def test_exponent() -> None:
    assert exponent([(1, 2.0), (2, 4.0), (8, 16.0)]) == pytest.approx(1.0)
    assert exponent([(1, 2.0)]) is None and exponent([(1, 2.0), (2, -1.0)]) is None


def test_page_and_plot(result: Result, tmp_path: Path) -> None:
    result.cells["8192/all/eager"] = Cell({"route": "eager"}, "out of memory", "needs 70 GiB <i>")
    made = page.page(result, tmp_path / "docs" / "p.md", tmp_path / "docs" / "img" / "p.svg")
    text = made.read_text(encoding="utf-8")
    assert "](img/p.svg)" in text
    assert "&lt;b>m|n" in text and "<b>" not in text and "<i>" not in text
    assert "1.30 (1.17 to 1.43)" in text
    assert "no memory" in text and "at 8k: out of memory. needs 70 GiB" in text
    assert "trained for 8192 positions" in text
    assert "nnsight 0.8" in text and "| met |" in text
    assert "seconds" not in text.lower().replace("seconds stand in the json only", "")
    for line in text.splitlines():  # every table row has the columns of its head
        if line.startswith("| ") and "\\|" not in line:
            assert line.endswith(" |")
    drawing = ElementTree.parse(tmp_path / "docs" / "img" / "p.svg").getroot()
    assert drawing.tag.endswith("svg")
    names = {e.text for e in drawing.iter() if e.tag.endswith("text")}
    assert {"received + entropy", "output_attentions=True", "nnsight", "4k"} <= names
    assert sorted(f.name for f in (tmp_path / "docs").rglob("*.*")) == ["p.md", "p.svg"]


def test_page_follows_the_numbers(result: Result) -> None:
    before = page.markdown(result, "p.svg", "r.json")
    drawing = page.chart(result).svg()
    result.cells["4096/all/received + entropy"].values["ratio"]["median"] = 7.77
    assert "7.77" in page.markdown(result, "p.svg", "r.json") and "7.77" not in before
    assert page.chart(result).svg() != drawing


def test_an_empty_result_has_a_page(result: Result) -> None:
    result.cells.clear()
    assert "not measured" in page.markdown(result, "p.svg", "r.json")
    assert "nothing was measured" in page.chart(result).svg()


def test_table_in_the_terminal(result: Result, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    result.cells["8192/all/eager"] = Cell({"route": "eager"}, "failed", "odd [red]reason[/red]")
    Console(width=160).print(page.table(result))
    shown = capsys.readouterr().out
    assert "1.30 (1.17 to 1.43)" in shown and "[red]reason" in shown and "  met" in shown


COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "see.json"


@pytest.mark.skipif(not COMMITTED.is_file(), reason="no committed result")
def test_the_committed_page_is_what_the_committed_result_gives() -> None:
    root = COMMITTED.parents[2]
    result = load(COMMITTED)
    text = page.markdown(result, "img/bench-see.svg", "benchmarks/results/see.json")
    assert (root / "docs" / "bench-see.md").read_text(encoding="utf-8") == text
    drawn = (root / "docs" / "img" / "bench-see.svg").read_text(encoding="utf-8")
    assert drawn == page.chart(result).svg()
    assert [t["name"] for t in result.targets] == [t["name"] for t in verdicts.TARGETS]
