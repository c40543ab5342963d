"""One call to get a diffusion pipeline, from a folder or the hub."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regard.errors import InputError, nearest
from regard.zoo.entries import offline
from regard.zoo.matching import check_parts
from regard.zoo.shipped import PIPELINES, shipped

INDEX = "model_index.json"


def is_pipeline(name: str | os.PathLike[str]) -> bool:
    """Whether this is a pipeline of ours by name, or a folder that `save_pretrained` of one wrote.

    >>> is_pipeline("no/such/folder"), is_pipeline("shapes-sd")
    (False, True)
    """
    return str(name).strip().lower() in PIPELINES or (Path(name).expanduser() / INDEX).is_file()


def need_diffusers() -> Any:
    """The package diffusers.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import diffusers
    except ImportError:
        raise ImportError(
            'diffusion pipelines need diffusers: pip install "regard[diffusion]" (with Python '
            "3.11 or newer)"
        ) from None
    return diffusers


def load_pipeline(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: Any = None,
    device_map: str | None = None,
    revision: str | None = None,
) -> Any:
    """Load a diffusion pipeline: "shapes-sd" or "shapes-dit", which come with the package, a folder
    that `save_pretrained` wrote, or an id on the hub.

    Weights are float32 unless `dtype` says otherwise ("auto" is the checkpoint's own), and are read
    from safetensors only. No code of a checkpoint is run.

    Raises:
        InputError: no such folder, a folder that holds no pipeline, a class that diffusers does not
            have, files that cannot be read.
        ImportError: diffusers is not installed.
    """
    name = os.fspath(name_or_path)
    if not name.strip():
        raise InputError("the name of the pipeline is empty: name its folder, or a hub id")
    path = shipped(name) or Path(name).expanduser()
    diffusers = need_diffusers()
    if path.is_dir():
        _check_folder(path, diffusers)
    elif path.exists():
        raise InputError(f"{name} is a file: name the folder of a diffusion pipeline")
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(
            f"there is no folder {name}: name the folder of a diffusion pipeline, or one that "
            f"comes with regard.{nearest(name, PIPELINES)}"
        )
    from regard.zoo.loading import dtype_of

    given = dtype_of(dtype)
    own = {} if given == "auto" else {"dtype": given}
    own |= {n: v for n, v in (("device_map", device_map), ("revision", revision)) if v is not None}
    try:
        with _quiet():
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(path) if path.is_dir() else name,
                **own,
                use_safetensors=True,
                local_files_only=path.is_dir() or offline(),
                **(_left_out(path, diffusers) if path.is_dir() else {}),
            )
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, TypeError) as problem:
        first = next((t.strip() for t in str(problem).splitlines() if t.strip()), "unreadable")
        if not path.is_dir() and isinstance(problem, OSError):
            raise InputError(
                f"there is no pipeline {name!r} here, and the hub does not give it (it is switched "
                "off, or has no such pipeline): name a folder"
            ) from problem
        raise InputError(f"the pipeline in {name} cannot be loaded: {first}") from problem
    if path.is_dir():
        check_parts(pipe, path)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


def _left_out(path: Path, diffusers: Any) -> dict[str, None]:
    """Parts that the pipeline may do without and the folder does not have: None has to be said."""
    index = json.loads((path / INDEX).read_text(encoding="utf-8"))
    parts = inspect.signature(getattr(diffusers, index["_class_name"]).__init__).parameters
    free = ("text_encoder_3", "tokenizer_3", "safety_checker", "feature_extractor", "image_encoder")
    return {n: None for n in parts if n in free and index.get(n, [None])[0] is None}


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither diffusers' nor transformers' bars while loading."""
    from diffusers.utils import logging

    from regard.zoo.convert import quiet

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with quiet():
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def _check_folder(path: Path, diffusers: Any) -> None:
    index = path / INDEX
    if not index.is_file():
        kind = "a transformers model" if (path / "config.json").is_file() else "no model"
        raise InputError(
            f"{path} holds {kind}, not a diffusion pipeline: name the folder with {INDEX}"
        )
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{index} is damaged: save the pipeline again") from None
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise InputError(
            f"{path} names the pipeline class {name!r}, which diffusers does not have; code from a "
            "checkpoint is not run"
        )
