"""One training of one language model by transformers' Trainer: resumable, stopped by NaN."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError, RegardError, nearest
from regard.reach.sites import asks

from .data import Blocks, Switches, blocks
from .settings import SIZES, Training, Variant


class Diverged(RegardError):
    """The loss of a training is not a number; the message names the last good checkpoint."""


def prepared(settings: Training) -> Blocks:
    """The data of a comparison.

    Raises:
        InputError: too little text, or switches beyond the block.
    """
    context = settings.context
    for name in ("fixed_token", "random_tokens", "prefix", "window"):
        value = getattr(settings, name) or 0
        if value > context - 1 and name != "window":
            raise InputError(f"{name} {value} leaves nothing of a block of {context} tokens")
    return blocks(
        settings.data,
        context,
        vocabulary=settings.vocabulary,
        limit=settings.tokens,
        recall=settings.recall,
        least=settings.batch,
    )


def configured(settings: Training, variant: Variant, vocabulary: int) -> Any:
    """The config of a variant.

    Raises:
        InputError: an unknown mixer, or sizes that do not fit.
    """
    from regard.parts.mixers import MixerConfig, placed

    if settings.size not in SIZES:
        raise InputError(f"unknown size {settings.size!r}.{nearest(settings.size, SIZES)}")
    size = SIZES[settings.size]
    layers = settings.layers or size["layers"]
    changes = {"positions": settings.positions, **variant.changes}
    return MixerConfig(
        vocab_size=vocabulary,
        hidden_size=size["hidden_size"],
        intermediate_size=size["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=size["heads"],
        max_position_embeddings=settings.context,
        mixers=placed(variant.mixer, variant.keep, layers),
        layout=settings.layout,
        window=settings.window,
        prefix=settings.prefix,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        rms_norm_eps=1e-5,
        **changes,
    )


def matched(settings: Training, variant: Variant) -> Variant:
    """The variant with the width of the MLPs of its heads that comes nearest to the parameters of
    standard attention; others than graph mixers as they are.
    """
    if variant.mixer not in ("gin", "pna"):
        return variant
    from regard.parts.mixers import MixerForCausalLM, counts

    def total(size: float | None) -> int:
        given = (
            Variant("standard") if size is None else replace(variant, changes={"graph_size": size})
        )
        with torch.device("meta"):
            return counts(MixerForCausalLM(configured(settings, given, 300)))["total"]

    size = SIZES[settings.size]
    head_dim = size["hidden_size"] // size["heads"]
    wanted, one, two = total(None), total(1.0), total(2.0)
    nearest_width = max(1, round(head_dim * (1 + (wanted - one) / (two - one))))  # it is linear
    return replace(variant, changes={**variant.changes, "graph_size": nearest_width / head_dim})


def built(settings: Training, variant: Variant, data: Blocks) -> Any:
    """The model of a variant with its first weights."""
    from regard.parts.mixers import MixerForCausalLM

    torch.manual_seed(variant.seed)
    model = MixerForCausalLM(configured(settings, variant, len(data.tokenizer)))
    if "fixed_seq_qk" in (model.config.mixers or []):
        text = data.train.flatten()
        model.set_fixed_text(text[: settings.context])
    return model


def train(
    folder: Path,
    settings: Training,
    variant: Variant,
    data: Blocks,
    *,
    measure: Callable[[Any, int], dict[str, Any]] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a variant in its folder, going on from the last checkpoint there; returns its record.

    Writes `checkpoint/` (the trained model and its tokenizer), `state/` (what a killed training
    goes on from; removed at the end) and `curve.jsonl` (what `measure(model, step)` gave).

    Raises:
        Diverged: the loss became NaN or infinite.
    """
    import shutil

    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from transformers.trainer_utils import set_seed

    trainer_class, callbacks = _trainer()
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state"
    state.mkdir(exist_ok=True)
    last = _last_checkpoint(state)
    model = built(settings, variant, data)
    if last is not None:
        _same_model(Path(last), model)
    set_seed(variant.seed)
    arguments = TrainingArguments(
        output_dir=str(state),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=min(settings.warmup, settings.steps // 2),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.beta2,
        max_grad_norm=1.0,
        logging_steps=settings.measure_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=2,
        report_to=[],
        seed=variant.seed,
        data_seed=variant.seed,
        use_cpu=settings.device == "cpu",
        disable_tqdm=not (progress and sys.stderr.isatty()),
        dataloader_pin_memory=settings.device != "cpu",
    )
    from datasets import Dataset

    rng = torch.Generator().manual_seed(variant.seed)
    ids = switches(settings)(data.train, data.tokenizer, rng)
    rows = Dataset.from_dict({"input_ids": ids.numpy()}).with_format("torch")
    curve = folder / "curve.jsonl"
    hooks = [callbacks(curve, measure, settings.measure_every, last is not None)]
    if settings.telemetry and any(asks(module) for module in model.modules()):
        from .telemetry import Telemetry  # of softmax attention alone

        hooks.append(Telemetry(every=settings.telemetry, path=folder / "telemetry.jsonl"))
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=rows, data_collator=_collate, callbacks=hooks
    )
    trainer.remove_callback(PrinterCallback)  # stdout is for results
    trained = trainer.train(resume_from_checkpoint=last)
    model = trainer.accelerator.unwrap_model(trainer.model)
    _save(folder / "checkpoint", model, data.tokenizer)
    record = {
        "variant": asdict(variant),
        "arm": variant.arm,
        "settings": settings.settings(),
        "steps": trainer.state.global_step,
        "train_loss": trained.training_loss,
        "seconds_a_step": trained.metrics["train_runtime"] / max(1, trainer.state.global_step),
        "resumed": last is not None,
    }
    shutil.rmtree(state, ignore_errors=True)
    return {**record, "model": model}


def switches(settings: Training) -> Switches:
    """What is done to the blocks, in training and in evaluation."""
    return Switches(settings.fixed_token, (0, settings.random_tokens))


def _collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = torch.stack([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def _last_checkpoint(state: Path) -> str | None:
    """The newest whole checkpoint; those that a killed process left half written are removed."""
    import shutil

    def number(folder: Path) -> int:
        return int(folder.name.rpartition("-")[2])

    for folder in sorted(state.glob("checkpoint-*"), key=number, reverse=True):
        try:  # the Trainer writes this file last
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
            continue
        return str(folder)
    return None


def _same_model(checkpoint: Path, model: Any) -> None:
    """Refuse to go on from a checkpoint of another layout."""
    try:
        there = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{checkpoint} holds no config.json: remove the folder") from None
    given = json.loads(model.config.to_json_string(use_diff=False))
    other = [
        n for n in ("mixers", "layout", "positions", "hidden_size") if there.get(n) != given[n]
    ]
    if other:
        raise InputError(
            f"{checkpoint} is of another model ({other[0]} {there.get(other[0])}, not "
            f"{given[other[0]]}): choose another folder"
        )


def _save(place: Path, model: Any, tokens: Any) -> None:
    """The folder whole or not at all."""
    import shutil

    part = place.with_name(f".{place.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokens.save_pretrained(part)
    shutil.rmtree(place, ignore_errors=True)
    os.replace(part, place)


def _trainer() -> tuple[Any, Any]:
    from transformers import Trainer, TrainerCallback

    class LMTrainer(Trainer):
        """Stops where the loss is no number, and keeps no checkpoint that is not finite."""

        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(model, *args, **kwargs)
            if not bool(loss.isfinite()):
                kept = _last_checkpoint(Path(str(self.args.output_dir)))
                raise Diverged(
                    f"the loss of step {self.state.global_step + 1} is {float(loss)}: lower the "
                    f"learning rate; the last good checkpoint is {kept or 'none, it came too soon'}"
                )
            return loss

        def _save_checkpoint(self, model: Any, *args: Any, **kwargs: Any) -> None:
            if all(bool(p.isfinite().all()) for p in model.parameters()):
                super()._save_checkpoint(model, *args, **kwargs)

    class Curve(TrainerCallback):
        """A line of measurements every so many steps, and at the beginning."""

        def __init__(self, path: Path, measure: Any, every: int, going_on: bool) -> None:
            self.path, self.measure, self.every, self.going_on = path, measure, every, going_on

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lines = read_lines(self.path) if self.going_on else []
            kept = [x for x in lines if x["step"] <= state.global_step]
            self.path.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")
            if not kept:
                self._write(kwargs["model"], state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % self.every == 0:
                self._write(kwargs["model"], state.global_step)

        def _write(self, model: Any, step: int) -> None:
            if self.measure is None:
                return
            was = model.training
            line = {"step": step, **self.measure(model.eval(), step)}
            model.train(was)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    return LMTrainer, Curve


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON lines file; a half one, of a killed run, is left out.

    >>> read_lines(Path("nowhere"))
    []
    """
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@torch.no_grad()
def losses(model: Any, ids: Tensor, batch: int = 32) -> Tensor:
    """Loss of every token but the first, `[blocks, tokens - 1]`, float32."""
    device = next(model.parameters()).device
    parts = []
    for rows in ids.split(batch):
        rows = rows.to(device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        part = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
        )
        parts.append(part.view(len(rows), -1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def accuracy(model: Any, ids: Tensor, answers: Tensor, batch: int = 32) -> float:
    """Share of the answers that the model predicts."""
    device = next(model.parameters()).device
    right = []
    for rows in ids.split(batch):
        guess = model(input_ids=rows.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu()
        right.append(guess == rows[:, 1:])
    known = answers[:, 1:]
    return float(torch.cat(right)[known].float().mean())


def finite(x: float) -> float | None:
    """A number that JSON knows, None for others."""
    return x if math.isfinite(x) else None
