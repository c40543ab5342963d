"""Which patches of pictures the words of a question and of its answer look at; exact, small.

The attention of a word on a patch is `exp(score - lse)`: only columns of the images are computed,
and of these the mean over heads is kept for each word and layer, and the mean over words for each
head. What is held does not grow with the square of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from regard.core import State
from regard.errors import InputError, ReachError
from regard.parts.vision import Encoded, View, decoder, locate
from regard.reach import Call, Handler, Site


@dataclass(eq=False)
class PictureLooks(Handler):
    """Watch what text looks at in the pictures of one conversation; nothing changes.

    After a run under `regard.apply`:

    - `words[layer]`, `[words, patches]`: each text token from the last picture on, the generated
      ones included, mean over heads;
    - `heads[layer]`, `[heads, patches]`: each head, mean over these tokens;
    - `tokens`: the ids of these tokens; `places`: the tokens of the patches;
    - `views`: the grids that the patches make up, one after the other; none for a family of models
      whose layout is not known. `grid`: rows and columns of the first.

    >>> import regard
    >>> from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs
    >>> model = tiny_vlm("llava")
    >>> with torch.no_grad(), regard.apply(model, looks := PictureLooks()):
    ...     model(**vlm_inputs("llava", model, images=[1])).logits.shape
    torch.Size([1, 26, 128])
    >>> looks.words[0].shape, looks.heads[0].shape, looks.grid
    (torch.Size([7, 16]), torch.Size([4, 16]), (4, 4))

    Raises:
        InputError: a batch, or no picture.
        ReachError: scores with a soft cap or a bias, or another method that groups heads.
    """

    words: dict[int, Tensor] = field(default_factory=dict, init=False)
    heads: dict[int, Tensor] = field(default_factory=dict, init=False)
    tokens: list[int] = field(default_factory=list, init=False)
    views: list[View] = field(default_factory=list, init=False)
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long), init=False)
    _encoded: Encoded = field(init=False, repr=False)
    _sites: list[Site] = field(default_factory=list, init=False, repr=False)
    _acting: set[int] = field(default_factory=set, init=False, repr=False)
    _rows: Any = field(default=None, init=False, repr=False)
    _sums: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def grid(self) -> tuple[int, int] | None:
        return (self.views[0].rows, self.views[0].columns) if self.views else None

    def sites(self, sites: list[Site]) -> list[Site]:
        self._sites = [s for s in sites if s.kind == "self"]
        return self._sites

    def attach(self, model: Any) -> Sequence[Callable[[], None]]:
        body = decoder(model, "the look at a picture")
        names = {id(m): n for n, m in model.named_modules()}
        prefixes = tuple(names[id(layer)] + "." for layer in body.layers)
        self._acting = {s.index for s in self._sites if s.name.startswith(prefixes)}
        self.words, self.heads, self.tokens, self._sums = {}, {}, [], {}
        self.places = self.places[:0]
        self._encoded = Encoded(model)
        enter = model.register_forward_pre_hook(self._enter, with_kwargs=True)
        return [enter.remove, self._encoded.remove]

    def _enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        images = locate(module, self._encoded.complete({**kwargs, "input_ids": ids}))
        if images.count or not len(self.places):
            if len(ids) > 1 or not images.count:
                raise InputError("the look at a picture takes one conversation with a picture")
            self.words, self.heads, self.tokens, self._sums = {}, {}, [], {}
            self.places, self.views = images.cells(0), images.views[0]
            first = images.spans(0)[-1][1]
        else:
            first = 0
        self._rows = slice(first, ids.shape[1])
        self.tokens += ids[0, self._rows].tolist()

    def after(self, call: Call, state: State) -> State | None:
        if call.site.index not in self._acting or not len(self.places):
            return None
        if call.softcap is not None or call.bias is not None or call.positions is not None:
            raise ReachError(f"{call.site.name} has scores that this look does not follow yet")
        q, lse = call.q[:1, :, self._rows], state.lse[:1, :, self._rows]
        if not q.shape[2]:
            return None
        at = self.places - call.key_offset
        held = at >= 0  # a layer with a window lets go of patches that no word can see any more
        at = at[held]
        k = call.k[:1, :, at].repeat_interleave(q.shape[1] // call.k.shape[1], 1)
        scores = call.scale * (q.to(lse.dtype) @ k.to(lse.dtype).transpose(-1, -2))
        p = (scores - lse[..., None]).exp()
        size = (call.q.shape[2], call.k.shape[2])
        allowed = call.mask.cells(*size, rows=self._rows, device=p.device)[:1, ..., at]
        everywhere = p.new_zeros(*p.shape[1:3], len(held))
        everywhere[..., held] = (p * allowed)[0]
        p, layer = everywhere, call.site.layer
        earlier, shares = self.words.get(layer), p.mean(0).cpu()
        self.words[layer] = shares if earlier is None else torch.cat([earlier, shares])
        total = p.sum(1).cpu() + self._sums.get(layer, torch.zeros(()))
        self._sums[layer] = total
        self.heads[layer] = total / len(self.words[layer])
        return None

    def by_word(self, layers: Sequence[int] | None = None) -> Tensor:
        """`[words, patches]`, mean over layers."""
        chosen = list(self.words) if layers is None else list(layers)
        return torch.stack([self.words[n] for n in chosen]).mean(0)

    def mass(self) -> Tensor:
        """Share of each head's attention on the pictures, `[layers, heads]`, mean over words."""
        return torch.stack([self.heads[n].sum(-1) for n in sorted(self.heads)])
