"""Recruitment: a block is added when, and only when, it shortens the description of the data.

    DL = NLL of the validation texts in bits + k/2 log2 N + sum over blocks (log2 G + m log2 |V|)

with k free parameters (frozen ones cost nothing), N tokens, G blocks and m anchors that name a
block. A block is a set of tokens and a small map from hidden states to logits, which applies after
these tokens; it is fitted on other texts than those that judge it. Every accepted step saves more
than `eta` bits and DL is never below 0, so at most DL / eta blocks are recruited.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError

WINDOW = 6  # neighbours on either side that tell the topic of a token
LEAST = 8  # tokens with a high loss that a word needs to be looked at


@dataclass
class Block:
    """Tokens, and what is added to the logits after them: `up(down(hidden)) + bias`.

    Attributes:
        tokens: the anchors that name it.
        down, up, bias: `[width, rank]`, `[rank, vocabulary]`, `[vocabulary]`.
    """

    name: str
    tokens: list[int]
    down: Tensor
    up: Tensor
    bias: Tensor

    @property
    def parameters(self) -> int:
        return self.down.numel() + self.up.numel() + self.bias.numel()

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.down @ self.up + self.bias


@dataclass
class Shard:
    """Texts as a frozen model sees them: ids of the current and of the next token, hidden states
    `[tokens, width]` and logits.
    """

    current: Tensor
    target: Tensor
    hidden: Tensor
    logits: Tensor

    def loss_bits(self, blocks: Sequence[Block]) -> Tensor:
        """Bits of every token under the model with these blocks; the last that fits counts."""
        logits = self.logits.clone()
        for block in blocks:
            at = torch.isin(self.current, torch.tensor(block.tokens))
            logits[at] = self.logits[at] + block.logits(self.hidden[at])
        nats = torch.nn.functional.cross_entropy(logits, self.target, reduction="none")
        return nats / math.log(2)


@torch.no_grad()
def shard(model: Any, ids: Tensor) -> Shard:
    """A shard of texts `[rows, tokens]`."""
    if ids.numel() == 0 or ids.shape[1] < 2:
        raise InputError("recruitment judges blocks on validation texts: this shard is empty")
    out = model(ids, output_hidden_states=True)
    hidden = out.hidden_states[-1][:, :-1].flatten(0, 1).float()
    logits = out.logits[:, :-1].flatten(0, 1).float()
    return Shard(ids[:, :-1].flatten(), ids[:, 1:].flatten(), hidden, logits)


@dataclass(frozen=True)
class Length:
    """A description length in bits: of the data, and of what was added to the model."""

    data: float
    parameters: float
    names: float

    @property
    def total(self) -> float:
        return self.data + self.parameters + self.names


def description(valid: Shard, blocks: Sequence[Block], known: int = 0) -> Length:
    """DL of the validation texts under the model with these blocks; `known` further blocks have a
    name and no parameters.
    """
    count, vocabulary = len(valid.target), valid.logits.shape[1]
    free = sum(b.parameters for b in blocks)
    total = max(2, known + len(blocks))
    names = sum(math.log2(total) + len(b.tokens) * math.log2(vocabulary) for b in blocks)
    data = float(valid.loss_bits(blocks).double().sum())
    return Length(data, free / 2 * math.log2(count), names)


@dataclass
class Trace:
    """What was tried, in order: bits saved on the data, bits paid, and whether it was taken."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    start: float = 0.0
    end: float = 0.0
    blocks: list[Block] = field(default_factory=list)


def recruit(
    train: Shard,
    valid: Shard,
    *,
    known: Sequence[Sequence[int]] = (),
    eta: float = 10.0,
    anchors: int = 8,
    rank: int = 4,
    steps: int = 150,
    clusters: int = 5,
    most: int = 16,
    seed: int = 0,
) -> Trace:
    """Recruit blocks until no candidate pays, then join those that are one, and retire
    those that no longer pay.

    Args:
        train: texts that candidates are found and fitted on; valid: texts that judge them.
        known: tokens of the blocks that the model has already; candidates name others.
        eta: bits that a block must save beyond what it costs.

    Raises:
        InputError: the same texts for both, or an eta that is not above 0.
    """
    if eta <= 0:
        raise InputError(f"eta is above 0 bits, not {eta}: else recruitment never ends")
    same = train.current.shape == valid.current.shape and torch.equal(train.current, valid.current)
    if same:
        raise InputError("a block is judged on other texts than it is fitted on: give two shards")
    blocks: list[Block] = []
    taken = {t for tokens in known for t in tokens}
    now = description(valid, blocks, len(known))
    trace = Trace(start=now.total)
    refused: list[set[int]] = []
    for round_ in range(most):
        found = None
        for tokens in _candidates(train, blocks, taken, anchors, clusters, seed + round_):
            if any(len(r & set(tokens)) > len(tokens) / 2 for r in refused):
                continue
            new = _fit(train, tokens, rank, steps, f"recruited {len(blocks) + 1}", seed)
            then = description(valid, [*blocks, new], len(known))
            accepted = now.total - then.total > eta
            trace.rows.append(_row("recruit", tokens, now, then, accepted))
            if accepted:
                found = (new, then)
                break
            refused.append(set(tokens))
        if found is None:
            break
        blocks.append(found[0])
        taken |= set(found[0].tokens)
        now = found[1]
    blocks, now = _merged(train, valid, blocks, now, trace, len(known), anchors, rank, steps, seed)
    for block in list(blocks):
        rest = [b for b in blocks if b is not block]
        then = description(valid, rest, len(known))
        if then.total < now.total:
            trace.rows.append(_row("retire", block.tokens, now, then, True))
            blocks, now = rest, then
    trace.end, trace.blocks = now.total, blocks
    return trace


def _merged(
    train: Shard, valid: Shard, blocks: list[Block], now: Length, trace: Trace, known: int,
    anchors: int, rank: int, steps: int, seed: int,
) -> tuple[list[Block], Length]:  # fmt: skip
    """Two blocks that are one: joined while that shortens the description. A block has at most so
    many anchors; without that limit one map for all topics would always be the shorter one.
    """
    while True:
        for one, two in itertools.combinations(blocks, 2):
            tokens = sorted({*one.tokens, *two.tokens})
            if len(tokens) > anchors:
                continue
            both = _fit(train, tokens, rank, steps, one.name, seed)
            rest = [b for b in blocks if b is not one and b is not two]
            then = description(valid, [*rest, both], known)
            if then.total < now.total:
                trace.rows.append(_row("merge", tokens, now, then, True))
                blocks, now = [*rest, both], then
                break
        else:
            return blocks, now


def _row(
    what: str, tokens: Sequence[int], old: Length, new: Length, accepted: bool
) -> dict[str, Any]:
    return {
        "step": what,
        "tokens": sorted(tokens),
        "saved": old.data - new.data,
        "paid": new.parameters + new.names - old.parameters - old.names,
        "length": new.total if accepted else old.total,
        "accepted": accepted,
    }


def _fit(train: Shard, tokens: list[int], rank: int, steps: int, name: str, seed: int) -> Block:
    """A block for these tokens, the model and the other blocks frozen."""
    at = torch.isin(train.current, torch.tensor(tokens))
    hidden, logits, target = train.hidden[at], train.logits[at], train.target[at]
    make = torch.Generator().manual_seed(seed)
    width, vocabulary = hidden.shape[1], logits.shape[1]
    down = torch.randn(width, rank, generator=make) / width**0.5
    block = Block(name, tokens, down, torch.zeros(rank, vocabulary), torch.zeros(vocabulary))
    parts = [block.down, block.up, block.bias]
    for part in parts:
        part.requires_grad_(True)
    optimizer = torch.optim.Adam(parts, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(logits + block.logits(hidden), target)
        loss.backward()
        optimizer.step()
    for part in parts:
        part.requires_grad_(False)
    return block


def _candidates(
    train: Shard, blocks: list[Block], taken: set[int], anchors: int, clusters: int, seed: int
) -> list[list[int]]:
    """Sets of tokens: clusters of those with a high residual loss, of each the most informative
    ones; the set with the most bits first.
    """
    loss = train.loss_bits(blocks)
    free = ~torch.isin(train.current, torch.tensor(sorted(taken) or [-1]))
    loud = free & (loss >= loss[free].quantile(0.5)) if bool(free.any()) else free
    words, vocabulary = train.current[loud], train.logits.shape[1]
    count = torch.bincount(words, minlength=vocabulary)
    kinds = (count >= LEAST).nonzero()[:, 0]
    if len(kinds) < 2:
        return []
    # what stands around a token tells its topic: means of the states beside it, by token
    kernel = torch.ones(1, 1, 2 * WINDOW + 1)
    kernel[..., WINDOW] = 0
    around = torch.nn.functional.conv1d(train.hidden.T[:, None], kernel, padding=WINDOW)[:, 0].T
    mean = torch.zeros(vocabulary, around.shape[1]).index_add_(0, words, around[loud])
    mean = (mean / count[:, None].clamp_min(1))[kinds]
    mean = torch.nn.functional.normalize(mean - mean.mean(0), dim=1)
    clusters = min(clusters, len(kinds))
    labels = k_means(mean, clusters, seed)
    centres = torch.stack([mean[labels == c].mean(0) for c in range(clusters)])
    near = torch.nn.functional.normalize(around[loud] - around[loud].mean(0), dim=1)
    nearest = torch.cdist(near, centres).argmin(1)
    bits, floor = loss[loud], 2 * math.log2(len(words)) / len(words)
    found = []
    for cluster in range(clusters):
        tokens = kinds[labels == cluster]
        information = mutual_information(words, nearest == cluster, vocabulary)[tokens]
        order = information.argsort(descending=True, stable=True)[:anchors]
        chosen = tokens[order[information[order] > floor]].tolist()
        if chosen:
            residual = float(bits[torch.isin(words, torch.tensor(chosen))].sum())
            found.append((residual, sorted(chosen)))
    return [tokens for _, tokens in sorted(found, key=lambda f: -f[0])]


def mutual_information(words: Tensor, label: Tensor, vocabulary: int) -> Tensor:
    """Bits that the presence of each token tells about a label, with 1/2 added to every count.

    >>> words = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    >>> told = mutual_information(words, words == 0, 2)
    >>> bool(told[0] > 0.4) and torch.allclose(told[0], told[1])
    True
    """
    total = len(words)
    inside = torch.bincount(words[label], minlength=vocabulary).double()
    both = torch.bincount(words, minlength=vocabulary).double()
    members = float(label.sum())
    cells = torch.stack(
        [inside, both - inside, members - inside, total - members - (both - inside)]
    )
    p = (cells + 0.5) / (total + 2)
    rows = torch.stack([p[0] + p[1], p[0] + p[1], p[2] + p[3], p[2] + p[3]])
    columns = torch.stack([p[0] + p[2], p[1] + p[3], p[0] + p[2], p[1] + p[3]])
    return (p * (p / (rows * columns)).log2()).sum(0)


def k_means(x: Tensor, count: int, seed: int, rounds: int = 25, starts: int = 8) -> Tensor:
    """Cluster of each row: the tightest of several starts from far-apart rows.

    >>> k_means(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), 2, 0).unique().numel()
    2
    """
    make = torch.Generator().manual_seed(seed)
    best: tuple[float, Tensor] | None = None
    for _ in range(starts):
        centres = x[torch.randint(len(x), (1,), generator=make)]
        for _ in range(count - 1):
            far = torch.cdist(x, centres).amin(1).square()
            centres = torch.cat([centres, x[torch.multinomial(far + 1e-12, 1, generator=make)]])
        for _ in range(rounds):
            away, labels = torch.cdist(x, centres).min(1)
            own = [x[labels == c] for c in range(count)]
            centres = torch.stack([o.mean(0) if len(o) else c for o, c in zip(own, centres)])
        spread = float(away.square().sum())
        if best is None or spread < best[0]:
            best = (spread, labels)
    assert best is not None
    return best[1]
