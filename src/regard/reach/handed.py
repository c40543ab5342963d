"""The stand-in that models get for a dense mask while they are watched, and what it turns into when
anything but an attention function under regard looks at it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from regard.core import Mask

# the last argument: whether None may stand for a plain causal or full mask, as in the plain model
Plain = Callable[[bool], Any]
_SIZES = {"dim", "size", "numel", "__len__", "is_floating_point", "__hash__", "get_device"}
_MOVES = {"to", "contiguous", "clone", "detach", "cuda", "cpu", "bool", "type"}


class Origin:
    """Where the queries and keys of a mask lie, for the tensors that a model makes of it."""

    def __init__(
        self, live: Tensor | None, offsets: tuple[int, int], shape: tuple[int, int, int]
    ) -> None:
        self.live, self.offsets, self.shape = live, offsets, shape
        self.width = shape[2]  # keys of the plain mask: a static cache has room for more


class _Touched(threading.local):
    """Masks of this thread that have become tensors and are still in use."""

    def __init__(self) -> None:
        self.origins: WeakSet[Origin] = WeakSet()
        self.text: Origin | None = None  # of the last mask of a text that is written


_touched = _Touched()


def origin_of(mask: Tensor, queries: int) -> Origin | None:
    """What a tensor mask was made of, where a stand-in of its shape was touched in this pass."""
    near = None
    for origin in _touched.origins:
        if origin.shape[1] == queries and len(mask) in (1, origin.shape[0]):
            near = origin
            if mask.shape[-1] in (origin.shape[2], origin.width):
                return origin
    return near


def note_text(origin: Origin) -> None:
    """Remember whose padding the queries of the text have that look across."""
    _touched.text = origin


def padding_of_text(batch: int, queries: int) -> Tensor | None:
    """Which queries of a cross attention are tokens, by the text that they are of."""
    text = _touched.text
    return text.live if text is not None and text.shape[:2] == (batch, queries) else None


class Handed(Tensor):
    """What our mask function hands to our attention function in place of a dense mask.

    It looks like the mask that the plain model would get, holds a single number, and carries the
    description. A function that reads, slices or changes it gets the real mask instead, padding
    and all: slower, and never wrong.
    """

    mask: Mask
    live: Tensor | None
    query_offset: int
    key_offset: int
    origin: Origin
    plain: Plain | None

    @staticmethod
    def of(
        mask: Mask,
        live: Tensor | None,
        offsets: tuple[int, int],
        shape: tuple[int, int, int],
        plain: Plain | None = None,
        like: Tensor | None = None,
    ) -> Handed:
        """A stand-in for the mask of `shape` (batch, queries, keys).

        Args:
            plain: makes the mask of the plain model; it is drawn from the description when None.
            like: dtype and device of that mask.
        """
        batch, queries, keys = shape
        number = torch.zeros((), dtype=torch.bool) if like is None else like.new_zeros(())
        handed = number.expand(batch, 1, queries, keys).as_subclass(Handed)
        handed.mask, handed.live, handed.plain = mask, live, plain
        handed.query_offset, handed.key_offset = offsets
        handed.origin = Origin(live, offsets, shape)
        return handed

    def dense(self) -> Any:
        """The mask as a tensor: that of the plain model, where it is known."""
        _touched.origins.add(self.origin)
        if self.plain is not None:
            return self.plain(False)
        _, queries, keys = self.origin.shape
        return self.mask.to(self.device).cells(queries, keys)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if args and isinstance(args[0], Handed):
            if name in _SIZES or name == "__get__":
                with torch._C.DisableTorchFunctionSubclass():
                    value = func(*args, **kwargs)
                if not isinstance(value, Tensor):
                    return value
            elif name in _MOVES or name == "__getitem__":
                kept = _same(func, args, kwargs)
                if kept is not None:
                    return kept
        args, kwargs = tree_map_only(Handed, Handed.dense, (args, kwargs))
        return func(*args, **kwargs)


def _same(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handed | None:
    """The stand-in itself where a copy, a move or a slice leaves it as it is."""
    handed: Handed = args[0]
    if func.__name__ == "__getitem__":
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        if not all(isinstance(p, slice) or p is Ellipsis for p in places):
            return None
    with torch._C.DisableTorchFunctionSubclass():
        value = func(*args, **kwargs)
        alike = value.shape == handed.shape and value.dtype == handed.dtype
    return handed if alike else None


def drowned(mask: Tensor) -> Tensor:
    """Rows `[..., queries, 1]` of an additive mask that hide every key, some by a finite number:
    that drowns the scores, and the softmax is level, as for a query of zeros.
    """
    if mask.dtype == torch.bool:
        return mask.new_zeros(())
    low = mask <= torch.finfo(mask.dtype).min / 2
    return low.all(-1, keepdim=True) & (mask > -torch.inf).any(-1, keepdim=True)


def from_tensor(tensor: Tensor) -> tuple[Mask, Tensor | None]:
    """A ready 4-D mask: boolean, or additive with the dtype's lowest value where it hides."""
    if tensor.dtype == torch.bool:
        return Mask.dense(tensor), None
    allowed = tensor > torch.finfo(tensor.dtype).min / 2
    allowed = allowed | ((tensor > -torch.inf) & ~allowed.any(-1, keepdim=True))  # see `drowned`
    mask = Mask.full() if bool(allowed.all()) else Mask.dense(allowed)
    bias = tensor.masked_fill(tensor <= torch.finfo(tensor.dtype).min / 2, 0)
    return mask, bias if bool(bias.any()) else None
