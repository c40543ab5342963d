"""Other libraries that capture attention, asked for the same two facts of all layers.

The peer's own Python, where regard is not installed, loads this file too: it imports nothing of
regard, and a peer only inside the function that needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Forward = Callable[..., Any]
# name -> the package that carries it (requirements/peers.txt pins the one that is tested)
PEERS = {"nnsight": "nnsight", "transformer_lens": "transformer-lens"}


class Unsupported(Exception):
    """The peer cannot do this for this model; the message says why."""


def reduce(p: Any) -> tuple[Any, Any]:
    """Received `[batch, heads, keys]` and entropy `[batch, heads, queries]` of an attention map P.

    >>> import torch
    >>> received, entropy = reduce(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]))
    >>> received.tolist(), [round(x, 3) for x in entropy[0, 0].tolist()]
    ([[[1.5, 0.5]]], [0.0, 0.693])
    """
    import torch

    return p.sum(-2), torch.special.entr(p).sum(-1)


def prepare(peer: str, model: Any) -> Forward:
    """`forward(ids, **kwargs)` through the peer; ImportError where it is not installed."""
    if peer not in PEERS:
        raise Unsupported(f"unknown peer {peer!r}: one of {', '.join(PEERS)}")
    return {"nnsight": _nnsight, "transformer_lens": _transformer_lens}[peer](model)


def version(peer: str) -> str:
    """Installed version of a peer."""
    from importlib.metadata import version as installed

    return installed(PEERS[peer])


def _twin(model: Any) -> Any:
    """Another object with the same parameters: a peer may change its modules for good."""
    import copy

    shared = {id(p): p for p in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, shared)
    twin.set_attn_implementation("eager")
    return twin


def _nnsight(model: Any) -> Forward:
    import nnsight

    stack = getattr(getattr(model, "model", None), "layers", None)
    if stack is None or not all(hasattr(layer, "self_attn") for layer in stack):
        raise Unsupported(
            f"reading maps of {type(model).__name__} by nnsight is written here for "
            "model.layers[i].self_attn only"
        )
    wrapped = nnsight.NNsight(_twin(model))

    def forward(ids: Any, **kwargs: Any) -> Any:
        import torch

        with wrapped.trace(ids, **kwargs):
            facts = nnsight.save([])
            # reduced inside the trace, so that one layer's map is alive at a time: the lean way
            for layer in wrapped.model.layers:
                p = layer.self_attn.output[1]
                facts.append((p.sum(-2), torch.special.entr(p).sum(-1)))
        return facts

    return forward


def _transformer_lens(model: Any) -> Forward:
    import transformer_lens

    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise Unsupported(
            f"transformer_lens {version('transformer_lens')} cannot wrap a loaded model: "
            "3.0 or newer can"
        ) from None
    from transformers import AutoTokenizer

    del transformer_lens
    where = model.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(where)
    bridge = TransformerBridge.boot_transformers(
        where, hf_model=_twin(model), tokenizer=tokenizer, dtype=next(model.parameters()).dtype
    )

    def forward(ids: Any, **kwargs: Any) -> Any:
        facts: list[Any] = []
        hooks = [(lambda name: name.endswith("attn.hook_pattern"), lambda p, hook: take(p))]

        def take(p: Any) -> None:
            facts.append(reduce(p))

        bridge.run_with_hooks(ids, return_type=None, fwd_hooks=hooks, **kwargs)
        return facts

    return forward
