"""Attention and facts in one sweep equal the two calls, and the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.core import (
    FACTS,
    Entropy,
    Mask,
    Mass,
    MeanReceived,
    Received,
    attend,
    attend_and_measure,
    measure,
)
from regard.core.facts import View
from regard.core.kernels import rows

from .cases import close, masks, tensors

SHAPE = (2, 6, 2, 150, 190, 16)
ALL = [Mass({"a": (3, 90)}) if n == "mass" else f() for n, f in FACTS.items()]


def _values(facts: Any, sums: Any) -> dict[str, Tensor]:
    ends = {f.name: f.finish(s) for f, s in zip(facts, sums)}
    return {n: x[0] if isinstance(x, tuple) else x for n, x in ends.items()}


def _both(q: Tensor, k: Tensor, v: Tensor, live: Any = None, **call: Any) -> None:
    offset = k.shape[2] - q.shape[2]
    facts = [Received(band=(2, 20)), *ALL]
    state, sums = attend_and_measure(q, k, v, facts, live=live, offsets=(offset, 0), **call)
    true = attend(q, k, v, kernel="reference", **call)
    close(state.out, true.out, 3e-6 if state.out.dtype == torch.float32 else 2e-2, "out")
    close(state.lse, true.lse, 3e-6, "lse")
    assert state.out.dtype == q.dtype and state.lse.dtype == torch.float32
    apart = measure(q, k, true.lse, facts, live=live, offsets=(offset, 0), **call)
    found, wanted = _values(facts, sums), _values(facts, apart)
    for name in wanted:
        assert found[name].dtype == torch.float32
        close(found[name], wanted[name], 1e-5, name)


@pytest.mark.parametrize("cells", [1, 2**12, 2**18], ids=["head by head", "some", "all at once"])
@pytest.mark.parametrize("mask", masks(1, 8, 8))
def test_blocks_of_any_size(mask: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CELLS", cells)
    _both(*tensors(SHAPE), mask=masks(2, 150, 190)[mask])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    _both(*tensors(SHAPE, dtype), mask=masks(2, 150, 190)["causal window"])


@pytest.mark.parametrize("sinks", [False, True])
def test_queries_that_do_not_count_have_outputs(sinks: bool) -> None:
    live = torch.arange(150)[None] >= torch.tensor([[0], [40]])
    logits = torch.linspace(-2, 6, 6) if sinks else None
    for name in ("causal", "left padding"):
        _both(*tensors(SHAPE), mask=masks(2, 150, 190)[name], live=live, sinks=logits)


def test_queries_that_see_no_key_give_all_to_the_sink() -> None:
    q, k, v = tensors((1, 2, 2, 70, 70, 8))
    sinks = torch.tensor([1.0, -3.0])
    state, sums = attend_and_measure(
        q, k, v, [Received(), Entropy()], mask=Mask.band(None, -5), sinks=sinks
    )
    assert not state.out[:, :, :5].any()
    close(state.lse[:, :, :5], sinks[None, :, None].expand(1, 2, 5), 1e-6)
    assert all(bool(f.finish(s).isfinite().all()) for f, s in zip((Received(), Entropy()), sums))


def test_nan_stays_where_it_is() -> None:
    q, k, v = tensors((1, 2, 2, 70, 70, 8))
    k[0, 1, 30, 2] = torch.nan
    state, _ = attend_and_measure(q, k, v, [Received()], mask=Mask.causal())
    true = attend(q, k, v, mask=Mask.causal(), kernel="reference")
    assert torch.equal(state.out.isnan(), true.out.isnan())
    assert torch.equal(state.lse.isnan(), true.lse.isnan())


def test_gradients_go_by_attend() -> None:
    grads = []
    for together in (True, False):
        q, k, v = tensors((1, 4, 2, 20, 20, 8), grad=True)
        if together:
            state, sums = attend_and_measure(q, k, v, [Received()], mask=Mask.causal())
            assert not sums[0]["sum"].requires_grad
        else:
            state = attend(q, k, v, mask=Mask.causal())
        grads.append(torch.autograd.grad(state.out.sin().sum() + state.lse.sum(), (q, k, v)))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_step_by_step_gives_what_one_call_gives() -> None:
    q, k, v = tensors((2, 4, 2, 40, 40, 8))
    facts = [Received(), MeanReceived(), Entropy()]
    _, whole = attend_and_measure(q, k, v, facts, mask=Mask.causal())
    _, sums = attend_and_measure(
        q[:, :, :33], k[:, :, :33], v[:, :, :33], facts, mask=Mask.causal()
    )
    for at in range(33, 40):
        one = slice(at, at + 1)
        _, more = attend_and_measure(
            q[:, :, one], k[:, :, : at + 1], v[:, :, : at + 1], facts, mask=Mask.causal(),
            offsets=(at, 0),
        )  # fmt: skip
        view = View(2, 2, 2, 1, at + 1, at, 0, torch.float32, q.device)
        sums = [f.extend(old, new, view) for f, old, new in zip(facts, sums, more)]
    for fact, a, b in zip(facts, sums, whole):
        close(fact.finish(a), fact.finish(b), 1e-5, fact.name)


def test_scores_are_computed_once() -> None:
    """As many multiplications as attention itself, to within a block beside the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = tensors((1, 4, 2, 1024, 1024, 32))
    with FlopCounterMode(display=False) as counter:
        attend_and_measure(q, k, v, [Received(), Entropy()], mask=Mask.causal())
    plain = 2 * 2 * 4 * 32 * 1024 * 1025 / 2
    assert plain < counter.get_total_flops() < 1.1 * plain


def test_rows_too_long_go_by_the_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST", 100)
    monkeypatch.setattr(rows, "sweep", lambda *args, **kwargs: pytest.fail("rows are too long"))
    _both(*tensors(SHAPE), mask=masks(2, 150, 190)["documents"])
