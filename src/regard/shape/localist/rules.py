"""Rules: which blocks the tokens of a request look at, read from YAML and changed while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError, nearest

FREE = "free"  # block 0: what lies outside of every block
ALL = "all"
LONGEST = 2**20  # bytes of a file of rules
_KEYS = ("name", "when", "allow", "deny", "weight")
_WHEN = ("queries", "span", "metadata", "tokens")


@dataclass(frozen=True)
class Rule:
    """Blocks that some tokens may, or must not, look at.

    Attributes:
        allow: the blocks that they look at, beside block 0; every block where empty.
        deny: blocks that they must not look at; stronger than any `allow`.
        queries: which tokens: "free" (outside of every block), "all", or names of blocks.
        span: only tokens from the first position up to the second (None: to the end).
        metadata: only requests that carry these values.
        tokens: only requests that hold these token ids one after another.
        weight: share of the dial that applies to what is not relevant.

    >>> Rule.of({"name": "tenant a", "when": {"metadata": {"tenant": "a"}}, "allow": ["a"]})
    Rule(name='tenant a', allow=('a',), deny=(), queries='free', span=None, metadata={'tenant': \
'a'}, tokens=(), weight=1.0)
    """

    name: str
    allow: tuple[str, ...] = ()
    deny: tuple[str, ...] = ()
    queries: str | tuple[str, ...] = FREE
    span: tuple[int, int | None] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"a rule has a name, not {self.name!r}")
        where = f"rule {self.name!r}"
        if not self.allow and not self.deny:
            raise InputError(f"{where} neither allows nor denies a block: name one")
        both = sorted({*self.allow} & {*self.deny})
        if both:
            raise InputError(f"{where} both allows and denies block {both[0]!r}: leave one out")
        weight = self.weight
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight <= 1:
            raise InputError(f"{where}: weight is above 0 and at most 1, not {weight!r}")
        if self.span is not None:
            low, high = self.span
            if low < 0 or (high is not None and high <= low):
                raise InputError(f"{where}: span is [first, end) with 0 <= first < end")

    @classmethod
    def of(cls, given: Any) -> Rule:
        """A rule from plain data, as YAML holds it."""
        if isinstance(given, Rule):
            return given
        if not isinstance(given, Mapping):
            raise InputError(f"a rule is a mapping with {', '.join(_KEYS)}, not {str(given)[:60]}")
        _known(given, _KEYS, "a rule")
        when = given.get("when") or {}
        if not isinstance(when, Mapping):
            raise InputError(f"when: is a mapping with {', '.join(_WHEN)}, not {str(when)[:60]}")
        _known(when, _WHEN, "when:")
        name = given.get("name")
        queries = when.get("queries", FREE)
        span, metadata = when.get("span"), when.get("metadata") or {}
        if not isinstance(metadata, Mapping):
            raise InputError(f"rule {name!r}: metadata is a mapping, not {str(metadata)[:60]}")
        return cls(
            name,  # type: ignore[arg-type]
            _words(given.get("allow"), f"rule {name!r}: allow"),
            _words(given.get("deny"), f"rule {name!r}: deny"),
            queries if queries in (FREE, ALL) else _words(queries, f"rule {name!r}: queries"),
            None if span is None else _span(span, f"rule {name!r}: span"),
            dict(metadata),
            _numbers(when.get("tokens"), f"rule {name!r}: tokens"),
            given.get("weight", 1.0),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, which `of` reads."""
        when: dict[str, Any] = {
            "queries": self.queries if isinstance(self.queries, str) else list(self.queries)
        }
        if self.span is not None:
            when["span"] = list(self.span)
        if self.metadata:
            when["metadata"] = dict(self.metadata)
        if self.tokens:
            when["tokens"] = list(self.tokens)
        plain: dict[str, Any] = {"name": self.name, "when": when, "weight": self.weight}
        return plain | {n: list(v) for n in ("allow", "deny") if (v := getattr(self, n))}

    def check(self, names: Sequence[str]) -> None:
        """Refuse a block that there is not."""
        queries = () if isinstance(self.queries, str) else self.queries
        for one in (*self.allow, *self.deny, *queries):
            if one not in (*names, FREE):
                raise InputError(
                    f"rule {self.name!r} names block {one!r}, which is none of "
                    f"{', '.join(names)}.{nearest(one, names)}"
                )
        if FREE in self.deny:
            raise InputError(
                f"rule {self.name!r} denies the free block, which holds the attention sink: "
                "set strict=True to hide it"
            )

    def fires(
        self,
        names: Sequence[str],
        ids: Tensor,
        positions: Tensor,
        text: Tensor | None,
        metadata: Mapping[str, Any],
    ) -> Tensor:
        """The queries that it is about, boolean `[batch, queries]`.

        Args:
            ids: block of each query; positions: its place, -1 for padding.
            text: token ids of the whole request, `[batch, tokens]`, where they are known.
        """
        chosen = positions >= 0
        if any(metadata.get(key) != value for key, value in self.metadata.items()):
            return torch.zeros_like(chosen)
        if self.tokens:
            if text is None:
                raise InputError(
                    f"rule {self.name!r} looks for tokens, and this model is given none: pass "
                    "input_ids"
                )
            chosen = chosen & holds(text, self.tokens)[:, None]
        if self.queries != ALL:
            wanted = (FREE,) if self.queries == FREE else self.queries
            numbers = [0 if w == FREE else 1 + list(names).index(w) for w in wanted]
            chosen = chosen & torch.isin(ids, ids.new_tensor(numbers))
        if self.span is not None:
            low, high = self.span
            chosen = chosen & (positions >= low)
            chosen = chosen if high is None else chosen & (positions < high)
        return chosen


def holds(text: Tensor, pattern: Sequence[int]) -> Tensor:
    """Whether each row of `[batch, tokens]` has these ids one after another.

    >>> holds(torch.tensor([[1, 2, 3], [2, 1, 3]]), (2, 3))
    tensor([ True, False])
    """
    if text.shape[1] < len(pattern):
        return torch.zeros(len(text), dtype=torch.bool, device=text.device)
    windows = text.unfold(1, len(pattern), 1)
    return (windows == text.new_tensor(list(pattern))).all(-1).any(-1)


def read_rules(given: Any) -> list[Rule]:
    """Rules from a YAML file, from plain data, or as they are; names differ.

    >>> [r.name for r in read_rules([{"name": "only a", "allow": ["a"]}])]
    ['only a']

    Raises:
        InputError: no such file, no YAML, or what is no rule.
    """
    if given is None:
        return []
    if isinstance(given, (str, Path)):
        given = _read(Path(given))
    if isinstance(given, Mapping):
        _known(given, ("rules",), "a file of rules")
        given = given.get("rules")
    if isinstance(given, (Rule, str)) or not isinstance(given, Sequence):
        raise InputError("rules are a list: write `rules:` and one rule after each dash")
    rules = [Rule.of(one) for one in given]
    names = [r.name for r in rules]
    twice = [n for n in names if names.count(n) > 1]
    if twice:
        raise InputError(f"two rules are called {twice[0]!r}: the log could not tell them apart")
    return rules


def _read(path: Path) -> Any:
    import yaml

    if not path.is_file():
        raise InputError(f"there is no file of rules {path}: name a YAML file")
    if path.stat().st_size > LONGEST:
        raise InputError(f"{path} is larger than 1 MiB: a file of rules is short")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as problem:
        said = " ".join(str(problem).split())[:160]
        raise InputError(f"{path} is no YAML: {said}") from None


def _known(given: Mapping[Any, Any], keys: Sequence[str], what: str) -> None:
    for key in given:
        if key not in keys:
            hint = nearest(str(key), keys)
            raise InputError(f"{what} has no {str(key)[:40]!r}, only {', '.join(keys)}.{hint}")


def _words(given: Any, what: str) -> tuple[str, ...]:
    if given is None:
        return ()
    words = [given] if isinstance(given, str) else given
    if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
        raise InputError(f"{what} is a list of names of blocks, not {str(given)[:60]}")
    return tuple(words)


def _numbers(given: Any, what: str) -> tuple[int, ...]:
    if given is None:
        return ()
    right = isinstance(given, (list, tuple)) and all(type(n) is int for n in given)
    if not right:
        raise InputError(f"{what} is a list of token ids, not {str(given)[:60]}")
    return tuple(given)


def _span(given: Any, what: str) -> tuple[int, int | None]:
    right = isinstance(given, (list, tuple)) and len(given) == 2 and type(given[0]) is int
    if not right or not (given[1] is None or type(given[1]) is int):
        raise InputError(f"{what} is two positions such as [0, 10] or [10, null]")
    return given[0], given[1]
