"""One call to get a model and what turns text, pictures or sound into its inputs."""

from __future__ import annotations

import json
import os
import re
import weakref
from pathlib import Path
from typing import Any

from regard.errors import InputError, nearest
from regard.zoo.entries import Entry, models, offline
from regard.zoo.matching import check_loaded
from regard.zoo.shipped import MODELS, PIPELINES, shipped

_TOKENIZERS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_DTYPES = ("float32", "float16", "bfloat16", "float64", "auto")
_COMPANION_FILES = ("tokenizer.json", "tokenizer_config.json", "processor_config.json")
_PICKLED = "no file named model.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    device: Any = None,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """Load a model and its tokenizer (a processor for pictures or sound), ready to run.

    The name is one of `models()`, a folder with a checkpoint, or an id on the hub. Weights are
    float32 unless `dtype` (a torch dtype, its name, or "auto" for the checkpoint's own) says
    otherwise. Further arguments go to `from_pretrained`. The second value is None if the checkpoint
    carries neither tokenizer nor processor. Code of a checkpoint runs only with
    `trust_remote_code=True`, and weights are read from safetensors: from pickles (.bin) only with
    `allow_pickle=True`, and of those nothing but tensors.

    Raises InputError for an unknown name (with the nearest known one), a folder that is no
    checkpoint, a dtype or device that does not exist here.

    Example: `model, tokenizer = load("smollm2-135m")`
    """
    dtype = dtype_of(dtype)
    device = _device(device)
    where = _resolve(name_or_path)
    if not allow_pickle:
        kwargs.setdefault("use_safetensors", True)
    model, tokenizer = _from_pretrained(where, str(name_or_path), dtype, kwargs)
    if device is not None:
        model = model.to(device)
    model.eval()
    if tokenizer is not None:
        _TOKENIZERS[model] = tokenizer
    return model, tokenizer


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer or processor that `load` returned with this model, or None."""
    try:
        return _TOKENIZERS.get(model)
    except TypeError:  # not something that can be a key, so not a model of ours
        return None


def dtype_of(dtype: Any) -> Any:
    """Return a torch dtype or "auto"."""
    import torch

    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        if not dtype.is_floating_point:
            raise InputError(f"A model cannot be loaded as {dtype}; take float32 or bfloat16.")
        return dtype
    short = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
    name = short.get(str(dtype).lower(), str(dtype).lower().removeprefix("torch."))
    if name not in _DTYPES:
        raise InputError(f"There is no dtype {dtype!r}.{nearest(str(dtype), _DTYPES)}")
    return name if name == "auto" else getattr(torch, name)


def _device(device: Any) -> Any:
    """Return a torch device that exists on this machine, or None."""
    import torch

    if device is None:
        return None
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as problem:
        raise InputError(
            f"The device {device!r} cannot be used here ({_first_line(problem)}); try 'cpu'."
        ) from problem
    return chosen


def _resolve(name_or_path: str | os.PathLike[str]) -> str | Path:
    """Return a checkpoint folder or a hub id for what the user named."""
    name = os.fspath(name_or_path)
    if not name.strip():
        raise InputError(f"The name of the model is empty.{nearest('', _names())}")
    for entry in models():
        if entry.name == name.lower():
            return _resolve_entry(entry)
    if name.strip().lower() in PIPELINES:
        raise InputError(
            f"{name} makes images: load it with regard.zoo.load_pipeline({name.strip().lower()!r})"
        )
    if own := shipped(name):
        return own
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file() or _in_parts(path):
            return path
        raise InputError(
            f"{name} is a folder without config.json, so it holds no transformers checkpoint; "
            "name the folder that save_pretrained wrote."
        )
    if path.exists():
        raise InputError(f"{name} is a file; name the folder that holds the checkpoint.")
    if isinstance(name_or_path, Path) or not _HUB_ID.fullmatch(name):
        raise InputError(f"There is no folder {name}, and it is no model name either.")
    hint = nearest(name, _names())
    if "/" not in name and "Did you mean" in hint:
        # A slip of the keyboard must not start a download.
        raise InputError(f"There is no model {name!r}.{hint}")
    return name


def _resolve_entry(entry: Entry) -> str | Path:
    """Return where a named model lies: the cache, the package that carries it, or the hub."""
    from regard.zoo import convert
    from regard.zoo.cache import made_path

    if entry.convert and (made := made_path(entry.cache_name)):
        return made
    if package := entry.package:
        if entry.convert:
            return convert.converted(entry, package)
        return convert.checked_folder(entry, package)
    if entry.hub and not offline():
        return entry.hub
    raise InputError(
        f"The weights of {entry.name} are not installed; get them with: {entry.remedy}"
    )


def _names() -> list[str]:
    return [*(entry.name for entry in models()), *MODELS, *PIPELINES]


def _from_pretrained(where: str | Path, name: str, dtype: Any, kwargs: dict[str, Any]) -> Any:
    """Load the class that the checkpoint's config names, and its tokenizer or processor."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoConfig

    from regard.zoo.convert import quiet

    source = str(where)
    # What chooses files on the hub has to choose the same for config, weights and tokenizer.
    choosing = ("revision", "token", "cache_dir", "subfolder", "trust_remote_code")
    shared = {name: value for name, value in kwargs.items() if name in choosing}
    try:
        with quiet():
            if isinstance(where, Path) and _in_parts(where):
                from regard.zoo.vlm import load_smol

                return load_smol(where, dtype)
            trusted = shared.setdefault("trust_remote_code", False)
            if isinstance(where, Path) and _of_mixers(where):
                import regard.parts.mixers  # noqa: F401  # registers the class
            config = kwargs.pop("config", None) or AutoConfig.from_pretrained(source, **shared)
            model_class = _model_class(config, name, trusted)
            model, info = model_class.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, **kwargs
            )
            trunk = model_class.__name__ not in (getattr(config, "architectures", None) or [])
            check_loaded(name, info, head_may_lack=trunk)
            return model, _companion(model, source, shared)
    except InputError:
        raise
    except (
        OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, UnpicklingError,
    ) as problem:  # fmt: skip
        raise InputError(_explain(where, name, problem)) from problem


def _in_parts(path: Path) -> bool:
    """Whether the folder is laid out as smol-vlm: what goes around SmolLM2, and no model itself."""
    return (path / "tower").is_dir() and (path / "adapter").is_dir()


def _of_mixers(path: Path) -> bool:
    """Whether the folder holds a language model of `regard.parts.mixers`."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "mixer_lm"


def _model_class(config: Any, name: str, trusted: bool = False) -> Any:
    """Return the class of transformers that the config names, or the plain trunk of its type."""
    import transformers

    own = getattr(config, "auto_map", None) or {}
    if trusted and own:
        kinds = [k for k in own if k.startswith("AutoModel")]
        return getattr(transformers, kinds[0] if kinds else "AutoModel")

    if config.model_type == "mixer_lm":
        return transformers.AutoModelForCausalLM
    for architecture in getattr(config, "architectures", None) or []:
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if getattr(config, "auto_map", None):
        raise InputError(
            f"{name} brings its own model code, which is not run unless you say so: "
            "trust_remote_code=True, or --trust-remote-code"
        )
    return transformers.AutoModel


def _companion(model: Any, source: str, shared: dict[str, Any]) -> Any:
    """Return the processor of a model that takes pictures or sound, else the tokenizer, or None."""
    from transformers import AutoProcessor, AutoTokenizer

    config = model.config
    many = any(getattr(config, f"{kind}_config", None) for kind in ("vision", "audio"))
    auto = AutoProcessor if many or model.main_input_name != "input_ids" else AutoTokenizer
    try:
        return auto.from_pretrained(source, **shared)
    except (OSError, ValueError, KeyError):
        if any((Path(source) / file).is_file() for file in _COMPANION_FILES):
            raise  # there is one, and it is broken
        # Weights alone are enough to check or time a model; whoever needs text will say so.
        return None


def _explain(where: str | Path, name: str, problem: Exception) -> str:
    """Return one sentence on why a checkpoint could not be loaded, with what to do about it."""
    if "weights_only" in str(problem) or "Weights only" in str(problem):
        return (
            f"the pickle in {where} holds more than tensors, and reading it could run any code: "
            "save the model as safetensors, where you trust it"
        )
    folder = Path(where)
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    if folder.is_dir():
        pickled = bool(pickles) and not any(folder.glob("*.safetensors"))
    else:
        pickled = _PICKLED in str(problem)
    if isinstance(problem, OSError) and pickled:
        return (
            f"the weights of {name} are pickled ({pickles[0] if pickles else '.bin'}), and reading "
            "a pickle can run code: save the model as safetensors, or add --allow-pickle "
            "(allow_pickle=True)"
        )
    if isinstance(where, Path):
        return f"The checkpoint in {where} cannot be loaded: {_first_line(problem)}"
    for entry in models():
        if where == entry.hub and isinstance(problem, OSError):
            return (
                f"The weights of {entry.name} are not installed and the hub cannot be reached; get "
                f"them with: {entry.remedy}"
            )
    if isinstance(problem, OSError):
        how = (
            "it is not in the local cache and the hub is switched off"
            if offline()
            else ("it is not on the hub, not public, or the hub cannot be reached")
        )
        return f"There is no model {name!r}: {how}.{nearest(name, _names())}"
    return f"The model {name!r} cannot be loaded: {_first_line(problem)}"


def _first_line(problem: BaseException) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return (lines[0] if lines else type(problem).__name__).rstrip(".")
