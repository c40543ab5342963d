"""Session: attach handlers to a model, and leave no trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from regard.core import State

from .call import Call, Handler, Site

# id of an attention module -> the sessions that act on it, outermost first
_active: dict[int, list[tuple[Session, Site]]] = {}


class Session:
    """A context manager (or `attach()` / `detach()`) during which handlers see the attention calls
    of a model.

    Sessions nest; the calls pass the handlers of the outer session first. However a session ends,
    the model
    is as it was: same attention implementation, same hooks, bit-equal outputs.
    """

    def __init__(self, model: Any, handlers: Sequence[Handler] = ()) -> None:
        from . import transformers as door

        self.model = model
        self.handlers = list(handlers)
        self._door = door
        self.sites: list[Site] = door.sites(model)
        self._wanted = [{s.index for s in h.sites(self.sites)} for h in self.handlers]
        self._undo: list[Any] = []

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def attach(self) -> Session:
        """Start; the same as entering the context."""
        if self.attached:
            raise RuntimeError("this session is attached already: detach it first, or make another")
        modules = dict(self.model.named_modules())
        restore = self._door.enter(self.model)
        self._undo.append(restore)
        for site in self.sites:
            module = modules[site.name]
            entry = (self, site)
            _active.setdefault(id(module), []).append(entry)
            self._undo.append(_remover(id(module), entry))
        return self

    def detach(self) -> None:
        """End; does nothing when the session is not attached."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Any:
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _before(self, call: Call) -> Call:
        for handler, wanted in zip(self.handlers, self._wanted):
            if call.site.index in wanted:
                call = handler.before(call) or call
        return call

    def _after(self, call: Call, state: State) -> State:
        for handler, wanted in zip(self.handlers, self._wanted):
            if call.site.index in wanted:
                state = handler.after(call, state) or state
        return state


def site_of(module: Any) -> Site | None:
    """The site of a module under an open session, None for any other."""
    entries = _active.get(id(module))
    return entries[0][1] if entries else None


def run(module: Any, call: Call) -> State:
    """One attention call through the handlers of every open session on this module."""
    entries = _active.get(id(module), [])
    for session, site in entries:
        call = session._before(call.change(site=site))
    state = call.attend()
    for session, site in entries:
        state = session._after(call.change(site=site), state)
    return state


def _remover(key: int, entry: tuple[Session, Site]) -> Any:
    def remove() -> None:
        entries = _active.get(key, [])
        for place, found in enumerate(entries):
            if found[0] is entry[0]:
                del entries[place]
                break
        if not entries:
            _active.pop(key, None)

    return remove
