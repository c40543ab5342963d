"""The rules to compare with: closed forms, and decoding as the masked dense model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.errors import InputError
from regard.parts.decoding.kept import Evicting
from regard.shrink import H2O, RandomEviction, SnapKV, StreamingLLM
from regard.zoo.tiny import tiny

from .explicit import Dense, decode, dense, ids, maps, wide

RULES: dict[str, Any] = {
    "streaming": lambda **size: StreamingLLM(**size, sinks=3),
    "snapkv": lambda **size: SnapKV(**size, window=6, pool=5),
    "h2o": lambda **size: H2O(**size, recent=0.3),
    "random": lambda **size: RandomEviction(**size, seed=4),
}


def best(scores: Tensor, count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda j: (-float(scores[j]), j))[:count])


def closed_form(name: str, p: Tensor, rows: int) -> set[int] | None:
    """The positions of one key head, from the maps of its query heads `[groups, tokens, tokens]`;
    the rule as published.
    """
    tokens = p.shape[-1]
    if name == "streaming":
        return {0, 1, 2} | set(range(tokens - (rows - 3), tokens))
    if name == "snapkv":
        scores = p[:, -6:, : tokens - 6].sum(1).mean(0)
        smooth = torch.stack([scores[max(0, j - 2) : j + 3].sum() for j in range(tokens - 6)])
        return best(smooth, rows - 6) | set(range(tokens - 6, tokens))
    if name == "h2o":
        last = round(0.3 * rows)
        return best(p.sum(1).mean(0)[: tokens - last], rows - last) | set(
            range(tokens - last, tokens)
        )
    return None


@pytest.mark.parametrize("name", RULES)
def test_closed_forms(name: str) -> None:
    model, text = wide(), ids(61, rows=2)
    with torch.no_grad(), regard.apply(model, method := RULES[name](budget=19), seen := Dense()):
        model(text)
    for number, layer in method._found.items():
        p = maps(seen.calls[number]).unflatten(1, (6, 2))
        (group,) = layer.groups
        assert group.heads is None and group.positions is not None
        for row in range(2):
            for head in range(6):
                found = group.positions[row, head].tolist()
                assert found == sorted(set(found)) and len(found) == 19
                want = closed_form(name, p[row, head], 19)
                assert want is None or set(found) == want


@pytest.mark.parametrize("name", RULES)
def test_decoding_is_the_masked_dense_model(name: str) -> None:
    model, text = wide(), ids(70, rows=2)
    for step in (1, 9):
        method: Evicting = RULES[name](ratio=0.4)
        found = decode(model, text, 43, method, step=step)
        assert torch.allclose(found, dense(model, text, 43, method), atol=1e-9)
    with torch.no_grad():
        assert not torch.allclose(found, model(text).logits[:, 43:], atol=1e-3)


@pytest.mark.parametrize("name", RULES)
def test_bytes_and_beams(name: str) -> None:
    model = tiny("llama")
    method = RULES[name](ratio=0.5)
    with torch.no_grad(), regard.apply(model, method):
        model(ids(101))
        assert method.nbytes == method.full_nbytes * 50 // 101
        beams = model.generate(
            ids(60), num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=-1
        )
    assert beams.shape == (1, 66)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [{"ratio": 1}, {"budget": 999}])
def test_all_rows_is_the_plain_model(name: str, size: dict[str, Any]) -> None:
    model, text = tiny("llama"), ids(50)
    found = decode(model, text, 40, RULES[name](**size))
    with torch.no_grad():
        plain = model(text).logits[:, 40:]
    assert torch.allclose(found, plain, atol=1e-5)


def test_random_rows_differ_by_head_layer_and_seed_alone() -> None:
    model = wide()
    kept = {}
    for seed in (0, 0, 1):
        method = RandomEviction(budget=10, seed=seed)
        with torch.no_grad(), regard.apply(model, method):
            model(ids(50, rows=2, seed=len(kept)))
        found = [layer.groups[0].positions for layer in method._found.values()]
        stacked = torch.stack([x for x in found if x is not None])
        assert torch.equal(stacked[:, 0], stacked[:, 1])
        assert len({tuple(x) for x in stacked[:, 0].flatten(0, 1).tolist()}) == 18
        if seed in kept:
            assert torch.equal(kept[seed], stacked)
        kept[seed] = stacked
    assert not torch.equal(kept[0], kept[1])


def test_small_ratios_keep_recent_tokens_alone() -> None:
    model = tiny("llama")
    for method in (SnapKV(ratio=0.1), StreamingLLM(ratio=0.05, sinks=4)):
        with torch.no_grad(), regard.apply(model, method):
            model(ids(40))
        positions = method._found[0].groups[0].positions
        assert positions is not None
        want = [36, 37, 38, 39] if method.name == "SnapKV" else [0, 39]
        assert positions[0, 0].tolist() == want


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: StreamingLLM(), "either budget"),
        (lambda: SnapKV(budget=64, ratio=0.5), "either budget"),
        (lambda: H2O(ratio=0), "ratio"),
        (lambda: RandomEviction(budget=0), "at least 1, not 0"),
        (lambda: StreamingLLM(budget=4), "take 5 or more"),
        (lambda: SnapKV(budget=32), "take 33 or more"),
        (lambda: StreamingLLM(ratio=0.5, sinks=-1), "sinks"),
        (lambda: SnapKV(ratio=0.5, window=0), "window"),
        (lambda: SnapKV(ratio=0.5, pool=2), "odd"),
        (lambda: H2O(ratio=0.5, recent=1.5), "recent"),
        (lambda: StreamingLLM(budget=12.5), "budget is a whole number"),
        (lambda: SnapKV(budget=40.0), "budget is a whole number"),
        (lambda: StreamingLLM(budget="12"), "budget is a whole number of at least 1, not '12'"),
        (lambda: StreamingLLM(ratio="0.5"), "ratio is a number above 0"),
        (lambda: StreamingLLM(budget=12, sinks=1.5), "sinks is a whole number"),
        (lambda: SnapKV(ratio=0.5, window=None), "window is a whole number"),
        (lambda: SnapKV(ratio=0.5, pool=7.0), "pool is an odd whole number"),
        (lambda: H2O(ratio=0.5, recent="all"), "recent is a number"),
        (lambda: RandomEviction(ratio=0.5, seed=None), "seed is a whole number"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
