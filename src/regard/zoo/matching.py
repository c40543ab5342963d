"""Whether a checkpoint holds the weights of the model that was made for it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from regard.errors import InputError

NAMED = 4  # tensors that a message names


def check_loaded(name: str, info: Mapping[str, Any], *, head_may_lack: bool = False) -> None:
    """Refuse a model some of whose weights did not come from its checkpoint.

    Args:
        info: what `from_pretrained(output_loading_info=True)` says; the tensors that a family may
            lack or have besides are left out of it already.
        head_may_lack: the trunk was taken out of a model with a head, whose tensors are over.

    >>> check_loaded("x", {"missing_keys": ["a.weight"], "unexpected_keys": []})
    Traceback (most recent call last):
    ...
    regard.errors.InputError: the checkpoint x does not fit its config: it lacks a.weight, which \
would be random numbers; save the model again, or name the checkpoint that belongs to this config

    Raises:
        InputError: tensors that are missing, of another shape, or of no use.
    """
    missing = sorted(info.get("missing_keys", ()))
    other = [] if head_may_lack else sorted(info.get("unexpected_keys", ()))
    pairs = info.get("mismatched_keys", ())
    shapes = sorted(str(pair[0] if isinstance(pair, (tuple, list)) else pair) for pair in pairs)
    said = [
        f"it lacks {_some(missing)}, which would be random numbers" if missing else "",
        f"{_some(shapes)} has another shape" if shapes else "",
        f"nothing takes {_some(other)}" if other else "",
    ]
    if any(said):
        raise InputError(
            f"the checkpoint {name} does not fit its config: {'; '.join(filter(None, said))}; save "
            "the model again, or name the checkpoint that belongs to this config"
        )


def check_parts(pipe: Any, folder: Path) -> None:
    """The same for the parts of a diffusion pipeline in a folder: every weight must be in a file.

    Raises:
        InputError: a part whose files lack some of its weights.
    """
    import torch

    for name, part in pipe.components.items():
        place = folder / name
        if not isinstance(part, torch.nn.Module) or not place.is_dir():
            continue
        stored = _stored(place)
        fixed = getattr(part, "_fix_state_dict_keys_on_load", None)
        if stored and fixed is not None:
            names = dict.fromkeys(stored)
            fixed(names)
            stored = set(names)
        held = _held(part)
        missing = sorted(k for k in held if k not in stored) if stored else []
        if missing and not _renamed(missing, stored):
            check_loaded(f"{folder}/{name}", {"missing_keys": missing})


def _held(part: Any) -> Iterable[str]:
    """Names of the weights, tied ones once."""
    buffers = {n for n, _ in part.named_buffers()}
    return [n for n, _ in part.named_parameters(remove_duplicate=True) if n not in buffers]


def _renamed(missing: Collection[str], stored: Collection[str]) -> bool:
    """Whether the library stores the same tensors under other prefixes: those that it adds or drops
    at the front are no loss.
    """
    ends = {name.split(".", 1)[-1] for name in stored} | set(stored)

    def there(name: str) -> bool:
        return name.split(".", 1)[-1] in ends or any(s.endswith(name) for s in stored)

    return all(map(there, missing))


def _stored(place: Path) -> set[str]:
    """Names of the tensors in the safetensors files of a folder."""
    from safetensors import safe_open

    names: set[str] = set()
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as opened:
            names |= set(opened.keys())
    return names


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
