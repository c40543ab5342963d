"""Sparse-GIN and LoRA of as many parameters on the same frozen model, data and steps."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard.errors import InputError, nearest
from regard.parts.training.data import texts
from regard.watching.session import apply

from .adapter import Graph, SparseGIN

KINDS = {
    "sparse-gin": "messages from key to query",
    "sparse-gin-reference": "self loops alone, as released",
    "lora": "LoRA of queries and values, of the nearest number of parameters",
}
EVERY = 10  # one block in so many is for validation


class Adapted(nn.Module):
    """A frozen model under an adapter, as a `Trainer` takes it."""

    def __init__(self, model: Any, adapter: Any) -> None:
        super().__init__()
        self.base, self.adapter = model, adapter

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        return self.base(input_ids=input_ids, labels=labels, use_cache=False)


def blocks(given: str, tokens: Any, context: int, least: int) -> tuple[Tensor, Tensor]:
    """Training and validation blocks of a text, by the model's own tokenizer.

    Raises:
        InputError: too little text.
    """
    if tokens is None:
        raise InputError("this model brings no tokenizer: name one that does")
    pieces = tokens(texts(given), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for piece in pieces for i in piece], dtype=torch.long)
    cut = ids[: len(ids) // context * context].view(-1, context)
    held = torch.arange(len(cut)) % EVERY == EVERY - 1
    if int((~held).sum()) < least or not bool(held.any()):
        raise InputError(
            f"{given!r} holds {len(ids)} tokens, too few for a batch of {least} blocks of "
            f"{context} and one for validation: give more text, or a smaller batch"
        )
    return cut[~held], cut[held]


def adapters(kind: str, model: Any, hidden: int, seed: int) -> tuple[Any, Any]:
    """What is trained, and the handler that acts on attention; None for LoRA.

    Raises:
        InputError: an unknown kind, or no peft.
    """
    if kind not in KINDS:
        raise InputError(f"unknown adapter {kind!r}.{nearest(kind, KINDS)}")
    torch.manual_seed(seed)
    gin = SparseGIN(model, hidden, graph=Graph(compat="reference" if "ref" in kind else ""))
    if kind != "lora":
        return Adapted(model, gin), gin
    try:
        import peft
    except ImportError:
        raise InputError("LoRA needs peft: pip install 'regard[steer]'") from None
    wanted = _trained(gin)

    def lora(rank: int) -> Any:
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
        return peft.get_peft_model(copy.deepcopy(model), config)

    return lora(max(1, round(wanted / _trained(lora(1))))), None


def train(
    kind: str,
    model: Any,
    data: tuple[Tensor, Tensor],
    *,
    hidden: int,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    checked: int = 64,
    out: Path | None = None,
) -> dict[str, Any]:
    """Train one adapter; its parameters, and the validation loss before and after."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    model.requires_grad_(False)
    module, handler = adapters(kind, model, hidden, seed)
    train_ids, valid = data
    rows = Dataset.from_dict({"input_ids": train_ids.numpy()}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder, apply(model, *([handler] if handler else [])):
        before = _loss(module, valid[:checked], batch)
        trainer = Trainer(
            model=module,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch,
                learning_rate=rate,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=min(50, steps // 4),
                max_grad_norm=0.5,
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                seed=seed,
                use_cpu=next(model.parameters()).device.type == "cpu",
            ),
            train_dataset=rows,
            data_collator=_collate,
        )
        trainer.remove_callback(PrinterCallback)  # stdout is for results
        trained = trainer.train()
        after = _loss(module, valid[:checked], batch)
    if out is not None and handler is not None:
        handler.save(out)
    elif out is not None:
        module.save_pretrained(out)
    record = {"kind": kind, "seed": seed, "parameters": _trained(module), "before": before}
    return {**record, "loss": after, "train_loss": trained.training_loss}


def _collate(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def _loss(module: nn.Module, ids: Tensor, batch: int) -> float:
    was = module.training
    module.eval()
    device = next(module.parameters()).device
    parts = [
        float(module(input_ids=x.to(device), labels=x.to(device)).loss) * len(x)
        for x in ids.split(batch)
    ]
    module.train(was)
    return sum(parts) / len(ids)
