"""What a training of language models can be set to; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from regard.cards import Checked, setting

BYTES = 256  # tokens of a vocabulary of bytes, beside padding and a first token
DEFAULT = "novel,python"

SIZES: dict[str, dict[str, int]] = {
    "nano": {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2},
    "tiny": {"hidden_size": 96, "intermediate_size": 256, "layers": 4, "heads": 4},
    "small": {"hidden_size": 192, "intermediate_size": 512, "layers": 6, "heads": 6},
    "60m": {"hidden_size": 768, "intermediate_size": 1536, "layers": 10, "heads": 8},
    "70m": {"hidden_size": 512, "intermediate_size": 2048, "layers": 6, "heads": 8},
    "160m": {"hidden_size": 768, "intermediate_size": 3072, "layers": 12, "heads": 12},
    "500m": {"hidden_size": 896, "intermediate_size": 4864, "layers": 24, "heads": 14},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "layers": 28, "heads": 16},
}
"""Width, inner width, layers and heads by name."""


@dataclass(eq=False)
class Training(Checked):
    """How language models are trained: the same for every run of a comparison."""

    layout: str = setting("llama", "layout of the model", among=("llama", "qwen2", "qwen3"))
    size: str = setting("tiny", "width, layers and heads", among=tuple(SIZES))
    layers: int | None = setting(None, "layers, in place of the size's own", least=1, whole=True)
    positions: str = setting(
        "rope",
        "positions",
        among=("rope", "nope", "absolute", "learned", "relative", "alibi"),
    )
    data: str = setting(
        DEFAULT,
        "text: novel, python, files, folders or hub:NAME, joined by commas",
    )
    vocabulary: int = setting(BYTES + 2, "tokens of the vocabulary; 258 is bytes", least=BYTES + 2)
    tokens: int | None = setting(
        None, "use so many tokens of the text; all when left out", least=1, whole=True
    )
    recall: float = setting(0.0, "share of training blocks that are recall tasks", least=0, below=1)
    context: int = setting(128, "tokens of a block", least=16)
    window: int | None = setting(
        None, "tokens that a query looks back, its own included", least=1, whole=True
    )
    prefix: int = setting(0, "first tokens that all see, without loss", least=0)
    fixed_token: int = setting(
        0, "position, from 1, that always holds the same token; 0: none", least=0
    )
    random_tokens: int = setting(0, "so many first tokens of a block are random", least=0)
    steps: int = setting(1000, "optimiser steps", least=1)
    batch: int = setting(16, "blocks a step", least=1)
    lr: float = setting(1e-3, "learning rate", above=0)
    schedule: str = setting(
        "cosine", "learning rate after the warm-up", among=("cosine", "constant_with_warmup")
    )
    warmup: int = setting(100, "steps of the warm-up", least=0)
    weight_decay: float = setting(0.1, "weight decay of AdamW", least=0)
    beta2: float = setting(0.95, "second moment's decay of AdamW", above=0, below=1)
    measure_every: int = setting(100, "steps between measurements of loss and sinks", least=1)
    save_every: int = setting(200, "steps between checkpoints", least=1)
    telemetry: int = setting(0, "steps between lines of telemetry; 0: none", least=0)
    checked: int = setting(64, "validation blocks measured", least=1)
    device: str | None = setting(None, "cpu or cuda; a GPU if there is one")


@dataclass(frozen=True)
class Variant:
    """One model of a comparison: a mixer, where standard attention is kept, and a seed."""

    mixer: str
    keep: str = "none"
    seed: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def arm(self) -> str:
        """The name without the seed."""
        extra = "".join(f"-{k}={v}" for k, v in sorted(self.changes.items()))
        return (self.mixer if self.keep == "none" else f"{self.mixer}-keep-{self.keep}") + extra

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"
