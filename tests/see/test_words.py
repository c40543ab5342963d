"""Word maps equal explicit maps, whatever the model, and keep no more with more steps."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch

import regard
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler
from regard.zoo.tiny import tiny

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.parts.diffusion.words import WordMaps
from regard.zoo.tiny_diffusion import tiny_pipeline

from .. import pipelines

PROMPT = "a red zebra and a blue square"
run = partial(pipelines.run, prompt=PROMPT, width=48)


class Explicit(Handler):
    """The whole attention map in float64, image queries only, summed over heads and calls."""

    def __init__(self) -> None:
        self.total: dict[Any, torch.Tensor] = {}
        self.count: dict[Any, int] = {}

    def after(self, call: Call, state: State) -> None:
        place = call.denoising
        if place is None or place.text is None or not len(place.conditional):
            return
        p = (call.scale * call.q.double() @ call.k.double().transpose(-1, -2)).softmax(-1)
        p = p[place.conditional][:, :, place.image, place.text].mean(1)
        self.total[place.grid] = self.total.get(place.grid, 0) + p
        self.count[place.grid] = self.count.get(place.grid, 0) + 1

    def of(self, grid: tuple[int, int], keys: list[int]) -> torch.Tensor:
        mean = (self.total[grid] / self.count[grid])[..., keys].mean(-1)
        return mean.unflatten(1, grid)


def keys_of(pipe: Any, text: str, word: str) -> list[int]:
    """Columns of a word by a way of its own: pieces decoded one after the other."""
    found, first = [], 0
    for name in ("tokenizer", "tokenizer_3" if hasattr(pipe, "tokenizer_3") else "tokenizer_2"):
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None or (type(pipe).__name__ == "FluxPipeline" and name == "tokenizer"):
            continue
        ids = tokenizer(text).input_ids
        for start in range(len(ids)):
            for end in range(start + 1, len(ids) + 1):
                if tokenizer.decode(ids[start:end]).replace(" ", "") == word.replace(" ", ""):
                    found += [first + n for n in range(start, end)]
                    break
            else:
                continue
            break
        first = 24
    return found


@pytest.mark.parametrize("word", ["square", "zebra", "a blue square"])
def test_maps_equal_explicit_maps(pipe: Any, word: str) -> None:
    maps, whole = WordMaps([word]), Explicit()
    run(pipe, maps, whole)
    keys = keys_of(pipe, PROMPT, word)
    assert len(keys) > 1 or word == "square"
    assert maps.grids == sorted(whole.total, key=lambda g: -g[0] * g[1])
    for grid in maps.grids:
        got = maps.map(word, grid=grid)
        assert got.dtype == torch.float32
        assert torch.allclose(got.double(), whole.of(grid, keys), atol=1e-6, rtol=1e-5)


def test_watching_changes_no_image(pipe: Any) -> None:
    assert (run(pipe, WordMaps()) == run(pipe)).all()


def test_several_prompts_and_images_equal_each_alone(pipe: Any) -> None:
    prompts = [PROMPT, "a green star with a square"]
    together, alone = WordMaps(["square", "star"]), WordMaps(["square"])
    run(pipe, together, prompt=prompts, num_images_per_prompt=2)
    assert together["square"].shape[0] == 4
    assert torch.isnan(together["star"][:2]).all() and torch.isfinite(together["star"][2:]).all()
    run(pipe, alone, prompt=PROMPT, num_images_per_prompt=2)
    assert torch.allclose(together["square"][:2], alone["square"], atol=1e-4)


def test_only_the_half_of_the_prompt_counts(sd: Any) -> None:
    """Another negative prompt leaves the first step's maps as they are."""
    one, two, three = WordMaps(["square"]), WordMaps(["square"]), WordMaps(["square"])
    run(sd, one, num_inference_steps=1, guidance_scale=5.0)
    run(sd, two, num_inference_steps=1, guidance_scale=5.0, negative_prompt="a star")
    run(sd, three, num_inference_steps=1, guidance_scale=1.0)
    assert torch.allclose(one["square"], two["square"], atol=1e-6)
    assert torch.allclose(one["square"], three["square"], atol=1e-6)


def test_true_guidance_of_flux_counts_the_prompts_forward_alone() -> None:
    pipe, maps, plain = tiny_pipeline("flux"), WordMaps(["square"]), WordMaps(["square"])
    run(pipe, maps, num_inference_steps=1, negative_prompt="a star", true_cfg_scale=3.0)
    run(pipe, plain, num_inference_steps=1)
    assert torch.allclose(maps["square"], plain["square"], atol=1e-7)


def test_all_words_of_the_prompt(sd: Any) -> None:
    maps = WordMaps()
    run(sd, maps)
    assert maps.names == ["a", "red", "zebra", "and", "a (2)", "blue", "square"]
    assert not torch.allclose(maps["a"], maps["a (2)"])
    twice = WordMaps(["a", "a"])
    run(sd, twice)
    assert torch.equal(twice["a (2)"], maps["a (2)"])


def test_sums_by_step_and_layer_add_up(sd: Any) -> None:
    steps, layers = WordMaps(["square"], by="step"), WordMaps(["square"], by="layer")
    run(sd, steps, layers, num_inference_steps=3)
    assert steps.labels == [0, 1, 2]
    mean = sum(steps.map("square", label=n) for n in steps.labels) / 3
    assert torch.allclose(mean, steps["square"], atol=1e-7)
    finest = [layers.map("square", label=n) for n in layers.labels]
    finest = [m for m in finest if m.shape == layers["square"].shape]
    assert torch.allclose(sum(finest) / len(finest), layers["square"], atol=1e-7)
    last = WordMaps(["square"], steps=(2, 3))
    run(sd, last, num_inference_steps=3)
    assert torch.allclose(last["square"], steps.map("square", label=2), atol=1e-7)


def test_combining_pieces(sd: Any) -> None:
    mean, total = WordMaps(["zebra"]), WordMaps(["zebra"], combine="sum")
    run(sd, mean, total)
    assert torch.allclose(total["zebra"], 5 * mean["zebra"], atol=1e-6)


def test_layers_and_heads(sd: Any) -> None:
    every, one, heads = WordMaps(["square"], by="layer"), WordMaps(["square"], layers=[0]), []
    heads = [WordMaps(["square"], layers=[0], heads=[h]) for h in range(4)]
    run(sd, every, one, *heads)
    assert torch.allclose(one["square"], every.map("square", label=every.labels[0]), atol=1e-7)
    assert torch.allclose(sum(h["square"] for h in heads) / 4, one["square"], atol=1e-7)
    with pytest.raises(InputError, match="layer 99 does not look at text"):
        regard.apply(sd, WordMaps(layers=[99]))
    with pytest.raises(InputError, match="head 9 is out of range"):
        run(sd, WordMaps(heads=[9]))


def stored(maps: WordMaps) -> int:
    """Bytes of every tensor that the handler keeps."""
    sums = [*maps._sums.values(), *maps._each.values()]
    return sum(s.total.untyped_storage().nbytes() for s in sums)


def test_memory_does_not_grow_with_steps(sd: Any) -> None:
    few, many = WordMaps(), WordMaps()
    run(sd, few, num_inference_steps=1)
    run(sd, many, num_inference_steps=6)
    assert stored(few) == stored(many) > 0
    # words x cells of three resolutions, four bytes each; no map of queries x keys
    assert stored(many) == 4 * 7 * (16 * 24 + 8 * 12 + 4 * 6)


class Alive:
    """A `callback_on_step_end` that counts the bytes of all tensors at hand."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def __call__(self, pipe: Any, step: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        gc.collect()
        held = [o for o in gc.get_objects() if type(o) is torch.Tensor]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        self.bytes.append(sum(storages.values()))
        return given


def test_nothing_piles_up_while_an_image_is_made(pipe: Any) -> None:
    alive = Alive()
    run(pipe, WordMaps(["square"]), callback_on_step_end=alive, num_inference_steps=6)
    # the sums are there from the first step on; the last step ends the list of sigmas or so
    assert len(alive.bytes) == 6 and max(alive.bytes[1:]) <= alive.bytes[0]


def test_a_new_run_replaces_the_last(sd: Any) -> None:
    maps, alone = WordMaps(["square"]), WordMaps(["square"])
    with regard.apply(sd, maps):
        run(sd, prompt="a square")
        run(sd)
    run(sd, alone)
    assert torch.equal(maps["square"], alone["square"])


def test_resizing_and_pictures(sd: Any) -> None:
    maps = WordMaps(["square"])
    run(sd, maps)
    assert maps.map("square", size=(40, 60)).shape == (1, 40, 60)
    every = maps.map("square", grid="all")
    means = [maps.map("square", grid=g) for g in maps.grids]
    assert every.shape == means[0].shape
    assert (
        min(float(m.mean()) for m in means)
        <= float(every.mean())
        <= max(float(m.mean()) for m in means)
    )
    image = maps.image("square")
    assert image.mode == "L" and image.size == (8 * 24, 8 * 16)
    assert image.getextrema() == (0, 255)
    assert maps.image("square", over=image).size == image.size


def test_a_denoiser_alone_takes_columns(sd: Any) -> None:
    maps, whole = WordMaps(tokens={"thing": [3, 5]}), Explicit()
    with torch.no_grad(), regard.apply(sd.unet, maps, whole):
        sd.unet(torch.randn(2, 4, 16, 12), 5, torch.randn(2, 24, 32))
    assert torch.allclose(maps["thing"].double(), whole.of((16, 12), [3, 5]), atol=1e-6)
    alone = regard.apply(sd.unet, WordMaps())
    with torch.no_grad(), pytest.raises(InputError, match="pass the whole pipeline"), alone:
        sd.unet(torch.randn(2, 4, 16, 12), 5, torch.randn(2, 24, 32))


def test_bad_input(sd: Any) -> None:
    with pytest.raises(InputError, match="phrase 'horse' is not found"):
        run(sd, WordMaps(["horse"]))
    with pytest.raises(InputError, match="'horse' is in none of the prompts"):
        run(sd, WordMaps(["square", "horse"]), prompt=[PROMPT, "a square"])
    with pytest.raises(InputError, match="second time"):
        run(sd, WordMaps(["square", "square"]))
    with pytest.raises(InputError, match="'star' lies behind the 24 tokens"):
        run(sd, WordMaps(["star"]), prompt="a red circle and " * 6 + "a star")
    with pytest.raises(InputError, match="the text encoder"):
        run(sd, some := WordMaps(["star", "red"]), prompt="a red circle and " * 6 + "a star")
        some["star"]
    with pytest.raises(InputError, match="words is a list"):
        WordMaps("square")
    with pytest.raises(InputError, match="mutually exclusive"):
        WordMaps(["square"], tokens={"square": [1]})
    with pytest.raises(InputError, match="column 99 is out of range"):
        run(sd, WordMaps(tokens={"square": [99]}))
    with pytest.raises(InputError, match="holds no word"):
        run(sd, WordMaps(), prompt="...")
    with pytest.raises(ReachError, match="word maps need"):
        regard.apply(tiny("llama"), WordMaps(["square"]))
    with pytest.raises(RuntimeError, match="nothing was seen"):
        WordMaps(["square"])["square"]
    maps = WordMaps(["square"])
    run(sd, maps)
    with pytest.raises(InputError, match="Did you mean 'square'"):
        maps["squar"]
    embeds = sd.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    session = regard.apply(sd, WordMaps())
    with pytest.raises(InputError, match="prompt_embeds"), session:
        sd(prompt_embeds=embeds, num_inference_steps=1, guidance_scale=1.0)


# -- what each encoder reads -----------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "second"), [("flux", "prompt_2"), ("sd3", "prompt_3")])
def test_each_tokenizer_reads_its_own_text(kind: str, second: str) -> None:
    pipe, other = tiny_pipeline(kind), "the cat on a small red circle near a star"
    t5 = getattr(pipe, second.replace("prompt", "tokenizer"))
    circle = t5.convert_ids_to_tokens(t5(other).input_ids).index("▁circle")
    star = t5.convert_ids_to_tokens(t5(other).input_ids).index("▁star")
    text = "a red circle and a blue square"
    lead = 24 if kind == "sd3" else 0
    clip = [pipe.tokenizer.decode([i]).strip() for i in pipe.tokenizer(text).input_ids]
    first = [clip.index("circle")] if kind == "sd3" else []
    tokens = {"circle": [*first, lead + circle], "star": [lead + star]}
    right, maps = WordMaps(tokens=tokens), WordMaps(["circle", "star"])
    run(pipe, right, maps, every := WordMaps(), prompt=text, **{second: other})
    for word in tokens:
        assert torch.equal(maps[word], right[word])
        assert torch.allclose(every[word], right[word], atol=1e-7)
    assert ("square" in every) == (kind == "sd3")  # Flux reads its first prompt as a whole


def test_both_encoders_of_sdxl_read_their_own_text() -> None:
    pipe = tiny_pipeline("sdxl")
    right = WordMaps(tokens={"circle": [3, 2], "square": [3]})
    maps = WordMaps(["circle", "square"])
    run(pipe, right, maps, prompt="a red circle", prompt_2="a circle square")
    for word in ("circle", "square"):
        assert torch.allclose(maps[word], right[word], atol=1e-7)


def test_words_that_fit_have_maps_and_the_rest_is_named(sd: Any) -> None:
    maps = WordMaps()
    run(sd, maps, prompt="a red circle and " + "cat dog " * 15)
    assert maps.names[:4] == ["a", "red", "circle", "and"] and "dog (9)" in maps
    assert "cat (10)" not in maps and "'cat (10)'" in maps.notes[0]
    with pytest.raises(InputError, match="behind the 24 tokens"):
        maps["cat (10)"]
    run(sd, maps, prompt="a red circle")
    assert maps.notes == []


def test_words_that_one_encoder_cuts_off_have_the_columns_of_the_other() -> None:
    pipe, maps = tiny_pipeline("sd3"), WordMaps(["circle"])
    right = WordMaps(tokens={"circle": [24 + 32]})
    text = "cat dog " * 15 + "a red circle"
    run(pipe, maps, right, prompt=text, max_sequence_length=64)
    assert torch.equal(maps["circle"], right["circle"])


def test_a_picture_to_edit_is_no_part_of_the_map() -> None:
    import diffusers
    from PIL import Image

    pipe = diffusers.FluxKontextPipeline(**tiny_pipeline("flux").components)
    pipe.set_progress_bar_config(disable=True)
    maps, right = WordMaps(["circle"]), WordMaps(tokens={"circle": [2]})
    with torch.no_grad(), regard.apply(pipe, maps, right):
        pipe(image=Image.new("RGB", (32, 32), "red"), prompt="a red circle", width=32, height=32,
             num_inference_steps=2, max_area=1024, _auto_resize=False)  # fmt: skip
    assert maps["circle"].shape == (1, 8, 8) and torch.equal(maps["circle"], right["circle"])


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "UNet3DConditionModel"])
def test_a_video_has_a_map_for_each_frame(name: str) -> None:
    """Attended as a whole, or frame by frame."""
    from ..denoisers import CASES, denoiser, forward

    model, explicit = denoiser(name), Explicit()
    maps = WordMaps(tokens={"word": [1, 2]}, layers=[0])
    with torch.no_grad(), regard.apply(model, maps, explicit):
        forward(model, CASES[name].inputs)
    assert maps["word"].shape == (2, 2, 4, 6) and maps.grids == [(2, 4, 6)]
    assert maps.map("word", size=(8, 12)).shape == (2, 2, 8, 12)
    assert maps.image("word", frame=1, size=(8, 12)).size == (12, 8)
    grid = (2, 4, 6) if name.startswith("Wan") else (4, 6)
    first = next(s for s in regard.apply(model).sites if s.text)
    alone = Explicit()
    alone.sites = lambda sites: [first]  # type: ignore[method-assign]
    with torch.no_grad(), regard.apply(model, alone):
        forward(model, CASES[name].inputs)
    want = alone.of(grid, [1, 2]).reshape(2, 2, 4, 6)
    got = WordMaps(tokens={"word": [1, 2]})
    got.sites = lambda sites: [first]  # type: ignore[method-assign]
    with torch.no_grad(), regard.apply(model, got):
        forward(model, CASES[name].inputs)
    assert torch.allclose(got["word"].double(), want, atol=1e-6)
