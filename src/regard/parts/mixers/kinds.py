"""The token mixers by name, and in which layers attention stays: plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from regard.errors import InputError, nearest


@dataclass(frozen=True)
class Kind:
    """One token mixer.

    Attributes:
        module: "attention" (softmax), "operation" (another function of the scores), "scan" (one
            score a key), "mlp" (no mixing), "gin", "pna" or "differential".
        source: what queries and keys are computed from: "layer" (its input), "noise" or "text" (a
            second stream, the same for every input), "embedding" (of the tokens, in every layer).
        form: function of the score that replaces exp: see `operations.FORMS`.
        norm: what sums are divided by: "none", "sum" or "signed" (at least 1 in size).
        features: map of queries and keys before their product: "", "elu" or "mlp".
        bias: a learned key ("k"), key and value ("kv"), value ("v") or token ("token").
        recurrent: whether decoding keeps a state of fixed size instead of keys and values.
    """

    module: str
    does: str
    source: str = "layer"
    form: str = "softmax"
    norm: str = "sum"
    features: str = ""
    bias: str = ""
    recurrent: bool = False


def _operation(form: str, norm: str, does: str, features: str = "") -> Kind:
    return Kind("operation", does, form=form, norm=norm, features=features)


KINDS: dict[str, Kind] = {
    "standard": Kind("attention", "softmax attention"),
    "mlp": Kind("mlp", "a gated MLP: no token sees another"),
    "approximate": Kind(
        "operation", "exp of the score to second order", form="taylor", recurrent=True
    ),
    "non_approximate": Kind(
        "scan", "every query shares one score a key", form="scan", recurrent=True
    ),
    "rnd_emb_qk": Kind("attention", "queries and keys from fixed noise", source="noise"),
    "fixed_seq_qk": Kind("attention", "queries and keys from one fixed text", source="text"),
    "static_emb_qk": Kind("attention", "queries and keys from the embeddings", source="embedding"),
    "sigmoid_no_norm": _operation("sigmoid", "none", "sigmoid of the score"),
    "sigmoid_norm": _operation("sigmoid", "sum", "sigmoid, divided by the sum"),
    "elu_no_norm": _operation("elu", "none", "elu + 1 of the score"),
    "elu_norm": _operation("elu", "sum", "elu + 1, divided by the sum"),
    "kernel_elu_no_norm": _operation("identity", "none", "elu + 1 of q and k", "elu"),
    "kernel_elu_norm": _operation("identity", "sum", "elu + 1 of q and k, divided", "elu"),
    "kernel_linear_no_norm": _operation("identity", "none", "the score itself"),
    "kernel_linear_norm": _operation("identity", "signed", "the score, divided"),
    "kernel_mlp_no_norm": _operation("identity", "none", "an MLP of q and of k", "mlp"),
    "kernel_mlp_norm": _operation("identity", "signed", "an MLP of q and of k, divided", "mlp"),
    "k_bias": Kind("attention", "softmax with a learned key of value 0", bias="k"),
    "kv_bias": Kind("attention", "softmax with a learned key and value", bias="kv"),
    "v_bias": Kind("attention", "softmax plus a learned value", bias="v"),
    "sink_token": Kind("attention", "softmax after a learned first token", bias="token"),
    "gin": Kind("gin", "attention sums hidden states, an MLP a head follows"),
    "pna": Kind("pna", "sum, mean, maximum and variance of values, an MLP a head follows"),
    "differential": Kind("differential", "the difference of two softmax attentions"),
}
"""Every mixer that `MixerConfig.mixers` may name."""

SEVEN = tuple(KINDS)[:7]
"""The mixers of the deconstruction, standard attention first."""

ALIASES = {"softmax": "standard"}

KEEPS: dict[str, str] = {
    "none": "no layer",
    "even": "layers 2, 4, ...",
    "odd": "layers 1, 3, ...",
    "top": "the lower half: the simple layers lie on top",
    "middle": "the outer quarters: the simple layers lie in the middle",
    "bottom": "the upper half: the simple layers lie at the bottom",
    "quarter": "layers 4, 8, ...",
    "first": "the first layer",
    "last": "the last layer",
    "ends": "the first and the last layer",
}
"""Which layers keep standard attention, by name."""


def kept(keep: str, layers: int) -> list[int]:
    """Numbers, from 0, of the layers that keep standard attention.

    >>> kept("even", 4), kept("middle", 8), kept("ends", 4)
    ([1, 3], [0, 1, 6, 7], [0, 3])

    Raises:
        InputError: an unknown name, or too few layers for it to differ from "none".
    """
    if keep not in KEEPS:
        raise InputError(f"unknown placement {keep!r}.{nearest(keep, KEEPS)}")
    quarter = layers // 4
    chosen = {
        "none": [],
        "even": list(range(1, layers, 2)),
        "odd": list(range(0, layers, 2)),
        "top": list(range(layers // 2)),
        "middle": [*range(quarter), *range(layers - quarter, layers)],
        "bottom": list(range(layers // 2, layers)),
        "quarter": list(range(3, layers, 4)),
        "first": [0],
        "last": [layers - 1],
        "ends": sorted({0, layers - 1}),
    }[keep]
    if keep != "none" and not chosen:
        raise InputError(f"with {layers} layers the placement {keep!r} keeps none: take more")
    return chosen


def placed(mixer: str, keep: str, layers: int) -> list[str]:
    """The mixer of every layer, with standard attention where the placement keeps it.

    >>> placed("mlp", "even", 4)
    ['mlp', 'standard', 'mlp', 'standard']
    """
    mixer = named(mixer)
    standing = kept(keep, layers)
    return ["standard" if n in standing else mixer for n in range(layers)]


def named(mixer: str) -> str:
    """The mixer's name, aliases resolved.

    Raises:
        InputError: an unknown one.
    """
    mixer = ALIASES.get(mixer, mixer)
    if mixer not in KINDS:
        raise InputError(f"unknown mixer {mixer!r}.{nearest(mixer, KINDS)}")
    return mixer


def simple(mixers: Sequence[str]) -> list[int]:
    """Numbers of the layers that are not standard attention: those that the skip test removes."""
    return [n for n, mixer in enumerate(mixers) if mixer != "standard"]
