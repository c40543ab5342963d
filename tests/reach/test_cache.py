"""Caches whose rows belong to a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from regard.errors import InputError, ReachError
from regard.parts.decoding.cache import MethodLayer, Rows, layers
from regard.reach import Call, Handler, Session, Site
from regard.zoo.tiny import tiny

IDS = torch.randint(3, 120, (2, 10), generator=torch.Generator().manual_seed(0))
WHOLE: dict[str, Any] = {
    "do_sample": False,
    "return_dict_in_generate": True,
    "attention_mask": torch.ones_like(IDS),
    "eos_token_id": -1,
    "pad_token_id": 0,
}


class Whole(MethodLayer):
    """Keeps everything, in growing rows."""

    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "rows"):
            self.rows = (Rows(keys), Rows(values))
            return keys, values
        return self.rows[0].append(keys), self.rows[1].append(values)

    def stores(self) -> list[Rows]:
        return list(getattr(self, "rows", ()))


class Keeps(Handler):
    """A method that keeps everything."""

    def __init__(self, name: str = "Keeps") -> None:
        self.name = name
        self.found: dict[int, MethodLayer] = {}

    def sites(self, sites: list[Site]) -> list[Site]:
        self.own = sites
        return sites

    def cache(self, cache: Any) -> None:
        if cache is not None:
            self.found = layers(cache, self.own, self.name, lambda _: Whole(self.name))

    def before(self, call: Call) -> None:
        assert call.k.shape[2] == self.found[call.site.layer].length


def test_rows_hold_what_was_appended_and_little_more() -> None:
    whole = torch.randn(2, 3, 1000, 4)
    rows = Rows(whole[:, :, :700])
    assert rows.nbytes == 2 * 3 * 700 * 4 * 4, "a view must not keep the whole alive"
    for n in range(700, 1000, 3):
        rows.append(whole[:, :, n : n + 3])
        assert rows.nbytes <= max(1.02 * 96 * len(rows), 96 * (len(rows) + 16))
    assert torch.equal(rows.data, whole)
    index = torch.randint(0, 1000, (2, 3, 7))
    assert torch.equal(rows.pick(index), whole.gather(2, index[..., None].expand(-1, -1, -1, 4)))
    turned = whole.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(Rows(turned).pick(index), rows.pick(index))
    rows.crop(100)
    rows.select(torch.tensor([1, 1]))
    assert torch.equal(rows.data, whole[[1, 1], :, :900])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_over_the_layers_of_a_method(beams: int) -> None:
    model = tiny("llama")
    options = {**WHOLE, "max_new_tokens": 5, "num_beams": beams}
    with torch.no_grad():
        plain = model.generate(IDS, **options)
        with Session(model, [Keeps()]) as session:
            kept = model.generate(IDS, **options)
            own = model(IDS).past_key_values
    assert torch.equal(kept.sequences, plain.sequences)
    assert all(isinstance(layer, Whole) for layer in kept.past_key_values.layers)
    assert all(isinstance(layer, Whole) for layer in own.layers), "a cache the model makes itself"
    assert session.handlers[0].found[0].nbytes > 0
    with pytest.raises(ReachError, match="go on inside"), torch.no_grad():
        model(IDS[:, :1], past_key_values=own)


def test_a_cache_without_layers_is_filled_and_wrong_ones_are_refused() -> None:
    model = tiny("llama")
    used = model(IDS).past_key_values
    with torch.no_grad(), Session(model, [Keeps()]):
        fresh = DynamicCache()
        model(IDS, past_key_values=fresh)
        assert isinstance(fresh.layers[0], Whole) and fresh.get_seq_length() == 10
        with pytest.raises(InputError, match="filled without"):
            model(IDS[:, :1], past_key_values=used)
        with pytest.raises(InputError, match="DynamicCache"):
            model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=20))
        with pytest.raises(ReachError, match="assistant"):
            fresh.crop(-1)
    with torch.no_grad(), Session(model, [Keeps("Other")]), pytest.raises(InputError, match="both"):
        model(IDS[:, :1], past_key_values=fresh)
    with torch.no_grad():
        assert model(IDS, use_cache=False).past_key_values is None


class Stores(Keeps):
    stores_rows = True


def test_a_second_method_that_stores_is_refused_however_the_sessions_nest() -> None:
    model, method = tiny("llama"), Stores()
    for inner in (method, Stores(), Stores("Other")):
        with (
            Session(model, [method]),
            pytest.raises(InputError, match="Stores and Stores both store keys and values"),
            Session(model, [inner]),
        ):
            pass
    with torch.no_grad(), Session(model, [method]):
        cache = model(IDS).past_key_values
    with torch.no_grad(), Session(model), Session(model, [Stores()]):
        model(IDS[:, :1], past_key_values=cache)
    assert cache.get_seq_length() == 11, "another session may go on, with a method of its own"


def test_layers_with_a_window_stay_as_they_are() -> None:
    model = tiny("mistral")
    keeps = Keeps()
    keeps.own = Session(model).sites
    with pytest.raises(InputError, match="sliding window"):
        keeps.cache(DynamicCache(config=model.config))
