"""RefAM's maps, sinks and shares equal explicit ones; filters and magnets act where they should."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regard.core import State
from regard.errors import InputError, ReachError
from regard.parts.text.expressions import head, places, ramp, words
from regard.reach import Call, Handler, Session
from regard.reach.denoising import denoising

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from PIL import Image

from regard.parts.diffusion.noised import denoise_once
from regard.see.refam.method import RefAM
from regard.see.refam.segment import around
from regard.zoo.tiny_diffusion import tiny_pipeline

TEXT = "the red circle on the left"


def scene(width: int = 48, height: int = 32) -> Image.Image:
    g = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 255, (height, width, 3), generator=g, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module", params=["sd3", "flux"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return tiny_pipeline(request.param)


@pytest.fixture(scope="module")
def sd3() -> Any:
    return tiny_pipeline("sd3")


class Dense(Handler):
    """Scores of all queries on all keys in float64, per joint layer."""

    def __init__(self) -> None:
        self.scores: list[torch.Tensor] = []
        self.places: list[Any] = []

    def sites(self, sites: list[Any]) -> list[Any]:
        return [s for s in sites if s.kind == "joint"]

    def after(self, call: Call, state: State) -> None:
        self.scores.append(call.scale * call.q.double() @ call.k.double().transpose(-1, -2))
        self.places.append(denoising(call))


def dense(pipe: Any, prompt: str, draws: int = 1) -> Dense:
    seen = Dense()
    with Session(pipe, [seen]):
        denoise_once(pipe, scene(), prompt, pooled_text=TEXT, draws=draws)
    return seen


def pieces(pipe: Any, prompt: str) -> tuple[list[int], dict[int, str]]:
    """Columns without padding, and the lower-case piece at each, by ids alone."""
    names = ["tokenizer", "tokenizer_3"] if hasattr(pipe, "tokenizer_3") else ["tokenizer_2"]
    columns, named, first = [], {}, 0
    for name in names:
        tokenizer = getattr(pipe, name)
        ids = tokenizer(prompt).input_ids
        for n, own in enumerate(ids):
            columns.append(first + n)
            named[first + n] = tokenizer.decode([own]).strip()
        first += 24
    return columns, named


def test_the_heat_equals_the_explicit_softmax_over_text(pipe: Any) -> None:
    method = RefAM(gas="off", spatial_bias=False, parser="rules", draws=2)
    found = method.ground(pipe, scene(), TEXT)
    prompt = TEXT + " with to pink"
    seen = dense(pipe, prompt, 2)
    columns, named = pieces(pipe, prompt)
    wanted = [n for n, c in enumerate(columns) if named[c] in ("red", "circle")]
    total = torch.zeros(())
    kept = range(int(0.4 * len(seen.scores)), len(seen.scores))
    for n in kept:
        place = seen.places[n]
        text = seen.scores[n][:, :, place.image, place.text][..., columns]
        total = total + text.softmax(-1)[..., wanted].sum(-1).mean((0, 1)) / len(kept)
    total = total.unflatten(0, seen.places[0].grid)
    total = (total - total.min()) / (total.max() - total.min())
    assert found.content == ["red", "circle"] and found.heat.shape == (8, 12)
    assert torch.allclose(found.heat.double(), total, atol=2e-5)
    own = dict(found.words)
    assert set(own) == {*TEXT.split(), "with", "to", "pink"}


def test_each_words_own_spread_over_the_image(pipe: Any) -> None:
    method = RefAM(gas="off", spatial_bias=False, parser="rules", normalise="word", layers=[0])
    found = method.ground(pipe, scene(), TEXT)
    seen = dense(pipe, TEXT + " with to pink")
    columns, named = pieces(pipe, TEXT + " with to pink")
    place = seen.places[0]
    p = seen.scores[0][:, :, place.text][..., place.image].softmax(-1).mean((0, 1))
    total = sum(p[c] for c in columns if named[c] in ("red", "circle"))
    total = total.unflatten(0, place.grid)
    total = (total - total.min()) / (total.max() - total.min())
    assert torch.allclose(found.heat.double(), total, atol=2e-5)


def test_sinks_and_padding_are_those_of_the_dense_matrix(pipe: Any) -> None:
    found = RefAM(parser="rules", layers=[1]).ground(pipe, scene(), TEXT)
    seen = dense(pipe, TEXT + " with to pink")
    columns, _ = pieces(pipe, TEXT + " with to pink")
    place, scores = seen.places[1], seen.scores[1]
    p = scores.softmax(-1).mean((0, 1))
    mean = p.mean(0)
    assert [s.column for s in found.sinks] == columns
    for sink in found.sinks:
        column = p[:, place.text.start + sink.column]
        assert sink.mean == pytest.approx(float(column.mean()), rel=1e-4)
        assert sink.spread == pytest.approx(
            float(column.std(unbiased=False) / column.mean()), rel=1e-3
        )
        assert sink.ratio == pytest.approx(float(column.mean() / mean.median()), rel=1e-3)
    text = scores[..., place.image, place.text].softmax(-1)
    share = 1 - float(text[..., columns].sum(-1).mean())
    assert found.padding == pytest.approx(share, abs=1e-5)


class Plant(Handler):
    """Every query looks at one text key: in what is recorded alone, so activations stay."""

    def __init__(self, column: int, strength: float, layer: int) -> None:
        self.column, self.strength, self.layer = column, strength, layer

    def sites(self, sites: list[Any]) -> list[Any]:
        return [s for s in sites if s.kind == "joint"][self.layer :]

    def before(self, call: Call) -> Call:
        place = denoising(call)
        k = call.k.clone()
        # a direction in which all queries have the same component stands in for a learned sink
        q, k = appended(call.q, 1.0), appended(k, 0.0)
        k[:, :, place.text.start + self.column, -1] = self.strength / call.scale
        v = appended(call.v, 0.0)
        return call.change(q=q, k=k, v=v)

    def after(self, call: Call, state: State) -> State:
        plain = call.change(q=call.q[..., :-1], k=call.k[..., :-1], v=call.v[..., :-1])
        return plain.attend()


def appended(x: torch.Tensor, value: float) -> torch.Tensor:
    return torch.cat([x, torch.full_like(x[..., :1], value)], -1)


def test_a_planted_sink_is_found_and_taken_out(sd3: Any) -> None:
    method = RefAM(spatial_bias=False, parser="rules", kappa=4.0)
    plain = method.ground(sd3, scene(), TEXT)
    assert not any(s.sink for s in plain.sinks)
    prompt = TEXT + " with to pink"
    _, named = pieces(sd3, prompt)
    column = next(c for c, name in named.items() if name == "to")

    def look(**changed: Any) -> Any:
        import dataclasses

        with Session(sd3, [Plant(column, 8.0, 0)]):
            return dataclasses.replace(method, **changed).ground(sd3, scene(), TEXT)

    found, off = look(), look(gas="off")
    assert {s.column for s in found.sinks if s.sink} == {column}
    assert {s.word for s in found.sinks if s.sink} == {"to"}
    # what stays is the softmax without that key, and the unplanted map but for its share
    seen = dense(sd3, prompt)
    columns = [c for c in named if c != column]
    wanted = [n for n, c in enumerate(columns) if named[c] in ("red", "circle")]
    total = torch.zeros(())
    for n in (1, 2):
        place = seen.places[n]
        text = seen.scores[n][:, :, place.image, place.text][..., columns]
        total = total + text.softmax(-1)[..., wanted].sum(-1).mean((0, 1))
    total = total.unflatten(0, place.grid)
    total = (total - total.min()) / (total.max() - total.min())
    assert torch.allclose(found.heat.double(), total, atol=1e-4)
    assert not torch.allclose(off.heat, found.heat, atol=1e-2)


def test_a_content_sink_is_drawn_to_a_magnet_in_front(sd3: Any) -> None:
    prompt = "the red circle with to pink"
    column = next(c for c, name in pieces(sd3, prompt)[1].items() if name == "red")
    method = RefAM(spatial_bias=False, parser="rules", kappa=4.0)

    def look(gas: str) -> Any:
        import dataclasses

        with Session(sd3, [Plant(column, 8.0, 0)]):
            return dataclasses.replace(method, gas=gas).ground(sd3, scene(), "the red circle")

    kept, moved = look("suppress"), look("redirect")
    assert {s.word for s in kept.sinks if s.sink and s.content} == {"red"}
    # its other column, that of T5, is all that was left of it
    assert float(dict(kept.words)["red"].mean()) < float(dict(moved.words)["red"].mean())
    assert {s.word for s in moved.sinks if s.sink} == {"the"} and not moved.notes


def test_padding_is_a_magnet_of_its_own(sd3: Any) -> None:
    settings = {"gas": "off", "parser": "rules", "spatial_bias": False}
    bare = RefAM(**settings).ground(sd3, scene(), TEXT)
    wide = RefAM(padding=True, **settings).ground(sd3, scene(), TEXT)
    assert bare.padding > 0.1
    for (_, a), (_, b) in zip(bare.words, wide.words):
        assert float(b.mean()) < float(a.mean())


def test_filters_act_after_the_softmax_and_by_position(sd3: Any) -> None:
    bare = RefAM(parser="rules", magnets=[], gas="off", spatial_bias=False)
    with_magnets = RefAM(parser="rules", gas="off", spatial_bias=False)
    plain = bare.ground(sd3, scene(), "the pink circle")
    drawn = with_magnets.ground(sd3, scene(), "the pink circle")
    assert plain.content == drawn.content == ["pink", "circle"]
    assert [w for w, _ in drawn.words] == ["the", "pink", "circle", "with", "to", "pink"]
    mean = [float(m.mean()) for w, m in drawn.words if w in ("the", "pink", "circle")]
    assert sum(mean[:3]) < sum(float(m.mean()) for _, m in plain.words)  # magnets took their share
    assert not torch.equal(plain.heat, drawn.heat)


def test_nothing_is_left_behind_and_seeds_repeat(pipe: Any) -> None:
    method = RefAM(parser="rules")
    state = torch.random.get_rng_state()
    one = method.ground(pipe, scene(), TEXT)
    two = method.ground(pipe, scene(), TEXT)
    assert torch.equal(one.heat, two.heat) and one.point == two.point
    assert torch.equal(torch.random.get_rng_state(), state)
    assert "encode_prompt" not in vars(pipe)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipe.transformer.modules())


def test_draws_average_what_each_gives_alone(pipe: Any) -> None:
    def words_of(**changed: Any) -> list[torch.Tensor]:
        found = RefAM(parser="rules", gas="off", **changed).ground(pipe, scene(), TEXT)
        return [m for _, m in found.words]

    both, first, second = words_of(draws=2), words_of(seed=0), words_of(seed=1)
    for b, x, y in zip(both, first, second):
        assert torch.allclose(b, (x + y) / 2, atol=1e-6)


def test_place_words_and_heads() -> None:
    assert places("the blue square on the left at the top") == ["left", "top"]
    assert places("the man who left the room") == []
    assert ramp("bottom", 3, 1).flatten().tolist() == [0, 0.5, 1]
    assert float(ramp("middle", 5, 5)[2, 2]) == 1 and float(ramp("middle", 5, 5)[0].max()) == 0
    for text, wanted in {
        "woman left of the red car": ["woman"],
        "the small blue square on the left": ["small", "blue", "square"],
        "left zebra": ["zebra"],
    }.items():
        assert [w.text for w in head(text, words(text), "rules")] == wanted


def test_the_spatial_bias_moves_the_point(sd3: Any) -> None:
    left = RefAM(parser="rules", gas="off").ground(sd3, scene(), TEXT)
    free = RefAM(parser="rules", gas="off", spatial_bias=False).ground(sd3, scene(), TEXT)
    assert torch.allclose(left.heat, free.heat * ramp("left", *free.heat.shape))


def test_around_keeps_one_piece() -> None:
    heat = torch.zeros(5, 5)
    heat[0, :2], heat[4, 4] = 0.8, 1.0
    assert int(around(heat, (4, 4)).sum()) == 1 and int(around(heat, (0, 0)).sum()) == 2


def test_a_segmenter_of_ones_own(sd3: Any) -> None:
    asked = []

    def own(image: Any, point: tuple[int, int]) -> torch.Tensor:
        asked.append(point)
        return torch.ones(image.height, image.width)

    found = RefAM(parser="rules", segmenter=own).ground(sd3, scene(), TEXT)
    assert asked == [found.point] and bool(found.mask.all())
    with pytest.raises(InputError, match="the segmenter gave a mask"):
        RefAM(parser="rules", segmenter=lambda *_: torch.ones(2, 2)).ground(sd3, scene(), TEXT)


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({}, "that one there", "no content words"),
        ({"magnets": "with"}, TEXT, "magnets is a list"),
        ({"gas": "on"}, TEXT, "gas is"),
        ({"noise": 1.0}, TEXT, "noise is a number above 0 and below 1"),
        ({"layers": [9]}, TEXT, "layers are numbers"),
        ({"segmenter": "none"}, TEXT, "segmenter is"),
        ({}, "red circle " * 20, "shorten the prompt"),
    ],
)
def test_what_cannot_work_is_said(
    sd3: Any, settings: dict[str, Any], text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        RefAM(**{"parser": "rules", **settings}).ground(sd3, scene(), text)


def test_rules_take_the_place_of_a_parser_that_is_missing(
    sd3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.see.refam import method

    monkeypatch.setattr(method, "default_parser", lambda: ("rules", "no spaCy here"))
    found = RefAM().ground(sd3, scene(), TEXT)
    assert found.notes == ["noun phrases by rules: no spaCy here"]
    assert found.point == RefAM(parser="rules").ground(sd3, scene(), TEXT).point
    assert not RefAM(noun_phrase=False).ground(sd3, scene(), TEXT).notes


def test_a_report_is_plain_data(sd3: Any) -> None:
    import json

    found = RefAM(parser="rules").ground(sd3, scene(), TEXT)
    report = json.loads(json.dumps(found.report()))
    assert report["point"] == list(found.point) and report["content"] == ["red", "circle"]
    assert report["share"] == pytest.approx(float(found.mask.float().mean()))
    assert [w["word"] for w in report["words"]] == [w for w, _ in found.words]


def test_a_unet_is_refused() -> None:
    with pytest.raises(ReachError, match="no joint attention"):
        RefAM(parser="rules").ground(tiny_pipeline("sd"), scene(), TEXT)
