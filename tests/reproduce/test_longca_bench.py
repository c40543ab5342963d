"""The claims of LongCA-bench: measured small, and settled by rules that can say no."""

from __future__ import annotations

from typing import Any

import pytest

from regard.reproduce import longca_bench as method
from regard.reproduce.harness import Journal, Setup


@pytest.fixture(scope="module")
def measured() -> Any:
    setup = Setup(None, None, "none", True, Journal(None, {}), False)
    return method.measure(setup)


def test_every_claim_is_settled(measured: Any) -> None:
    assert [c.key for c in measured.claims] == [c.key for c in method.CLAIMS]
    said = {c.key: c.verdict for c in measured.claims}
    assert said["exact"] == said["area"] == "reproduced"
    assert said["gpu-order"] == said["context-parallel"] == "needs scale"
    assert "" not in said.values()


def test_rules_can_say_no() -> None:
    stated = {c.key: c for c in method.CLAIMS}
    rules = {
        "exact": {"exact": 1, "cells": 20},
        "area": {"right": 3},
        "skipping": {"ratio": 0.9, "low": 0.8},
        "sparse": {"outside": 3, "falls": 0},
        "memory": {"blockwise": 2.0, "matrix": 2.0},
    }
    for key, values in rules.items():
        judge = stated[key].judge
        assert judge is not None and judge(values) == "not reproduced"
