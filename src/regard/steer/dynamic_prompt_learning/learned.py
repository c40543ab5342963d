"""What was learnt of a picture: its inversion, and the nouns and empty prompts of each step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from regard.parts.diffusion.encodings import encode_with
from regard.parts.diffusion.inversion import Inverted, replay
from regard.parts.diffusion.latents import decode
from regard.parts.diffusion.prompt_to_prompt import align, token_ids


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
        flat = [c for columns in self.columns for c in columns]
        pairs = align(token_ids(pipe.tokenizer, source), token_ids(pipe.tokenizer, prompt))
        at = [(m, flat.index(n)) for m, n in enumerate(pairs) if n in flat]
        with torch.no_grad():
            return [
                encode_with(pipe, prompt, [m for m, _ in at], rows[[r for _, r in at]])
                for rows in self.tokens
            ]

    def reconstruct(self, pipe: Any) -> Any:
        """The picture as it is sampled again, as a PIL image."""
        noise = self.inverted.latents[-1]
        out = replay(pipe, noise, self.embeds(pipe), self.nulls, guidance=self.guidance)
        return decode(pipe, out)[0]

    def report(self) -> dict[str, Any]:
        """Plain data: the nouns, the cosines between their maps and with the background before and
        after, and the losses of each step.
        """
        leakage = {"before": self._overlap(self.before), "after": self._overlap(self.maps)}
        return {"nouns": self.nouns, "leakage": leakage, "losses": self.losses}

    def _overlap(self, maps: Tensor) -> dict[str, dict[str, float]]:
        flat, ground = maps.flatten(1), self.ground.to(maps).flatten()

        def cosine(a: Tensor, b: Tensor) -> float:
            return float(cosine_similarity(a, b, dim=0))

        named = list(zip(self.nouns, flat))
        return {
            "pairs": {
                f"{a} / {b}": cosine(one, two) for (a, one), (b, two) in combinations(named, 2)
            },
            "background": {noun: cosine(one, ground) for noun, one in named},
        }
