"""Five schemes on 2 and 4 processes: output, lse, gradients, facts and bytes equal one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.core import Mask, attend
from regard.core.parallel import (
    SCHEMES,
    Load,
    Parallel,
    Run,
    Shape,
    place,
    restrict,
    sent,
    shape,
    started,
)
from regard.errors import InputError

HERE = Path(__file__).parent
EXACT = 1e-10


def launch(ranks: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """The worker on so many processes, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    source = str(HERE.parents[1] / "src")
    common = {
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
    }
    if sys.platform == "linux":
        common["GLOO_SOCKET_IFNAME"] = "lo"
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), *arguments],
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(ranks)
    ]


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("ranks") / "results.json"
    processes = launch(request.param, "all", str(path))
    said = [p.communicate(timeout=300) for p in processes]
    assert all(p.returncode == 0 for p in processes), said
    return json.loads(path.read_text())


def cases(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {n: r for n, r in results.items() if n != "refused"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_output_and_lse_equal_one_process(results: dict[str, Any], scheme: str) -> None:
    found = {n: r for n, r in cases(results).items() if n.startswith(scheme)}
    assert len(found) >= 6
    for name, case in found.items():
        assert max(case["out"], case["lse"]) < EXACT, (name, case)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_equal_one_process(results: dict[str, Any], scheme: str) -> None:
    for name, case in cases(results).items():
        if name.startswith(scheme):
            assert max(case["dq"], case["dk"], case["dv"]) < EXACT, (name, case)


def test_bytes_sent_equal_the_formula(results: dict[str, Any]) -> None:
    assert not [n for n, case in cases(results).items() if case["bytes"]]


def test_facts_equal_one_process(results: dict[str, Any]) -> None:
    seen = 0
    for name, case in cases(results).items():
        facts = set(case) - {"out", "lse", "dq", "dk", "dv", "bytes"}
        seen += len(facts)
        for fact in facts:
            assert case[fact] < EXACT, (name, fact, case[fact])
    assert seen > 250


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("heads", "not a multiple of"),
        ("rows", "dispatch"),
        ("grid", "as many processes"),
        ("mask", "differs between heads"),
        ("fact", "does not add up"),
    ],
)
def test_what_cannot_work_is_refused(results: dict[str, Any], what: str, says: str) -> None:
    assert says in results["refused"][what]


@pytest.mark.parametrize("how", ["ended", "stuck"])
def test_a_lost_rank_is_named_on_every_other_rank(how: str) -> None:
    processes = launch(3, "lost", how)
    said = [p.communicate(timeout=60) for p in processes[:2]]
    processes[2].kill()
    processes[2].communicate()
    for process, (out, err) in zip(processes[:2], said):
        assert process.returncode == 2, (out, err)
        seconds, message = out.split(" ", 1)
        assert float(seconds) < 10
        assert "another rank has ended or is stuck" in message


# -- without processes ---------------------------------------------------------------------------
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("documents", [None, [48, 144, 96]])
def test_zigzag_work_is_equal_on_all_ranks(ranks: int, documents: list[int] | None) -> None:
    tokens = 288
    mask = Mask.causal() if documents is None else Mask.documents(documents) & Mask.causal()
    grid = Shape("ring", 1, ranks)
    areas = _areas(grid, tokens, mask, documents)
    assert sum(areas) == mask.area(tokens, tokens)
    assert len(set(areas)) == 1
    expected = 0
    for n in documents or [tokens]:
        c = n // (2 * ranks)
        expected += (2 * ranks - 1) * c * c + c * (c + 1)
    assert areas[0] == expected
    uneven = _areas(grid, tokens, mask, documents, zigzag=False)
    assert sum(uneven) == sum(areas) and max(uneven) > areas[0]


def _areas(
    grid: Shape, tokens: int, mask: Mask, documents: list[int] | None, zigzag: bool | None = None
) -> list[int]:
    from regard.core.parallel import pieces

    placement = place(grid, tokens, documents, zigzag)
    return [
        sum(
            p.mask.area(p.queries.stop - p.queries.start, p.keys.stop - p.keys.start)
            for b in range(grid.ring)
            for p in pieces(mask, placement, a, b)
        )
        for a in range(grid.ring)
    ]


def test_every_token_lies_on_one_rank_and_documents_are_padded() -> None:
    for name, ranks, documents in (
        ("ring", 4, [5, 1, 17]),
        ("ulysses", 4, [23]),
        ("usp", 4, [5, 18]),
        ("loongtrain", 8, [3, 20]),
    ):
        placement = place(shape(name, ranks), sum(documents), documents)
        held = torch.cat([placement.positions(r) for r in range(ranks)])
        assert sorted(held[held >= 0].tolist()) == list(range(sum(documents)))
        if placement.grid.zigzag:
            assert len(held) == sum(-(-n // (2 * ranks)) * 2 * ranks for n in documents)


@pytest.mark.parametrize("name", ["causal", "band", "both", "dense", "inverse", "either"])
def test_a_piece_of_a_mask_is_that_piece(name: str) -> None:
    size = 40
    mask = {
        "causal": Mask.causal(),
        "band": Mask.band(9, -2),
        "both": Mask.documents([13, 27]) & Mask.band(7, 0),
        "dense": Mask.dense(torch.rand(size, size) > 0.5),
        "inverse": ~Mask.window(4),
        "either": Mask.prefix(6) | Mask.causal(),
    }[name]
    cells = mask.cells(size, size)[0, 0]
    for q0, q1, k0, k1 in ((0, 40, 0, 40), (5, 9, 0, 17), (20, 33, 11, 19), (0, 6, 30, 40)):
        part = restrict(mask, Run(q0, q1, 0), Run(k0, k1, 0), size)
        want = cells[q0:q1, k0:k1]
        if part is None:
            assert not want.any()
            continue
        assert torch.equal(part.cells(q1 - q0, k1 - k0)[0, 0], want)
        assert part.area(q1 - q0, k1 - k0) == int(want.sum())


def test_one_rank_needs_no_processes() -> None:
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    for name in SCHEMES:
        run = Parallel(name, 9)
        out = run.undispatch(run.attend(*(run.dispatch(x) for x in (q, k, v))).out)
        want = attend(q, k, v, mask=Mask.causal()).out
        assert torch.allclose(out, want, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: shape("rings", 4), "Did you mean 'ring'"),
        (lambda: shape("usp", 4, ulysses=3), "do not divide"),
        (lambda: shape("ring", 4, ulysses=2), "has none"),
        (lambda: shape("ulysses", 8, heads=(12, 4)), "12 query heads are not a multiple of 8"),
        (lambda: shape("ulysses", 6, heads=(12, 4)), "neither"),
        (lambda: shape("ring", 0), "at least one rank"),
        (lambda: place(shape("ring", 2), 8, [3, 4]), "add up to the 8 tokens"),
    ],
)
def test_impossible_grids_say_what_is_possible(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_bytes_follow_the_published_formulas() -> None:
    """Ulysses (P-1)/P (T/P) (2Hq + 2Hkv) D e; ring and gather (P-1) (T/P) 2 Hkv D e."""
    load = Load(1024, 64, 8, 128, 128)
    ulysses = sent(shape("ulysses", 8), load)
    assert ulysses["heads"] == 7 * 1024 * (2 * 64 + 2 * 8) * 128 * 2 // 8
    for name in ("ring", "allgather"):
        assert sent(shape(name, 8), load) == {"kv": 7 * 1024 * 2 * 8 * 128 * 2}


def test_it_says_how_to_start_when_started_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InputError, match="torchrun --nproc-per-node 3"), started(ranks=3):
        pass
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="3 ranks were asked for, but 2 run"), started(ranks=3):
        pass
