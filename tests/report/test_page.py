"""The HTML page: small, self-contained, escaped, and never half-written."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")

from regard.report import render_page, write_page

PROSE = """the of and to a in that it was he she his her they were for with as but had not be at on
by which you have this from all so what would one there when them been who more no if their
elinor marianne sister mother house letter morning window answer silence garden"""
WORDS = PROSE.split()


def sample_overview(count: int, layers: int = 30, heads: int = 9, seed: int = 0) -> dict[str, Any]:
    """Make an overview shaped like a real one: sinks, a heavy tail, gaps, hostile tokens."""
    rng = random.Random(seed)
    tokens = [("" if i == 0 else " ") + rng.choice(WORDS) for i in range(count)]
    for i in range(9, count, 14):
        tokens[i] = rng.choice([".", ",", ";", ".\n", ".\n\n", '"', "?"])
    for i, odd in enumerate(
        ["<script>alert(1)</script>", "😀", "</script>", "\u2028", "", "\t", "&"]
    ):
        tokens[20 + 11 * i] = odd

    def tail(scale: float) -> list[float | None]:
        return [scale * rng.lognormvariate(0, 1.1) * (1 + 4 * (i % 37 == 5)) for i in range(count)]

    received = tail(0.8)
    received[0] = 0.55 * count
    entropy: list[float | None] = [
        abs(rng.gauss(2.2, 0.5)) * min(1, math.log1p(i) / 4) for i in range(count)
    ]
    entropy[3] = None
    waad = [abs(rng.gauss(4, 1.3)) * (1.6 if i % 17 == 0 else 1) for i in range(count)]
    fai: list[float | None] = [0.002 * rng.lognormvariate(0, 1) for _ in range(count)]
    fai[-10:] = [None] * 10
    waad[0] = 0.0

    def head_grid(low: float, high: float) -> list[list[float]]:
        return [
            [low + (high - low) * rng.random() ** 2 for _ in range(heads)] for _ in range(layers)
        ]

    alpha = [
        [min(0.98, rng.random() * (0.4 if layer < 4 else 1.3)) for _ in range(heads)]
        for layer in range(layers)
    ]
    bins = min(count, 512)
    mean = [0.8 + 3 * rng.random() for _ in range(bins)]
    mean[0] = 0.5 * count

    def cells(size: int, width: float) -> list[list[float]]:
        rows = []
        for i in range(size):
            row = [
                math.exp(-(i - j) / width) * rng.random() if j <= i else 0.0 for j in range(size)
            ]
            row[0] += 0.8
            rows.append([v / sum(row) for v in row])
        return rows

    size = min(64, count)
    rate = sum(a > 0.3 for row in alpha for a in row) / (layers * heads)
    return {
        "meta": {
            "title": "Sense and Sensibility, the opening",
            "model": "SmolLM2-135M-Instruct",
            "num_layers": layers,
            "num_heads": heads,
            "num_key_value_heads": 3,
            "num_tokens": count,
            "device": "cpu",
            "dtype": "float32",
            "seconds": 31.4,
            "plain_seconds": 24.9,
            "peak_mib": 1834.2,
            "facts": ["received", "entropy", "distance", "waad", "fai", "thumbnail"],
            "versions": {"regard": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
            "command": "regard see @sense.txt --max-tokens 8192 --html out.html && echo '<done>'",
            "notes": ["The text was cut at 8,192 tokens: the model has no more positions."],
        },
        "tokens": tokens,
        "views": {
            "received": {
                "label": "Received",
                "help": "How much attention all later tokens give this one, averaged over heads.",
                "unit": "tokens' worth",
                "values": received,
            },
            "received_without_sinks": {
                "label": "Received, without sinks",
                "help": "The same, leaving out heads that park on the first token.",
                "unit": "tokens' worth",
                "values": tail(0.5),
            },
            "entropy": {
                "label": "Entropy",
                "help": "How widely this token spreads its own attention.",
                "unit": "nats",
                "values": entropy,
            },
            "distance": {
                "label": "Distance",
                "help": "How far back this token looks on average.",
                "unit": "tokens",
                "values": [0.6 * i * rng.random() for i in range(count)],
            },
            "waad": {
                "label": "WAAD",
                "help": "Look-back in a window.",
                "unit": "tokens",
                "values": waad,
            },
            "fai": {
                "label": "FAI",
                "help": "Attention from later tokens.",
                "unit": "",
                "values": fai,
            },
        },
        "marks": {"preplan": list(range(0, count, 17)), "anchor": list(range(5, count - 10, 37))},
        "sinks": {
            "epsilon": 0.3,
            "position": 0,
            "alpha": alpha,
            "layers": list(range(layers)),
            "rate": rate,
            "hidden": [
                {"position": 42, "token": tokens[42], "heads": 5, "alpha": 0.41},
                {"position": 20, "token": "<script>alert(2)</script>", "heads": 2, "alpha": 0.33},
            ],
        },
        "by_position": {
            "position": [i * count // bins for i in range(bins)],
            "mean": mean,
            "median": [0.4 * m for m in mean],
            "p90": [2.1 * m for m in mean],
            "max": [9 * m * (1 + rng.random()) for m in mean],
        },
        "heads": {
            "entropy": head_grid(0.1, 5.2),
            "distance": head_grid(2, 0.5 * count),
            "layers": list(range(layers)),
            "local": [[2, 1], [3, 4], [6, 0], [11, 7]],
            "global": [[13, 2], [20, 8], [28, 3]],
        },
        "rhythm": {
            "position": list(range(count)),
            "waad": waad,
            "fai": fai,
            "window": 10,
            "horizon": [10, 50],
        },
        "thumbnails": [
            {
                "layer": 5 * k,
                "head": k,
                "label": ["most local", "most global", "strongest sink", "widest"][k % 4],
                "tokens_per_cell": max(1, count // 64),
                "cells": cells(size, 1.5 + 4 * k),
            }
            for k in range(6)
        ],
    }


def unpacked(page: str) -> dict[str, Any]:
    """Read back the block of data the page carries."""
    found = re.search(r'id="data">([^<]*)</script>', page)
    assert found
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found.group(1))))
    return data


@pytest.fixture(scope="module")
def page() -> str:
    return render_page(sample_overview(300))


@pytest.mark.parametrize(("count", "mib"), [(8_192, 2.5), (32_000, 4.5)], ids=["T8192", "T32000"])
def test_the_page_stays_small(count: int, mib: float) -> None:
    size = len(render_page(sample_overview(count)).encode())
    assert size <= mib * 1e6, f"{size / 1e6:.2f} MB for {count} tokens"


def test_nothing_is_fetched(page: str) -> None:
    links = re.findall(r"""(?:src|href|action|poster|data)\s*=\s*["']([^"']*)""", page)
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|https?://|\bfetch\(|XMLHttpRequest|WebSocket", page)
    assert "default-src 'none'" in page


def test_the_same_overview_gives_the_same_page(page: str) -> None:
    assert render_page(sample_overview(300)) == page
    assert render_page(sample_overview(300, seed=1)) != page


def test_what_a_user_wrote_is_escaped() -> None:
    overview = sample_overview(300)
    evil = "</title><script>alert('x')</script><img src=x onerror=alert(1)>\u2028"
    overview["meta"].update(title=evil, model=evil, command=evil, notes=[evil], facts=[evil])
    overview["meta"].update(versions={evil: evil}, device=evil, dtype=evil)
    for view in overview["views"].values():
        view.update(label=evil, help=evil, unit=evil)
    for thumb in overview["thumbnails"]:
        thumb["label"] = evil
    overview["tokens"][40] = evil
    overview["views"]["received"]["values"][40] = 1e6
    overview["sinks"]["hidden"][0]["token"] = evil
    page = render_page(overview)
    assert "<script>alert" not in page and "<img" not in page
    assert page.count("</script>") == 3  # the data, plotly, and the page's own code
    data = unpacked(page)
    assert data["tokens"][40] == evil
    hover = json.dumps(data["figures"]["rhythm"]["data"][0]["customdata"])
    assert "<script" not in hover and "&lt;script" in hover


def test_the_data_are_compact_and_keep_gaps(page: str) -> None:
    data = unpacked(page)
    entropy = next(v for v in data["views"] if v["name"] == "entropy")
    assert entropy["values"][3] is None
    assert all(len(f"{v:.10g}".replace(".", "").strip("0")) <= 3 for v in entropy["values"] if v)
    assert data["marks"]["anchor"][0] == 5


def test_not_a_number_becomes_a_gap() -> None:
    overview = sample_overview(120)
    overview["views"]["received"]["values"][7] = float("nan")
    overview["sinks"]["alpha"][0][0] = float("inf")
    overview["heads"]["entropy"][1][1] = None
    data = unpacked(render_page(overview))
    assert data["views"][0]["values"][7] is None
    assert data["figures"]["sinks"]["data"][0]["z"][0][0] is None


BLOCKS = ["views", "marks", "sinks", "by_position", "heads", "rhythm", "thumbnails"]


@pytest.mark.parametrize("how", ["missing", "none"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_missing_block_leaves_out_only_its_section(name: str, how: str) -> None:
    overview = sample_overview(150)
    if how == "missing":
        del overview[name]
    else:
        overview[name] = None
    sections = set(re.findall(r'<section id="(\w+)"', render_page(overview)))
    gone = {"views": "text", "by_position": "position", "thumbnails": "maps"}.get(name, name)
    everything = {"text", "sinks", "position", "heads", "rhythm", "maps", "cost"}
    assert sections == everything - {gone}


def test_a_bare_overview_is_still_a_page() -> None:
    page = render_page({"meta": {"title": "Nothing"}, "tokens": []})
    assert "<h1>Nothing</h1>" in page and 'id="plotly"' not in page and len(page) < 60_000
    assert "<section" not in page


def test_unknown_keys_are_ignored(page: str) -> None:
    overview = sample_overview(300) | {"parts": [{"name": "x"}], "later": object()}
    assert render_page(overview) == page


def test_the_headline_says_the_facts_in_words() -> None:
    overview = sample_overview(300)
    overview["sinks"]["rate"] = 0.77
    overview["heads"]["distance"] = [[100.0, 140.0]] * 30
    overview["tokens"][50], overview["views"]["received"]["values"][50] = " Elinor", 140.0
    page = render_page(overview)
    assert "<strong>77\u00a0%</strong>" in page and "attention on the first token" in page
    assert "<strong>120 tokens</strong>" in page
    assert "<strong>“Elinor”</strong>" in page and "at position 50" in page


def test_a_view_of_the_wrong_length_is_refused() -> None:
    overview = sample_overview(150)
    overview["views"]["entropy"]["values"].pop()
    with pytest.raises(ValueError, match="'entropy' has 149 values for 150 tokens"):
        render_page(overview)


def test_writing_leaves_one_file(tmp_path: Path, page: str) -> None:
    target = tmp_path / "out.html"
    assert write_page(sample_overview(300), target) == target
    assert target.read_text(encoding="utf-8") == page
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]


def test_links_are_followed_and_devices_written_to(tmp_path: Path) -> None:
    file, link = tmp_path / "page.html", tmp_path / "link.html"
    file.write_text("old")
    link.symlink_to(file)
    write_page({}, link)
    assert link.is_symlink() and file.read_text(encoding="utf-8") == render_page({})
    assert sorted(tmp_path.iterdir()) == [link, file]
    null = Path(os.devnull)
    assert write_page({}, null) == null and null.is_char_device()


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path: Path) -> None:
    overview = sample_overview(120)
    overview["tokens"][4] = overview["meta"]["title"] = "\ud83d"
    overview["sinks"]["hidden"][0]["token"] = "\ud83d"
    assert write_page(overview, tmp_path / "out.html").stat().st_size > 0


def test_a_missing_folder_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regard.report.page.render_page", lambda _: pytest.fail("work was done"))
    with pytest.raises(FileNotFoundError, match="does not exist: create it"):
        write_page({}, tmp_path / "no" / "out.html")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write_page({}, tmp_path)


def test_no_permission_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("regard.report.page.render_page", lambda _: pytest.fail("work was done"))
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="choose another folder"):
        write_page({}, tmp_path / "out.html")


def test_a_failure_keeps_the_old_file_and_leaves_no_draft(tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    target.write_text("old")
    overview = sample_overview(150)
    overview["views"]["entropy"]["values"].pop()
    with pytest.raises(ValueError, match="values for"):
        write_page(overview, target)
    assert target.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
