"""The locality dial: attention moves, head by head and layer by layer, to the relevant blocks.

Paper: "Localist LLMs with Recruitment Learning", Diederich, 2025, arXiv 2510.17358, which gives the
idea and no experiments.

Deviations: the mathematics here is our own derivation of statements of the kind that the abstract
makes; no text or code of the author is used. Tokens outside of every block (question, template,
answer) follow `toward` and the rules, tokens of a block look at their own block; the first token is
always outside, because models park attention there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from regard.core import State, merge
from regard.errors import InputError, ReachError
from regard.parts.decoding.picks import over
from regard.reach import Call, Handler, Site

from .card import Settings
from .facts import Rows, Totals, dialled, joined, row_facts
from .rules import FREE, Rule, read_rules

ASKING, INSIDE = "outside", "inside"  # of every block: question and answer; of a block


@dataclass(frozen=True)
class Roles:
    """Who looks at what in one call.

    Attributes:
        keys: block of each key, `[batch, keys]`; queries: of each query.
        relevant: blocks that each query looks at, `[batch, queries, blocks]`.
        weight: share of the dial that applies to each query, `[batch, queries]`.
        live: false for queries that are padding.
    """

    keys: Tensor
    queries: Tensor
    relevant: Tensor
    weight: Tensor
    live: Tensor


@dataclass(eq=False)
class LocalityDial(Settings, Handler):
    """Lower the scores of keys outside of the relevant blocks by `locality * beta` nats.

    Attention over each block is a State; the States are merged with their log-sum-exp lowered,
    which is exact and needs no matrix. At locality 0 the model's own attention runs, bit for bit.

    >>> import regard
    >>> model = regard.zoo.tiny("llama")
    >>> dial = LocalityDial(blocks={"a": [(1, 9)], "b": [(9, 20)]}, toward="a", locality=0.6)
    >>> with torch.no_grad(), regard.apply(model, dial):
    ...     _ = model(torch.arange(3, 33)[None])
    >>> dial.report()["outside"]["violations"]
    {'C1': 0, 'C2': 0, 'C3': 0}

    Raises:
        InputError: no block; blocks that overlap; a rule that names none of them; rules that set
            different weights for one token; hard mode where a query would see nothing.
        ReachError: another method gave heads keys of their own.
    """

    metadata: Mapping[str, Any] = field(default_factory=dict)
    _rules: list[Rule] = field(default_factory=list, init=False, repr=False)
    _table: Tensor | None = field(default=None, init=False, repr=False)
    _last: int = field(default=0, init=False, repr=False)
    _watch: bool = field(default=False, init=False, repr=False)
    _skipped: bool = field(default=False, init=False, repr=False)
    _mask: Tensor | None = field(default=None, init=False, repr=False)
    _ids: Tensor | None = field(default=None, init=False, repr=False)
    _held: Tensor | None = field(default=None, init=False, repr=False)
    _cache: Any = field(default=None, init=False, repr=False)
    _known: dict[tuple[int, ...], Roles] = field(default_factory=dict, init=False, repr=False)
    _totals: dict[tuple[int, str], Totals] = field(default_factory=dict, init=False, repr=False)
    _fired: dict[tuple[str, int], list[list[int]]] = field(
        default_factory=dict, init=False, repr=False
    )
    _rows: dict[int, list[tuple[Rows, Tensor, Tensor]]] | None = field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.names: list[str] = []
        if callable(self.blocks):
            self.names = [str(n) for n in getattr(self.blocks, "names", [])]
        elif self.blocks is not None:
            self._table, self.names = _table(self.blocks)
        if self.bias == "blocks" and not self.names:
            raise InputError(
                "the dial needs blocks beside the free one: blocks={'a': [[3, 40]]} gives token "
                "ranges by name"
            )
        toward = [self.toward] if isinstance(self.toward, str) else self.toward
        self._toward = None if toward is None else Rule("toward", tuple(toward))
        if self._toward is not None and self.bias == "blocks":
            self._toward.check(self.names)
        self.set_rules(self.rules)
        if self.rules is not None and not isinstance(self.rules, (str, bytes)):
            listed = isinstance(self.rules, Sequence)
            self.rules = [r.as_dict() for r in self._rules] if listed else str(self.rules)

    # -- what can change while the model runs --------------------------------------------------
    def set_rules(self, rules: Any) -> None:
        """Other rules, from the next token on."""
        read = read_rules(rules)
        for rule in read:
            rule.check(self.names)
        self._rules = read
        self._known.clear()

    def add_rule(self, rule: Any) -> None:
        """One more rule, from the next token on."""
        self.set_rules([*self._rules, Rule.of(rule)])

    def remove_rule(self, name: str) -> None:
        """One rule less, from the next token on."""
        if name not in [r.name for r in self._rules]:
            raise InputError(f"there is no rule {name!r}: {[r.name for r in self._rules]}")
        self.set_rules([r for r in self._rules if r.name != name])

    def turn(self, locality: float) -> None:
        """Turn the dial, from the next token on."""
        given = {**self.settings(), "locality": locality}
        self.locality = Settings(**given).locality
        if self._skipped and locality:
            raise InputError("the dial was applied at 0, and leaves the model alone: apply it anew")

    # -- the session ---------------------------------------------------------------------------
    def sites(self, sites: list[Site]) -> list[Site]:
        self._known, self._totals, self._fired = {}, {}, {}
        self._mask = self._ids = self._held = self._cache = None
        mine = [s for s in sites if s.kind == "self"]
        self._last = max((s.layer for s in mine), default=0)
        self._skipped = not self.locality and not self._watch
        return [] if self._skipped else mine

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        if self._skipped:
            return ()
        return [model.register_forward_pre_hook(self._enter, with_kwargs=True).remove]

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: its padding, and the blocks of its tokens."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        asks = getattr(cache, "get_seq_length", None)
        start = int(asks()) if asks is not None else 0
        self._mask = (mask != 0) if torch.is_tensor(mask) and mask.dim() == 2 else None
        self._known = {}
        if not start:
            self._totals, self._fired, self._ids, self._held = {}, {}, None, None
        if not torch.is_tensor(ids) or ids.dim() != 2 or ids.is_floating_point():
            self._ids = None
            return
        known = self._ids if start else None
        past = None if known is None else known[:, :start]
        fits = past is not None and past.shape == (len(ids), start)
        self._ids = torch.cat([past, ids], 1) if fits and past is not None else ids
        if callable(self.blocks):
            if start and (self._held is None or self._held[:, :start].shape != (len(ids), start)):
                raise InputError(
                    "the prompt in this cache was read without the dial, so the blocks of its "
                    "tokens are not known: apply the dial before the prompt is read"
                )
            new = torch.as_tensor(self.blocks(ids)).to(ids.device)
            if new.shape != ids.shape or not 0 <= int(new.min()) <= int(new.max()) <= len(
                self.names
            ):
                raise InputError(
                    f"blocks(input_ids) gives a number from 0 to {len(self.names)} for each token"
                )
            self._held = new if not start else torch.cat([self._held[:, :start], new], 1)  # type: ignore[index]

    def cache(self, cache: Any) -> None:
        """Blocks of tokens follow the beams when the cache is reordered."""
        known = self._cache() if self._cache is not None else None
        if not callable(self.blocks) or cache is None or cache is known:
            return
        plain, self._cache = cache.reorder_cache, weakref.ref(cache)

        def reorder(beam_idx: Tensor) -> None:
            plain(beam_idx)
            for name in ("_held", "_ids"):
                held = getattr(self, name)
                if held is not None:
                    setattr(self, name, held.index_select(0, beam_idx.to(held.device)))

        cache.reorder_cache = reorder

    # -- who looks at what ---------------------------------------------------------------------
    def roles(self, call: Call) -> Roles:
        """Blocks of the keys and queries of a call, and which of them are relevant to which."""
        queries, keys = call.q.shape[2], call.k.shape[2]
        size = (call.query_offset, queries, call.key_offset, keys, len(call.q))
        if size not in self._known:
            self._known[size] = self._roles(call, *size[:4])
        return self._known[size]

    def _roles(self, call: Call, first: int, queries: int, begin: int, keys: int) -> Roles:
        device, batch = call.q.device, len(call.q)
        total = max(first + queries, begin + keys)
        live = torch.ones(batch, total, dtype=torch.bool, device=device)
        if self._mask is not None and len(self._mask) == batch:
            held = self._mask[:, :total].to(device)
            live[:, : held.shape[1]] = held
        place = torch.where(live, live.cumsum(-1) - 1, -1)
        if callable(self.blocks):
            if self._held is None or self._held.shape[1] < total:
                raise InputError("blocks by token need input_ids: call the model with them")
            blocks = torch.where(live, self._held[:, :total].to(device), 0)
        else:
            table = torch.zeros(1) if self._table is None else self._table
            table = torch.nn.functional.pad(table.long(), (0, 1)).to(device)
            blocks = table[place.clamp(0, len(table) - 1)]
        blocks = torch.where(place <= 0, 0, blocks)  # the first token holds the sink
        at = slice(first, first + queries)
        mine, where = blocks[:, at], place[:, at]
        relevant = torch.ones(batch, queries, len(self.names) + 1, dtype=torch.bool, device=device)
        if self.own:
            numbers = torch.arange(relevant.shape[-1], device=device)
            inside = (mine > 0)[..., None]
            relevant = torch.where(inside, (numbers == mine[..., None]) | (numbers == 0), relevant)
        relevant, weight = self._apply_rules(relevant, mine, where)
        relevant[..., 0] = not self.strict
        weight = weight.to(torch.promote_types(call.q.dtype, torch.float32))
        live = live[:, at] if call.live is None else live[:, at] & call.live
        return Roles(blocks[:, begin : begin + keys], mine, relevant, weight, live)

    def _apply_rules(
        self, relevant: Tensor, blocks: Tensor, where: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The relevant blocks once the rules have spoken: the union of what those that fire allow,
        less what one of them denies; and the weight of the dial.
        """
        allowed, denied = torch.zeros_like(relevant), torch.zeros_like(relevant)
        weight = torch.full(where.shape, -1.0, device=where.device)
        chosen = torch.zeros_like(where, dtype=torch.bool)
        rules = [*([self._toward] if self._toward else []), *self._rules]
        for rule in rules:
            fired = rule.fires(self.names, blocks, where, self._ids, self.metadata)
            if not bool(fired.any()):
                continue
            self._note(rule.name, fired, where)
            clash = fired & (weight >= 0) & (weight != rule.weight)
            if bool(clash.any()):
                raise InputError(
                    f"rule {rule.name!r} sets weight {rule.weight:g} for tokens that another rule "
                    "gives another weight: give both the same, or let them be about other tokens"
                )
            weight = torch.where(fired, rule.weight, weight)
            for names, mark in ((rule.allow, allowed), (rule.deny, denied)):
                for name in names:
                    mark[..., 0 if name == FREE else 1 + self.names.index(name)] |= fired
            chosen |= fired & bool(rule.allow)
        allowed[..., 0] = True
        relevant = torch.where(chosen[..., None], allowed, relevant) & ~denied
        return relevant, torch.where(weight < 0, 1.0, weight)

    def _note(self, rule: str, fired: Tensor, where: Tensor) -> None:
        for row in fired.any(-1).nonzero()[:, 0].tolist():
            ranges = self._fired.setdefault((rule, row), [])
            for position in where[row][fired[row]].tolist():
                if ranges and ranges[-1][1] == position:
                    ranges[-1][1] = position + 1
                elif not ranges or position >= ranges[-1][1]:
                    ranges.append([position, position + 1])

    # -- the call ------------------------------------------------------------------------------
    def shift(self, layer: int, weight: Tensor) -> Tensor:
        """By how much the scores of other blocks fall in a layer, in units of the temperature."""
        share = (layer / self._last) ** self.depth if self._last and self.depth else 1.0
        locality = self.locality * share
        if self.hard and locality >= 1:
            return torch.full_like(weight, torch.inf)
        return locality * self.beta / self.tau * weight

    def after(self, call: Call, state: State) -> State | None:
        if call.positions is not None:
            raise ReachError(
                f"the heads of {call.site.name} look at different keys under another method, and "
                "the dial needs the block of every key: apply it without that method"
            )
        if self.tau != 1 and (call.softcap is not None or call.bias is not None):
            raise ReachError(
                f"{call.site.name} caps or shifts its scores, and a temperature would scale that "
                "too: leave tau at 1"
            )
        if self.bias == "distance":
            return self._by_distance(call) if self.locality else None
        roles = self.roles(call)
        shift = self.shift(call.site.layer, roles.weight)
        if self.check or self._watch:
            self._measure(call, roles, shift)
        if not self.locality or not bool((shift > 0).any()):
            return None
        present = torch.zeros_like(roles.relevant[:, 0]).scatter_(1, roles.keys, True)
        touched = (~roles.relevant & present[:, None]).any(-1) & roles.live & (shift > 0)
        if not bool(touched.any()) and self.tau == 1:
            return None
        new = regrouped(call.change(scale=call.scale / self.tau), roles, shift)
        lost = (new.lse == -torch.inf) & (state.lse > -torch.inf) & touched[:, None]
        if bool(lost.any()):
            row, _, query = lost.nonzero()[0].tolist()
            raise InputError(
                f"query {call.query_offset + query} of row {row} has no relevant block in "
                f"{call.site.name}: set strict=False, which leaves block 0, or hard=False"
            )
        if self.tau != 1:
            touched = roles.live
        kept = touched[:, None]
        out = torch.where(kept[..., None], new.out, state.out)
        return State(out, torch.where(kept, new.lse, state.lse))

    def _by_distance(self, call: Call) -> State:
        """Scores less `locality * distance / sigma`: a column of the keys, for causal calls."""
        if call.q.shape[2] > 1 and call.mask.is_full(call.q.shape[2], call.k.shape[2]):
            raise ReachError("the distance bias is for causal attention: take bias='blocks'")
        keys, work = call.k.shape[2], torch.promote_types(call.q.dtype, torch.float32)
        slope = self.locality / self.sigma
        column = slope / call.scale * torch.arange(1 - keys, 1, device=call.k.device).to(work)
        q = torch.cat([call.q.to(work), call.q.new_ones(*call.q.shape[:3], 1).to(work)], -1)
        k = torch.cat([call.k.to(work), column[:, None].expand(*call.k.shape[:3], 1)], -1)
        scale = call.scale / self.tau
        made = call.change(q=q, k=k, v=call.v.to(work), scale=scale, sinks=None).attend()
        queries = call.q.shape[2]
        behind = torch.arange(1 - queries, 1, device=q.device).to(work)  # of the last query
        state = State(made.out.to(call.v.dtype), made.lse - slope / self.tau * behind)
        return _with_sinks(call, state)

    def _measure(self, call: Call, roles: Roles, shift: Tensor) -> None:
        rows = row_facts(call, roles.keys, roles.relevant, self.tau)
        made = dialled(rows, shift)
        for kind, chosen in ((ASKING, roles.queries == 0), (INSIDE, roles.queries > 0)):
            chosen = chosen & roles.live
            if bool(chosen.any()):
                total = self._totals.setdefault((call.site.layer, kind), Totals())
                total.add(rows, made, shift, chosen)
        if self._rows is not None:
            held = self._rows.setdefault(call.site.layer, [])
            held.append((rows, shift, roles.live & (roles.queries == 0)))

    def report(self) -> dict[str, Any]:
        """Plain data of the last run: by layer and over all, for tokens outside of every block and
        for those inside, leakage, fidelity, entropy and bounds; and which rules fired where.
        """
        layers: dict[str, list[dict[str, Any]]] = {ASKING: [], INSIDE: []}
        for (layer, kind), total in sorted(self._totals.items()):
            layers[kind].append({"layer": layer, **total.as_dict()})
        counts = [0] * (len(self.names) + 1)
        for roles in self._known.values():
            counts = roles.keys[0].bincount(minlength=len(counts)).tolist()
        return {
            "locality": float(self.locality),
            "beta": float(self.beta),
            "blocks": [{"block": n, "tokens": c} for n, c in zip([FREE, *self.names], counts)],
            "layers": layers,
            **{kind: joined(own) for kind, own in layers.items()},
            "fired": [
                {"rule": rule, "row": row, "queries": ranges}
                for (rule, row), ranges in self._fired.items()
            ],
        }


def regrouped(call: Call, roles: Roles, shift: Tensor) -> State:
    """The State of a call whose keys outside of the relevant blocks are `shift` `[batch, queries]`
    lower: the States of the blocks, merged with their log-sum-exp lowered.
    """
    whole: State | None = None
    wide = torch.promote_types(call.q.dtype, torch.float32)
    for block in range(roles.relevant.shape[-1]):
        chosen = roles.keys == block
        if not bool(chosen.any()):
            continue
        part = over(call, chosen)
        lower = torch.where(roles.relevant[..., block], 0.0, -shift)[:, None]
        part = State(part.out.to(wide), part.lse + lower.to(part.lse.dtype))
        whole = part if whole is None else merge(whole, part)
    assert whole is not None
    return _with_sinks(call, State(whole.out.to(call.v.dtype), whole.lse))


def _with_sinks(call: Call, state: State) -> State:
    """The State with the model's learned sinks, which count as relevant."""
    if call.sinks is None:
        return state
    learned = call.sinks if call.sinks.dim() == 3 else call.sinks[None, :, None]
    learned = learned.to(state.lse.dtype).expand(state.lse.shape)
    return merge(state, State(torch.zeros_like(state.out), learned))


def _table(blocks: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
    """Block of every position, from ranges by name; overlaps are refused."""
    names, spans = list(blocks), []
    for number, (name, given) in enumerate(blocks.items(), 1):
        if not isinstance(name, str) or not name or name == FREE:
            raise InputError(f"a block has a name other than {FREE!r}, not {name!r}")
        pairs = [given] if given and not isinstance(given[0], (list, tuple)) else given
        for pair in pairs:
            right = isinstance(pair, (list, tuple)) and len(pair) == 2
            if not right or not all(type(n) is int for n in pair) or not 0 <= pair[0] < pair[1]:
                raise InputError(
                    f"block {name!r} is ranges [first, end) of tokens, not {str(given)[:60]}"
                )
            if pair[1] > 2**24:
                raise InputError(f"block {name!r} ends at token {pair[1]}: no text is that long")
            spans.append((pair[0], pair[1], number))
        if not pairs:
            raise InputError(f"block {name!r} holds no tokens: give a range, or leave it out")
    spans.sort()
    for (_, end, one), (start, _, two) in pairwise(spans):
        if start < end and one != two:
            raise InputError(
                f"blocks {names[one - 1]!r} and {names[two - 1]!r} overlap at token {start}: a "
                "token is in one block"
            )
    table = torch.zeros(max((end for _, end, _ in spans), default=1), dtype=torch.long)
    for start, end, number in spans:
        table[start:end] = number
    return table, names
