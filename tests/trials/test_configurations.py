"""Configurations read from a line: names, settings, budgets, mistakes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace

import pytest

from regard import catalog
from regard.cards import Checked, setting
from regard.errors import InputError
from regard.lab.trials.configurations import known, read, with_setting
from regard.shrink import H2O, Recycled, SnapKV, TaskKV
from regard.steer.act.method import ACT


def test_plain_model_is_always_first_and_once() -> None:
    assert [x.key for x in read("")] == ["full"] == [x.key for x in read(None)]
    found = read(" act , full,full, h2o:budget=9 ")
    assert [x.key for x in found] == ["full", "act", "h2o:budget=9"]
    assert found[0].handlers(10) == [] and found[0].source == ""


def test_settings_reach_the_method() -> None:
    _, one = read("act:beta=0.2,mode=dynamic,skip-layers=0/0+snapkv:budget=40,window=8")
    act, snap = one.handlers(100)
    assert isinstance(act, ACT) and isinstance(snap, SnapKV)
    assert (act.beta, act.mode, act.skip_layers) == (0.2, "dynamic", (0, 0))
    assert (snap.budget, snap.window) == (40, 8)
    assert one.handlers(100)[0] is not act


def test_equal_budgets() -> None:
    found = read(
        "act,task-kv:sinks=4,recent=8,recycled-attention,h2o:ratio=0.1", ratios=[0.25, 0.5]
    )
    assert [x.key for x in found[1:]] == [
        "act",
        "task-kv:sinks=4,recent=8@0.25",
        "task-kv:sinks=4,recent=8@0.5",
        "recycled-attention@0.25",
        "recycled-attention@0.5",
        "h2o:ratio=0.1",
    ]
    made = {x.key: x.handlers(203)[0] for x in found[1:]}
    half, quarter = made["task-kv:sinks=4,recent=8@0.5"], made["recycled-attention@0.25"]
    assert isinstance(half, TaskKV) and (half.ratio, half.sinks) == (0.5, 4)
    assert isinstance(quarter, Recycled) and quarter.budget == 50
    own = made["h2o:ratio=0.1"]
    assert isinstance(own, H2O) and own.ratio == 0.1
    line = read("task-kv,snapkv,recycled-attention", budget=50)[1:]
    rows = {x.key: x.handlers(200)[0] for x in line}
    task, snap, recycled = (
        rows[f"{n}@50 rows"] for n in ("task-kv", "snapkv", "recycled-attention")
    )
    assert isinstance(task, TaskKV) and task.ratio == 0.25
    assert isinstance(snap, SnapKV) and snap.budget == 50
    assert isinstance(recycled, Recycled) and recycled.budget == 50


def test_every_method_is_there() -> None:
    assert {"act", "task-kv", "random", "visiondrop"} <= set(known())
    for name, method in known().items():
        if name == "localist":  # its blocks are those of one text
            continue
        one = read(name, ratios=[0.5])[1]
        assert len(one.handlers(100)) == 1 and len(one.source) == 12
        assert one.plain_prompt == method.card.plain_prompt
    assert not read("act+h2o", ratios=[0.5])[1].plain_prompt


@dataclass(eq=False)
class Cut(Checked):
    """Settings of a toy method, whose budget is said in one of two ways."""

    ratio: float | None = setting(None, "share kept", above=0, to=1)
    cuts: int | None = setting(None, "rows cut", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio and self.cuts:
            raise InputError("ratio and cuts are mutually exclusive")


class Toy(catalog.Method):
    settings = Cut  # type: ignore[assignment]


def test_a_new_method_brings_its_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    every = catalog.everything()
    act = next(m for m in every if m.card.slug == "act")
    toy = Toy(replace(act.card, slug="toy"), act.package, act.folder)
    monkeypatch.setattr(catalog, "everything", lambda: [*every, toy])
    keys = [one.key for one in read("toy,toy:cuts=3,toy:ratio=0.1", ratios=[0.5])]
    assert keys == ["full", "toy@0.5", "toy:cuts=3", "toy:ratio=0.1"]
    with pytest.raises(InputError, match="cuts is a number of at least 1"):
        read("toy:cuts=0", ratios=[0.5])


def test_a_line_is_read_as_the_commands_read_it() -> None:
    one = read("task-kv:top=0,act:skip-layers=1/0")
    assert dict(one[1].parts[0].settings) == {"top": None}
    assert dict(one[2].parts[0].settings) == {"skip_layers": (1, 0)}


def test_one_setting_for_all_that_have_it() -> None:
    assert with_setting("h2o, act", "heads", "h.json") == "h2o,act:heads=h.json"
    with pytest.raises(InputError, match="--heads goes with act"):
        with_setting("h2o", "heads", "h.json")


def test_reading_a_line_imports_no_torch() -> None:
    code = (
        "import sys; from regard.lab.trials.configurations import read; "
        "read('act:beta=0.2+h2o,task-kv:ratio=0.4', ratios=[0.5]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("snapkw", "Did you mean 'snapkv'"),
        ("act+snapkw", "'snapkw' to make 'act[+]snapkw'"),
        ("act:betta=1", "no setting 'betta'. Did you mean 'beta'"),
        ("act:beta", "not written as act:setting=value"),
        ("act:", "not written as"),
        ("act:beta=1,beta=2", "gives beta twice"),
        ("h2o,h2o", "given twice"),
        ("act:beta=0.2+h2o+act", "applies act twice"),
        ("full:beta=1", "no method 'full'"),
        ("beta=1", "no method 'beta=1'"),
    ],
)
def test_mistakes_in_the_line(line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(line)


def test_mistakes_in_values() -> None:
    for ratios, budget, message in (([0.0], None, "not 0"), ([1.5], None, "not 1.5"),
                                    ([], 0, "from 1 on"), ([0.5], 3, "exclusive")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            read("h2o", ratios=ratios, budget=budget)
    for line in ("act:beta=3", "act:beta=word", "h2o:ratio=0.5,recent=2", "snapkv:budget=none"):
        with pytest.raises(InputError, match=r"is a number|either budget"):
            read(line)
