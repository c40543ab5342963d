"""What a small language model is told on its way while it learns to answer.

Trained from answers alone, a body of a few million weights stays at chance where an answer joins
several things (is there a *red circle*, is it *left of* the square). So, as the tower learns to say
of every patch what it shows, the body learns to say of every name where its thing is, and of the
second of two names how their things stand to each other and which word came between: from its
states after half and after five eighths of its layers, by linear heads that are thrown away
afterwards. Without that word, measured by linear probes, "left" and "right" are not told apart at
the place where the answer is made, as neither alone says anything about yes or no.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.zoo.scenes import COLORS, SHAPES, SIZES

from .drawing import Drawn
from .questions import NUMBER
from .reading import keep

PLACES = 8  # along each side
NOWHERE = PLACES


class Guides(nn.Module):
    """Heads on a Llama body whose tokenizer writes every colour and shape as one token.

    Args:
        body: the language model; it is watched, not changed.
        table: `Words.table`, token ids of every word.
    """

    color_of: Tensor  # number of the colour, or shape, that a token names; -1 for none
    shape_of: Tensor

    def __init__(self, body: Any, table: Tensor) -> None:
        super().__init__()
        width, layers = body.config.hidden_size, body.config.num_hidden_layers
        self.place = nn.Linear(width, 2 * (PLACES + 1) + len(SIZES) + 1)
        # less, the same or more along x, along y and in size; and the word after the first name
        self.parts = [3, 3, 3, int(table.max()) + 1]
        self.pair = nn.Linear(width, sum(self.parts))
        names = [[NUMBER[c] for c in COLORS], [NUMBER[s] for s in (*SHAPES, "digit")]]
        for name, numbers in zip(("color_of", "shape_of"), names):
            found = torch.full((int(table.max()) + 1,), -1)
            found[table[numbers, 0].cpu()] = torch.arange(len(numbers))
            self.register_buffer(name, found)
        after = {"place": max(1, layers // 2), "pair": max(1, 5 * layers // 8)}
        self.states: dict[str, Tensor] = {}
        self.hooks = [keep(body.layers[n - 1], self.states, name) for name, n in after.items()]

    def close(self) -> None:
        """Leave the body."""
        for hook in self.hooks:
            hook.remove()

    def loss(self, drawn: Drawn, given: dict[str, Tensor]) -> Tensor:
        """Of the body's last forward over `given`, a row of `Packed` a scene."""
        rows, at, thing, there = self.names(drawn, given["ids"])
        told = self.place(self.states["place"][rows, at].float())
        parts = [PLACES + 1, PLACES + 1, len(SIZES) + 1]
        cells = [v[rows, thing] for v in drawn.cells(PLACES)]
        wanted = [torch.where(there, cell, NOWHERE) for cell in cells]
        wanted.append(torch.where(there, drawn.size[rows, thing], len(SIZES)))
        total: Tensor = sum(map(F.cross_entropy, told.split(parts, 1), wanted), told.new_zeros(()))
        # two names in turn, of things that are there, in one question and its answer
        turn = given["turns"][rows, at]
        two = (rows[1:] == rows[:-1]) & (turn[1:] == turn[:-1]) & there[1:] & there[:-1]
        if not bool(two.any()):
            return total
        row, a, b = rows[1:][two], thing[:-1][two], thing[1:][two]
        told = self.pair(self.states["pair"][row, at[1:][two]].float())
        wanted = [(v[row, a] - v[row, b]).sign().long() + 1 for v in (drawn.x, drawn.y, drawn.size)]
        wanted.append(given["ids"][row, at[:-1][two] + 1])
        return sum(map(F.cross_entropy, told.split(self.parts, 1), wanted), total)

    def names(self, drawn: Drawn, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Row and position of every "colour shape", the thing so named and whether it is there;
        names that fit several things are left out.
        """
        words = ids.clamp_min(0)
        color, shape = self.color_of[words[:, :-1]], self.shape_of[words[:, 1:]]
        rows, at = ((color >= 0) & (shape >= 0)).nonzero(as_tuple=True)
        color, shape = color[rows, at], shape[rows, at]
        kind = drawn.shape.clamp_max(len(SHAPES))
        fits = (drawn.color[rows] == color[:, None]) & (kind[rows] == shape[:, None])
        fits &= drawn.there[rows]
        clear = fits.sum(1) <= 1
        fits, rows, at = fits[clear], rows[clear], at[clear]
        return rows, at + 1, fits.int().argmax(1), fits.any(1)
