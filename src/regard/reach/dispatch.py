"""Which sessions act on which attention module, and one call through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol
from weakref import ReferenceType, WeakMethod, ref

import torch
from torch import Tensor

from regard.core import State
from regard.errors import ReachError

from .call import Call, Facts, Handler, Site


class Acting(Protocol):
    """What a session shows of itself here."""

    handlers: list[Handler]
    sites: list[Site]
    key: int | None

    @property
    def past(self) -> int | None: ...

    def place(self, sites: list[Site], call: Call) -> Call: ...

    def padding(self, site: Site, batch: int, queries: int, keys: int) -> Tensor | None: ...

    def concerns(self, model: Any) -> bool: ...

    def wants(self, site: Site) -> bool: ...

    def before(self, call: Call) -> list[Call]: ...

    def measures(self, call: Call) -> Facts | None: ...

    def after(self, call: Call, state: State) -> State: ...


# id of an attention module -> the sessions that act on it, outermost first, and its sites: one, or
# several where layers share the module. Sessions are held weakly: one that nobody holds any more,
# and that does not `keep` itself, ends
_active: dict[int, list[tuple[ReferenceType[Acting], list[Site]]]] = {}
_kept: set[Acting] = set()


# keys of the sessions that were opened in this context: a thread has a context of its own, and
# takes part in a session of another only when started with `contextvars.copy_context().run`
_here: ContextVar[frozenset[int]] = ContextVar("regard sessions", default=frozenset())
_keys = count()


def open_here(session: Acting) -> Callable[[], None]:
    """Open a session in this context; returns what closes it."""
    set_padding(None)  # what a generation that was broken off has left
    set_before_first_token(False)
    session.key = key = next(_keys)
    _here.set(_here.get() | {key})
    weak = ref(session)

    def close() -> None:
        if (opened := weak()) is not None:
            opened.key = None
        _here.set(_here.get() - {key})

    return close


def keep(session: Acting) -> Callable[[], None]:
    """Hold a session that acts although nobody holds it; returns what ends that."""
    _kept.add(session)
    return lambda: _kept.discard(session)


def is_here(session: Acting) -> bool:
    """Whether a session takes part in what this thread does. Threads of a backward pass, which
    compute layers anew for gradient checkpointing, take part in all.
    """
    return session.key in _here.get() or (session.key is not None and _in_backward())


@contextmanager
def unseen() -> Iterator[None]:
    """A stretch of a forward pass that no session takes part in: what a model computes beside the
    tokens it was given.
    """
    token = _here.set(frozenset())
    try:
        yield
    finally:
        _here.reset(token)


def watched() -> bool:
    """Whether this thread may run attention that a session acts on."""
    return bool(_active) and (bool(_here.get()) or _in_backward())


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _entries(module: Any) -> list[tuple[Acting, list[Site]]]:
    held = [(weak(), sites) for weak, sites in _active.get(id(module), [])]
    return [(s, sites) for s, sites in held if s is not None and is_here(s)]


def join(module: Any, session: Acting, sites: list[Site]) -> Callable[[], None]:
    """Let a session act on a module; returns what ends that."""
    key, entry = id(module), (ref(session), sites)
    _active.setdefault(key, []).append(entry)

    def leave() -> None:
        entries = [e for e in _active.get(key, []) if e is not entry]
        if entries:
            _active[key] = entries
        else:
            _active.pop(key, None)

    return leave


def acting(modules: Iterable[Any]) -> list[Acting]:
    """The sessions that act on any of these modules, each once, the outer ones first."""
    return list(dict.fromkeys(s for m in modules for s, _ in _entries(m)))


def site_of(module: Any) -> Site | None:
    """The site of a module under an open session, None for any other."""
    entries = _entries(module)
    return entries[0][1][0] if entries else None


def has_handler(module: Any) -> bool:
    """Whether a handler of some open session is to be called for this module."""
    entries = _entries(module)
    return captures(module) or any(s.wants(site) for s, sites in entries for site in sites)


def past_of(module: Any) -> int | None:
    """Tokens that the cache held as this forward pass began; None where that is not known."""
    entries = _entries(module)
    return entries[0][0].past if entries else None


def padding_of(module: Any, batch: int, queries: int, keys: int) -> Tensor | None:
    """Which queries of this module are tokens, by the mask that the model was given."""
    entries = _entries(module)
    return entries[0][0].padding(entries[0][1][0], batch, queries, keys) if entries else None


def other_parts(module: Any) -> list[str]:
    """The parts of the model that this module does not belong to, in order."""
    entries = _entries(module)
    if not entries:
        return []
    session, sites = entries[0]
    return list(dict.fromkeys(s.part for s in session.sites if s.part != sites[0].part))


def open_sessions() -> list[Acting]:
    """The sessions that take part in what this thread does, the outer ones first."""
    known = dict.fromkeys(weak() for entries in list(_active.values()) for weak, _ in entries)
    return [s for s in known if s is not None and is_here(s)]


def acts_on(module: Any) -> bool:
    """Whether an attention call of this module is wanted in this thread."""
    return bool(_entries(module)) or captures(module)


def captures(module: Any) -> bool:
    """Whether `capture` waits for a call of this module."""
    return id(module) in _capturing


class Hook:
    """What a session hangs on a module; a copy of the module, or a stored one, has it empty.

    It does not hold the session.
    """

    def __init__(
        self, run: Callable[..., Any] | None = None, session: Acting | None = None
    ) -> None:
        own = session is not None and getattr(run, "__self__", None) is session
        self._run = WeakMethod(run) if own and run is not None else lambda: run
        self._session = None if session is None else ref(session)

    @torch.compiler.disable(reason="regard watches this model: pass regard the compiled model")
    def __call__(self, *args: Any) -> Any:
        session = None if self._session is None else self._session()
        run = self._run()
        if run is None or (self._session is not None and (session is None or not is_here(session))):
            return None
        return run(*args)

    def __reduce__(self) -> Any:
        return Hook, ()


class _Captured(BaseException):
    """Carries a call out of a module whose attention is not wanted."""

    def __init__(self, call: Call) -> None:
        self.call = call


_capturing: set[int] = set()


def capture(module: Any, ask: Callable[[], Any]) -> Call:
    """The call that `ask()` makes of this attention module, without attending and unseen by the
    handlers: the module's own way from hidden states to q, k and v, whatever its family.
    """
    _capturing.add(id(module))
    try:
        ask()
    except _Captured as found:
        return found.call
    finally:
        _capturing.discard(id(module))
    raise ReachError(f"{type(module).__name__} made no attention call that regard can see")


def run(module: Any, call: Call) -> State:
    """One attention call through the handlers of every open session on this module."""
    if id(module) in _capturing:
        raise _Captured(call)
    entries = [(session, session.place(sites, call)) for session, sites in _entries(module)]
    calls = [call]
    for session, placed in entries:
        calls = [new for old in calls for new in session.before(_at(old, placed))]
    states = []
    for part in calls:
        part, state = _attend(part, entries)
        for session, placed in entries:
            state = session.after(_at(part, placed), state)
        states.append(state)
    return states[0] if len(calls) == 1 and calls[0].heads is None else gather(call, calls, states)


def _attend(call: Call, entries: list[tuple[Acting, Call]]) -> tuple[Call, State]:
    """The State, and in the same sweep the facts of the first session that asks for some."""
    for session, placed in entries:
        asked = session.measures(_at(call, placed))
        if asked is not None:
            return call.attend_and_measure(asked)
    return call, call.attend()


def _at(call: Call, placed: Call) -> Call:
    """The call with the place that a session gave it."""
    return call.change(
        site=placed.site, chunk=placed.chunk, repeats=placed.repeats, past=placed.past
    )


# rows of a batch whose generation is over: how many tokens of padding each has been given since
_padding: ContextVar[Tensor | None] = ContextVar("padding after the end", default=None)


def set_padding(padding: Tensor | None) -> None:
    """Say how many tokens of padding every row of a running generation ends in."""
    _padding.set(padding)


_before_first: ContextVar[bool] = ContextVar("before the first token", default=False)


def set_before_first_token(before: bool) -> None:
    """Say whether a generation is about to write its first token."""
    _before_first.set(before)


def before_first_token() -> bool:
    """Whether a generation of this thread has yet to write its first token."""
    return _before_first.get()


_assisted: ContextVar[bool] = ContextVar("an assistant drafts tokens", default=False)


def set_assisted(assisted: bool) -> None:
    """Say whether the generation that begins has another model draft its tokens."""
    _assisted.set(assisted)


def assisted() -> bool:
    """Whether the generation at hand has another model draft its tokens."""
    return _assisted.get()


def without_ended(live: Tensor | None, batch: int, queries: int) -> Tensor | None:
    """Which queries count, without the padding that `generate` feeds to rows that have ended."""
    padding = _padding.get()
    if padding is None or len(padding) != batch or not bool(padding.any()):
        return live
    left = torch.arange(queries, 0, -1, device=padding.device)
    kept = left > padding[:, None]
    return kept if live is None else live & kept.to(live.device)


def gather(call: Call, calls: list[Call], states: list[State]) -> State:
    """The States of groups of heads as the State of all heads."""
    batch, heads, queries, _ = call.q.shape
    out = states[0].out.new_empty(batch, heads, queries, states[0].out.shape[-1])
    lse = states[0].lse.new_empty(batch, heads, queries)
    rows = torch.arange(batch, device=out.device)[:, None]
    for part, state in zip(calls, states):
        assert part.heads is not None
        at = (slice(None) if part.heads.dim() == 1 else rows, part.heads)
        out[at], lse[at] = state.out, state.lse
    return State(out, lse)
