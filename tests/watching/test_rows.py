"""What a token looks at: words to positions, and rows against eager attention."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.core import Rows
from regard.errors import InputError, ReachError
from regard.watching.rows import occurrences, positions
from regard.zoo import tiny

from ..cli.command import run
from ..models import word_tokenizer

PIECES = ["The", " cat", " saw", " the", " cat", "ty", " re", "-en", "ter", "."]
IDS = torch.randint(5, 60, (2, 20), generator=torch.Generator().manual_seed(0))


def test_words_are_whole_words_first() -> None:
    assert occurrences("cat", PIECES) == [(1,)]  # not the one within "catty"
    assert occurrences("catty", PIECES) == [(4, 5)]
    assert occurrences("re-enter", PIECES) == [(6, 7, 8)]
    assert occurrences("atty", PIECES) == [(4, 5)]  # no word of its own: a part of one


def test_positions_of_words_and_numbers() -> None:
    assert positions(-1, PIECES) == (9,) and positions("saw", PIECES) == (2,)
    assert positions("a", PIECES, occurrence=1) == (2,)
    assert positions([0, -1], PIECES) == (0, 9)
    for wrong, said in (
        (10, "out of range: the text has 10 tokens"), ("dog", "does not hold 'dog'"),
        ("a", "3 times"), ("", "a word of the text or a position"), (True, "not True"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            positions(wrong, PIECES)
    with pytest.raises(InputError, match="occurrence 3"):
        positions("a", PIECES, occurrence=3)


def eager(model: Any, **inputs: Any) -> torch.Tensor:
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return torch.stack(
        model(**inputs, output_attentions=True).attentions
    )  # [layers, batch, heads, queries, keys]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "bert"])
def test_rows_are_those_of_eager_attention(family: str) -> None:
    model, mask = tiny(family), torch.ones_like(IDS)
    mask[0, :5] = 0
    with torch.no_grad():
        with regard.watch(model) as seen:
            model(input_ids=IDS, attention_mask=mask)
        padded, other = seen.rows(-2).stack(), seen.rows(3, row=1).stack()
        mean = seen.rows([4, 5], row=1).stack()
        maps = eager(model, input_ids=IDS, attention_mask=mask)
    torch.testing.assert_close(padded, maps[:, 0, :, 18], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other, maps[:, 1, :, 3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mean, maps[:, 1, :, 4:6].mean(2), rtol=1e-5, atol=1e-6)


def test_rows_after_a_generation_and_rows_that_were_watched() -> None:
    model = tiny("llama")
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        with regard.watch(model, [Rows((3, 20))]) as seen:
            written = model.generate(IDS, **how)
        maps = eager(model, input_ids=written[:, :-1])
        seen.model = None  # what was watched takes no further forward
        kept = seen.rows(20, row=1).stack()
    torch.testing.assert_close(kept, maps[:, 1, :, 20], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        with regard.watch(model) as seen:
            model.generate(IDS, **how)
        again = seen.rows(20, row=1).stack()
    torch.testing.assert_close(again, maps[:, 1, :, 20], rtol=1e-4, atol=1e-6)


def test_what_cannot_run_again_says_how_to_ask_before() -> None:
    model = tiny("llama")
    with torch.no_grad(), regard.watch(model) as seen:
        model(inputs_embeds=model.get_input_embeddings()(IDS))
    with pytest.raises(ReachError, match=r"watch\(model, \[core.Rows\(queries=\(3,\)\)\]\)"):
        seen.rows(3)


def test_the_command_prints_and_writes_the_row(tmp_path: Path, capsys: Any) -> None:
    text, where = "The cat sat because it was tired.", tmp_path / "out.json"
    folder = tmp_path / "model"
    word_tokenizer(text).save_pretrained(folder)
    tiny("llama").save_pretrained(folder)
    words = ["see", text, "--model", str(folder), "--json", str(where)]
    code, shown, _ = run(capsys, *words, "--row", "it", "--row", "-1")
    assert code == 0
    page = json.loads(where.read_text("utf-8"))
    assert page["rows"][0]["token"] == "it"
    assert page["rows"][1]["positions"] == [len(page["tokens"]) - 1]
    assert len(page["clicked"]) == len(page["tokens"])
    assert "looks at" in shown
    for given, said in (("dog", "does not hold 'dog'"), ("99", "out of range")):
        code, _, err = run(capsys, *words, "--row", given)
        assert code == 2 and said in err
