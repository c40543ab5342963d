"""The claims of LongCA-bench: measured small, and settled by rules that can say no."""

from __future__ import annotations

import json
from typing import Any

import pytest

from regard.bench.longca_bench import claims as method
from regard.errors import RegardError
from regard.lab import reproduce
from regard.lab.reproduce import harness

TIMED = ("skipping", "sparse", "memory")  # a small run on a busy machine may say anything


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("longca")
    result = reproduce.run("longca-bench", quick=True, out=folder, progress=False)
    return result, json.loads((folder / "longca-bench.quick.json").read_text())


def test_every_claim_is_settled(ran: Any) -> None:
    result, plain = ran
    assert [c.key for c in result.claims] == [c.key for c in method.CLAIMS]
    for claim, rule in zip(result.claims, method.CLAIMS):
        if rule.judge is None:
            assert claim.verdict == "needs scale" and claim.command
        else:
            assert claim.here and claim.control and claim.values
            assert claim.key in TIMED or claim.verdict == "reproduced", claim
    assert plain["model"] == "none" and plain["device"].startswith("cpu (")
    assert plain["command"] == "regard reproduce longca-bench --quick"


def test_controls_are_told_apart(ran: Any) -> None:
    """Each exact claim would fail for the thing it is compared with."""
    found = {c.key: c.values for c in ran[0].claims}
    assert found["schemes-exact"]["missed"] > 1e-3
    assert found["schemes-bytes"]["copied"] > 1
    assert found["balance"]["causal_unplaced"] > 1.2
    assert found["area"]["apart"] > 0


def test_rules_can_say_no() -> None:
    stated = {c.key: c for c in method.CLAIMS}
    rules = {
        "exact": {"exact": 1, "cells": 20},
        "area": {"right": 3},
        "skipping": {"ratio": 0.9, "low": 0.8},
        "sparse": {"outside": 3, "falls": 0},
        "memory": {"blockwise": 2.0, "matrix": 2.0},
        "schemes-exact": {"schemes": 5, "worst": 1e-3},
        "schemes-bytes": {"cells": 10, "forward": 9, "backward": 10},
        "balance": {"causal": 1.5, "causal_unplaced": 1.5, "documents": 1.0,
                    "documents_unplaced": 2.0},
        "head-cap": {"refused": 0, "others": 4},
    }  # fmt: skip
    assert set(rules) == {c.key for c in method.CLAIMS if c.judge}
    for key, values in rules.items():
        judge = stated[key].judge
        assert judge is not None and judge(values) == "not reproduced"


def test_bytes_of_the_paper() -> None:
    """P ranks of T/P rows: (P-1)/P of q, k, v, out for Ulysses, (P-1) times k and v for a ring."""
    rows, size = 16, 8
    ulysses = method.paper_bytes({"rows": rows, "ulysses": 4, "ring": 1}, (8, 4), size)
    assert ulysses == {"heads": 3 * rows * (2 * 8 + 2 * 4) * method.DIM * size // 4}
    ring = method.paper_bytes({"rows": rows, "ulysses": 1, "ring": 4}, (8, 2), size)
    assert ring == {"kv": 3 * rows * 2 * 2 * method.DIM * size}
    copied = method.paper_bytes({"rows": rows, "ulysses": 4, "ring": 1}, (8, 2), size)
    assert copied == ulysses  # two key heads for four ranks travel as four


def test_failed_processes_say_why() -> None:
    with pytest.raises(RegardError, match=r"processes failed: .*nonsense"):
        method._schemes(1, 8, [("nonsense", (2, 2))])


def test_a_rule_never_meets_nan() -> None:
    stated = {c.key: c for c in method.CLAIMS}["memory"]
    with pytest.raises(ValueError, match="NaN"):
        stated.settle({"blockwise": float("nan"), "matrix": 2.0}, here="", control="")
    assert harness.available().count("longca-bench") == 1
