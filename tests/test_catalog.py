"""The catalogue: found by cards, complete, and the source of everything that lists methods."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from textwrap import dedent

import pytest

import regard
from regard import catalog
from regard.cards import VERBS
from regard.catalog import Method, as_markdown, methods

from .cli.command import run

ROOT = Path(__file__).resolve().parents[1]
CATALOGUE = 27


def test_every_card_is_found() -> None:
    assert len(methods()) == CATALOGUE
    assert len({m.slug for m in catalog.everything()}) == len(catalog.everything())


@pytest.mark.parametrize("method", catalog.everything(), ids=lambda m: m.slug)
def test_card_is_well_formed(method: Method) -> None:
    assert method.verb in VERBS and method.package.startswith(f"regard.{method.verb}.")
    assert method.families and all(method.families)
    paper = method.paper
    assert paper.title and paper.authors and method.name
    # The first two digits of an arXiv id are the year of its first version.
    year = re.fullmatch(r"(\d\d)(0[1-9]|1[0-2])\.\d{5}", paper.arxiv)
    assert year and 2000 + int(year[1]) == paper.year
    assert "|" not in method.does + paper.title  # would break the table
    if method.status == "available":
        assert method.card.method is None or callable(method.run)


def test_arxiv_ids_and_names_are_distinct() -> None:
    assert len({m.paper.arxiv for m in methods()}) == len({m.name for m in methods()}) == CATALOGUE


def test_exports_can_be_imported() -> None:
    for name in catalog.exports():
        assert getattr(regard, name) is not None
        assert name in dir(regard)
    assert regard.shrink.TaskKV is regard.TaskKV
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        regard.Nothing  # noqa: B018


@pytest.mark.parametrize("name", ["errors", "bench", "trials", "reproduce", "lab", "parts"])
def test_packages_are_attributes(name: str) -> None:
    assert getattr(regard, name).__name__.startswith("regard.")


def test_what_was_measured_is_there() -> None:
    assert [m.slug for m in methods() if m.reproduction != "-" and m.status == "planned"] == []


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


def test_stub_is_up_to_date() -> None:
    stub = Path(regard.__file__).with_suffix(".pyi")
    assert stub.read_text(encoding="utf-8") == catalog.stub(), "run `make docs`"


def test_main_writes_or_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert catalog.main([str(tmp_path / "m.md")]) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["m.md"]
    assert (tmp_path / "m.md").read_text(encoding="utf-8") == as_markdown()
    assert catalog.main([str(tmp_path / "missing" / "m.md")]) == 2
    assert "Cannot write" in capsys.readouterr().err
    assert catalog.main([]) == 0
    assert capsys.readouterr().out == as_markdown()


# -- a method is one folder ------------------------------------------------------------------------
TOY = {
    "card.py": '''
        """The card of a toy."""

        from __future__ import annotations

        from dataclasses import dataclass

        from regard.cards import Card, Checked, Paper, setting

        CARD = Card(
            slug="toy-scale",
            name="Toy",
            verb="shrink",
            does="scale what attention puts out",
            paper=Paper("A toy", "Nobody et al.", 2026, "2601.00001"),
            families=("causal LM",),
            method="ToyScale",
            takes="text",
            neutral={"factor": 1.0},
            example={"factor": 0.5},
        )


        @dataclass(eq=False)
        class Settings(Checked):
            factor: float = setting(0.5, "what outputs are multiplied by", least=0, to=1)
    ''',
    "method.py": '''
        """Scale every output of attention."""

        from regard.core import State
        from regard.reach import Handler

        from .card import Settings


        class ToyScale(Settings, Handler):
            """Outputs times `factor`."""

            def after(self, call, state):
                return State(state.out * self.factor, state.lse) if self.factor < 1 else None

            def report(self):
                return {"factor": self.factor}
    ''',
    "view.py": """
        def tables(report):
            return [{"title": "Toy", "columns": ["factor"], "rows": [[report["factor"]]]}]
    """,
    "claims.py": '''
        """The claim of a toy."""

        from regard.lab.reproduce import Claim
        from regard.lab.reproduce.harness import Measured, verdict

        MODEL = None
        CLAIMS = [
            Claim("one", "one is one", "1", "reproduced if x = 1", lambda v: verdict(v["x"] == 1))
        ]


        def measure(setup):
            settled = CLAIMS[0].settle({"x": 1}, here="1", control="0")
            return Measured([settled], "no data", {}, {})
    ''',
}


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Method:
    """A method in a folder of its own, outside of the package."""
    folder = tmp_path / "toy_scale"
    folder.mkdir()
    for name, text in TOY.items():
        (folder / name).write_text(dedent(text).lstrip(), encoding="utf-8")
    shrink = regard.shrink
    monkeypatch.setattr(shrink, "__path__", [*shrink.__path__, str(tmp_path)])
    yield catalog.method("toy-scale")
    for module in [m for m in sys.modules if m.startswith("regard.shrink.toy_scale")]:
        del sys.modules[module]
    vars(shrink).pop("toy_scale", None)


def test_a_folder_is_all_it_takes(
    toy: Method, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert regard.ToyScale(factor=0.25).settings() == {"factor": 0.25}
    assert regard.shrink.ToyScale is regard.ToyScale
    assert "Toy (`toy-scale`)" in as_markdown()
    assert "toy-scale" in catalog.into_readme("".join(catalog.MARKS))
    code, out, _ = run(capsys, "methods", "shrink", "--json", "-")
    assert code == 0 and "toy-scale" in {m["slug"] for m in json.loads(out)}
    code, out, _ = run(capsys, "run", "toy-scale", "--help")
    assert code == 0 and "--factor" in out and "What outputs are multiplied by" in out
    code, _, err = run(capsys, "run", "toy-scale", "--prompt", "x", "--factor", "2")
    assert code == 2 and "factor is a number of at least 0 and at most 1, not 2.0" in err
    code, _, _ = run(capsys, "reproduce", "toy-scale", "--out", str(tmp_path / "results"))
    result = json.loads((tmp_path / "results" / "toy-scale.json").read_text("utf-8"))
    assert code == 0 and result["claims"][0]["verdict"] == "reproduced"
    from regard.lab.trials.configurations import read

    (_, configuration) = read("toy-scale:factor=0.25")
    assert configuration.handlers(10)[0].factor == 0.25


def test_a_toy_runs_beside_the_plain_model(
    toy: Method, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from .cli.command import stand_in

    stand_in(monkeypatch, 2)
    words = ["run", "toy-scale", "--prompt", "a b c d", "--tokens", "4"]
    code, out, _ = run(capsys, *words, "--json", "-")
    assert code == 0
    result = json.loads(out)
    assert result["report"] == {"factor": 0.5} and result["kl"] > 0
    code, out, _ = run(capsys, *words, "--factor", "1")
    assert code == 0 and "The answers are the same." in out
