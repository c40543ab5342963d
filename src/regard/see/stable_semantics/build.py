"""Builds of StableSemantics on disk: Parquet shards, each whole or not there, with checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regard import files
from regard.errors import InputError
from regard.progress import bar
from regard.versions import versions

from .method import Recipe
from .prompts import Prompt
from .rows import features, rows

MANIFEST = "build.json"
Rewrite = Callable[[str], str]


def build(
    pipe: Any,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    model: str = "",
    rewrite: Rewrite | None = None,
    progress: bool = True,
) -> Path:
    """Draw every prompt and write the data set; returns its folder, for `datasets.load_dataset`.

    A shard that is there and has its checksum is not made again, so a build that was stopped goes
    on, and its files are those of a build in one go, byte for byte, on the same machine.

    Args:
        model: name of the pipeline, for the record; a folder of another model is refused.
        rewrite: cleaned prompt -> caption, for example a language model.

    >>> import regard
    >>> from tempfile import TemporaryDirectory
    >>> from regard.see.stable_semantics.prompts import Prompt
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> recipe = regard.Recipe(images=1, steps=1, grid=8, parser="rules")
    >>> with TemporaryDirectory() as folder:
    ...     path = build(tiny_pipeline("sd"), [Prompt("a red circle")], folder, recipe)
    ...     load(path)[0]["chunks"][0]["text"]
    'a red circle'

    Raises:
        InputError: no prompts, a folder of another build, or one that cannot be written.
        ImportError: datasets is not installed (`pip install "regard[data]"`).
    """
    recipe = recipe or Recipe()
    folder, names = prepare(prompts, out, recipe, model, rewrite is not None)
    left = [n for n in range(len(names)) if not sound(folder, names[n])]
    many = sum(len(shard(prompts, n, recipe)) for n in left)
    with bar(many, "captions", progress) as advance:
        for n in left:
            write_shard(pipe, prompts, n, folder, names[n], recipe, rewrite, advance)
    return finish(folder, names)


def shard(prompts: Sequence[Prompt], number: int, recipe: Recipe) -> list[Prompt]:
    """The prompts of one shard."""
    return list(prompts[number * recipe.captions : (number + 1) * recipe.captions])


def prepare(
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    recipe: Recipe,
    model: str,
    rewritten: bool,
) -> tuple[Path, list[str]]:
    """The folder with its manifest, and the names of the shards that it is to hold."""
    features()
    if not prompts:
        raise InputError("there is no prompt to draw: give some")
    folder = Path(out).expanduser()
    told = json.dumps([[p.text, p.source, p.licence] for p in prompts])
    key = {
        "model": model,
        "recipe": asdict(recipe),
        "rewritten": rewritten,
        "prompts": hashlib.sha256(told.encode()).hexdigest(),
    }
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"the folder {folder} cannot be made: {problem.strerror}") from None
    manifest = folder / MANIFEST
    if manifest.is_file():
        if read_manifest(folder).get("key") != key:
            raise InputError(
                f"{folder} holds a build of other prompts, settings or another model: name another "
                "folder, or remove it"
            )
    elif any((folder / "data").iterdir()):
        raise InputError(f"{folder} holds other data: name another folder")
    else:
        record = {"key": key, "versions": versions()}
        files.write_text(manifest, json.dumps(record, indent=1, sort_keys=True) + "\n")
    count = -(-len(prompts) // recipe.captions)
    return folder, [f"train-{n:05d}-of-{count:05d}" for n in range(count)]


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a build was made of.

    Raises:
        InputError: no build there, or a damaged one.
    """
    path = Path(folder).expanduser() / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(manifest, dict)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no build: make one with regard build") from None
    except (ValueError, AssertionError):
        raise InputError(f"{path} is damaged: remove the folder and build again") from None
    return manifest


def sound(folder: Path, name: str) -> bool:
    """Whether a shard is there and is what was written."""
    data, mark = folder / "data" / f"{name}.parquet", folder / "data" / f"{name}.sha256"
    if not (data.is_file() and mark.is_file()):
        return False
    return hashlib.sha256(data.read_bytes()).hexdigest() == mark.read_text().strip()


def write_shard(
    pipe: Any,
    prompts: Sequence[Prompt],
    number: int,
    folder: Path,
    name: str,
    recipe: Recipe,
    rewrite: Rewrite | None = None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Make one shard: beside its place first, then renamed; its checksum after it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    of_shard = rows(pipe, shard(prompts, number, recipe), recipe, rewrite, advance)
    table = Dataset.from_list(of_shard, features=features()).data.table
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    files.write_bytes(folder / "data" / f"{name}.parquet", data)
    files.write_text(folder / "data" / f"{name}.sha256", hashlib.sha256(data).hexdigest() + "\n")


def finish(folder: Path, names: Sequence[str]) -> Path:
    """Check every shard, and write the data set's card."""
    wrong = [name for name in names if not sound(folder, name)]
    if wrong:
        raise InputError(f"shard {wrong[0]} is missing or damaged: run the build again")
    manifest = read_manifest(folder)
    key, recipe = manifest["key"], manifest["key"]["recipe"]
    kinds = ", ".join(f"{n} {v}" for n, v in manifest["versions"].items())
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files: data/*.parquet",
        "---",
        "# Images with an attention map for each noun chunk",
        "",
        f"Made by `regard build stable-semantics` with the pipeline `{key['model'] or 'unnamed'}`: "
        f"{recipe['images']} images a caption. Versions: {kinds}.",
        "",
        "Maps are the attention of the image on the words of a chunk, summed over steps, resized "
        f"({recipe['resize']}) to {recipe['grid']} and clamped, then averaged over layers and "
        "heads; they are raw: not scaled to their own range. A map is attribution, not "
        "segmentation. A chunk that the text encoder cut off has no map.",
        "",
        "Seeds give the same image on the same device and versions only. Every row names the "
        "source and licence of its prompt; rows without a licence are not to be published.",
        "",
    ]
    files.write_text(folder / "README.md", "\n".join(lines))
    return folder


def load(folder: str | os.PathLike[str]) -> Any:
    """The rows of a build as a `datasets.Dataset`, read from its shards in order.

    Raises:
        InputError: no build there, or not a whole one.
        ImportError: datasets is not installed.
    """
    features()
    from datasets import Dataset, concatenate_datasets

    path = Path(folder).expanduser()
    read_manifest(path)
    shards = sorted((path / "data").glob("train-*-of-*.parquet"))
    if not shards or len(shards) != int(shards[0].stem.rpartition("-")[2]):
        raise InputError(f"{folder} holds {len(shards)} shards, not all: run the build again")
    import pyarrow.parquet as pq

    return concatenate_datasets([Dataset(pq.read_table(p), fingerprint=p.stem) for p in shards])


def need_ray() -> Any:
    """The module ray.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise ImportError(
            '--ray needs Ray: pip install "regard[ray]", or leave --ray out'
        ) from None
    return ray


def build_on_ray(
    name: str,
    prompts: Sequence[Prompt],
    out: str | os.PathLike[str],
    recipe: Recipe,
    address: str,
    load_pipeline: Callable[[str], Any],
) -> Path:
    """The same build with shards spread over a Ray cluster; the folder is one that all can write.

    Raises:
        ImportError: Ray is not installed (`pip install "regard[ray]"`).
    """
    ray = need_ray()
    folder, names = prepare(prompts, out, recipe, name, False)
    left = [n for n in range(len(names)) if not sound(folder, names[n])]

    class Worker:
        def __init__(self) -> None:
            self.pipe = load_pipeline(name)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            for n in batch["item"]:
                write_shard(self.pipe, prompts, int(n), folder, names[int(n)], recipe)
            return batch

    ray.init(address=address, ignore_reinit_error=True)
    workers = max(1, int(ray.cluster_resources().get("GPU", 0)) or 1)
    gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    if left:
        ray.data.from_items(left).map_batches(
            Worker, batch_size=1, concurrency=workers, num_gpus=gpus
        ).materialize()
    return finish(folder, names)
