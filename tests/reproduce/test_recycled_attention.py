"""The claims of recycled attention: end to end on a tiny model, arms as described, judges."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import regard
from regard.lab import reproduce
from regard.shrink.recycled_attention import claims as claims
from regard.shrink.recycled_attention.method import Recycled
from regard.zoo.tiny import tiny

from ..models import Words

IDS = torch.randint(3, 100, (2, 60), generator=torch.Generator().manual_seed(0))
SMALL = claims.Size(documents=2, prompt=40, after=19, reach=8)


def test_it_runs_on_a_tiny_model(tmp_path: Path) -> None:
    model = (tiny("llama"), Words())
    result = reproduce.run("recycled-attention", quick=True, model=model, out=tmp_path)
    assert [c.key for c in result.claims] == [c.key for c in claims.CLAIMS]
    for claim in result.claims:
        if claim.verdict != "needs scale":
            assert claim.here and claim.control and claim.values
    by_key = {c.key: c for c in result.claims}
    assert by_key["entries"].values["error"] < 1e-6, "the count is exact"
    assert by_key["entries"].values["entries_1"] == sum(range(65, 85)) / 20
    assert len(by_key["mass"].values["curves"]["recycled"]) == 16
    mass = by_key["mass"].values
    assert mass["best"] > max(mass[name] for name in claims.SETS if name != "best")
    assert [f.name for f in tmp_path.iterdir()] == ["recycled-attention.quick.json"]
    assert json.loads((tmp_path / "recycled-attention.quick.json").read_text())["seeds"]


def test_arms_go_on_from_one_prompt() -> None:
    """A stride of 1 is the plain model; a copied start is a prompt read by the method itself."""
    model = tiny("llama").double()
    start = partial(claims._prompt, model, IDS[:, : SMALL.prompt], SMALL)
    with torch.no_grad():
        logits = model(IDS).logits[:, SMALL.prompt :]
        wanted = torch.nn.functional.cross_entropy(
            logits[:, :19].transpose(1, 2), IDS[:, 41:60], reduction="none"
        ).mean(1)
        found = claims._forced(model, IDS, SMALL, start, lambda: Recycled(5, 1))
        assert found["loss"] == pytest.approx(wanted.tolist(), abs=1e-6) and found["full"] == 19
        short = claims._forced(model, IDS, SMALL, start, lambda: Recycled(5, 4))
        assert short["full"] == 4 and short["recovered"] < 1
        with regard.apply(model, Recycled(5, 4)):
            out = model(IDS[:, : SMALL.prompt])
            losses = []
            for t in range(SMALL.prompt, 59):
                out = model(IDS[:, t : t + 1], past_key_values=out.past_key_values)
                now = torch.nn.functional.cross_entropy(
                    out.logits[:, -1], IDS[:, t + 1], reduction="none"
                )
                losses.append(now)
    assert short["loss"] == pytest.approx(torch.stack(losses).mean(0).tolist(), abs=1e-6)


def positions(method: Recycled, tokens: int) -> list[Any]:
    """The kept positions of the first layer after each token, `[batch, kv_heads]` sets."""
    model = tiny("llama")
    cache = claims._prompt(model, IDS[:, : SMALL.prompt], SMALL)
    seen = []
    with torch.no_grad(), regard.apply(model, method):
        if hasattr(method, "first"):
            for layer in cache.layers:
                layer.keep(method.first(layer, SMALL.prompt))
        for t in range(SMALL.prompt, SMALL.prompt + tokens):
            model(IDS[:, t : t + 1], past_key_values=cache)
            seen.append(cache.layers[0].positions.data[..., 0].sort(-1).values)
    return seen


def test_sinks_and_recent_tokens() -> None:
    for stride in (claims.NEVER, 3):
        seen = positions(claims.Ends(8, stride), 15)
        for n, kept in enumerate(seen):
            last = SMALL.prompt + n
            wanted = [0, 1, 2, 3, *range(last - 4, last + 1)]
            assert kept.unique(dim=0).tolist() == [[wanted] * 2], n
    assert claims.ends(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert claims.ends(20, 6).tolist() == [0, 1, 2, 3, 19, 18]


def test_the_controls_keep_what_they_say() -> None:
    frozen = positions(claims.Unrefreshed(8, 3), 7)
    first = set(frozen[0][0, 0].tolist())
    for n, kept in enumerate(frozen):
        own = set(kept[0, 0].tolist())
        assert set(range(40, 41 + n)) <= own, "every new token is there, full steps' too"
        assert own - first == set(range(41, 41 + n)), "and nothing else has come"
    drawn = positions(claims.Random(8, 3), 4)
    assert drawn[0].shape[-1] == 9 and not torch.equal(drawn[0][0], drawn[0][1])
    assert len(set(drawn[0][0, 0].tolist()) & set(drawn[3][0, 0].tolist())) < 7, "drawn anew"


def test_the_premise_is_what_the_method_measures() -> None:
    """In the first layer, where recycling changes no key yet, the share at a distance is what the
    method's own meter says at a full step so far from the prompt.
    """
    model = tiny("llama")
    seen = claims.Premise(SMALL.prompt, SMALL.budget, seed=0)
    with torch.no_grad(), regard.apply(model, seen):
        model(IDS[:1, : SMALL.prompt + SMALL.reach], use_cache=False)
    assert len(seen.found["recycled"]) == 2
    for distance in (2, 4, 8):
        method = Recycled(SMALL.budget, distance)
        with torch.no_grad(), regard.apply(model, method):
            cache = model(IDS[:1, : SMALL.prompt]).past_key_values
            for t in range(SMALL.prompt, SMALL.prompt + distance):
                model(IDS[:1, t : t + 1], past_key_values=cache)
        share = 100 * method.steps()[0].recovered[0]
        assert seen.found["recycled"][0][distance - 1] == pytest.approx(share, abs=1e-3)


def test_the_sets_of_the_premise() -> None:
    found = claims._mass(tiny("llama"), IDS, SMALL)
    for name in claims.SETS:
        assert [len(row) for row in found[name]] == [8, 8]
        assert bool((torch.tensor(found["best"]) >= torch.tensor(found[name]) - 1e-6).all())
    even = torch.full((2, 2, 10), 0.1)
    assert claims._share(even, torch.tensor([[1, 2, 3]] * 2)) == pytest.approx(30)


def test_passages_do_not_overlap() -> None:
    setup = type("S", (), {"tokenizer": Words(), "model": tiny("llama")})
    ids = claims._documents(setup, claims.Size())  # type: ignore[arg-type]
    assert ids.shape == (12, 1024 + 129)


BELOW = {f"gain_low_{s}": 0.1 for s in claims.BELOW}


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("mass", {"low": 4.0, "fall": 9.0}, "reproduced"),
        ("mass", {"low": 4.0, "fall": 11.0}, "partly"),
        ("mass", {"low": 2.0, "fall": 1.0}, "partly"),
        ("mass", {"low": -1.0, "fall": 1.0}, "not reproduced"),
        ("perplexity", {**BELOW, "worst_fall": 0.0}, "reproduced"),
        ("perplexity", {**BELOW, "worst_fall": 0.1}, "partly"),
        ("perplexity", {**BELOW, "gain_low_25": -0.1, "worst_fall": 0.0}, "partly"),
        (
            "perplexity",
            {f"gain_low_{s}": -0.1 for s in claims.BELOW} | {"worst_fall": 0.0},
            "not reproduced",
        ),
        ("refresh", {"low": 0.1, "lost": 0.6}, "reproduced"),
        ("refresh", {"low": 0.1, "lost": 0.4}, "partly"),
        ("refresh", {"low": -0.1, "lost": 0.9}, "not reproduced"),
        ("dynamic", {"low": -0.2, "high": -0.1}, "reproduced"),
        ("dynamic", {"low": -0.2, "high": 0.1}, "partly"),
        ("dynamic", {"low": 0.1, "high": 0.2}, "not reproduced"),
        ("entries", {"error": 0.01, "time": 1.1}, "reproduced"),
        ("entries", {"error": 0.01, "time": 1.3}, "partly"),
        ("entries", {"error": 0.03, "time": 1.0}, "not reproduced"),
    ],
)
def test_the_judges(key: str, values: dict[str, Any], said: str) -> None:
    claim = next(c for c in claims.CLAIMS if c.key == key)
    assert claim.settle(values, here="", control="").verdict == said


def arm(loss: float, full: float, seconds: float = 1.0, entries: float = 1.0) -> dict[str, Any]:
    return {
        "loss": [loss, loss + 1],
        "full": full,
        "entries": entries,
        "recovered": 0.5,
        "seconds": seconds,
        "total": 9.0,
    }


def test_settling_made_up_numbers() -> None:
    """Differences and intervals come from the numbers given, in the right direction."""
    size = claims.Size()
    parts = {
        "full": arm(1.0, 128, 2.0, claims._formula(1, size)),
        **{
            f"stride {s}": arm(1 + s / 100, 128 // s, 1.1, claims._formula(s, size))
            for s in claims.STRIDES
        },
        "ends": arm(1.3, 0),
        "ends, full 10": arm(1.25, 12),
        "unrefreshed 10": arm(1.2, 12),
        "random 10": arm(2.0, 12),
        "dynamic 0.8": {**arm(1.09, 12), "full": [12, 12]},
        "dynamic 0.6": {**arm(1.5, 2), "full": [2, 2]},
        "mass": {name: [[90.0] * 9, [80.0] * 9] for name in claims.SETS},
    }
    parts["mass"]["local"] = [[70.0] * 9] * 2
    found = claims._settle(parts, size)
    assert found["mass"].verdict == "reproduced" and found["mass"].values["low"] == 10
    assert found["perplexity"].verdict == "reproduced"
    assert found["perplexity"].values["gain_25"] == pytest.approx(0.05)
    assert found["perplexity"].values["gain_50"] == pytest.approx(-0.2)
    assert found["refresh"].verdict == "reproduced"
    assert found["refresh"].values["lost"] == pytest.approx(0.1 / 0.15)
    assert found["dynamic"].verdict == "reproduced"
    assert found["dynamic"].values["high"] == pytest.approx(-0.01)
    assert found["entries"].verdict == "reproduced"
    assert found["entries"].values["time"] == pytest.approx(1.1)
    parts["stride 10"] = arm(0.9, 12, 1.1, 500)
    found = claims._settle(parts, size)
    assert found["perplexity"].verdict == "partly"
    assert found["entries"].verdict == "not reproduced"


def test_between_fixed_strides() -> None:
    steps, losses = [128, 25, 12, 5, 2], [1.0, 1.1, 1.2, 1.3, 1.4]
    assert claims._between(25, steps, losses) == pytest.approx(1.1)
    assert 1.1 < claims._between(18, steps, losses) < 1.2
    assert claims._between(500, steps, losses) == 1.0 and claims._between(0, steps, losses) == 1.4


def test_the_count_of_keys() -> None:
    size = claims.Size(prompt=80, after=10)
    # ten tokens, of which the 4th and the 8th read everything
    assert claims._formula(4, size) == (84 + 88 + 8 * 11) / 10
