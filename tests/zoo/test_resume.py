"""A training that was stopped and taken up again ends with the weights of one that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from regard.cli import main
from regard.zoo.train import coder, diffusion, loop
from regard.zoo.train import vlm as train
from regard.zoo.train.checkpoint import place


class Killed(BaseException):
    """As a kill: nothing of the program catches it."""


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = {str(f.relative_to(folder)): load_file(f) for f in folder.rglob("*.safetensors")}
    return {f"{file} {n}": t for file, tensors in found.items() for n, t in tensors.items()}


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text("utf-8"))
    del found["seconds"]
    return found


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> None:
    """Run until that many steps are done; the state is saved after each."""
    done = loop._keep

    def keep(kept: Any, trained: Any, adam: Any, average: Any, clock: Any, diary: Any) -> None:
        done(kept, trained, adam, average, clock, diary)
        if clock.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE", -1.0)
        patch.setattr(loop, "_keep", keep)
        with pytest.raises(Killed):
            run()


def tower(out: Path, **more: Any) -> Any:
    small = {"batch": 4, "width": 32, "layers": 1, "patch": 16}
    return train.train_tower(out, **{"steps": 5, **small, **more})


def vae(out: Path, **more: Any) -> Any:
    return coder.train_vae(out, **{"steps": 4, "batch": 2, "checked": 2, **more})


@pytest.mark.parametrize(
    ("recipe", "step"), [(tower, 1), (tower, 4), pytest.param(vae, 3, marks=pytest.mark.slow)]
)
def test_a_stopped_training_goes_on(
    recipe: Any, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe(whole)
    stopped_at(step, monkeypatch, lambda: recipe(cut))
    assert place(cut).is_file()
    steps: list[int] = []
    note = loop.Diary.note
    monkeypatch.setattr(loop.Diary, "note", lambda *a: steps.append(a[1].step) or note(*a))
    recipe(cut)
    assert steps[0] == step + 1  # nothing is done twice
    ours, theirs = weights(cut), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert record(cut) == record(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_a_state_of_another_training_is_not_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    for change in ({"seed": 1}, {"batch": 3}, {"steps": 6}, {"rate": 1e-4}):
        stopped_at(2, monkeypatch, lambda: tower(cut))
        tower(plain, **change)
        tower(cut, **change)
        ours, theirs = weights(cut), weights(plain)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    stopped_at(2, monkeypatch, lambda: tower(cut))
    place(cut).write_bytes(place(cut).read_bytes()[:1000])  # half of one
    tower(cut)
    assert record(cut)["steps"] == 5 and not place(cut).exists()


def test_a_training_by_the_clock_counts_the_time_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    stopped_at(2, monkeypatch, lambda: tower(out, steps=None, minutes=0.05))
    with monkeypatch.context() as patch:
        clock: list[Any] = []
        note = loop.Diary.note
        patch.setattr(loop.Diary, "note", lambda *a: clock.append(a[1]) or note(*a))
        tower(out, steps=None, minutes=0.05)
    assert clock[-1].step == record(out)["steps"] > 2
    assert clock[0].step >= 3  # where it was stopped, and one


def test_minutes_and_steps_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["zoo", "train", "shapes-vae", "--out", str(tmp_path / "x"), "--minutes", "1",
              "--steps", "3"])  # fmt: skip
    assert end.value.code == 2 and "mutually exclusive" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "dit", "vlm", "decoder"])
def test_the_larger_recipes_go_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "vlm":
        tower(tmp_path / "base", steps=2, patch=8)
        base = {"tower": tmp_path / "base", "checked": 4}
    else:
        vae(tmp_path / "base", steps=1)
        base = {"vae": tmp_path / "base", "checked": 1}
    run = {"sd": diffusion.train_sd, "dit": diffusion.train_dit, "vlm": train.train_vlm,
           "decoder": coder.train_decoder}[name]  # fmt: skip

    def recipe(out: Path) -> Any:
        return run(out, steps=4, batch=2, **base)  # type: ignore[operator]

    recipe(tmp_path / "whole")
    stopped_at(2, monkeypatch, lambda: recipe(tmp_path / "cut"))
    recipe(tmp_path / "cut")
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert record(tmp_path / "cut") == record(tmp_path / "whole")
