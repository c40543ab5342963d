"""How modules arrange the batch and the heads of their attention maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "num_attn_heads")


@dataclass(frozen=True)
class Layout:
    """Axes before queries and keys: which one counts the heads.

    Attributes:
        lead: these axes, heads apart from the batch.
        axis: the heads among them; windows and mask units are rows of the batch.
    """

    lead: tuple[int, ...]
    axis: int

    @staticmethod
    def of(scores: Tensor, module: Any) -> Layout | None:
        """The layout of scores `[..., queries, keys]`; None where it is not known."""
        lead = tuple(scores.shape[:-2])
        heads = next((h for n in _HEADS if isinstance(h := getattr(module, n, None), int)), None)
        if len(lead) == 1:
            if heads is None or lead[0] % heads:
                return Layout((*lead, 1), 1)
            return Layout((lead[0] // heads, heads), 1)
        if len(lead) == 0:
            return None
        if heads in lead[1:]:
            return Layout(lead, lead.index(heads, 1))
        return Layout(lead, 1)

    @property
    def rows(self) -> int:
        """How many maps there are."""
        return Size(self.lead).numel()

    def take(self, x: Tensor) -> Tensor:
        """`[..., n, m]` in any view of these axes as `[batch, heads, n, m]`."""
        x = x.reshape(*self.lead, *x.shape[-2:])
        x = x.movedim(self.axis, len(self.lead) - 1)
        return x.reshape(-1, self.lead[self.axis], *x.shape[-2:])

    def give(self, x: Tensor, lead: Size) -> Tensor:
        """`[batch, heads, n, m]` with the axes that the module has."""
        rest = [n for i, n in enumerate(self.lead) if i != self.axis]
        x = x.reshape(*rest, *x.shape[1:]).movedim(len(rest), self.axis)
        return x.reshape(*lead, *x.shape[-2:])


def _labels(args: Any) -> tuple[list[str], str, list[Tensor]] | None:
    """Labels of the operands and of the result of an einsum of two tensors."""
    equation = args[0]
    operands = list(args[1:]) if not isinstance(args[1], list | tuple) else list(args[1])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    left, right = equation.replace(" ", "").split("->")
    names = left.split(",")
    spare = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    if "..." in equation:
        width = max(
            t.dim() - len(n.replace("...", "")) for t, n in zip(operands, names) if "..." in n
        )
        dots = "".join(x for x, _ in zip((c for c in spare if c not in equation), range(width)))
        names, right = [n.replace("...", dots) for n in names], right.replace("...", dots)
    if any(len(n) != t.dim() for n, t in zip(names, operands)):
        return None
    return names, right, operands


def _permuted(x: Tensor, labels: str, target: str, sizes: dict[str, int]) -> Tensor:
    """The axes of a tensor in another order; those it lacks are broadcast."""
    held = [c for c in target if c in labels]
    x = x.permute(*(labels.index(c) for c in held))
    for place, c in enumerate(target):
        if c not in labels:
            x = x.unsqueeze(place)
    return x.expand(*(sizes[c] for c in target))


def _sizes(names: list[str], operands: list[Tensor]) -> dict[str, int]:
    return {c: n for labels, t in zip(names, operands) for c, n in zip(labels, t.shape)}


def einsum_product(args: Any, out: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Queries `[..., queries, dim]` and keys `[..., keys, dim]` of an einsum that ends in queries
    and keys; (None, None) where it is something else.
    """
    read = _labels(args)
    if read is None:
        return None, None
    (a, b), right, operands = read
    summed = [c for c in a if c in b and c not in right]
    if len(right) < 3 or len(summed) != 1:
        return None, None
    i, j = right[-2], right[-1]
    sizes = _sizes([a, b], operands)
    for (q, x), (k, y) in (
        ((a, operands[0]), (b, operands[1])),
        ((b, operands[1]), (a, operands[0])),
    ):
        if i in q and i not in k and j in k and j not in q:
            lead = right[:-2]
            return (
                _permuted(x, q, lead + i + summed[0], sizes),
                _permuted(y, k, lead + j + summed[0], sizes),
            )
    return None, None


def einsum_operands(args: Any, map_: Tensor) -> Tensor | None:
    """The values `[..., keys, dim]` that an einsum weighs by a map `[..., queries, keys]`."""
    read = _labels(args)
    if read is None:
        return None
    names, right, operands = read
    at = 0 if operands[0] is map_ else 1
    labels, others = names[at], names[1 - at]
    key = labels[-1]
    dim = [c for c in others if c not in labels]
    if key in right or key not in others or len(dim) != 1 or labels[-2] in others:
        return None
    target = labels[:-2] + key + dim[0]
    return _permuted(operands[1 - at], others, target, _sizes(names, operands))


def einsum_result(args: Any, map_: Tensor, out: Tensor) -> Tensor:
    """The result `[..., queries, dim]` in the order that the einsum names."""
    read = _labels(args)
    assert read is not None
    names, right, operands = read
    at = 0 if operands[0] is map_ else 1
    labels, others = names[at], names[1 - at]
    dim = next(c for c in others if c not in labels)
    held = labels[:-1] + dim
    return out.permute(*(held.index(c) for c in right))
