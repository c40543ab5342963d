"""The trainings that compare modality-mutual attention with causal attention.

A weak vision tower (few, large patches) is trained once. From it and from the same random body,
arms that differ in one thing are trained on the same questions by transformers' own `Trainer`:
"causal", "mma" (`regard.MMA` opens image x question) and "text first" (the question first).
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.errors import InputError
from regard.files import write_text
from regard.versions import versions
from regard.zoo import vlm as zoo
from regard.zoo.train import questions
from regard.zoo.train.drawing import Drawn, sample
from regard.zoo.train.vlm import IGNORED, SCENES, Packed, train_tower

ARMS = ("causal", "mma", "text first")
PATCH, HIDDEN, LAYERS = 16, 128, 4
KINDS = ("existence", "color", "shape", "count", "relation", "neighbour", "place", "comparison")
SCENE: dict[str, Any] = {**SCENES, "things": (2, 3), "textures": 0.0, "digits": 0.0}


class Rows(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Batches of single questions, already on the device: new scenes every time."""

    def __init__(
        self, words: zoo.Words, device: str, batch: int, seed: int, first: str, pool: int = 0
    ) -> None:
        self.words, self.device, self.batch, self.seed, self.first = (
            words, device, batch, seed, first)  # fmt: skip
        self.pool = _pool(pool, device) if pool else None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        make = torch.Generator(self.device).manual_seed(self.seed)
        while True:
            yield self.rows(make)[0]

    def rows(
        self, make: torch.Generator, held_out: bool | None = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One batch, and the kind of each question."""
        if self.pool is not None and held_out is False:
            at = torch.randint(len(self.pool[0]), (self.batch,), generator=make, device=self.device)
            drawn, images = self.pool[0][at], self.pool[1][at].float() / 255
        else:
            settings = {**SCENE, "held_out": held_out}
            drawn = sample(self.batch, device=self.device, generator=make, **settings)
            images = drawn.images(zoo.SIDE)
        which = torch.randint(len(KINDS), (self.batch,), generator=make, device=self.device)
        every = [questions.ask(drawn, kind, make) for kind in KINDS]
        packed = Packed(self.words, self.device)
        pieces = [(packed.pieces(a.question), packed.pieces(a.answer)) for a in every]
        question, answer = (_choose([p[n] for p in pieces], which) for n in range(2))
        kind = torch.stack([a.kind for a in every], 1).gather(1, which[:, None])[:, 0]
        count = (zoo.SIDE // PATCH) ** 2
        image = torch.full((count,), _image_id(), device=self.device).expand(self.batch, -1)
        begin = torch.tensor(self.words.prefix, device=self.device).expand(self.batch, -1)
        turn = torch.tensor(self.words.assistant, device=self.device).expand(self.batch, -1)
        end = torch.full_like(question[:, :1], self.words.end)
        middle = [question, image] if self.first == "text" else [image, question]
        told = torch.cat([*([begin, *middle]), turn, answer, end], 1)
        said = torch.zeros_like(told, dtype=torch.bool)
        said[:, -answer.shape[1] - 1 :] = True
        order = (told < 0).to(torch.int8).argsort(dim=1, stable=True)
        told, said = told.gather(1, order), said.gather(1, order)
        live = told >= 0
        given = {
            "input_ids": told.clamp_min(0),
            "attention_mask": live.long(),
            "labels": torch.where(live & said, told, IGNORED),
            "pixel_values": zoo.pixels(images),
        }
        return given, kind


@lru_cache(maxsize=1)
def _pool(count: int, device: str) -> tuple[Drawn, Tensor]:
    """Scenes that are drawn once and asked about many times, the same for every arm."""
    make = torch.Generator(device).manual_seed(31)
    parts = [sample(256, device=device, generator=make, **{**SCENE, "held_out": False})
             for _ in range(-(-count // 256))]  # fmt: skip
    images = torch.cat([(255 * p.images(zoo.SIDE)).round().byte() for p in parts])
    joined = Drawn(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Drawn)))
    return joined, images


def _choose(rows: list[Tensor], which: Tensor) -> Tensor:
    """For every scene the row of its kind, padded with -1."""
    width = max(r.shape[1] for r in rows)
    wide = [torch.nn.functional.pad(r, (0, width - r.shape[1]), value=-1) for r in rows]
    return torch.stack(wide, 1)[torch.arange(len(which), device=which.device), which]


def _image_id() -> int:
    return zoo.SPECIAL.index(zoo.IMAGE)


def compare(
    out: Path,
    *,
    steps: int = 700,
    batch: int = 128,
    seeds: Sequence[int] = (0, 1, 2),
    arms: Sequence[str] = ARMS,
    device: str = "cpu",
    rate: float = 1.5e-3,
    tower_minutes: float = 5.0,
    tower_steps: int | None = None,
    checked: int = 1536,
    pool: int = 4096,
) -> dict[str, Any]:
    """Train every arm with every seed and write accuracies, times and leak checks to `out`.

    An arm and seed that stands in the file already is not trained again. `pool` draws so many
    scenes once, for a machine where drawing takes longer than training; 0: new ones every step.

    Raises:
        InputError: an unknown arm, a file of another setting, or one whose tower is gone.
    """
    wrong = [a for a in arms if a not in ARMS]
    if wrong or not arms:
        raise InputError(f"arms are {', '.join(ARMS)}, not {wrong[0] if wrong else 'none'}")
    settings = {"steps": steps, "batch": batch, "rate": rate, "patch": PATCH, "hidden": HIDDEN,
                "layers": LAYERS, "checked": checked, "pool": pool}  # fmt: skip
    named = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    result: dict[str, Any] = {"settings": settings, "device": named, "versions": versions(),
                              "runs": {}}  # fmt: skip
    if out.is_file():
        try:
            known = json.loads(out.read_text(encoding="utf-8"))
            same = known["settings"] == settings
            result = {**known, "runs": dict(known["runs"])}
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{out} holds no trainings of this comparison: name another file, or remove it"
            ) from None
        if not same:
            raise InputError(f"{out} holds trainings of other settings: name another file")
    folder = out.with_name(f".{out.stem}-tower")
    if not (folder / "training.json").is_file():
        if result["runs"]:
            raise InputError(
                f"the trainings in {out} share a vision tower that is not here ({folder}): write "
                "to another file"
            )
        train_tower(folder, minutes=tower_minutes, steps=tower_steps, device=device, patch=PATCH,
                    width=64, layers=3, batch=64, rate=2e-3, seed=0)  # fmt: skip
    for seed in seeds:
        for arm in arms:
            key = f"{arm}, seed {seed}"
            if key not in result["runs"]:
                result["runs"][key] = train_arm(
                    arm, folder, steps=steps, batch=batch, seed=seed, device=device, rate=rate,
                    checked=checked, pool=pool,
                )  # fmt: skip
                right = result["runs"][key]["accuracy"]["all"]
                print(f"{key}: {right:.3f}", file=sys.stderr, flush=True)
                write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def train_arm(
    arm: str,
    tower: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: str = "cpu",
    rate: float = 1.5e-3,
    checked: int = 2048,
    pool: int = 0,
) -> dict[str, Any]:
    """Train one arm with `Trainer`; its accuracies on held-out pairs, by kind and over all."""
    import tempfile

    from transformers import CLIPVisionModel, Trainer, TrainingArguments

    vision = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32, use_safetensors=True)
    torch.manual_seed(seed)
    model, words = zoo.assemble_shapes(vision, hidden=HIDDEN, layers=LAYERS, heads=4, kv_heads=2)
    model = model.to(device)
    model.model.vision_tower.requires_grad_(False)
    rows = Rows(words, device, batch, 1000 + seed, "text" if arm == "text first" else "image",
                pool)  # fmt: skip

    class Ready(Trainer):
        """Batches come ready from the device."""

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(rows, batch_size=None)

    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        settings = TrainingArguments(
            output_dir=scratch, max_steps=steps, learning_rate=rate,
            warmup_steps=max(1, steps // 20),
            lr_scheduler_type="cosine", weight_decay=0.01, bf16=device.startswith("cuda"),
            use_cpu=not device.startswith("cuda"), logging_steps=max(1, steps // 20),
            save_strategy="no", report_to=[], disable_tqdm=True, seed=seed,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = Ready(model=model, args=settings)
        with method(arm, model, words):
            start = time.perf_counter()
            done = trainer.train()
            spent = time.perf_counter() - start
            model.eval()
            accuracy = _accuracy(model, rows, checked)
            leak = leaks(model, rows)
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": accuracy,
        "loss": [round(float(v), 4) for v in losses],
        "final loss": round(float(done.training_loss), 4),
        "seconds a step": round(spent / steps, 5),
        "parameters": sum(p.numel() for p in model.parameters()),
        **leak,
    }


def method(arm: str, model: Any, words: zoo.Words) -> Any:
    """The context in which an arm trains and answers."""
    if arm != "mma":
        return nullcontext()
    from regard.shape import MMA

    return MMA(marker=words.assistant, form="mask").on(model)


@torch.no_grad()
def _accuracy(model: Any, rows: Rows, count: int) -> dict[str, float]:
    """Answers right in every word, on pairs that training never saw."""
    make = torch.Generator(rows.device).manual_seed(77)
    hits: dict[str, list[bool]] = {}
    for _ in range(-(-count // rows.batch)):
        given, kind = rows.rows(make, held_out=None)
        found = model(**{n: t for n, t in given.items() if n != "labels"}).logits[:, :-1].argmax(-1)
        wanted = given["labels"][:, 1:]
        right = ((found == wanted) | (wanted == IGNORED)).all(1)
        for k, r in zip(kind.tolist(), right.tolist()):
            hits.setdefault(questions.KINDS[k], []).append(r)
    every = [h for own in hits.values() for h in own]
    found_ = {k: round(sum(v) / len(v), 5) for k, v in sorted(hits.items())}
    return {**found_, "all": round(sum(every) / len(every), 5), "asked": len(every)}


@torch.no_grad()
def leaks(model: Any, rows: Rows) -> dict[str, float]:
    """Largest change of image states under another question, and under another answer."""
    make = torch.Generator(rows.device).manual_seed(5)
    given, _ = rows.rows(make)
    few = {n: t[:4] for n, t in given.items()}
    image = few["input_ids"] == _image_id()

    def states(**change: Tensor) -> Tensor:
        out = model(**{**few, **change}, output_hidden_states=True)
        held: Tensor = out.hidden_states[-1][image].float()
        return held

    plain = states()
    labels = few["labels"]
    answers = torch.where(labels != IGNORED, zoo.SPECIAL.index("</s>"), few["input_ids"])
    other = torch.where(labels != IGNORED, answers, labels)
    first_word = len(zoo.SPECIAL)
    asked = (few["input_ids"] >= first_word) & (labels == IGNORED)
    shuffled = torch.where(asked, few["input_ids"].flip(0).clamp_min(first_word),
                           few["input_ids"])  # fmt: skip
    return {
        "change by question": float((states(input_ids=shuffled) - plain).abs().max()),
        "change by answer": float((states(input_ids=answers, labels=other) - plain).abs().max()),
    }
