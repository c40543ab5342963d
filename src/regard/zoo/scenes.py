"""Drawn scenes with captions and exact masks: shapes, colours, sizes, textures, places, grounds.

A scene follows from its number alone, so a data set is a range of numbers. Some pairs of colour and
shape are held out: every colour and every shape is met in training, those pairs never.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regard.errors import InputError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 82, 200),
    "yellow": (240, 210, 30),
    "orange": (255, 127, 14),
    "purple": (148, 60, 189),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (150, 150, 150),
    "black": (15, 15, 15),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "diamond")
SIZES: dict[str, tuple[float, float]] = {"small": (0.13, 0.155), "large": (0.195, 0.23)}
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted")
SHADE = 0.55  # the darker colour of stripes and dots, as a share of the thing's own
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")
WORDS: tuple[str, ...] = (
    "a", "an", "and", "on", "of", "background", "left", "right", "above", "below",
    *COLORS, *BACKGROUNDS, *SHAPES, *SIZES, *TEXTURES,
)  # fmt: skip
"""Every word that a caption can hold."""

FINE = 3  # samples a pixel's side
GAP = 0.02  # free room around a thing, as a share of the side


@dataclass(frozen=True)
class Thing:
    """One thing; the place of its centre and its radius are shares of the image's side."""

    shape: str
    color: str
    size: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What is drawn and what is said of it.

    Attributes:
        things: in the order of the caption; they never overlap.
        relation: where the first stands to the second; None when the caption does not say.
        named: which of "size", "texture" and "background" the caption names.
    """

    things: tuple[Thing, ...]
    background: str
    relation: str | None
    named: frozenset[str]
    number: int

    def phrases(self) -> list[str]:
        """What the caption calls each thing: "a small red circle"."""
        called = []
        for thing in self.things:
            words = [thing.size] if "size" in self.named else []
            words += [thing.texture] if "texture" in self.named else []
            words += [thing.color, thing.shape]
            article = "an" if words[0][0] in "aeiou" else "a"
            called.append(" ".join([article, *words]))
        return called

    def caption(self) -> str:
        """ "a red circle left of a blue square on a white background" """
        joint = f" {self.relation} " if self.relation else " and "
        ground = f" on a {self.background} background" if "background" in self.named else ""
        return joint.join(self.phrases()) + ground

    def draw(self, side: int = 64) -> NDArray[np.uint8]:
        """The image, `[side, side, 3]`, with soft edges."""
        _check_side(side)
        fine = side * FINE
        image = np.empty((fine, fine, 3))
        image[:] = BACKGROUNDS[self.background]
        for thing in self.things:
            inside, dark = _inside(thing, fine)
            own = np.asarray(COLORS[thing.color], dtype=float)
            image[inside] = own
            image[inside & dark] = SHADE * own
        image = image.reshape(side, FINE, side, FINE, 3).mean((1, 3))
        return image.round().astype(np.uint8)

    def masks(self, side: int = 64) -> NDArray[np.bool_]:
        """Which pixels are more than half a thing's, `[things, side, side]`."""
        _check_side(side)
        masks = [_inside(thing, side * FINE)[0] for thing in self.things]
        shares = np.stack(masks).reshape(len(masks), side, FINE, side, FINE).mean((2, 4))
        return np.asarray(shares > 0.5)


def scene(
    number: int,
    *,
    things: Sequence[int] = (1, 2),
    held_out: bool | None = False,
    relations: float = 0.7,
    textures: float = 0.0,
    shapes: Sequence[str] = SHAPES,
    colors: Sequence[str] = tuple(COLORS),
    sizes: Sequence[str] = tuple(SIZES),
) -> Scene:
    """The scene of a number: the same number and settings, the same scene.

    Args:
        things: how many things a scene may have.
        held_out: False draws no held-out pair of colour and shape; True only scenes with one at
            least; None whatever comes.
        relations: share of scenes of two things or more whose caption says where.
        textures: share of scenes whose things may be striped or dotted.
        shapes, colors, sizes: what to draw from; fewer make an easier world.

    >>> one = scene(3)
    >>> one == scene(3), one.draw(32).shape, one.masks(32).shape[0] == len(one.things)
    (True, (32, 32, 3), True)

    Raises:
        InputError: no such shape, colour or size, or a number of things that does not fit.
    """
    for given, known in ((shapes, SHAPES), (colors, COLORS), (sizes, SIZES)):
        wrong = [g for g in given if g not in known]
        if wrong or not given:
            raise InputError(f"{wrong[0] if wrong else 'nothing'} cannot be drawn: {list(known)}")
    if not things or min(things) < 1 or max(things) > 4:
        raise InputError(f"a scene has 1 to 4 things, not {list(things)}")
    pairs = {is_held_out(c, s) for c in colors for s in shapes}
    if held_out is not None and held_out not in pairs:
        raise InputError("no such scene can be drawn: allow more shapes and colours")
    random = np.random.default_rng([number, 0x5CE4E])
    textured = bool(random.random() < textures)
    for _ in range(1000):
        made = _things(random, int(random.choice(list(things))), textured, shapes, colors, sizes)
        if made is None:
            continue
        has = any(is_held_out(t.color, t.shape) for t in made)
        if held_out is None or has is held_out:
            break
    else:
        raise InputError("no such scene was found: allow more shapes and colours, or fewer things")
    background = str(random.choice(list(BACKGROUNDS)))
    relation = None
    if len(made) == 2 and random.random() < relations:
        relation = relation_of(made[0], made[1])
    named = {"background"} if random.random() < 0.8 else set()
    named |= {"size"} if random.random() < 0.5 and len(sizes) > 1 else set()
    named |= {"texture"} if textured else set()
    return Scene(made, background, relation, frozenset(named), number)


def is_held_out(color: str, shape: str) -> bool:
    """Whether this pair is never drawn in training: one colour of each shape.

    >>> sum(is_held_out(c, s) for c in COLORS for s in SHAPES) == len(SHAPES)
    True
    """
    place = list(COLORS).index(color) + 2 * SHAPES.index(shape) + SHAPES.index(shape) // 3
    return place % len(COLORS) == 0


def relation_of(first: Any, second: Any) -> str | None:
    """Where the first stands to the second, along the axis on which they lie further apart; None
    when neither is clearly larger. Takes whatever has `x` and `y`.
    """
    right, down = first.x - second.x, first.y - second.y
    if max(abs(right), abs(down)) < 1.3 * min(abs(right), abs(down)):
        return None
    if abs(right) > abs(down):
        return "right of" if right > 0 else "left of"
    return "below" if down > 0 else "above"


def outline(shape: str, u: Any, v: Any, xp: Any = np) -> Any:
    """Which points lie inside a shape of radius 1; `v` runs downwards.

    Arrays of numpy, or of another module `xp` with its functions, such as torch; they broadcast.
    """
    if shape == "square":
        return xp.maximum(abs(u), abs(v)) <= 0.85
    if shape == "triangle":
        return (v <= 0.75) & (abs(u) <= (v + 0.95) / 1.7)
    if shape == "diamond":
        return abs(u) + abs(v) <= 1
    if shape == "cross":
        arm = (abs(u) <= 0.3) | (abs(v) <= 0.3)
        return arm & (xp.maximum(abs(u), abs(v)) <= 0.95)
    r = xp.hypot(u, v)
    if shape == "circle":
        return r <= 0.95
    if shape == "ring":
        return (r <= 1) & (r >= 0.55)
    # a star of five points: straight edges between outer and inner corners
    turn = xp.remainder(xp.arctan2(u, -v), 2 * np.pi / 5)
    turn = abs(turn - np.pi / 5)
    outer, inner = 1.0, 0.42
    # the edge from the outer corner at angle pi/5 to the inner corner at angle 0
    ax, ay = outer * math.cos(math.pi / 5), outer * math.sin(math.pi / 5)
    x, y = r * xp.cos(turn), r * xp.sin(turn)
    return (ax - inner) * y - ay * (x - inner) >= 0


def shaded(texture: str, u: Any, v: Any, xp: Any = np) -> Any:
    """Which points of a striped or dotted thing of radius 1 are dark; arrays as in `outline`."""
    if texture == "striped":
        return xp.floor(v / 0.4) % 2 == 0
    return xp.hypot(u % 0.7 - 0.35, v % 0.7 - 0.35) < 0.22


def _things(
    random: np.random.Generator,
    count: int,
    textured: bool,
    shapes: Sequence[str],
    colors: Sequence[str],
    sizes: Sequence[str],
) -> tuple[Thing, ...] | None:
    """Things that neither overlap nor share shape and colour; None when they did not fit."""
    made: list[Thing] = []
    for _ in range(40 * count):
        size = str(random.choice(list(sizes)))
        radius = float(random.uniform(*SIZES[size]))
        room = radius + GAP
        x, y = (float(random.uniform(room, 1 - room)) for _ in range(2))
        thing = Thing(
            str(random.choice(list(shapes))),
            str(random.choice(list(colors))),
            size,
            str(random.choice(list(TEXTURES))) if textured else "plain",
            x,
            y,
            radius,
        )
        far = all(
            max(abs(x - t.x), abs(y - t.y)) > radius + t.radius + 2 * GAP
            and (t.shape, t.color) != (thing.shape, thing.color)
            for t in made
        )
        if far:
            made.append(thing)
        if len(made) == count:
            return tuple(made)
    return None


def _inside(thing: Thing, fine: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Samples inside a thing, and those where its texture is dark."""
    at = (np.arange(fine) + 0.5) / fine
    u = (at[None, :] - thing.x) / thing.radius + np.zeros((fine, 1))
    v = (at[:, None] - thing.y) / thing.radius + np.zeros((1, fine))
    inside = outline(thing.shape, u, v)
    if thing.texture == "plain":
        return inside, np.zeros_like(inside)
    return inside, shaded(thing.texture, u, v)


def _check_side(side: int) -> None:
    if side < 16:
        raise InputError(f"a scene is at least 16 pixels wide, not {side}")
