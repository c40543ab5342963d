"""Session: attach handlers to a model, and leave no trace."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import finalize

from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

from regard.core import State
from regard.errors import InputError, ReachError

from . import dispatch, transformers
from .call import Call, Facts, Handler, Site
from .compiled import eagerly, is_compiled
from .turns import Turns


class Session:
    """A context (or `attach()` / `detach()`) in which handlers see the attention calls of a model.

    Sessions nest; the calls pass the handlers of the outer session first. However a session ends,
    the model is as it was: same attention implementation, same hooks, bit-equal outputs.

    A session belongs to the context that opened it: what other threads run meanwhile on the same
    model is neither seen nor changed. A thread takes part when it is started with the context:
    `Thread(target=contextvars.copy_context().run, args=(model.generate, ids))`.
    """

    lasts = True  # until it is detached, even if nobody holds it: its handlers act on the model

    def __init__(self, model: Any, handlers: Sequence[Handler] = ()) -> None:
        self.handlers = list(handlers)
        _one_stores(self.handlers)
        self.door = _door(model)
        self._given = model
        self.model = model = transformers.unwrapped(model) if self.door is transformers else model
        # the part whose forwards count: of a diffusion pipeline its denoiser
        self.module = model if self.door is transformers else self.door.body(model)
        self.sites: list[Site] = self.door.sites(model)
        self._wanted = [{s.index for s in h.sites(self.sites)} for h in self.handlers]
        self._undo: list[Any] = []
        finalize(self, _undo_all, self._undo).atexit = False
        self._turns = Turns(self.module, self.sites)
        self._defined = list(self.sites)
        self._cache: Any = None  # of the forward pass at hand, where a handler asks for it
        self.key: int | None = None  # of the context that it is open in

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    @property
    def notes(self) -> list[str]:
        """What a session does not see of this model, in words (denoisers alone say so)."""
        return list(getattr(self.door, "notes", lambda _: [])(self.model))

    def attach(self) -> Session:
        """Start; the same as entering the context."""
        if self.attached:
            raise RuntimeError("this session is attached already: detach it first, or make another")
        if self.door.sites(self.model) != self._defined:
            raise ReachError(
                f"the attention modules of this {type(self.module).__name__} have changed since "
                "the session was made: make the session anew"
            )
        modules = dict(self.module.named_modules(remove_duplicate=False))
        outer = dispatch.acting(modules[s.name] for s in self.sites)
        _one_stores([h for session in (*outer, self) for h in session.handlers])
        try:
            self._undo.append(dispatch.open_here(self))
            if self.lasts:
                self._undo.append(dispatch.keep(self))
            if isinstance(self._given, Module) and is_compiled(self._given):
                self._undo.append(eagerly())
            self._undo.append(self.door.enter(self.model))
            of_module: dict[int, list[Site]] = {}
            for site in self._defined:
                of_module.setdefault(id(modules[site.name]), []).append(site)
            for shared_sites in of_module.values():
                self._undo.append(dispatch.join(modules[shared_sites[0].name], self, shared_sites))
            self._undo += [handle.remove for handle in self._turns.attach()]
            if any(type(h).cache is not Handler.cache for h in self.handlers):
                hook = self.module.register_forward_pre_hook(self._show_cache, with_kwargs=True)
                self._undo.append(hook.remove)
            for handler in self.handlers:
                self._undo += handler.attach(self.module)
            self._keep_hooks()
        except BaseException:
            self.detach()
            raise
        return self

    def _keep_hooks(self) -> None:
        """A copy of the model takes no hook along: it has no session to end."""
        for handle in (getattr(undo, "__self__", None) for undo in self._undo):
            if isinstance(handle, RemovableHandle):
                hooks: Any = handle.hooks_dict_ref()
                if not isinstance(hooks[handle.id], dispatch.Hook):
                    hooks[handle.id] = dispatch.Hook(hooks[handle.id], self)

    def __deepcopy__(self, memo: Any) -> Session:
        # only a hook on a model that is copied leads here, and the copy is no part of the session
        blank = copy.copy(self)
        blank._undo = []
        return blank

    def _show_cache(self, module: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Show the cache to the handlers; one that the model would make itself is made here."""
        cache = kwargs.get("past_key_values")
        if cache is None and self.door.makes_cache(module, args, kwargs):
            cache = kwargs["past_key_values"] = self.door.new_cache(module)
        self._cache = cache
        for handler in self.handlers:
            handler.cache(cache)
        return args, kwargs

    def place(self, sites: list[Site], call: Call) -> Call:
        """The call at its place; a layer that runs again is a site of its own from then on."""
        placed = self._turns.place(sites, call)
        if len(self.sites) < len(self._defined) + len(self._turns.further):
            self.sites = [*self._defined, *self._turns.further.values()]
            for indices in self._wanted:
                again = [(i, s) for (i, _), s in self._turns.further.items() if i in indices]
                indices.update(s.index for _, s in again)
        return placed

    @property
    def past(self) -> int | None:
        """Tokens that the cache held as the forward pass began; None outside one."""
        return self._turns.past

    def padding(self, site: Site, batch: int, queries: int, keys: int) -> Tensor | None:
        """Which queries of a self-attention are tokens, by the mask that the model was given."""
        return self._turns.padding(site, batch, queries, keys)

    def concerns(self, model: Any) -> bool:
        """Whether this model runs attention modules of the session."""
        return model is self.module or any(m is self.module for m in model.modules())

    def wants(self, site: Site) -> bool:
        """Whether one of the handlers is to be called for a site."""
        return any(site.index in indices for indices in self._wanted)

    def detach(self) -> None:
        """End; does nothing when the session is not attached."""
        self._cache = None
        _undo_all(self._undo)

    def __enter__(self) -> Any:
        return self.attach()

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def before(self, call: Call) -> list[Call]:
        """The call as its handlers change it, in order: one, or one per group of heads."""
        calls = [call]
        if self._cache is not None and call.site.kind == "self":
            _check_layer(self._cache, call)
        for handler, indices in zip(self.handlers, self._wanted):
            if call.site.index in indices:
                calls = [new for old in calls for new in _listed(handler.before(old), old)]
        return calls

    def measures(self, call: Call) -> Facts | None:
        """The facts that the first of its handlers asks for, to be summed up with the State."""
        for handler, indices in zip(self.handlers, self._wanted):
            if call.site.index in indices:
                asked = handler.measures(call)
                if asked is not None:
                    return asked
        return None

    def after(self, call: Call, state: State) -> State:
        """The State as its handlers change it, in order."""
        for handler, indices in zip(self.handlers, self._wanted):
            if call.site.index in indices:
                state = handler.after(call, state) or state
        return state


def _undo_all(steps: list[Any]) -> None:
    while steps:
        steps.pop()()


def _check_layer(cache: Any, call: Call) -> None:
    """Let a layer of the cache that belongs to a method refuse calls that it does not fit."""
    held = getattr(cache, "layers", [])
    layer = held[call.site.layer] if call.site.layer < len(held) else None
    check = getattr(layer, "check_call", None)
    if check is not None:
        check(call)


def _one_stores(handlers: Sequence[Handler]) -> None:
    """Refuse a second method that stores keys and values: a cache takes the layers of one."""
    storing = [type(h).__name__ for h in handlers if h.stores_rows]
    if len(storing) > 1:
        raise InputError(
            f"{' and '.join(storing)} both store keys and values in their own way: apply one of "
            "them"
        )


def _listed(given: Call | Sequence[Call] | None, old: Call) -> Sequence[Call]:
    if given is None:
        return [old]
    return [given] if isinstance(given, Call) else given


def _door(model: Any) -> Any:
    """The door is chosen by where the model's class comes from."""
    if any(c.__module__.split(".")[0] == "diffusers" for c in type(model).__mro__):
        from . import diffusers

        return diffusers
    return transformers
