"""Runs, steps and rows: what a forward of a denoiser is for.

A step of the sampler may need several forwards: two for a second-order sampler, one more where
guidance runs the empty prompt by itself, or the prompt once more through a perturbed model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .denoising import Prompts
from .listening import Encoding, same

TIMES = ("timestep", "timesteps", "t", "timestep_ratio", "decoder_noise_time")


@dataclass
class Passes:
    """Where the forwards of one denoiser stand.

    Attributes:
        run, step, timestep: as in `Denoising`.
        rows: which rows the prompt drives; None where that cannot be told.
        prompts: what the pipeline encoded for this run.
    """

    pipeline: Any = None
    run: int = -1
    step: int = -1
    timestep: float = 0.0
    rows: Tensor | None = None
    prompts: Prompts | None = None
    _schedule: Any = None
    _encoded: list[Encoding] = field(default_factory=list)
    _base: Encoding | None = None
    _mark: Any = None
    _driven: Any = None  # the latents of the prompt's own forward since the sampler moved
    _used: bool = False  # whether a forward came since the last encoding
    _anew: bool = False  # whether the pipeline encoded a prompt since the last forward
    _judged: tuple[list[Tensor], tuple[Tensor, Tensor] | None] | None = None

    def tell(self, encoding: Encoding) -> None:
        """The pipeline encoded a prompt."""
        if self._used:
            self._encoded.clear()
        self._used, self._anew = False, True
        self._encoded.append(encoding)
        del self._encoded[:-8]

    def begin(self, given: dict[str, Any], sample: Any, text: Any) -> None:
        """A forward begins, with these inputs."""
        scheduler = getattr(self.pipeline, "scheduler", None)
        schedule = getattr(scheduler, "timesteps", None)
        if self.run < 0 or self._anew or schedule is not self._schedule:
            # another prompt, or set_timesteps made a new tensor: the pipeline begins anew
            self._schedule, self._anew = schedule, False
            self.run, self.step, self.prompts = self.run + 1, -1, None
            self._base = self._mark = self._judged = None
        time = next((given[n] for n in TIMES if given.get(n) is not None), 0.0)
        time = float(torch.as_tensor(time).flatten()[0])
        # what the sampler changes when it is given a prediction
        mark = (time, *(getattr(scheduler, n, None) for n in ("_step_index", "counter")))
        moved = mark != self._mark or scheduler is None
        if moved:
            first = getattr(scheduler, "state_in_first_order", None)
            # a corrector of a second-order sampler; others of a step stand at its time
            same_step = time == self.timestep if first is None else not first
            self.step += self.step < 0 or scheduler is None or not same_step
            self._driven = None
        self._mark, self.timestep, self._used = mark, time, True
        rows = _listed(text)
        count = len(sample)
        self.rows = self._rows(sample, rows, count)
        if self.rows is not None and self._driven is not None and _overlap(self._driven, sample):
            # the same latents once more: without the prompt, or perturbed
            self.rows = torch.zeros(count, dtype=torch.bool)
        elif scheduler is not None and (self.rows is None or bool(self.rows.any())):
            self._driven = sample

    def _rows(self, sample: Any, text: list[Tensor], count: int) -> Tensor | None:
        known = self._matched(text, count)
        every = torch.ones(count, dtype=torch.bool)
        if known is not None:
            prompted, unprompted = known
            if bool((prompted & ~unprompted).any()) or not bool(unprompted.any()):
                # a copy behind the others is a perturbed one
                limit = len(self._base.rows) if self._base is not None else count
                return prompted & (prompted.cumsum(0) <= limit)
            if not bool((prompted & unprompted).any()):
                return prompted  # this forward is for the empty prompt alone
        elif self._encoded and self.prompts is None:
            first = self._encoded[0]
            if len(first.rows) in (count, count // 2):
                self.prompts = _joined(self._encoded, first)
        half = count // 2
        if count % 2 or not _alike(sample, half):
            return every
        if known is None:
            try:
                guided = self.pipeline.do_classifier_free_guidance
            except AttributeError:  # no pipeline, or one that was not called
                return None
            if not guided:
                return every
        every[:half] = False
        return every

    def _matched(self, text: list[Tensor], count: int) -> tuple[Tensor, Tensor] | None:
        """Which rows of the text are the prompt's encoding, and which the other's; None where the
        pipeline made something else of both.
        """
        if not text or len(text) % count or not self._encoded:
            return None
        text = text[:: len(text) // count]  # repeated for every frame of a video
        if self._judged is not None and _identical(self._judged[0], text):
            return self._judged[1]
        judged: tuple[Tensor, Tensor] | None = None
        for base in [self._base] if self._base is not None else self._encoded:
            others = [r for e in self._encoded for r in e.others]
            others += [r for e in self._encoded if e is not base for r in e.rows]
            prompted, unprompted = _among(text, base.rows), _among(text, others)
            if bool(prompted.any()):
                if self._base is None:
                    self._base, self.prompts = base, _joined(self._encoded, base)
                judged = prompted, unprompted
                break
            if self._base is not None and bool(unprompted.all()):
                judged = prompted, unprompted
        self._judged = text, judged
        return judged


def _joined(encoded: list[Encoding], base: Encoding) -> Prompts:
    """The prompts of an encoding, with the readers of others that encode the same prompts."""
    prompts = base.prompts
    if prompts.texts is None:  # given ready: perhaps encoded before, within this session
        twins = [e for e in encoded if e.prompts.texts and _equal(e.rows, base.rows)]
        return twins[-1].prompts if twins else prompts
    readers = list(prompts.readers)
    for other in encoded:
        heard = [r.tokenizer for r in readers]
        new = [r for r in other.prompts.readers if all(r.tokenizer is not t for t in heard)]
        if heard and new and other.prompts.texts == prompts.texts:
            shift = max(r.first + r.width for r in readers)
            readers += [replace(r, first=r.first + shift) for r in new]
    return (
        replace(prompts, readers=tuple(readers)) if len(readers) > len(prompts.readers) else prompts
    )


def _equal(rows: list[Tensor], others: list[Tensor]) -> bool:
    return len(rows) == len(others) and all(same(a, b) for a, b in zip(rows, others))


def _among(rows: list[Tensor], known: list[Tensor]) -> Tensor:
    """Which rows are one of the known encodings."""
    return torch.tensor([any(same(row, r) for r in known) for row in rows])


def _listed(text: Any) -> list[Tensor]:
    """`[tokens, dim]` of every row."""
    if isinstance(text, Tensor):
        return list(text) if text.dim() == 3 else []
    return [t for t in text if isinstance(t, Tensor)] if isinstance(text, (list, tuple)) else []


def _identical(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether these are views of the same memory; reading values would synchronise the GPU."""
    return len(left) == len(right) and all(_stamp(a) == _stamp(b) for a, b in zip(left, right))


def _stamp(row: Tensor) -> tuple[Any, ...]:
    return row.data_ptr(), row.shape, row.is_inference() or row._version


def _overlap(left: Any, right: Any) -> bool:
    """Whether the last rows of both are the same."""
    count = min(len(left), len(right))
    return all(
        a.shape == b.shape and torch.equal(a, b)
        for a, b in zip(list(left)[-count:], list(right)[-count:])
    )


def _alike(sample: Any, half: int) -> bool:
    """Whether the second half of the batch repeats the first."""
    if isinstance(sample, Tensor):
        return torch.equal(sample[:half], sample[half:])
    return all(torch.equal(a, b) for a, b in zip(sample[:half], sample[half:]))
