"""Every family of denoisers: same output, exact facts, tokens where the table says they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import regard
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler, Session
from regard.reach.denoising import columns, denoising, rows_of

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from .. import denoisers
from ..denoisers import CASES, GRID, TOKENS, denoiser, forward

READ = [name for name, case in CASES.items() if case.text and case.grid is not None]


class Log(Handler):
    """Every call with its State."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, State]] = []

    def after(self, call: Call, state: State) -> None:
        self.calls.append((call, state))


class Asked(TorchFunctionMode):
    """The dense map of every scaled_dot_product_attention, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value", "attn_mask"), args)), **(kwargs or {})}
            q, k, mask = given["query"].double(), given["key"].double(), given.get("attn_mask")
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            s = q @ k.transpose(-1, -2) * (given.get("scale") or q.shape[-1] ** -0.5)
            if mask is not None:
                s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
            self.maps.append(s.softmax(-1).nan_to_num(0.0))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_facts_are_exact(name: str) -> None:
    model, inputs = denoiser(name), CASES[name].inputs
    with Asked() as asked:
        want = forward(model, inputs)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    log = Log()
    with regard.watch(model, facts=["received", "entropy"]) as seen, Session(model, [log]):
        got = forward(model, inputs)
    assert torch.allclose(got, want, atol=2e-5 * max(1.0, float(want.abs().max())))
    assert torch.equal(forward(model, inputs), want)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    maps = asked.maps
    if name == "MochiTransformer3DModel":  # which asks row by row
        maps = [maps[0]] + [torch.cat(maps[n : n + 2]) for n in range(1, len(maps), 2)]
    assert len(log.calls) == len(maps) == len(seen.sites)
    for (call, _), p in zip(log.calls, maps):
        received, entropy = (seen[f][call.site].double() for f in ("received", "entropy"))
        assert torch.allclose(received, p.sum(-2), atol=1e-4)
        assert torch.allclose(entropy, -torch.special.xlogy(p, p).sum(-1), atol=1e-4)


@pytest.mark.parametrize("name", READ)
def test_text_and_image_tokens_are_where_the_table_says(name: str) -> None:
    """A changed text token, and a changed spot of the image, move these keys and no other."""
    case, model = CASES[name], denoiser(name)

    def first(inputs: dict[str, Any]) -> list[Call]:
        log = Log()
        with Session(model, [log]):
            forward(model, inputs)
        return [c for c, _ in log.calls if c.site.text]

    plain = first(case.inputs)
    place = denoising(plain[0])
    assert place.grid == case.grid and place.frames == case.frames and not place.unknown
    assert place.image.stop - place.image.start == torch.tensor(case.grid).prod()
    assert place.text is not None

    def moved(which: str, change: Any) -> list[int]:
        inputs = dict(case.inputs)
        inputs[which] = copy.deepcopy(inputs[which])
        change(inputs[which])
        apart = (first(inputs)[0].k - plain[0].k).abs().amax((0, 1, 3))
        return (apart > 1e-5).nonzero()[:, 0].tolist()

    def text(x: Any) -> None:
        x[0][3] += 1.0

    start = place.text.start
    if case.reach == "pooled":
        joint = plain[0].site.kind == "joint"
        assert (start, place.text.stop) == (joint * place.image.stop, plain[0].k.shape[2])
    else:
        keys = moved(case.text, text)
        padded = 32 if name.startswith("ZImage") else TOKENS  # which refines the padding too
        assert keys == [start + 3] or (case.reach == "all" and len(keys) > 1)
        assert set(keys) <= set(range(start, start + padded))
    if plain[0].site.kind != "joint":
        return

    def image(x: Any) -> None:
        packed = not isinstance(x, list) and x.dim() == 3
        if packed:
            x[:, 7] += 5.0  # row 1, column 1
        else:
            unit = (x[0].shape[-2] // GRID[0], x[0].shape[-1] // GRID[1])
            for row in x:
                row[..., unit[0], unit[1]] += 5.0

    keys = moved(case.image, image)
    assert place.image_keys == place.image
    spots = [place.image.start + n for n in range(7, place.image.stop - place.image.start, 24)]
    assert set(spots) <= set(keys)
    padding = 8 if name.startswith("ZImage") else 0
    assert set(keys) <= set(range(place.image.start, place.image.stop + padding))
    if "Lumina" not in name and "ZImage" not in name:  # which refine the image first
        assert keys == spots


@pytest.mark.parametrize("name", READ)
def test_columns_and_rows_equal_the_dense_map(name: str) -> None:
    """Under masks, biases and grouped heads too."""
    model, log = denoiser(name), Log()
    with Session(model, [log]):
        forward(model, CASES[name].inputs)
    for call, state in log.calls:
        place = denoising(call)
        k = call.k.double().repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
        s = call.scale * call.q.double() @ k.transpose(-1, -2)
        s = s if call.bias is None else s + call.bias
        p = s.masked_fill(~call.mask.cells(*s.shape[-2:]), -torch.inf).softmax(-1)
        row = torch.tensor([1]) if len(p) > 1 else torch.tensor([0])
        got = rows_of(call, state, [0, p.shape[2] - 1], row)
        assert torch.allclose(got.double(), p[row][:, :, [0, -1]], atol=1e-5)
        if place.text is not None:
            got = columns(call, state, [1, 2], row)
            first = place.text.start
            want = p[row][:, :, place.image, first + 1 : first + 3]
            assert torch.allclose(got.double(), want, atol=1e-5)


def test_padding_of_the_text_is_masked() -> None:
    """Rows of different lengths: a masked word gets nothing, and the map still sums to one."""
    name = "QwenImageTransformer2DModel"
    model, inputs = denoiser(name), dict(CASES[name].inputs)
    mask = torch.ones(2, TOKENS)
    mask[0, 3:] = 0
    inputs["encoder_hidden_states_mask"] = mask
    want, log = forward(model, inputs), Log()
    with Session(model, [log]):
        assert torch.allclose(forward(model, inputs), want, atol=1e-5)
    call, state = log.calls[0]
    every = columns(call, state, list(range(TOKENS)))
    assert float(every[0, :, :, 3:].abs().max()) == 0.0 < float(every[1, :, :, 3:].min())


def test_rows_without_their_padding_are_as_alone() -> None:
    """Mochi asks for each row without the padding of its text; a batch is as its rows alone."""
    name = "MochiTransformer3DModel"
    model, inputs = denoiser(name), dict(CASES[name].inputs)
    mask = torch.ones(2, TOKENS).bool()
    mask[0, 3:] = False
    inputs["encoder_attention_mask"] = mask
    want = forward(model, inputs)
    with regard.watch(model, facts=["received"]) as seen:
        assert torch.allclose(forward(model, inputs), want, atol=1e-5)
    with regard.watch(model, facts=["received"]) as alone:
        forward(model, {k: v[:1] for k, v in inputs.items()})
    for site in seen.sites:
        both, one = (w["received"][site] for w in (seen, alone))
        assert torch.allclose(both[:1, :, : one.shape[2]], one, atol=1e-5)
        if site.kind == "joint":
            assert both.shape[0] == 2 and not bool(both[0, :, one.shape[2] :].any())


def test_an_unknown_order_is_watched_and_said() -> None:
    model, inputs = denoiser("StableAudioDiTModel"), CASES["StableAudioDiTModel"].inputs
    maps = regard.WordMaps(tokens={"a": [1]})
    with Session(model, [maps]) as session, pytest.raises(ReachError, match="not known to regard"):
        forward(model, inputs)
    assert "watched without words" in session.notes[0]
    assert Session(denoiser("FluxTransformer2DModel")).notes == []


def test_attention_without_a_softmax_is_said() -> None:
    session = Session(denoiser("SanaTransformer2DModel"))
    assert [s.name for s in session.sites] == ["transformer_blocks.0.attn2"]
    assert (
        "1 attention modules" in session.notes[0]
        and "transformer_blocks.0.attn1" in session.notes[0]
    )


def test_rows_packed_by_their_lengths_share_no_columns() -> None:
    name = "Lumina2Transformer2DModel"
    model, inputs = denoiser(name), dict(CASES[name].inputs)
    mask = torch.ones(2, TOKENS).bool()
    mask[0, 3:] = False
    inputs["encoder_attention_mask"] = mask
    maps = regard.WordMaps(tokens={"a": [1]})
    with Session(model, [maps]), pytest.raises(ReachError, match="give one prompt at a time"):
        forward(model, inputs)
    inputs["encoder_attention_mask"] = mask[:1].expand(2, -1)
    maps = regard.WordMaps(tokens={"a": [1]})
    with Session(model, [maps]):
        forward(model, inputs)
    assert maps["a"].shape == (2, *GRID)
    maps = regard.WordMaps(tokens={"a": [4]})
    with Session(model, [maps]), pytest.raises(InputError, match="there are 3 text tokens"):
        forward(model, inputs)


def test_references_lie_behind_the_image() -> None:
    model, log = denoiser("Flux Kontext"), Log()
    with Session(model, [log]):
        forward(model, CASES["Flux Kontext"].inputs)
    place = denoising(log.calls[0][0])
    assert (place.text, place.image) == (slice(0, 5), slice(5, 29))
    assert place.reference == slice(29, 53) and place.grid == GRID


def test_the_table_names_real_classes() -> None:
    import diffusers

    from regard.reach.layouts import FAMILIES

    known = {name for name in FAMILIES if hasattr(diffusers, name)}
    assert {case.name or name for name, case in CASES.items()} - known <= {"StableAudioDiTModel"}
    assert denoisers.FRAMES == 2
