"""STEER: sample with a stronger expert, away from given examples, no weight changed.

Paper: "Steering Language Generation: Harnessing Contrastive Expert Guidance and Negative Prompting
for Coherent and Diverse Synthetic Data Generation", O'Neill et al., 2023, arXiv 2308.07645.

At each step, with f the fine-tuned expert, b the base, c the prompt, n the negative examples:

    s = f(c) + gamma * (f(c) - b(c)) - eta * f(n)        log-probabilities of the next token

Deviations:
- Every row of a batch has streams of its own; the released code scores all rows by row 0.
- The streams are cached: at most two decode steps a token beside the model's own. The released
  code runs the models over the whole text at every token.
- The released code takes base and expert apart; here the base may be the expert with its adapter
  switched off.
- `alpha`, the plausibility bar, is ours, and off unless asked for.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from regard.errors import InputError

Ids = Sequence[int]


class ContrastiveExpertGuidance(LogitsProcessor):
    """Contrastive expert guidance and negative prompting, as a logits processor of transformers.

    Pass it as `expert.generate(..., logits_processor=[guidance])`: the model that generates is the
    expert, its scores are the stream f(c). Sample; greedy decoding works too, beam search does not.

    Args:
        expert: the fine-tuned model that generates, or a `PeftModel`.
        base: the model it was tuned from, same vocabulary; None for a `PeftModel`, whose adapter is
            then switched off for that stream (one copy of the weights).
        negatives: examples to stay away from, texts (`tokenizer` needed) or lists of token ids: one
            list for all rows, joined by a space, or a list of such lists, one per row. Of texts at
            most `k` are drawn, with `seed`.
        gamma: strength of the expert's lead over the base, 0 or more.
        eta: strength of the push away from the negatives, 0 or more; near 1 text falls apart.
        tokenizer: turns texts into ids.
        attention_mask: `[batch, prompt]`, of a left-padded prompt; the tokens that equal the
            expert's pad token at the left are taken as padding when None.
        alpha: keep only tokens that f(c) finds at least `alpha` times as likely as its best; 0 off.

    A new prompt is noticed by itself and starts the streams anew; before one that begins with the
    last one, call `reset()`.

    >>> import regard
    >>> expert, base = regard.zoo.tiny("llama", seed=0), regard.zoo.tiny("llama", seed=1)
    >>> guide = ContrastiveExpertGuidance(expert, base, [[5, 6, 7]], gamma=0.5, eta=0.2)
    >>> out = expert.generate(torch.tensor([[1, 9, 8]]), logits_processor=[guide], max_new_tokens=4,
    ...                       do_sample=True, eos_token_id=None)
    >>> out.shape
    torch.Size([1, 7])

    Raises:
        InputError: gamma, eta or alpha out of range, no negatives with eta > 0, different
            vocabularies, negatives that leave no room in the context; later, reordered rows (beam
            search) and several tokens at once (assisted decoding).
    """

    def __init__(
        self,
        expert: Any,
        base: Any = None,
        negatives: Sequence[Any] | str = (),
        gamma: float = 0.5,
        eta: float = 0.2,
        *,
        tokenizer: Any = None,
        k: int = 10,
        alpha: float = 0.0,
        seed: int = 0,
        attention_mask: Tensor | None = None,
    ) -> None:
        for name, value in {"gamma": gamma, "eta": eta}.items():
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is a finite number, 0 or more, not {value}")
        if not 0 <= alpha < 1:
            raise InputError(f"alpha is a share of the best probability, from 0 to 1, not {alpha}")
        if k < 1:
            raise InputError(f"k, the number of negatives to draw, is at least 1, not {k}")
        if gamma and base is None and not hasattr(expert, "disable_adapter"):
            raise InputError(
                "gamma > 0 needs the model the expert was tuned from: give base, or a PeftModel"
            )
        for what, model in {"expert": expert, "base": base}.items():
            if model is not None and getattr(model.config, "is_encoder_decoder", False):
                raise InputError(f"the {what} is an encoder-decoder: name a causal language model")
        sizes = [_vocabulary(m) for m in (expert, base) if m is not None]
        if len(set(sizes)) > 1:
            raise InputError(
                f"the expert has {sizes[0]} tokens and the base {sizes[1]}: both need the same "
                "vocabulary (embeddings that were resized for a pad token count too)"
            )
        self.gamma, self.eta, self.alpha = float(gamma), float(eta), float(alpha)
        self.expert, self.base = expert, base
        self.attention_mask = attention_mask
        self.negatives: list[list[int]] = []
        if eta:
            self.negatives = _negatives(negatives, tokenizer, k, random.Random(seed))
            room, longest = _room(expert), max(map(len, self.negatives))
            if room is not None and longest >= room:
                raise InputError(
                    f"the negatives have {longest} tokens and the expert {room} positions: "
                    "give fewer (k) or shorter ones"
                )
            if max(map(max, self.negatives)) >= sizes[0]:
                raise InputError(f"a negative holds a token id beyond the {sizes[0]} known ones")
        self.reset()

    def reset(self) -> None:
        """Forget the sequence: the next call starts with a new prompt."""
        self._seen: Tensor | None = None
        self._prompt = 0
        self._streams: dict[str, _Stream] = {}
        self.shift: list[Tensor] = []  # mean |s - f(c)| of every step, `[batch]`

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided log-probabilities `[batch, vocabulary]`; what was -inf in `scores` stays so."""
        if not (self.gamma or self.eta or self.alpha):
            return scores
        new = self._follow(input_ids)
        if scores.shape[1] != _vocabulary(self.expert):
            raise InputError(
                f"the scores have {scores.shape[1]} tokens and the expert "
                f"{_vocabulary(self.expert)}: generate with the expert itself"
            )
        barred = scores == -math.inf
        f = scores.float().log_softmax(-1)
        finite = f.masked_fill(barred, 0.0)
        s = finite
        if self.gamma:
            s = s + self.gamma * (finite - self._stream("base", input_ids, new))
        if self.eta:
            s = s - self.eta * self._stream("negatives", input_ids, new)
        bar = math.log(self.alpha) if self.alpha else -math.inf
        dropped = barred | (f < f.amax(-1, keepdim=True) + bar)
        self.shift.append((s - finite).abs().masked_fill(dropped, 0.0).mean(-1))
        return s.masked_fill(dropped, -math.inf)

    def _follow(self, ids: Tensor) -> bool:
        """Whether this is a new prompt; refuses what the caches cannot follow."""
        seen, self._seen = self._seen, ids.clone()
        if seen is not None and seen.shape[0] == ids.shape[0]:
            one_more = ids.shape[1] == seen.shape[1] + 1
            if one_more and torch.equal(ids[:, :-1], seen):
                return False
            if one_more and all(bool((seen == row).all(1).any()) for row in ids[:, :-1]):
                self.reset()
                raise InputError(
                    "rows were reordered: the streams cannot follow beam search, use sampling"
                )
            # drafts that are taken back, or several tokens at once
            prompt = seen[:, : self._prompt]
            if ids.shape[1] > self._prompt and torch.equal(ids[:, : self._prompt], prompt):
                self.reset()
                raise InputError(
                    "the text did not go on by one token: assisted decoding is not possible; for "
                    "a new prompt that begins with the last one call reset() first"
                )
        self._prompt = ids.shape[1]
        self._streams, self.shift = {}, []
        return True

    def _stream(self, name: str, ids: Tensor, new: bool) -> Tensor:
        """Log-probabilities of the next token in one stream, `[batch, vocabulary]`, float32."""
        if not new:
            return self._streams[name].step(ids[:, -1:])
        if name == "base":
            model = self.expert if self.base is None else self.base
            off = self.expert.disable_adapter if self.base is None else nullcontext
            stream = _Stream(model, off)
            rows, real = ids, self._prompt_mask(ids)
        else:
            stream = _Stream(self.expert, nullcontext)
            rows, real = self._padded(ids)
        self._streams[name] = stream
        return stream.step(rows, real)

    def _prompt_mask(self, ids: Tensor) -> Tensor:
        mask = self.attention_mask
        if mask is not None:
            if mask.shape != ids.shape:
                raise InputError(
                    f"attention_mask is {tuple(mask.shape)}, the prompt {tuple(ids.shape)}: give "
                    "the mask of this prompt"
                )
            return mask.to(ids.device).bool()
        pad = getattr(self.expert.generation_config, "pad_token_id", None)
        pad = self.expert.config.get_text_config().pad_token_id if pad is None else pad
        if pad is None:
            return torch.ones_like(ids, dtype=torch.bool)
        return (ids != pad).cumsum(1) > 0

    def _padded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The negatives of every row, padded at the left."""
        rows, count = self.negatives, ids.shape[0]
        if len(rows) not in (1, count):
            # num_return_sequences repeats every prompt in place
            if count % len(rows):
                raise InputError(
                    f"there are negatives for {len(rows)} rows and {count} rows: give one list for "
                    "all, or one a row"
                )
            rows = [row for row in rows for _ in range(count // len(rows))]
        width = max(map(len, rows))
        padded = torch.zeros(len(rows), width, dtype=ids.dtype)
        real = torch.zeros(len(rows), width, dtype=torch.bool)
        for n, row in enumerate(rows):
            padded[n, width - len(row) :] = torch.tensor(row)
            real[n, width - len(row) :] = True
        shape = (count, width)
        return padded.expand(shape).to(ids.device), real.expand(shape).to(ids.device)


@dataclass
class _Stream:
    """One model reading one text per row, with a cache of its own."""

    model: Any
    around: Callable[[], Any]
    cache: Any = None
    real: Tensor | None = None

    def step(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            real = torch.ones_like(ids, dtype=torch.bool)
        self.real = real if self.real is None else torch.cat([self.real, real], 1)
        device = self.model.device
        where = (self.real.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        room = _room(self.model)
        if room is not None and int(where.max()) >= room:
            raise InputError(
                f"the text outgrew the {room} positions of the model: give shorter negatives or "
                "fewer new tokens"
            )
        with self.around():
            out = self.model(
                input_ids=ids.to(device),
                attention_mask=self.real.long().to(device),
                position_ids=where.to(device),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.cache = out.past_key_values
        return out.logits[:, -1].float().log_softmax(-1).to(ids.device)


@dataclass(frozen=True)
class Sample:
    """One sampled text, the places of its negatives in the pool, and how it was made."""

    text: str
    negatives: list[int]
    gamma: float
    eta: float
    seed: int
    shift: float  # mean |s - f(c)| over the steps and the vocabulary

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def sample(
    expert: Any,
    tokenizer: Any,
    prompt: str,
    pool: list[str],
    *,
    count: int,
    base: Any = None,
    gamma: float = 0.5,
    eta: float = 0.2,
    k: int = 10,
    alpha: float = 0.0,
    tokens: int = 40,
    batch: int = 1,
    seed: int = 0,
    start: int = 0,
    sampler: dict[str, Any] | None = None,
) -> Iterator[Sample]:
    """Samples one after another; each joins `pool` (in place) and may be a later one's negative.

    With `batch` > 1 the rows of a batch do not see each other, which is ours. Sampling is top-k 10
    at temperature 1, after the guidance; `sampler` says otherwise (`top_k`, `top_p`,
    `temperature`). Every batch has a seed of its own, so that a run can go on at `start`. The state
    of torch's random numbers is put back.
    """
    if eta and not pool:
        raise InputError("the pool of negatives is empty: give some, or eta=0")
    if eta and k > len(pool):
        warnings.warn(
            f"STEER: only {len(pool)} of k={k} negatives are there: all are used", stacklevel=2
        )
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(expert.device)
    chain = {"temperature": 1.0, "top_k": 10, "top_p": 1.0, **(sampler or {})}
    for first in range(start, count, batch):
        rows = min(batch, count - first)
        draw = random.Random(seed * 1_000_003 + first)
        size = min(k, len(pool)) if eta else 0
        picked = [draw.sample(range(len(pool)), size) for _ in range(rows)]
        texts = [[pool[n] for n in own] for own in picked]
        guide = ContrastiveExpertGuidance(
            expert, base, texts, gamma, eta, tokenizer=tokenizer, k=k, alpha=alpha
        )
        _check_room(expert, max(map(len, [*guide.negatives, ids[0]])), tokens)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed * 1_000_003 + first)
            out = expert.generate(
                input_ids=ids.expand(rows, -1),
                attention_mask=torch.ones_like(ids).expand(rows, -1),
                max_new_tokens=tokens,
                do_sample=True,
                renormalize_logits=True,
                logits_processor=[guide],
                pad_token_id=tokenizer.eos_token_id,
                **chain,
            )
        shift = torch.stack(guide.shift).mean(0).tolist() if guide.shift else [0.0] * rows
        for row, own, moved in zip(out[:, ids.shape[1] :], picked, shift):
            text = clean(tokenizer.decode(row, skip_special_tokens=True))
            if text:
                pool.append(text)
            yield Sample(text, own, gamma, eta, seed, moved)


def clean(text: str) -> str:
    """The first answer alone: nothing from a further "###" header on, no line breaks.

    >>> clean(" One line.\\n### Sentence: another")
    'One line.'
    """
    return " ".join(text.split("###")[0].split())


def _negatives(
    given: Sequence[Any] | str, tokenizer: Any, k: int, draw: random.Random
) -> list[list[int]]:
    """Token ids, one list a row of negatives."""
    items = [given] if isinstance(given, str) else list(given)
    if not items or any(len(item) == 0 for item in items):
        raise InputError("eta > 0 needs negatives: give examples to stay away from, or eta=0")
    if not isinstance(items[0], str) and isinstance(items[0][0], int):
        return [[int(n) for n in row] for row in items]
    if tokenizer is None:
        raise InputError("negatives given as texts need tokenizer=...")
    rows = [items] if isinstance(items[0], str) else items
    ids = []
    for row in rows:
        texts = list(row) if len(row) <= k else draw.sample(list(row), k)
        made = list(tokenizer(" ".join(texts))["input_ids"])
        if not made:
            raise InputError("the negatives hold no token: give some words, or eta=0")
        ids.append(made)
    return ids


def _check_room(model: Any, longest: int, tokens: int) -> None:
    """Refuse texts that would outgrow the model before anything is sampled."""
    room = _room(model)
    if room is not None and longest + tokens > room:
        raise InputError(
            f"prompt and negatives have up to {longest} tokens and a sample {tokens}, but the "
            f"expert has {room} positions: give fewer or shorter ones"
        )


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _room(model: Any) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
