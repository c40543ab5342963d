"""The Triton kernel equals the dense map. Without a GPU a second process runs these same tests
through Triton's interpreter: Triton decides between the two when it is imported.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regard.core import Mask, Thumbnail, attend, facts, received
from regard.core.facts import FACTS, measure
from regard.core.kernels import reference
from regard.core.kernels import triton as kernel

from .cases import SHAPES, close, masks, tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = kernel.available()
VERSION = tuple(map(int, kernel.triton.__version__.split(".")[:2])) if kernel.INSTALLED else (0, 0)
runs = pytest.mark.skipif(HERE is not None, reason=f"not in this process: {HERE}")
SIZES = {
    **{name: size for name, size in SHAPES.items() if size[3] < 300},  # interpreting is slow
    "B1-T200-H2-Hkv1-D16": (1, 2, 1, 200, 200, 16),
    "B1-T70-S130-H3-Hkv1-D80": (1, 3, 1, 70, 130, 80),  # a head that no power of two fits
    "B1-T33-H2-Hkv2-D256": (1, 2, 2, 33, 33, 256),
    "B1-T90-S40-H2-Hkv1-D16": (1, 2, 1, 90, 40, 16),  # more queries than keys
}
KNOWN = {"none", "full", "causal", "window", "causal window", "left padding", "right padding"}
KNOWN |= {"band apart", "far", "ahead", "padding alone", "two paddings"}


def cases(batch: int, queries: int, keys: int) -> dict[str, Mask | None]:
    """The masks of the shared cases, and some more bands."""
    real = torch.arange(keys)[None] % 7 != torch.arange(batch)[:, None]
    return {
        **masks(batch, queries, keys),
        "far": Mask.band(None, -(keys // 2)),  # the first queries see nothing
        "ahead": Mask.band(-1, 70),
        "padding alone": Mask.padding(real),
        "two paddings": Mask.causal() & Mask.padding(real) & Mask.padding(real.flip(1)),
    }


def truth(q: Tensor, k: Tensor, mask: Mask | None, weights: Tensor | None = None) -> Tensor:
    p = reference.probabilities(q, k, mask)
    return (p if weights is None else p * weights[..., None].double()).sum(2)


def lse(q: Tensor, k: Tensor, mask: Mask | None) -> Tensor:
    scale = q.shape[-1] ** -0.5
    return torch.logsumexp(reference.scores(q, k, mask, scale), -1).float()


@runs
@pytest.mark.parametrize("shape", SIZES)
def test_every_band_gives_the_column_sums_of_the_dense_map(shape: str) -> None:
    size = SIZES[shape]
    q, k, _ = (t.to(DEVICE) for t in tensors(size))
    seen = set()
    for name, mask in cases(size[0], size[3], size[4]).items():
        if not kernel.supports(q, k, mask):
            continue
        seen.add(name)
        found = received(q, k, lse(q, k, mask), mask=mask, kernel="triton")
        assert found.dtype == torch.float32
        close(found, truth(q, k, mask), 1e-5, name)
    assert seen == KNOWN


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_lose_nothing_beyond_the_inputs(dtype: torch.dtype) -> None:
    q, k, _ = (t.to(DEVICE) for t in tensors(SIZES["B1-T70-S130-H3-Hkv1-D80"], dtype))
    for name, mask in {"causal": Mask.causal(), "window": Mask.window(9)}.items():
        found = received(q, k, lse(q, k, mask), mask=mask, kernel="triton")
        close(found, truth(q, k, mask), 1e-5, name)


@runs
def test_weights_of_any_sign_and_any_strides() -> None:
    q, k, _ = (t.to(DEVICE) for t in tensors(SIZES["B2-T37-S53-H4-Hkv2-D16"]))
    weights = torch.randn(2, 4, 37, device=DEVICE)
    mask = Mask.causal() & Mask.window(20)
    state = lse(q, k, mask)
    # as models hand them over: [batch, tokens, heads, head_dim] seen with two axes swapped
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    found = received(q, k, state, mask=mask, weights=weights, kernel="triton")
    close(found, truth(q, k, mask, weights), 1e-5, "weights")
    row = weights[:1, :1]
    found = received(q, k, state, mask=mask, weights=row, kernel="triton")
    close(found, truth(q, k, mask, row.expand_as(weights)), 1e-5, "broadcast weights")


@runs
def test_scale_is_used_and_queries_without_lse_give_nothing() -> None:
    q, k, _ = (t.to(DEVICE) for t in tensors(SIZES["B1-T7-H2-Hkv2-D8"]))
    full = torch.logsumexp(reference.scores(q, k, None, 0.2), -1).float()
    full[:, :, 3:] = -torch.inf
    found = received(q, k, full, scale=0.2, kernel="triton")
    close(found, reference.probabilities(q, k, None, 0.2)[:, :, :3].sum(2), 1e-5)
    assert received(q, k[:, :, :0], full, kernel="triton").shape == (1, 2, 0)
    none = received(q[:, :, :0], k, full[:, :, :0], kernel="triton")
    assert torch.equal(none, torch.zeros_like(none)) and none.shape == (1, 2, 7)


@runs
@pytest.mark.parametrize("shape", ["B2-T37-S53-H4-Hkv2-D16", "B1-T200-H2-Hkv1-D16"])
def test_row_sums_from_the_same_visit(shape: str) -> None:
    """Entropy and distance equal the dense map's, under every band and under padding."""
    size = SIZES[shape]
    q, k, _ = (t.to(DEVICE) for t in tensors(size))
    away = torch.arange(size[3])[:, None] + size[4] - size[3] - torch.arange(size[4])
    for name, mask in cases(size[0], size[3], size[4]).items():
        if not kernel.supports(q, k, mask):
            continue
        found = kernel.sums(
            q, k, lse(q, k, mask), mask=mask, scale=size[5] ** -0.5, entropy=True, distance=True
        )
        p = reference.probabilities(q, k, mask)
        close(found["received"], p.sum(2), 1e-5, name)
        close(found["entropy"], -(p * p.clamp_min(1e-300).log()).sum(-1), 1e-5, name)
        close(found["distance"], (p * away.abs().to(p)).sum(-1), 1e-5, name)


@runs
def test_a_sweep_gives_what_the_tiles_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """All facts at once, padding and an offset of the keys included."""
    q, k, _ = (t.to(DEVICE) for t in tensors(SIZES["B2-T37-S53-H4-Hkv2-D16"]))
    live = torch.arange(37)[None] >= torch.tensor([[0], [5]])
    mask = Mask.causal() & Mask.padding(torch.arange(53)[None] >= torch.tensor([[0], [5]]))
    asked = [FACTS[n]() for n in ("mean_received", "entropy", "distance", "waad", "received")]
    given: dict[str, Any] = {"mask": mask, "live": live.to(DEVICE), "offsets": (20, 4)}
    state = lse(q, k, mask)
    wanted = measure(q.cpu(), k.cpu(), state.cpu(), asked, **{**given, "live": live})
    # the interpreter's tensors are on the CPU, where nothing is swept
    monkeypatch.setattr(facts, "_on_gpu", lambda *call: facts.sweep(*call))
    swept = measure(q, k, state, asked, **given)
    for fact, a, b in zip(asked, swept, wanted):
        close(fact.finish(a).cpu(), fact.finish(b), 1e-5, fact.name)


@runs
def test_a_sweep_for_every_bin_gives_the_thumbnail_too(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = (t.to(DEVICE) for t in tensors((2, 4, 2, 77, 77, 16)))
    live = torch.arange(77)[None] >= torch.tensor([[0], [20]])
    asked = [FACTS[n]() for n in ("mean_received", "entropy", "distance")]
    asked += [Thumbnail(cells=5), Thumbnail(cells=5), FACTS["influence"]()]
    sums = kernel.sums
    seen: list[int] = []

    def counted(q: Tensor, *given: Any, **named: Any) -> Any:
        seen.append(q.shape[2])
        return sums(q, *given, **named)

    monkeypatch.setattr(importlib.import_module("regard.core.facts.sweep"), "NARROW", 16)
    monkeypatch.setattr(kernel, "sums", counted)
    for mask in (None, Mask.causal(), Mask.band(9, 20), Mask.causal() & Mask.padding(live)):
        given: dict[str, Any] = {"mask": mask, "live": live}
        state = lse(q, k, mask)
        wanted = measure(q.cpu(), k.cpu(), state.cpu(), asked, **given)
        with monkeypatch.context() as patch:
            patch.setattr(facts, "_on_gpu", lambda *call: facts.sweep(*call))
            found = measure(q, k, state, asked, mask=mask, live=live.to(DEVICE))
        for fact, a, b in zip(asked, found, wanted):
            close(fact.finish(a).cpu(), fact.finish(b), 1e-5, fact.name)
    assert seen.count(16) == 4 * 4  # 77 tokens are four bins of 16 and one of 13
    assert seen.count(13) == 4


@pytest.mark.parametrize("most, together", [(1, 1), (2, 2), (4, 3), (6, 6), (99, 6)])
def test_heads_go_as_many_at_a_time_as_the_cache_holds(
    most: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, _ = (t.to(DEVICE) for t in tensors((2, 6, 2, 70, 130, 16)))
    monkeypatch.setattr(kernel, "CACHE", most * 70 * 16 * q.element_size() + 1)
    assert kernel._together(q) == together
    if HERE is None:
        mask = Mask.causal()
        state = attend(q, k, k, mask=mask).lse
        close(received(q, k, state, mask=mask, kernel="triton"), truth(q, k, mask), 1e-5)


@runs
def test_what_it_cannot_do_is_refused() -> None:
    q, k, _ = (t.to(DEVICE) for t in tensors(SIZES["B1-T7-H2-Hkv2-D8"]))
    state = attend(q, k, k).lse
    with pytest.raises(ValueError, match="leave kernel=None"):
        received(q, k, state, mask=Mask.causal() | Mask.prefix(2), kernel="triton")
    with pytest.raises(ValueError, match="leave kernel=None"):
        received(q.double(), k.double(), state, kernel="triton")
    with pytest.raises(ValueError, match="gradients"):
        received(q.clone().requires_grad_(), k, state, kernel="triton")


def test_the_kernel_of_received_goes_by_name() -> None:
    q, k, _ = tensors(SHAPES["B2-T37-S53-H4-Hkv2-D16"])
    mask = Mask.causal()
    state = attend(q, k, k, mask=mask).lse
    for name in (None, "tiles", "fused"):
        close(received(q, k, state, mask=mask, kernel=name), truth(q, k, mask), 1e-5, str(name))
    with pytest.raises(ValueError, match="tiles, fused, triton"):
        received(q, k, state, mask=mask, kernel="magic")
    with pytest.raises(ValueError, match="takes no weights"):
        received(q, k, state, mask=mask, weights=torch.ones(37), kernel="tiles")
    if HERE is not None:
        with pytest.raises(ValueError, match="cannot run"):
            received(q, k, state, mask=mask, kernel="triton")


@pytest.mark.skipif(not kernel.INSTALLED, reason="Triton is not installed")
@pytest.mark.skipif(HERE is None, reason="the tests above run here")
@pytest.mark.skipif(VERSION < (3, 7), reason="older interpreters do not get along with NumPy 2.4")
def test_all_of_this_in_the_interpreter() -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, str(Path(__file__).relative_to(root))],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(SIZES) + 15} passed" in done.stdout, done.stdout


@pytest.mark.skipif(
    not kernel.INSTALLED or kernel.INTERPRETED, reason="no compiler in this process"
)
@pytest.mark.parametrize(
    "dtype, dim, band", [("fp32", 64, True), ("bf16", 80, True), ("bf16", 128, False)]
)
def test_it_compiles_for_a_gpu_that_need_not_be_here(
    dtype: str, dim: int, band: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns where this is not said
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = kernel._sizes(dim, 4 if dtype == "fp32" else 2)
    constants = {"DIM": dim, **{n: v for n, v in sizes.items() if n.isupper()}}
    flags = ("BEFORE", "AFTER", "WEIGHTED", "HIDDEN", "ENTROPY", "DISTANCE")
    constants |= dict.fromkeys(flags, band)
    constants |= dict.fromkeys(("q_d", "k_d", "l_t", "w_t"), 1)
    kinds = {"q": f"*{dtype}", "k": f"*{dtype}", "scale": "fp32"}
    kinds |= dict.fromkeys(("lse", "weights", "out", "entropy", "distance"), "*fp32")
    kinds["hidden"] = "*i8"
    kinds |= dict.fromkeys(constants, "constexpr")
    signature = {n: kinds.get(n, "i32") for n in kernel._kernel.arg_names}
    source = ASTSource(kernel._kernel, signature, constants)
    made = kernel.triton.compile(
        source, target=GPUTarget("cuda", 80, 32), options={"num_warps": sizes["num_warps"]}
    )
    assert ("mma" in made.asm["ptx"]) == (dtype == "bf16")  # float32 products are not rounded
    assert made.metadata.shared <= 99 * 1024  # what the smallest of these GPUs lends one program
