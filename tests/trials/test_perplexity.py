"""Perplexity against one explicit forward pass, documents, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.lab.trials.configurations import read
from regard.lab.trials.frame import run
from regard.lab.trials.perplexity import batches
from regard.zoo.tiny import tiny

from .words import Words

TEXT = " ".join(f"word{n % 61}" for n in range(600))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_full_is_one_forward_pass(family: str) -> None:
    model = tiny(family)
    own = batches(model, Words(), TEXT, context=37, continuation=9, documents=3, batch_size=2)
    found = run(model, read(""), own, show=False).values["full"]["text"]
    ids = torch.tensor([Words()(TEXT).input_ids])
    starts = [0, (600 - 47) // 2, 2 * ((600 - 47) // 2)]
    for number, start in enumerate(starts):
        row = ids[:, start : start + 47]
        with torch.no_grad():
            log_p = model(row).logits[0].double().log_softmax(-1)
        right = [float(log_p[at, row[0, at + 1]]) for at in range(37, 46)]
        assert found[number]["nll"] == pytest.approx(-sum(right) / 9, abs=1e-5)


def test_documents_do_not_overlap_and_fill_batches() -> None:
    own = batches(
        tiny("llama"), Words(), TEXT, context=90, continuation=9, documents=6, batch_size=4
    )
    assert [b.numbers for b in own] == [(0, 1, 2, 3), (4, 5)]
    assert [tuple(b.prompt.shape) for b in own] == [(4, 90), (2, 90)]
    with pytest.raises(InputError, match="has 600 tokens, and 7 documents of 100 need 700"):
        batches(tiny("llama"), Words(), TEXT, context=90, continuation=9, documents=7)


def test_a_first_token_comes_before_every_document() -> None:
    class Begun(Words):
        bos_token_id = 1

        def __call__(self, text: str, **how: Any) -> Any:
            found = super().__call__(text)
            found["input_ids"] = [1, *found["input_ids"]]
            return found

    own = batches(tiny("llama"), Begun(), TEXT, context=20, continuation=2, documents=3)
    assert own[0].prompt[:, 0].tolist() == [1, 1, 1] and 1 not in own[0].prompt[:, 1:]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"context": 0}, "context is at least 1"),
        ({"continuation": 0}, "continuation is at least 1"),
        ({"documents": 0}, "documents is at least 1"),
        ({"batch_size": 0}, "batch_size is at least 1"),
        ({"context": 5000}, "5065 tokens are needed, and the model has 4096 positions"),
    ],
)
def test_mistakes(how: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        batches(tiny("llama"), Words(), TEXT, **how)
    with pytest.raises(InputError, match="does not answer texts"):
        batches(tiny("llama"), None, TEXT)
