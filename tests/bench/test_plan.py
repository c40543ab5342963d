"""The plan: its bytes are the measured ones, its walls and times are where they should be."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from regard.core.parallel import Load, place, sent, shape
from regard.errors import InputError
from regard.lab.bench import parallel, parallel_page, record
from regard.lab.bench.plan import Estimate, Machine, as_dict, machine, most_ranks, plan, table

ROOT = Path(__file__).resolve().parents[2]
MEASURED = sorted((ROOT / "benchmarks" / "results").glob("parallel*.json"))
FAST = Machine(tflops=1e6, memory=80, inside=450, between=50, latency=0, efficiency=1)


def by_name(found: list[Estimate]) -> dict[str, Estimate]:
    return {e.scheme: e for e in found}


@pytest.mark.parametrize("path", MEASURED, ids=lambda p: p.stem)
def test_bytes_of_the_plan_are_those_that_were_measured(path: Path) -> None:
    result = record.load(path)
    s = result.settings
    size = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[s["dtype"]]
    checked = 0
    for name, cell in result.cells.items():
        if not cell.ok or "ring" not in cell.settings:
            continue
        degree = cell.settings["ulysses"] if name in ("usp", "loongtrain") else None
        grid = shape(name, s["ranks"], heads=tuple(s["heads"]), ulysses=degree)
        rows = place(grid, s["tokens"], s["documents"]).local
        load = Load(rows, *s["heads"], s["dim"], s["dim"], 1, size, 8 if size == 8 else 4)
        for way in ("forward", "backward"):
            if way in cell.values:
                assert cell.values[way]["sent"] == sent(grid, load, backward=way == "backward")
                assert cell.values[way]["as_formula"]
                checked += 1
    assert checked >= 5


def test_measured_results_are_there() -> None:
    assert MEASURED


def test_ulysses_hits_the_wall_of_its_heads() -> None:
    found = by_name(plan(96, 2**20, machine("h100", "nvlink4:ib-ndr"), heads=(64, 8)))
    assert not found["ulysses"].possible and "64 query heads" in found["ulysses"].wall
    assert found["ulysses"].most_ranks == 64 == most_ranks("ulysses", (64, 8))
    assert most_ranks("ulysses", (64, 6)) == 2
    assert found["usp"].grid is not None and found["usp"].grid.ranks == 96


def test_memory_is_a_wall_and_the_tokens_that_fit_do_fit() -> None:
    small = Machine(100, 4, 50, 5)
    for e in plan(8, 2**22, small, heads=(32, 8)):
        assert not e.possible and e.wall.startswith("memory")
        again = by_name(plan(8, e.most_tokens // 1024 * 1024, small, heads=(32, 8)))[e.scheme]
        assert again.possible and again.memory_gib > 3.9


def test_with_endless_work_the_schemes_take_the_work_and_no_more() -> None:
    slow = Machine(tflops=1e-3, memory=80, inside=450, between=450, latency=0, efficiency=1)
    for e in plan(8, 2**16, slow, heads=(64, 8)):
        assert e.forward_ms == pytest.approx(e.compute_ms, rel=1e-3)
        assert e.backward_ms == pytest.approx(2.5 * e.compute_ms, rel=1e-3)
        assert e.compute_ms == pytest.approx(4 * (2**16 * (2**16 + 1) / 2) * 64 * 128 / 8 / 1e6)


def test_without_work_the_ring_takes_its_bytes_over_the_slow_link() -> None:
    found = by_name(plan(16, 2**16, FAST, heads=(64, 8)))
    ring = found["ring"]
    assert ring.forward_ms == pytest.approx(ring.sent_forward / 50e6, rel=1e-2)
    # within a node a rank hands on 8 times less by dealing out heads
    assert found["usp"].forward_ms < ring.forward_ms
    inside = by_name(plan(8, 2**16, FAST, heads=(64, 8)))["ulysses"]
    assert inside.traffic_ms == pytest.approx(inside.sent_forward / 450e6)


def test_possible_schemes_come_first_and_by_time() -> None:
    found = plan(96, 2**20, machine("h100", "450:50"))
    able = [e.possible for e in found]
    assert able == sorted(able, reverse=True)
    times = [e.total_ms for e in found if e.possible]
    assert times == sorted(times)
    data = json.loads(json.dumps(as_dict(found, FAST)))
    assert data["computed"] is True and len(data["schemes"]) == 5


def test_documents_are_padded_and_cost_less() -> None:
    whole = by_name(plan(16, 2**17, FAST, mask="causal"))["ring"]
    packed = by_name(plan(16, 2**17, FAST, mask="causal_document"))["ring"]
    assert packed.compute_ms < whole.compute_ms
    assert packed.sent_forward >= whole.sent_forward


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: machine("h1000", "450"), "Did you mean 'h100'"),
        (lambda: machine("h100", "nvlink"), "no number of GB/s and no link"),
        (lambda: machine("h100", "1:2:3"), "one or two links"),
        (lambda: machine("h100", "-3"), "positive"),
        (lambda: machine("0:3", "450"), "positive"),
        (lambda: machine("h100", "450", efficiency=1.5), "efficiency"),
        (lambda: machine("h100", "450", latency=float("inf")), "latency at least 0 and finite"),
        (lambda: machine("h100", "450", latency=float("nan")), "latency at least 0 and finite"),
        (lambda: machine("h100", "450", reserve=float("inf")), "below the 80 GiB .* got inf"),
        (lambda: machine("h100", "450", reserve=100), "below the 80 GiB of the device, got 100"),
        (lambda: plan(8, 1024, FAST, schemes=[]), "at least one scheme"),
        (lambda: plan(8, 1024, FAST, mask="prefix"), "unknown mask"),
        (lambda: plan(8, 1024, FAST, schemes=["rings"]), "Did you mean 'ring'"),
        (lambda: plan(8, 4, FAST), "a token for every rank"),
    ],
)
def test_bad_figures_are_refused(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_the_table_names_the_best_and_the_walls() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(plan(96, 2**20, machine("h100", "450:50")), "title [red]"))
    text = console.export_text()
    assert "best: usp" in text and "ulysses hits a wall" in text and "not measured" in text


def test_a_scheme_named_twice_is_planned_once() -> None:
    assert [e.scheme for e in plan(8, 1024, FAST, schemes=["ring", "usp", "ring"])].count(
        "ring"
    ) == 1


def test_one_process_runs_the_bench_too(tmp_path: Path) -> None:
    """The whole of `bench parallel` on a single rank: measured, saved, resumed, shown."""
    said: list[str] = []
    out = tmp_path / "parallel.json"
    options: dict[str, Any] = {"tokens_per_rank": 48, "heads": (4, 2), "dim": 8, "repeats": 1}
    first = parallel.run(["ulysses", "ring"], out=out, progress=said.append, **options)
    assert [n for n, c in first.cells.items() if c.ok] == ["ulysses", "ring"]
    assert [n for n, c in first.cells.items() if c.outcome == "unsupported"] == [*parallel.PEERS]
    assert first.cells["ring"].values["forward"]["as_formula"]
    assert max(first.cells["ring"].values["error"].values()) < 1e-5
    said.clear()
    again = parallel.run(
        ["ulysses", "ring", "usp", "usp"], out=out, progress=said.append, **options
    )
    assert len(said) == 1 and said[0].startswith("usp")
    assert "usp" in again.cells
    text = parallel_page.page([out])
    assert "| ring | 1x1 |" in text and "torchrun --nproc-per-node 1" in text


def test_the_page_draws_the_bytes_that_were_counted_beside_the_formula() -> None:
    result = record.load(MEASURED[0])
    text = parallel_page.html(result)
    measured = [n for n, c in result.cells.items() if "sent_most" in c.values.get("forward", {})]
    assert measured and all(f">{n}, forward</text>" in text for n in measured)
    assert "<script" not in text and ", formula " not in text  # they agree
    result.cells[measured[0]].values["forward"]["sent_most"] *= 2
    assert ", formula " in parallel_page.html(result)


@pytest.mark.slow
def test_peers_run_on_the_same_tensors(tmp_path: Path) -> None:
    """Two processes: diffusers' Ulysses computes the attention of one; what peers lack is said."""
    pytest.importorskip("diffusers")
    out = tmp_path / "full.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["--local-addr", "127.0.0.1", "-m", "regard", "bench", "parallel", "--out", str(out)]
    words += ["--schemes", "ring", "--mask", "full", "--tokens-per-rank", "32", "--repeats", "1"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    if sys.platform == "linux":
        own["GLOO_SOCKET_IFNAME"] = "lo"
    subprocess.run(words, env=own, check=True, capture_output=True, timeout=300)
    cells = record.load(out).cells
    assert max(cells["diffusers ulysses"].values["error"].values()) < 1e-5
    assert cells["diffusers ulysses"].ok and "lse" in cells["diffusers ring"].reason


def test_the_committed_page_is_what_the_committed_results_give() -> None:
    text = (ROOT / "docs" / "bench-parallel.md").read_text(encoding="utf-8")
    assert text == parallel_page.page(MEASURED)  # in the order of their names


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schemes": ["rings"]}, "Did you mean 'ring'"),
        ({"schemes": []}, "at least one scheme"),
        ({"mask": "casual"}, "Did you mean 'causal'"),
        ({"heads": (5, 2)}, "not a multiple"),
        ({"dtype": "int8"}, "unknown dtype"),
    ],
)
def test_the_bench_refuses_before_it_starts(change: dict[str, Any], says: str) -> None:
    good: dict[str, Any] = {
        "schemes": ["ring"],
        "mask": "causal",
        "heads": (4, 2),
        "dtype": "float32",
    }
    with pytest.raises(InputError, match=says):
        parallel.check(**(good | change))


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    from regard.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments])
    code = ended.value.code
    said = capsys.readouterr()
    return int(code or 0), said.out, said.err


@pytest.mark.parametrize(
    ("schemes", "says"), [(["usp"], "choose --ulysses among 1$"), (["ring"], "leave it out")]
)
def test_a_degree_that_no_rank_can_follow(schemes: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        parallel.run(schemes, ulysses=3)


def test_the_command_plans(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = ask(capsys, "plan", "--ranks", "96", "--tokens", "1M", "--json", "-")
    assert code == 0
    data = json.loads(out)
    assert [s["scheme"] for s in data["schemes"] if not s["possible"]] == ["ulysses"]
    code, out, _ = ask(capsys, "plan", "--ranks", "8", "--tokens", "128k", "--heads", "32:8")
    assert code == 0 and "best: " in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "--ranks", "8", "--tokens", "1x"], "not a length"),
        (["plan", "--ranks", "8", "--tokens", "1k", "--heads", "8:2:1"], "64:8"),
        (["plan", "--ranks", "8", "--tokens", "1k", "--heads", "7:3"], "not a multiple"),
        (["plan", "--ranks", "8", "--tokens", "1k", "--device", "h10"], "Did you mean 'h100'"),
        (["plan", "--ranks", "8", "--tokens", "1k", "--json", "no/such/folder.json"], "not exist"),
        (["parallel"], "torchrun --nproc-per-node 4"),
    ],
)
def test_the_commands_say_what_is_wrong(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    code, _, err = ask(capsys, *arguments)
    assert code == 2 and says in " ".join(err.split())
