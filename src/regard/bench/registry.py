"""Every attention kernel the bench knows, found by name: regard's, torch's, packages', frameworks',
and a user's own.

A kernel prepares a call (mask forms are made outside the timed part) and says beforehand why it
cannot: not installed or no such device (`missing`), or this call is not one of its (`refuses`).
The adapters of CUDA packages follow their documentation; where no GPU is at hand nothing tests them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core import Mask, attend, patterns
from regard.core.mask import Band, Both, Either, Inverse, Predicate, Prefix, Segments
from regard.errors import InputError, nearest

Attention = Callable[[Tensor, Tensor, Tensor], Any]  # (q, k, v) -> out, or (out, ...)
BLOCK = 128  # of FlexAttention's block masks


@dataclass
class Case:
    """One mask at one length with one shape of heads: what every kernel is asked.

    Attributes:
        name: the mask as the user wrote it, `pattern` or `pattern:parameter=value,...`.
        total: tokens. heads, kv_heads, dim: of the call, batch 1.
        backward: whether gradients of q, k and v are wanted.
    """

    name: str
    total: int
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backward: bool = False
    seed: int = 42

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """Every parameter of the mask, drawn where it was left open."""
        return parameters(self.name, self.total, self.seed)

    @property
    def pattern(self) -> str:
        """Name of the pattern, without parameters."""
        return self.name.partition(":")[0]

    @cached_property
    def mask(self) -> Mask:
        """The mask itself."""
        return patterns.build(self.pattern, self.total, **self.parameters)

    @cached_property
    def area(self) -> int:
        """Allowed pairs, exact."""
        return int(self.mask.area(self.total, self.total))

    @cached_property
    def sdpa(self) -> dict[str, Any]:
        """Arguments of torch's attention, the dense mask among them where one is needed."""
        return self.mask.sdpa(self.total, self.total, self.device)

    def flops(self, backward: bool | None = None) -> float:
        """4 area heads dim forward, 2.5 times that backward: only allowed pairs count.

        >>> Case("causal", 4, heads=1, kv_heads=1, dim=1).flops()
        40.0
        """
        once = 4.0 * self.area * self.heads * self.dim
        return once * (2.5 if (self.backward if backward is None else backward) else 1.0)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Standard normal q, k, v, the same for every kernel."""
        make = torch.Generator().manual_seed(self.seed)
        return tuple(  # type: ignore[return-value]
            torch.randn(1, h, self.total, self.dim, generator=make)
            .to(self.device, self.dtype)
            .requires_grad_(self.backward)
            for h in (self.heads, self.kv_heads, self.kv_heads)
        )

    @property
    def matrix(self) -> int:
        """Bytes of one score matrix of every head."""
        return self.heads * self.total**2 * max(4, self.dtype.itemsize)


def parameters(name: str, total: int, seed: int) -> dict[str, Any]:
    """The parameters of a mask by name: what was written, then what is drawn.

    Windows and blocks are 1024 tokens, as in the paper, but at most an eighth of the length:
    otherwise short ones would all be the full mask.

    >>> parameters("sliding_window:window=5", 100, 0), parameters("sliding_window", 2048, 0)
    ({'window': 5}, {'window': 256})
    """
    pattern, _, written = name.partition(":")
    if pattern not in patterns.PATTERNS:
        raise InputError(f"unknown mask {pattern!r}.{nearest(pattern, patterns.PATTERNS)}")
    known = patterns.PATTERNS[pattern].parameters
    found: dict[str, Any] = {"seed": seed} if "seed" in known else {}
    short = max(2, min(1024, total // 8))
    if pattern.startswith("sliding_window"):
        found["window"] = short
    if pattern == "block_causal_document":
        found["block"] = short
    if "block" in known and patterns.PATTERNS[pattern].kind == "dynamic":
        found["block"] = min(64 if pattern == "block_sparse" else 128, max(2, total // 4))
    for piece in filter(None, written.split(",")):
        key, _, value = piece.partition("=")
        if key not in known or key == "lengths":
            choices = ", ".join(k for k in known if k != "lengths") or "no parameter"
            raise InputError(f"the mask {pattern} takes {choices}, not {piece!r}")
        try:
            found[key] = float(value) if key == "density" else int(value)
        except ValueError:
            raise InputError(f"{piece!r} in the mask {name!r} is no number") from None
    if "lengths" in known and pattern != "block_causal_document":
        found["lengths"] = patterns.documents(total, seed=found.get("seed", seed))
    return found


@dataclass(frozen=True)
class Kernel:
    """One row of the registry.

    Attributes:
        prepare: `prepare(case) -> (q, k, v) -> out`; NotImplementedError means unsupported.
        missing: why it is not there at all on this device, or None.
        refuses: why it cannot take a case, or None.
        need: bytes a call takes beside q, k, v and out, roughly; a bound of the memory guard.
    """

    name: str
    origin: str
    what: str
    prepare: Callable[[Case], Attention]
    missing: Callable[[str], str | None] = lambda device: None
    refuses: Callable[[Case], str | None] = lambda case: None
    need: Callable[[Case], float] = lambda case: 0.0
    not_installed: bool = field(default=False, compare=False)


# -- regard's own and the plain formula -----------------------------------------------------------
def _attend(name: str | None, case: Case) -> Attention:
    mask = case.mask
    return lambda q, k, v: attend(q, k, v, mask=mask, kernel=name).out


def _naive(case: Case) -> Attention:
    allowed = case.mask.cells(case.total, case.total, device=case.device)
    groups, scale = case.heads // case.kv_heads, case.dim**-0.5

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
        return torch.softmax(scores, -1) @ v

    return run


def _only(device: str, what: str) -> Callable[[str], str | None]:
    def missing(have: str) -> str | None:
        if have.split(":")[0] == device:
            return None
        return f"{what} runs on {device}, not on {have}"

    return missing


def _regard() -> Iterable[Kernel]:
    own = partial(Kernel, origin="regard")
    yield own("attend", what="regard's choice for the call", prepare=partial(_attend, None))
    yield own(
        "spans",
        what="torch's fused CPU kernel, one call a query block over the keys it sees",
        prepare=partial(_attend, "spans"),
        missing=_only("cpu", "the fused CPU kernel"),
        refuses=lambda c: "float16 is not for CPUs" if c.dtype == torch.float16 else None,
    )
    yield own("tiled", what="running softmax over tiles", prepare=partial(_attend, "tiled"))
    yield own(
        "reference",
        what="dense float64, the truth",
        prepare=partial(_attend, "reference"),
        need=lambda c: 8.0 * c.heads * c.total**2 * 4,
    )
    yield Kernel(
        "naive",
        "torch",
        "matrix, mask, softmax, product",
        _naive,
        need=lambda c: c.matrix * (4.0 if c.backward else 3.0),
    )


# -- torch -----------------------------------------------------------------------------------------
def _sdpa(backend: str | None, case: Case) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    given, grouped = case.sdpa, case.heads != case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, enable_gqa=grouped, **given
        )

    if backend is None:
        return run
    chosen = getattr(SDPBackend, backend)

    def forced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return run(q, k, v)

    return forced


def _dense(case: Case) -> float:
    """The boolean mask and its additive copy, where one is needed."""
    plain = case.pattern in ("full", "causal")
    return 0.0 if plain else case.total**2 * (1.0 + case.dtype.itemsize)


def _no_dense_mask(case: Case) -> str | None:
    if case.pattern in ("full", "causal"):
        return None
    return "takes no mask but causal: it cannot express this one"


def _gpu_flash(case: Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {_dtype(case)}"
    return _no_dense_mask(case)


def _no_groups(case: Case) -> str | None:
    return "takes no grouped heads" if case.heads != case.kv_heads else None


def _cudnn(case: Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {_dtype(case)}"
    return None


def _dtype(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def _torch() -> Iterable[Kernel]:
    own = partial(Kernel, origin="torch")
    yield own("sdpa", what="scaled_dot_product_attention as it is", need=_dense,
              prepare=partial(_sdpa, None))  # fmt: skip
    yield own(
        "sdpa-math",
        what="its plain formula",
        prepare=partial(_sdpa, "MATH"),
        need=lambda c: c.matrix * (4.0 if c.backward else 3.0),
    )
    flash = partial(_sdpa, "FLASH_ATTENTION")
    yield own("sdpa-cpu-flash", what="its fused CPU kernel", prepare=flash, need=_dense,
              missing=_only("cpu", "the fused CPU kernel"))  # fmt: skip
    yield own("sdpa-cuda-flash", what="its FlashAttention", prepare=flash, refuses=_gpu_flash,
              missing=_only("cuda", "FlashAttention"))  # fmt: skip
    yield own(
        "sdpa-efficient",
        what="its memory-efficient kernel",
        prepare=partial(_sdpa, "EFFICIENT_ATTENTION"),
        missing=_only("cuda", "the memory-efficient kernel"),
        refuses=_no_groups,
        need=_dense,
    )
    yield own(
        "sdpa-cudnn",
        what="cuDNN's fused kernel",
        prepare=partial(_sdpa, "CUDNN_ATTENTION"),
        missing=_only("cuda", "cuDNN"),
        refuses=_cudnn,
        need=_dense,
    )
    yield own(
        "flex",
        what="FlexAttention, not compiled",
        prepare=partial(_flex, False),
        need=lambda c: c.matrix * 5.0,
    )
    yield own(
        "flex-compiled",
        what="FlexAttention, compiled (compile time apart)",
        prepare=partial(_flex, True),
        missing=_no_compiler,
        refuses=_flex_refuses,
    )


def _no_compiler(device: str) -> str | None:
    import shutil

    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "compiling for a CPU needs a C++ compiler: install g++"
    return None


def _flex_refuses(case: Case) -> str | None:
    if case.device == "cpu" and case.backward:
        return "FlexAttention has no compiled backward on CPUs"
    return None


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # every mask is a graph of its own
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(flex_attention, dynamic=False)


def _flex(compiled: bool, case: Case) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    block = None
    if case.pattern != "full":
        block = case.mask.block_mask(case.total, case.total, case.device, BLOCK)
        block.mask_mod = pointwise(case.mask, case.device)
    call, grouped = _compiled() if compiled else flex_attention, case.heads != case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, block_mask=block, enable_gqa=grouped)

    return run


def pointwise(mask: Mask, device: str = "cpu") -> Predicate:
    """The mask as a rule on single indices, in operations that FlexAttention can compile."""
    if isinstance(mask, Band):
        before, after = mask.before, mask.after

        def band(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            ok = i == i
            if before is not None:
                ok = ok & (i - j <= before)
            return ok if after is None else ok & (i - j >= -after)

        return band
    if isinstance(mask, Prefix):
        return lambda b, h, i, j: j < mask.n
    if isinstance(mask, Segments):
        queries, keys = mask.queries[0].to(device), mask.keys[0].to(device)
        return lambda b, h, i, j: (queries[i] == keys[j]) & (queries[i] >= 0)
    if isinstance(mask, patterns.Steps):
        return lambda b, h, i, j: j // mask.size <= i // mask.size
    if isinstance(mask, patterns.Blocks):
        keep = mask.keep.to(device)
        rows, cols = (
            torch.repeat_interleave(torch.arange(len(e) - 1), e.diff()).to(device)
            for e in (mask.edges_q, mask.edges_k)
        )
        return lambda b, h, i, j: keep[rows[i], cols[j]]
    if isinstance(mask, Inverse):
        inner = pointwise(mask.inner, device)
        return lambda b, h, i, j: ~inner(b, h, i, j)
    if isinstance(mask, (Both, Either)):
        one, two = pointwise(mask.left, device), pointwise(mask.right, device)
        if isinstance(mask, Both):
            return lambda b, h, i, j: one(b, h, i, j) & two(b, h, i, j)
        return lambda b, h, i, j: one(b, h, i, j) | two(b, h, i, j)
    raise NotImplementedError(f"no pointwise rule for a {type(mask).__name__} mask")


# -- packages ----------------------------------------------------------------------------------------
def _package(module: str, pip: str) -> Callable[[str], str | None]:
    def missing(device: str) -> str | None:
        if importlib.util.find_spec(module) is None:
            return f"not installed: pip install {pip}"
        return _only("cuda", pip)(device)

    return missing


def _fa_refuses(case: Case) -> str | None:
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {_dtype(case)}"
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
    return _cudnn(case)


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


def _packages() -> Iterable[Kernel]:
    own = partial(Kernel, origin="package")
    for name, module, pip in (
        ("flash-attn-2", "flash_attn", "flash-attn"),
        ("flash-attn-3", "flash_attn_interface", "flash-attn-3"),
    ):
        yield own(name, what="Dao's FlashAttention", prepare=partial(_flash_attn, module),
                  missing=_package(module, pip), refuses=_fa_refuses)  # fmt: skip
    yield own("flashinfer", what="FlashInfer's prefill", prepare=_flashinfer,
              missing=_package("flashinfer", "flashinfer-python"), need=_dense,
              refuses=_flashinfer_refuses)  # fmt: skip
    yield own("xformers", what="xFormers' memory-efficient attention", prepare=_xformers,
              missing=_package("xformers", "xformers"), refuses=_xformers_refuses)  # fmt: skip


# -- frameworks ---------------------------------------------------------------------------------------
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
        mask = case.mask.block_mask(case.total, case.total, case.device, BLOCK)
        mask.mask_mod = pointwise(case.mask, case.device)

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
        return _gpu_flash(case)
    return _flex_refuses(case) if "flex" in name else None


def _from_transformers() -> Iterable[Kernel]:
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
            need=lambda c, flex="flex" in name: 0.0 if flex else _dense(c),  # type: ignore[misc]
        )


def _diffusers(name: str, case: Case) -> Attention:
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    given, grouped = case.sdpa, case.heads != case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = dispatch_attention_fn(q, k, v, enable_gqa=grouped, backend=name, **given)
        return out.transpose(1, 2)

    return run


def _diffusers_missing(name: str, device: str) -> str | None:
    if name == "flex" or name.startswith(("native", "_native")):
        gpu_only = ("cudnn", "efficient", "flash")
        if device == "cpu" and any(word in name for word in gpu_only) and "math" not in name:
            return f"diffusers' {name} runs on cuda, not on cpu" if "flash" not in name else None
        return f"diffusers' {name} runs on {name[-3:]}" if name.endswith(("npu", "xla")) else None
    return _only("cuda", f"diffusers' {name}")(device)


def _diffusers_refuses(name: str, case: Case) -> str | None:
    if name == "flex":
        return "diffusers hands a dense mask to FlexAttention: take the kernel flex instead"
    return None if name.startswith(("native", "_native")) else _no_dense_mask(case)


def _from_diffusers() -> Iterable[Kernel]:
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
            need=_dense,
        )


# -- the user's own --------------------------------------------------------------------------------
def load(where: str) -> Kernel:
    """The kernel `file.py:function`; the file is run as Python, so name only what you trust.

    The function is `fn(q, k, v, mask) -> out` or `-> (out, lse)`, with q `[1, heads, T, dim]`, k and
    v `[1, kv_heads, T, dim]` and a `regard.core.Mask`; it raises NotImplementedError, with the
    reason, for what it does not do.

    Raises:
        InputError: no such file or function, or a file that does not run.
    """
    file, colon, function = where.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not function.isidentifier():
        raise InputError(f"{where!r} names no kernel: write mykernel.py:function")
    if not path.is_file():
        raise InputError(f"there is no file {file}: write mykernel.py:function")
    spec = importlib.util.spec_from_file_location(f"regard_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is no Python file: write mykernel.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        raise InputError(f"{file} does not run: {type(problem).__name__}: {problem}") from problem
    fn = getattr(module, function, None)
    if not callable(fn):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{file} has no function {function!r}.{nearest(function, names)}")

    def prepare(case: Case) -> Attention:
        mask = case.mask
        return lambda q, k, v: fn(q, k, v, mask)

    return Kernel(f"{path.name}:{function}", "user", "your own", prepare)


def kernels() -> dict[str, Kernel]:
    """All kernels by name, those that cannot run here included."""
    found: dict[str, Kernel] = {}
    for source in (_regard, _torch, _packages, _from_transformers, _from_diffusers):
        found.update({k.name: k for k in source()})
    return found


def why_not(kernel: Kernel, case: Case) -> tuple[str, str] | None:
    """(outcome, reason) where the kernel will not take the case; None if it will."""
    reason = kernel.missing(case.device)
    if reason is not None:
        return ("not installed" if reason.startswith("not installed") else "unsupported"), reason
    reason = kernel.refuses(case)
    return None if reason is None else ("unsupported", reason)


def chosen(names: str | Iterable[str], known: Iterable[str], what: str) -> list[str]:
    """The names of a comma-separated list, "all" for all; unknown ones are refused.

    >>> chosen("a,b", ["a", "b", "c"], "kernel")
    ['a', 'b']
    """
    known = list(known)
    wanted = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    found: list[str] = []
    for name in filter(None, wanted):
        if name == "all":
            found += known
        elif name in known:
            found.append(name)
        else:
            raise InputError(f"unknown {what} {name!r}.{nearest(name, known)}")
    if not found:
        raise InputError(f"no {what} was named: choose from {', '.join(known)}, or all")
    return list(dict.fromkeys(found))


def masks(names: str) -> list[str]:
    """Masks by name, "all", "regular", "heterogeneous", "static" or "dynamic", or with parameters.

    Several are separated by commas; a piece with "=" belongs to the mask before it.

    >>> masks("causal,block_sparse:block=64,density=0.1")
    ['causal', 'block_sparse:block=64,density=0.1']
    """
    pieces: list[str] = []
    for piece in (p.strip() for p in names.split(",")):
        if pieces and "=" in piece and ":" not in piece:
            pieces[-1] += f",{piece}"
        elif piece:
            pieces.append(piece)
    found: list[str] = []
    for piece in pieces:
        group = [
            n
            for n, p in patterns.PATTERNS.items()
            if piece in ("all", p.kind) or (piece == "static" and p.kind != "dynamic")
        ]
        if not group:
            parameters(piece, 64, 0)  # refuses what is unknown
        found += group or [piece]
    if not found:
        raise InputError("no mask was named: write all, or names of `regard bench masks show`")
    return list(dict.fromkeys(found))


def gib(amount: float) -> str:
    """Bytes in words.

    >>> gib(3 * 2**30), gib(2**20)
    ('3.0 GiB', '1 MiB')
    """
    unit, name = (2**30, "GiB") if amount >= 2**29 else (2**20, "MiB")
    return f"{amount / unit:.1f} {name}" if name == "GiB" else f"{math.ceil(amount / unit)} {name}"
