"""Which sessions act on which attention module, and one call through all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from regard.core import State

from .call import Call, Site


class Acting(Protocol):
    """What a session shows of itself here."""

    def visit(self, sites: list[Site]) -> Site: ...

    def before(self, call: Call) -> Call: ...

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


def site_of(module: Any) -> Site | None:
    """The site of a module under an open session, None for any other."""
    entries = _active.get(id(module))
    return entries[0][1][0] if entries else None


def run(module: Any, call: Call) -> State:
    """One attention call through the handlers of every open session on this module."""
    entries = [(session, session.visit(sites)) for session, sites in _active.get(id(module), [])]
    for session, site in entries:
        call = session.before(call.change(site=site))
    state = call.attend()
    for session, site in entries:
        state = session.after(call.change(site=site), state)
    return state
