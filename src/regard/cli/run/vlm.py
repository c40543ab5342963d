"""What the commands on images share: reading them, asking the model, drawing on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regard.cli.common import Loading, load, working
from regard.cli.run import shown
from regard.cli.run.answer import divergence, first_difference
from regard.cli.run.answer import greedy_answer as answer
from regard.errors import InputError
from regard.zoo.pictures import read_all as read_images


def load_vlm(name: str, loading: Loading | None = None) -> tuple[Any, Any]:
    """A vision-language model and its processor."""
    model, processor = load(name, loading)
    if getattr(model.config, "vision_config", None) is None or not hasattr(model, "generate"):
        raise InputError(f"{name} reads no pictures: name a vision-language model (LLaVA, Qwen-VL)")
    if getattr(processor, "image_processor", None) is None:
        raise InputError(
            f"{name} comes without a processor for pictures: save the processor beside the model"
        )
    return model, processor


def prepare(
    model: Any, processor: Any, images: list[Any], prompt: str, tokens: int, chat: bool
) -> Any:
    """Inputs of the model for the pictures and the question."""
    if chat and getattr(processor, "chat_template", None):
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": prompt}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
    else:
        mark = str(getattr(processor, "image_token", "<image>"))
        text = prompt if mark in prompt else f"{f'{mark} ' * len(images)}{prompt}"
    try:
        inputs = processor(images=images, text=text, return_tensors="pt")
    except (ValueError, TypeError, StopIteration, IndexError) as problem:
        raise InputError(
            f"the processor cannot put {len(images)} pictures into this prompt: {problem}"
        ) from problem
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if room is not None and length + tokens > room:
        raise InputError(
            f"prompt and pictures take {length} tokens and the answer {tokens}, but the model has "
            f"{room} positions: give less"
        )
    return inputs.to(model.device)


def prefill(model: Any, inputs: Any, methods: list[Any]) -> tuple[float, int]:
    """Seconds of one pass over the prompt, and the bytes of its keys and values; the second of two
    passes counts.
    """
    import time

    import torch

    from regard.shrink.visiondrop.cache import nbytes
    from regard.watching import apply

    seconds, held = 0.0, 0
    with torch.no_grad(), apply(model, *methods):
        for _ in range(2):
            start = time.perf_counter()
            out = model(**inputs, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - start
            held = nbytes(out.past_key_values)
    return seconds, held


def compared(
    processor: Any, plain: tuple[list[int], Any], changed: tuple[list[int], Any], name: str
) -> dict[str, Any]:
    """Both answers, where they part, and how far apart their first tokens are."""
    (a, p), (b, q) = plain, changed
    apart = first_difference(a, b)

    def said(ids: list[int]) -> str:
        return str(processor.tokenizer.decode(ids, skip_special_tokens=True))

    return {
        "plain": said(a),
        name: said(b),
        "first_difference": None if apart is None else {"token": apart},
        "kl": divergence(p, q),
    }


def seen_by_model(processor: Any, inputs: Mapping[str, Any], index: int, image: Any) -> Any:
    """The picture as the model gets it, cropped and scaled; the picture itself where that is not
    stored as one.
    """
    import numpy as np
    from PIL import Image

    pixels = inputs["pixel_values"]
    if "image_grid_thw" in inputs or pixels.dim() not in (4, 5):
        return image
    own = pixels[index] if pixels.dim() == 4 else pixels[index, 0]
    settings = processor.image_processor
    mean = np.array(getattr(settings, "image_mean", None) or [0.0] * 3)
    spread = np.array(getattr(settings, "image_std", None) or [1.0] * 3)
    shown = own.detach().float().cpu().numpy().transpose(1, 2, 0) * spread + mean
    return Image.fromarray((shown.clip(0, 1) * 255).round().astype("uint8"))


def drawable(grid: Sequence[int] | None) -> tuple[int, int]:
    """The grid of a picture that can be drawn on.

    Raises:
        InputError: it is not known, or that of a video.
    """
    if grid is None or len(grid) != 2:
        raise InputError("the patches of this picture form no grid that is known: leave --out out")
    return int(grid[0]), int(grid[1])


def show_answers(result: dict[str, Any], name: str) -> Any:
    """Print both answers; the console for what follows."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    shown.answers(console, {column: result[column] for column in ("plain", name)})
    said = shown.parted(result["first_difference"])
    console.print(Text(f"{said} KL of the first token's distribution: {result['kl']:.4f} nats."))
    return console


__all__ = [
    "answer",
    "compared",
    "drawable",
    "load_vlm",
    "prefill",
    "prepare",
    "read_images",
    "seen_by_model",
    "show_answers",
    "working",
]
