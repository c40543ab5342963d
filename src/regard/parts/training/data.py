"""Texts as blocks of token ids, and a recall task on the same vocabulary."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError, nearest

from .settings import BYTES

PAD, FIRST = "<pad>", "<s>"
EVERY = 20  # one block in so many is for validation
PAIRS = 8  # of a recall block, or a quarter of its tokens
_KEYS, _VALUES = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass
class Blocks:
    """Token ids `[blocks, tokens]`; `answers` marks the tokens of a recall block that can be
    known, elsewhere nothing.
    """

    train: Tensor
    valid: Tensor
    recall: Tensor
    answers: Tensor
    tokenizer: Any


def texts(given: str) -> list[str]:
    """Documents by name: "novel" (shipped), "python" (the sources of Python's own library), a text
    file, a folder of them, or "hub:NAME" or "hub:NAME/CONFIG", a data set with a column "text";
    several joined by commas.

    Raises:
        InputError: nothing there, or no text in it.
    """
    found: list[str] = []
    for name in filter(None, (n.strip() for n in given.split(","))):
        found += _texts(name)
    if not any(t.strip() for t in found):
        raise InputError(f"there is no text in {given!r}: name text files, novel or python")
    return found


def _texts(name: str) -> list[str]:
    if name == "novel":
        from regard import zoo

        return [zoo.text("northanger-abbey")]
    if name == "python":
        folder = Path(sysconfig.get_paths()["stdlib"])
        return [_read(f) for f in sorted(folder.glob("*.py"))]
    if name.startswith("hub:"):
        return _hub(name.removeprefix("hub:"))
    path = Path(name).expanduser()
    if path.is_file():
        return [_read(path)]
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (".txt", ".md", ".py"))
        if not files:
            raise InputError(f"{name} holds no .txt, .md or .py files")
        return [_read(f) for f in files]
    raise InputError(f"there is no file or folder {name!r}.{nearest(name, ['novel', 'python'])}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it, or leave it out") from None


def _hub(name: str) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError("a set of the hub needs datasets: pip install 'regard[data]'") from None
    place, _, part = name.partition(":")
    rows = load_dataset(place, part or None, split="train")
    if "text" not in rows.column_names:
        raise InputError(f"{place} has no column 'text', only {', '.join(rows.column_names)}")
    return list(rows["text"])


def tokenizer(documents: Iterable[str], size: int) -> Any:
    """A byte-level BPE tokenizer of so many tokens; 258 is bytes alone, with padding and a first
    token beside them.

    >>> ids = tokenizer([], 258)("né")["input_ids"]
    >>> len(ids)
    3
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if size < BYTES + 2:
        raise InputError(f"a vocabulary holds at least {BYTES + 2} tokens, not {size}")
    plain: Any = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    plain.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, FIRST],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    plain.train_from_iterator(documents if size > BYTES + 2 else [], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token=PAD, bos_token=FIRST)


def blocks(
    given: str,
    length: int,
    *,
    vocabulary: int = BYTES + 2,
    limit: int | None = None,
    recall: float = 0.0,
    least: int = 1,
    seed: int = 0,
) -> Blocks:
    """Texts cut into blocks of `length` tokens, documents joined end to end, one block in twenty
    for validation.

    Args:
        limit: use so many tokens of the texts; all when None.
        recall: share of training blocks that are recall tasks.
        least: blocks that training needs at least.

    Raises:
        InputError: data of fewer tokens than that.
    """
    documents = texts(given)
    tokens = tokenizer(documents, vocabulary)
    pieces = tokens(documents, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for piece in pieces for i in piece][:limit], dtype=torch.long)
    count = len(ids) // length
    valid = max(1, count // EVERY)
    if count - valid < least:
        raise InputError(
            f"{given!r} holds {len(ids)} tokens, and training needs {(least + valid) * length}, a "
            f"batch and a validation block of {length} tokens: give more text, or a smaller batch"
        )
    cut = ids[: count * length].view(count, length)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.linspace(0, count - 1, valid + 2).long()[1:-1]] = True
    train = cut[~chosen]
    held, answers = recalls(tokens, 64, length, seed + 1_000_003)
    if recall:
        added, _ = recalls(tokens, int(len(train) * recall / (1 - recall)) + 1, length, seed)
        train = torch.cat([train, added])
    return Blocks(train, cut[chosen], held, answers, tokens)


def recalls(tokens: Any, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Blocks of key-value pairs that come back in random order, and which tokens can be known: the
    values of keys that stood before.
    """
    pairs = min(PAIRS, length // 4)
    rng = torch.Generator().manual_seed(seed)
    keys = torch.tensor(tokens.convert_tokens_to_ids(list(_KEYS)))
    values = torch.tensor(tokens.convert_tokens_to_ids(list(_VALUES)))
    ids = torch.empty(count, length, dtype=torch.long)
    for row in range(count):
        own = keys[torch.randperm(len(keys), generator=rng)[:pairs]]
        their = values[torch.randint(len(values), (pairs,), generator=rng)]
        order = [torch.arange(pairs)]
        while len(order) * 2 * pairs < length:
            order.append(torch.randperm(pairs, generator=rng))
        at = torch.cat(order)
        ids[row] = torch.stack([own[at], their[at]], -1).flatten()[:length]
    answers = torch.zeros(length, dtype=torch.bool)
    answers[2 * pairs + 1 :: 2] = True
    return ids, answers.expand(count, -1)


@dataclass(frozen=True)
class Switches:
    """What is done to every block, in training and in evaluation.

    Attributes:
        fixed: position, from 1, that always holds the first token of the vocabulary's text; 0 for
            none.
        random: positions `[a, b)`, from 0, that hold random tokens; empty for none.
    """

    fixed: int = 0
    random: tuple[int, int] = (0, 0)

    def __call__(self, ids: Tensor, tokens: Any, rng: torch.Generator) -> Tensor:
        ids = ids.clone()
        a, b = self.random
        if b > a:
            ids[..., a:b] = torch.randint(2, len(tokens), ids[..., a:b].shape, generator=rng)
        if self.fixed:
            ids[..., self.fixed - 1] = tokens.bos_token_id
        return ids
