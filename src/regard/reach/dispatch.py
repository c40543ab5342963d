"""Which sessions act on which attention module, and one call through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from regard.core import State
from regard.errors import ReachError

from .call import Call, Handler, Site


class Acting(Protocol):
    """What a session shows of itself here."""

    handlers: list[Handler]
    key: int | None

    @property
    def past(self) -> int | None: ...

    def place(self, sites: list[Site], call: Call) -> Call: ...

    def concerns(self, model: Any) -> bool: ...

    def wants(self, site: Site) -> bool: ...

    def before(self, call: Call) -> list[Call]: ...

    def after(self, call: Call, state: State) -> State: ...


# id of an attention module -> the sessions that act on it, outermost first, and its sites: one, or
# several where layers share the module
_active: dict[int, list[tuple[Acting, list[Site]]]] = {}


# keys of the sessions that were opened in this context: a thread has a context of its own, and
# takes part in a session of another only when started with `contextvars.copy_context().run`
_here: ContextVar[frozenset[int]] = ContextVar("regard sessions", default=frozenset())
_keys = count()


def open_here(session: Acting) -> Callable[[], None]:
    """Open a session in this context; returns what closes it."""
    session.key = key = next(_keys)
    _here.set(_here.get() | {key})

    def close() -> None:
        session.key = None
        _here.set(_here.get() - {key})

    return close


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
    return [e for e in _active.get(id(module), []) if is_here(e[0])]


def join(module: Any, session: Acting, sites: list[Site]) -> Callable[[], None]:
    """Let a session act on a module; returns what ends that."""
    key = id(module)
    _active.setdefault(key, []).append((session, sites))

    def leave() -> None:
        entries = [e for e in _active.get(key, []) if e[0] is not session]
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


def open_sessions() -> list[Acting]:
    """The sessions that take part in what this thread does, the outer ones first."""
    known = dict.fromkeys(s for entries in list(_active.values()) for s, _ in entries)
    return [s for s in known if is_here(s)]


def acts_on(module: Any) -> bool:
    """Whether an attention call of this module is wanted in this thread."""
    return bool(_entries(module)) or captures(module)


def captures(module: Any) -> bool:
    """Whether `capture` waits for a call of this module."""
    return id(module) in _capturing


class Hook:
    """What a session hangs on a module; a copy of the module, or a stored one, has it empty."""

    def __init__(
        self, run: Callable[..., Any] | None = None, session: Acting | None = None
    ) -> None:
        self.run, self.session = run, session

    def __call__(self, *args: Any) -> Any:
        if self.run is None or (self.session is not None and not is_here(self.session)):
            return None
        return self.run(*args)

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
        state = part.attend()
        for session, placed in entries:
            state = session.after(_at(part, placed), state)
        states.append(state)
    return states[0] if len(calls) == 1 and calls[0].heads is None else gather(call, calls, states)


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
