"""Whisper as CTranslate2 keeps it, turned once into a checkpoint of transformers.

The file is a plain list of named arrays (little-endian, no pickle), followed by a list of names
that stand for another one. It is read with every length checked against what is there, so a file
that is cut short or made up gives one error and no surprise.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from regard.errors import InputError

VERSION = 6
SPEC = "WhisperSpec"
HEAD_DIM = 64  # in every size of Whisper
FRAMES = 1500  # encoder positions, 30 seconds
ENGLISH_ONLY = 51864  # its vocabulary lacks one special token of the multilingual one

_DTYPES: dict[int, Any] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}
_GELU = 3  # CTranslate2's number of the exact GELU


class _Reader:
    """The bytes of a file, taken from the front; whoever asks for more than is left is refused."""

    def __init__(self, data: bytes | memoryview, what: str) -> None:
        self.data, self.at, self.what = memoryview(data), 0, what

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise self.broken(f"it ends at byte {len(self.data)}, in the middle of its data")
        piece = self.data[self.at : self.at + count]
        self.at += count
        return piece

    def number(self, code: str) -> int:
        return int(struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0])

    def string(self) -> str:
        raw = bytes(self.take(self.number("H")))
        try:
            return raw.removesuffix(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            raise self.broken(f"the name before byte {self.at} is no text") from None

    def broken(self, why: str) -> InputError:
        return InputError(
            f"{self.what} is no CTranslate2 file of Whisper ({why}); reinstall the package that "
            "brought it"
        )


def read(data: bytes | memoryview, what: str = "model.bin") -> dict[str, np.ndarray]:
    """Return the arrays of a CTranslate2 file by name, aliases included; nothing is copied.

    The float16 weights stay float16. Raises InputError for a file that is cut short, goes on after
    its end, is of another format version or another model, or names an array twice.
    """
    reader = _Reader(data, what)
    version = reader.number("I")
    if version != VERSION:
        raise reader.broken(f"format version {version}, expected {VERSION}")
    spec = reader.string()
    if spec != SPEC:
        raise reader.broken(f"it holds {spec[:40]!r}")
    reader.number("I")  # the revision of the layout within that format
    arrays: dict[str, np.ndarray] = {}
    for _ in range(reader.number("I")):
        name = reader.string()
        shape = tuple(reader.number("I") for _ in range(reader.number("B")))
        code = reader.number("B")
        size = reader.number("I")
        if code not in _DTYPES:
            raise reader.broken(f"{name[:80]!r} has the unknown number type {code}")
        dtype = _DTYPES[code]
        if math.prod(shape) * dtype.itemsize != size:
            raise reader.broken(f"{name[:80]!r} is said to be {shape} in {size} bytes")
        if name in arrays:
            raise reader.broken(f"{name[:80]!r} comes twice")
        arrays[name] = np.frombuffer(reader.take(size), dtype).reshape(shape)
    for _ in range(reader.number("I")):
        alias, name = reader.string(), reader.string()
        if name not in arrays or alias in arrays:
            raise reader.broken(f"{alias[:80]!r} stands for {name[:80]!r}, which cannot be")
        arrays[alias] = arrays[name]
    if reader.at != len(reader.data):
        raise reader.broken(f"{len(reader.data) - reader.at} bytes follow its end")
    return arrays


def state(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the weights under the names of `WhisperForConditionalGeneration`, as torch tensors.

    CTranslate2 stacks the projections of queries, keys and values (of keys and values in cross
    attention); the bias of the keys, which Whisper has not, is zero there and is dropped.
    """
    import torch

    made: dict[str, Any] = {}
    used: set[str] = set()

    def tensor(name: str) -> Any:
        used.add(name)
        if name not in arrays:
            raise InputError(f"The CTranslate2 file lacks {name!r}; reinstall its package.")
        return torch.from_numpy(np.array(arrays[name], dtype=np.float32))

    def pair(name: str, source: str, norm: bool = False) -> None:
        made[f"{name}.weight"] = tensor(f"{source}/{'gamma' if norm else 'weight'}")
        made[f"{name}.bias"] = tensor(f"{source}/{'beta' if norm else 'bias'}")

    def projections(name: str, source: str, kinds: str) -> None:
        weights = tensor(f"{source}/weight").chunk(len(kinds))
        biases = tensor(f"{source}/bias").chunk(len(kinds))
        for kind, weight, bias in zip(kinds, weights, biases, strict=True):
            made[f"{name}.{kind}_proj.weight"] = weight.contiguous()
            if kind != "k":
                made[f"{name}.{kind}_proj.bias"] = bias.contiguous()
            elif bool(bias.any()):
                raise InputError(f"{source} has a bias on its keys, which Whisper has not.")

    for stack in ("encoder", "decoder"):
        model = f"model.{stack}"
        for i in range(_layers(arrays, stack)):
            ours, theirs = f"{model}.layers.{i}", f"{stack}/layer_{i}"
            projections(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", "qkv")
            pair(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            pair(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm", norm=True)
            if stack == "decoder":
                projections(f"{ours}.encoder_attn", f"{theirs}/attention/linear_0", "q")
                projections(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", "kv")
                pair(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                pair(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm", norm=True)
            pair(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            pair(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            pair(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm", norm=True)
        pair(f"{model}.layer_norm", f"{stack}/layer_norm", norm=True)
        positions = tensor(f"{stack}/position_encodings/encodings")
        made[f"{model}.embed_positions.weight"] = positions
    pair("model.encoder.conv1", "encoder/conv1")
    pair("model.encoder.conv2", "encoder/conv2")
    made["model.decoder.embed_tokens.weight"] = tensor("decoder/embeddings/weight")
    made["proj_out.weight"] = tensor("decoder/projection/weight")
    over = [n for n in arrays if n not in used and arrays[n].ndim > 0]
    if over:
        raise InputError(f"The CTranslate2 file holds {over[0]!r}, which no Whisper has.")
    return made


def _layers(arrays: dict[str, np.ndarray], stack: str) -> int:
    """Return how many layers a stack has: the numbers are counted, not believed."""
    numbers = {n.split("/")[1] for n in arrays if n.startswith(f"{stack}/layer_")} - {"layer_norm"}
    wanted = {f"layer_{i}" for i in range(len(numbers))}
    if not numbers or numbers != wanted:
        raise InputError(f"The layers of the {stack} in the CTranslate2 file have gaps.")
    return len(numbers)


def config(arrays: dict[str, np.ndarray], tokens: dict[str, int], facts: dict[str, Any]) -> Any:
    """Return the `WhisperConfig` of the arrays.

    `tokens` maps the special tokens to their numbers; `facts` is the package's config.json.
    """
    from transformers import WhisperConfig

    vocabulary, width = arrays["decoder/embeddings/weight"].shape
    mels = arrays["encoder/conv1/weight"].shape[1]
    heads = width // HEAD_DIM
    for stack in ("encoder", "decoder"):
        said = int(arrays[f"{stack}/num_heads"])
        if said != heads or width % HEAD_DIM:
            raise InputError(f"The {stack} says {said} heads at width {width}: no Whisper has that")
        act = int(arrays.get(f"{stack}/activation", np.array(_GELU)))
        if act != _GELU or int(arrays.get(f"{stack}/pre_norm", np.array(1))) != 1:
            raise InputError("The CTranslate2 file is of a Whisper built in another way.")
    end, start = tokens["<|endoftext|>"], tokens["<|startoftranscript|>"]
    return WhisperConfig(
        vocab_size=vocabulary,
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=_layers(arrays, "encoder"),
        decoder_layers=_layers(arrays, "decoder"),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=arrays["encoder/layer_0/ffn/linear_0/weight"].shape[0],
        decoder_ffn_dim=arrays["decoder/layer_0/ffn/linear_0/weight"].shape[0],
        max_source_positions=arrays["encoder/position_encodings/encodings"].shape[0],
        max_target_positions=arrays["decoder/position_encodings/encodings"].shape[0],
        # The English-only sizes begin with the start token, the others end where they begin.
        bos_token_id=start if vocabulary == ENGLISH_ONLY else end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,  # they belong to the generation config
        begin_suppress_tokens=list(facts["suppress_ids_begin"]),
    )


def generation(made: Any, tokens: dict[str, int], facts: dict[str, Any]) -> Any:
    """Return the `GenerationConfig` that goes with the config: special tokens, what never comes,
    and the heads that follow the sound (`alignment_heads`, as [layer, head])."""
    from transformers import GenerationConfig
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    many = made.vocab_size != ENGLISH_ONLY
    extra: dict[str, Any] = {}
    if many:
        spoken = {f"<|{code}|>" for code in LANGUAGES}
        extra["lang_to_id"] = {t: i for t, i in tokens.items() if t in spoken}
        extra["task_to_id"] = {t: tokens[f"<|{t}|>"] for t in ("transcribe", "translate")}
        # Without a task the prompt would lack its token, and the model then babbles.
        extra["task"] = "transcribe"
    return GenerationConfig(
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
        decoder_start_token_id=made.decoder_start_token_id,
        max_length=made.max_target_positions,
        suppress_tokens=list(facts["suppress_ids"]),
        begin_suppress_tokens=list(facts["suppress_ids_begin"]),
        alignment_heads=[list(pair) for pair in facts["alignment_heads"]],
        is_multilingual=many,
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        prev_sot_token_id=tokens["<|startofprev|>"],
        max_initial_timestamp_index=50,
        return_timestamps=False,
        **extra,
    )


def build(arrays: dict[str, np.ndarray], tokens: dict[str, int], facts: dict[str, Any]) -> Any:
    """Return a `WhisperForConditionalGeneration` of the arrays, in float32 and eval mode."""
    from transformers import WhisperForConditionalGeneration

    weights = state(arrays)
    made = config(arrays, tokens, facts)
    model = WhisperForConditionalGeneration(made)
    model.load_state_dict(weights, strict=True)
    model.tie_weights()
    model.generation_config = generation(made, tokens, facts)
    return model.eval()


def convert(data: bytes | memoryview, source: Path, folder: Path) -> None:
    """Write a checkpoint folder: float16 safetensors, configs, tokenizer and feature extractor.

    `data` is the CTranslate2 file, `source` the folder with its config.json and tokenizer.json.
    """
    import shutil

    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    facts = json.loads((source / "config.json").read_text(encoding="utf-8"))
    vocabulary = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {entry["content"]: int(entry["id"]) for entry in vocabulary["added_tokens"]}
    arrays = read(data)
    model = build(arrays, tokens, facts)
    end = "<|endoftext|>"
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    special = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end}
    named = special | {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024}
    (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=model.config.num_mel_bins)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    model.half().save_pretrained(folder)
