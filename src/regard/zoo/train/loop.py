"""What every training here shares: one loop, boxed by the clock, and whole folders of weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from regard.errors import InputError
from regard.versions import versions

from .checkpoint import Checkpoint, forget, optimizer_tensors, restore_optimizer

POINTS = 60  # of the loss curve that is kept
SAY, SAVE = 10.0, 90.0  # seconds


@dataclass
class Clock:
    """A training of so many minutes: what share has passed, and the learning rate there.

    The rate warms up over the first 3 % and falls along a cosine to a twentieth. `steps` ends a
    training by their number instead, for a run that is to be repeated exactly.
    """

    minutes: float
    rate: float
    steps: int | None = None
    start: float = field(default_factory=time.monotonic)
    step: int = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        if self.steps is not None:
            return min(1.0, self.step / max(1, self.steps))
        return min(1.0, self.seconds / max(1e-9, 60 * self.minutes))

    def set(self, optimizer: torch.optim.Optimizer) -> float:
        """The share that has passed; sets the learning rate of each group by its own `scale`."""
        share = self.share
        factor = min(1.0, (share + 1e-3) / 0.03)
        factor *= 0.05 + 0.95 * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = self.rate * factor * group.get("scale", 1.0)
        return share


class Average:
    """Exponential moving average of parameters, with a start that forgets quickly."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.live = list(parameters)
        self.kept = [p.detach().clone().float() for p in self.live]
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        keep = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.kept, [p.detach().float() for p in self.live], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average into the parameters, and what was there in its place."""
        for live, kept in zip(self.live, self.kept):
            other = live.detach().clone().float()
            live.copy_(kept)
            kept.copy_(other)


@dataclass
class Diary:
    """The loss as it goes: a line on the terminal now and then, a short curve for the record."""

    name: str
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    curve: list[tuple[int, float]] = field(default_factory=list)
    samples: int = 0
    losses: list[Tensor] = field(default_factory=list)  # since the last point
    _last: float = field(default_factory=time.monotonic)

    def note(self, clock: Clock, loss: Tensor, samples: int) -> None:
        self.losses.append(loss.detach())
        self.samples += samples
        late, ended = time.monotonic() - self._last > SAY, clock.share >= 1
        # points of a training by steps are the same in every run of it
        due = late if clock.steps is None else clock.step % max(1, clock.steps // POINTS) == 0
        if due or ended:
            value = float(torch.stack(self.losses).mean())
            self.curve.append((clock.step, value))
            self.losses = []
        if (late or ended) and self.curve:
            rate = self.samples / max(1e-9, clock.seconds)
            self.say(
                f"{self.name}: step {clock.step}, {self.samples:,} samples, {rate:,.0f}/s, "
                f"loss {self.curve[-1][1]:.4f}, {clock.seconds:.0f} s"
            )
            self._last = time.monotonic()

    def record(self, clock: Clock, device: str) -> dict[str, Any]:
        """What `training.json` says."""
        every = max(1, len(self.curve) // POINTS)
        named = torch.cuda.get_device_name(device) if str(device).startswith("cuda") else "cpu"
        return {
            "name": self.name,
            "steps": clock.step,
            "samples": self.samples,
            "seconds": round(clock.seconds, 1),
            "device": named,
            "loss": [[s, round(v, 5)] for s, v in self.curve[::every]],
            "versions": versions(),
        }


def train(
    name: str,
    loss_of: Callable[[int], Tensor],
    groups: list[dict[str, Any]],
    *,
    samples: int,
    minutes: float,
    rate: float,
    steps: int | None,
    device: str,
    decay: float,
    save: Callable[[], Any] | None = None,
    kept: Checkpoint | None = None,
) -> dict[str, Any]:
    """Train until the clock says so, and leave the averaged weights in the parameters.

    Args:
        name: of the model, in what is said on the way and in the record.
        loss_of: the loss of new samples, given the number of the step.
        groups: parameters as AdamW takes them; a group's `scale` multiplies the rate.
        samples: how many each step sees.
        minutes, rate, steps: see `Clock`.
        decay: of the average that is kept.
        save: writes the weights, every 90 seconds and at the end.
        kept: the state, written as often; a training that was stopped goes on from it.

    Returns what `training.json` says of it.
    """
    fused = str(device).startswith("cuda")
    adam = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=fused)
    trained = [p for group in groups for p in group["params"]]
    average = Average(trained, decay)
    clock, diary = Clock(minutes, rate, steps), Diary(name)
    if kept is not None:
        settings = {"name": name, "samples": samples, "rate": rate, "steps": steps, "decay": decay,
                    "minutes": minutes if steps is None else None, "device": str(device),
                    **versions()}  # fmt: skip
        _go_on(kept, settings, trained, adam, average, clock, diary)
    saved = clock.seconds
    while clock.set(adam) < 1:
        loss = loss_of(clock.step)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        average.update()
        clock.step += 1
        diary.note(clock, loss, samples)
        if clock.seconds - saved > SAVE:
            saved = clock.seconds
            _keep(kept, trained, adam, average, clock, diary)
            if save is not None:
                average.swap()
                save()
                average.swap()
    _keep(kept, trained, adam, average, clock, diary)
    average.swap()
    record = diary.record(clock, device)
    if save is not None:
        save()
    return record


def _keep(
    kept: Checkpoint | None,
    trained: list[nn.Parameter],
    adam: torch.optim.Optimizer,
    average: Average,
    clock: Clock,
    diary: Diary,
) -> None:
    if kept is None or not clock.step:
        return
    tensors: dict[str, torch.Tensor] = {f"live.{n}": p for n, p in enumerate(trained)}
    tensors |= {f"average.{n}": t for n, t in enumerate(average.kept)}
    tensors |= optimizer_tensors(adam, trained)
    if diary.losses:
        tensors["losses"] = torch.stack(diary.losses)
    numbers = {"step": clock.step, "seconds": clock.seconds, "averaged": average.count,
               "samples": diary.samples, "curve": diary.curve}  # fmt: skip
    kept.save(numbers, tensors)


def _go_on(
    kept: Checkpoint,
    settings: dict[str, Any],
    trained: list[nn.Parameter],
    adam: torch.optim.Optimizer,
    average: Average,
    clock: Clock,
    diary: Diary,
) -> None:
    """Take up what a training of the same settings left."""
    left = kept.begin(settings, trained)
    if left is None:
        return
    tensors = left["tensors"]
    with torch.no_grad():
        for n, (live, mean) in enumerate(zip(trained, average.kept)):
            live.copy_(tensors[f"live.{n}"])
            mean.copy_(tensors[f"average.{n}"])
    restore_optimizer(adam, trained, tensors)
    clock.step, clock.start = left["step"], time.monotonic() - left["seconds"]
    average.count, diary.samples = left["averaged"], left["samples"]
    diary.curve = [(step, loss) for step, loss in left["curve"]]
    diary.losses = [*tensors["losses"].to(trained[0].device)] if "losses" in tensors else []
    diary.say(f"{diary.name}: goes on from step {clock.step}")


TOLD = ("steps", "samples", "seconds", "device", "seed", "batch", "rate", "pointing", "questions",
        "guided", "remark", "before")  # fmt: skip


def earlier(folder: Path, name: str) -> dict[str, Any]:
    """What the record of a trained `name` says, for a training that goes on from its folder.

    Raises:
        InputError: the folder holds no such model with its record.
    """
    try:
        record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        trained = record["name"] == name
    except (OSError, ValueError, KeyError, TypeError):
        trained = False
    if not trained:
        raise InputError(
            f"{folder} holds no {name} with its training.json: --start takes a folder that "
            f"`regard zoo train {name} --out DIR` made"
        )
    return {n: record[n] for n in TOLD if n in record}


def trainings(record: dict[str, Any], told: Callable[[dict[str, Any]], str]) -> list[str]:
    """What a record and those before it say of each training, the first one first; `told` puts one
    into words. One that was not recorded has a remark alone.
    """
    earlier = trainings(record["before"], told) if "before" in record else []
    if "samples" not in record:
        return [*earlier, record["remark"]]
    return [*earlier, told(record) + (f" ({record['remark']})" if "remark" in record else "")]


@contextmanager
def half(device: str) -> Iterator[None]:
    """bfloat16 on a GPU and on CPUs that multiply in it, float32 elsewhere."""
    kind = torch.device(device).type
    fast = kind == "cuda" or (kind == "cpu" and torch.cpu._is_avx512_bf16_supported())
    whole = _WholeAttention() if fast and kind == "cpu" else nullcontext()
    with torch.autocast(kind, torch.bfloat16, enabled=fast), whole:
        yield


def placed(module: Any, device: str) -> Any:
    """A module on the device; on a GPU with channels last, as its convolutions like them there."""
    kind = torch.channels_last if str(device).startswith("cuda") else torch.preserve_format
    return module.to(device, memory_format=kind)


class _WholeAttention(TorchFunctionMode):
    """Attention in float32: on CPUs its backward pass takes four times as long in bfloat16."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            wide = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a
                    for a in (*args, *(kwargs or {}).values())]  # fmt: skip
            named: Any = dict(zip(kwargs or {}, wide[len(args) :]))
            return F.scaled_dot_product_attention(*wide[: len(args)], **named)


class Counted(TorchFunctionMode):
    """Attention inside it meets the last key so many times.

    The empty T5 tokens of a Stable Diffusion 3 pipeline are all alike and stay so through every
    joint block. So one of them, counted as often as there are, gives the same but for rounding at a
    third of the tokens. Every attention inside must end on that key. `seen` keeps the queries and
    keys of each, in order.
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            self.seen.append((query, key))
            mask = query.new_zeros(1, 1, 1, key.shape[2])
            mask[..., -1] = math.log(self.times) if self.times else -math.inf
            named["attn_mask"] = mask.expand(-1, -1, query.shape[2], -1)
        return func(*args, **named)


MARK = ".regard-wrote.json"


def replaceable(out: Path) -> Path:
    """The place of a folder of weights, links followed; a folder that a training wrote there before
    is replaced, and no other. What a killed training had moved aside is put back first.

    Raises:
        InputError: a file, the working folder or one around it, a folder that holds anything that
            no training wrote.
    """
    out = out.expanduser().resolve()
    if not out.exists():
        for aside in sorted(out.parent.glob(f".{out.name}.old*")):
            os.replace(aside, out)  # killed between its two renames
            break
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder for the weights")
    if Path.cwd().is_relative_to(out):
        raise InputError(f"{out} is the folder you work in, or around it: name a new one in it")
    there = _files(out)
    try:
        wrote = set(json.loads((out / MARK).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        wrote = set()
    if others := sorted(there - wrote - {MARK}):
        raise InputError(
            f"{out} holds {others[0]}, which no training wrote, and all would be lost: name a new "
            "folder"
        )
    return out


def _files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if not f.is_dir()}


def save_folder(target: Path, write: Callable[[Path], Any]) -> None:
    """Write a folder beside its place, then put it there: a reader never meets half of one."""
    target = replaceable(target)
    part = target.with_name(f".{target.name}.part{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write(part)
    (part / MARK).write_text(json.dumps({"files": sorted(_files(part))}), encoding="utf-8")
    for file in _files(part):
        with (part / file).open("rb") as written:
            os.fsync(written.fileno())  # a name must not outlive a crash without its contents
    old = target.with_name(f".{target.name}.old{os.getpid()}")
    if target.exists():
        os.replace(target, old)
    os.replace(part, target)
    shutil.rmtree(old, ignore_errors=True)


def finish(out: Path, save: Callable[[Path], Any], record: dict[str, Any], card: str) -> None:
    """The folder `out` as it ships: weights in float16, the record and the card."""

    def write(folder: Path) -> None:
        save(folder)
        tidy(folder)
        write_record(folder, record, card)

    save_folder(out, write)
    forget(out)


def write_record(folder: Path, record: dict[str, Any], card: str) -> None:
    """`training.json` and the card beside the weights."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def tidy(folder: Path) -> None:
    """Weights of a folder in float16, and no trace of where its parts came from."""
    from safetensors.torch import load_file, save_file

    for file in folder.rglob("*.safetensors"):
        tensors = load_file(file)
        halved = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(halved, file, metadata={"format": "pt"})
        file.chmod(0o644)
    for file in (*folder.rglob("*config.json"), *folder.glob("model_index.json")):
        found = _forget(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _forget(found: Any) -> Any:
    """Nested settings without the places that parts were read from."""
    gone = ("_name_or_path", "base_model_name_or_path", "is_local", "local_files_only")
    if isinstance(found, dict):
        return {n: _forget(v) for n, v in found.items() if n not in gone}
    return found
