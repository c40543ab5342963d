"""The catalogue: complete, well formed, honest about what exists, and the page is up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from regard import catalog
from regard.catalog import VERBS, Method, as_markdown, methods

ROOT = Path(__file__).resolve().parents[1]
SLUGS = [
    "act",
    "agent-attention",
    "cross-attention-explanation",
    "cross-tune",
    "deconstructed-attention",
    "dynamic-prompt-learning",
    "graph-attention",
    "localist",
    "longca-bench",
    "mma",
    "mosaic",
    "pixel-linguist",
    "pka",
    "pooling",
    "preplan-anchor",
    "recycled-attention",
    "refam",
    "sink-emergence",
    "st-link",
    "stable-semantics",
    "steer",
    "structured-diffusion",
    "swap-anything",
    "swap-planning",
    "task-kv",
    "var",
    "visiondrop",
]


def row(slug: str, verb: str = "see") -> Method:
    return Method(
        slug, "Name", verb, "does it", ("causal LM",), "Title", "A et al.", 2024, "2401.1"
    )


def test_every_card_has_one_row() -> None:
    assert len(SLUGS) == 27
    assert sorted(m.slug for m in methods()) == SLUGS


@pytest.mark.parametrize("method", methods(), ids=lambda m: m.slug)
def test_row_is_well_formed(method: Method) -> None:
    assert method.verb in VERBS
    assert method.families and all(method.families)
    assert method.title and method.authors and method.name
    # The first two digits of an arXiv id are the year of its first version.
    found = re.fullmatch(r"(\d\d)(0[1-9]|1[0-2])\.\d{5}", method.arxiv)
    assert found and 2000 + int(found[1]) == method.year
    assert "|" not in method.what + method.title  # would break the table


def test_arxiv_ids_and_names_are_distinct() -> None:
    assert len({m.arxiv for m in methods()}) == len({m.name for m in methods()}) == 27


def test_status_follows_what_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert row("no-such-method").status == "planned"
    assert row("anything", verb="noverb").status == "planned"  # the package itself is missing
    import regard.zoo

    (tmp_path / "brand_new.py").touch()
    monkeypatch.setattr(regard.zoo, "__path__", [str(tmp_path)])
    assert row("brand-new", verb="zoo").status == "available"


def test_what_was_measured_is_there() -> None:
    assert [m.slug for m in methods() if m.reproduction != "-" and m.status == "planned"] == []


def test_reproduction_is_read_from_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "regard"
    package.mkdir(parents=True)
    (tmp_path / "reproductions").mkdir()
    (tmp_path / "reproductions" / "some.json").write_text(
        '{"claims": [{"verdict": "not reproduced"}, {"verdict": "reproduced"}]}'
    )
    monkeypatch.setattr(catalog, "__file__", str(package / "catalog.py"))
    assert row("some").reproduction == "1 reproduced, 1 not reproduced"
    assert row("other").reproduction == "-"


def test_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "methods.md"
    if not page.is_file():
        pytest.skip("docs/ is not here: this is an installed package, not a clone")
    assert page.read_text(encoding="utf-8") == as_markdown(), "run `make docs`"


def test_readme_is_up_to_date() -> None:
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("README.md is not here: this is an installed package, not a clone")
    text = readme.read_text(encoding="utf-8")
    assert catalog.MARKS[0] in text and catalog.into_readme(text) == text, "run `make docs`"


def test_main_writes_or_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert catalog.main([str(tmp_path / "m.md")]) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["m.md"]
    assert (tmp_path / "m.md").read_text(encoding="utf-8") == as_markdown()
    assert catalog.main([str(tmp_path / "missing" / "m.md")]) == 2
    assert "Cannot write" in capsys.readouterr().err
    assert catalog.main([]) == 0
    assert capsys.readouterr().out == as_markdown()
