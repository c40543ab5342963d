"""Every attention kernel the bench knows, found by name: regard's, torch's, packages', frameworks',
and a user's own.

A kernel prepares a call (mask forms are made outside the timed part) and says beforehand why it
cannot: not installed or no such device (`missing`), or this call is not one of its (`refuses`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.core import attend
from regard.errors import InputError, nearest

from . import adapters
from .cases import Case
from .kernel import (
    Attention,
    Kernel,
    dense_bytes,
    flex_mask,
    flex_refuses,
    gpu_flash,
    not_half,
    only,
)


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


def _regard() -> Iterable[Kernel]:
    kernel = partial(Kernel, origin="regard")
    yield kernel("attend", what="regard's choice for the call", prepare=partial(_attend, None))
    yield kernel(
        "spans",
        what="torch's fused CPU kernel, one call a query block over the keys it sees",
        prepare=partial(_attend, "spans"),
        missing=only("cpu", "the fused CPU kernel"),
        refuses=lambda c: "float16 is not for CPUs" if c.dtype == torch.float16 else None,
    )
    yield kernel("tiled", what="running softmax over tiles", prepare=partial(_attend, "tiled"))
    yield kernel(
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


def _no_groups(case: Case) -> str | None:
    return "takes no grouped heads" if case.heads != case.kv_heads else None


def _torch() -> Iterable[Kernel]:
    kernel = partial(Kernel, origin="torch")
    yield kernel("sdpa", what="scaled_dot_product_attention as it is", need=dense_bytes,
              prepare=partial(_sdpa, None))  # fmt: skip
    yield kernel(
        "sdpa-math",
        what="its plain formula",
        prepare=partial(_sdpa, "MATH"),
        need=lambda c: c.matrix * (4.0 if c.backward else 3.0),
    )
    flash = partial(_sdpa, "FLASH_ATTENTION")
    yield kernel("sdpa-cpu-flash", what="its fused CPU kernel", prepare=flash, need=dense_bytes,
              missing=only("cpu", "the fused CPU kernel"))  # fmt: skip
    yield kernel("sdpa-cuda-flash", what="its FlashAttention", prepare=flash, refuses=gpu_flash,
              missing=only("cuda", "FlashAttention"))  # fmt: skip
    yield kernel(
        "sdpa-efficient",
        what="its memory-efficient kernel",
        prepare=partial(_sdpa, "EFFICIENT_ATTENTION"),
        missing=only("cuda", "the memory-efficient kernel"),
        refuses=_no_groups,
        need=dense_bytes,
    )
    yield kernel(
        "sdpa-cudnn",
        what="cuDNN's fused kernel",
        prepare=partial(_sdpa, "CUDNN_ATTENTION"),
        missing=only("cuda", "cuDNN"),
        refuses=not_half,
        need=dense_bytes,
    )
    yield kernel(
        "flex",
        what="FlexAttention, not compiled",
        prepare=partial(_flex, False),
        need=lambda c: c.matrix * 5.0,
    )
    yield kernel(
        "flex-compiled",
        what="FlexAttention, compiled (compile time apart)",
        prepare=partial(_flex, True),
        missing=_no_compiler,
        refuses=flex_refuses,
    )


def _no_compiler(device: str) -> str | None:
    import shutil

    if device == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "compiling for a CPU needs a C++ compiler: install g++"
    return None


@lru_cache(maxsize=1)
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(compiled: bool, case: Case) -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    block = None if case.pattern == "full" else flex_mask(case)
    call, grouped = _compiled() if compiled else flex_attention, case.heads != case.kv_heads

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # that the uncompiled form is slow is known
            return call(q, k, v, block_mask=block, enable_gqa=grouped)

    return run


# -- the user's own --------------------------------------------------------------------------------
def load(where: str) -> Kernel:
    """The kernel `file.py:function`; the file is run as Python, so name only what you trust.

    The function is `fn(q, k, v, mask) -> out` or `-> (out, lse)`, with q `[1, heads, T, dim]`, k
    and v `[1, kv_heads, T, dim]` and a `regard.core.Mask`; it raises NotImplementedError, with the
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
    source = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(f"regard_user_{path.stem}_{source}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is no Python file: write mykernel.py:function")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        del sys.modules[spec.name]
        raise InputError(f"{file} does not run: {type(problem).__name__}: {problem}") from problem
    fn = getattr(module, function, None)
    if not callable(fn):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise InputError(f"{file} has no function {function!r}.{nearest(function, names)}")

    def prepare(case: Case) -> Attention:
        mask = case.mask
        return lambda q, k, v: fn(q, k, v, mask)

    return Kernel(f"{path.name}:{function}", "user", "your own", prepare, source=source)


def kernels() -> dict[str, Kernel]:
    """All kernels by name, those that cannot run here included."""
    by_name: dict[str, Kernel] = {}
    for source in (_regard, _torch, adapters.packages, adapters.transformers, adapters.diffusers):
        by_name.update({k.name: k for k in source()})
    return by_name


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
    requested = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    selected: list[str] = []
    for name in filter(None, requested):
        if name == "all":
            selected += known
        elif name in known:
            selected.append(name)
        else:
            raise InputError(f"unknown {what} {name!r}.{nearest(name, known)}")
    if not selected:
        raise InputError(f"no {what} was named: choose from {', '.join(known)}, or all")
    return list(dict.fromkeys(selected))
