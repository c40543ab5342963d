"""What a person types in Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import regard
from regard.core import Influence, Mass, Received, Thumbnail, TopKeys
from regard.errors import InputError, NeedsMatrix, ReachError
from regard.see.overview import overview
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
        assert torch.equal(some[fact][1], whole[fact][1][:, [3, 0]])


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
    ],
)
def test_wrong_facts(facts: list[str], error: type[Exception], message: str) -> None:
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
    with pytest.raises(RuntimeError, match="run the model"):
        seen["received"]
    with pytest.raises(KeyError, match="was not watched"):
        seen["distance"]


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
    with pytest.raises(OSError):
        seen.report(tmp_path / "missing" / "page.html")
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
        assert torch.equal(model(IDS).logits, plain)
    assert torch.allclose(plain, watched, atol=1e-6)


def test_received_by_name_and_by_object_are_the_same() -> None:
    seen = seen_of(facts=["received"])
    assert torch.equal(seen["received"][0], seen[Received()][0])
