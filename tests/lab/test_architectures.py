"""regard check --all-architectures: what it calls right, refused and WRONG, and its page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from regard.core import FACTS
from regard.errors import InputError
from regard.lab import architectures
from regard.lab.architectures import REFUSED, RIGHT, UNPROVEN, WRONG

from ..cli.command import run

ROOT = Path(__file__).parents[2]
SOURCE = "benchmarks/results/architectures.json"
SAMPLE = (
    "LlamaForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM",
    "DeepseekV3ForCausalLM",
    "BloomForCausalLM",
    "DebertaV2ForMaskedLM",
    "T5ForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "ViTForImageClassification",
    "SwinForImageClassification",
    "WhisperForConditionalGeneration",
    "VideoMAEForVideoClassification",
)


def named(name: str) -> architectures.Class:
    return next(c for c in architectures.classes() if c.name == name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_right(name: str) -> None:
    outcome = architectures.examine(named(name))
    assert outcome.result == RIGHT and not outcome.detail.startswith(UNPROVEN), outcome
    if outcome.kind in ("vision", "video", "image and text"):
        assert "pixel_values" in outcome.detail


def test_a_class_is_right() -> None:
    outcome = architectures.examine(named("LlamaForCausalLM"))
    assert outcome.result == RIGHT and outcome.detail.startswith("2 of 2 modules"), outcome


@pytest.mark.parametrize("fact", architectures.FACTS)
def test_a_wrong_fact_is_wrong(fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FACTS[fact].finish
    monkeypatch.setattr(FACTS[fact], "finish", lambda self, sums: 1.001 * real(self, sums))
    outcome = architectures.examine(named("LlamaForCausalLM"))
    assert outcome.result == WRONG and f"{fact} of model.layers.0" in outcome.detail


def test_an_output_that_moves_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that lets a bidirectional model see only the past must not pass."""
    from regard.core import Mask
    from regard.reach import transformers as door

    monkeypatch.setattr(door, "from_mask_function", lambda *a, **k: Mask.full())
    outcome = architectures.examine(named("LlamaForCausalLM"))
    assert outcome.result == WRONG and "output moves" in outcome.detail


def test_a_traceback_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("no such thing")

    monkeypatch.setattr(architectures, "watch", broken)
    outcome = architectures.examine(named("LlamaForCausalLM"))
    assert outcome.result == WRONG and "ends in TypeError: no such thing" in outcome.detail


def test_a_class_without_attention_is_refused() -> None:
    outcome = architectures.examine(named("FalconMambaForCausalLM"))
    assert outcome.result == REFUSED and "use a model class" in outcome.detail


def test_a_class_that_dies_costs_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(architectures, "examine", lambda given: os._exit(3))
    (outcome,) = architectures.sweep([named("LlamaForCausalLM")])
    assert outcome.result == architectures.UNBUILT and "died (3)" in outcome.detail


def test_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "found.json"
    words = ("check", "--all-architectures", "--only", "causal LlamaFor", "--json", str(file))
    code, out, _ = run(capsys, *words)
    assert code == 0 and "LlamaForCausalLM" in out and "1 right" in out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["counts"][RIGHT] == 1 and found["versions"].keys() == {"torch", "transformers"}
    wrong = architectures.Outcome("LlamaForCausalLM", "causal", WRONG, "off")
    monkeypatch.setattr(architectures, "_alone", lambda given: wrong)
    assert run(capsys, *words[:4])[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check"], "name a model"),
        (["check", "tiny:llama", "--all-architectures"], "leave MODEL out"),
        (["check", "tiny:llama", "--only", "x"], "add --all-architectures"),
        (["check", "--all-architectures", "--only", "("], "no regular expression"),
        (["check", "--all-architectures", "--only", "zzz"], "found in no class"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *words)
    assert code == 2 and message in err


def test_inputs_that_change_nothing_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that the output does not depend on was not sent."""
    import torch

    from regard.lab import smallest

    model, _ = architectures.ready(named("ViTForImageClassification"))
    model.classifier.weight.data.zero_()
    with torch.no_grad(), pytest.raises(InputError, match="change nothing"):
        smallest.settle(model, "vision")


def test_the_committed_page_is_generated() -> None:
    if not (ROOT / SOURCE).is_file():
        pytest.skip("benchmarks/ is not here: this is an installed package, not a clone")
    found = json.loads((ROOT / SOURCE).read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert page == architectures.markdown(found, SOURCE), "run `make docs`"
