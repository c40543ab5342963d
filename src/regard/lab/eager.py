"""The attention maps of a model as its own eager attention makes them, for comparison."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@contextmanager
def eager(model: Any, sites: set[int]) -> Iterator[dict[int, list[Tensor]]]:
    """While open the model attends eagerly; yields every map by the id of its module.

    Modules that ask for an attention function give the map by which the eager one weighs values,
    others the softmax that they take.

    Args:
        sites: ids of the modules whose softmax is an attention map.
    """
    model.set_attn_implementation("eager")
    returned: dict[int, list[Tensor]] = defaultdict(list)
    maps: dict[int, list[Tensor]] = {}
    places = {sys.modules[type(m).__module__] for m in model.modules()}
    known = [(p, n) for p in places for n in vars(p) if "eager_attention_forward" in n]
    before = [(p, n, getattr(p, n)) for p, n in known]

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: Any, *args: Any, **more: Any) -> Any:
            names = ("query", "key", "value", "attention_mask")
            given = {**dict(zip(names, args)), **more}
            v = given["value"]
            # what weighs the unit vectors is the map, sinks and all
            unit = torch.eye(v.shape[2], dtype=v.dtype).expand(*v.shape[:3], -1)
            returned[id(module)].append(
                function(module, **{**given, "value": unit})[0].transpose(1, 2)
            )
            return function(module, *args, **more)

        return attend

    softmaxes = _Softmaxes()
    hooks = [
        m.register_forward_pre_hook(softmaxes.begin) for m in model.modules() if id(m) in sites
    ]
    hooks += [m.register_forward_hook(softmaxes.end) for m in model.modules() if id(m) in sites]
    for place, name, function in before:
        setattr(place, name, kept(function))
    try:
        with softmaxes:
            yield maps
    finally:
        for place, name, function in before:
            setattr(place, name, function)
        for hook in hooks:
            hook.remove()
        maps.update({**softmaxes.maps, **returned})


class _Softmaxes(TorchFunctionMode):
    """Keeps the attention maps that modules compute by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[int] = []
        self.maps: dict[int, list[Tensor]] = defaultdict(list)

    def begin(self, module: Any, args: Any) -> None:
        self.stack.append(id(module))

    def end(self, module: Any, args: Any, out: Any) -> None:
        self.stack.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if not self.stack or name not in ("softmax", "scaled_dot_product_attention"):
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if name == "scaled_dot_product_attention":
            given = dict(zip(("query", "key", "value", "attn_mask"), args)) | kwargs
            v = given["value"]
            unit = torch.eye(v.shape[-2], dtype=v.dtype).expand(*v.shape[:-1], -1)
            self.maps[self.stack[-1]].append(func(**{**given, "value": unit}))
        # over another axis it is no map, but a kernel or a gate
        elif out.dim() >= 3 and bool(torch.allclose(out.sum(-1), torch.ones(()))):
            self.maps[self.stack[-1]].append(out.detach())
        return out
