"""Recipes: they draw what `scenes` draws, ask what is so, and run, save and load at toy size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from regard import zoo
from regard.cli import main
from regard.errors import InputError
from regard.shape.mma import train as mma
from regard.zoo import vlm as assembled
from regard.zoo.pipelines import load_pipeline
from regard.zoo.scenes import SHAPES, is_held_out
from regard.zoo.shipped import MODELS, PIPELINES, shipped
from regard.zoo.tiny_diffusion import tiny_pipeline
from regard.zoo.train import captions, coder, diffusion, loop, questions, reading, recipe
from regard.zoo.train import vlm as train
from regard.zoo.train.drawing import sample
from regard.zoo.train.guides import Guides


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_batch_is_drawn_as_scenes_are() -> None:
    drawn = sample(12, generator=random(), things=(1, 2, 3), textures=0.5)
    images, masks = drawn.images(48), drawn.masks(48)
    for n in range(12):
        scene = drawn.scene(n)
        true = scene.draw(48).transpose(2, 0, 1) / 255
        assert np.abs(true - images[n].numpy()).mean() < 1e-3
        own = scene.masks(48)
        assert ((masks[n, : len(own)] > 0.5).numpy() != own).mean() < 2e-3
        assert not masks[n, len(own) :].any()


def test_held_out_pairs_are_never_drawn_and_things_never_overlap() -> None:
    drawn = sample(300, generator=random(1), things=(2, 3))
    for n in range(300):
        things = drawn.scene(n).things
        assert not any(is_held_out(t.color, t.shape) for t in things)
        for a, one in enumerate(things):
            for other in things[:a]:
                away = max(abs(one.x - other.x), abs(one.y - other.y))
                assert away > one.radius + other.radius
    out = sample(50, generator=random(1), things=(2,), held_out=True)
    assert all(any(is_held_out(t.color, t.shape) for t in out.scene(n).things) for n in range(50))


def test_plain_captions_are_those_of_scenes() -> None:
    drawn = sample(200, generator=random(2), things=(1, 2, 3))
    rows = captions.write(drawn, generator=random(3))
    for n, row in enumerate(rows):
        scene, said = drawn.scene(n), captions.spell(row)
        bare = [w for w in said.split() if w not in ("small", "large", "plain")]
        wanted = scene.phrases()
        for phrase in wanted:
            colour, shape = phrase.split()[-2:]
            assert f"{colour} {shape}" in " ".join(bare), said
        if scene.relation and len(wanted) == 2:
            assert scene.relation in said or " and " in said
        if "background" in said:
            assert said.endswith(f"on a {scene.background} background")


def truth(scene: Any, question: str) -> str | None:
    """The answer, worked out from the scene in another way; None where this cannot tell."""
    words = question.removesuffix(" ?").split()
    things = {(t.color, t.shape): t for t in scene.things}

    def sides(words: list[str]) -> tuple[list[str], str, list[str]]:
        for relation in ("left of", "right of", "above", "below"):
            if f" {relation} " in f" {' '.join(words)} ":
                first, _, second = " ".join(words).partition(f"{relation} ")
                return first.split(), relation, second.split()
        raise AssertionError(words)

    if question.startswith("is there"):
        return "yes" if (words[3], words[4]) in things else "no"
    if question.startswith("what color"):
        return next(t.color for t in scene.things if t.shape == words[-1])
    if question.startswith("what shape"):
        return next(t.shape for t in scene.things if t.color == words[-2])
    if question.startswith("how many things"):
        return questions.DIGITS[len(scene.things)]
    if question.startswith("how many"):
        return questions.DIGITS[sum(t.color == words[2] for t in scene.things)]
    if "larger" in words:
        a, b = things[words[2], words[3]], things[words[-2], words[-1]]
        return "yes" if a.radius > b.radius else "no"
    if question.startswith("where"):
        t = things[words[-2], words[-1]]
        right, down = t.x - 0.5, t.y - 0.5
        if max(abs(right), abs(down)) <= 0.12:
            return "middle"
        if abs(right) > abs(down):
            return "right" if right > 0 else "left"
        return "bottom" if down > 0 else "top"
    if question.startswith(("is the", "what is")):
        first, relation, second = sides(words)
        b = things[second[-2], second[-1]]
        holds = {
            "left of": lambda t: t.x < b.x,
            "right of": lambda t: t.x > b.x,
            "above": lambda t: t.y < b.y,
            "below": lambda t: t.y > b.y,
        }[relation]
        if question.startswith("is the"):
            return "yes" if holds(things[first[2], first[3]]) else "no"
        return None
    return None


@pytest.mark.parametrize("kind", questions.KINDS)
def test_answers_are_true(kind: str) -> None:
    drawn = sample(150, generator=random(4), things=(1, 2, 3))
    asked = questions.ask(drawn, kind, random(5))
    checked, yes = 0, 0
    for n in range(150):
        question, answer = questions.spell(asked.question[n]), questions.spell(asked.answer[n])
        scene = drawn.scene(n)
        if int(asked.kind[n]) == questions.KINDS.index("neighbour"):
            colour, shape = answer.split()
            assert any((t.color, t.shape) == (colour, shape) for t in scene.things)
        known = None if "digit" in question else truth(scene, question)
        if known is not None:
            assert known == answer, (question, answer, scene)
            checked, yes = checked + 1, yes + (answer == "yes")
    if kind not in ("neighbour", "caption", "digit"):
        assert checked > 75
    if kind in ("existence", "relation"):
        assert 0.3 < yes / checked < 0.7


def test_the_tower_and_a_model_on_it_train_save_and_load(tmp_path: Path) -> None:
    train.train_tower(tmp_path / "tower", steps=2, batch=4, width=32, layers=2)
    record = train.train_vlm(
        tmp_path / "vlm", tower=tmp_path / "tower", steps=2, batch=2, checked=4
    )
    assert record == json.loads((tmp_path / "vlm" / "training.json").read_text())
    assert "Answers that are right" in (tmp_path / "vlm" / "README.md").read_text()
    model, processor = zoo.load(tmp_path / "vlm")
    ids = processor(images=np.zeros((64, 64, 3), np.uint8), text="<image> how many things ?")
    assert (np.array(ids["input_ids"]) == model.config.image_token_index).sum() == 64
    with pytest.raises(InputError, match="--tower DIR"):
        train.train_vlm(tmp_path / "x", steps=1)
    goes_on(tmp_path, record, model)


def test_guides_find_the_things_that_are_named() -> None:
    model, words = assembled.assemble_shapes(
        assembled.tower(width=32, layers=2), hidden=32, layers=3
    )
    guides = Guides(model.model.language_model, words.table)
    drawn = sample(40, generator=random(1), things=(1, 2, 3))
    kinds = ("existence", "relation", "color", "caption")
    asked = [questions.ask(drawn, kind, random(2)) for kind in kinds]
    packed = train.Packed(words, "cpu")
    given = packed(asked, 64)
    rows, at, thing, there = guides.names(drawn, given["ids"])
    spelt = words.processor.tokenizer.convert_ids_to_tokens
    for row, place, n, known in zip(*(t.tolist() for t in (rows, at, thing, there))):
        named = tuple(spelt(given["ids"][row, place - 1 : place + 1].tolist()))
        things = [(t.color, t.shape) for t in drawn.scene(row).things]
        assert things.count(named) == int(known)
        assert not known or things[n] == named
    assert there.any() and not there.all()
    assert len(guides.states) == 0
    train.answer_logits(model, given, train.features_of(model, drawn.images(64)))
    loss = guides.loss(drawn, given)
    loss.backward()
    assert loss.isfinite() and guides.pair.weight.grad.abs().sum() > 0
    guides.close()
    guides.states.clear()
    train.answer_logits(model, given, train.features_of(model, drawn.images(64)))
    assert not guides.states


def goes_on(place: Path, first: dict[str, Any], model: Any) -> None:
    """A second training starts from the weights of the first, and its record names both."""
    known = {n: t.clone() for n, t in model.state_dict().items()}
    record = train.train_vlm(place / "more", start=place / "vlm", steps=2, batch=2, rate=1e-9,
                             checked=4)  # fmt: skip
    after = zoo.load(place / "more")[0].state_dict()
    assert all(torch.allclose(t, known[n], atol=1e-6) for n, t in after.items())
    assert record["before"]["samples"] == first["samples"] and record["before"]["seed"] == 0
    said = (place / "more" / "README.md").read_text()
    assert said == train.card(record) and f"Training: {first['samples']} questions" in said
    assert f"; then {record['samples']} questions, {len(questions.LATER)} an image" in said
    with pytest.raises(InputError, match="leave --tower out"):
        train.train_vlm(place / "x", start=place / "vlm", tower=place / "tower")
    for other in (place / "tower", place / "nowhere"):
        with pytest.raises(InputError, match="holds no shapes-vlm"):
            train.train_vlm(place / "x", start=other)
    assert not (place / "x").exists()


def test_a_loop_of_steps_averages_and_saves() -> None:
    def trained(decay: float) -> float:
        x, steps, saved = torch.nn.Parameter(torch.ones(1)), list[int](), list[float]()

        def loss_of(step: int) -> torch.Tensor:
            steps.append(step)
            return (x**2).sum()

        record = loop.train("x", loss_of, [{"params": [x]}], samples=5, minutes=1.0, rate=0.1,
                            steps=4, device="cpu", decay=decay,
                            save=lambda: saved.append(x.item()))  # fmt: skip
        assert steps == [0, 1, 2, 3] and record["steps"] == 4 and record["samples"] == 20
        assert saved == [x.item()]
        return x.item()

    assert trained(decay=0.0) < trained(decay=0.9) < 1  # the last weights, and their average


def test_one_scene_can_be_drawn_at_a_time() -> None:
    made = random(3)
    for _ in range(60):  # where no arrangement of a scene fits, another is drawn
        assert len(sample(1, generator=made, things=(1, 2, 3))) == 1


def test_packed_questions_equal_single_ones() -> None:
    """Several turns in a row give each answer the logits it has alone, through the processor."""
    torch.manual_seed(0)
    vision = assembled.tower(8, 32, 2)
    model, words = assembled.assemble_shapes(vision, hidden=32, layers=2, heads=4, kv_heads=2)
    model.eval()
    drawn = sample(2, generator=random(6), **train.SCENES)
    asked = [questions.ask(drawn, kind, random(7)) for kind in ("existence", "count", "place")]
    images = drawn.images(64)
    with torch.no_grad():
        features = train.features_of(model, images)
        packed = train.Packed(words, "cpu")(asked, features.shape[1])
        logits, _, where = train.answer_logits(model, packed, features)
        for row in range(2):
            for turn, one in enumerate(asked):
                said = [
                    {"type": "image"},
                    {"type": "text", "text": questions.spell(one.question[row])},
                ]
                text = words.processor.apply_chat_template(
                    [{"role": "user", "content": said}], add_generation_prompt=True, tokenize=False
                )
                picture = (255 * images[row].permute(1, 2, 0)).round().byte().numpy()
                given = words.processor(images=picture, text=text, return_tensors="pt")
                alone = model(**given).logits[0, -1]
                mine = logits[((where[:, 0] == row) & (where[:, 1] == turn)).nonzero()[0, 0]]
                assert torch.allclose(alone, mine, atol=2e-5)


def test_pipelines_train_save_and_load(tmp_path: Path) -> None:
    coder.train_vae(tmp_path / "vae", steps=1, batch=2, checked=2)
    coder.train_decoder(tmp_path / "more", vae=tmp_path / "vae", steps=1, batch=2, checked=2)
    a, b = (coder.load_coder(tmp_path / n, "cpu") for n in ("vae", "more"))
    x = torch.zeros(1, 3, 64, 64)
    assert torch.equal(a.encode(x).latent_dist.mean, b.encode(x).latent_dist.mean)
    made: Any = {"vae": tmp_path / "vae", "steps": 1, "batch": 2, "checked": 0}
    diffusion.train_dit(tmp_path / "dit", **made)
    pipe = load_pipeline(tmp_path / "dit")
    image = pipe("a red circle", num_inference_steps=1, max_sequence_length=8).images[0]
    assert image.size == (64, 64) and pipe.text_encoder_3 is None
    more = {"start": tmp_path / "dit", "steps": 1, "batch": 2, "rate": 1e-9, "checked": 0}
    record = diffusion.train_dit(tmp_path / "more", **more)
    assert record["before"]["samples"] == 2 and record["before"]["rate"] != record["rate"]
    assert "2 scenes in 1 steps" in (tmp_path / "more" / "README.md").read_text().split("; then")[0]
    after = load_pipeline(tmp_path / "more").transformer.state_dict()
    known = pipe.transformer.state_dict()
    assert all(torch.allclose(t, known[n], atol=1e-6) for n, t in after.items())
    with pytest.raises(InputError, match="holds no shapes-vae"):
        coder.train_vae(tmp_path / "x", start=tmp_path / "dit")
    with pytest.raises(InputError, match="holds no shapes-sd"):
        diffusion.train_sd(tmp_path / "x", start=tmp_path / "dit")
    with pytest.raises(InputError, match="--vae DIR"):
        diffusion.train_sd(tmp_path / "x", steps=1)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_moves_onto_another_autoencoder(name: str) -> None:
    """Onto one whose latents are turned, it says the same, turned; noise goes with it."""
    folder = shipped(name)
    assert folder is not None
    pipe, same = load_pipeline(folder), load_pipeline(folder)
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=random()))
    other = load_pipeline(folder).vae
    weight, bias = other.quant_conv.weight, other.quant_conv.bias
    with torch.no_grad():
        weight[:8] = (turn @ weight[:8].flatten(1)).view_as(weight[:8])
        bias[:8] = turn @ bias[:8]
    diffusion.move(pipe, other)
    assert pipe.vae is other
    latents = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    turned = torch.einsum("oi,bihw->bohw", turn, latents)
    text, t = torch.randn(2, 32, 128), torch.tensor([300, 700])
    with torch.no_grad():
        if name == "shapes-sd":
            told = same.unet(latents, t, text).sample, pipe.unet(turned, t, text).sample
        else:
            pooled = torch.randn(2, 128)
            told = tuple(
                p.transformer(x, text, pooled, t).sample
                for p, x in ((same, latents), (pipe, turned))
            )
    assert torch.allclose(torch.einsum("oi,bihw->bohw", turn, told[0]), told[1], atol=0.03)


def test_places_are_labelled_by_the_thing_they_lie_in() -> None:
    drawn = sample(64, generator=random(), things=(1, 2, 3))
    inside, shape, color, middle = reading.labels(drawn, 64)
    masks = drawn.masks(64) > 0.99
    for row in range(64):
        for n in range(int(drawn.count[row])):
            own = masks[row, n] & inside[row]  # corners of squares stick out of the circle
            assert own.sum() > 0.8 * masks[row, n].sum()
            assert (shape[row][own] == 1 + drawn.shape[row, n]).all()
            assert (color[row][own] == 1 + drawn.color[row, n]).all()
            at = torch.stack([drawn.x[row, n], drawn.y[row, n]]) * 64 - 0.5
            y, x = own.nonzero()[0]
            off = (torch.stack([x, y]) - at) / 64 / drawn.radius[row, n]
            assert torch.allclose(middle[row, :2, y, x], off, atol=1e-5)
        nothing = ~masks[row].any(0) & ~inside[row]
        assert not shape[row][nothing].any() and not color[row][nothing].any()


def test_latents_that_say_what_is_there_are_read_with_a_lower_loss() -> None:
    drawn = sample(32, generator=random())
    _, shape, color, _ = reading.labels(drawn, 16)
    told = torch.cat([F.one_hot(shape, 8), F.one_hot(color, 7)], -1).permute(0, 3, 1, 2).float()
    losses = []
    for states in (told, torch.zeros_like(told)):
        torch.manual_seed(0)
        heads = reading.Reading(15)
        adam = torch.optim.Adam(heads.parameters(), 3e-3)
        for _ in range(150):
            loss = heads.loss(states, drawn)
            adam.zero_grad()
            loss.backward()
            adam.step()
        losses.append(loss.item())
    assert losses[0] < 0.5 * losses[1]


def test_words_are_taught_to_be_looked_at_from_their_things() -> None:
    """The loss is near 0 where they are, higher where they are not, and 0 without words."""
    drawn = sample(32, generator=random(), things=(2,))
    words = captions.write(drawn, generator=random())
    cover = (drawn.masks(8) >= reading.INSIDE).flatten(2).float()
    q, k = torch.zeros(2, 32, 1, 64 + captions.LENGTH + 1, 3)
    q[:, 0, :64] = 20 * torch.cat([cover, 1 - cover.amax(1, keepdim=True)], 1).transpose(1, 2)
    k[:, 0, 64:, 2] = 1  # the ground looks at all other words
    shapes = torch.tensor([captions.NUMBER[word] for word in SHAPES])
    for row in range(32):
        for n, at in enumerate(torch.isin(words[row], shapes).nonzero()[:, 0].tolist()):
            k[row, 0, 64 + at : 64 + at + 2] = F.one_hot(torch.tensor(n), 3).float()
    weights = torch.ones(32)
    right = float(reading.pointing([(q, k)], words, drawn, weights))
    wrong = float(reading.pointing([(q, k.roll(1, -1))], words, drawn, weights))
    even = float(reading.pointing([(0 * q, k)], words, drawn, weights))
    assert right < 0.02 < 0.5 < even < wrong
    assert float(reading.pointing([(q, k)], words, drawn, 0 * weights)) == 0
    assert float(reading.pointing([(q, k)], 0 * words, drawn, weights)) == 0


@pytest.mark.parametrize("times", [256, 3, 0])
def test_one_key_counted_often_is_as_many_alike(times: int) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 8, generator=random(), dtype=torch.float64)
    many = [torch.cat([t[:, :, :-1], t[:, :, -1:].expand(-1, -1, times, -1)], 2) for t in (k, v)]
    wanted = F.scaled_dot_product_attention(q, *many)
    with loop.Counted(times):
        assert torch.allclose(F.scaled_dot_product_attention(q, k, v), wanted, atol=1e-12)


@pytest.mark.parametrize("blanks", [0, 32, 256])
def test_one_empty_token_stands_for_all_in_a_joint_transformer(blanks: int) -> None:
    model = diffusion.dit_pipeline(tiny_pipeline("sd").vae).transformer.double()
    for p in model.parameters():  # some begin at 0
        torch.nn.init.normal_(p, std=0.1, generator=random())
    width, pooled = (model.config[n] for n in ("joint_attention_dim", "pooled_projection_dim"))
    given: dict[str, Any] = {
        "hidden_states": torch.randn(2, coder.CHANNELS, 16, 16, generator=random()).double(),
        "pooled_projections": torch.randn(2, pooled, generator=random(), dtype=torch.float64),
        "timestep": torch.tensor([300.0, 900.0]),
    }
    text = torch.randn(2, 9, width, generator=random(), dtype=torch.float64)
    with torch.no_grad():
        wanted = model(encoder_hidden_states=F.pad(text, (0, 0, 0, blanks)), **given).sample
        with loop.Counted(blanks):
            found = model(encoder_hidden_states=F.pad(text, (0, 0, 0, 1)), **given).sample
        other = model(encoder_hidden_states=F.pad(text, (0, 0, 0, 1)), **given).sample
    assert torch.allclose(found, wanted, atol=1e-12)
    assert not torch.allclose(other, wanted, atol=1e-6)


def test_half_precision_leaves_attention_whole_on_cpus() -> None:
    q = torch.randn(2, 2, 5, 8, requires_grad=True)
    with loop.half("cpu"):
        kind = (q @ q.transpose(-1, -2)).dtype
        low = q.to(kind)
        out = F.scaled_dot_product_attention(low, low, low, is_causal=True)
    wide = low.float()
    wanted = F.scaled_dot_product_attention(wide, wide, wide, is_causal=True)
    assert torch.allclose(out.float(), wanted, atol=1e-6)
    out.float().sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()


@pytest.mark.parametrize("name", [*PIPELINES, *MODELS])
def test_what_ships_is_recorded_and_small(name: str) -> None:
    folder = shipped(name)
    assert folder is not None
    record = json.loads((folder / "training.json").read_text())
    module = diffusion if name in PIPELINES else train
    assert (folder / "README.md").read_text() == module.card(record)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    seen, told = 0, record
    while told is not None:
        seen, told = seen + told["samples"], told.get("before")
    assert size < 17e6 and seen > 100_000
    for file in folder.rglob("*.json"):
        assert '_name_or_path"' not in file.read_text()  # of the machine that trained it


def test_a_folder_in_parts_loads_by_its_layout(tmp_path: Path) -> None:
    """What `regard zoo train smol-vlm --out DIR` writes loads there as the shipped one does."""
    pytest.importorskip("peft")
    own, folder = shipped("smol-vlm"), tmp_path / "trained"
    assert own is not None
    shutil.copytree(own, folder)
    try:
        shipped_model, _ = zoo.load("smol-vlm")
    except InputError as problem:
        pytest.skip(str(problem))  # SmolLM2's package is not here
    known = {n: t.double().sum() for n, t in shipped_model.state_dict().items()}
    del shipped_model
    model, processor = zoo.load(folder)
    assert processor.image_processor is not None and zoo.tokenizer_of(model) is processor
    assert {n: t.double().sum() for n, t in model.state_dict().items()} == known
    (folder / "projector.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks projector\.safetensors"):
        zoo.load(folder)
    shutil.rmtree(folder / "adapter")
    with pytest.raises(InputError, match=r"without config\.json"):
        zoo.load(folder)


def test_names() -> None:
    assert shipped("gpt2") is None and recipe("shapes-sd") is diffusion.train_sd
    with pytest.raises(InputError, match=r"no recipe 'shape-sd'.*Did you mean"):
        recipe("shape-sd")
    with pytest.raises(InputError, match="makes images"):
        zoo.load("shapes-sd")


def test_only_a_folder_of_a_model_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else lies at the place is refused, and is still there."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("new")

    notes, place, link = tmp_path / "notes", tmp_path / "model", tmp_path / "link"
    notes.mkdir()
    (notes / "config.json").write_text("of another program")
    with pytest.raises(InputError, match=r"holds config\.json, which no training wrote"):
        loop.save_folder(notes, write)
    assert (notes / "config.json").read_text() == "of another program"
    place.mkdir()
    link.symlink_to(place)
    for _ in range(2):  # an empty folder, and what a training that was cut off left
        loop.save_folder(link, write)
        assert (place / "model.safetensors").read_text() == "new" and link.is_symlink()
        (place / "model.safetensors").write_text("old")
    monkeypatch.chdir(place)
    for here in (Path(), Path("..")):
        with pytest.raises(InputError, match="the folder you work in"):
            loop.replaceable(here)
    with pytest.raises(InputError, match="is a file"):
        loop.replaceable(place / "config.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "model", "notes"]


def test_a_folder_with_a_file_of_the_users_own_is_kept(tmp_path: Path) -> None:
    """Even one that a training wrote, and whatever the user's file is called."""

    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    place = tmp_path / "model"
    loop.save_folder(place, write)
    loop.save_folder(place, write)
    (place / "training.json").write_text("my notes")
    with pytest.raises(InputError, match=r"holds training\.json"):
        loop.save_folder(place, write)
    assert (place / "training.json").read_text() == "my notes"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text("{}")

    place = tmp_path / "model"
    loop.save_folder(place, write)
    place.rename(tmp_path / ".model.old123")
    assert loop.replaceable(place) == place.resolve()
    assert (place / "config.json").is_file() and not (tmp_path / ".model.old123").exists()


def test_zoo_train_says_so_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what it says on the way goes to stderr: stdout is for the record."""
    (tmp_path / "thesis.txt").write_text("mine")
    args = ["zoo", "train", "shapes-vae", "--out", str(tmp_path), "--json", "-"]
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert (
        ended.value.code == 2 and "thesis.txt, which no training wrote" in capsys.readouterr().err
    )
    for device in ("cpux", "tpu", "mps", "meta", "cuda:x", "cuda:99"):
        with pytest.raises(SystemExit) as ended:
            main([*args, "--out", str(tmp_path / "new"), "--device", device])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and err.count("\n") == 1
        assert "choose cpu" in err or "here" in err
    monkeypatch.setattr(coder, "_passing", lambda vae, out, record, checked: record)
    with pytest.raises(SystemExit) as ended:
        main([*args, "--out", str(tmp_path / "new"), "--minutes", "0.01", "--batch", "1"])
    said = capsys.readouterr()
    assert not ended.value.code and json.loads(said.out)["name"] == "shapes-vae"
    assert "shapes-vae: step" in said.err


@pytest.mark.parametrize(
    "text", ["not json", "[]", '{"settings": {}}', '{"cells": {}, "settings": 1}']
)
def test_a_comparison_refuses_a_file_of_something_else(tmp_path: Path, text: str) -> None:
    out = tmp_path / "r.json"
    out.write_text(text)
    with pytest.raises(InputError, match=r"r\.json holds no trainings .*name another file"):
        mma.compare(out)
    out.write_text('{"settings": {"steps": 1}, "runs": {}}')
    with pytest.raises(InputError, match="other settings"):
        mma.compare(out)
    assert out.read_text().startswith('{"settings"')
