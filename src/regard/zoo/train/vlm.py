"""Recipes of the vision tower, of `shapes-vlm` and of `smol-vlm`: LLaVA's layout on drawn scenes.

First the tower learns to say of every patch what it shows and where it is; then the language model
learns to answer, that of `shapes-vlm` told on its way where the named things are (`guides`). Some
questions about one image stand in one row: each sees the image and itself only, at the positions it
would have alone, which is what answering them one by one gives. `shapes-vlm` has a small Llama body
of its own; `smol-vlm` has SmolLM2-135M's, frozen, with a low rank adapter, of which only what was
trained here is kept.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.errors import InputError
from regard.report.table import from_grid
from regard.zoo import vlm as zoo
from regard.zoo.loading import load
from regard.zoo.scenes import COLORS, SHAPES, SIZES

from . import questions
from .checkpoint import Checkpoint, forget
from .drawing import Drawn, sample
from .guides import Guides
from .loop import earlier, finish, half, save_folder, train, trainings, write_record
from .questions import KINDS, LATER, SLOTS

SIDE = zoo.SIDE
SCENES: dict[str, Any] = {"things": (1, 2, 3), "textures": 0.1, "digits": 0.25}
IGNORED = -100
GUIDED = 0.5  # weight of the guides' loss beside that of the answers


def train_tower(
    out: Path,
    *,
    minutes: float = 1.0,
    device: str = "cpu",
    seed: int = 0,
    batch: int = 512,
    rate: float = 1.5e-3,
    steps: int | None = None,
    patch: int = zoo.PATCH,
    width: int = 128,
    layers: int = 5,
) -> dict[str, Any]:
    """Train the vision tower on exact labels of every patch: shape, colour, size, digit, place."""
    torch.manual_seed(seed)
    make = torch.Generator(device).manual_seed(seed)
    tower = zoo.tower(patch, width, layers).to(device)
    grid = SIDE // patch
    sizes = {"shape": len(SHAPES) + 2, "color": len(COLORS) + 1, "size": len(SIZES) + 1,
             "digit": 11, "row": grid, "column": grid}  # fmt: skip
    heads = nn.ModuleDict({n: nn.Linear(width, c) for n, c in sizes.items()}).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]

    def judged(drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        with half(device):
            seen = tower(zoo.pixels(drawn.images(SIDE)), output_hidden_states=True)
            state = F.layer_norm(seen.hidden_states[-2][:, 1:].float(), (width,))
        wanted = patch_labels(drawn, patch)
        told = {n: heads[n](state) for n in sizes}
        parts = {n: F.cross_entropy(told[n].flatten(0, 1), wanted[n].flatten()) for n in sizes}
        right = {n: (told[n].argmax(-1) == wanted[n])[wanted["shape"] > 0].float().mean()
                 for n in sizes}  # fmt: skip
        return sum(parts.values(), torch.zeros((), device=device)), right

    def loss_of(step: int) -> Tensor:
        return judged(sample(batch, device=device, generator=make, **SCENES))[0]

    record = train(f"tower-{patch}", loss_of, [{"params": parameters}], samples=batch,
                   minutes=minutes, rate=rate, steps=steps, device=device, decay=0.998,
                   kept=Checkpoint(out, make))  # fmt: skip
    with torch.no_grad():
        few = sample(min(batch, 512), device=device, generator=make, **{**SCENES, "held_out": None})
        _, right = judged(few)
    record |= {"seed": seed, "batch": batch, "rate": rate,
               "quality": {n: round(float(v), 4) for n, v in right.items()}}  # fmt: skip

    told = f"# {record['name']}\n\nRight, of patches: {record['quality']}\n"

    def write(folder: Path) -> None:
        tower.save_pretrained(folder)
        write_record(folder, record, told)

    save_folder(out, write)
    forget(out)
    return record


def patch_labels(drawn: Drawn, patch: int) -> dict[str, Tensor]:
    """What every patch shows, `[scenes, patches]` each: 0 where it is mostly ground."""
    shares = F.avg_pool2d(drawn.masks(SIDE), patch).flatten(2)
    most, which = shares.max(1)
    covered = most > 0.12
    found = {}
    cls, digit = drawn.shape.clamp_max(len(SHAPES)), (drawn.shape - len(SHAPES)).clamp_min(-1)
    for name, values in (("shape", cls), ("color", drawn.color), ("size", drawn.size),
                         ("digit", digit)):  # fmt: skip
        found[name] = torch.where(covered, 1 + values.gather(1, which), 0)
    at = torch.arange(shares.shape[-1], device=shares.device).expand(len(drawn), -1)
    grid = SIDE // patch
    return found | {"row": at // grid, "column": at % grid}


class Packed:
    """Rows of [prefix, image, turn, turn, ...] with the mask and positions of single turns."""

    def __init__(self, words: zoo.Words, device: str) -> None:
        self.words = words
        self.prefix = torch.tensor(words.prefix, dtype=torch.long, device=device)
        self.after = torch.tensor(words.after, dtype=torch.long, device=device)
        self.turn = torch.tensor(words.assistant, dtype=torch.long, device=device)
        self.table, self.end, self.device = words.table.to(device), words.end, device

    def pieces(self, rows: Tensor) -> Tensor:
        """Token ids of rows of word numbers, moved to the front, -1 behind."""
        ids = self.table[rows].flatten(1)
        order = (ids < 0).to(torch.int8).argsort(dim=1, stable=True)
        ids = ids.gather(1, order)
        return ids[:, : max(1, int((ids >= 0).sum(1).max()))]

    def __call__(self, asked: list[questions.Asked], images: int) -> dict[str, Tensor]:
        """ids, labels and positions `[scenes, tokens]`, image places `[tokens]`, and the mask
        `[scenes, 1, tokens, tokens]`.
        """
        rows = len(asked[0].kind)
        start = torch.cat([self.prefix, self.prefix.new_full((images,), zoo.PLACEHOLDER),
                           self.after])  # fmt: skip
        ids, labels, turn_of, positions = [start.expand(rows, -1)], [], [], []
        labels.append(torch.full_like(ids[0], IGNORED))
        turn_of.append(torch.zeros_like(ids[0]))
        positions.append(torch.arange(len(start), device=self.device).expand(rows, -1))
        for number, one in enumerate(asked):
            question, answer = self.pieces(one.question), self.pieces(one.answer)
            parts = [question, self.turn.expand(rows, -1), answer]
            joined = torch.cat([*parts, torch.full_like(answer[:, :1], self.end)], 1)
            of_answer = torch.zeros_like(joined, dtype=torch.bool)
            of_answer[:, question.shape[1] + len(self.turn) :] = True
            order = (joined < 0).to(torch.int8).argsort(dim=1, stable=True)
            joined, of_answer = joined.gather(1, order), of_answer.gather(1, order)
            live = joined >= 0
            ids.append(joined.clamp_min(0))
            labels.append(torch.where(live & of_answer, joined, IGNORED))
            turn_of.append(torch.full_like(joined, number + 1))
            at = len(start) + torch.arange(joined.shape[1], device=self.device)
            positions.append(at.expand(rows, -1))
        turns = torch.cat(turn_of, 1)
        causal = torch.ones(turns.shape[1], turns.shape[1], dtype=torch.bool, device=self.device)
        same = (turns[0, :, None] == turns[0]) | (turns[0] == 0)
        mask = (causal.tril() & same).expand(rows, 1, -1, -1)
        return {
            "ids": torch.cat(ids, 1),
            "labels": torch.cat(labels, 1),
            "positions": torch.cat(positions, 1),
            "turns": turns,
            "mask": mask,
        }


def answer_logits(
    model: Any, batch: dict[str, Tensor], features: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where answers are predicted, their targets, and whose (row, turn) each is."""
    embeds = model.get_input_embeddings()(batch["ids"].clamp_min(0))
    where = (batch["ids"] == zoo.PLACEHOLDER)[..., None]
    embeds = embeds.masked_scatter(where, features.to(embeds.dtype))
    states = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch["mask"],
        position_ids=batch["positions"],
        use_cache=False,
    ).last_hidden_state
    targets = batch["labels"][:, 1:]
    rows, at = (targets != IGNORED).nonzero(as_tuple=True)
    logits = model.lm_head(states[rows, at])
    turn = batch["turns"][rows, at + 1] - 1
    return logits.float(), targets[rows, at], torch.stack([rows, turn], 1)


def features_of(model: Any, images: Tensor) -> Tensor:
    """Projected patches `[scenes, patches, width]`."""
    seen = model.model.vision_tower(zoo.pixels(images), output_hidden_states=True)
    return model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])


def train_vlm(
    out: Path,
    *,
    minutes: float = 6.0,
    device: str = "cpu",
    seed: int = 0,
    tower: Path | None = None,
    start: Path | None = None,
    batch: int = 160,
    rate: float = 1.2e-3,
    steps: int | None = None,
    checked: int = 512,
) -> dict[str, Any]:
    """Train `shapes-vlm`; the tower learns on at a tenth of the rate.

    With `start`, the folder of such a model, it goes on from there, asks more of what comes late
    (`LATER`), and the record names both trainings.

    Raises:
        InputError: neither a tower nor a model to start from, both, or a folder of something else.
    """
    torch.manual_seed(seed)
    before: dict[str, Any] | None = None
    if start is None:
        model, words = zoo.assemble_shapes(_tower(tower))
    elif tower is None:
        model, words, before = _trained(Path(start))
    else:
        raise InputError("the model of --start has a vision tower: leave --tower out")
    model.to(device)
    vision = list(model.model.vision_tower.parameters())
    own = {id(p) for p in vision}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in own]},
        {"params": vision, "scale": 0.1},
    ]
    guides = Guides(model.model.language_model, words.table).to(device)
    return _train("shapes-vlm", model, words, groups, out, minutes=minutes, device=device,
                  seed=seed, batch=batch, rate=rate, steps=steps, checked=checked,
                  before=before, guides=guides)  # fmt: skip


def train_smol(
    out: Path,
    *,
    minutes: float = 6.0,
    device: str = "cpu",
    seed: int = 0,
    tower: Path | None = None,
    body: str = "smollm2-135m",
    batch: int = 48,
    rate: float = 8e-4,
    steps: int | None = None,
    checked: int = 256,
    rank: int = 8,
) -> dict[str, Any]:
    """Train `smol-vlm`: tower, projector and a low-rank adapter of SmolLM2's attention and MLP."""
    torch.manual_seed(seed)
    model, words = zoo.assemble_smol(_tower(tower), body, rank)
    model.to(device)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    vision = {id(p) for n, p in trained if "vision_tower" in n}
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in trained if id(p) not in vision]},
        {"params": [p for _, p in trained if id(p) in vision], "scale": 0.1},
    ]
    return _train("smol-vlm", model, words, groups, out, minutes=minutes, device=device, seed=seed,
                  batch=batch, rate=rate, steps=steps, checked=checked)  # fmt: skip


def _train(
    name: str,
    model: Any,
    words: zoo.Words,
    groups: list[dict[str, Any]],
    out: Path,
    *,
    minutes: float,
    device: str,
    seed: int,
    batch: int,
    rate: float,
    steps: int | None,
    checked: int,
    before: dict[str, Any] | None = None,
    guides: Guides | None = None,
) -> dict[str, Any]:
    slots = SLOTS if before is None else LATER
    make = torch.Generator(device).manual_seed(seed)
    packed = Packed(words, device)
    save = partial(zoo.save, name, model, words)

    def loss_of(step: int) -> Tensor:
        drawn, asked = _scenes(batch, device, make, slots=slots)
        with half(device):
            features = features_of(model, drawn.images(SIDE))
            given = packed(asked, features.shape[1])
            logits, targets, _ = answer_logits(model, given, features)
        loss = F.cross_entropy(logits, targets)
        return loss if guides is None else loss + GUIDED * guides.loss(drawn, given)

    if guides is not None:
        groups = [*groups, {"params": list(guides.parameters())}]

    record = train(name, loss_of, groups, samples=batch * len(slots), minutes=minutes, rate=rate,
                   steps=steps, device=device, decay=0.9995,
                   save=partial(save_folder, out, save),
                   kept=Checkpoint(out, make, frozen=[model]))  # fmt: skip
    model.eval()
    record |= {"seed": seed, "batch": batch, "rate": rate, "questions": len(slots)}
    if guides is not None:
        guides.close()
        record["guided"] = GUIDED
    if before is not None:
        record["before"] = before
    record["quality"] = accuracy(model, packed, checked, device)
    record["sinks"] = sinks(model, packed, device)
    finish(out, save, record, card(record))
    return record


def _scenes(
    batch: int,
    device: str,
    make: torch.Generator,
    held_out: bool | None = False,
    slots: tuple[str, ...] = SLOTS,
) -> tuple[Drawn, list[questions.Asked]]:
    settings = {**SCENES, "held_out": held_out}
    drawn = sample(batch, device=device, generator=make, **settings)
    return drawn, [questions.ask(drawn, kind, make) for kind in slots]


@torch.no_grad()
def accuracy(
    model: Any, packed: Packed, count: int, device: str, seed: int = 10_000
) -> dict[str, dict[str, Any]]:
    """Share of answers that are right word by word, by kind, on new scenes and held-out pairs.

    An answer counts when every token is the model's first choice after the right ones before: for
    greedy answers that is the same as writing it.
    """
    found: dict[str, dict[str, Any]] = {}
    size = min(count, 128)
    for label, held_out in (("pairs of training", False), ("held-out pairs", True)):
        make = torch.Generator(device).manual_seed(seed)
        right: dict[str, list[float]] = {k: [] for k in (*KINDS, "existence probe")}
        for _ in range(-(-count // size)):
            drawn, asked = _scenes(size, device, make, held_out)
            with half(device):
                features = features_of(model, drawn.images(SIDE))
                logits, targets, where = answer_logits(
                    model, packed(asked, features.shape[1]), features
                )
            wrong = torch.zeros(size, len(asked), device=device)
            miss = (logits.argmax(-1) != targets).float()
            wrong.index_put_((where[:, 0], where[:, 1]), miss, accumulate=True)
            for n, one in enumerate(asked):
                hits = (wrong[:, n] == 0).tolist()
                for hit, kind, probe in zip(hits, one.kind.tolist(), one.probe.tolist()):
                    right[KINDS[kind]].append(hit)
                    if probe:
                        right["existence probe"].append(hit)
        found[label] = {k: {"right": round(sum(v) / max(1, len(v)), 4), "asked": len(v)}
                        for k, v in right.items()}  # fmt: skip
    return found


@torch.no_grad()
def sinks(model: Any, packed: Packed, device: str, count: int = 16) -> dict[str, float]:
    """Attention that the first token receives, and how far one state stands out of the others.

    The sink rate is the share of (layer, head) pairs where the first token receives more than 0.3
    on average; "massive" is the largest magnitude of a middle layer's states over their median.
    """
    make = torch.Generator(device).manual_seed(1)
    drawn = sample(count, device=device, generator=make, **SCENES)
    one = questions.ask(drawn, "count", make)
    features = features_of(model, drawn.images(SIDE))
    given = packed([one], features.shape[1])
    body = model.model.language_model
    embeds = model.get_input_embeddings()(given["ids"].clamp_min(0))
    where = (given["ids"] == zoo.PLACEHOLDER)[..., None]
    embeds = embeds.masked_scatter(where, features.to(embeds.dtype))
    before = body.config._attn_implementation
    body.set_attn_implementation("eager")
    out = body(inputs_embeds=embeds, output_attentions=True, output_hidden_states=True)
    body.set_attn_implementation(before)
    maps = torch.stack([a.float() for a in out.attentions])  # [layers, batch, heads, T, T]
    first = maps[..., 1:, 0].mean((1, 3))
    image = given["ids"][0] == zoo.PLACEHOLDER
    middle = out.hidden_states[len(out.hidden_states) // 2].float().abs()
    norms = out.hidden_states[len(out.hidden_states) // 2].float().norm(dim=-1)
    return {
        "sink rate": round(float((first > 0.3).float().mean()), 4),
        "first token receives": round(float(first.mean()), 4),
        "massive": round(float(middle.max() / middle.median()), 2),
        "image norm over median": round(float(norms[:, image].max() / norms.median()), 3),
    }


def card(record: dict[str, Any]) -> str:
    """The model's card, from what was recorded."""
    s = record
    rows = [["", *s["quality"]]]
    for kind in next(iter(s["quality"].values())):
        cells = [f"{q[kind]['right']:.3f} ({q[kind]['asked']})" for q in s["quality"].values()]
        rows.append([kind, *cells])
    body = (
        "The language model is SmolLM2-135M-Instruct from its own package; this folder holds the "
        "vision tower, the projector and a low-rank adapter only."
        if s["name"] == "smol-vlm"
        else "Every weight was trained here."
    )
    return "\n".join(
        [
            f"# {s['name']}",
            "",
            "A small vision-language model in LLaVA's layout, trained on drawn scenes (64 x 64 "
            f"pixels) by `regard zoo train {s['name']}`. For showing and testing methods. {body}",
            "",
            f"Training: {'; then '.join(trainings(s, _told))}.",
            "",
            "Answers that are right in every word (questions asked):",
            "",
            from_grid(rows).markdown(),
            "",
            "Sinks: "
            + ", ".join(f"{name} {value}" for name, value in s["sinks"].items())
            + ". The rate is the share of heads where the first token receives more than 0.3.",
            "",
            "The loss curve is in `training.json`. Licence: Apache-2.0, as regard.",
            "",
        ]
    )


def _told(s: dict[str, Any]) -> str:
    """What one training saw."""
    return (
        f"{s['samples']:,} questions, {s['questions']} an image, in {s['steps']:,} steps of "
        f"{s['batch']} images, {s['seconds']:.0f} s on {s['device']}, rate {s['rate']}, seed "
        f"{s['seed']}" + (", told on the way where named things are" if "guided" in s else "")
    )


def _tower(folder: Path | None) -> Any:
    from transformers import CLIPVisionModel

    if folder is None or not (Path(folder) / "config.json").is_file():
        raise InputError(
            "name the folder of the vision tower, --tower DIR: make it with `regard zoo train "
            "shapes-tower --out DIR`"
        )
    return CLIPVisionModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)


def _trained(folder: Path) -> tuple[Any, zoo.Words, dict[str, Any]]:
    """A `shapes-vlm` to go on from, and what its record says of the training before."""
    record = earlier(folder, "shapes-vlm")
    model, _ = load(folder)
    return model.train(), zoo.shapes_words(model.config.vision_config.patch_size), record
