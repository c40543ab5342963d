"""Every reproduction runs end to end on a tiny model or has a test file of its own that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regard import catalog
from regard.errors import InputError
from regard.lab import reproduce
from regard.lab.reproduce import harness
from regard.lab.reproduce.problems import problems
from regard.see.preplan_anchor import claims as preplan_anchor
from regard.see.sink_emergence import claims as sink_emergence
from regard.zoo import tiny


class Letters:
    """A tokenizer of single characters, for the vocabulary of the tiny models."""

    bos_token_id = None
    eos_token_id = 2
    pad_token_id = 0
    chat_template = None

    def __len__(self) -> int:
        return 128

    def __call__(self, words: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % 120 for c in words]}

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return [" ".join(str(n) for n in row if n > 2) for row in rows.tolist()]


def test_problems_differ_and_are_the_same_again() -> None:
    made = problems(36)
    assert len(set(made)) == 36 and made == problems(36) and made != problems(36, seed=1)
    assert not any("{" in one for one in made)


def runs_itself(slug: str) -> bool:
    """Whether `test_<slug>.py` runs the method, on what it needs (another model, other words)."""
    file = Path(__file__).with_name(f"test_{slug.replace('-', '_')}.py")
    return file.is_file() and f'reproduce.run("{slug}"' in file.read_text(encoding="utf-8")


def has_own_model(slug: str) -> bool:
    """Whether the method is measured on something else than a language model."""
    module = catalog.method(slug).load("claims")
    return bool(getattr(module, "MODEL", harness.MODEL) != harness.MODEL)


def on_language_models() -> list[str]:
    return [s for s in reproduce.available() if not runs_itself(s) and not has_own_model(s)]


@pytest.mark.parametrize("slug", [s for s in reproduce.available() if has_own_model(s)])
def test_what_has_a_model_of_its_own_has_tests_of_its_own(slug: str) -> None:
    name = slug.replace("-", "_")
    files = [f for f in Path(__file__).parent.glob("test_*.py") if f.name != Path(__file__).name]
    assert any(name in f.read_text(encoding="utf-8") for f in files)


@pytest.mark.parametrize("result", reproduce.read(), ids=lambda r: r.slug)
def test_committed_verdicts_follow_from_their_rules(result: harness.Result) -> None:
    stated = {c.key: c for c in catalog.method(result.slug).load("claims").CLAIMS}
    assert [c.key for c in result.claims] == list(stated)
    for claim in result.claims:
        judge = stated[claim.key].judge
        wanted = "needs scale" if judge is None else judge(claim.values)
        assert claim.verdict == wanted, claim.key
        assert claim.rule == stated[claim.key].rule, claim.key


@pytest.mark.parametrize("slug", on_language_models())
def test_it_runs_on_a_tiny_model(slug: str, tmp_path: Path) -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = None  # a random model would stop anywhere
    result = reproduce.run(slug, quick=True, model=(model, Letters()), out=tmp_path)
    settled_as_stated(slug, result)
    assert json.loads((tmp_path / f"{slug}.quick.json").read_text())["settings"]


def settled_as_stated(slug: str, result: harness.Result) -> None:
    """Every claim has the verdict of its own rule, with a measurement and a control."""
    stated = catalog.method(slug).load("claims").CLAIMS
    assert [c.key for c in result.claims] == [c.key for c in stated]
    for claim, rule in zip(result.claims, stated):
        if rule.judge is None:
            assert claim.verdict == "needs scale" and claim.command
        else:
            assert claim.here and claim.control and claim.values
            assert claim.verdict == rule.judge(claim.values)


def test_a_method_without_a_model_takes_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="leave the model out"):
        reproduce.run("longca-bench", quick=True, model="smollm2-360m", out=tmp_path)


def judged(module: Any, name: str, /, **values: float) -> str:
    claim = next(c for c in module.CLAIMS if c.key == name)
    return claim.settle(values, here="", control="").verdict


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("text", {"rate": 78, "low": 75, "elsewhere": 5}, "reproduced"),
        ("text", {"rate": 40, "low": 35, "elsewhere": 5}, "partly"),
        ("text", {"rate": 78, "low": 75, "elsewhere": 76}, "partly"),
        ("text", {"rate": 3, "low": 2, "elsewhere": 5}, "not reproduced"),
        ("random", {"rate": 55, "low": 50, "elsewhere": 5}, "reproduced"),
        ("random", {"rate": 95, "low": 90, "elsewhere": 5}, "partly"),
        ("repeat", {"rate": 0, "text": 78, "massive": 1.0}, "reproduced"),
        ("repeat", {"rate": 0, "text": 78, "massive": 3.0}, "partly"),
        ("repeat", {"rate": 60, "text": 78, "massive": 1.0}, "not reproduced"),
        ("massive", {"massive": 150, "repeat": 1.0}, "reproduced"),
        ("massive", {"massive": 150, "repeat": 9.0}, "partly"),
        ("massive", {"massive": 2, "repeat": 9.0}, "not reproduced"),
        ("key-bias", {"gap": 0.4, "key": 0.4}, "reproduced"),
        ("key-bias", {"gap": 0.1, "key": 0.4}, "partly"),
        ("key-bias", {"gap": 0.1, "key": 1.4}, "not reproduced"),
        ("small-value", {"value": 0.2}, "reproduced"),
        ("small-value", {"value": 0.8}, "partly"),
        ("small-value", {"value": 1.2}, "not reproduced"),
    ],
)
def test_judges_of_sink_emergence(key: str, values: dict[str, float], said: str) -> None:
    assert judged(sink_emergence, key, **values) == said


@pytest.mark.parametrize("key", ["entropy", "receiver", "follow"])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lift": 0.2, "p": 0.001, "top_lift": 0.1}, "reproduced"),
        ({"lift": 0.2, "p": 0.001, "top_lift": -0.1}, "partly"),
        ({"lift": 0.2, "p": 0.2, "top_lift": 0.1}, "not reproduced"),
        ({"lift": -0.2, "p": 0.99, "top_lift": 0.1}, "not reproduced"),
    ],
)
def test_judges_of_couplings(key: str, values: dict[str, float], said: str) -> None:
    assert judged(preplan_anchor, key, **values) == said


@pytest.mark.parametrize(
    ("difference", "high", "said"),
    [(-0.1, -0.02, "reproduced"), (-0.1, 0.01, "partly"), (0.1, 0.2, "not reproduced")],
)
def test_judge_of_perturbation(difference: float, high: float, said: str) -> None:
    assert judged(preplan_anchor, "perturb", difference=difference, high=high) == said
