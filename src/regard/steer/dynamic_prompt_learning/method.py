"""Dynamic Prompt Learning: nouns are learnt anew at every step, so that their maps stop leaking.

Paper: "Dynamic Prompt Learning: Addressing Cross-Attention Leakage for Text-Based Image Editing",
Wang et al., 2023, arXiv 2309.15664.

An edit spills over where a noun's cross-attention lies on other things or on the background. After
DDIM inversion the nouns' input embeddings are learnt at each step, against three losses on their
maps (overlap of nouns, overlap with the background, a noun without a place), each only down to a
target that tightens over the steps; then the empty prompt is learnt (null-text inversion), and the
sampler moves on. Prompt-to-Prompt edits with what was learnt.

Deviations:
- Learnt rows are put into the text encoder while it runs; no vocabulary grows, and edits work with
  ready encodings.
- A noun of several pieces has a row for each; its map is their mean (ours).
- One noun alone has overlap 0, and so has an empty background: the released code gives NaN.
- The targets run along the same curve for any number of steps (ours; the paper takes 50).
- A step of null-text inversion ends early at the error of its own paper.
- `inner_steps=0` learns no tokens (released: 1): that is plain null-text inversion.
- Grids: the largest cross-attention grid up to `map_cells` tokens and the largest self-attention
  grid up to `self_cells`, 16 x 16 and 32 x 32 in Stable Diffusion at 512 pixels, as the paper.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.parts.diffusion import kept
from regard.parts.diffusion.encodings import encode_with
from regard.parts.diffusion.inversion import (
    Tick,
    check,
    encode_image,
    encode_text,
    fingerprint,
    fit_null,
    frozen,
    good_enough,
    invert,
    predict,
    schedule,
)
from regard.parts.diffusion.means import MeanMaps
from regard.parts.diffusion.prompt_to_prompt import token_ids, word_columns
from regard.parts.text.phrases import noun_phrases
from regard.reach.session import Session

from .card import Settings
from .learned import Learned
from .losses import background, balance, disjoint, leaked, noun_maps

NUMBERS = ("disjoint", "background", "balance", "updates", "error")


class DynamicPromptLearning(Settings):
    """Learn the nouns of a caption for each step of a picture's way back from noise.

    `warm_start` is how null-text inversion does it, and better with few `null_steps`; without it
    each step begins anew, as released here.

    >>> import regard
    >>> from PIL import Image
    >>> from regard.steer.dynamic_prompt_learning.editing import edit
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe, picture = tiny_pipeline("sd"), Image.new("RGB", (32, 32), "red")
    >>> method = regard.DynamicPromptLearning(inner_steps=1, null_steps=1, steps=2)
    >>> learned = method.learn(pipe, picture, "a circle and a square")
    >>> learned.maps.shape, sorted(learned.report()["leakage"]["after"]["pairs"])
    (torch.Size([2, 16, 16]), ['circle / square'])
    >>> edit(pipe, learned, "a circle and a star").image.size
    (32, 32)

    Raises:
        InputError: a setting out of range, no noun, a noun that the caption does not have (or
            twice).
        ReachError: a pipeline that cannot be inverted.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.nouns, str) or (self.nouns is not None and not self.nouns):
            raise InputError("nouns is a list of one word or more of the caption")

    def named(self, caption: str) -> list[str]:
        """The nouns to learn of a caption.

        >>> DynamicPromptLearning().named("a red circle and a blue circle on a white background")
        ['circle (1)', 'circle (2)']

        Raises:
            InputError: none was named, and the caption has no noun phrase.
        """
        return head_nouns(caption) if self.nouns is None else list(self.nouns)

    def find(self, pipe: Any, caption: str) -> list[list[int]]:
        """Columns of each noun in the caption's encoding."""
        check(pipe)
        names = self.named(caption)
        columns = [word_columns(pipe.tokenizer, caption, noun) for noun in names]
        flat = _flat(columns)
        if len(set(flat)) < len(flat):
            raise InputError(f"the nouns {names} share a word: name each word once")
        return columns

    def learn(
        self,
        pipe: Any,
        image: Any,
        caption: str,
        *,
        folder: str | Path | None = None,
        progress: Tick | None = None,
    ) -> Learned:
        """Invert a picture and learn its nouns and nulls.

        Args:
            pipe: a `StableDiffusionPipeline`.
            image: a PIL image, or latents `[1, channels, height, width]`.
            caption: what it shows.
            folder: keep each finished step here, and go on from what is there; steps of another
                picture, caption, model or setting are not taken up.
            progress: called twice a step: in the inversion, and after learning (also for steps that
                are taken up).
        """
        columns = self.find(pipe, caption)
        latents = image if isinstance(image, Tensor) else encode_image(pipe, image)
        seen = MeanMaps(self.map_cells, self.self_cells)
        with Session(pipe.unet, [seen]):
            inverted = invert(pipe, latents, caption, steps=self.steps, progress=progress)
        before, (looks, grid) = noun_maps(seen.words(), columns), seen.selves()
        ground = background(looks, before, grid=grid, clusters=self.clusters, share=self.share)
        plan, place = self._plan(pipe, latents, caption), _made(folder)
        ids = token_ids(pipe.tokenizer, caption)
        table = pipe.text_encoder.get_input_embeddings().weight.detach()
        tokens = table[[ids[c] for c in _flat(columns)]].clone()
        ddim, at = schedule(pipe, self.steps), inverted.latents[-1]
        with torch.no_grad():
            empty = encode_text(pipe, "").to(at)
        null, steps = empty, []
        for step in range(self.steps):
            file = None if place is None else place / f"step-{step:03d}.safetensors"
            state = kept.read(file, plan)
            if state is None:
                tokens, maps, numbers = self._update(
                    pipe, caption, columns, ground, step, at, tokens
                )
                with torch.no_grad():
                    embeds = encode_with(pipe, caption, _flat(columns), tokens)
                null, at, error = fit_null(
                    pipe,
                    ddim,
                    step,
                    at,
                    inverted.latents[self.steps - step - 1],
                    embeds.to(at),
                    null if self.warm_start else empty,
                    guidance=self.guidance,
                    inner_steps=self.null_steps,
                    stop=good_enough,
                )
                state = {"tokens": tokens, "null": null, "latents": at, "maps": maps}
                state["numbers"] = torch.tensor([*numbers, error], dtype=torch.float64)
                kept.write(file, state, plan)
            tokens, null, at = (state[n].to(at) for n in ("tokens", "null", "latents"))
            steps.append(state)
            if progress is not None:
                progress()
        return Learned(
            self.named(caption),
            columns,
            inverted,
            torch.stack([s["tokens"] for s in steps]).to(table),
            [s["null"].to(at) for s in steps],
            self.guidance,
            before,
            torch.stack([s["maps"] for s in steps]).mean(0).to(before),
            ground,
            [dict(zip(NUMBERS, s["numbers"].tolist())) for s in steps],
        )

    def _update(
        self,
        pipe: Any,
        caption: str,
        columns: list[list[int]],
        ground: Tensor,
        step: int,
        latents: Tensor,
        tokens: Tensor,
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Update the nouns in one step; gives them, their maps, and losses and updates."""
        terms = (self.disjoint, self.background, self.balance)
        at = _flat(columns)
        time = schedule(pipe, self.steps).timesteps[step]
        rows = tokens.detach().clone().requires_grad_(True)
        adam = torch.optim.AdamW([rows], lr=self.lr)
        seen, updates = MeanMaps(self.map_cells), 0
        with frozen(pipe.unet, pipe.text_encoder), Session(pipe.unet, [seen]), torch.enable_grad():
            while True:
                seen.clear()
                predict(pipe, latents, time, encode_with(pipe, caption, at, rows).to(latents))
                whole = seen.words()
                maps = noun_maps(whole, columns)
                losses = (
                    disjoint(maps),
                    leaked(maps, ground),
                    balance(whole, columns, self.smooth),
                )
                counted = [(t, x) for t, x in zip(terms, losses) if t.weight]
                reached = all(x.item() < t.target(step, self.steps) for t, x in counted)
                if reached or updates == self.inner_steps:
                    break
                loss = torch.stack([t.weight * x for t, x in counted]).sum()
                (rows.grad,) = torch.autograd.grad(loss, rows)
                adam.step()
                updates += 1
        values = [float(x.detach()) for x in losses]
        return rows.detach(), maps.detach(), [*values, float(updates)]

    def _plan(self, pipe: Any, latents: Tensor, caption: str) -> str:
        """What kept steps must have been made with."""
        settings = {**self.settings(), "nouns": self.named(caption)}
        return json.dumps([settings, caption, fingerprint(pipe, latents)])


def _made(folder: str | Path | None) -> Path | None:
    """The folder, made if it is missing."""
    if folder is None:
        return None
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise InputError(f"{path} cannot be written: {problem.strerror}") from None
    return path


def head_nouns(caption: str) -> list[str]:
    """The last word of each simple noun phrase; "circle (2)" for the second of two.

    The background is no noun of its own: its loss is about all others.
    """
    ends = [(p.end, re.findall(r"\w+", p.text)[-1]) for p in noun_phrases(caption, "rules")]
    ends = [(end, word) for end, word in ends if word.lower() != "background"]
    if not ends:
        raise InputError(f"no noun was found in {caption!r}: name the nouns to learn")
    names = []
    for end, word in ends:
        spans = [m.end() for m in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", caption)]
        names.append(f"{word} ({spans.index(end) + 1})" if len(spans) > 1 else word)
    return list(dict.fromkeys(names))


def _flat(columns: list[list[int]]) -> list[int]:
    return [c for noun in columns for c in noun]
