"""Where text, image, references and frames lie among the tokens of a denoiser, by family.

One table. A denoiser that is not in it is watched all the same: its calls, outputs and facts are
exact, but nobody knows which of its tokens are words or pixels, and `unknown` says so.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Size = tuple[int, ...]  # height and width, or frames, height and width


@dataclass(frozen=True)
class Family:
    """The tokens of one class of denoisers.

    Attributes:
        sample: axes of its input (batch, channels, frames, height, width); "" where the tokens
            come packed and their size is told beside them (`img_ids`, `img_shapes`, numbers).
        joint: modules in which text and image attend to each other in one call.
        order: "text image" or "image text", in joint attention; references follow the image.
        text: the inputs whose tokens are the text keys, one after the other.
        encoders: the pipeline's tokenizers behind them: those in one group share their columns,
            groups follow one another.
        lead: the attribute that holds learned tokens before the text.
        multiple: image and text are each padded to a multiple of so many tokens.
        packed: rows of the batch are packed without the padding of their text.
        left: the pipeline pads the text in front.
    """

    sample: str = ""
    joint: str = "(?!)"
    order: str = "text image"
    text: tuple[str, ...] = ("encoder_hidden_states",)
    encoders: tuple[tuple[str, ...], ...] = (("tokenizer", "tokenizer_2"),)
    lead: str = ""
    multiple: int = 1
    packed: bool = False
    left: bool = False


_ONE = (("tokenizer",),)
_CHW, _CFHW = "b c h w", "b c f h w"
_PACKED = Family(joint=".", encoders=_ONE)
_WAN = Family(_CFHW, encoders=_ONE)
_HUNYUAN = Family(_CFHW, r"^(single_)?transformer_blocks", "image text", encoders=_ONE)

FAMILIES: dict[str, Family] = {
    # UNets: cross-attention
    "UNet2DConditionModel": Family(_CHW),
    "UNet2DModel": Family(_CHW),
    "Kandinsky3UNet": Family(_CHW),
    "UNet3DConditionModel": Family(_CFHW),
    "UNetMotionModel": Family(_CFHW),
    "I2VGenXLUNet": Family(_CFHW),
    "UNetSpatioTemporalConditionModel": Family("b f c h w"),
    # transformers with cross-attention
    "DiTTransformer2DModel": Family(_CHW),
    "PixArtTransformer2DModel": Family(_CHW),
    "SanaTransformer2DModel": Family(_CHW),
    "HunyuanDiT2DModel": Family(
        _CHW,
        text=("encoder_hidden_states", "encoder_hidden_states_t5"),
        encoders=(("tokenizer",), ("tokenizer_2",)),
    ),
    "LatteTransformer3DModel": _WAN,
    "AllegroTransformer3DModel": _WAN,
    "CosmosTransformer3DModel": _WAN,
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "LTXVideoTransformer3DModel": Family(encoders=_ONE),
    "Kandinsky5Transformer3DModel": Family("b f h w c", encoders=_ONE),
    # transformers with joint attention
    "SD3Transformer2DModel": Family(
        _CHW,
        r"attn$",
        "image text",
        encoders=(("tokenizer", "tokenizer_2"), ("tokenizer_3",)),
    ),
    "AuraFlowTransformer2DModel": Family(_CHW, ".", encoders=_ONE, lead="register_tokens"),
    "CogView3PlusTransformer2DModel": Family(_CHW, ".", encoders=_ONE),
    "CogView4Transformer2DModel": Family(_CHW, ".", encoders=_ONE, left=True),
    "Lumina2Transformer2DModel": Family(_CHW, r"^layers", encoders=_ONE, packed=True),
    "HiDreamImageTransformer2DModel": Family(
        _CHW,
        ".",
        "image text",
        text=(
            "encoder_hidden_states_t5",
            "encoder_hidden_states_llama3",
            "encoder_hidden_states_llama3",
        ),
        encoders=(("tokenizer_3",), ("tokenizer_4",), ("tokenizer_4",)),
    ),
    "ZImageTransformer2DModel": Family(
        "c f h w", r"^layers", "image text", ("cap_feats",), _ONE, multiple=32
    ),
    "HunyuanImageTransformer2DModel": Family(
        _CHW, r"^(single_)?transformer_blocks", "image text", encoders=_ONE
    ),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "CogVideoXTransformer3DModel": Family("b f c h w", ".", encoders=_ONE),
    "MochiTransformer3DModel": Family(_CFHW, r"^transformer_blocks", "image text", encoders=_ONE),
    "FluxTransformer2DModel": Family(joint=".", encoders=(("tokenizer_2",),)),
    "Flux2Transformer2DModel": _PACKED,
    "ChromaTransformer2DModel": _PACKED,
    "BriaTransformer2DModel": _PACKED,
    "QwenImageTransformer2DModel": _PACKED,
    "OvisImageTransformer2DModel": _PACKED,
    "LongCatImageTransformer2DModel": _PACKED,
}

# attention over text alone, and over the frames of one place
_TEXT = re.compile(r"context_refiner|context_embedder|text_transformer_blocks|time_embed")
_TIME = re.compile(r"temporal|motion_modules|temp_attentions|temp_convs|transformer_in")


def family(denoiser: Any) -> Family | None:
    """The family of a denoiser, through its base classes too; None for one we do not know."""
    return next(
        (FAMILIES[c.__name__] for c in type(denoiser).__mro__ if c.__name__ in FAMILIES), None
    )


def kind_of(denoiser: Any, name: str, module: Any) -> tuple[str, str]:
    """Kind of an attention module (`Site.kind`), and what else sets it apart from its stack: "",
    "text" for attention over text alone, "temporal" for attention over frames.
    """
    known = family(denoiser)
    over = "text" if _TEXT.search(name) else "temporal" if _TIME.search(name) else ""
    if known is not None and re.search(known.joint, name):
        return "joint", over
    cross = getattr(module, "is_cross_attention", None)
    if cross is None:
        cross = "cross" in name or name.endswith("attn2") or name.startswith("add_time_condition")
    added = getattr(module, "added_kv_proj_dim", None) is not None
    if not cross and added and known is None:
        return "joint", over
    return ("cross" if cross else "self"), over


@dataclass(frozen=True)
class Layout:
    """The tokens of one forward.

    Attributes:
        size: frames (of a video), height and width of the image tokens; None where unknown.
        batch: rows of the batch.
        text: how many text tokens each part of the text has, in order.
        lead: learned tokens before the text.
        family: the row of the table; None for a denoiser that is not in it.
        unknown: why words cannot be found among the keys; "" where they can.
    """

    size: Size | None
    batch: int
    text: tuple[int, ...]
    lead: int
    family: Family | None
    unknown: str

    @property
    def tokens(self) -> int | None:
        """How many image tokens the forward makes."""
        return None if self.size is None else math.prod(self.size)


def layout(denoiser: Any, given: dict[str, Any]) -> Layout:
    """Read the tokens of a forward from its inputs."""
    known = family(denoiser)
    sample = next(iter(given.values()))  # in the order of the forward's own parameters
    if known is None:
        batch = len(sample)
        why = f"the order of the tokens of {type(denoiser).__name__} is not known to regard"
        return Layout(None, batch, (), 0, None, why)
    texts = [given.get(name) for name in known.text]
    text = tuple(_length(t) for t in texts if t is not None)
    lead = getattr(denoiser, known.lead).shape[-2] if known.lead else 0
    why = ""
    mask = given.get("encoder_attention_mask")
    if known.packed and mask is not None and len(set(mask.sum(-1).tolist())) > 1:
        why = "prompts of different lengths are packed row by row: give one prompt at a time"
    elif known.packed and mask is not None:
        text = (int(mask[0].sum()),)
    extra = given.get("encoder_hidden_states_2")
    if extra is not None:  # quoted text, read by bytes, goes before the prompt
        counts = given["encoder_attention_mask_2"].sum(-1).tolist()
        if len(set(counts)) > 1:
            why = (
                "prompts that quote texts of different lengths share no columns: give one at a time"
            )
        lead, text = int(counts[0]), (text[0], extra.shape[1] - int(counts[0]))
    return Layout(_size(denoiser, known, given, sample), len(sample), text, lead, known, why)


def _length(text: Any) -> int:
    """Tokens of a text input: a tensor `[..., tokens, dim]`, or one for each row."""
    if isinstance(text, (list, tuple)):
        return max(_length(t) for t in text) if text else 0
    return int(text.shape[-2])


def _size(denoiser: Any, known: Family, given: dict[str, Any], sample: Any) -> Size | None:
    config = denoiser.config
    if given.get("img_shapes") is not None:  # of every row, references after the image
        first = given["img_shapes"][0]
        shape = first[0] if isinstance(first, (list, tuple)) else first
        return tuple(int(n) for n in shape[-2:])
    if given.get("img_ids") is not None and isinstance(sample, Tensor) and sample.dim() == 3:
        return _from_ids(given["img_ids"])
    if not known.sample:
        dims = [given.get(name) for name in ("num_frames", "height", "width")]
        return None if None in dims else tuple(int(n) for n in dims)  # type: ignore[arg-type]
    first = sample[0] if isinstance(sample, (list, tuple)) else sample
    axes = known.sample.split()
    if len(axes) != first.dim():
        return None
    shape = dict(zip(axes, first.shape))
    time, height, width = _patch(config, given)
    size = (shape["h"] // height, shape["w"] // width)
    # one picture of a model of pictures has an axis of frames too, in a list
    video = "f" in shape and not (isinstance(sample, (list, tuple)) and shape["f"] == 1)
    return ((shape["f"] + time - 1) // time, *size) if video else size


def _patch(config: Any, given: dict[str, Any]) -> Size:
    """Frames, height and width of the latents that make one token."""
    side = given.get("patch_size") or getattr(config, "patch_size", None)
    if side is None:
        side = (getattr(config, "all_patch_size", None) or (1,))[0]
    time = getattr(config, "patch_size_t", None) or 1
    sides = tuple(side) if isinstance(side, (list, tuple)) else (side, side)
    return sides if len(sides) == 3 else (time, *sides)


def _from_ids(ids: Tensor) -> Size | None:
    """Height and width from positions `[tokens, (picture, row, column, ...)]`; other pictures than
    the first are references.
    """
    ids = ids[0] if ids.dim() == 3 else ids
    ids = ids[(ids[:, 0] == ids[0, 0])]
    low, high = ids[:, 1:3].amin(0), ids[:, 1:3].amax(0)
    height, width = (int(n) for n in high - low + 1)
    return (height, width) if height * width == len(ids) else None


@dataclass(frozen=True)
class Places:
    """Which queries and keys of one call are what.

    Attributes:
        grid: the image's tokens as (height, width) or (frames, height, width).
        frames: rows of the call for one row of the batch: frames that are attended one by one.
        image: image tokens among the queries; image_keys: among the keys; text_queries, text: the
            text tokens among them; reference: keys of pictures that the image refers to. None
            where there are none.
    """

    grid: Size | None
    frames: int
    image: slice
    image_keys: slice | None
    text_queries: slice | None
    text: slice | None
    reference: slice | None


def places(
    seen: Layout, kind: str, over: str, added_kv: bool, shape: tuple[int, int, int]
) -> Places:
    """The tokens of a call of a shape (rows, queries, keys).

    Args:
        own: keys of the image itself follow those of the text (Kandinsky 2, DeepFloyd IF).
    """
    batch, queries, keys = shape
    frames = batch // seen.batch if seen.batch and batch % seen.batch == 0 else 1
    every = slice(0, queries)
    if over:
        return Places(None, frames, every, None, None, None, None)
    if kind == "joint":
        return _joint(seen, queries, keys)
    grid = _grid(seen, queries, frames)
    if kind == "self":
        return Places(grid, frames, every, slice(0, keys), None, None, None)
    text = slice(0, keys - queries) if added_kv else slice(0, keys)
    image_keys = slice(text.stop, keys) if added_kv else None
    return Places(grid, frames, every, image_keys, None, text, None)


def _joint(seen: Layout, queries: int, keys: int) -> Places:
    known, tokens = seen.family, seen.tokens
    every = slice(0, queries)
    if known is None or seen.unknown:
        return Places(None, 1, every, None, None, None, None)
    length = sum(seen.text)
    if known.order == "image text":
        stop = keys - _padded(length, known.multiple) if tokens is None else tokens
        image = slice(0, min(stop, keys))
        # without the padding of the text fewer keys are left than the text has tokens
        start = max(image.stop, keys - _padded(length, known.multiple))
        start += seen.lead
        text = slice(start, min(start + length, keys))
        reference = slice(image.stop, start - seen.lead)
    else:
        text = slice(seen.lead, seen.lead + length)
        first = seen.lead + length
        image = slice(first, keys if tokens is None else min(first + tokens, keys))
        reference = slice(image.stop, keys)
    size = seen.size if seen.size is not None and image.stop - image.start == tokens else None
    rest = None if reference.start >= reference.stop or known.packed else reference
    return Places(size, 1, image, image, text, text, rest)


def _grid(seen: Layout, queries: int, frames: int) -> Size | None:
    """The grid of so many queries: of the whole, of one frame, or of a UNet's halved latents."""
    size = seen.size
    if size is None:
        return None
    if math.prod(size) == queries:
        return size
    height, width = size[-2:]
    while height * width > queries and height * width > 1:
        # a UNet halves the latents, rounding up
        height, width = (height + 1) // 2, (width + 1) // 2
    return (height, width) if height * width == queries else None


def _padded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


__all__ = [
    "FAMILIES",
    "Family",
    "Layout",
    "Places",
    "Size",
    "family",
    "kind_of",
    "layout",
    "places",
]
