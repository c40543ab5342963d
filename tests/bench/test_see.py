"""bench see: the plan, a run cell by cell, its resumption, and what cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch

from regard import zoo
from regard.errors import InputError
from regard.lab.bench import record, see, worker
from regard.lab.bench.peers import reduce


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model as a checkpoint."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    zoo.tiny("llama").save_pretrained(path)
    return path


class Direct:
    """The worker without its process: the same jobs, answered in this one."""

    asked: list[dict[str, Any]] = []  # noqa: RUF012
    benches: dict[str, worker.Bench] = {}  # noqa: RUF012
    alive = True

    def __init__(
        self, python: str, setup: dict[str, Any], timeout: float, spare: int, returning: bool
    ) -> None:
        key = json.dumps(setup)
        if key not in Direct.benches:
            Direct.benches[key] = worker.Bench(setup)
        self.bench = Direct.benches[key]
        self.deadline = 0.0

    def __enter__(self) -> Direct:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        Direct.asked.append(job)
        return worker.answer(self.bench, job)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> type[Direct]:
    monkeypatch.setattr(see, "_Worker", Direct)
    monkeypatch.setattr(worker.Memory, "reset", lambda: None)  # slow, and not this process's to do
    Direct.asked.clear()
    Direct.benches.clear()
    return Direct


QUICK: dict[str, Any] = {
    "facts": ["received", "entropy"],
    "repeats": 2,
    "threads": 1,
    "patience": 0,
    "progress": None,
}


def test_plan_begins_with_what_decides_the_targets() -> None:
    keys = [s.key for s in see.plan([1024, 4096, 8192], peer="nnsight", growth=[2048, 16384])]
    assert keys[:2] == ["4096/kernel", "8192/kernel"]
    assert keys.index("4096/all/eager") < keys.index("1024/all/plain")
    assert "16384/last/received + entropy" in keys and "16384/all/plain" not in keys
    assert len(keys) == len(set(keys))
    assert {k.split("/")[0] for k in keys if k.endswith("nnsight")} == {"1024", "4096", "8192"}


def test_a_run_measures_every_cell(folder: Path, direct: type[Direct], tmp_path: Path) -> None:
    out = tmp_path / "see.json"
    result = see.run([32], folder, out=out, **QUICK)
    assert record.load(out) == result
    assert set(result.cells) == {s.key for s in see.plan([32], facts=["received", "entropy"])}
    assert {k: c.reason for k, c in result.cells.items() if not c.ok} == {}
    for row in ("received", "received + entropy", "all facts", "entropy", "eager"):
        cell = result.cells[f"32/all/{row}"]
        assert len(cell.values["pairs"]) == 2
        assert cell.values["ratio"]["low"] <= cell.values["ratio"]["median"]
        assert cell.values["total"] > 0
    assert set(result.cells["32/kernel"].values["seconds"]) >= {"sdpa", "attend + received"}
    assert str(folder.parent) not in out.read_text()
    assert result.settings["shape"]["text"] is False  # the checkpoint has no tokenizer


def test_a_killed_run_loses_one_cell(folder: Path, direct: type[Direct], tmp_path: Path) -> None:
    out = tmp_path / "see.json"
    seen: list[str] = []

    def stop(line: str) -> None:
        seen.append(line)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        see.run([32], folder, out=out, kernel=False, **{**QUICK, "progress": stop})
    before = record.load(out).cells
    assert len(before) == 3
    direct.asked.clear()
    result = see.run([32], folder, out=out, kernel=False, **QUICK)
    assert {k: result.cells[k] for k in before} == before
    assert len(result.cells) > 3
    routes = [j["route"] for j in direct.asked if j["do"] == "forward"]
    first = next(route for route in routes if route != "plain")
    assert first == "eager_lean"  # plain, watch and eager were there
    direct.asked.clear()
    assert see.run([32], folder, out=out, kernel=False, **QUICK) == result
    assert direct.asked == []  # nothing left to do, not even a model to load


def test_failed_cells_are_tried_again(
    folder: Path, direct: type[Direct], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "see.json"
    whole = worker.eager

    def broken(model: Any) -> Any:
        raise RuntimeError("boom in /home/ann/lib/x.py")

    monkeypatch.setattr(worker, "eager", broken)
    cell = see.run([32], folder, out=out, kernel=False, **QUICK).cells["32/all/eager"]
    assert cell.outcome == "failed" and cell.reason == "RuntimeError: boom in x.py"
    monkeypatch.setattr(worker, "eager", whole)
    assert see.run([32], folder, out=out, kernel=False, **QUICK).cells["32/all/eager"].ok


def test_all_routes_tell_the_same(folder: Path) -> None:
    """What is timed side by side is the same job: equal facts from eager, hooks and watch."""
    model, _ = zoo.load(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        _, (received, entropy) = worker.watch(model, ["received", "entropy"])(ids)
        for other in (worker.eager(model)(ids), worker.eager_lean(model)(ids)):
            assert len(other) == len(received) == 2
            for layer, (r, e) in enumerate(other):
                torch.testing.assert_close(r, received[layer], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(e, entropy[layer], rtol=1e-4, atol=1e-5)
        assert model.config._attn_implementation == "sdpa"
        before = [len(m._forward_hooks) for m in model.modules()]
        worker.eager_lean(model)(ids)
        assert [len(m._forward_hooks) for m in model.modules()] == before


def test_reduce_is_the_definition() -> None:
    p = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    received, entropy = reduce(p)
    assert received.flatten().tolist() == [1.25, 0.75]
    assert entropy.flatten()[1] == pytest.approx(0.5623, abs=1e-4)


# -- the process itself ---------------------------------------------------------------------------
def ask(folder: Path, job: dict[str, Any], **changes: Any) -> dict[str, Any]:
    setup = {"model": str(folder), "threads": 1, "seed": 0, "own": True}
    settings = {"python": sys.executable, "timeout": 120.0, "spare": 0} | changes
    settings["setup"] = setup | settings.get("setup", {})
    with see._Worker(**settings) as process:
        return process.ask(job)


def test_a_process_of_its_own_measures(folder: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(str(list(range(40))))
    job = {"do": "forward", "route": "watch", "facts": ["received"], "tokens": 40, "logits": "last"}
    answer = ask(folder, {**job, "memory": True}, setup={"ids": str(ids)})
    assert answer["outcome"] == "measured", answer
    assert answer["seconds"] > 0 and answer["total"] > 50 * 2**20
    assert 0 <= answer["growth"] < answer["total"]


def test_a_peer_that_is_not_there_is_a_result(folder: Path) -> None:
    pytest.importorskip("transformers")
    job = {"do": "forward", "route": "peer", "peer": "nnsight", "tokens": 16, "logits": "all"}
    answer = ask(folder, job, python="/no/such/python")
    assert answer["outcome"] == "not installed" and "python cannot be started" in answer["reason"]


def test_a_peer_that_cannot_is_a_result(
    folder: Path, direct: type[Direct], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.lab.bench import peers

    def refuse(name: str, model: Any) -> Any:
        raise peers.Unsupported("no maps in this family")

    monkeypatch.setattr(peers, "prepare", refuse)
    result = see.run([32], folder, kernel=False, peer="nnsight", **QUICK)
    cell = result.cells["32/all/nnsight"]
    assert (cell.outcome, cell.reason) == ("unsupported", "no maps in this family")
    assert result.settled("32/all/nnsight")


def test_the_machine_keeps_its_last_memory(folder: Path) -> None:
    answer = ask(folder, {"do": "about", "tokens": 16}, spare=2**60)
    assert answer["outcome"] == "out of memory" and "less than" in answer["reason"]


def test_a_cell_that_takes_too_long(folder: Path) -> None:
    answer = ask(folder, {"do": "about", "tokens": 16}, timeout=0.05)
    assert answer == {"outcome": "timed out", "reason": "stopped after 0.05 s"}


def test_a_model_that_is_not_there(direct: type[Direct], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be measured"):
        see.run([32], tmp_path, **QUICK)


def test_out_of_memory_is_told_from_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = worker.Bench({"model": str(folder), "threads": 1, "seed": 0, "own": True})
    for problem, outcome in (
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (MemoryError(), "out of memory"),
        (ModuleNotFoundError("No module named 'nnsight'"), "not installed"),
        (RuntimeError("shape"), "failed"),
    ):

        def fail(job: Any, problem: Exception = problem) -> Any:
            raise problem

        monkeypatch.setattr(bench, "do", fail)
        assert worker.answer(bench, {})["outcome"] == outcome


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lengths": []}, "at least 16"),
        ({"lengths": [4]}, "at least 16"),
        ({"repeats": 0}, "repeats"),
        ({"peer": "nsight"}, "Did you mean 'nnsight'"),
        ({"facts": ["entrpy"]}, "Did you mean 'entropy'"),
        ({"facts": []}, "at least one fact"),
        ({"model": object()}, "pass its name or folder"),
    ],
)
def test_bad_input(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        see.run(**({"lengths": [32], "model": "smollm2-135m", "progress": None} | changes))
