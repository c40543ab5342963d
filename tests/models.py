"""Tiny stand-ins that tests of several packages share."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from transformers import BatchEncoding

from regard.zoo.tiny import tiny


def deep(layers: int, steep: float) -> Any:
    """A tiny model of more layers, so that ACT leaves some to act on; steep enough for sinks."""
    small = tiny("llama")
    config = copy.deepcopy(small.config)
    config.num_hidden_layers = layers
    model = type(small)(config).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= steep
    return model


class Words:
    """A tokenizer of one token a word, its number; several words may share one."""

    def __call__(self, text: str, return_tensors: str | None = None, **_: Any) -> BatchEncoding:
        ids = [3 + sum(map(ord, w)) % 120 for w in text.split()]
        return BatchEncoding({"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(f"w{n}" for n in ids)


def word_tokenizer(text: str) -> Any:
    """A tokenizer whose tokens are the words of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Whitespace()
    words = ["<unk>", *dict.fromkeys(word for word, _ in split.pre_tokenize_str(text))]
    backend = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
