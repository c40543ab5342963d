"""Claims, verdicts, results on disk, interrupted runs, and the generated page."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from regard import catalog
from regard.catalog import methods, verdicts
from regard.errors import InputError
from regard.lab import reproduce
from regard.lab.intervals import bootstrap
from regard.lab.reproduce import harness
from regard.lab.reproduce.harness import Claim, Interval, Measured, Setup, verdict
from regard.report.contact import heat, sheet
from regard.see.refam.claims import referred
from regard.zoo import tiny
from regard.zoo.options import Loading
from regard.zoo.shipped import shipped


def claim(key: str = "grows", **changes: Any) -> Claim:
    made = Claim(
        key,
        "x grows",
        "+3 %",
        "reproduced if x > 1, partly if x > 0",
        lambda v: verdict(v["x"] > 1, v["x"] > 0),
    )
    return replace(made, **changes)


def large(**changes: Any) -> Claim:
    return replace(Claim("large", "at 8B", "9 %", "needs 8B", command="regard x"), **changes)


@pytest.mark.parametrize(
    ("x", "said"), [(2.0, "reproduced"), (1.0, "partly"), (0.0, "not reproduced")]
)
def test_the_rule_decides(x: float, said: str) -> None:
    assert claim().settle({"x": x}, here="", control="").verdict == said


def test_a_claim_cannot_be_settled_without_a_rule_or_a_number() -> None:
    with pytest.raises(ValueError, match="needs scale"):
        large().settle({}, here="", control="")
    with pytest.raises(ValueError, match="with which command"):
        claim().unmeasured()
    with pytest.raises(ValueError, match="NaN"):
        claim().settle({"x": math.nan}, here="", control="")
    with pytest.raises(ValueError, match="no verdict"):
        claim(judge=lambda v: "maybe").settle({"x": 1.0}, here="", control="")


def test_bootstrap() -> None:
    values = [float(n % 10) for n in range(400)]
    low, high = bootstrap(values)
    assert low < 4.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 2.872 / 20, rel=0.1)
    assert bootstrap(values) == (low, high)
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])


def test_write_text_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    harness.write_text(path, "one")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(harness.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        harness.write_text(path, "two")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot be written"):
        harness.write_text(tmp_path / "nowhere" / "a.json", "x")


class Fake(catalog.Method):
    """A method whose claims lie in a module made here."""

    def has(self, file: str) -> bool:
        return file == "claims"

    def load(self, file: str = "method") -> Any:
        return sys.modules["fake_method"]


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A method with one measurable claim, registered under the slug "fake"."""
    module = ModuleType("fake_method")
    module.CLAIMS = (claim(), large(built=False))  # type: ignore[attr-defined]
    module.calls = []  # type: ignore[attr-defined]

    def measure(setup: Setup) -> Measured:
        first = setup.journal.get("first", lambda: module.calls.append(1) or 2.0)
        if getattr(module, "breaks", False):
            raise KeyboardInterrupt
        settled = claim().settle(
            {"x": first},
            here="2 | 3",
            control="0 <b>",
            interval=Interval("bootstrap", 1.5, 2.5, 0.01),
            note="a note",
        )
        return Measured([settled], "Some data.", {"a": 0}, {})

    module.measure = measure  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_method", module)
    known = catalog.everything()
    card = replace(known[0].card, slug="fake")
    monkeypatch.setattr(catalog, "everything", lambda: [*known, Fake(card, "fake", Path())])
    return module


def run(out: Path, **changes: Any) -> harness.Result:
    return harness.run("fake", out=out, model=(tiny("llama"), None), progress=False, **changes)


def test_a_run_writes_what_it_found(method: ModuleType, tmp_path: Path) -> None:
    result = run(tmp_path)
    path = tmp_path / "fake.json"
    assert [p.name for p in tmp_path.iterdir()] == ["fake.json"]  # and forgot its parts
    plain = json.loads(path.read_text())
    assert harness.Result.from_dict(plain).as_dict() == plain == result.as_dict()
    assert plain["claims"][0]["verdict"] == "reproduced"
    assert plain["claims"][0]["interval"] == {
        "kind": "bootstrap",
        "low": 1.5,
        "high": 2.5,
        "p": 0.01,
    }
    assert plain["claims"][1]["verdict"] == "needs scale"
    assert {"python", "torch", "transformers", "regard"} <= set(plain["versions"])
    assert plain["device"].startswith("cpu (") and plain["device"].endswith("float32")
    assert plain["seconds"] >= 0 and len(plain["date"]) == 10
    assert verdicts(plain) == "1 reproduced, 1 needs scale"  # what `regard methods` prints
    assert reproduce.read(tmp_path) == [result]


def test_a_small_thing_keeps_its_color_in_a_picture() -> None:
    """A sheet of drawn scenes beside maps of many shades of one colour."""
    random = torch.Generator().manual_seed(0)
    maps = [heat(torch.rand(8, 8, generator=random), (64, 64)) for _ in range(6)]
    rows = [[referred(n).image, one] for n, one in enumerate(maps)]
    picture = sheet(rows, ["scene", "map"], [referred(n).text for n in range(6)]).convert("RGB")

    def off(few: Image.Image) -> int:
        return int(np.abs(np.asarray(few.convert("RGB"), int) - np.asarray(picture, int)).max())

    assert off(Image.open(io.BytesIO(harness._few_colors(picture)))) < 16 < off(picture.quantize())


def test_an_interrupted_run_goes_on(method: ModuleType, tmp_path: Path) -> None:
    method.breaks = True  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert reproduce.read(tmp_path) == []  # what is half done is no result
    method.breaks = False  # type: ignore[attr-defined]
    run(tmp_path)
    assert method.calls == [1]  # type: ignore[attr-defined]
    run(tmp_path)
    assert method.calls == [1, 1]  # type: ignore[attr-defined]


def test_a_run_does_not_go_on_with_other_weights(method: ModuleType, tmp_path: Path) -> None:
    method.breaks = True  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    method.breaks = False  # type: ignore[attr-defined]
    other = tiny("llama", seed=1)
    result = harness.run("fake", out=tmp_path, model=(other, None), progress=False)
    assert method.calls == [1, 1]  # type: ignore[attr-defined]
    assert result.weights == harness.weights_of(other) != harness.weights_of(tiny("llama"))


def test_a_quick_run_is_kept_apart(method: ModuleType, tmp_path: Path) -> None:
    assert (
        run(tmp_path, quick=True).command
        == "regard reproduce fake --model LlamaForCausalLM --quick"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["fake.quick.json"]
    assert reproduce.read(tmp_path) == []


def test_a_method_must_settle_what_it_stated(method: ModuleType, tmp_path: Path) -> None:
    method.CLAIMS = (claim(), claim("other"))  # type: ignore[attr-defined]
    method.measure = lambda setup: Measured([claim()], "", {}, {})  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not the claims it had stated"):
        run(tmp_path)
    assert not (tmp_path / "fake.json").exists()


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'sink-emergence'"):
        reproduce.run("sink-emergance", out=tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="cannot be made"):
        reproduce.run("sink-emergence", out=file / "x")


@pytest.mark.parametrize(
    "slug, model, why",
    [
        ("refam", "nosuchdir", "Choose from: shapes-dit, shapes-sd"),
        ("refam", "shapes-dt", "Did you mean 'shapes-dit'"),
        ("refam", "smollm2-135m", "name the folder of a diffusion pipeline"),
        ("act", "shapes-sd", "need a model such as smollm2-135m"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused(
    slug: str, model: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=why):
        reproduce.run(slug, model=model, out=tmp_path, progress=False)
    assert not [*tmp_path.iterdir()]


def test_the_page_is_the_same_every_time(method: ModuleType, tmp_path: Path) -> None:
    run(tmp_path)
    target = tmp_path / "page.md"
    first = reproduce.page(tmp_path, target).read_text()
    assert reproduce.page(tmp_path, target).read_text() == first
    row = next(line for line in first.splitlines() if line.startswith("| x grows"))
    cells = "+3 % | 2 \\| 3 | 0 &lt;b> | 1.5 to 2.5 (bootstrap), p = 0.01 | **reproduced**"
    assert row == f"| x grows | {cells} |"
    assert "- x grows: reproduced if x > 1, partly if x > 0." in first
    assert "- x grows: a note." in first or "- x grows: a note" in first
    assert "| at 8B | 9 % | needs 8B | `regard x` (not built yet) |" in first
    assert "| [fake](#fake) | 1 | 0 | 0 | 1 |" in first
    assert reproduce.page_text([]).startswith("# Reproductions")


def test_reading_refuses_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `regard reproduce"):
        reproduce.read(tmp_path / "none")
    (tmp_path / "a.json").write_text('{"slug": "a"}')
    with pytest.raises(InputError, match="not a result"):
        reproduce.read(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        reproduce.page(tmp_path, tmp_path / "none" / "page.md")


def test_the_table_shows_every_claim(method: ModuleType, tmp_path: Path) -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=(tmp_path / "shown").open("w"))
    console.print(reproduce.table(run(tmp_path)))
    shown = console.export_text()
    for words in ("x grows", "2 | 3", "0 <b>", "reproduced", "needs scale", "not built yet"):
        assert words in shown


@pytest.mark.parametrize("slug", reproduce.available())
def test_claims_are_well_formed(slug: str) -> None:
    assert slug in {m.slug for m in methods()}
    module = catalog.method(slug).load("claims")
    keys = [c.key for c in module.CLAIMS]
    assert len(keys) == len(set(keys))
    for one in module.CLAIMS:
        assert one.statement and one.paper and one.rule and not one.verdict
        assert (one.judge is None) == (one.command is not None)


RESULTS = reproduce.read() if harness.results_folder().is_dir() else []


@pytest.mark.parametrize("result", RESULTS, ids=lambda r: r.slug)
def test_committed_results_fit_the_code(result: harness.Result) -> None:
    """The rules are those of the code, and the verdicts follow from the numbers."""
    module = catalog.method(result.slug).load("claims")
    assert not result.quick
    assert [c.key for c in result.claims] == [c.key for c in module.CLAIMS]
    for found, stated in zip(result.claims, module.CLAIMS):
        assert (found.statement, found.paper, found.rule) == (
            stated.statement,
            stated.paper,
            stated.rule,
        )
        said = stated.judge(found.values) if stated.judge else "needs scale"
        assert found.verdict == said


@pytest.mark.parametrize("result", [r for r in RESULTS if r.weights], ids=lambda r: r.slug)
def test_committed_results_are_of_the_weights_that_ship(result: harness.Result) -> None:
    """A model that is trained anew is measured anew."""
    if shipped(result.model) is None:
        pytest.skip(f"{result.model} does not come with the package")
    assert (
        harness.weights_of(harness._model(result.model, result.model, Loading())[0])
        == result.weights
    )


def test_the_committed_page_is_generated() -> None:
    folder = harness.root()
    assert folder is not None
    written = (folder / "docs" / "reproductions.md").read_text(encoding="utf-8")
    assert written == reproduce.page_text(reproduce.read())
