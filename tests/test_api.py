"""What a person types in Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import regard
from regard.core import Influence, Mass, Received, Rows, Thumbnail, TopKeys
from regard.errors import InputError, NeedsMatrix, ReachError
from regard.report.words import headline
from regard.watching.overview import overview
from regard.watching.tokens import pieces
from regard.zoo.tiny import inputs, tiny

IDS = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
ALL = [
    "mean_received",
    "received",
    "entropy",
    "distance",
    "waad",
    "influence",
    "collision",
    "max_logit",
    "lse",
    "thumbnail",
]


def seen_of(family: str = "llama", facts: list[object] | None = None) -> regard.Watch:
    model = tiny(family)
    with torch.no_grad(), regard.watch(model, facts or ALL) as seen:
        model(IDS)
    return seen


def test_three_lines() -> None:
    model = tiny("llama")
    with torch.no_grad(), regard.watch(model, facts=["received", "entropy", "distance"]) as seen:
        model(IDS)
    assert list(seen["received"]) == [0, 1]
    assert seen["received"][1].shape == (2, 4, 40)
    assert seen["received"][1].dtype == torch.float32
    assert list(seen) == ["received", "entropy", "distance"]
    assert torch.allclose(seen["received"][0].sum(-1), torch.full((2, 4), 40.0), atol=1e-3)


def test_layers_and_heads() -> None:
    model = tiny("qwen3")
    with torch.no_grad():
        with regard.watch(model, ["received", "entropy"]) as whole:
            model(IDS)
        with regard.watch(model, ["received", "entropy"], layers=[1], heads=[3, 0]) as some:
            model(IDS)
    assert list(some["received"]) == [1]
    for fact in ("received", "entropy"):
        torch.testing.assert_close(some[fact][1], whole[fact][1][:, [3, 0]], rtol=1e-5, atol=1e-6)


def test_table_prints_itself() -> None:
    table = seen_of(facts=["entropy", "thumbnail"]).table()
    assert [row["layer"] for row in table] == [0, 1] and set(table[0]) == {"layer", "entropy"}
    assert repr(table).splitlines()[0].split() == ["layer", "entropy"]
    assert table._repr_html_().count("<tr>") == 3


def test_settings_by_object() -> None:
    spans = {"first": (0, 10), "second": (10, 40)}
    seen = seen_of(facts=[Influence(band=(5, 20)), Mass(spans), TopKeys(3), Thumbnail(8)])
    assert torch.allclose(seen["mass"][0].sum(-1), torch.ones(2, 4, 40), atol=1e-5)
    values, keys = seen["top"][0]
    assert values.shape == keys.shape == (2, 4, 1, 3)
    assert seen["thumbnail"][0].shape == (2, 4, 5, 5)
    assert torch.allclose(seen["thumbnail"][0].sum(-1), torch.ones(2, 4, 5), atol=1e-5)
    assert seen[Influence(band=(5, 20))][0].shape == (2, 4, 40)


def test_parts_of_a_model_with_several_stacks() -> None:
    model = tiny("whisper")
    with torch.no_grad(), regard.watch(model, ["received", "distance"]) as seen:
        model(**inputs("whisper", model))
    assert seen.parts == [
        "model.encoder.layers",
        "model.decoder.layers",
        "model.decoder.layers cross",
    ]
    assert seen.main == "model.decoder.layers"
    cross = seen["received"]["model.decoder.layers cross"][0]
    assert cross.shape[-1] == seen["received"]["model.encoder.layers"][0].shape[-1]
    with pytest.raises(KeyError, match="no part"):
        seen["distance"]["model.decoder.layers cross"]  # distance between texts means nothing
    with pytest.raises(InputError, match="no part 'decoder'"):
        regard.watch(model, part="decoder")


def test_attach_and_detach_in_a_notebook() -> None:
    model = tiny("llama")
    hooks = len(model._forward_hooks)
    seen = regard.watch(model).attach()
    model(IDS)
    seen.detach()
    assert len(model._forward_hooks) == hooks
    assert seen["entropy"][0].shape == (2, 4, 40)


def test_generation_and_its_text() -> None:
    model = tiny("llama")
    with torch.no_grad(), regard.watch(model, ["received"]) as seen:
        text = model.generate(IDS, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(seen.input_ids, text[:, :-1])
    assert seen["received"][0].shape[-1] == 44


@pytest.mark.parametrize(
    "facts, error, message",
    [
        (["recieved"], InputError, "Did you mean 'received'"),
        (["attentions"], NeedsMatrix, "thumbnail"),
        ([], InputError, "at least one fact"),
        (["mass"], InputError, "segments"),
        ([3], InputError, "3 is no fact"),
        (3, InputError, "3 is no fact"),
        ([Received], InputError, "is no fact"),
        (["attentions"], NeedsMatrix, "the 8 heads of this model 0.5 GiB at 4k tokens, 8 GiB"),
    ],
)
def test_wrong_facts(facts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        regard.watch(tiny("llama"), facts)


def test_wrong_layers_heads_and_models() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="layer 7 is out of range: this model has layers 0 to 1"):
        regard.watch(model, layers=[7])
    with pytest.raises(InputError, match="head 4 is out of range: this model has 4 heads"):
        regard.watch(model, heads=[4])
    with pytest.raises(ReachError, match="not a transformers model"):
        regard.watch(object())
    seen = regard.watch(model)
    for result in (lambda: seen["received"], seen.table, lambda: overview(seen)):
        with pytest.raises(InputError, match="run the model"):
            result()
    with pytest.raises(KeyError, match="was not watched"):
        seen["distance"]


@pytest.mark.parametrize("name", ["layers", "heads"])
@pytest.mark.parametrize("given", [[], 1, "1", [0.5]])
def test_layers_and_heads_are_lists_of_numbers(name: str, given: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is a list of numbers"):
        regard.watch(tiny("llama"), **{name: given})


def test_layers_and_heads_may_be_arrays() -> None:
    model = tiny("llama")
    with (
        torch.no_grad(),
        regard.watch(
            model, ["entropy"], layers=numpy.array([1]), heads=torch.tensor([0, 1])
        ) as seen,
    ):
        model(IDS)
    assert list(seen["entropy"]) == [1] and seen["entropy"][1].shape == (2, 2, 40)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_reads_as_the_row_alone(side: str) -> None:
    model = tiny("llama")
    live = torch.ones_like(IDS)
    live[0, slice(0, 12) if side == "left" else slice(28, 40)] = 0
    where = live[0].nonzero()[:, 0]
    places = (live.cumsum(-1) - 1).clamp_min(0)
    facts = [*ALL, "top" if side == "left" else "rows"]  # the last query, the first one
    with torch.no_grad():
        with regard.watch(model, facts) as padded:
            model(IDS, attention_mask=live, position_ids=places)
        with regard.watch(model, facts) as alone:
            model(IDS[:1, where])
        with regard.watch(model, ALL) as half:
            model(IDS[:1], attention_mask=live[:1], position_ids=places[:1])
    one, other = (overview(s) for s in (padded, alone))
    assert one["tokens"] == other["tokens"] == [f"‹{n}›" for n in IDS[0, where].tolist()]
    assert one.keys() == other.keys() and one["views"].keys() == other["views"].keys()
    for name in one.keys() - {"meta", "tokens"}:
        assert _near(one[name], other[name]), name
    for mine, its in zip(half.table(), alone.table()):
        assert mine == pytest.approx({n: its[n] for n in mine}, abs=1e-5)
    names = [f"w{n}" for n in range(40)]
    assert overview(padded, tokens=names)["tokens"] == [names[n] for n in where]
    with pytest.raises(InputError, match="row 2 is out of range"):
        overview(padded, row=2)


def _near(a: Any, b: Any) -> bool:
    """Equal but for rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_near(a[n], b[n]) for n in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_near, a, b))
    return a == (pytest.approx(b, abs=1e-4) if isinstance(b, float) else b)


def test_tokens_that_are_not_known_are_numbers(tmp_path: Path) -> None:
    model = tiny("llama")
    embedded = model.get_input_embeddings()(IDS[:1, :12])
    known = [f"‹{n}›" for n in IDS[0, 12:15].tolist()]
    with torch.no_grad(), regard.watch(model, ALL) as seen:
        model(IDS[:1])
        model(inputs_embeds=embedded)  # another text
        assert overview(seen)["tokens"] == [str(n) for n in range(12)]
        model.generate(inputs_embeds=embedded, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert overview(seen)["tokens"][:12] == [str(n) for n in range(12)]
    assert len(overview(seen)["tokens"]) == 15
    with torch.no_grad():
        cache = model(IDS[:1, :12], use_cache=True).past_key_values
        with regard.watch(model, ALL) as late:
            model(IDS[:1, 12:15], past_key_values=cache)
    page = overview(late)
    assert page["tokens"] == [*(str(n) for n in range(12)), *known]
    assert page["views"]["entropy"]["values"][:12] == [None] * 12
    assert late.report(tmp_path / "page.html").stat().st_size > 0


def test_every_watched_fact_is_in_the_overview_and_on_the_page(tmp_path: Path) -> None:
    spans = {"first": (0, 10), "second": (10, 40)}
    facts = [*(n for n in regard.facts() if n != "mass"), Mass(spans)]
    for fact in facts:
        seen = seen_of(facts=[fact])
        page = overview(seen)
        name = fact if isinstance(fact, str) else fact.name
        assert [f["name"] for f in page["facts"]] == [name]
        assert json.loads(json.dumps(page, allow_nan=False)) == page
        assert page["views"] or page["thumbnails"]
        assert all(len(v["values"]) == 40 for v in page["views"].values())
        assert seen.report(tmp_path / "page.html").stat().st_size > 0
    found = {f["name"]: f for f in overview(seen_of(facts=["received", "columns"]))["facts"]}
    assert torch.tensor(found["received"]["values"]).shape == (2, 4, 40)
    assert found["columns"]["settings"] == {"keys": [0]}


def test_a_long_fact_is_told_by_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regard.watching.overview.LISTED", 100)
    seen = seen_of(facts=["received"])
    block = overview(seen)["facts"][0]
    assert "values" not in block
    mean = (seen["received"][0][0] + seen["received"][1][0]).mean(0) / 2
    assert torch.allclose(torch.tensor(block["mean"]), mean, atol=1e-5)


def test_top_keys_are_a_view_of_the_tokens_they_are() -> None:
    seen = seen_of(facts=[TopKeys(40)])
    dense = seen_of(facts=[Rows((39,))])
    row = torch.stack([dense["rows"][n][0] for n in (0, 1)]).mean((0, 1))[0]
    assert torch.allclose(torch.tensor(overview(seen)["views"]["top"]["values"]), row, atol=1e-5)


class Bytes:
    """A tokenizer of one token a byte, which keeps how much it was asked to decode."""

    asked = 0

    def decode(self, ids: list[int]) -> str:
        self.asked += len(ids)
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize(
    "text, said",
    [
        ("aé 日!", ["a", "", "é", " ", "", "", "日", "!"]),
        ("😀x", ["", "", "", "😀", "x"]),
        ("aé", ["a", "", "é"]),
    ],
)
def test_a_character_of_several_tokens_is_whole(text: str, said: list[str]) -> None:
    assert pieces(Bytes(), list(text.encode())) == said


def test_bytes_that_are_no_character() -> None:
    tokenizer = Bytes()
    assert pieces(tokenizer, [97, 0xE6, 0x97]) == ["a", "\ufffd", "\ufffd"]
    assert pieces(tokenizer, [0xFF] * 900 + [97])[-1] == "\ufffd" * 4 + "a"
    assert tokenizer.asked < 8000  # in time linear in the tokens


def test_a_share_of_heads_is_of_those_watched() -> None:
    model = tiny("llama")
    with torch.no_grad(), regard.watch(model, ALL, layers=[1], heads=[0]) as seen:
        model(IDS)
    assert "of the watched heads" in headline(overview(seen))[0][1]
    assert "of all heads" in headline(overview(seen_of()))[0][1]


def test_overview_is_plain_json_and_complete() -> None:
    page = overview(seen_of())
    assert json.loads(json.dumps(page, allow_nan=False)) == page
    blocks = (
        "meta",
        "tokens",
        "views",
        "marks",
        "sinks",
        "by_position",
        "heads",
        "rhythm",
        "thumbnails",
    )
    assert all(page.get(b) for b in blocks)
    assert len(page["tokens"]) == 40
    assert all(len(v["values"]) == 40 for v in page["views"].values())
    assert len(page["sinks"]["alpha"]) == 2 and len(page["sinks"]["alpha"][0]) == 4
    assert len({(t["layer"], t["head"]) for t in page["thumbnails"]}) == 6


def test_overview_of_one_head_and_of_one_token() -> None:
    model = tiny("llama")
    with torch.no_grad():
        with regard.watch(model, ALL, layers=[0], heads=[1]) as one:
            model(IDS)
        with regard.watch(model, ALL) as word:
            model(IDS[:, :1])
    assert "rhythm" not in overview(one) and overview(one)["heads"]["local"] == []
    assert "sinks" not in overview(word) and len(overview(word)["tokens"]) == 1


def test_overview_leaves_out_what_was_not_watched() -> None:
    page = overview(seen_of(facts=["entropy"]))
    assert "sinks" not in page and "rhythm" not in page
    assert list(page["views"]) == ["entropy"]


@pytest.mark.parametrize("family", ["bert", "vit", "whisper", "llava", "mistral"])
def test_every_family_has_a_page(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    with torch.no_grad(), regard.watch(model, ALL) as seen:
        model(**inputs(family, model))
    page = seen.report(tmp_path / "page.html")
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert seen.table()[0]["layer"] == 0


def test_report_without_permission_writes_nothing(tmp_path: Path) -> None:
    seen = seen_of()
    with pytest.raises(InputError, match="does not exist: create it first"):
        seen.report(tmp_path / "missing" / "page.html")
    with pytest.raises(InputError, match="is a folder"):
        seen.report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_encoder_has_no_rhythm_of_generation() -> None:
    model = tiny("bert")
    with torch.no_grad(), regard.watch(model, ALL) as seen:
        model(torch.randint(3, 100, (1, 40)))
    page = overview(seen)
    assert "rhythm" not in page and not page["marks"]["anchor"]


def test_importing_regard_is_cheap() -> None:
    """Under 0.3 s, and without torch, transformers, diffusers or plotly."""
    code = (
        "import sys, time; a = time.perf_counter(); import regard; b = time.perf_counter();"
        "names = {'torch', 'transformers', 'diffusers', 'plotly', 'numpy', 'rich', 'typer'};"
        "heavy = names & set(sys.modules);"
        "print(b - a, sorted(heavy))"
    )
    best = 9.0
    for _ in range(3):
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        seconds, heavy = out.stdout.split(" ", 1)
        assert heavy.strip() == "[]"
        best = min(best, float(seconds))
    assert best < 0.3


def test_watching_does_not_change_what_the_model_computes() -> None:
    model = tiny("llama")
    with torch.no_grad():
        plain = model(IDS).logits
        with regard.watch(model, ALL):
            watched = model(IDS).logits
        with regard.watch(model, ALL, exact_outputs=True):
            assert torch.equal(model(IDS).logits, plain)
        assert torch.equal(model(IDS).logits, plain)
    assert (plain - watched).abs().max() <= 2e-6 * plain.abs().max()


def test_received_by_name_and_by_object_are_the_same() -> None:
    seen = seen_of(facts=["received"])
    assert torch.equal(seen["received"][0], seen[Received()][0])


def test_a_cross_attention_has_a_page_of_its_keys(tmp_path: Path) -> None:
    model = tiny("whisper")
    part = "model.decoder.layers cross"
    with torch.no_grad(), regard.watch(model, ["received", "entropy"], part=part) as seen:
        model(**inputs("whisper", model))
    page = overview(seen)
    assert page["tokens"] == [str(n) for n in range(seen["received"][0].shape[-1])]
    assert list(page["views"]) == ["received"]  # the queries are of the other text
    assert page["views"]["received"]["label"] == "attention received, summed"
    assert seen.report(tmp_path / "page.html").stat().st_size > 0
