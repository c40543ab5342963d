"""The table of kernels: each equals the reference or refuses with a reason, never in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.core import KERNELS, Mask, Mass, Received, attend, choose, measure
from regard.core.kernels import Inputs, only, reference
from regard.errors import InputError

from .cases import SHAPES, close, masks, tensors

FAST = [name for name in KERNELS if name != "reference"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def _extras(queries: int, keys: int) -> dict[str, dict[str, Any]]:
    bias = torch.randn(1, 1, queries, keys, generator=torch.Generator().manual_seed(5))
    return {"plain": {}, "softcap": {"softcap": 2.0}, "bias": {"bias": bias}}


# each of its calls takes a second on a CPU
CALLS = [(n, s) for n in FAST for s in SHAPES if n != "flex" or s == "B2-T37-S53-H4-Hkv2-D16"]


@pytest.mark.parametrize("name, shape", CALLS)
def test_a_kernel_equals_the_reference_or_says_why_not(name: str, shape: str) -> None:
    batch, _, _, queries, keys, dim = SHAPES[shape]
    kinds = masks(batch, queries, keys)
    if name == "flex":  # every mask is another test's
        kinds = {"left padding": kinds["left padding"]}
    computed = 0
    for dtype, tolerance in TOLERANCE.items():
        q, k, v = tensors(SHAPES[shape], dtype)
        for what, extra in _extras(queries, keys).items():
            if what != "plain" and dtype != torch.float32:
                continue
            for kind, mask in kinds.items():
                inputs = Inputs(q, k, v, mask, dim**-0.5, **extra)
                case = f"{name}, {dtype}, {kind} mask, {what}"
                reason = KERNELS[name].why_not(inputs)
                if reason is not None:
                    with pytest.raises(InputError, match="cannot compute this call") as error:
                        attend(q, k, v, mask=mask, kernel=name, **extra)
                    assert reason in str(error.value), case
                    continue
                state = attend(q, k, v, mask=mask, kernel=name, **extra)
                out, lse = reference.attend(*inputs)
                close(state.out, out, tolerance, f"out, {case}")
                close(state.lse, lse, 1e-3 if tolerance > 1e-3 else tolerance, f"lse, {case}")
                computed += 1
    assert computed or name == "cuda" or queries < 16


def test_the_gpu_kernel_refuses_what_it_would_ignore() -> None:
    """It was never asked: a window, a soft cap and a bias had no effect."""
    why_not = KERNELS["cuda"].why_not

    class Cuda(torch.Tensor):
        device = torch.device("cuda")

    q, k, v = (torch.empty(1, 2, 32, 16).as_subclass(Cuda) for _ in range(3))
    assert why_not(Inputs(q, k, v)) is None
    assert "mask" in str(why_not(Inputs(q, k, v, Mask.window(3))))
    assert "soft cap" in str(why_not(Inputs(q, k, v, softcap=2.0)))
    assert "bias" in str(why_not(Inputs(q, k, v, bias=torch.zeros(1, 1, 32, 32))))
    assert "float64" in str(why_not(Inputs(q.double(), k, v)))


def test_only_one_kernel_for_a_block() -> None:
    q, k, v = tensors((1, 2, 2, 40, 40, 16))
    exact = attend(q, k, v, kernel="reference")
    with only("reference"):
        assert choose(q, k, v) == "reference"
        assert torch.equal(attend(q, k, v).out, exact.out)
        assert choose(q, k, v, softcap=2.0) == "reference"
    with only("cpu"), pytest.raises(InputError, match="no other mask"):
        attend(q, k, v, mask=Mask.window(3))
    assert choose(q, k, v) == "cpu"
    with pytest.raises(InputError, match="Did you mean 'tiled'"), only("tile"):
        pass


@pytest.mark.parametrize("name", [n for n in FAST if n != "cuda"])
@pytest.mark.parametrize("tokens", [7, 40, 300])
def test_nan_goes_where_the_reference_has_it(name: str, tokens: int) -> None:
    """One NaN in a query or a key: rows that see it are NaN, the others are as they were."""
    compared = 0
    for kind, mask in masks(1, tokens, tokens).items():
        for place in (0, tokens // 2, tokens - 1):
            for which in (0, 1):
                given: Any = [t.clone() for t in tensors((1, 2, 1, tokens, tokens, 16))]
                given[which][0, 0, place, 3] = torch.nan
                if KERNELS[name].why_not(Inputs(*given, mask)):
                    continue
                state = attend(*given, mask=mask, kernel=name)
                true = attend(*given, mask=mask, kernel="reference")
                case = f"{kind} mask, NaN in {'qk'[which]} at {place}"
                assert torch.equal(state.out.isnan(), true.out.isnan()), case
                assert torch.equal(state.lse.isnan(), true.lse.isnan()), case
                close(state.out.nan_to_num(), true.out.nan_to_num(), 3e-6, case)
                compared += 1
    assert compared or (name == "spans" and tokens < 16)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"mask": "causal"}, "mask is a regard.core.Mask, not 'causal'"),
        ({"mask": torch.ones(9, 9, dtype=torch.bool)}, r"not a tensor of torch.bool: .*Mask.dense"),
        ({"mask": Mask.padding(torch.ones(2, 7, dtype=torch.bool))}, "padding is 7 keys long"),
        (
            {"mask": Mask.causal() & Mask.padding(torch.ones(1, 11).long())},
            "padding is 11 keys long",
        ),
        ({"mask": ~Mask.documents([3, 4])}, "segments are of 7 queries and 7 keys"),
        ({"mask": Mask.dense(torch.ones(8, 9, dtype=torch.bool))}, "matrix is of 8 queries and 9"),
        ({"bias": torch.zeros(1, 1, 9, 9, dtype=torch.bool)}, "mask=Mask.dense"),
        ({"softcap": 0.0}, "above 0"),
        ({"softcap": float("nan")}, "above 0"),
        ({"scale": float("inf")}, "finite"),
    ],
)
def test_inputs_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    q, k, v = tensors((2, 2, 2, 9, 9, 8))
    lse = attend(q, k, v).lse
    with pytest.raises(InputError, match=message):
        attend(q, k, v, **given)
    with pytest.raises(InputError, match=message):
        measure(q, k, lse, [Received()], **given)


def test_masks_longer_than_the_last_queries() -> None:
    """A step with a cache asks for the last rows of the mask of all."""
    q, k, v = tensors((1, 2, 2, 2, 9, 8))
    whole = Mask.documents([4, 5])
    close(attend(q, k, v, mask=whole).out, attend(q, k[:, :, 4:], v[:, :, 4:]).out, 1e-6)


def test_padding_of_floats_and_odd_shapes() -> None:
    additive = torch.tensor([[0.0, 0.0, -torch.inf]])
    with pytest.raises(InputError, match="boolean or integer"):
        Mask.padding(additive)  # read as numbers, it would hide the tokens
    with pytest.raises(InputError, match=r"\[batch, keys\]"):
        Mask.padding(torch.ones(1, 1, 1, 3).long())
    with pytest.raises(InputError, match="a dense mask is boolean"):
        Mask.dense(additive)
    with pytest.raises(InputError, match=r"not \[1, 3, 3\]"):
        Mask.dense(torch.ones(1, 3, 3, dtype=torch.bool))


def test_what_measure_refuses() -> None:
    q, k, v = tensors((2, 2, 2, 9, 9, 8))
    lse = attend(q, k, v).lse
    with pytest.raises(InputError, match="lse"):
        measure(q, k, lse[:, :, :5], [Received()])
    for live in (torch.ones(2, 9).long(), torch.ones(2, 8, dtype=torch.bool)):
        with pytest.raises(InputError, match="live is boolean"):
            measure(q, k, lse, [Received()], live=live)
    with pytest.raises(InputError, match="one a head"):
        measure(q, k, lse, [Received()], sinks=torch.zeros(3))


@pytest.mark.parametrize("pair", [(1, 2, 3), (4,), 7, "12", (1.5, 3), (True, 2)])
def test_ranges_of_other_than_two_numbers(pair: Any) -> None:
    for make in (
        lambda: Received(band=pair),
        lambda: Received(queries=pair),
        lambda: Mass({"question": pair}),
    ):
        with pytest.raises(InputError, match="two whole numbers"):
            make()
