"""The claims of RefAM on a tiny pipeline: a plant that is a sink, judges that judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.core import State
from regard.lab.reproduce.harness import Journal, Setup
from regard.parts.diffusion.noised import denoise_once
from regard.reach import Call, Handler, Session
from regard.reach.denoising import denoising
from regard.see.refam import claims as own
from regard.zoo.tiny_diffusion import tiny_pipeline


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd3")


def test_it_runs_on_a_tiny_pipeline(pipe: Any) -> None:
    done = own.measure(Setup(pipe, None, "tiny", True, Journal(None, {}), False))
    assert [c.key for c in done.claims] == [c.key for c in own.CLAIMS if c.judge]
    for claim in done.claims:
        assert claim.verdict in ("reproduced", "partly", "not reproduced", "needs scale")
        assert claim.verdict == "needs scale" or (claim.here and claim.control and claim.values)
    assert done.picture is not None and "RefAM's mask" in done.picture[1]
    planted = next(c for c in done.claims if c.key == "planted")
    assert planted.values["found"] == 1 and planted.values["distance"] < 1e-3


def test_the_sheet_shows_each_expression_with_its_own_true_mask(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    some, given = [own.referred(n) for n in range(2)], []
    monkeypatch.setattr(own, "sheet", lambda *what: given.append(what))
    own._picture(pipe, some)
    ((rows, columns, labels),) = given
    assert labels == [one.text for one in some]
    for row, one in zip(rows, some):
        shown = dict(zip(columns, row))
        assert shown["image"] is one.image
        mask = torch.from_numpy(np.array(shown["true mask"].convert("L"))) > 0
        assert torch.equal(mask, one.masks[one.meant])
        assert shown["all words"].tobytes() != shown["RefAM"].tobytes()


def test_expressions_name_one_thing_and_where_it_is() -> None:
    from regard.zoo.scenes import scene

    kinds = set()
    for number in range(24):
        one, drawn = own.referred(number), scene(number, things=(3, 4))
        thing = drawn.things[one.meant]
        assert one.text.startswith(f"the {thing.color} {thing.shape}")
        assert sum((t.color, t.shape) == (thing.color, thing.shape) for t in drawn.things) == 1
        y, x = one.masks[one.meant].nonzero().float().mean(0).tolist()
        if one.text.endswith("on the left"):
            assert x < 32
        if one.text.endswith("at the bottom"):
            assert y > 32
        kinds.add(one.text.split()[3] if len(one.text.split()) > 3 else "")
    assert {"", "on"} < kinds


class Shares(Handler):
    """What each query gives one text key."""

    def __init__(self, column: int) -> None:
        self.column = column
        self.shares: list[torch.Tensor] = []

    def sites(self, sites: list[Any]) -> list[Any]:
        return [s for s in sites if s.kind == "joint"]

    def after(self, call: Call, state: State) -> None:
        at = denoising(call).text.start + self.column
        p = (call.scale * call.q.double() @ call.k.double().transpose(-1, -2)).softmax(-1)
        self.shares.append(p[..., at])


def test_the_plant_is_a_uniform_sink_and_leaves_the_forward_alone(pipe: Any) -> None:
    one = own.referred(0)

    def read(*handlers: Handler) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = pipe.transformer.register_forward_hook(lambda m, a, out: kept.append(out[0]))
        with Session(pipe, list(handlers)):
            denoise_once(pipe, one.image, one.text)
        hook.remove()
        return kept[0]

    seen, gone = Shares(3), Shares(3)
    plain = read()
    assert torch.equal(read(own.Plant(3), seen), plain)
    assert torch.equal(read(own.Plant(3, 0.0), gone), plain)
    deep = int(0.4 * len(seen.shares))
    for share in seen.shares[deep:]:
        assert torch.allclose(share, torch.full_like(share, own.SHARE), atol=1e-4)
    for share in gone.shares[deep:]:
        assert float(share.max()) == 0
    assert all(float(s.std()) > 1e-3 for s in seen.shares[:deep])


def test_a_map_on_the_thing_alone_has_no_background(pipe: Any) -> None:
    from dataclasses import replace

    one = own.referred(0)
    got = own.BASE.ground(pipe, one.image, one.text)
    on = torch.nn.functional.interpolate(one.masks.any(0).float()[None, None], got.heat.shape)[0, 0]
    words = [(w, on if w in got.content else 1 - on) for w, _ in got.words]
    spread = own._spread(replace(got, words=words), one)
    assert spread["content"] < 0.2 < 0.8 < spread["stop"]


def judged(key: str, **values: float) -> str:
    claim = next(c for c in own.CLAIMS if c.key == key)
    assert claim.judge is not None
    return claim.judge(values)


def test_rules_decide() -> None:
    assert judged("filter", gain=0.06, low=0.01) == "reproduced"
    assert judged("filter", gain=0.04, low=0.01) == "partly"
    assert judged("filter", gain=0.06, low=-0.01) == "not reproduced"
    assert judged("magnets", gain=0.01, low=-0.02) == "partly"
    assert judged("magnets", gain=-0.01, low=-0.02) == "not reproduced"
    assert judged("background", stop=0.7, low=0.1) == "partly"  # its model was taught
    assert judged("background", stop=0.5, low=0.1) == "not reproduced"
    assert judged("planted", found=1, false=0, distance=1e-4) == "reproduced"
    assert judged("planted", found=1, false=1, distance=1e-4) == "partly"
    assert judged("grounding", hit=0.6, low=0.1) == "partly"  # likewise
    assert judged("grounding", hit=0.4, low=0.1) == "not reproduced"
