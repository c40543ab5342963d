"""What the commands on pictures share: reading them, asking a model about them, drawing on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from regard.cli.common import Loading, load
from regard.errors import InputError

if TYPE_CHECKING:
    from regard.parts.vision import Images

SIDE = 512  # pixels of a picture's longer side on a page


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


def ask(
    model: Any, processor: Any, images: list[Any], prompt: str, tokens: int, chat: bool = True
) -> Any:
    """Inputs of the model for the pictures and the question, with room for an answer."""
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


def placed(model: Any, processor: Any, inputs: Mapping[str, Any], images: list[Any]) -> Images:
    """Where the image tokens are, and where on these pictures what each of them shows."""
    from regard.parts.vision import locate

    return locate(model, inputs, processor, [image.size for image in images])


def small(image: Any, side: int = SIDE) -> Any:
    """A picture for a page: no side longer, tiny ones enlarged."""
    scale = side / max(image.size)
    size = tuple(max(1, round(n * scale)) for n in image.size)
    return image.resize(size)
