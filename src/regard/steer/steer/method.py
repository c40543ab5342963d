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
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from regard.errors import InputError

from .card import Settings
from .streams import Stream, room_of, vocabulary


class ContrastiveExpertGuidance(Settings, LogitsProcessor):
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
        gamma, eta, alpha, k, seed: see `Settings`.
        tokenizer: turns texts into ids.
        attention_mask: `[batch, prompt]`, of a left-padded prompt; the tokens that equal the
            expert's pad token at the left are taken as padding when None.

    A new prompt is noticed by itself and starts the streams anew; before one that begins with the
    last one, call `reset()`.

    >>> import regard
    >>> expert, base = regard.zoo.tiny("llama", seed=0), regard.zoo.tiny("llama", seed=1)
    >>> guide = regard.ContrastiveExpertGuidance(expert, base, [[5, 6, 7]], gamma=0.5, eta=0.2)
    >>> out = expert.generate(torch.tensor([[1, 9, 8]]), logits_processor=[guide], max_new_tokens=4,
    ...                       do_sample=True, eos_token_id=None)
    >>> out.shape, guide.report()["steps"]
    (torch.Size([1, 7]), 4)

    Raises:
        InputError: a setting out of range, no negatives with eta > 0, different
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
        Settings.__init__(self, gamma, eta, alpha, k, seed)
        if gamma and base is None and not hasattr(expert, "disable_adapter"):
            raise InputError(
                "gamma > 0 needs the model the expert was tuned from: give base, or a PeftModel"
            )
        for what, model in {"expert": expert, "base": base}.items():
            if model is not None and getattr(model.config, "is_encoder_decoder", False):
                raise InputError(f"the {what} is an encoder-decoder: name a causal language model")
        sizes = [vocabulary(m) for m in (expert, base) if m is not None]
        if len(set(sizes)) > 1:
            raise InputError(
                f"the expert has {sizes[0]} tokens and the base {sizes[1]}: both need the same "
                "vocabulary (embeddings that were resized for a pad token count too)"
            )
        self.expert, self.base = expert, base
        self.attention_mask = attention_mask
        self.negatives: list[list[int]] = []
        if eta:
            self.negatives = _negatives(negatives, tokenizer, k, random.Random(seed))
            room, longest = room_of(expert), max(map(len, self.negatives))
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
        self._streams: dict[str, Stream] = {}
        self.shift: list[Tensor] = []  # mean |s - f(c)| of every step, `[batch]`

    def report(self) -> dict[str, Any]:
        """Plain data of the last run: steps, and by row the mean change of log-probabilities."""
        steps = len(self.shift)
        return {"steps": steps, "shift": torch.stack(self.shift).mean(0).tolist() if steps else []}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided log-probabilities `[batch, vocabulary]`; what was -inf in `scores` stays so."""
        if not (self.gamma or self.eta or self.alpha):
            return scores
        new = self._follow(input_ids)
        if scores.shape[1] != vocabulary(self.expert):
            raise InputError(
                f"the scores have {scores.shape[1]} tokens and the expert "
                f"{vocabulary(self.expert)}: generate with the expert itself"
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
            stream = Stream(model, off)
            rows, real = ids, self._prompt_mask(ids)
        else:
            stream = Stream(self.expert, nullcontext)
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
        tokens = list(tokenizer(" ".join(texts))["input_ids"])
        if not tokens:
            raise InputError("the negatives hold no token: give some words, or eta=0")
        ids.append(tokens)
    return ids
