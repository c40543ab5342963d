"""StableSemantics: data of prompts, captions, images, and one attention map for each noun chunk.

Paper: "StableSemantics: A Synthetic Language-Vision Dataset of Semantic Representations in
Naturalistic Images", Zawar et al., 2024, arXiv 2406.13735.

Every caption is drawn several times; while a stock pipeline draws, the attention of the image on
each noun chunk is summed over steps, resized, clamped at 0 and averaged over layers and heads (the
order of DAAM). Rows go into Parquet shards, each whole or not there, with checksums; a build that
was stopped goes on and ends with the same bytes.

Deviations. The paper's body was not at hand. Ours (reconstructed): the division by the number of
steps, a word's pieces averaged before its chunk's words (`average="tokens"` averages all pieces
alike, as DAAM does), determiners left out of the map, the size of the stored map. Rewriting prompts
to captions is a function of the user's: without one, a prompt cleaned of its markup is the caption.
Maps are attribution, not segmentation.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Session, Site
from regard.reach.denoising import Prompts, columns, denoising
from regard.reach.expressions import words
from regard.reach.phrases import PARSERS, Parser, noun_phrases

RESIZE = ("bicubic", "bilinear", "area")
_NEEDS = 'data sets need the library datasets: pip install "regard[data]"'


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


@dataclass(frozen=True)
class Recipe:
    """What a build is made of; the same recipe and pipeline give the same rows.

    Args:
        images: of each caption. batch: how many are drawn together.
        steps, guidance: of the pipeline; its own when None.
        grid: side of the stored maps, the longer one where images are not square.
        resize: "bicubic", with what falls below 0 clamped, as in DAAM; "bilinear" or "area".
        finest: average the layers of the finest resolution alone, not all.
        average: a chunk is the mean over its "words", each that over its pieces, or all "tokens".
        parser: who finds noun chunks: "spacy", "constituency" or "rules".
        captions: captions in one shard.
        seed: moves all seeds together.

    Raises:
        InputError: a setting out of range.
    """

    images: int = 10
    batch: int = 5
    steps: int | None = None
    guidance: float | None = None
    grid: int = 64
    resize: str = "bicubic"
    finest: bool = False
    average: str = "words"
    parser: str = "spacy"
    captions: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("images", "batch", "grid", "captions"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.resize not in RESIZE:
            raise InputError(f"resize is one of {RESIZE}, not {self.resize!r}")
        if self.average not in ("words", "tokens"):
            raise InputError(f"average is 'words' or 'tokens', not {self.average!r}")
        if self.parser not in PARSERS:
            raise InputError(f"parser is one of {PARSERS}, not {self.parser!r}")


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
    found: dict[str, Prompt] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line.startswith("{"):
            try:
                given = json.loads(line)
                own = Prompt(
                    str(given["prompt"]),
                    str(given.get("source", "")),
                    str(given.get("licence", "")),
                )
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f'line {number} of the prompts is damaged: write {{"prompt": "...", '
                    '"source": "...", "licence": "..."}'
                ) from None
        else:
            own = Prompt(line)
        if clean(own.text):
            found.setdefault(own.text, own)
    if not found:
        raise InputError("there is no prompt: write one a line")
    return list(found.values())


def chunks(caption: str, parser: str | Parser = "spacy") -> list[Chunk]:
    """Base noun phrases of a caption without pronouns, in order.

    >>> [(c.text, c.root) for c in chunks("a red cat, and it sits on the wall", "rules")]
    [('a red cat', 'cat'), ('the wall', 'wall')]
    """
    found = []
    for phrase in noun_phrases(caption, parser, least=1):
        content = [w for w in words(phrase.text) if w.content]
        if content:
            found.append(Chunk(phrase.text, content[-1].text.lower(), phrase.start, phrase.end))
    return found


def seed_of(caption: str, number: int, seed: int = 0) -> int:
    """The seed of the `number`-th image of a caption, whatever else is built.

    >>> seed_of("a cat", 0) == seed_of("a cat", 0) != seed_of("a cat", 1)
    True
    """
    mark = hashlib.sha256(json.dumps([caption, number, seed]).encode()).digest()
    return int.from_bytes(mark[:6], "big")


@dataclass(eq=False)
class ChunkMaps(Handler):
    """One map for each span of the prompt, exact in the order of DAAM: the sum over steps of each
    layer and head is resized and clamped before layers and heads are averaged.

    Rows that the prompt does not drive stay out; a run of the pipeline replaces the last. Memory:
    `[images, heads, spans, height, width]` a layer, whatever the steps.

    Args:
        spans: for each span the groups of characters to average: words, or one group of all. In a
            batch of several prompts each prompt has its own words at these characters.
        recipe: grid, resize, finest.

    >>> import regard
    >>> from regard.zoo.tiny_diffusion import tiny_pipeline
    >>> pipe, seen = tiny_pipeline("sd"), ChunkMaps([[(2, 5), (6, 12)]], Recipe(grid=16))
    >>> with regard.apply(pipe, seen):
    ...     _ = pipe("a red circle", num_inference_steps=2)
    >>> seen.maps().shape
    torch.Size([1, 1, 16, 16])
    """

    spans: Sequence[Sequence[tuple[int, int]]]
    recipe: Recipe
    cut: list[bool] = field(default_factory=list, init=False)
    tokens: list[list[int]] = field(default_factory=list, init=False)
    _sums: dict[int, tuple[Tensor, int]] = field(default_factory=dict, init=False, repr=False)
    _layout: tuple[Tensor, Tensor, Tensor] | None = field(default=None, init=False, repr=False)
    _run: int = field(default=-1, init=False, repr=False)

    def sites(self, sites: list[Site]) -> list[Site]:
        own = [s for s in sites if s.text]
        if not own:
            raise ReachError("maps of noun chunks need a diffusion pipeline that looks at text")
        self._clear()
        self._run = -1
        return own

    def _clear(self) -> None:
        self._sums, self._layout, self.cut, self.tokens = {}, None, [], []

    def after(self, call: Call, state: State) -> None:
        place = denoising(call)
        if place.run != self._run:
            self._clear()
            self._run = place.run
        if place.unknown or place.frames > 1 or len(place.grid or (0, 0)) > 2:
            raise ReachError(
                f"{place.unknown or 'this is a video'}: maps of noun chunks are of pictures"
            )
        rows = place.conditional
        if not len(rows) or place.grid is None or not self.spans:
            return
        keys, weights, _ = self._columns(call, len(rows))
        with torch.no_grad():
            share = columns(call, state, keys.to(call.k.device), rows).float()
            maps = (share @ weights[:, None].to(share)).transpose(2, 3).unflatten(3, place.grid)
        total, count = self._sums.get(call.site.index, (None, 0))
        self._sums[call.site.index] = (maps if total is None else total + maps, count + 1)

    def _columns(self, call: Call, elements: int) -> tuple[Tensor, Tensor, Tensor]:
        """Key columns of every image, their weights in every span, and which spans have any."""
        if self._layout is None:
            prompts = denoising(call).prompts
            if prompts is None:
                raise InputError("the prompt is not known: pass the whole pipeline")
            found = [
                [self._weights(prompts, element, groups) for groups in self.spans]
                for element in range(elements)
            ]
            known = torch.tensor([[bool(w) for w in own] for own in found])
            self.cut = (~known.any(0)).tolist()
            self.tokens = [sorted(w) for w in found[0]]
            columns = [sorted({c for w in own for c in w}) for own in found]
            width = max(1, *map(len, columns))
            keys = torch.zeros(elements, width, dtype=torch.long)
            weights = torch.zeros(elements, width, len(self.spans))
            for row, own in enumerate(columns):
                keys[row, : len(own)] = torch.tensor(own, dtype=torch.long)
                for n, column in enumerate(own):
                    weights[row, n] = torch.tensor([w.get(column, 0.0) for w in found[row]])
            self._layout = keys, weights, known
        return self._layout

    def _weights(
        self, prompts: Prompts, element: int, groups: Sequence[tuple[int, int]]
    ) -> dict[int, float]:
        """Column -> its share of a span; none where the text encoder cuts the span off."""
        try:
            pieces = [prompts.columns(element, a, b) for a, b in groups]
        except InputError:
            return {}
        if self.recipe.average == "tokens":
            pieces = [[c for p in pieces for c in p]]
        weights: dict[int, float] = {}
        for piece in pieces:
            for column in piece:
                weights[column] = weights.get(column, 0) + 1 / len(piece) / len(pieces)
        return weights

    def maps(self) -> Tensor:
        """`[images, spans, height, width]`, float32 on the CPU; spans that are cut off are NaN.

        Raises:
            RuntimeError: nothing was seen yet.
        """
        if not self._sums:
            raise RuntimeError("nothing was seen yet: run the pipeline inside the `with`")
        sizes = {tuple(t.shape[-2:]) for t, _ in self._sums.values()}
        height, width = max(sizes, key=lambda s: s[0] * s[1])
        wide = self.recipe.grid / max(height, width)
        size = (max(1, round(wide * height)), max(1, round(wide * width)))
        total, count = torch.zeros(()), 0
        for summed, steps in self._sums.values():
            if self.recipe.finest and tuple(summed.shape[-2:]) != (height, width):
                continue
            heads = summed.shape[1]
            fine = resized(summed.flatten(0, 2), size, self.recipe.resize).clamp_min(0)
            total = total + fine.unflatten(0, summed.shape[:3]).sum(1).cpu() / steps
            count += heads
        found = total / count
        assert self._layout is not None
        found[~self._layout[2]] = torch.nan
        return found


def resized(maps: Tensor, size: tuple[int, int], how: str = "bicubic") -> Tensor:
    """`[maps, height, width]` at another size."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    more = {} if how == "area" else {"align_corners": False}
    return F.interpolate(maps[:, None], size, mode=how, **more)[:, 0]


def described(values: Tensor) -> dict[str, float]:
    """Least, greatest, sum, centroid and second moments (shares of width and height) of a map.

    >>> at = described(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    >>> at["x"], at["y"], at["xx"]
    (0.75, 0.75, 0.0)
    """
    m = values.double()
    height, width = m.shape
    x = (torch.arange(width, dtype=torch.double) + 0.5) / width
    y = (torch.arange(height, dtype=torch.double) + 0.5) / height
    total = float(m.sum())
    share = m / total if total > 0 else torch.full_like(m, 1 / m.numel())
    cx, cy = float(share.sum(0) @ x), float(share.sum(1) @ y)
    return {
        "least": float(m.min()),
        "greatest": float(m.max()),
        "sum": total,
        "x": cx,
        "y": cy,
        "xx": float(share.sum(0) @ (x - cx) ** 2),
        "yy": float(share.sum(1) @ (y - cy) ** 2),
        "xy": float((y - cy) @ share @ (x - cx)),
    }


def features() -> Any:
    """The columns of a build, as `datasets.Features`.

    Raises:
        ImportError: datasets is not installed.
    """
    try:
        from datasets import Features, Image, List, Value
    except ImportError:
        raise ImportError(_NEEDS) from None
    stats = dict.fromkeys(("least", "greatest", "sum", "x", "y", "xx", "yy", "xy"))
    return Features(
        {
            "prompt": Value("string"),
            "caption": Value("string"),
            "source": Value("string"),
            "licence": Value("string"),
            "number": Value("int32"),
            "seed": Value("int64"),
            "image": Image(),
            "chunks": List(
                {
                    "text": Value("string"),
                    "root": Value("string"),
                    "start": Value("int32"),
                    "end": Value("int32"),
                    "tokens": List(Value("int32")),
                    "cut": Value("bool"),
                    "map": List(List(Value("float16"))),
                    **{name: Value("float32") for name in stats},
                }
            ),
        }
    )


def rows(
    pipe: Any,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    rewrite: Callable[[str], str] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """The rows of some prompts: every image with the maps of its caption's chunks."""
    made = []
    for prompt in prompts:
        caption = clean(prompt.text)
        caption = rewrite(caption).strip() if rewrite is not None else caption
        found = chunks(caption, recipe.parser)
        for first in range(0, recipe.images, recipe.batch):
            numbers = range(first, min(first + recipe.batch, recipe.images))
            images, maps, seen = draw(pipe, caption, found, numbers, recipe)
            for n, number in enumerate(numbers):
                made.append(
                    {
                        "prompt": prompt.text,
                        "caption": caption,
                        "source": prompt.source,
                        "licence": prompt.licence,
                        "number": number,
                        "seed": seed_of(caption, number, recipe.seed),
                        "image": {"bytes": _png(images[n]), "path": None},
                        "chunks": [
                            _chunk(c, maps[n, at], seen.cut[at], seen.tokens[at])
                            for at, c in enumerate(found)
                        ],
                    }
                )
        advance()
    return made


def draw(
    pipe: Any, caption: str, found: Sequence[Chunk], numbers: Iterable[int], recipe: Recipe
) -> tuple[list[Any], Tensor, ChunkMaps]:
    """Images of a caption, each from its own seed, and the maps `[images, chunks, grid, grid]`."""
    spans = []
    for chunk in found:
        own = [w for w in words(chunk.text) if w.content] or words(chunk.text)
        spans.append([(chunk.start + w.start, chunk.start + w.end) for w in own])
    seen = ChunkMaps(spans, recipe)
    noise = [
        torch.Generator().manual_seed(seed_of(caption, number, recipe.seed)) for number in numbers
    ]
    call: dict[str, Any] = {}
    if recipe.steps is not None:
        call["num_inference_steps"] = recipe.steps
    if recipe.guidance is not None:
        call["guidance_scale"] = recipe.guidance
    with Session(pipe, [seen]), torch.no_grad():
        images = pipe([caption] * len(noise), generator=noise, **call).images
    maps = seen.maps() if spans else torch.zeros(len(noise), 0, 1, 1)
    return images, maps, seen


def _chunk(chunk: Chunk, values: Tensor, cut: bool, tokens: list[int]) -> dict[str, Any]:
    sound = not cut and bool(torch.isfinite(values).all())
    empty = dict.fromkeys(("least", "greatest", "sum", "x", "y", "xx", "yy", "xy"))
    return {
        **asdict(chunk),
        "tokens": tokens,
        "cut": cut,
        "map": values.half().tolist() if sound else None,
        **(described(values) if sound else empty),
    }


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
