"""RULER: prompts that hold their answers, lengths, scores, answers as the model's own."""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.lab.trials import ruler
from regard.lab.trials.configurations import read
from regard.lab.trials.frame import run
from regard.lab.trials.ruler import TASKS, answer, batches, fit, names, recall
from regard.lab.trials.ruler_tasks import QUESTIONS, Puzzle, _cut, _passages
from regard.zoo.tiny import tiny

from .words import Words

WIDE = 100_003  # so many ids that no two words share one


def _puzzle(task: str, number: int = 0, seed: int = 0) -> Puzzle:
    return TASKS[task](random.Random(f"{seed}/{task}/{number}"), number)


@pytest.mark.parametrize("task", list(TASKS))
def test_puzzles(task: str) -> None:
    """The same for the same seed, longer for more filling, and the answers lie in the prompt."""
    for number in range(12):
        one, again, other = (_puzzle(task, number, seed) for seed in (0, 0, 1))
        assert one.answers == again.answers and one.prefix == again.prefix
        for size in (0, 1, 57, 300):
            text = one.prompt(size)
            assert text == again.prompt(size)
            # without other passages there is nothing to draw
            assert text != other.prompt(size) or (task == "passage-qa" and size < 2)
            assert all(a in text for a in one.answers)
            assert not any(a in one.prefix for a in one.answers)
        assert len(one.prompt(300)) > len(one.prompt(57)) > len(one.prompt(0))
        assert len(set(one.answers)) == len(one.answers) > 0
    assert len({_puzzle(task, n).prompt(40) for n in range(12)}) == 12


def test_the_answer_follows_from_the_prompt() -> None:
    """A reader who knows the rule of a task finds the answers in the prompt alone."""
    for number in range(8):
        for task in ("single-noise", "single-text", "multi-key", "multi-value", "multi-query"):
            puzzle = _puzzle(task, number)
            text = puzzle.prompt(200)
            found = re.findall(r"magic numbers for (\S+) is: (\d{7})\.", text)
            asked = set(re.findall(r"[a-z]+-[a-z]+", text.rsplit("\n", 1)[1]))
            assert {v for k, v in found if k in asked} == set(puzzle.answers)
            assert len(found) == {"single": 1, "multi": 4}[task.split("-")[0]]
        text = _puzzle("variable-tracking", number).prompt(200)
        holds = set(re.findall(r"VAR (\w+) = \d{5}\.", text))
        for new, old in re.findall(r"VAR (\w+) = VAR (\w+)\.", text):
            assert old in holds  # the chain reads from front to back
            holds.add(new)
        assert holds == set(_puzzle("variable-tracking", number).answers) and len(holds) == 5
        common = _puzzle("common-words", number)
        listed = Counter(re.findall(r"\d+\. (\w+)", common.prompt(90)))
        assert {w for w, n in listed.most_common(5)} == set(common.answers)
        assert listed.most_common(6)[4][1] == 10 and listed.most_common(6)[5][1] == 1
        for size in (0, 13, 200):
            coded = _puzzle("frequent-words", number)
            words = coded.prompt(size).split("coded words. ")[1].split("\n")[0].split()
            top = Counter(words).most_common(5)
            assert top[0][0] == "...." and [w for w, _ in top[1:4]] == list(coded.answers)
            assert top[3][1] > top[4][1]


def test_questions_have_one_passage() -> None:
    for number, (_, right, mark) in enumerate(QUESTIONS):
        assert sum(mark in p for p in _passages()) == 1
        text = _puzzle("passage-qa", number).prompt(400)
        holding = [p for p in text.split("Document ") if right in p]
        assert len(holding) == 1 and mark in holding[0] and text.count("Document ") > 3


def test_cut() -> None:
    assert _cut(["a b c", "d e"], 4) == ["a b c", "d"]
    assert _cut(["a b"], 5) == ["a b", "a b", "a"] and _cut(["a"], 0) == []


@pytest.mark.parametrize("task", list(TASKS))
def test_prompts_fill_the_length(task: str) -> None:
    model, tokenizer = tiny("llama"), Words()
    for length in (300, 511):
        for batch in batches(model, tokenizer, [task], length=length, examples=3):
            rooms = [ruler._room(_puzzle(task, n), tokenizer) for n in range(3)]
            prompt = batch.tokens + 1 + max(rooms)
            assert prompt <= length and length - prompt < 20
    found = batches(model, tokenizer, [task], length=300, examples=3, batch_size=1)
    assert sorted(b.numbers for b in found) == [(0,), (1,), (2,)]


def test_chat_template() -> None:
    class Chat(Words):
        chat_template: str | None = "yes"

        def apply_chat_template(self, turns: list[dict[str, str]], **how: Any) -> str:
            assert how["add_generation_prompt"] and not how["tokenize"]
            return f"<user> {turns[0]['content']} <assistant> "

    tokenizer, puzzle = Chat(WIDE), _puzzle("single-noise")
    text = tokenizer.decode(fit(puzzle, tokenizer, 200)[0].tolist())
    assert text.startswith("< user > A special") and "< assistant > The special" in text
    plain = tokenizer.decode(fit(puzzle, tokenizer, 200, chat=False)[0].tolist())
    assert plain.startswith("A special") and plain.endswith("provided text is")


@pytest.mark.parametrize("task", ["multi-key", "passage-qa"])
def test_answers_are_those_of_generate(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    whole: list[torch.Tensor] = []
    plain = ruler._batch

    def seen(*args: Any) -> Any:
        whole.extend(args[2])
        return plain(*args)

    monkeypatch.setattr(ruler, "_batch", seen)
    own = batches(model, Words(), [task], length=300, examples=3)
    found = run(model, read(""), own, show=False).values["full"][task]
    order = [n for b in own for n in b.numbers]
    for n, ids in zip(order, whole):
        tokenizer = Words()
        room = ruler._room(_puzzle(task, n), tokenizer)
        out = model.generate(ids[None], attention_mask=torch.ones_like(ids)[None],
                             max_new_tokens=room, do_sample=False)  # fmt: skip
        tokenizer(_puzzle(task, n).prompt(999))
        assert out.shape[1] - len(ids) == room
        assert len(found[n]["said"].split()) == room
        assert found[n]["recall"] == recall(found[n]["said"], _puzzle(task, n).answers)
        assert found[n]["answers"] == list(_puzzle(task, n).answers)


def test_an_answer_ends_at_an_end_token() -> None:
    from regard.lab.trials.frame import prefill

    model, ids = tiny("llama"), torch.tensor([[5, 9, 33, 60, 7], [8, 8, 70, 41, 3]])
    with torch.no_grad():
        said = answer(model, prefill(model, ids[:, :-1]), ids[:, -1:], 9)
        assert [len(row) for row in said] == [9, 9]
        for n, row in enumerate(said):
            out = model.generate(ids[n : n + 1], attention_mask=torch.ones(1, 5, dtype=torch.long),
                                 max_new_tokens=9, do_sample=False, eos_token_id=None)  # fmt: skip
            assert out[0, 5:].tolist() == row
        end = said[0][3]
        cut = answer(model, prefill(model, ids[:, :-1]), ids[:, -1:], 9, [end])
    assert cut[0] == said[0][: said[0].index(end)]
    assert cut[1] == (said[1][: said[1].index(end)] if end in said[1] else said[1])


def test_recall() -> None:
    assert recall("The WORDS: a, b", ["A", "words", "x", "y"]) == 0.5
    assert recall("", ["x"]) == 0.0 and recall("x", ["x"]) == 1.0


def test_mistakes() -> None:
    model, tokenizer = tiny("llama"), Words()
    assert names("all") == list(TASKS) and names(" multi-key,multi-key ") == ["multi-key"]
    with pytest.raises(InputError, match="Did you mean 'multi-key'"):
        names("multikey")
    with pytest.raises(InputError, match="name at least one task"):
        names(" , ")
    with pytest.raises(InputError, match=r"the task multi-query needs \d+ tokens more"):
        batches(model, tokenizer, ["multi-query"], length=60)
    with pytest.raises(InputError, match="5000 tokens are needed"):
        batches(model, tokenizer, ["multi-query"], length=5000)
    with pytest.raises(InputError, match="examples is at least 1"):
        batches(model, tokenizer, ["multi-query"], examples=0)
    with pytest.raises(InputError, match="finds no tokens"):
        fit(Puzzle(lambda size: "a", "b", ("c",)), tokenizer, 50)


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_finds_a_needle(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    own = batches(model, tokenizer, ["single-noise"], length=256, examples=4)
    found = run(model, read("streaming-llm:ratio=0.1"), own, show=False).values
    full = [v["recall"] for v in found["full"]["single-noise"].values()]
    cut = [v["recall"] for v in found["streaming-llm:ratio=0.1"]["single-noise"].values()]
    assert sum(full) >= 3 and sum(cut) < sum(full)
