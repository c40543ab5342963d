"""SPES: which parts of a spectrogram, or of an encoder's output, a speech model's words rest on.

Segments of the input are taken out at random; the more a piece's distribution changes while a cell
is out, the more that cell matters for it.

Paper: "SPES: Spectrogram Perturbation for Explainable Speech-to-Text Generation", Fucci, Gaido,
Savoldi, Negri, Cettolo, Bentivogli, 2024, arXiv 2411.01710, as used in "Cross-Attention is Half
Explanation in Speech-to-Text Models", Papi et al., 2025, arXiv 2509.18010.

Deviations:
- What is taken out is replaced by the mean of its mel bin over the clip: Whisper's spectrogram is
  not centred. `baseline="zero"` is the paper's.
- Sums are kept by segment and spread over the cells at the end, which is the same number.
- `antithetic` pairs of masks (each with its complement) are ours: unbiased at p = 0.5.
- Masks over whole encoder steps ("time") for the encoder's output are our reconstruction.
- Saliency of previous tokens is left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard import files
from regard.errors import InputError
from regard.progress import bar

from .forced import SILENT, Forced

SEGMENTS = (2000, 2500, 3000)
REFERENCE, CAP = 500, 750  # frames that SEGMENTS are meant for, and beyond which they stop growing
FEW = 10  # times a cell should be out at least


@dataclass(frozen=True)
class Saliency:
    """Saliency maps of a transcript.

    Attributes:
        map: `[pieces, rows, time]`: rows are mel bins and time frames for the input; one row and
            encoder steps for the encoder's output (its channels with geometry "slic").
        halves: the same from each half of the masks, `[2, pieces, rows, time]`.
        out: how often each cell was out, `[rows, time]`.
        scores: mean divergence of each piece over all masks, nats.
        masks: how many masks were drawn.
    """

    map: Tensor
    halves: Tensor
    out: Tensor
    scores: Tensor
    masks: int


def superpixels(field: Tensor, count: int) -> Tensor:
    """SLIC segments of a 2-D field (compactness 0.1, sigma 1), as labels 0, 1, ... without gaps.

    SLIC may find fewer segments than asked for, seldom more.

    Raises:
        InputError: a constant field; ImportError names the extra when scikit-image is missing.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError(
            'superpixels need scikit-image, which is not installed: pip install "regard[explain]"'
        ) from error
    low, high = float(field.min()), float(field.max())
    if not high > low:
        raise InputError(SILENT)
    scaled = ((field - low) / (high - low)).double().cpu().numpy()
    if count <= 1:
        return torch.zeros(field.shape, dtype=torch.long)
    labels = slic(
        scaled, n_segments=count, compactness=0.1, sigma=1, channel_axis=None, start_label=0
    )
    return torch.from_numpy(labels).unique(return_inverse=True)[1].reshape(field.shape)


def segment_counts(frames: int, segments: Sequence[int] = SEGMENTS) -> list[int]:
    """How many segments each granularity has on so many frames.

    >>> segment_counts(200), segment_counts(10_000)
    ([800, 1000, 1200], [3000, 3750, 4500])
    """
    return [max(1, round(n * min(frames, CAP) / REFERENCE)) for n in segments]


def divergence(plain: Tensor, changed: Tensor) -> Tensor:
    """KL(plain || changed) over the last axis of log-probabilities, nats, not negative.

    >>> even, odd = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
    >>> [round(float(divergence(a, b)), 4) for a, b in ((odd, even), (odd, odd), (even, even))]
    [0.6931, 0.0, 0.0]
    """
    weight = plain.exp()
    lowest = torch.finfo(plain.dtype).min
    apart = plain.clamp_min(lowest) - changed.clamp_min(lowest)
    return torch.where(weight > 0, weight * apart, 0.0).sum(-1).clamp_min(0)


def saliency(
    forced: Forced,
    *,
    on: str = "input",
    masks: int = 2000,
    p: float = 0.5,
    segments: Sequence[int] = SEGMENTS,
    geometry: str | None = None,
    width: int = 1,
    baseline: str = "mean",
    antithetic: bool = False,
    seed: int = 0,
    batch: int = 16,
    state: str | Path | None = None,
    save_every: int = 500,
    progress: bool = True,
) -> Saliency:
    """SPES maps of every piece of a transcript, on the input or on the encoder's output.

    Args:
        on: "input" (the spectrogram; a pass of the whole model per mask), or "states" (the
            encoder's output; the encoder runs once).
        masks: how many; the paper takes 20,000.
        p: chance of a segment to be taken out.
        segments: segments per 500 frames, one number a granularity.
        geometry: "slic" superpixels (default on the input) or "time", whole columns (default on
            the encoder's output).
        width: columns to a segment of "time"; above 1 a second granularity lies half a segment
            aside. Wider segments need far fewer masks (ours).
        baseline: what stands in for a cell that is out: "mean" of its mel bin, or "zero". On the
            encoder's output always zero.
        antithetic: draw each mask with its complement; p is then 0.5 and `masks` even.
        batch: masks run at once.
        state: a file that keeps the work: a killed run goes on from there when called again, and
            ends with the same numbers.
        save_every: masks between two saves.

    Raises:
        InputError: a setting out of range, a silent clip, a state of another run.
    """
    geometry = geometry or ("slic" if on == "input" else "time")
    _check(on, masks, p, segments, geometry, baseline, antithetic, batch)
    if width < 1:
        raise InputError(f"width is at least 1, not {width}")
    clip = forced.clip
    if on == "input":
        field = clip.field
        stand_in = field.mean(1, keepdim=True) if baseline == "mean" else torch.zeros(())
        stand_in = stand_in.to(field)
        run = forced.of_input
    else:
        field, stand_in = clip.states[: clip.steps].T, torch.zeros(())
        stand_in = stand_in.to(field)
        rest = clip.states[clip.steps :]

        def run(fields: Tensor) -> Tensor:
            tail = rest.expand(len(fields), -1, -1)
            return forced.log_probs(torch.cat([fields.transpose(1, 2), tail], 1))

    labels = _labels(field, geometry, segments, clip.frames, width)
    key = {
        "of": _mark(forced),
        **{"on": on, "masks": masks, "p": p, "geometry": geometry, "baseline": baseline},
        **{"segments": list(segments), "antithetic": antithetic, "seed": seed, "width": width},
    }
    sums = _Sums(labels, len(forced.text), seed, key, None if state is None else Path(state))
    unit = 2 if antithetic else 1
    todo = range(sums.done, masks, max(batch // unit, 1) * unit)
    where = labels[0].shape[0]
    saved = sums.done
    with torch.inference_mode(), bar(len(todo), f"masks on the {on}", progress) as step:
        for start in todo:
            size = min(todo.step, masks - start)
            keep, halves = sums.draw(start, size, p, antithetic)
            cells = keep[:, : sums.total].to(field.device)
            kept = torch.stack([cells[n, g] for n, g in enumerate(sums.cells(start, size, unit))])
            fields = torch.where(kept.view(size, where, -1), field, stand_in)
            score = divergence(forced.plain, run(fields)).cpu()
            sums.add(score, keep, halves, start + size)
            if start + size - saved >= save_every or start + size == masks:
                sums.save()
                saved = start + size
            step()
    return sums.finish()


class _Sums:
    """Scores summed by segment, for each half of the masks; can be saved and taken up again."""

    def __init__(
        self, labels: list[Tensor], pieces: int, seed: int, key: dict[str, Any], path: Path | None
    ) -> None:
        self.labels, self.key, self.path = labels, json.dumps(key, sort_keys=True), path
        sizes = [int(x.max()) + 1 for x in labels]
        self.starts = [sum(sizes[:n]) for n in range(len(sizes))]
        self.sizes, self.total = sizes, sum(sizes)
        self.num = torch.zeros(2, pieces, self.total)
        self.den = torch.zeros(2, self.total)
        self.sum = torch.zeros(pieces)
        self.random = torch.Generator().manual_seed(seed)
        self.done = 0
        if path is not None:
            self._load(path)

    def kind(self, mask: int, unit: int) -> tuple[int, int]:
        """Granularity and half of a mask."""
        turn = mask // unit
        return turn % len(self.sizes), turn // len(self.sizes) % 2

    def cells(self, start: int, size: int, unit: int) -> list[Tensor]:
        """For each mask the segment of every cell, counted over all granularities."""
        kinds = [self.kind(n, unit)[0] for n in range(start, start + size)]
        return [(self.labels[g] + self.starts[g]).flatten() for g in kinds]

    def draw(self, start: int, size: int, p: float, antithetic: bool) -> tuple[Tensor, list[int]]:
        """Which segments each mask keeps, `[masks, segments]`; those of other granularities count
        as kept. The numbers drawn depend on the mask alone, not on the batch.
        """
        keep = torch.ones(size, self.total, dtype=torch.bool)
        unit, halves = 2 if antithetic else 1, []
        for n in range(size):
            g, half = self.kind(start + n, unit)
            own = slice(self.starts[g], self.starts[g] + self.sizes[g])
            if antithetic and n % 2:
                keep[n, own] = ~keep[n - 1, own]
            else:
                keep[n, own] = torch.rand(self.sizes[g], generator=self.random) >= p
            halves.append(half)
        return keep, halves

    def add(self, score: Tensor, keep: Tensor, halves: list[int], done: int) -> None:
        """Scores `[masks, pieces]` go to the segments that were out."""
        away, half = (~keep).float(), torch.tensor(halves)
        for n in (0, 1):
            chosen = half == n
            self.num[n] += score[chosen].T @ away[chosen]
            self.den[n] += away[chosen].sum(0)
        self.sum += score.sum(0)
        self.done = done

    def save(self) -> None:
        if self.path is None:
            return
        from safetensors.torch import save

        tensors = {"num": self.num, "den": self.den, "sum": self.sum}
        tensors |= {"random": self.random.get_state(), "done": torch.tensor(self.done)}
        files.write_bytes(self.path, save(tensors, metadata={"key": self.key}))

    def _load(self, path: Path) -> None:
        if not path.is_file():
            if not path.absolute().parent.is_dir():
                raise InputError(f"{path}: its folder does not exist: make it first")
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                key = (file.metadata() or {}).get("key")
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            raise InputError(f"{path} is not a saved saliency run: name another file") from None
        if key != self.key:
            raise InputError(
                f"{path} holds another run (other audio, model, transcript or settings): remove "
                "it, or name another file"
            )
        self.num, self.den, self.sum = found["num"], found["den"], found["sum"]
        self.random.set_state(found["random"])
        self.done = int(found["done"])

    def finish(self) -> Saliency:
        def spread(num: Tensor, den: Tensor) -> tuple[Tensor, Tensor]:
            """From segments to cells: `[pieces, rows, time]`, and how often each was out."""
            top = sum(num[:, x + s] for x, s in zip(self.labels, self.starts))
            low = sum(den[x + s] for x, s in zip(self.labels, self.starts))
            assert isinstance(top, Tensor) and isinstance(low, Tensor)
            return torch.where(low > 0, top / low.clamp_min(1), 0.0), low

        halves = [spread(n, d)[0] for n, d in zip(self.num, self.den)]
        whole, out = spread(self.num.sum(0), self.den.sum(0))
        if bool((out < FEW).any()):
            share = float((out < FEW).double().mean())
            warnings.warn(
                f"{100 * share:.0f} % of the cells were out fewer than {FEW} times: take more "
                "masks, or fewer segments",
                stacklevel=3,
            )
        return Saliency(whole, torch.stack(halves), out, self.sum / self.done, self.done)


def _check(
    on: str,
    masks: int,
    p: float,
    segments: Sequence[int],
    geometry: str,
    baseline: str,
    antithetic: bool,
    batch: int,
) -> None:
    if on not in ("input", "states"):
        raise InputError(f"on is 'input' or 'states', not {on!r}")
    if geometry not in ("slic", "time"):
        raise InputError(f"geometry is 'slic' or 'time', not {geometry!r}")
    if baseline not in ("mean", "zero"):
        raise InputError(f"baseline is 'mean' or 'zero', not {baseline!r}")
    if not 0 < p < 1:
        raise InputError(f"p lies between 0 and 1, not {p}")
    if not segments or any(n < 1 for n in segments):
        raise InputError("segments are positive numbers, one a granularity")
    if masks < 2 or batch < 1:
        raise InputError("at least two masks are needed, and a batch of one")
    if antithetic and (p != 0.5 or masks % 2):
        raise InputError("antithetic masks come in pairs: p is 0.5 and the number of masks even")


def _labels(
    field: Tensor, geometry: str, segments: Sequence[int], frames: int, width: int
) -> list[Tensor]:
    """Segment labels of each granularity, `[rows, time]` (one row: whole columns)."""
    if geometry == "time":
        shifts = [0] if width == 1 else [0, width // 2]
        return [((torch.arange(field.shape[1]) + n) // width)[None] for n in shifts]
    counts = segment_counts(frames, segments)
    return [superpixels(field.float().cpu(), min(n, field.numel())) for n in counts]


def _mark(forced: Forced) -> str:
    """A fingerprint of clip, transcript and model."""
    mark, model = hashlib.sha256(), forced.clip.model
    mark.update(forced.clip.whole.cpu().numpy().tobytes())
    mark.update(json.dumps([forced.clip.prompt, forced.text, forced.clip.frames]).encode())
    for name, weight in model.named_parameters():
        mark.update(f"{name} {tuple(weight.shape)} {float(weight.detach().flatten()[0])}".encode())
    return mark.hexdigest()[:16]


# -- cheaper references --------------------------------------------------------------------------
def gradients(
    forced: Forced,
    method: str = "gradient_x_input",
    *,
    baseline: str = "mean",
    steps: int = 32,
    progress: bool = True,
) -> Tensor:
    """Absolute attributions of each piece's log-probability, `[pieces, bins, frames]`, by captum.

    Args:
        method: "gradient_x_input", or "integrated_gradients" (`steps` points along the way).
        baseline: where the input counts from: "mean" of each mel bin, or "zero".

    Raises:
        InputError: an unknown method; ImportError names the extra when captum is missing.
    """
    if method not in ("gradient_x_input", "integrated_gradients"):
        raise InputError(f"method is gradient_x_input or integrated_gradients, not {method!r}")
    _check("input", 2, 0.5, SEGMENTS, "slic", baseline, False, 1)
    try:
        from captum.attr import InputXGradient, IntegratedGradients
    except ImportError as error:
        raise ImportError(
            'gradient references need captum, which is not installed: pip install "regard[explain]"'
        ) from error
    field = forced.clip.field
    base = field.mean(1, keepdim=True) if baseline == "mean" else torch.zeros_like(field[:, :1])
    text = torch.tensor(forced.text, device=field.device)

    def chosen(moved: Tensor) -> Tensor:
        """Log-probability of every piece, `[batch, pieces]`, from the distance to the baseline."""
        found = forced.of_input(base + moved)
        return found.gather(2, text.expand(len(found), -1)[..., None])[..., 0]

    moved = (field - base)[None]
    maps = []
    attribute: Callable[..., Tensor]
    if method == "gradient_x_input":
        attribute = InputXGradient(chosen).attribute
        more: dict[str, Any] = {}
    else:
        attribute = IntegratedGradients(chosen, multiply_by_inputs=True).attribute
        more = {"n_steps": steps, "internal_batch_size": 8, "method": "riemann_middle"}
    with torch.enable_grad(), bar(len(forced.text), method.replace("_", " "), progress) as step:
        for n in range(len(forced.text)):
            given = moved.clone().requires_grad_()
            maps.append(attribute(given, target=n, **more).detach()[0].abs().float().cpu())
            step()
    return torch.stack(maps)


def expected_passes(masks: int, batch: int) -> int:
    """Forward passes of a run.

    >>> expected_passes(100, 16)
    7
    """
    return math.ceil(masks / batch)
