"""StreamingLLM and SnapKV against those of NVIDIA's kvpress, an independent implementation.

kvpress asks for an older transformers than ours, so it goes into an environment of its own:

    pip install --no-deps kvpress cachetools fire termcolor

Its hooks expect what that transformers passes to an attention module, but its `compress` only needs
the module, what it was given, and the keys and values: those are taken from our own run.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.parts.decoding.kept import Evicting
from regard.reach import Call, Handler
from regard.shrink import SnapKV, StreamingLLM

from .explicit import ids, wide

kvpress = pytest.importorskip("kvpress", reason="kvpress is in an environment of its own")
CASES = {
    "streaming": lambda ratio: (
        StreamingLLM(ratio=ratio, sinks=3),
        kvpress.StreamingLLMPress(1 - ratio, n_sink=3),
    ),
    "snapkv": lambda ratio: (
        SnapKV(ratio=ratio, window=6, pool=5),
        kvpress.SnapKVPress(1 - ratio, window_size=6, kernel_size=5),
    ),
}


class Seen(Handler):
    """What every layer was asked."""

    def __init__(self) -> None:
        self.calls: dict[int, Call] = {}

    def before(self, call: Call) -> None:
        self.calls[call.site.layer] = call


def both(model: Any, text: Tensor, ours: Evicting, press: Any) -> dict[int, tuple[Tensor, ...]]:
    """What each layer keeps: our keys and values, then theirs, `[batch, kv_heads, kept, dim]`."""
    given: dict[int, Any] = {}

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given[module.layer_idx] = (module, kwargs["hidden_states"], kwargs["position_embeddings"])

    hooks = [
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        for layer in model.model.layers
    ]
    with torch.no_grad(), regard.apply(model, ours, seen := Seen()):
        model(text)
    for hook in hooks:
        hook.remove()
    found = {}
    for number, (module, hidden, angles) in given.items():
        call, (group,) = seen.calls[number], ours._found[number].groups
        with torch.no_grad():
            theirs = press.compress(
                module, hidden, call.k, call.v, None, {"position_embeddings": angles}
            )
        found[number] = (group.keys.data, group.values.data, *theirs)
    return found


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("name", CASES)
def test_the_same_rows_are_kept(name: str, ratio: float) -> None:
    found = both(wide(), ids(64, rows=2), *CASES[name](ratio))
    assert list(found) == [0, 1, 2]
    for keys, values, other_keys, other_values in found.values():
        for mine, theirs in ((keys, other_keys), (values, other_values)):
            assert mine.shape == theirs.shape == (2, 6, int(ratio * 64), mine.shape[-1])
            # a press keeps rows in the order of their scores: which they are is what counts
            assert torch.equal(ordered(mine), ordered(theirs))


def ordered(rows: Tensor) -> Tensor:
    """The rows of each head in the order of their first feature."""
    return rows.gather(2, rows[..., :1].argsort(2).expand_as(rows))


@pytest.mark.real
@pytest.mark.parametrize("name", CASES)
def test_the_same_rows_of_a_real_model(name: str, smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = tokenizer(regard.zoo.text("northanger-abbey")[:2000], return_tensors="pt").input_ids
    for keys, _, theirs, _ in both(model, text, *CASES[name](0.4)).values():
        same = (keys[0, :, :, None] == theirs[0, :, None]).all(-1).any(-1)
        # float32 scores of neighbours differ in the last digit: a row at the edge may change
        assert same.double().mean() > 0.99
