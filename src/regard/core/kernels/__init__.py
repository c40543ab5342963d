"""The kernels of `attend`, as data.

>>> list(KERNELS)
['cpu', 'spans', 'cuda', 'flex', 'tiled', 'reference']
>>> import torch
>>> q = torch.randn(1, 2, 64, 8)
>>> KERNELS["cpu"].why_not(Inputs(q, q, q, softcap=30.0))
'it computes no soft cap'
>>> KERNELS["tiled"].why_not(Inputs(q, q, q, softcap=30.0)) is None
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

from regard.errors import InputError, nearest

from . import cpu, cuda, flex, reference, spans, tiled
from .inputs import Inputs


class Kernel(NamedTuple):
    """One way to compute attention.

    Attributes:
        why_not: why this kernel cannot compute a call, None where it can.
        forward: `forward(*inputs) -> (out, lse)`.
        devices: types of devices on which `attend` may choose it; None for all.
        differentiable: whether torch differentiates through this call of `forward`; else
            `attend` computes the gradients.
        backward: `backward(grad_out, *inputs)`, the gradients of q, k and v where lse has none;
            those of the tiles when None.
    """

    name: str
    does: str
    why_not: Callable[[Inputs], str | None]
    forward: Callable[..., tuple[Tensor, Tensor]]
    devices: tuple[str, ...] | None = None
    differentiable: Callable[[Inputs], bool] = lambda inputs: False
    backward: Callable[..., tuple[Tensor, ...]] | None = None

    def serves(self, inputs: Inputs) -> bool:
        """Whether `attend` may choose it for a call."""
        known = self.devices is None or inputs.q.device.type in self.devices
        return known and self.why_not(inputs) is None


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("cpu", "torch's fused CPU kernel, one call", cpu.why_not, cpu.forward, ("cpu",)),
        Kernel(
            "spans",
            "torch's fused CPU kernel, one call a query block over the keys it sees",
            spans.why_not,
            spans.forward,
            ("cpu",),
        ),
        Kernel(
            "cuda",
            "torch's fused CUDA kernels: cuDNN, FlashAttention or memory-efficient",
            cuda.why_not,
            cuda.forward,
            ("cuda",),
            backward=cuda.backward,
        ),
        Kernel(
            "flex",
            "FlexAttention, compiled on GPUs",
            flex.why_not,
            flex.forward,
            ("cuda",),
            differentiable=lambda inputs: flex.has_gradients(inputs.q, inputs.bias),
        ),
        Kernel("tiled", "running softmax over tiles", lambda inputs: None, tiled.forward),
        Kernel("reference", "dense, float64", lambda inputs: None, reference.attend, ()),
    )
}
"""By name, in the order in which `attend` asks them."""

_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@contextmanager
def only(name: str) -> Iterator[None]:
    """Every `attend` of this block takes one kernel, unless it names another; for tests.

    >>> import torch
    >>> from regard.core import attend
    >>> q = torch.randn(1, 2, 64, 8)
    >>> with only("reference"):
    ...     exact = attend(q, q, q)
    """
    token = _forced.set(named(name).name)
    try:
        yield
    finally:
        _forced.reset(token)


def named(name: str) -> Kernel:
    """The kernel of this name.

    Raises:
        InputError: there is none.
    """
    if name not in KERNELS:
        raise InputError(f"unknown kernel {name!r}.{nearest(str(name), KERNELS)}")
    return KERNELS[name]


def pick(inputs: Inputs, name: str | None = None) -> Kernel:
    """The kernel for a call: the named one, or the first that can compute it.

    Raises:
        InputError: an unknown name, or a kernel that cannot compute this call.
    """
    name = name or _forced.get()
    if name is None:
        return next(k for k in KERNELS.values() if k.serves(inputs))
    kernel = named(name)
    reason = kernel.why_not(inputs)
    if reason is not None:
        raise InputError(
            f"kernel {kernel.name!r} cannot compute this call: {reason}; use 'tiled', or leave "
            "kernel=None"
        )
    return kernel
