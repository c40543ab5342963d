"""The decoding bench on a tiny model: rounds in turn, resuming, bytes, verdicts, the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchEncoding, DynamicCache

from regard.errors import InputError
from regard.lab.bench import decode, pages
from regard.lab.bench.record import load
from regard.parts.decoding.cache import held_bytes
from regard.shrink.recycled_attention.method import Recycled
from regard.zoo.tiny import tiny


class Words:
    def __call__(self, text: str, **_: Any) -> BatchEncoding:
        ids = [3 + sum(map(ord, w)) % 120 for w in text.split()[:400]]
        return BatchEncoding({"input_ids": torch.tensor([ids])})


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.zoo.load", lambda name, **_: (tiny("llama"), Words()))
    plain = decode._method

    def method(name: str) -> Any:
        return Recycled(budget=8, stride=4) if name == "task-kv" else plain(name)

    monkeypatch.setattr(decode, "_method", method)


def test_a_run_goes_on_and_makes_a_page(tmp_path: Path) -> None:
    path, said = tmp_path / "decode.json", list[str]()
    given: dict[str, Any] = {"context": 100, "out": path, "threads": 1, "progress": said.append}
    result = decode.run("tiny", rounds=2, **given)
    assert result.settings["prompt"] == 100 - 2 - 32 == 66
    assert said[-1].startswith("round 2 of 2: stock ")
    for name in decode.ROWS:
        assert len(result.cells[name].values["seconds"]) == 2
    row = 2 * 2 * 2 * 16 * 4  # layers, key and value, key heads, dim, bytes
    stock, recycled = (result.cells[n].values for n in ("stock", "recycled"))
    assert stock["bytes_prompt"] == 66 * row and stock["bytes_end"] == 99 * row
    assert recycled["bytes_prompt"] > stock["bytes_prompt"]
    assert recycled["entries"] == pytest.approx(sum(range(67, 100)) / 33, abs=0.05), "budget 1024"

    said.clear()
    saved = load(path)
    for cell in saved.cells.values():
        del cell.values["seconds"][1:]
    saved.save(path)
    again = decode.run("tiny", rounds=2, **given)
    assert said[-1].startswith("round 2 of 2") and not any(x.startswith("round 1") for x in said)
    assert again.cells["stock"].values["bytes_end"] == stock["bytes_end"]
    said.clear()
    decode.run("tiny", rounds=2, **given)
    assert not said, "nothing is left to do"

    pages.page("decode", path, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text == decode.markdown(load(path), path.as_posix())
    assert "Medians of 2 rounds" in text and "| stock transformers, sdpa |" in text
    with pytest.raises(InputError, match="another run"):
        decode.run("tiny", rounds=2, **{**given, "context": 90})


def test_all_ways_write_on_from_the_same_prompt() -> None:
    model = tiny("llama")
    model.generation_config.eos_token_id = None
    ids = torch.randint(3, 100, (1, 30))
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=21)
    for method in (None, Recycled(budget=200)):
        way = decode._Way(model, method, ids)
        way.write(4)
        way.write(16)
        assert torch.equal(way.ids, plain) and way.cache.get_seq_length() == 50


def test_a_way_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        if name == "task-kv":
            raise ImportError("no such method")
        return Recycled(budget=8) if name == "recycled" else None

    monkeypatch.setattr(decode, "_method", broken)
    result = decode.run("tiny", context=70, rounds=1, threads=1, progress=lambda line: None)
    assert [t["verdict"] for t in decode.judge(result)][1:] == ["not measured"] * 2
    assert "not measured: ImportError: no such method" in decode.markdown(result, "x.json")


def test_verdicts() -> None:
    result = decode.run("tiny", context=70, rounds=1, threads=1, progress=lambda line: None)
    for row, times in {
        "stock": [2.0, 2.2, 2.0],
        "recycled": [1.0, 1.1, 2.0],
        "task-kv": [1.6, 1.8, 1.0],
    }.items():
        result.cells[row].values.update(seconds=times, bytes_prompt=1000)
    result.cells["task-kv"].values["bytes_prompt"] = 408
    first, second, third = decode.judge(result)
    assert (first["verdict"], first["measured"]) == ("met", "2.00 (1.00 to 2.00)")
    assert (second["verdict"], second["measured"]) == ("missed", "1.25 (1.22 to 2.00)")
    assert (third["verdict"], third["measured"]) == ("met", "0.4080")
    result.cells["task-kv"].values["bytes_prompt"] = 409
    assert decode.judge(result)[2]["verdict"] == "missed"


def test_bytes_come_from_storage() -> None:
    cache = DynamicCache()
    whole = torch.zeros(1, 1, 10, 4)
    cache.update(whole[:, :, :2], whole[:, :, 2:4], 0)
    cache.layers[0].keys = whole[:, :, :2]
    cache.layers[0].values = whole[:, :, 2:4]
    assert held_bytes(cache) == 160, "views of one storage keep all of it"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 20}, "at least 16 tokens"),
        ({"rounds": 0}, "at least one"),
        ({"context": 5000}, "4096 positions"),
    ],
)
def test_what_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode.run("tiny", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["whisper", "t5"])
def test_an_encoder_decoder_is_refused(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    monkeypatch.setattr("regard.zoo.load", lambda name, **_: (tiny(family), Words()))
    with pytest.raises(InputError, match=f"{family} is an encoder-decoder: name a decoder"):
        decode.run(family)
