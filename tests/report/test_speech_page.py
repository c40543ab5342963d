"""The page about a clip: whole, escaped, and complete where facts are missing."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("plotly")

from regard.parts.speech.cross_attention import CrossAttention
from regard.parts.speech.overview import overview
from regard.parts.speech.words import Word
from regard.report import speech as page

HOSTILE = ["<script>alert(1)</script>", "</script>", "a&b", "“<b>”"]


def seen(words: int = 6, frames: int = 900, timed: bool = True) -> CrossAttention:
    """Made-up facts of 3 layers and 4 heads, with hostile words."""
    torch.manual_seed(1)
    maps = {n: torch.rand(4, words, frames).softmax(-1) * 0.8 for n in range(3)}
    texts = [" " + (HOSTILE[n] if n < len(HOSTILE) else f"word{n}") for n in range(words)]
    step = 0.02 if timed else None
    made = CrossAttention(
        tokens=list(range(words)), pieces=texts, prompt=[1], frames=frames, all_frames=1500,
        seconds_per_frame=step, layers={n: m.mean(0) for n, m in maps.items()},
        aligned=torch.rand(2, words + 1, frames), entropy=torch.rand(3, 4, words),
        dropped=torch.full((3, 4, words), 0.2), centre=torch.rand(3, 4, words) * frames,
        received=torch.rand(3, 4, frames), alignment_heads=[(1, 0), (2, 3)], maps=maps,
    )  # fmt: skip
    nan = float("nan")
    made.words = [
        Word(t.strip(), n, n + 1, n if timed else nan, n + 1 if timed else nan)
        for n, t in enumerate(texts)
    ]
    return made


def view(**changes: Any) -> dict[str, Any]:
    truth = {"times": [[n + 0.25, n + 0.75] for n in range(6)]}
    made = overview(
        seen(), spectrogram=torch.rand(80, 1800), theirs=[n + 1.0 for n in range(6)], truth=truth,
        meta={"model": "tiny", "clip": "<i>.wav", "seconds": 18.0, "notes": ["resampled <b>"],
              "command": "regard see '<i>.wav'", "cost": {"Time": "1 s"}},
    )  # fmt: skip
    return {**made, **changes}


def data_of(html: str) -> dict[str, Any]:
    packed = re.search(r'id="data">([^<]+)</script>', html)
    assert packed
    found: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(packed.group(1))))
    return found


def test_the_page_is_whole_and_nothing_a_person_said_is_run(tmp_path: Path) -> None:
    html = page.render_page(view())
    assert html == page.render_page(view()) and "NaN" not in json.dumps(data_of(html))
    for name in ("map", "times", "heads", "single", "cost"):
        assert f'<section id="{name}"' in html
    plain = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert "<script>alert" not in plain and "&lt;script&gt;alert(1)" in plain
    assert "<i>.wav" not in plain and "resampled &lt;b&gt;" in plain
    assert "https://" not in re.sub(r"Content-Security.*", "", plain)
    labels = data_of(html)["figures"]["map"]["layout"]["yaxis"]["ticktext"]
    assert labels[0].startswith("&lt;script&gt;")
    path = page.write_page(view(), tmp_path / "out.html")
    assert path.read_text(encoding="utf-8") == html
    with pytest.raises(FileNotFoundError):
        page.write_page(view(), tmp_path / "nowhere" / "out.html")


def test_the_map_has_one_menu_entry_for_each_mean_and_shows_one_at_a_time() -> None:
    figure = page.listening_map(view())
    menu = figure.layout.updatemenus[0].buttons
    names = [b.label for b in menu]
    assert names == ["all heads and layers", "alignment heads", "layer 0", "layer 1", "layer 2"]
    heat = [i for i, t in enumerate(figure.data) if t.type == "heatmap" and t.coloraxis]
    for at, button in enumerate(menu):
        shown = button.args[0]["visible"]
        assert len(shown) == len(figure.data)
        assert [i for i in heat if shown[i]] == [heat[at]]
        assert all(on for i, on in enumerate(shown) if i not in heat)
    assert len(figure.data[heat[0]].z[0]) <= 600  # 900 frames are averaged in pairs
    assert figure.data[heat[0]].x[-1] < 18.0 < figure.data[heat[0]].x[-1] + 0.05


def test_the_numbers_of_the_overview_are_those_of_the_facts() -> None:
    facts = seen()
    made = view()
    coarse = facts.word_map().reshape(6, 450, 2).mean(-1)
    assert torch.allclose(torch.tensor(made["maps"]["all heads and layers"]), coarse, rtol=1e-3)
    word = made["words"][2]
    assert (word["start"], word["end"], word["theirs"]) == (2, 3, 3.0)
    assert made["errors"] == {"start": 0.25, "theirs": 0.75}
    row = facts.word_map()[2]
    assert word["centre"] == pytest.approx(
        float((row @ torch.arange(900.0)) / row.sum() + 0.5) * 0.02, rel=1e-4
    )
    order = [one["monotone"] for one in made["head_maps"]]
    assert order == sorted(order, reverse=True) and len(order) == 12
    assert {(m["layer"], m["head"]) for m in made["head_maps"] if m["alignment"]} == {
        (1, 0),
        (2, 3),
    }
    json.dumps(made, allow_nan=False)


def test_a_clip_without_times_or_pictures_still_makes_a_page() -> None:
    bare = seen(timed=False)
    bare.maps = None
    html = page.render_page(overview(bare, meta={"model": "tiny"}))
    assert '<section id="map"' in html and '<section id="single"' not in html
    assert "encoder steps" in json.dumps(data_of(html))
    words = overview(bare)["words"]
    assert all(w["start"] is None and w["peak"] is None for w in words)


def test_one_word_has_no_order_to_follow() -> None:
    said = page.cards(overview(seen(words=1)))
    assert said[0] == ("1 word", "in 1 token was heard.")
    assert not any("rank correlation" in words for _, words in said)
    assert any("rank correlation" in words for _, words in page.cards(view()))


def test_the_sound_is_drawn_in_ink_so_that_it_turns_with_the_theme() -> None:
    from regard.report.look import INKS

    sound = page.listening_map(view()).data[0]
    assert sound.colorscale[-1][1] == INKS["light"]["text"]
    assert sound.colorscale[0][1].endswith(",0)")  # nothing heard is the page itself
