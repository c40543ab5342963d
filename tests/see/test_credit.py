"""Credit for tokens: the worked example, the formulas cell by cell, padding, PEFT, bad input."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import InputError
from regard.see.preplan_anchor.card import CREDITS, CreditSettings
from regard.see.preplan_anchor.credit import credit_weights, read_rhythm, token_credit
from regard.zoo.tiny import tiny

IDS = torch.randint(3, 120, (2, 60), generator=torch.Generator().manual_seed(0))
RESPONSE = (torch.arange(60) >= 20)[None].repeat(2, 1)


def by_hand(
    waad: list[float], fai: list[float], q: float, g: float, alpha: float, k: int,
    eligible: list[bool],
) -> list[float]:  # fmt: skip
    """The card's coupled credit, token by token."""
    n = len(waad)
    change = [abs(waad[t] - waad[t + 1]) for t in range(n - 1)] + [0.0]
    few = [t for t in range(n) if eligible[t]]
    anchors = sorted(few, key=lambda t: (-fai[t], t))[: math.ceil(q * n)]
    low = float(torch.tensor(waad, dtype=torch.float64).quantile(0.5))
    high = float(torch.tensor(change, dtype=torch.float64).quantile(1 - q))
    handing, intro = set(), set()
    for t in anchors:
        window = [u for u in range(t - k, t) if u >= 0]
        if not window or waad[t] > low or max(change[u] for u in window) < high:
            continue
        handing.add(t)
        intro.add(max(window, key=lambda u: (change[u], -u)))
    weights = []
    for t in range(n):
        w = 1.0
        w += (g - 1) * (t in anchors and t not in handing)
        w += (1 - alpha) * (g - 1) * (t in handing)
        w += alpha * (g - 1) * (t in intro)
        weights.append(w)
    return weights


def test_the_worked_example() -> None:
    """Eight tokens: q = 0.375 takes three. WAAD jumps after token 1 and falls after token 2.

    Anchors are 2, 4 and 6. Token 4 looks back little (1.0 <= median 1.5) and token 2, three back at
    most, changed by 5 >= the (1 - q) quantile: its bonus is shared. Token 2 itself looks back far,
    so it keeps its bonus as an anchor, and gains the share as a preplan token.
    """
    waad = torch.tensor([1.0, 2.0, 6.0, 1.0, 1.0, 3.0, 2.5, 1.0])
    fai = torch.tensor([0.1, 0.0, 0.5, 0.2, 0.9, 0.1, 0.8, 0.0])
    got = token_credit(waad, fai, credit="coupled", top=0.375, amplify=1.5, alpha=0.5, lead=3)
    assert got.tolist() == [1.0, 1.0, 1.75, 1.0, 1.25, 1.0, 1.5, 1.0]
    local = token_credit(waad, fai, credit="local", top=0.375)  # changes 1 4 5 0 2 .5 1.5 0
    assert local.tolist() == [1.0, 1.5, 1.5, 1.0, 1.5, 1.0, 1.0, 1.0]
    far = token_credit(waad, fai, credit="global", top=0.375)
    assert far.tolist() == [1.0, 1.0, 1.5, 1.0, 1.5, 1.0, 1.5, 1.0]
    bottom = token_credit(waad, fai, credit="bottom", top=0.375)
    assert bottom.tolist() == [1.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.5]
    entropy = torch.arange(8.0)
    assert token_credit(waad, fai, entropy=entropy, credit="entropy", top=0.25).tolist() == [
        *([1.0] * 6), 1.5, 1.5,
    ]  # fmt: skip
    assert token_credit(waad, fai, credit="uniform").tolist() == [1.0] * 8


@pytest.mark.parametrize("seed", range(12))
def test_coupled_is_the_formula(seed: int) -> None:
    make = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 30, (), generator=make))
    # few distinct values: ties everywhere
    waad, fai = (torch.randint(0, 6, (2, n), generator=make) / 2).tolist()
    eligible = (torch.rand(n, generator=make) < 0.7).tolist()
    got = token_credit(
        torch.tensor(waad), torch.tensor(fai), torch.tensor(eligible), top=0.4, alpha=0.3, lead=2
    )
    assert got.tolist() == pytest.approx(by_hand(waad, fai, 0.4, 1.5, 0.3, 2, eligible))


def test_ties_do_not_amplify_the_tail() -> None:
    zeros = torch.zeros(20)
    for credit in ("local", "global", "bottom", "random"):
        assert int((token_credit(zeros, zeros, credit=credit, top=0.4) > 1).sum()) == 8
    none = torch.zeros(20, dtype=torch.bool)
    assert token_credit(zeros, zeros, none, credit="coupled").tolist() == [1.0] * 20
    for count in (0, 1):
        assert token_credit(zeros[:count], zeros[:count]).tolist() == [1.0] * count


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_waad_and_fai_are_those_of_the_rhythm(family: str) -> None:
    model = tiny(family)
    live = torch.ones_like(RESPONSE)
    asked = CreditSettings(layers="all", horizon=(10, 50))
    waad, fai, eligible = read_rhythm(model, IDS, RESPONSE, live, asked)
    for row in range(2):
        seen = regard.rhythm(model, IDS[row], 20, horizon=(10, 50))
        torch.testing.assert_close(waad[row, 20:], torch.tensor(seen.waad), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fai[row, 20:], torch.tensor(seen.fai), rtol=1e-4, atol=1e-6)
    assert eligible[0].tolist() == [t + 10 <= 59 for t in range(60)]


@pytest.mark.parametrize("credit", CREDITS)
def test_a_padded_row_is_the_row_alone(credit: str) -> None:
    model, settings = tiny("llama"), {"credit": credit, "layers": "all"}
    alone = credit_weights(model, IDS[:1], RESPONSE[:1], **settings)
    ids = torch.zeros(2, 70, dtype=torch.long)
    live = torch.zeros(2, 70, dtype=torch.bool)
    response = torch.zeros(2, 70, dtype=torch.bool)
    ids[0, 4:64], live[0, 4:64], response[0, 24:64] = IDS[0], True, True
    ids[1], live[1], response[1, 24:] = 7, True, True
    both = credit_weights(model, ids, response, attention_mask=live, **settings)
    assert torch.equal(both[0, 4:64], alone[0])
    assert bool((both[0, 64:] == 1).all()) and bool((both[0, :24] == 1).all())
    assert credit == "uniform" or int((alone > 1).sum()) > 4


def test_the_pass_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(tiny("llama")).train()
    state = torch.get_rng_state()
    model.model.layers[0].eval()
    weights = credit_weights(model, IDS, RESPONSE)
    assert model.training and not model.model.layers[0].training and not weights.requires_grad
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    again = credit_weights(model, IDS, RESPONSE, normalize=True)
    assert float(again[0, 20:].mean()) == pytest.approx(1.0) != float(weights[0, 20:].mean())
    random = [credit_weights(model, IDS, RESPONSE, credit="random", step=n) for n in (0, 0, 1)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])


def test_adapters_of_peft_are_looked_through() -> None:
    peft = pytest.importorskip("peft", reason="peft is part of the extra 'steer'")
    model = copy.deepcopy(tiny("llama"))
    plain = credit_weights(model, IDS, RESPONSE)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert torch.equal(credit_weights(adapted, IDS, RESPONSE), plain)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"top": 0.0}, "top"), ({"top": 1.2}, "top"), ({"horizon": (20, 10)}, "horizon"),
        ({"window": 0}, "window"), ({"alpha": 1.5}, "alpha"), ({"credit": "best"}, "credit"),
        ({"lead": 0}, "lead"), ({"amplify": -1.0}, "amplify"), ({"quantile": 0.7}, "quantile"),
        ({"layers": []}, "no layer"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(change: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        credit_weights(tiny("llama"), IDS, RESPONSE, **change)


def test_bad_rows_are_refused() -> None:
    model, wrong = tiny("llama"), RESPONSE[:, :-1]
    with pytest.raises(InputError, match="batch, tokens"):
        credit_weights(model, IDS, wrong)
    live: Tensor = torch.ones_like(RESPONSE)
    live[0, -1] = False
    with pytest.raises(InputError, match="marks padding"):
        credit_weights(model, IDS, RESPONSE, attention_mask=live)
    with pytest.raises(InputError, match="no token of a response"):
        credit_weights(model, IDS, torch.zeros_like(RESPONSE))
    with pytest.raises(InputError, match="encoder"):
        credit_weights(tiny("t5"), IDS, RESPONSE)
    with pytest.raises(InputError, match="looks ahead"):
        credit_weights(tiny("bert"), IDS, RESPONSE, layers="all")
    with pytest.raises(InputError, match="entropy"):
        token_credit(torch.ones(4), torch.ones(4), credit="entropy")
