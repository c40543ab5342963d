"""Drawn scenes by the thousand: sampled, drawn and captioned on the device that trains.

The rules, shapes and colours are those of `regard.zoo.scenes`; a scene here is a row of tensors, so
that a training step can have some hundred new ones in a few milliseconds. `Drawn.scene` gives the
same scene as a `regard.zoo.scenes.Scene`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.zoo import scenes
from regard.zoo.scenes import BACKGROUNDS, COLORS, FINE, GAP, SHADE, SHAPES, SIZES, TEXTURES

TRIES = 16  # arrangements that are drawn at once for every scene; the first that fits is taken
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FONT = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
)  # fmt: skip
"""Digits of 3 x 5 cells, row by row."""


@dataclass(frozen=True)
class Drawn:
    """Scenes as tensors: `[scenes, things]` each, `[scenes]` for count, background and textured.

    `shape` counts `SHAPES`, then ten digits. Things from `count` on are not there.
    """

    shape: Tensor
    color: Tensor
    size: Tensor
    texture: Tensor
    x: Tensor
    y: Tensor
    radius: Tensor
    count: Tensor
    background: Tensor
    textured: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, rows: Any) -> Drawn:
        return Drawn(*(getattr(self, f.name)[rows] for f in fields(self)))

    @property
    def there(self) -> Tensor:
        """Which things are there, `[scenes, things]`."""
        at = torch.arange(self.shape.shape[1], device=self.count.device)
        return at < self.count[:, None]

    def cells(self, side: int) -> tuple[Tensor, Tensor]:
        """Column and row of every thing's middle on a grid of `side` x `side`."""
        x, y = ((v * side).long().clamp(0, side - 1) for v in (self.x, self.y))
        return x, y

    def images(self, side: int = 64) -> Tensor:
        """`[scenes, 3, side, side]`, from 0 to 1, with soft edges."""
        colors = _table([*COLORS.values()], self.x.device)
        grounds = _table([*BACKGROUNDS.values()], self.x.device)
        image = grounds[self.background][:, :, None, None].expand(-1, -1, side * FINE, side * FINE)
        for n in range(self.shape.shape[1]):
            inside, dark = self._inside(n, side * FINE)
            own = colors[self.color[:, n]][:, :, None, None]
            own = torch.where(dark[:, None], SHADE * own, own)
            image = torch.where(inside[:, None], own, image)
        return (F.avg_pool2d(image, FINE) * 255).round() / 255

    def masks(self, side: int = 64) -> Tensor:
        """Share of every pixel that is a thing's, `[scenes, things, side, side]`."""
        every = [self._inside(n, side * FINE)[0] for n in range(self.shape.shape[1])]
        return F.avg_pool2d(torch.stack(every, 1).float(), FINE)

    def scene(self, row: int) -> scenes.Scene:
        """One of them (without digits) as `scenes.Scene`, with relation and background named."""
        things = tuple(
            scenes.Thing(
                SHAPES[int(self.shape[row, n])],
                list(COLORS)[int(self.color[row, n])],
                list(SIZES)[int(self.size[row, n])],
                TEXTURES[int(self.texture[row, n])],
                float(self.x[row, n]),
                float(self.y[row, n]),
                float(self.radius[row, n]),
            )
            for n in range(int(self.count[row]))
        )
        relation = scenes.relation_of(*things) if len(things) == 2 else None
        ground = list(BACKGROUNDS)[int(self.background[row])]
        return scenes.Scene(things, ground, relation, frozenset({"background"}), row)

    def _inside(self, n: int, fine: int) -> tuple[Tensor, Tensor]:
        """Samples inside the n-th thing of each scene, and those where its texture is dark."""
        at = (torch.arange(fine, device=self.x.device) + 0.5) / fine
        r = self.radius[:, n, None]
        u = ((at - self.x[:, n, None]) / r)[:, None, :]
        v = ((at - self.y[:, n, None]) / r)[:, :, None]
        there = self.there[:, n]
        inside = _outline(torch.where(there, self.shape[:, n], -1), u, v)
        dark = torch.zeros_like(inside)
        for name in ("striped", "dotted"):
            rows = there & (self.texture[:, n] == TEXTURES.index(name))
            dark[rows] = scenes.shaded(name, u[rows], v[rows], torch)
        return inside, dark


def sample(
    count: int,
    *,
    device: Any = "cpu",
    generator: torch.Generator | None = None,
    things: tuple[int, ...] = (1, 2),
    textures: float = 0.0,
    digits: float = 0.0,
    held_out: bool | None = False,
) -> Drawn:
    """So many new scenes; the generator lies on the device.

    Args:
        things: how many things a scene may have, each number as often.
        textures: share of scenes whose things may be striped or dotted.
        digits: share of scenes whose last thing is a digit.
        held_out: False draws no held-out pair of colour and shape, True one at least in each scene.

    >>> made = sample(4, generator=torch.Generator().manual_seed(0))
    >>> made.images(32).shape, made.masks(32).shape
    (torch.Size([4, 3, 32, 32]), torch.Size([4, 2, 32, 32]))
    """
    most = max(things)
    made: dict[str, Any] = {"device": device, "generator": generator}

    def choose(number: int, *shape: int) -> Tensor:
        return torch.randint(number, shape, **made)

    number = torch.tensor(things, device=device)[choose(len(things), count)]
    textured = torch.rand(count, **made) < textures
    with_digit = torch.rand(count, **made) < digits
    many = (count, TRIES, most)
    shape, color, size = choose(len(SHAPES), *many), choose(len(COLORS), *many), choose(2, *many)
    last = torch.arange(most, device=device) == (number - 1)[:, None]
    digit = last[:, None] & with_digit[:, None, None]
    shape = torch.where(digit, len(SHAPES) + choose(10, *many), shape)
    texture = torch.where(textured[:, None, None] & ~digit, choose(len(TEXTURES), *many), 0)
    bounds = torch.tensor([*SIZES.values()], device=device)
    low, high = bounds[size].unbind(-1)
    radius = low + (high - low) * torch.rand(many, **made)
    room = radius + GAP
    x, y = (room + (1 - 2 * room) * torch.rand(many, **made) for _ in range(2))
    there = torch.arange(most, device=device) < number[:, None]
    fits = _fits(shape, color, x, y, radius, there[:, None])
    if held_out is not None:
        out = _held_out(device)[color, shape.clamp_max(len(SHAPES) - 1)] & ~digit
        out = (out & there[:, None]).any(-1)
        fits &= out if held_out else ~out
    first = fits.int().argmax(1)
    rows = torch.arange(count, device=device)
    sound = fits[rows, first]
    # where none of the arrangements fits, another scene stands in
    good = sound.nonzero()[:, 0]
    if not len(good):
        return sample(count, device=device, generator=generator, things=things, textures=textures,
                      digits=digits, held_out=held_out)  # fmt: skip
    stand_in = good[torch.arange(count, device=device) % len(good)]
    rows = torch.where(sound, rows, stand_in)
    pick = first[rows]
    return Drawn(
        shape=shape[rows, pick],
        color=color[rows, pick],
        size=size[rows, pick],
        texture=texture[rows, pick],
        x=x[rows, pick],
        y=y[rows, pick],
        radius=radius[rows, pick],
        count=number[rows],
        background=choose(len(BACKGROUNDS), count),
        textured=textured[rows],
    )


def _fits(
    shape: Tensor, color: Tensor, x: Tensor, y: Tensor, radius: Tensor, there: Tensor
) -> Tensor:
    """Which arrangements have no two things that overlap or are alike, `[scenes, tries]`."""
    ok = torch.ones(shape.shape[:2], dtype=torch.bool, device=shape.device)
    for a in range(shape.shape[2]):
        for b in range(a):
            away = torch.maximum((x[..., a] - x[..., b]).abs(), (y[..., a] - y[..., b]).abs())
            apart = away > radius[..., a] + radius[..., b] + 2 * GAP
            alike = (shape[..., a] == shape[..., b]) & (color[..., a] == color[..., b])
            ok &= (apart & ~alike) | ~there[..., a]
    return ok


def _held_out(device: Any) -> Tensor:
    """`[colors, shapes]`, true for pairs that training never sees."""
    return torch.tensor([[scenes.is_held_out(c, s) for s in SHAPES] for c in COLORS], device=device)


def _table(colors: list[tuple[int, int, int]], device: Any) -> Tensor:
    return torch.tensor(colors, device=device, dtype=torch.float32) / 255


def _outline(kind: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """`scenes.outline`, and digits, for a batch: which points lie inside, `[scenes, v, u]`; none
    of kind -1. Each kind is met by itself, as seven outlines of every thing would be six too many.
    """
    inside = torch.zeros(
        torch.broadcast_shapes(u.shape, v.shape), dtype=torch.bool, device=u.device
    )
    for n in kind.unique().tolist():
        rows = kind == n
        if n >= len(SHAPES):
            inside[rows] = _digit(n - len(SHAPES), u[rows], v[rows])
        elif n >= 0:
            inside[rows] = scenes.outline(SHAPES[n], u[rows], v[rows], torch)
    return inside


def _digit(n: int, u: Tensor, v: Tensor) -> Tensor:
    lit = torch.tensor([c == "1" for c in _FONT[n]], device=u.device)
    column, row = ((u / 0.6 + 1) * 1.5).floor().long(), ((v + 1) * 2.5).floor().long()
    cell = row.clamp(0, 4) * 3 + column.clamp(0, 2)
    return lit[cell] & (u.abs() < 0.6) & (v.abs() < 1)
