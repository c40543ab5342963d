"""What attention does while a model is trained: a line every N steps, alarms before the loss moves.

The forward pass of every N-th step leaves its inputs here; after the step a few of its rows go
through the model once more, without gradients, in evaluation mode and on fused attention. Training
itself is not touched: its numbers are those of a training without telemetry.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from regard.errors import InputError
from regard.reach.compiled import eagerly, is_compiled
from regard.reach.sites import unwrapped
from regard.watching.session import Watch

FACTS = ("max_logit", "entropy", "mean_received", "distance")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alarms:
    """When telemetry speaks up; each threshold holds for single heads.

    Attributes:
        growth, within: the largest logit is `growth` times what it was at most `within` steps ago,
            and at least `logit`.
        entropy: the mean entropy falls below so many nats, from above four times that within
            `within` steps.
        sink: the mean attention on the first token rises above this, from below within `within`
            steps; a head counts once.
    """

    growth: float = 4.0
    within: int = 200
    logit: float = 10.0
    entropy: float = 0.1
    sink: float = 0.3

    def __post_init__(self) -> None:
        if self.growth <= 1 or self.within < 1 or self.logit < 0:
            raise InputError("alarms: growth above 1, within at least 1 step, logit at least 0")
        if self.entropy < 0 or not 0 < self.sink < 1:
            raise InputError("alarms: entropy at least 0, sink between 0 and 1")

    def raised(self, earlier: list[dict[str, Any]], now: dict[str, Any]) -> list[dict[str, Any]]:
        """What the last line shows against those of the last `within` steps."""
        window = [x for x in earlier if now["step"] - x["step"] <= self.within]
        window = [x for x in window if x["layers"] == now["layers"]]
        if not window:
            return []
        found: list[dict[str, Any]] = []

        def past(name: str) -> Tensor:
            return torch.stack([torch.tensor(x[name]) for x in window])

        def note(name: str, where: Tensor, before: Tensor, after: Tensor, words: str) -> None:
            for row, head in where.nonzero().tolist():
                was, value = float(before[row, head]), float(after[row, head])
                layer = now["layers"][row]
                found.append(
                    {
                        "alarm": name,
                        "layer": layer,
                        "head": head,
                        "from": was,
                        "to": value,
                        "words": f"layer {layer} head {head}: {words} {was:.3g} to {value:.3g}",
                    }
                )

        logit, least = torch.tensor(now["max_logit"]), past("max_logit").amin(0)
        grown = (logit >= self.logit) & (logit >= self.growth * least.clamp_min(1e-6))
        note("logits grow", grown, least, logit, "largest logit from")
        entropy, most = torch.tensor(now["entropy"]), past("entropy").amax(0)
        fallen = (entropy < self.entropy) & (most > 4 * self.entropy)
        last = torch.tensor(window[-1]["entropy"])
        note("entropy collapses", fallen & (last >= self.entropy), most, entropy, "entropy from")
        sink, before = torch.tensor(now["sink"]), past("sink")
        risen = (sink > self.sink) & (before[-1] <= self.sink)
        note("a sink appears", risen, before.amin(0), sink, "attention on the first token from")
        return found


@dataclass
class _Batch:
    """The inputs of a forward pass, and the precision it ran in."""

    inputs: dict[str, Any]
    autocast: tuple[str, torch.dtype] | None


@dataclass(eq=False)
class Telemetry(TrainerCallback):
    """A recorder of attention in training, for any transformers `Trainer` or a loop of one's own.

    `Trainer(..., callbacks=[regard.Telemetry(every=50)])`, or `telemetry.step(model)` once after
    every optimiser step. Each line holds, by layer and head: the largest logit, the mean entropy,
    the mean attention on the first token ("sink"), the mean distance looked back; by layer the norm
    of the first token's state over the mean of the others; a summary; and the alarms raised.

    Works with gradient checkpointing, autocast, PEFT and compiled models: the steps that are
    measured run uncompiled, the others are not looked at.

    Args:
        every: steps between lines.
        path: JSON lines are appended here; kept in `lines` alone when None (in a Trainer:
            `telemetry.jsonl` in its output folder).
        rows: rows of the batch that are measured.
        alarms: the thresholds.
        on_alarm: called with every alarm, a dictionary.

    >>> from regard.zoo.tiny import inputs, tiny
    >>> model, telemetry = tiny("llama").train(), Telemetry(every=2)
    >>> for _ in range(4):
    ...     loss = model(**inputs("llama", model)).logits.sum()
    ...     line = telemetry.step(model)
    >>> [line["step"] for line in telemetry.lines]
    [2, 4]
    """

    every: int = 50
    path: Path | None = None
    rows: int = 2
    alarms: Alarms = field(default_factory=Alarms)
    on_alarm: Callable[[dict[str, Any]], None] | None = None
    lines: list[dict[str, Any]] = field(default_factory=list, init=False)
    _count: int = field(default=0, init=False, repr=False)
    _batch: _Batch | None = field(default=None, init=False, repr=False)
    _undo: list[Callable[[], None]] = field(default_factory=list, init=False, repr=False)
    _log: Callable[[dict[str, float]], None] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("every", "rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is a whole number of at least 1, not {value!r}")
        if self.path is not None:
            self.path = Path(self.path).expanduser()
            if not self.path.absolute().parent.is_dir():
                raise InputError(f"{self.path}: the folder does not exist: make it first")

    # -- a loop of one's own -----------------------------------------------------------------------
    def step(self, model: Any, step: int | None = None) -> dict[str, Any] | None:
        """An optimiser step is done: its line, where it was one of the measured.

        The first call only begins to listen where `every` is 1: inputs are taken from the next
        forward pass.
        """
        self._count = self._count + 1 if step is None else step
        line = self._measured(model, self._count)
        if (self._count + 1) % self.every == 0:
            self._listen(model)
        return line

    # -- a Trainer ---------------------------------------------------------------------------------
    def reports(self, trainer: Any) -> Telemetry:
        """Hand the summaries to the trainer's own log, and so to all that it reports to."""
        self._log = trainer.log
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Watch(unwrapped(kwargs["model"]), FACTS)  # refuses, before training, what cannot be watched
        if self.path is None:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / "telemetry.jsonl"
        if self.path.is_file() and state.is_world_process_zero:
            kept = [x for x in _read(self.path) if x["step"] <= state.global_step]
            self.lines = kept
            self.path.write_text("".join(json.dumps(x) + "\n" for x in kept), encoding="utf-8")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step + 1) % self.every == 0:
            self._listen(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        line = self._measured(kwargs["model"], state.global_step, state.is_world_process_zero)
        if line is not None and self._log is not None:
            self._log({f"telemetry/{name}": x for name, x in line["summary"].items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._deafen()

    # -- listening ---------------------------------------------------------------------------------
    def _listen(self, model: Any) -> None:
        """Take the inputs of the next forward passes; compiled graphs are left alone meanwhile."""
        self._deafen()
        inner = unwrapped(model)

        def take(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kind = next(module.parameters()).device.type
            cast = None
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                cast = (kind, torch.get_autocast_dtype(kind))
            named = {**dict(zip(("input_ids", "attention_mask", "position_ids"), args)), **kwargs}
            self._batch = _Batch(named, cast)

        self._undo.append(inner.register_forward_pre_hook(take, with_kwargs=True).remove)
        # a graph that was compiled before knows of no hook
        if is_compiled(inner) or type(model).__name__ == "OptimizedModule":
            self._undo.append(eagerly())

    def _deafen(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _measured(self, model: Any, step: int, writes: bool = True) -> dict[str, Any] | None:
        self._deafen()
        batch, self._batch = self._batch, None
        if batch is None:
            return None
        line: dict[str, Any] = {"step": step, **measured(unwrapped(model), batch, self.rows)}
        line["alarms"] = self.alarms.raised(self.lines, line)
        self.lines.append(line)
        if writes:
            for alarm in line["alarms"]:
                logger.warning("step %d: %s: %s", step, alarm["alarm"], alarm["words"])
                if self.on_alarm is not None:
                    self.on_alarm({"step": step, **alarm})
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
        return line


def measured(model: Any, batch: _Batch, rows: int) -> dict[str, Any]:
    """The facts of the first rows of a batch, by layer and head."""
    inputs = _cut(batch.inputs, rows)
    mask = inputs.get("attention_mask")
    kind, dtype = batch.autocast or ("cpu", torch.bfloat16)
    cast = torch.autocast(kind, dtype) if batch.autocast else nullcontext()
    was = [m for m in model.modules() if m.training]
    try:
        model.eval()
        with torch.no_grad(), cast, Watch(model, FACTS) as seen:
            out = model(**inputs, use_cache=False, output_hidden_states=True)
    finally:
        for module in was:
            module.training = True
    first, live = _first(mask, seen)
    by: dict[str, Any] = {"layers": list(seen["entropy"])}
    finite: dict[str, Tensor] = {}
    largest = seen["max_logit"].stack().cpu()
    finite["max_logit"] = largest.masked_fill(~live[None, :, None], -torch.inf).amax((1, 3))
    for name, fact in (("entropy", "entropy"), ("distance", "distance")):
        x = seen[fact].stack().cpu() * live[None, :, None]
        finite[name] = x.sum((1, 3)) / live.sum()
    alpha = seen["mean_received"].stack().cpu()
    at = first[None, :, None, None].expand(*alpha.shape[:3], 1)
    finite["sink"] = alpha.gather(3, at)[..., 0].mean(1)
    by |= {name: x.tolist() for name, x in finite.items()}
    norms = torch.stack([h.detach().float().norm(dim=-1).cpu() for h in out.hidden_states])
    ratio = _ratio(norms, first, live)
    by["norm_ratio"] = ratio.tolist()
    by["summary"] = {
        "max_logit": float(finite["max_logit"].max()),
        "entropy": float(finite["entropy"].mean()),
        "sink": float(finite["sink"].mean()),
        "distance": float(finite["distance"].mean()),
        "norm_ratio": float(ratio.max()),
    }
    return by


def _cut(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """A few rows, without what only the loss and the cache need."""
    dropped = (
        "labels",
        "num_items_in_batch",
        "use_cache",
        "past_key_values",
        "output_hidden_states",
    )
    tensors = [x for x in inputs.values() if torch.is_tensor(x) and x.dim()]
    batch = len(tensors[0]) if tensors else 0
    return {
        name: x[:rows].detach() if torch.is_tensor(x) and x.dim() and len(x) == batch else x
        for name, x in inputs.items()
        if name not in dropped and x is not None
    }


def _first(mask: Tensor | None, seen: Watch) -> tuple[Tensor, Tensor]:
    """Where each row begins, `[batch]`, and which tokens count, `[batch, tokens]`."""
    shape = seen["entropy"].stack().shape
    live = torch.ones(shape[1], shape[3], dtype=torch.bool)
    if mask is not None and mask.shape == live.shape:
        live = mask.bool().cpu()
    return live.long().argmax(-1), live


def _ratio(norms: Tensor, first: Tensor, live: Tensor) -> Tensor:
    """Norm of the first token's state over the mean of the others', by layer: `[layers]`."""
    if norms.shape[1:] != live.shape:
        return torch.ones(len(norms))
    one = torch.zeros_like(live).scatter(1, first[:, None], True)
    others = live & ~one
    mean = (norms * others).sum(-1) / others.sum(-1).clamp_min(1)
    return (norms.gather(2, first[None, :, None].expand(len(norms), -1, 1))[..., 0] / mean).mean(1)


def _read(path: Path) -> list[dict[str, Any]]:
    from .lm import read_lines

    return read_lines(path)
