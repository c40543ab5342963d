"""How a model is loaded: device, dtype and where its files come from, for every command."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from regard.cards import Checked, setting
from regard.errors import InputError


@dataclass(eq=False)
class Loading(Checked):
    """Options of every command that loads a model or a pipeline.

    Without a word a model goes to the GPU where there is one, in the checkpoint's own dtype, and
    to the CPU in float32.
    """

    device: str | None = setting(None, "device: cpu, cuda or cuda:1; the GPU if there is one")
    dtype: str | None = setting(
        None, "dtype: float32, bfloat16, float16 or auto, the checkpoint's own (float32 on CPUs)"
    )
    device_map: str | None = setting(
        None,
        "spread the weights over devices, auto for example (needs accelerate)",
        excludes="device",
    )
    revision: str | None = setting(None, "branch, tag or commit of a hub id")
    allow_pickle: bool = setting(
        False, "read weights from pickles (.bin) too, as tensors only; else from safetensors alone"
    )
    trust_remote_code: bool = setting(False, "run model code that comes with the checkpoint")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("device", "dtype", "device_map", "revision"):
            if getattr(self, name) == "":
                raise InputError(f"{name} is empty: name one, or leave it out")

    def load(self, name: Any) -> tuple[Any, Any]:
        """Model and tokenizer, or processor."""
        from regard import zoo

        device = None if self.device_map else pick_device(self.device)
        own: dict[str, Any] = {"device_map": self.device_map} if self.device_map else {}
        if self.revision:
            own["revision"] = self.revision
        if self.allow_pickle:
            own["allow_pickle"] = True
        if self.trust_remote_code:
            own["trust_remote_code"] = True
        return zoo.load(name, device=device, dtype=self._dtype(device), **own)

    def pipeline(self, name: Any) -> Any:
        """A diffusion pipeline."""
        from regard.zoo.pipelines import load_pipeline

        if self.trust_remote_code:
            raise InputError("pipelines run no code of checkpoints: leave --trust-remote-code out")
        if self.allow_pickle:
            raise InputError("pipelines are read from safetensors: leave --allow-pickle out")
        device = None if self.device_map else pick_device(self.device)
        return load_pipeline(
            name,
            device=device,
            dtype=self._dtype(device),
            device_map=self.device_map,
            revision=self.revision,
        )

    def _dtype(self, device: str | None) -> str:
        return self.dtype or ("float32" if device == "cpu" else "auto")


def pick_device(given: str | None) -> str:
    """The device that was asked for; a GPU if there is one and nothing was said.

    Raises:
        InputError: neither cpu nor cuda, or a GPU that is not here.

    >>> pick_device("cpu")
    'cpu'
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if given is None:
        return "cuda" if there else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", given):
        raise InputError(f"unknown device {given!r}: choose cpu, cuda, or cuda:1 for the second")
    if given != "cpu" and not there:
        raise InputError("there is no CUDA device here: write --device cpu")
    if ":" in given and int(given.partition(":")[2]) >= there:
        raise InputError(f"there is no {given} here: the last one is cuda:{there - 1}")
    return given


def placed(model: Any) -> str:
    """Where a model lies and in which dtype, for the output of a command.

    >>> import torch
    >>> placed(torch.nn.Linear(2, 2))
    'float32 on cpu'
    """
    body = getattr(model, "unet", None) or getattr(model, "transformer", None) or model
    first = next(body.parameters())
    return f"{str(first.dtype).removeprefix('torch.')} on {first.device}"
