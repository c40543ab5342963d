"""Structured Diffusion Guidance: every noun phrase keeps a text encoding of its own.

Paper: "Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis",
Feng et al., 2022, arXiv 2212.05032.

A text encoder mixes the words of a prompt, so the colour of one object leaks into another. Here
each noun phrase is encoded alone and put back into the encoding of the whole prompt; the values of
every cross-attention are the mean over these encodings, so layout stays and content is kept apart.
A causal encoder (CLIP's) reads a phrase at the very start alike alone and in the prompt, so that
phrase changes nothing.

Deviations:
- Base noun phrases come from spaCy by default; the paper's noun phrases of all depths come with
  `parser="constituency"`.
- The prompt goes in as it was typed: the released code lowers its case and drops a full stop, of
  which CLIP's tokenizer does the first by itself.
- Phrases are found by character offsets of the tokenizer, not by walking leaves and pieces
  together.
- In the conjunction mode the first keys come from the untouched prompt, as the paper has it; the
  released code overwrites them (`variant="released"`).
- Batches, several prompts and several images of a prompt work; the released code takes one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError
from regard.parts.text.phrases import Phrase, locate, noun_phrases
from regard.reach import Call, Handler, Site
from regard.reach.denoising import Prompts, denoising

from .card import Settings


@dataclass(frozen=True, eq=False)
class Structure:
    """The encodings of one prompt.

    Attributes:
        contexts: `[phrases + 1, tokens, dim]`: the prompt, then the prompt with one phrase
            replaced by its own encoding, for each phrase.
        joined: `[tokens, dim]`, all phrases replaced, in order, so inner ones lie on top.
        phrases: the phrases that were used.
        skipped: phrases behind the text encoder's limit.
    """

    contexts: Tensor
    joined: Tensor
    phrases: list[Phrase]
    skipped: list[Phrase]


class StructuredDiffusion(Settings, Handler):
    """Give each noun phrase of the prompt its own encoding inside cross-attention.

    Acts on the half of guidance that the prompt drives; the other half, self-attention, weights and
    seeds stay as they are. A prompt without a phrase of two words or more gives the plain image.

    The mean over values is exact and as cheap as the plain model, as values are linear in the
    context; `fused=False` is for values that are not (quantised, normalised). `used` holds the
    encodings of the last prompts, `report()` their phrases.

    >>> import regard
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe = tiny_pipeline("sd")
    >>> method = StructuredDiffusion(parser="rules")
    >>> with regard.apply(pipe, method):
    ...     image = pipe("a red circle and a blue square", num_inference_steps=2).images[0]
    >>> method.report()["prompts"][0]["phrases"]
    ['a red circle', 'a blue square']

    Raises:
        InputError: a setting out of range, a phrase that is not in the prompt, a pipeline that was
            given embeddings in place of a prompt, a denoiser without its pipeline.
        ReachError: a model without cross-attention to text.
        ImportError: the parser is not installed.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.phrases, str):
            raise InputError(f"phrases is a list: write [{self.phrases!r}]")
        if self.phrases and not any(p.strip() for p in self.phrases):
            raise InputError("the phrases are empty: name words of the prompt")
        if self.phrases is None and isinstance(self.parser, str):
            noun_phrases("a", self.parser)  # a parser that is not installed is refused here
        if self.variant == "released" and not self.conjunction:
            raise InputError('variant="released" needs conjunction=True')
        self.used: dict[str, Structure] = {}
        self._prompts: Prompts | None = None
        self._structures: list[Structure] = []
        self._index: Tensor | None = None
        self._chosen: tuple[list[int], list[Structure]] = ([], [])

    def sites(self, sites: list[Site]) -> list[Site]:
        cross = [s for s in sites if s.kind == "cross"]
        if not cross or any(s.kind == "joint" for s in sites):
            raise ReachError(
                "Structured Diffusion Guidance acts on cross-attention to text, and this model has "
                "none: use a Stable Diffusion 1, 2 or XL pipeline"
            )
        self.used.clear()
        self._prompts = self._index = None
        return cross

    def find(self, prompt: str) -> list[Phrase]:
        """The phrases of a prompt, without one that is the whole prompt."""
        if self.phrases is not None:
            return locate(self.phrases, prompt)
        whole = prompt.strip().rstrip(".").strip()
        return [p for p in noun_phrases(prompt, self.parser) if p.text != whole]

    def report(self) -> dict[str, Any]:
        """Plain data of the last run: by prompt, the phrases used and those cut off."""
        return {
            "prompts": [
                {
                    "prompt": prompt,
                    "phrases": [p.text for p in structure.phrases],
                    "skipped": [p.text for p in structure.skipped],
                }
                for prompt, structure in self.used.items()
            ]
        }

    def before(self, call: Call) -> Call | None:
        rows, of_row = self._rows(call)
        if not rows:
            return None
        index = torch.tensor(rows, device=call.v.device)
        if self.conjunction:
            contexts = torch.stack([s.joined for s in of_row])
        elif self.fused:
            contexts = torch.stack([s.contexts.mean(0) for s in of_row])
        else:
            return None
        values = call.v.clone()
        values[index] = self._project(call, contexts)[1]
        return call.change(v=values)

    def after(self, call: Call, state: State) -> State | None:
        if self.fused and not self.conjunction:
            return None
        rows, of_row = self._rows(call)
        if not rows:
            return None
        # the first term is the State of the call itself: K_0 with its values
        total = state.out.clone()
        count = torch.ones(len(total), device=total.device, dtype=total.dtype)
        if self.conjunction and self.variant == "released":
            contexts = torch.stack([s.joined for s in of_row])
            total = self._with(call, rows, contexts, keys=True)
        for n in range(1, max(len(s.contexts) for s in of_row)):
            having = [(r, s) for r, s in zip(rows, of_row) if n < len(s.contexts)]
            index = [r for r, _ in having]
            contexts = torch.stack([s.contexts[n] for _, s in having])
            out = self._with(call, index, contexts, keys=self.conjunction)
            total[index] += out[index]
            count[index] += 1
        return State(total / count[:, None, None, None], state.lse)

    def _with(self, call: Call, rows: list[int], contexts: Tensor, keys: bool) -> Tensor:
        """Output of the call with other keys, or other values, in some rows."""
        new = self._project(call, contexts)
        tensor = (call.k if keys else call.v).clone()
        tensor[rows] = new[0] if keys else new[1]
        return (call.change(k=tensor) if keys else call.change(v=tensor)).attend().out

    def _project(self, call: Call, contexts: Tensor) -> tuple[Tensor, Tensor]:
        project = denoising(call).project
        if project is None:
            raise ReachError(f"{call.site.name} has no text context to replace")
        return project(contexts)

    def _rows(self, call: Call) -> tuple[list[int], list[Structure]]:
        """Rows with a structure, and the structure of each."""
        place = denoising(call)
        if place.prompts is None:
            raise InputError(
                "the prompt is not known: pass the whole pipeline to regard.apply and give it the "
                "prompt as text"
            )
        if place.prompts is not self._prompts:
            self._prompts = place.prompts
            place.prompts.text(0)  # ready embeddings have no words
            texts = place.prompts.texts or []
            self._structures = [self._structure(place.prompts, n) for n in range(len(texts))]
            self.used = dict(zip(texts, self._structures))
            self._index = None
        if place.conditional is self._index:
            return self._chosen
        self._index = place.conditional
        rows, structures = [], []
        for element, row in enumerate(self._index.tolist()):
            structure = self._structures[element // place.prompts.images_per_prompt]
            if len(structure.contexts) > 1:
                rows.append(row)
                structures.append(structure)
        self._chosen = rows, structures
        return self._chosen

    def _structure(self, prompts: Prompts, number: int) -> Structure:
        """Encode the phrases of a prompt and put each in its place."""
        assert prompts.texts is not None
        text = prompts.texts[number]
        element = number * prompts.images_per_prompt
        whole = prompts.embeds[element]
        placed: list[tuple[Phrase, list[int]]] = []
        skipped: list[Phrase] = []
        # whoever names them: an inner phrase lies on top of the outer one that holds it
        ordered = sorted(self.find(text), key=lambda p: (p.start, -p.end))
        for phrase in ordered:
            try:
                placed.append((phrase, prompts.columns(element, phrase.start, phrase.end)))
            except InputError:
                skipped.append(phrase)
        if skipped:
            names = ", ".join(repr(p.text) for p in skipped)
            warnings.warn(
                f"StructuredDiffusion: {names} is beyond the text encoder's limit and is left out",
                stacklevel=2,
            )
        if not placed:
            if self.phrases is None or len(self.phrases):
                warnings.warn(
                    f"StructuredDiffusion: no noun phrase of two words or more in {text!r}, so its "
                    "image is the plain one",
                    stacklevel=2,
                )
            return Structure(whole[None], whole, [], skipped)
        alone = prompts.encode([p.text for p, _ in placed]).to(whole)
        contexts, joined = [whole], whole.clone()
        for (phrase, at), encoding in zip(placed, alone):
            if at != list(range(at[0], at[0] + len(at))) or 1 + len(at) > len(encoding):
                raise InputError(f"phrase {phrase.text!r} is not one run of tokens in the prompt")
            span, part = slice(at[0], at[0] + len(at)), encoding[1 : 1 + len(at)]
            one = whole.clone()
            one[span] = part
            joined[span] = part
            contexts.append(one)
        return Structure(torch.stack(contexts), joined, [p for p, _ in placed], skipped)
