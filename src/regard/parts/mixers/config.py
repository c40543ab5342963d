"""The configuration of language models whose layers name their token mixers."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from regard.errors import InputError, nearest

from .adjacency import ADJACENCIES, TOP
from .kinds import KINDS, named

LAYOUTS = {
    "llama": "no biases",
    "qwen2": "biases of queries, keys and values",
    "qwen3": "queries and keys normalised",
}
POSITIONS = {
    "rope": "rotary, on queries and keys",
    "nope": "none",
    "absolute": "sinusoids added to the embeddings",
    "learned": "a learned vector added to the embeddings",
    "relative": "a learned bias of the score by distance, in buckets",
    "alibi": "a fixed bias of the score by distance",
}
CACHED_BEFORE = ("window", "prefix")


class MixerConfig(LlamaConfig):
    """A Llama or Qwen layout with a token mixer for every layer.

    Args:
        mixers: one of `regard.parts.mixers.KINDS` for every layer; standard attention when left
            out.
        layout: one of `LAYOUTS`.
        positions: one of `POSITIONS`.
        window: how many tokens back, its own included, a query sees; all when left out.
        prefix: so many first tokens are visible to every query, and carry no loss.
        mlp_mixer_size: inner width of the mixer "mlp"; that of equal parameters when left out.
        taylor: "joint" normalises the second-order weights together, "separate_diag" every order
            by itself.
        static_norm: whether embeddings pass the layer's norm before they give queries and keys.
        bias_shared: whether the heads of a layer share their learned key and value.
        bias_value: value of the key of "k_bias": "zero", or a fixed one of norm `bias_norm`, along
            the first axis ("first") or along all ("all").
        graph_size: width of the MLP of a head in "gin" and "pna", over the head's own.
        graph_adjacency: function of the attention weights that gives the edges ("none": they are
            the edges), with `graph_threshold`.
        graph_self: "eps" weighs a token's own state by eps, "one_plus_eps" by 1 + eps.
        graph_output: whether "gin" has an output projection.
        graph_dropout: dropout within the MLP of a head.
        differential_norm: whether the heads of "differential" are normalised.

    >>> MixerConfig(num_hidden_layers=2, mixers=["mlp", "standard"]).mixers
    ['mlp', 'standard']
    """

    model_type = "mixer_lm"

    mixers: list[str] | None = None
    layout: str = "llama"
    positions: str = "rope"
    window: int | None = None
    prefix: int = 0
    mlp_mixer_size: int | None = None
    taylor: str = "joint"
    static_norm: bool = True
    bias_shared: bool = False
    bias_value: str = "zero"
    bias_norm: float = 1.0
    graph_size: float = 0.5
    graph_adjacency: str = "none"
    graph_threshold: float = 0.2
    graph_self: str = "eps"
    graph_output: bool = False
    graph_dropout: float = 0.1
    differential_norm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.mixers
        if given is None:
            given = ["standard"] * self.num_hidden_layers
        self.mixers = [named(mixer) for mixer in given]
        super().__post_init__(**kwargs)
        self._check()

    @property
    def kinds(self) -> list[Any]:
        """The `Kind` of every layer."""
        return [KINDS[mixer] for mixer in self.mixers or []]

    @property
    def graph_inner(self) -> int:
        """Inner width of the MLP of a head."""
        return int(self.graph_size * int(self.head_dim or 0) + 1e-6)

    def _check(self) -> None:
        for name, value, known in (
            ("layout", self.layout, LAYOUTS),
            ("positions", self.positions, POSITIONS),
            ("taylor", self.taylor, ("joint", "separate_diag")),
            ("bias_value", self.bias_value, ("zero", "first", "all")),
            ("graph_self", self.graph_self, ("eps", "one_plus_eps")),
            ("graph_adjacency", self.graph_adjacency, ADJACENCIES),
        ):
            if value not in known:
                raise InputError(f"unknown {name} {value!r}.{nearest(str(value), known)}")
        mixers, heads = self.mixers or [], self.num_attention_heads
        if len(mixers) != self.num_hidden_layers:
            raise InputError(
                f"{len(mixers)} mixers for {self.num_hidden_layers} layers: name one a layer"
            )
        if heads % (self.num_key_value_heads or heads):
            raise InputError(
                f"{heads} heads cannot share {self.num_key_value_heads} key heads: take a divisor"
            )
        head_dim = int(self.head_dim or 0)
        if self.positions == "rope" and head_dim % 2:
            raise InputError(f"rotary positions need an even head_dim, not {head_dim}")
        for name, least in (("window", 1), ("mlp_mixer_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is at least {least}, not {value}")
        if not 0 <= self.prefix < self.max_position_embeddings:
            raise InputError(
                f"prefix is at least 0 and below max_position_embeddings, not {self.prefix}"
            )
        square = {"gin"} & set(mixers)
        if square and heads * head_dim != self.hidden_size:
            raise InputError(
                f"gin reads hidden states as values of its heads: {heads} heads of {head_dim} are "
                f"not the width {self.hidden_size}"
            )
        if square and self.num_key_value_heads != heads:
            raise InputError("gin has hidden states as values: give it a key head for every head")
        if {"gin", "pna"} & set(mixers) and self.graph_inner < 1:
            raise InputError(
                f"graph_size {self.graph_size} of head_dim {head_dim} leaves no width: make it "
                "larger"
            )
        self._check_masks(mixers)

    def _check_masks(self, mixers: list[str]) -> None:
        limited = [name for name in CACHED_BEFORE if getattr(self, name)]
        past = [m for m in mixers if KINDS[m].recurrent or m == "pna"]
        if limited and past:
            raise InputError(
                f"{past[0]} sums up all earlier tokens and cannot have a {limited[0]}: leave it out"
            )
        if not 0 < self.graph_threshold < 1:
            raise InputError(f"graph_threshold lies between 0 and 1, not {self.graph_threshold}")
        if self.positions in ("relative", "alibi"):
            picks = {"gin", "pna"} if self.graph_adjacency in TOP else set()
            if self.graph_adjacency != "none":
                picks |= {"pna"}
            unbiased = [m for m in mixers if m in {"approximate"} | picks]
            if unbiased:
                raise InputError(
                    f"{unbiased[0]} cannot have a bias by distance here: positions="
                    f"{self.positions!r} takes other mixers"
                )
        if self.prefix and {"sink_token"} & set(mixers):
            raise InputError("sink_token stands before the sequence and sees no prefix: drop one")
