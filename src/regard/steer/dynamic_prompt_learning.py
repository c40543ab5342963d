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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor
from torch.nn.functional import cosine_similarity

from regard import files
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler
from regard.reach.denoising import columns, denoising
from regard.reach.inversion import (
    GUIDANCE,
    Inverted,
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
    replay,
    schedule,
)
from regard.reach.latents import decode
from regard.reach.prompt_to_prompt import (
    PromptToPrompt,
    align,
    refined,
    swapped,
    token_ids,
    word_columns,
)
from regard.reach.session import Session
from regard.steer.dpl_losses import (
    BACKGROUND,
    BALANCE,
    DISJOINT,
    Term,
    background,
    balance,
    disjoint,
    leaked,
)

PLAN = "plan.json"
CROSS, SELF = 0.8, 0.4  # shares of the steps in which an edit follows the source: 40 and 20 of 50


@dataclass(frozen=True, eq=False)
class Learned:
    """A picture, inverted, with the nouns and the empty prompt learnt for each step.

    Attributes:
        nouns: as they were named; columns: where each stands in the prompt's encoding.
        inverted: the way into noise.
        tokens: input embeddings of all noun columns, `[steps, pieces, dim]`.
        nulls: the empty prompt's encoding of each step, `[1, tokens, dim]`.
        guidance: that of sampling.
        before: maps of the plain nouns, averaged over the inversion, `[nouns, height, width]`.
        maps: maps of the nouns as learnt, averaged over the steps, where the sampler stood.
        ground: what belongs to no noun, boolean `[height, width]`.
        losses: for each step disjoint, background, balance, the updates made, and the error of the
            latents after it.
    """

    nouns: list[str]
    columns: list[list[int]]
    inverted: Inverted
    tokens: Tensor
    nulls: list[Tensor]
    guidance: float
    before: Tensor
    maps: Tensor
    ground: Tensor
    losses: list[dict[str, float]]

    def embeds(self, pipe: Any, prompt: str | None = None) -> list[Tensor]:
        """A prompt's encoding for each step, `[1, tokens, dim]`, nouns of the source as learnt.

        Nouns that the prompt does not share with the source are the plain ones.
        """
        source = self.inverted.prompt
        prompt = source if prompt is None else prompt
        flat = [c for own in self.columns for c in own]
        pairs = align(token_ids(pipe.tokenizer, source), token_ids(pipe.tokenizer, prompt))
        at = [(m, flat.index(n)) for m, n in enumerate(pairs) if n in flat]
        with torch.no_grad():
            return [
                _encode(pipe, prompt, [m for m, _ in at], rows[[r for _, r in at]])
                for rows in self.tokens
            ]

    def reconstruct(self, pipe: Any) -> Any:
        """The picture as it is sampled again, as a PIL image."""
        noise = self.inverted.latents[-1]
        out = replay(pipe, noise, self.embeds(pipe), self.nulls, guidance=self.guidance)
        return decode(pipe, out)[0]

    def leakage(self) -> dict[str, Any]:
        """Cosines between the nouns' maps, and with the background, before and after."""
        said: dict[str, Any] = {}
        for name, maps in (("before", self.before), ("after", self.maps)):
            flat, ground = maps.flatten(1), self.ground.to(maps).flatten()
            pairs = combinations(range(len(flat)), 2)
            said[name] = {
                "pairs": {
                    f"{self.nouns[a]} / {self.nouns[b]}": float(
                        cosine_similarity(flat[a], flat[b], dim=0)
                    )
                    for a, b in pairs
                },
                "background": {
                    noun: float(cosine_similarity(one, ground, dim=0))
                    for noun, one in zip(self.nouns, flat)
                },
            }
        return said


@dataclass(frozen=True)
class Edited:
    """Source and edit as PIL images; where the edit could change, `[height, width]` of latents."""

    source: Any
    image: Any
    mask: Tensor | None = field(repr=False)


@dataclass(frozen=True)
class DynamicPromptLearning:
    """Learn the nouns of a caption for each step of a picture's way back from noise.

    Args:
        nouns: words of the caption; "circle (2)" for the second of two.
        inner_steps: updates of the nouns a step, at most; 0 is plain null-text inversion.
        null_steps: updates of the empty prompt a step, at most.
        steps: of inversion and sampling.
        guidance: of sampling.
        balance, disjoint, background: the losses; weight 0 leaves one out.
        lr: of the nouns (AdamW, anew each step).
        warm_start: begin each step's empty prompt with what the last one learnt, as null-text
            inversion does, instead of anew, as released here; better with few `null_steps`.
        smooth: see `regard.steer.dpl_losses.balance`.
        map_cells, self_cells: the largest grids of at most so many tokens are used.
        clusters, share: of the background, see `regard.steer.dpl_losses.background`.

    >>> from PIL import Image
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe, picture = tiny_pipeline("sd"), Image.new("RGB", (32, 32), "red")
    >>> method = DynamicPromptLearning(["circle", "square"], inner_steps=1, null_steps=1, steps=2)
    >>> learned = method.learn(pipe, picture, "a circle and a square")
    >>> learned.maps.shape, sorted(learned.leakage()["after"]["pairs"])
    (torch.Size([2, 16, 16]), ['circle / square'])
    >>> edit(pipe, learned, "a circle and a star").image.size
    (32, 32)

    Raises:
        InputError: numbers out of range, no noun, a noun that the caption does not have (or twice).
        ReachError: a pipeline that cannot be inverted.
    """

    nouns: Sequence[str]
    inner_steps: int = 21
    null_steps: int = 51
    steps: int = 50
    guidance: float = GUIDANCE
    balance: Term = BALANCE
    disjoint: Term = DISJOINT
    background: Term = BACKGROUND
    lr: float = 1e-3
    warm_start: bool = False
    smooth: bool = True
    map_cells: int = 16 * 16
    self_cells: int = 32 * 32
    clusters: int = 5
    share: float = 0.2

    def __post_init__(self) -> None:
        if isinstance(self.nouns, str) or not self.nouns:
            raise InputError("nouns is a list of one word or more of the caption")
        if min(self.inner_steps, self.null_steps) < 0 or self.steps < 1 or self.lr <= 0:
            raise InputError("inner_steps and null_steps are 0 or more, steps and lr above 0")
        if self.clusters < 2 or not 0 <= self.share < 1:
            raise InputError("clusters is 2 or more, share from 0 to below 1")

    def find(self, pipe: Any, caption: str) -> list[list[int]]:
        """Columns of each noun in the caption's encoding."""
        check(pipe)
        found = [word_columns(pipe.tokenizer, caption, noun) for noun in self.nouns]
        flat = [c for own in found for c in own]
        if len(set(flat)) < len(flat):
            raise InputError(f"the nouns {list(self.nouns)} share a word: name each word once")
        return found

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
        found = self.find(pipe, caption)
        latents = image if isinstance(image, Tensor) else encode_image(pipe, image)
        looks = _Looks(self.map_cells, self.self_cells)
        with Session(pipe.unet, [looks]):
            inverted = invert(pipe, latents, caption, steps=self.steps, progress=progress)
        whole = looks.words()
        before, (selves, grid) = _nouns(whole, found), looks.selves()
        ground = background(selves, before, grid=grid, clusters=self.clusters, share=self.share)
        kept = _Folder(folder, self._plan(pipe, latents, caption))
        ids = token_ids(pipe.tokenizer, caption)
        table = pipe.text_encoder.get_input_embeddings().weight.detach()
        tokens = table[[ids[c] for own in found for c in own]].clone()
        ddim, at = schedule(pipe, self.steps), inverted.latents[-1]
        with torch.no_grad():
            empty = encode_text(pipe, "").to(at)
        null, steps = empty, []
        for step in range(self.steps):
            made = kept.read(step)
            if made is None:
                tokens, maps, losses = self._update(pipe, caption, found, ground, step, at, tokens)
                with torch.no_grad():
                    said = _encode(pipe, caption, [c for own in found for c in own], tokens)
                null, at, error = fit_null(
                    pipe,
                    ddim,
                    step,
                    at,
                    inverted.latents[self.steps - step - 1],
                    said.to(at),
                    null if self.warm_start else empty,
                    guidance=self.guidance,
                    inner_steps=self.null_steps,
                    stop=good_enough,
                )
                numbers = torch.tensor([*losses, error], dtype=torch.float64)
                made = {"tokens": tokens, "null": null, "latents": at, "maps": maps}
                made["numbers"] = numbers
                kept.write(step, made)
            tokens, null, at = (made[n].to(at) for n in ("tokens", "null", "latents"))
            steps.append(made)
            if progress is not None:
                progress()
        names = ("disjoint", "background", "balance", "updates", "error")
        return Learned(
            list(self.nouns),
            found,
            inverted,
            torch.stack([s["tokens"] for s in steps]).to(table),
            [s["null"].to(at) for s in steps],
            self.guidance,
            before,
            torch.stack([s["maps"] for s in steps]).mean(0).to(before),
            ground,
            [dict(zip(names, s["numbers"].tolist())) for s in steps],
        )

    def _update(
        self,
        pipe: Any,
        caption: str,
        found: list[list[int]],
        ground: Tensor,
        step: int,
        latents: Tensor,
        tokens: Tensor,
    ) -> tuple[Tensor, Tensor, list[float]]:
        """Update the nouns in one step; gives them, their maps, and losses and updates."""
        terms = (self.disjoint, self.background, self.balance)
        at = [c for own in found for c in own]
        time = schedule(pipe, self.steps).timesteps[step]
        rows = tokens.detach().clone().requires_grad_(True)
        adam = torch.optim.AdamW([rows], lr=self.lr)
        looks, updates = _Looks(self.map_cells, 0), 0
        with frozen(pipe.unet, pipe.text_encoder), Session(pipe.unet, [looks]), torch.enable_grad():
            while True:
                looks.clear()
                predict(pipe, latents, time, _encode(pipe, caption, at, rows).to(latents))
                whole = looks.words()
                maps = _nouns(whole, found)
                losses = (
                    disjoint(maps),
                    leaked(maps, ground),
                    balance(whole, found, self.smooth),
                )
                counted = [(t, x) for t, x in zip(terms, losses) if t.weight]
                reached = all(x.item() < t.target(step, self.steps) for t, x in counted)
                if reached or updates == self.inner_steps:
                    break
                loss = torch.stack([t.weight * x for t, x in counted]).sum()
                (rows.grad,) = torch.autograd.grad(loss, rows)
                adam.step()
                updates += 1
        said = [float(x.detach()) for x in losses]
        return rows.detach(), maps.detach(), [*said, float(updates)]

    def _plan(self, pipe: Any, latents: Tensor, caption: str) -> dict[str, Any]:
        """What kept steps must have been made with."""
        plan = {**asdict(self), "caption": caption, "made of": fingerprint(pipe, latents)}
        found: dict[str, Any] = json.loads(json.dumps(plan))
        return found


def edit(
    pipe: Any,
    learned: Learned,
    target: str,
    *,
    weights: Mapping[str, float] | None = None,
    local: tuple[str, str] | None = None,
    cross_steps: int | None = None,
    self_steps: int | None = None,
    threshold: float = 0.3,
    progress: Tick | None = None,
) -> Edited:
    """Edit by Prompt-to-Prompt: a word swap, a refinement, or other weights of words.

    A target of as many words as the source is a word swap; of more or fewer, a refinement; the
    source itself with `weights` is a re-weighting.

    Args:
        pipe: the pipeline that `learned` was made with.
        learned: from `DynamicPromptLearning.learn`.
        target: the edited caption.
        weights: words of the target -> factor of their attention, nothing renormalised.
        local: the words of source and target that may change the picture; elsewhere the latents are
            the source's. None changes them everywhere.
        cross_steps, self_steps: steps in which cross- and self-attention follow the source; 80 %
            and 40 % of all (in the paper 40 and 20 of 50).
        threshold: of the maps in `local`, as a share of their maximum.
        progress: called after each step.

    Raises:
        InputError: words that the captions do not have.
    """
    source, steps = learned.inverted.prompt, learned.inverted.steps
    same_length = len(source.split()) == len(target.split())
    columns_ = (swapped if same_length else refined)(pipe.tokenizer, source, target)
    columns_ = columns_.scaled(pipe.tokenizer, target, weights or {})
    blend = None
    if local is not None:
        blend = (
            word_columns(pipe.tokenizer, source, local[0]),
            word_columns(pipe.tokenizer, target, local[1]),
        )
    control = PromptToPrompt(
        columns_,
        round(CROSS * steps) if cross_steps is None else cross_steps,
        round(SELF * steps) if self_steps is None else self_steps,
        blend=blend,
        threshold=threshold,
    )
    pairs = zip(learned.embeds(pipe), learned.embeds(pipe, target))
    out = replay(
        pipe,
        learned.inverted.latents[-1],
        [torch.cat(pair) for pair in pairs],
        learned.nulls,
        guidance=learned.guidance,
        handlers=[control],
        after_step=control.after_step,
        progress=progress,
    )
    first, second = decode(pipe, out)
    return Edited(first, second, control.mask)


def _encode(pipe: Any, prompt: str, at: Sequence[int], rows: Tensor) -> Tensor:
    """A prompt's encoding, `[1, tokens, dim]`, with other input embeddings in some columns."""

    def put(module: Any, args: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, list(at)] = rows.to(out)
        return out

    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(put)
    try:
        return encode_text(pipe, prompt)
    finally:
        hook.remove()


def _nouns(whole: Tensor, found: list[list[int]]) -> Tensor:
    """`[height, width, tokens]` -> `[nouns, height, width]`."""
    return torch.stack([whole[..., own].mean(-1) for own in found])


class _Looks(Handler):
    """Attention of the largest grids, averaged over heads, layers and forwards, with gradients."""

    def __init__(self, cells: int, self_cells: int) -> None:
        self.limit = {"cross": cells, "self": self_cells}
        self.clear()

    def clear(self) -> None:
        self._sums: dict[tuple[str, tuple[int, int]], tuple[Tensor, int]] = {}

    def after(self, call: Call, state: State) -> None:
        size, kind = denoising(call).grid, call.site.kind
        if size is None or size[0] * size[1] > self.limit[kind]:
            return
        grid = size[0], size[1]
        share = columns(call, state, range(call.k.shape[2]))[0].float()
        total, count = self._sums.get((kind, grid), (0, 0))
        self._sums[kind, grid] = total + share.sum(0), count + len(share)

    def _mean(self, kind: str) -> tuple[tuple[int, int], Tensor]:
        grids = [g for k, g in self._sums if k == kind]
        if not grids:
            raise ReachError(
                f"no {kind}-attention of this UNet has a grid of at most {self.limit[kind]} "
                "tokens: raise map_cells and self_cells"
            )
        grid = max(grids, key=lambda g: g[0] * g[1])
        total, count = self._sums[kind, grid]
        return grid, total / count

    def words(self) -> Tensor:
        """`[height, width, text tokens]`."""
        grid, mean = self._mean("cross")
        return mean.unflatten(0, grid)

    def selves(self) -> tuple[Tensor, tuple[int, int]]:
        """`[tokens, tokens]`, and the grid they form."""
        grid, mean = self._mean("self")
        return mean, grid


class _Folder:
    """Finished steps on disk."""

    def __init__(self, path: str | Path | None, plan: dict[str, Any]) -> None:
        self.path = None if path is None else Path(path).expanduser()
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            place = self.path / PLAN
            try:
                known = json.loads(place.read_text(encoding="utf-8"))
            except (FileNotFoundError, ValueError):
                known = None
            if known != plan:
                for old in self.path.glob("step-*.safetensors"):
                    old.unlink()
                files.write_text(place, json.dumps(plan, indent=1) + "\n")
        except OSError as problem:
            raise InputError(f"{self.path} cannot be written: {problem.strerror}") from None

    def _place(self, step: int) -> Path:
        assert self.path is not None
        return self.path / f"step-{step:03d}.safetensors"

    def read(self, step: int) -> dict[str, Tensor] | None:
        if self.path is None or not self._place(step).is_file():
            return None
        try:
            return load_file(self._place(step))
        except (SafetensorError, OSError):
            return None  # half a file is no file

    def write(self, step: int, made: dict[str, Tensor]) -> None:
        if self.path is not None:
            plain = {n: t.detach().cpu().contiguous() for n, t in made.items()}
            files.write_bytes(self._place(step), to_bytes(plain))
