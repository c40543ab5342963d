"""The smallest random model of a class of transformers, and inputs that it takes.

A configuration is shrunk by rules on the names of its fields; inputs are found by trial: the first
that the model runs, and that its output depends on.
"""

from __future__ import annotations

import inspect
import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.zoo.tiny import _spread

LARGEST = 60_000_000  # parameters of a model that is still built
ROWS, TOKENS, VOCAB, SIDE, BINS = 2, 12, 160, 32, 16

# -- configurations --------------------------------------------------------------------------------
# The first pattern that is found in the name of a whole-number field says the most it may be.
SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size", VOCAB),
    (r"feat_extract_layers", 99),  # convolutions, as many as other fields list
    (r"(moe|expert).*(size|dim)$", 32),
    (r"intermediate|ffn|d_ff|n_inner|mlp_(dim|hidden)|feedforward|^dff$|ff_dim", 96),
    (r"(key_value|kv)_heads|n_head_kv|kv_n_heads|^kv_heads", 2),
    (r"rope_head_dim|nope_head_dim|^(linear|mamba)_.*head_dim|rotary_dim", 8),
    (r"head_dim|^d_kv$|d_head|headdim|kv_channels|v_head", 16),
    (r"^mamba_(n_heads|num_heads)", 8),
    (r"index_n_heads|linear_num_key_heads", 2),
    (r"heads?$|heads?_vision", 4),
    (r"(hidden|layers?|blocks?|depth)s?$|num_hidden_layers|layers_vision|^n_layers?|num_layers", 2),
    (r"index_topk", 6),
    (r"(per_tok|topk|top_k|_k)(en)?$", 2),
    (r"experts$", 4),
    (r"n_group$|topk_group|shared_experts|dense_replace|dense_layers", 1),
    (r"lora_rank", 16),
    (r"positions?(_embeddings)?$|^n_ctx|max_seq|max_length|seq_length", 512),
    (r"image_size|img_size|crop_size|resolution", SIDE),
    (r"patch_size", 8),
    (r"mel_bins|n_mels|feat_per_channel", BINS),
    (r"window|local_attention|attention_chunk", 8),
    (r"state_size|d_state|chunk_size|time_step_rank|dt_rank", 8),
    (r"num_(query_tokens|queries|latents)|n_latents", 6),
    (r"conv_pos_embeddings", 16),
    (r"conv_pos_embedding_groups", 2),
    (r"num_frames", 4),
    (r"mm_tokens_per_image|num_image_tokens", 4),
    (r"nextn_predict|num_mtp|kv_shared", 0),
    (r"(hidden|embed|proj|model|n_embd|embd|lru|width|attention|out|codevector|qkv).*|^dim$", 64),
)
MARKS = {"pad": 0, "bos": 1, "eos": 2, "cls": 1, "sep": 2, "decoder_start": 1, "mask": 4, "unk": 3}
MARKS |= {"image": 120, "video": 121, "audio": 122}
# what must be a number although its default is None
UNSET = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_routed_experts": 4}
UNSET |= {"n_shared_experts": 1, "head_dim": 16, "num_key_value_heads": 4}
# fields that hang together with others
TOGETHER: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
}


def small(config: Any, rotary: list[int] | None = None) -> Any:
    """A configuration of the same class, as small as the rules make it.

    Args:
        rotary: how many rotary frequencies go to time, height and width.
    """
    given = {name: vars(config).get(name, value) for name, value in config.to_dict().items()}
    layers = next((given[n] for n in given if re.fullmatch(r"(num_hidden|n|num)_layers?", n)), None)
    kinds = {
        n: x
        for n, x in given.items()
        if isinstance(x, list | tuple) and layers and len(x) == layers
    }
    picked = _each_kind(list(kinds.values()), layers) if layers and kinds else []
    nested = any(isinstance(x, list | tuple) and "depths" in n for n, x in given.items())
    fields: dict[str, Any] = {}
    for name, value in given.items():
        if name in kinds:
            fields[name] = [value[n] for n in picked]
        elif hasattr(value, "to_dict"):
            fields[name] = small(value, rotary)
        elif (mark := re.fullmatch(r"(\w+)_token_(id|index)", name)) and name in config.to_dict():
            if isinstance(value, int | list) or mark[1] in ("pad", "eos", "bos"):
                other = 130 + zlib.crc32(mark[1].encode()) % 29
                fields[name] = MARKS.get(mark[1], other)
        elif isinstance(value, float) and "drop" in name:
            fields[name] = 0.0
        elif name.endswith("grid_pinpoints"):
            fields[name] = [[SIDE, SIDE]]
        elif value is None and (most := UNSET.get(name)):
            fields[name] = most
        elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
            most = next((size for pattern, size in SIZES if re.search(pattern, name)), value)
            if nested:  # widths of stages hang together
                most = {SIDE: 4 * SIDE, 8: 4}.get(most, value) if "patch" not in name else value
            if name == "window_size" and "spatial_merge_size" in given:  # in pixels
                most = SIDE
            if name == "head_dim" and value == given.get("qk_rope_head_dim"):
                most = 8
            if re.search(r"(key_value|kv)_heads", name) and value == given.get(
                "num_attention_heads"
            ):
                most = 4
            if picked and re.fullmatch(r"(num_hidden|n|num)_layers?", name):
                most = len(picked)
            fields[name] = min(value, most)
    fields |= TOGETHER.get(type(config).model_type, {})
    if rotary and "rope_parameters" in given:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": rotary}
        fields["rope_parameters"] = rope
    for _ in range(6):
        try:
            return type(config)(**fields)
        except Exception as problem:  # leave as they are the fields that it names
            named = [n for n in fields if re.search(rf"\b{n}\b", str(problem))]
            if not named:
                raise
            fields = {n: x for n, x in fields.items() if n not in named}
    return config


def _each_kind(lists: list[Any], layers: int) -> list[int]:
    """Layers that show every kind once, at least two."""
    first: dict[str, int] = {}
    for n in range(layers):
        first.setdefault(str([x[n] for x in lists]), n)
    picked = list(first.values())[:6]
    return sorted(picked if len(picked) > 1 else [*picked, picked[0] + 1])


def build(cls: Any, config: Any, spread: bool = True) -> Any:
    """The model with random weights large enough that attention is far from uniform."""
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise InputError(f"the rules leave {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    if spread:
        _spread(model)
    return model


# -- inputs ----------------------------------------------------------------------------------------
Inputs = dict[str, Any]


def candidates(model: Any, kind: str) -> Iterator[Inputs]:
    """Inputs that the signature of the model allows, those with an image or sound first."""
    takes = inspect.signature(model.forward).parameters
    sent = [*_pictures(model, takes), *_sounds(model, takes)]
    ids = {n: _ids(TOKENS - 3 * (n != "input_ids")) for n in ("input_ids", "decoder_input_ids")}
    answer = {n: x for n, x in ids.items() if n in takes and n != "input_ids"}
    if not getattr(model.config, "is_encoder_decoder", False) and "input_ids" in takes:
        answer = {}
    if "input_ids" not in takes:
        yield from ({**x, **answer} for x in sent)
        return
    words = {"input_ids": ids["input_ids"]}
    if "qformer_input_ids" in takes:
        words["qformer_input_ids"] = _ids(5)
    codes = _number(model.config, 1, "num_codebooks")
    if codes > 1 and not answer:  # a row for every codebook
        yield {"input_ids": _ids(TOKENS).repeat(codes, 1)}
    for name in ("image", "audio", "video"):
        if hasattr(model.config, f"{name}_token_id") or hasattr(
            model.config, f"{name}_token_index"
        ):
            for x, count in itertools.product(sent, (4, 16, 1, 6)):
                yield _marked({**words, **answer, **x}, MARKS[name], count, takes)
    yield from ({**words, **answer, **x} for x in sent)
    if kind != "image and text" or not sent:
        if "bbox" in takes:
            words["bbox"] = torch.randint(0, 50, (ROWS, TOKENS, 4)).sort(-1).values
        yield {**words, **answer}


def _ids(count: int) -> Tensor:
    return torch.randint(5, 100, (ROWS, count))


def _marked(inputs: Inputs, mark: int, count: int, takes: Any) -> Inputs:
    """A text that holds so many places for an image or a sound."""
    ids = torch.cat([_ids(3), torch.full((ROWS, count), mark), inputs["input_ids"][:, 3:]], 1)
    kinds = {n: (ids == mark).long() for n in ("mm_token_type_ids", "token_type_ids") if n in takes}
    return {**inputs, "input_ids": ids, **kinds}


def _parts(config: Any) -> list[Any]:
    parts = [config, *(x for x in vars(config).values() if hasattr(x, "to_dict"))]
    return parts + [y for x in parts[1:] for y in vars(x).values() if hasattr(y, "to_dict")]


def _number(config: Any, default: int, *names: str) -> int:
    """What the configuration or one of its parts says of a size."""
    for part, name in itertools.product(_parts(config)[::-1], names):
        value = vars(part).get(name)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, int) and value > 0:
            return value
    return default


def _pictures(model: Any, takes: Any) -> list[Inputs]:
    config, noise = model.config, torch.randn
    patch = _number(config, 8, "patch_size")
    side = _number(config, SIDE, "image_size", "img_size", "input_size")
    colours = _number(config, 3, "num_channels", "in_channels", "in_chans")
    frames = _number(config, 4, "num_frames", "frames_per_clip")
    deep = _number(config, 1, "temporal_patch_size")
    sent: list[Inputs] = []
    if grid := next((n for n in ("image_grid_thw", "image_grid_hws") if n in takes), None):
        width = 2 * _number(config, 2, "spatial_merge_size", "merge_size")
        shape = torch.tensor([[1, width, width][3 - (3 if "thw" in grid else 2) :]] * ROWS)
        for size in ((colours * deep * patch**2,), (colours, patch, patch)):
            sent.append({"pixel_values": noise(ROWS * width**2, *size), grid: shape})
    if "spatial_shapes" in takes:
        patches = noise(ROWS, 16, colours * patch**2)
        shape = torch.tensor([[4, 4]] * ROWS)
        seen = torch.ones(ROWS, 16, dtype=torch.long)
        sent.append(
            {"pixel_values": patches, "spatial_shapes": shape, "pixel_attention_mask": seen}
        )
    sizes: list[Inputs] = [{}]
    if "image_sizes" in takes:
        sizes.append({"image_sizes": torch.tensor([[side, side]] * ROWS)})
    shapes = [(colours, side, side), (1, colours, side, side), (frames, colours, side, side)]
    shapes += [(2, colours, side, side), (colours, frames, side, side), (colours, 64, 64)]
    shapes += [(colours, 224, 224), (1, side, side)]
    for name in ("pixel_values", "pixel_values_videos"):
        if name in takes and (name == "pixel_values" or "pixel_values" not in takes):
            sent += [{name: noise(ROWS, *shape), **x} for shape in shapes for x in sizes]
    return sent


def _sounds(model: Any, takes: Any) -> list[Inputs]:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels")
    bins = _number(model.config, BINS, *names, "mel_bins", "input_dim")
    frames = 2 * _number(model.config, 32, "max_source_positions")
    sent: list[Inputs] = []
    for name, length in itertools.product(("input_features", "input_values"), (64, frames, 200)):
        if name in takes:
            masks = [n for n in takes if re.fullmatch(r".*features?_(attention_)?mask", n)]
            seen = {n: torch.ones(ROWS, length, dtype=torch.long) for n in masks}
            sent += [
                {name: torch.randn(ROWS, *s), **seen} for s in ((bins, length), (length, bins))
            ]
    if "input_values" in takes:
        sent += [{"input_values": torch.randn(ROWS, *s)} for s in ((2000,), (1, 4000), (16000,))]
    return sent


def settle(model: Any, kind: str) -> Inputs:
    """The first inputs that the model runs and that change what it says.

    Raises:
        InputError: there are none; the words are those of the first error.
    """
    takes = inspect.signature(model.forward).parameters
    problems: list[str] = []
    for first in candidates(model, kind):
        inputs: Inputs | None = first
        while inputs is not None:
            try:
                _tell(model, inputs)
                return inputs
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")
                inputs = _mended(inputs, problems[-1], takes) if inputs is first else None
    unsent = [p for p in problems if "change nothing" in p]
    raise InputError([*unsent, *problems, "its forward takes nothing that is known here"][0])


def _tell(model: Any, inputs: Inputs) -> None:
    """Run the model, and again with other pictures or sounds, which must change its output."""
    plain = output(run(model, inputs))
    for name in (n for n, x in inputs.items() if x.is_floating_point()):
        changed = {**inputs, name: inputs[name].flip(0) * 2 + 1}
        if torch.equal(output(run(model, changed)), plain):
            raise InputError(f"its {name} change nothing")


def _mended(inputs: Inputs, problem: str, takes: Any) -> Inputs | None:
    """The same with as many places for an image or a sound as the error asks for."""
    said = re.search(r"tokens\D{0,12}(\d+)\D+features\D{0,12}(\d+)", problem)
    ids = inputs.get("input_ids")
    if said is None or ids is None:
        return None
    marks = [n for n in map(int, ids[0]) if n in (MARKS["image"], MARKS["audio"], MARKS["video"])]
    if not marks:
        return None
    words = {**inputs, "input_ids": ids[:, (ids != marks[0]).all(0)]}
    return _marked(words, marks[0], max(1, int(said[2]) // ROWS), takes)


def run(model: Any, inputs: Inputs) -> Any:
    """One forward, on copies, since some models write into what they are given."""
    with torch.no_grad():
        torch.manual_seed(0)  # some draw noise
        return model(**{n: x.clone() for n, x in inputs.items()})


def output(out: Any) -> Tensor:
    """What a model says: its logits, or the first tensor of numbers."""
    logits = getattr(out, "logits", None)
    return logits if isinstance(logits, Tensor) else next(_tensors(out))


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.is_floating_point():
            yield out
    elif isinstance(out, dict | list | tuple):
        for value in out.values() if isinstance(out, dict) else out:
            yield from _tensors(value)
