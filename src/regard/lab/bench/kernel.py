"""What a kernel of the bench is, and the refusals that several share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case, pointwise

Attention = Callable[[Tensor, Tensor, Tensor], Any]  # (q, k, v) -> out, or (out, ...)
BLOCK = 128  # of FlexAttention's block masks


@dataclass(frozen=True)
class Kernel:
    """One row of the registry.

    Attributes:
        prepare: `prepare(case) -> (q, k, v) -> out`; NotImplementedError means unsupported.
        missing: why it is not there at all on this device, or None.
        refuses: why it cannot take a case, or None.
        need: bytes a call takes beside q, k, v and out, roughly; a bound of the memory guard.
        source: hash of the file that a user's own kernel comes from.
    """

    name: str
    origin: str
    what: str
    prepare: Callable[[Case], Attention]
    missing: Callable[[str], str | None] = lambda device: None
    refuses: Callable[[Case], str | None] = lambda case: None
    need: Callable[[Case], float] = lambda case: 0.0
    source: str = ""


def only(device: str, what: str) -> Callable[[str], str | None]:
    """A `missing` for what runs on one kind of device."""

    def missing(have: str) -> str | None:
        if have.split(":")[0] == device:
            return None
        return f"{what} runs on {device}, not on {have}"

    return missing


def dense_bytes(case: Case) -> float:
    """The boolean mask and its additive copy, where one is needed."""
    plain = case.pattern in ("full", "causal")
    return 0.0 if plain else case.total**2 * (1.0 + case.dtype.itemsize)


def no_dense_mask(case: Case) -> str | None:
    """Full and causal only."""
    if case.pattern in ("full", "causal"):
        return None
    return "takes no mask but causal: it cannot express this one"


def gpu_flash(case: Case) -> str | None:
    """Half precision, and full and causal only."""
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype_name(case)}"
    return no_dense_mask(case)


def not_half(case: Case) -> str | None:
    """Half precision only."""
    if case.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {dtype_name(case)}"
    return None


def dtype_name(case: Case) -> str:
    """The dtype as people write it."""
    return str(case.dtype).removeprefix("torch.")


def flex_mask(case: Case) -> Any:
    """The block mask of a case, with its rule in operations that FlexAttention can compile."""
    block = case.mask.block_mask(case.total, case.total, case.device, BLOCK)
    copied = copy.copy(block)  # the mask keeps the other for the next who asks
    copied.mask_mod = pointwise(case.mask, case.device)
    return copied


def flex_refuses(case: Case) -> str | None:
    """What the compiled FlexAttention lacks."""
    if case.device == "cpu" and case.backward:
        return "FlexAttention has no compiled backward on CPUs"
    return None
