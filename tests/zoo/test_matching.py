"""A checkpoint that does not fit its config is refused: its model would be random numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from regard import zoo
from regard.errors import InputError
from regard.zoo.tiny import tiny

Weights = dict[str, torch.Tensor]


def renamed(weights: Weights) -> Weights:
    return {k.replace("q_proj", "query") if "layers.0" in k else k: v for k, v in weights.items()}


def cut(weights: Weights) -> Weights:
    return {k: v for k, v in weights.items() if "layers.1" not in k}


def reshaped(weights: Weights) -> Weights:
    name = next(k for k in weights if "layers.0" in k and "up_proj" in k)
    return {**weights, name: weights[name][:8]}


def besides(weights: Weights) -> Weights:
    return {**weights, "model.layers.9.other.weight": torch.zeros(2)}


def edit(file: Path, change: Callable[[Weights], Weights]) -> None:
    weights = {k: v.clone().contiguous() for k, v in change(load_file(file)).items()}
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("change", [renamed, cut, reshaped, besides, lambda w: {}])
def test_a_model_whose_weights_do_not_match(tmp_path: Path, change: Any) -> None:
    tiny("llama").save_pretrained(tmp_path)
    zoo.load(tmp_path)
    edit(tmp_path / "model.safetensors", change)
    with pytest.raises(InputError, match=r"does not fit its config|cannot be loaded"):
        zoo.load(tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "t5", "bert", "gemma2", "whisper", "vit"])
def test_families_that_lack_what_they_may(tmp_path: Path, family: str) -> None:
    """Tied heads, buffers and the like are no loss."""
    tiny(family).save_pretrained(tmp_path)
    model, _ = zoo.load(tmp_path)
    for a, b in zip(model.state_dict().values(), tiny(family).state_dict().values()):
        assert torch.equal(a, b)


def test_a_pipeline_whose_part_does_not_match(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="pipelines need the extra 'diffusion'")
    from regard.zoo.tiny_diffusion import tiny_pipeline

    tiny_pipeline("sd").save_pretrained(tmp_path)
    zoo.load_pipeline(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    edit(file, lambda w: {k: v for k, v in w.items() if "mid_block" not in k})
    with pytest.raises(InputError, match=r"lacks mid_block|cannot be loaded"):
        zoo.load_pipeline(tmp_path)
