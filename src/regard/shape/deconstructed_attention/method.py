"""Deconstructed attention: language models whose layers name simpler token mixers.

Paper: "Deconstructing Attention: Investigating Design Principles for Effective Language Modeling",
Xue et al., 2025, https://arxiv.org/abs/2510.11602.

Deviations:
- The second-order weights are normalised together; `taylor="separate_diag"` is the printed form,
  every order by itself with element-wise squares (it keeps keys and values when decoding).
- The mixer "mlp" has three matrices of the parameters of queries, keys and values, and keeps the
  output projection (reconstructed from the paper's count of operations).
- Maps from noise draw it with the initializer's range (the paper gives none).
- Standard layers of a hybrid treat a second stream as one more sequence (reconstructed).
"""

from __future__ import annotations

from typing import Any

from regard.parts.mixers import MixerConfig, MixerForCausalLM, placed
from regard.parts.training.settings import SIZES

__all__ = ["MixerConfig", "MixerForCausalLM", "mixer_lm"]


def mixer_lm(
    mixer: str = "standard", keep: str = "none", *, size: str = "tiny", **settings: Any
) -> MixerForCausalLM:
    """A causal language model with this mixer where the placement does not keep attention.

    Args:
        mixer: one of `regard.parts.mixers.KINDS`.
        keep: one of `regard.parts.mixers.KEEPS`, the layers of standard attention.
        size: one of `regard.parts.training.lm.SIZES`.
        settings: further fields of `MixerConfig`.

    >>> model = mixer_lm("non_approximate", "even", size="nano", vocab_size=64)
    >>> model.config.mixers
    ['non_approximate', 'standard']
    """
    sizes = dict(SIZES[size])
    layers = settings.pop("num_hidden_layers", sizes.pop("layers"))
    given = {**sizes, "num_attention_heads": sizes.pop("heads"), **settings}
    given.pop("heads", None)
    mixers = placed(mixer, keep, layers)
    return MixerForCausalLM(MixerConfig(num_hidden_layers=layers, mixers=mixers, **given))
