"""What is measured of a language model in training and after it."""

from __future__ import annotations

from typing import Any

import torch

from regard.parts.mixers import counts, indicators, looks, simple, sink_rates

from .data import Blocks
from .lm import accuracy, losses, switches
from .settings import Training

PROBE = 64  # tokens of a sequence whose sinks are measured: the rate depends on the length
PARTS = 4  # of a block, over which the loss by context is shown


def curve(model: Any, settings: Training, data: Blocks) -> dict[str, Any]:
    """Validation loss, recall and sinks, on the first `checked` validation blocks."""
    ids = valid(settings, data)
    loss = losses(model, ids)[:, max(0, settings.prefix - 1) :]
    by_block = loss.mean(1)
    found: dict[str, Any] = {
        "loss": float(by_block.mean()),
        "by_context": [float(part.mean()) for part in loss.chunk(PARTS, 1)],
        "recall": accuracy(model, data.recall, data.answers),
    }
    seen = looks(model, ids[:, :PROBE].to(next(model.parameters()).device))
    rates = sink_rates(seen)
    positions = rates.pop("sink")
    return {
        **found,
        **rates,
        "sink_1": positions[0] if positions else 0.0,
        "sink_2": positions[1] if positions else 0.0,
        "sink_3": positions[2] if positions else 0.0,
        "sink_later": max(positions[3:], default=0.0),
        **indicators(seen),
    }


def final(model: Any, settings: Training, data: Blocks) -> dict[str, Any]:
    """What `curve` gives, the parameters, and the loss without the simple layers of a hybrid."""
    model.eval()
    found = {**curve(model, settings, data), "parameters": counts(model)}
    rng = torch.Generator().manual_seed(7)
    trained = switches(settings)(data.train[: settings.checked], data.tokenizer, rng)
    found["train_loss"] = float(losses(model, trained).mean())
    found["map_change"] = map_change(model, valid(settings, data)[:2, :PROBE])
    left = simple(model.config.mixers or [])
    if 0 < len(left) < model.config.num_hidden_layers:
        with model.skipping(left):
            found["skip_loss"] = float(losses(model, valid(settings, data)).mean())
            found["skip_recall"] = accuracy(model, data.recall, data.answers)
    return found


def map_change(model: Any, ids: torch.Tensor) -> dict[str, float | None]:
    """Largest difference of the mean weights of tokens between two texts: over the layers whose
    maps come from a second stream ("fixed"), and over the others ("free").
    """
    if len(ids) < 2:
        return {"fixed": None, "free": None}
    seen = looks(model, ids.to(next(model.parameters()).device))
    changes: dict[str, list[float]] = {"fixed": [], "free": []}
    for layer, x in seen.items():
        fixed = model.config.kinds[layer].source in ("noise", "text")
        changes["fixed" if fixed else "free"].append(float((x.alpha[0] - x.alpha[1]).abs().max()))
    return {name: max(values) if values else None for name, values in changes.items()}


def valid(settings: Training, data: Blocks) -> torch.Tensor:
    """The validation blocks that are measured, switched as those of training are."""
    rng = torch.Generator().manual_seed(7)
    return switches(settings)(data.valid[: settings.checked], data.tokenizer, rng)
