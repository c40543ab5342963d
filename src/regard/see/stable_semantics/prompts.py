"""Prompts, their captions and noun chunks, and the seed of each image."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from regard.errors import InputError
from regard.parts.text.expressions import words
from regard.parts.text.phrases import Parser, noun_phrases


@dataclass(frozen=True)
class Prompt:
    """One prompt with where it comes from; rows without a licence are never to be published."""

    text: str
    source: str = ""
    licence: str = ""


@dataclass(frozen=True)
class Chunk:
    """A noun chunk of a caption, by characters; the root is its last word."""

    text: str
    root: str
    start: int
    end: int


def clean(prompt: str) -> str:
    """A prompt without the markup of image generators.

    >>> clean("(a red cat:1.3) on a [wall], <lora:ink:0.8> --ar 16:9 --v 5")
    'a red cat on a wall'
    """
    text = re.sub(r"<[^<>]*>", " ", prompt)
    text = re.sub(r"(?:^|\s)--?[a-z]+(?:\s+[\d:.]+)?(?=\s|$)", " ", text, flags=re.IGNORECASE)
    text = re.sub(r":-?\d+(?:\.\d+)?(?=\s*[)\]])", "", text)
    text = re.sub(r"[()\[\]{}]", "", text)
    text = re.sub(r"\s*,(?:\s*,)*\s*", ", ", " ".join(text.split()))
    return text.strip(" ,")


def read_prompts(lines: Iterable[str]) -> list[Prompt]:
    """Prompts of a text, one a line, or of JSON lines with "prompt", "source" and "licence".

    What repeats an earlier prompt, or says nothing once cleaned, is dropped.

    >>> [p.text for p in read_prompts(["a cat", "", "a cat", '{"prompt": "a dog"}', "--v 5"])]
    ['a cat', 'a dog']

    Raises:
        InputError: a damaged line, or no prompt at all.
    """
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line.startswith("{"):
            try:
                given = json.loads(line)
                prompt = Prompt(
                    str(given["prompt"]),
                    str(given.get("source", "")),
                    str(given.get("licence", "")),
                )
            except (ValueError, KeyError, TypeError, RecursionError):
                raise InputError(
                    f'line {number} of the prompts is damaged: write {{"prompt": "...", '
                    '"source": "...", "licence": "..."}'
                ) from None
        else:
            prompt = Prompt(line)
        if clean(prompt.text):
            prompts.setdefault(prompt.text, prompt)
    if not prompts:
        raise InputError("there is no prompt: write one a line")
    return list(prompts.values())


def chunks(caption: str, parser: str | Parser = "spacy") -> list[Chunk]:
    """Base noun phrases of a caption without pronouns, in order.

    >>> [(c.text, c.root) for c in chunks("a red cat, and it sits on the wall", "rules")]
    [('a red cat', 'cat'), ('the wall', 'wall')]
    """
    chunks = []
    for phrase in noun_phrases(caption, parser, least=1):
        content = [w for w in words(phrase.text) if w.content]
        if content:
            chunks.append(Chunk(phrase.text, content[-1].text.lower(), phrase.start, phrase.end))
    return chunks


def seed_of(caption: str, number: int, seed: int = 0) -> int:
    """The seed of the `number`-th image of a caption, whatever else is built.

    >>> seed_of("a cat", 0) == seed_of("a cat", 0) != seed_of("a cat", 1)
    True
    """
    mark = hashlib.sha256(json.dumps([caption, number, seed]).encode()).digest()
    return int.from_bytes(mark[:6], "big")
