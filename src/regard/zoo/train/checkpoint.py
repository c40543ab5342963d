"""The state of a training beside its folder, so that one that was stopped goes on as if it had not
been: weights, averages, the optimizer, random generators, and what the record says so far.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regard import files


class Checkpoint:
    """Where a training into the folder `out` keeps its state; written whole, and read only by a
    training that begins with the same weights, draws, settings and code.

    Args:
        generators: of the samples.
        frozen: modules that are used and not trained.
    """

    def __init__(
        self, out: Path, *generators: torch.Generator, frozen: Iterable[nn.Module] = ()
    ) -> None:
        self.path = place(out)
        self.generators, self.frozen = generators, list(frozen)
        self.key = ""

    def begin(self, settings: dict[str, Any], trained: list[nn.Parameter]) -> dict[str, Any] | None:
        """What an earlier training of the same kind left: its numbers and its "tensors"."""
        from safetensors import SafetensorError, safe_open

        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for file in sorted(Path(__file__).parent.glob("*.py")):  # the code of the recipes
            mark.update(file.read_bytes())
        held = [t for m in self.frozen for t in m.state_dict().values()]
        for tensor in (*trained, *held, *(state for _, state in self._random())):
            mark.update(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
        self.key = mark.hexdigest()
        if not self.path.is_file():
            return None
        try:
            with safe_open(str(self.path), "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        for number, one in enumerate(self.generators):
            one.set_state(tensors[f"generator.{number}"])
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"])
        return {**json.loads(about["state"]), "tensors": tensors}

    def save(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write the state after a step."""
        from safetensors.torch import save

        kept = {n: t.detach().cpu().contiguous() for n, t in (*tensors.items(), *self._random())}
        about = {"key": self.key, "state": json.dumps(numbers)}
        files.write_bytes(self.path, save(kept, metadata=about))

    def _random(self) -> Iterator[tuple[str, Tensor]]:
        yield "random.cpu", torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            yield "random.cuda", torch.cuda.get_rng_state()
        for number, one in enumerate(self.generators):
            yield f"generator.{number}", one.get_state()


def place(out: Path) -> Path:
    """The file of a training into this folder.

    >>> place(Path("vae")).name
    '.vae.training.safetensors'
    """
    return files.beside(files.real(out.expanduser()), ".training.safetensors")


def forget(out: Path) -> None:
    """Remove the state: the training is whole."""
    place(out).unlink(missing_ok=True)


def optimizer_tensors(
    adam: torch.optim.Optimizer, trained: list[nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state by the number of the parameter."""
    kept = enumerate(adam.state.get(p, {}) for p in trained)  # none for what had no gradient
    return {f"{name}.{n}": value for n, state in kept for name, value in state.items()}


def restore_optimizer(
    adam: torch.optim.Optimizer, trained: list[nn.Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put it back, each tensor laid out as its parameter is."""
    for n, parameter in enumerate(trained):
        if f"step.{n}" not in tensors:
            continue
        fused = adam.param_groups[0].get("fused")
        step = tensors[f"step.{n}"].to(parameter.device if fused else "cpu")
        adam.state[parameter] = {"step": step} | {
            name: torch.empty_like(parameter).copy_(tensors[f"{name}.{n}"])
            for name in ("exp_avg", "exp_avg_sq")
        }
