"""Memory follows what is looked at, not the file that it stands in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from regard import zoo
from regard.cli import main
from regard.cli.common import MARGIN, first_tokens, read_text
from regard.lab.bench import kernels, plan
from regard.lab.bench.cases import Case
from regard.zoo.tiny import tiny


class Letters:
    """One token a letter, and an end; knows how much it has read."""

    read = 0

    def __call__(self, text: str, **_: Any) -> Any:
        import torch

        self.read += len(text)
        ids = [3 + ord(c) % 90 for c in text] + [1]
        return type("Batch", (), {"input_ids": torch.tensor([ids])})

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)


def test_first_tokens_are_those_of_the_whole_text() -> None:
    text = "one two three " * 10_000
    whole = Letters()(text).input_ids[0].tolist()
    for most in (1, 20, 5000, len(whole), len(whole) + 1):
        letters = Letters()
        ids, total = first_tokens(letters, text, most)
        assert ids == whole[:most]
        assert total in (None, len(whole))
        assert letters.read <= 11 * (8 * most + 4096) + MARGIN
    assert first_tokens(Letters(), "a b", 9) == (Letters()("a b").input_ids[0].tolist(), 4)


@pytest.mark.parametrize("given", ["@book.txt", "-"])
def test_a_large_text_is_read_as_far_as_it_is_looked_at(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    book, letters = tmp_path / "book.txt", Letters()
    book.write_text("the cat sat on the mat\n" * 200_000, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "load", lambda name, **_: (tiny("llama"), letters))
    with book.open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        with pytest.raises(SystemExit) as end:
            main(["see", given, "--max-tokens", "64", "--facts", "entropy"])
        assert end.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "more than 64; only the first 64 were looked at" in said
        if given == "-":
            assert file.tell() < 100_000
    assert letters.read < 10_000
    assert len(read_text("@book.txt", 100)) == 100


def test_a_bench_beyond_its_memory_limit_builds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def built(self: Case) -> Any:
        raise AssertionError("tensors of a case that does not fit")

    monkeypatch.setattr(Case, "tensors", built)
    monkeypatch.setattr(Case, "mask", property(built))
    result = kernels.run(masks="full,block_sparse", lengths=[2**20], kernels="attend,naive",
                         memory_limit=4.0, progress=None)  # fmt: skip
    cells = [c for name, c in result.cells.items() if name != "machine"]
    assert len(cells) == 4 and {c.outcome for c in cells} == {"out of memory"}
    assert all(c.reason.startswith("predicted: q, k, v and out take 5.0 GiB") for c in cells)


@pytest.mark.parametrize("mask", plan.MASKS)
def test_a_plan_of_any_size_is_computed_at_once(mask: str) -> None:
    on = plan.machine("h100", "nvlink4:ib-ndr")
    for ranks in (1, 2**40, 2**40 - 87):
        estimates = plan.plan(ranks, 2**60, on, heads=(2**40, 1), mask=mask)
        assert len(estimates) == 5
    with pytest.raises(plan.InputError, match="ranks and heads are at most"):
        plan.plan(2**41, 2**60, on, mask=mask)
