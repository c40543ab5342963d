"""Which sessions act on which attention module, and one call through all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from regard.core import State
from regard.errors import ReachError

from .call import Call, Handler, Site


class Acting(Protocol):
    """What a session shows of itself here."""

    handlers: list[Handler]

    def visit(self, sites: list[Site]) -> Site: ...

    def wants(self, site: Site) -> bool: ...

    def before(self, call: Call) -> list[Call]: ...

    def after(self, call: Call, state: State) -> State: ...


# id of an attention module -> the sessions that act on it, outermost first, and its sites: one, or
# several where layers share the module
_active: dict[int, list[tuple[Acting, list[Site]]]] = {}


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
    return list(dict.fromkeys(s for m in modules for s, _ in _active.get(id(m), [])))


def site_of(module: Any) -> Site | None:
    """The site of a module under an open session, None for any other."""
    entries = _active.get(id(module))
    return entries[0][1][0] if entries else None


def wanted(module: Any) -> bool:
    """Whether a handler of some open session is to be called for this module."""
    entries = _active.get(id(module), [])
    return id(module) in _capturing or any(s.wants(site) for s, sites in entries for site in sites)


class Hook:
    """What a session hangs on a module; a copy of the module, or a stored one, has it empty."""

    def __init__(self, run: Callable[..., Any] | None = None) -> None:
        self.run = run

    def __call__(self, *args: Any) -> Any:
        return None if self.run is None else self.run(*args)

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
    entries = [(session, session.visit(sites)) for session, sites in _active.get(id(module), [])]
    calls = [call]
    for session, site in entries:
        calls = [new for old in calls for new in session.before(old.change(site=site))]
    states = []
    for part in calls:
        state = part.attend()
        for session, site in entries:
            state = session.after(part.change(site=site), state)
        states.append(state)
    return states[0] if len(calls) == 1 and calls[0].heads is None else gather(call, calls, states)


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
