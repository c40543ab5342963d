"""Kernels of other packages: FlashAttention, FlashInfer, xFormers, transformers, diffusers.

The adapters of CUDA packages follow their documentation; without a GPU nothing here tests them.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .kernel import (
    Attention,
    Kernel,
    dense_bytes,
    dtype_name,
    flex_mask,
    flex_refuses,
    gpu_flash,
    no_dense_mask,
    not_half,
    only,
)


def _package(module: str, pip: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"not installed: pip install {pip}"
        return only("cuda", pip)(device)

    return missing


def _fa_refuses(case: Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype_name(case)}"
    if case.pattern in _FA:
        return None
    return "expresses full, causal, windows and documents only: it cannot express this mask"


_FA = (
    "full",
    "causal",
    "sliding_window",
    "sliding_window_causal",
    "full_document",
    "causal_document",
)


def _flash_attn(module: str, case: Case) -> Attention:
    flash = importlib.import_module(module)
    causal = case.pattern in ("causal", "causal_document", "sliding_window_causal")
    w = case.parameters.get("window")
    window = (-1, -1) if w is None else (w, 0 if causal else w)
    lengths = case.parameters.get("lengths")
    if lengths is None:

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = flash.flash_attn_func(q, k, v, causal=causal, window_size=window)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return run
    edges = torch.tensor([0, *lengths], device=case.device).cumsum(0).to(torch.int32)
    longest = max(lengths)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
        out = flash.flash_attn_varlen_func(
            q, k, v, cu_seqlens_q=edges, cu_seqlens_k=edges, max_seqlen_q=longest,
            max_seqlen_k=longest, causal=causal,
        )  # fmt: skip
        return (out[0] if isinstance(out, tuple) else out).transpose(0, 1)[None]

    return packed


def _flashinfer(case: Case) -> Attention:
    import flashinfer

    given = case.sdpa
    mask = given.get("attn_mask")
    mask = None if mask is None else mask[0, 0]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
        out = flashinfer.single_prefill_with_kv_cache(
            q, k, v, custom_mask=mask, causal="is_causal" in given
        )
        return out.transpose(0, 1)[None]

    return run


def _flashinfer_refuses(case: Case) -> str | None:
    if case.backward:
        return "has no backward"
    return not_half(case)


def _xformers(case: Case) -> Attention:
    from xformers import ops

    bias: Any = None
    lengths = case.parameters.get("lengths")
    if case.pattern == "causal":
        bias = ops.LowerTriangularMask()
    elif case.pattern in ("full_document", "causal_document") and lengths:
        bias = ops.fmha.BlockDiagonalMask.from_seqlens(lengths)
        bias = bias.make_causal() if case.pattern == "causal_document" else bias
    groups = case.heads // case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ops.memory_efficient_attention(q, k, v, attn_bias=bias).transpose(1, 2)

    return run


def _xformers_refuses(case: Case) -> str | None:
    if case.pattern in ("full", "causal", "full_document", "causal_document"):
        return None
    return "this adapter expresses full, causal and document masks only"


def packages() -> Iterable[Kernel]:
    kernel = partial(Kernel, origin="package")
    for name, module, pip in (
        ("flash-attn-2", "flash_attn", "flash-attn"),
        ("flash-attn-3", "flash_attn_interface", "flash-attn-3"),
    ):
        yield kernel(name, what="Dao's FlashAttention", prepare=partial(_flash_attn, module),
                  missing=_package(module, pip), refuses=_fa_refuses)  # fmt: skip
    yield kernel("flashinfer", what="FlashInfer's prefill", prepare=_flashinfer,
              missing=_package("flashinfer", "flashinfer-python"), need=dense_bytes,
              refuses=_flashinfer_refuses)  # fmt: skip
    yield kernel("xformers", what="xFormers' memory-efficient attention", prepare=_xformers,
              missing=_package("xformers", "xformers"), refuses=_xformers_refuses)  # fmt: skip


# -- frameworks ---------------------------------------------------------------------------------
class _Layer(torch.nn.Module):
    """As much of an attention layer as the registered functions read."""

    def __init__(self, groups: int, causal: bool) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = causal
        self.layer_idx = 0
        self.training = False


def _transformers(name: str, case: Case) -> Attention:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registered

    function = registered[name]
    layer = _Layer(case.heads // case.kv_heads, case.pattern == "causal")
    mask: Any = case.sdpa.get("attn_mask") if "flex" not in name else None
    if "flex" in name and case.pattern != "full":
        mask = flex_mask(case)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(layer, q, k, v, mask, dropout=0.0, scaling=case.dim**-0.5,
                       is_causal=layer.is_causal)  # fmt: skip
        return out[0].transpose(1, 2)

    return run


def _transformers_missing(name: str, device: str) -> str | None:
    if "paged" in name:
        return "needs transformers' paged cache: it is no function of q, k and v alone"
    if "flash" in name:
        return _package("flash_attn", "flash-attn")(device)
    return None


def _transformers_refuses(name: str, case: Case) -> str | None:
    if "flash" in name:
        return gpu_flash(case)
    return flex_refuses(case) if "flex" in name else None


def transformers() -> Iterable[Kernel]:
    try:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registered
    except ImportError:
        return
    for name in sorted(registered.keys()):
        if name.startswith("regard"):
            continue  # the door itself: it is asked through a model
        yield Kernel(
            f"transformers:{name}",
            "transformers",
            "registered with AttentionInterface",
            partial(_transformers, name),
            missing=partial(_transformers_missing, name),
            refuses=partial(_transformers_refuses, name),
            need=lambda c, flex="flex" in name: 0.0 if flex else dense_bytes(c),  # type: ignore[misc]
        )


def _diffusers(name: str, case: Case) -> Attention:
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    given, grouped = case.sdpa, case.heads != case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = dispatch_attention_fn(
            q, k, v, enable_gqa=grouped, backend=AttentionBackendName(name), **given
        )
        return out.transpose(1, 2)

    return run


def _diffusers_missing(name: str, device: str) -> str | None:
    if name == "flex" or name.startswith(("native", "_native")):
        gpu_only = ("cudnn", "efficient", "flash")
        if device == "cpu" and any(word in name for word in gpu_only) and "math" not in name:
            return f"diffusers' {name} runs on cuda, not on cpu" if "flash" not in name else None
        return f"diffusers' {name} runs on {name[-3:]}" if name.endswith(("npu", "xla")) else None
    return only("cuda", f"diffusers' {name}")(device) or _diffusers_lacks(name)


def _diffusers_lacks(name: str) -> str | None:
    """What the dispatcher itself says that this backend needs and does not find."""
    from diffusers.models import attention_dispatch

    check = getattr(attention_dispatch, "_check_attention_backend_requirements", None)
    if check is None or not hasattr(attention_dispatch, "AttentionBackendName"):
        return None
    try:
        check(attention_dispatch.AttentionBackendName(name))
    except Exception as problem:  # each backend raises what its package raises
        first = next((t.strip() for t in str(problem).splitlines() if t.strip()), "its package")
        return f"not installed: {first}"
    return None


def _diffusers_refuses(name: str, case: Case) -> str | None:
    if name == "flex":
        return "diffusers hands a dense mask to FlexAttention: take the kernel flex instead"
    masked = name.startswith(("native", "_native")) and "flash" not in name
    return None if masked else no_dense_mask(case)


def diffusers() -> Iterable[Kernel]:
    if importlib.util.find_spec("diffusers") is None:
        yield Kernel(
            "diffusers",
            "diffusers",
            "whatever its dispatcher has",
            partial(_diffusers, "native"),
            missing=lambda device: "not installed: pip install diffusers",
        )
        return
    from diffusers.models.attention_dispatch import AttentionBackendName

    for backend in AttentionBackendName:
        yield Kernel(
            f"diffusers:{backend.value}",
            "diffusers",
            "of its attention dispatcher",
            partial(_diffusers, backend.value),
            missing=partial(_diffusers_missing, backend.value),
            refuses=partial(_diffusers_refuses, backend.value),
            need=dense_bytes,
        )
