"""The grid of gamma and eta runs end to end on a tiny expert, and its judges judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from regard.errors import InputError
from regard.lab import reproduce
from regard.steer.steer import claims as steer
from regard.zoo import tiny


class Letters:
    """A tokenizer of single characters, for the vocabulary of the tiny models."""

    eos_token_id = 2
    pad_token_id = 0

    def __len__(self) -> int:
        return 128

    def __call__(self, words: str, return_tensors: str | None = None, **_: Any) -> Any:
        from transformers import BatchEncoding

        ids = [3 + ord(c) % 120 for c in words]
        return BatchEncoding({"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(chr(97 + n % 26) for n in row if n > 2) for row in rows.tolist()]


def embed(texts: list[str]) -> numpy.ndarray:
    made = numpy.array([[t.count(chr(97 + n)) + 0.1 for n in range(26)] for t in texts])
    return made / numpy.linalg.norm(made, axis=1, keepdims=True)


def tiny_parts(setup: Any) -> steer.Parts:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    expert = peft.get_peft_model(setup.model, settings).eval()
    real = [f"a sentence about the number {n}" for n in range(20)]
    return steer.Parts(expert, Letters(), "say", real, [f"held out {n}" for n in range(16)], embed)


def test_it_runs_on_a_tiny_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(steer, "parts", tiny_parts)
    result = reproduce.run("steer", quick=True, model=(tiny("llama"), Letters()), out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in steer.CLAIMS]
    for claim in result.claims:
        assert claim.verdict == "needs scale" or (claim.here and claim.control and claim.values)
    written = json.loads((tmp_path / "steer.quick.json").read_text())
    table = written["claims"][0]["values"]["cells"]
    assert len(table) == len(steer.GAMMAS) * len(steer.ETAS) + 1
    assert written["picture"] == steer.SHOWS
    with Image.open(tmp_path / "steer.quick.png") as drawn:
        assert drawn.size == steer.picture(written["claims"][0]["values"]).size


def test_the_committed_result_draws_the_committed_picture() -> None:
    folder = Path(steer.__file__).parents[4] / "reproductions"
    values = json.loads((folder / "steer.json").read_text())["claims"][0]["values"]
    with Image.open(folder / "steer.png") as drawn:
        committed = numpy.asarray(drawn.convert("RGB"), dtype=float)
    apart = abs(committed - numpy.asarray(steer.picture(values), dtype=float))
    assert (apart > 48).mean() < 0.01, "draw it anew"  # letters differ a little between fonts


def test_another_model_has_no_expert(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tuned from smollm2"):
        reproduce.run("steer", quick=True, model=(tiny("llama"), Letters()), out=tmp_path)


def test_the_score_is_the_likelihood_after_the_context() -> None:
    class Setup:
        model = tiny("llama")

    have = tiny_parts(Setup)
    texts = ["abc", "a longer one"]
    head = Letters()("\n".join(have.held_out[: steer.CONTEXT]) + "\n")["input_ids"]
    for text, found in zip(texts, steer._score(have, texts)):
        row = Letters()(text)["input_ids"]
        with torch.no_grad(), have.expert.disable_adapter():
            log_p = have.expert(input_ids=torch.tensor([head + row])).logits[0].log_softmax(-1)
        wanted = [float(log_p[len(head) + n - 1, token]) for n, token in enumerate(row)]
        assert found == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_distinct_change_sees_repetition_and_not_noise() -> None:
    fresh = [[100 * n + k for k in range(9)] for n in range(20)]
    dull = [list(range(9)) for _ in range(20)]
    one, two, change, p = steer.distinct_change(fresh, dull, draws=200)
    assert one == 1.0 and two < 0.1 and change == pytest.approx(two - one) and p < 0.01
    assert steer.distinct_change(fresh, fresh, draws=200)[2:] == (0.0, 1.0)


def test_auroc_knows_alike_from_apart() -> None:
    pytest.importorskip("sklearn")
    chance = numpy.random.default_rng(0)
    real, made = chance.normal(size=(60, 8)), chance.normal(size=(60, 8))
    assert 0.3 < steer.auroc(real, made) < 0.7
    assert steer.auroc(real, made + 3) > 0.99


@pytest.mark.parametrize(
    "name, values, said",
    [
        ("coherence", {"low": 0.1, "auroc": 0.6, "auroc_0": 0.7}, "reproduced"),
        ("coherence", {"low": -0.1, "auroc": 0.6, "auroc_0": 0.7}, "partly"),
        ("coherence", {"low": -0.1, "auroc": 0.8, "auroc_0": 0.7}, "not reproduced"),
        ("cost", {"change": -0.1, "p": 0.2}, "partly"),
        ("cost", {"change": 0.1, "p": 0.01}, "not reproduced"),
        ("distance", {"high": -0.1, "own_high": -0.1}, "reproduced"),
        ("distance", {"high": -0.1, "own_high": 0.1}, "partly"),
        ("diversity", {"change": 0.1, "p": 0.03}, "partly"),
        ("collapse", {"high": -0.1, "auroc": 0.9, "auroc_0": 0.7}, "reproduced"),
        ("collapse", {"high": 0.1, "auroc": 0.6, "auroc_0": 0.7}, "not reproduced"),
        ("nucleus", {"sure": 0, "better": 2}, "partly"),
        ("nucleus", {"sure": 1, "better": 2}, "reproduced"),
    ],
)
def test_the_judges(name: str, values: dict[str, float], said: str) -> None:
    claim = next(c for c in steer.CLAIMS if c.key == name)
    assert claim.settle(values, here="", control="").verdict == said
