"""What runs otherwise on a GPU (kernels, the sweep of facts, the doors), against the truth."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch

import regard
from regard.core import Mask, Thumbnail, attend
from regard.core.facts import FACTS, measure
from regard.core.kernels import reference, tiled
from regard.errors import InputError
from regard.zoo.tiny import inputs, tiny

from .core.cases import close, masks, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
SIZE = (2, 4, 2, 203, 203, 32)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def on_gpu(dtype: torch.dtype, grad: bool = False) -> list[torch.Tensor]:
    return [t.to("cuda", dtype).requires_grad_(grad) for t in tensors(SIZE)]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kernel", [None, "cuda", "flex", "tiled"])
def test_every_kernel_equals_the_reference(kernel: str | None, dtype: torch.dtype) -> None:
    q, k, v = on_gpu(dtype)
    known = masks(2, 203, 203)
    names = ["none", "causal"] if kernel == "cuda" else ["none", "causal", "window", "left padding"]
    for name in names:
        out, lse = reference.attend(q, k, v, known[name], SIZE[-1] ** -0.5)
        found = attend(q, k, v, mask=known[name], kernel=kernel)
        close(found.out.float(), out, CLOSE[dtype], f"{name}: out")
        close(found.lse, lse, CLOSE[dtype], f"{name}: lse")


def test_gradients_of_out_and_lse() -> None:
    q, k, v = on_gpu(torch.float32, grad=True)
    state = attend(q, k, v, mask=Mask.causal())
    found = torch.autograd.grad(state.out.sum() + state.lse.sin().sum(), (q, k, v))
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = reference.attend(*exact, Mask.causal(), SIZE[-1] ** -0.5)
    true = torch.autograd.grad(out.sum() + lse.sin().sum(), exact)
    for a, b in zip(found, true):
        close(a, b, 1e-4)


@pytest.mark.parametrize("name", ["window", "prefix", "documents", "left padding", "rule"])
def test_gradients_of_flex_are_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "backward", lambda *_: pytest.fail("took the slow way"))
    mask = masks(2, 203, 203)[name]
    q, k, v = on_gpu(torch.float32, grad=True)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = reference.attend(*exact, mask, SIZE[-1] ** -0.5)
    state = attend(q, k, v, mask=mask, kernel="flex")
    seen = lse > -torch.inf
    true = torch.autograd.grad(out.sin().sum() + lse[seen].sin().sum(), exact)
    loss = state.out.sin().sum() + state.lse[seen].sin().sum()
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(loss, (q, k, v), retain_graph=True), true):
            close(a, b, 1e-4)


@pytest.mark.parametrize("dtype", CLOSE)
def test_facts_of_a_sweep_equal_those_of_tiles(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("regard.core.facts.sweep"), "NARROW", 16)
    q, k, v = on_gpu(dtype)
    names = ("mean_received", "received", "entropy", "distance", "waad", "influence")
    asked = [*(FACTS[n]() for n in names), Thumbnail(cells=8)]
    for name, mask in masks(2, 203, 203).items():
        state = attend(q, k, v, mask=mask)
        found = measure(q, k, state.lse, asked, mask=mask)
        wide = [t.cpu().double() for t in (q, k)]
        _, lse = reference.attend(*wide, wide[1], mask, SIZE[-1] ** -0.5)
        wanted = measure(*wide, lse, asked, mask=mask)
        for fact, a, b in zip(asked, found, wanted):
            close(fact.finish(a).cpu(), fact.finish(b), CLOSE[dtype], f"{name}: {fact.name}")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_watching_a_model_gives_what_it_gives_on_a_cpu(family: str) -> None:
    model: Any = tiny(family)
    given = inputs(family, model, padding=3)
    names = ["mean_received", "entropy", "distance"]
    with torch.no_grad(), regard.watch(model, facts=names) as seen:
        model(**given)
    model = model.to("cuda")
    given = {n: t.to("cuda") for n, t in given.items()}
    with torch.no_grad():
        before = model(**given)[0]
        with regard.watch(model, facts=names) as again:
            model(**given)
        assert torch.equal(model(**given)[0], before)
    for name in names:
        for layer in seen[name]:
            close(again[name][layer].cpu(), seen[name][layer], 1e-3, f"{name} {layer}")


def test_weights_that_are_not_finite_are_told_when_a_result_is_read() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    model = model.to("cuda")
    given = {n: t.to("cuda") for n, t in inputs("llama", model, padding=3).items()}
    with torch.no_grad(), regard.watch(model, facts=["received"]) as seen:
        model(**given)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn are not finite"):
        seen["received"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 2])
def test_gradients_of_out_alone_come_from_the_fused_backward(
    heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [t.to("cuda", dtype).requires_grad_() for t in tensors((2, 4, heads, 203, 203, 32))]
    monkeypatch.setattr(tiled, "backward", lambda *_: pytest.fail("took the slow way"))
    grad = torch.randn(2, 4, 203, 32, device="cuda", dtype=dtype)
    found = torch.autograd.grad(attend(*given, mask=Mask.causal()).out, given, grad)
    exact = [t.detach().double().requires_grad_() for t in given]
    out = reference.attend(*exact, Mask.causal(), SIZE[-1] ** -0.5)[0]
    for a, b in zip(found, torch.autograd.grad(out, exact, grad.double())):
        close(a.float(), b, CLOSE[dtype])
