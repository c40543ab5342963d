"""Recycled attention: every step is the masked dense model with the same kept sets."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import regard
from regard.core import Mask, State
from regard.core.kernels.reference import probabilities
from regard.errors import InputError, ReachError
from regard.parts.decoding.cache import MethodLayer, Rows, layers
from regard.reach import Call, Handler, Session, Site
from regard.shrink.recycled_attention import method as recycled
from regard.shrink.recycled_attention.method import Recycled
from regard.steer.act.method import ACT
from regard.zoo.tiny import inputs, tiny

IDS = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(0))
PROMPT = 17
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
SHORT = torch.tensor([[1] * 40, [0] * 13 + [1] * 27])  # the second row has 4 tokens of prompt


class Dense(Handler):
    """The card's algorithm in plain loops over an ordinary cache: a mask, and no other storage."""

    def __init__(
        self,
        budget: int,
        stride: int = 16,
        query_check: int | None = None,
        threshold: float = 0.8,
        pool: int | None = None,
        evict: str = "last_full",
        skip: Sequence[int] = (),
    ) -> None:
        self.skip = skip  # layers with a window
        self.budget, self.stride, self.pool, self.evict = budget, stride, pool, evict
        self.check, self.threshold = query_check, threshold
        self.count: dict[int, int] = {}
        self.kept: dict[int, list[list[dict[int, float]]]] = {}
        self.query: dict[int, Tensor] = {}
        self.fulls: list[tuple[int, int]] = []
        self.read: list[float] = []
        self.recovered: list[float] = []

    def before(self, call: Call) -> Call | None:
        at, (queries, keys) = call.site.layer, (call.q.shape[2], call.k.shape[2])
        if at in self.skip:
            return None
        cells = call.mask.cells(queries, keys)
        row = self._row(call)
        if queries > 1:
            self.count[at] = 0
            self._select(at, call, row)
            return None
        self.count[at] += 1
        if self._due(at, call.q):
            self.fulls.append((at, self.count[at]))
            self.read.append(float(cells.sum(-1).double().mean()))
            self.recovered.append(self._held(at, row, keys))
            self._select(at, call, row)
            return None
        seen = torch.zeros(*call.q.shape[:2], 1, keys, dtype=torch.bool)
        group = call.q.shape[1] // call.k.shape[1]
        for b, heads in enumerate(self.kept[at]):
            for h, own in enumerate(heads):
                own[keys - 1] = math.inf
                seen[b, h * group : (h + 1) * group, 0, list(own)] = True
        changed = call.change(mask=Mask.dense(seen))
        self.read.append(float(seen.sum(-1).double().mean()))
        now = self._row(changed)
        for b, heads in enumerate(self.kept[at]):
            for h, own in enumerate(heads):
                if self.evict == "current":
                    own.update({j: float(now[b, h, :, j].max()) for j in own})
                if len(own) > self.budget:
                    del own[min(own, key=lambda j: (own[j], j))]
        return changed

    def _row(self, call: Call) -> Tensor:
        """The last query's attention, `[batch, kv_heads, group, keys]`."""
        p = probabilities(
            call.q, call.k, call.mask, call.scale, softcap=call.softcap, bias=call.bias
        )[:, :, -1]
        if call.sinks is not None:
            lse = call.change(sinks=None).attend().lse[:, :, -1]
            p = p * (lse - torch.logaddexp(lse, call.sinks.to(lse)[None])).exp()[..., None]
        return p.unflatten(1, (call.k.shape[1], -1))

    def _due(self, at: int, q: Tensor) -> bool:
        if self.check is None:
            return self.count[at] % self.stride == 0
        if self.count[at] % self.check:
            return False
        similar = (q * self.query[at]).sum(-1) / (q.norm(dim=-1) * self.query[at].norm(dim=-1))
        return any(float(one.mean()) <= self.threshold for one in similar)

    def _select(self, at: int, call: Call, row: Tensor) -> None:
        self.query[at] = call.q[:, :, -1:].clone()
        queries, keys = call.q.shape[2], call.k.shape[2]
        cells = call.mask.cells(queries, keys)[:, 0, -1].expand(len(row), -1)
        reach = (self.pool or 1) // 2
        self.kept[at] = []
        for b in range(len(row)):
            self.kept[at].append([])
            for h in range(row.shape[1]):
                raw = row[b, h].max(0).values.tolist()
                score = {
                    j: max(raw[max(0, j - reach) : j + reach + 1])
                    for j in range(keys)
                    if bool(cells[b, j])
                }
                best = sorted(score, key=lambda j: (-score[j], -j))[: self.budget]
                self.kept[at][b].append({j: score[j] for j in best})

    def _held(self, at: int, row: Tensor, keys: int) -> float:
        own = [
            [row[b, h][:, [*kept, keys - 1]].sum(-1) for h, kept in enumerate(heads)]
            for b, heads in enumerate(self.kept[at])
        ]
        return float(torch.stack([torch.stack(x) for x in own]).mean())


def steps(model: Any, ids: Tensor, chunks: Sequence[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, the prompt and then chunks at a time."""
    cache, done, found = DynamicCache(config=model.config), 0, []
    for n in chunks:
        now = slice(done, done + n)
        given = {}
        if mask is not None:
            given = {
                "attention_mask": mask[:, : done + n],
                "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, now],
            }
        found.append(model(ids[:, now], past_key_values=cache, **given).logits)
        done += n
    return torch.cat(found, 1)


def decode(ids: Tensor = IDS) -> list[int]:
    return [PROMPT] + [1] * (ids.shape[1] - PROMPT)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 5, "stride": 4},
        {"budget": 6, "stride": 7, "pool": 3},
        {"budget": 5, "stride": 6, "evict": "current"},
        {"budget": 1, "stride": 5},
        {"budget": 3, "stride": 100},
        {"budget": 19, "stride": 12},  # more than the prompt has, less than the text
        {"budget": 19, "stride": 12, "evict": "current"},
        {"budget": 4, "query_check": 2, "threshold": 0.6},
        {"budget": 4, "query_check": 3, "threshold": 0.2, "pool": 5, "evict": "current"},
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_every_step_is_the_masked_dense_model(settings: dict[str, Any], padded: bool) -> None:
    model, mask = tiny("llama").double(), SHORT if padded else None
    method, dense = Recycled(**settings), Dense(**settings)
    with torch.no_grad():
        plain = steps(model, IDS, decode(), mask)
        with regard.apply(model, method):
            found = steps(model, IDS, decode(), mask)
        with Session(model, [dense]):
            true = steps(model, IDS, decode(), mask)
    real = SHORT.bool() if padded else torch.ones_like(IDS).bool()
    assert torch.allclose(found[real], true[real], atol=1e-9)
    if settings["budget"] < 10:
        assert not torch.allclose(found[real], plain[real], atol=1e-4)
    done = method.steps()
    assert [s.tokens for s in done.values()] == [23, 23]
    assert sum(s.full for s in done.values()) == len(dense.fulls)
    assert sum(s.entries for s in done.values()) == pytest.approx(sum(dense.read))
    shares = [x for s in done.values() for x in s.recovered]
    assert sorted(shares) == pytest.approx(sorted(dense.recovered), abs=1e-6)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "gpt2", "gpt_neox", "qwen3"])
def test_other_families(family: str) -> None:
    """Soft caps, learned sinks, absolute positions; layers with a window stay as they are."""
    model = tiny(family)
    model = model if family == "gpt_oss" else model.double()  # experts have no float64 kernel
    kinds = getattr(model.config, "layer_types", None) or []
    windows = [n for n, kind in enumerate(kinds) if kind == "sliding_attention"]
    method, dense = Recycled(budget=4, stride=3), Dense(budget=4, stride=3, skip=windows)
    with torch.no_grad():
        with regard.apply(model, method):
            found = steps(model, IDS, decode())
        with Session(model, [dense]):
            true = steps(model, IDS, decode())
    assert torch.allclose(found, true, atol=2e-5 if family == "gpt_oss" else 1e-9)
    assert dense.fulls and set(method.steps()) == {layer for layer, _ in dense.fulls}


@pytest.mark.parametrize("settings", [{"budget": 4, "stride": 1}, {"budget": 39}, {"budget": 400}])
@pytest.mark.parametrize("padded", [False, True])
def test_neutral_settings_give_the_plain_model(settings: dict[str, int], padded: bool) -> None:
    model, mask = tiny("llama"), SHORT if padded else None
    with torch.no_grad():
        with Session(model, []):
            plain = steps(model, IDS, decode(), mask)
        with regard.apply(model, method := Recycled(**settings)):
            assert torch.equal(steps(model, IDS, decode(), mask), plain)
    if not padded:
        assert method.entries_per_token == sum(range(PROMPT + 1, 41)) / 23
    shares = [x for s in method.steps().values() for x in s.recovered]
    assert all(x == pytest.approx(1, abs=1e-6) for x in shares)


def test_a_batch_equals_each_row_alone() -> None:
    model = tiny("llama").double()
    for settings in ({"budget": 6, "stride": 5}, {"budget": 6, "stride": 9, "evict": "current"}):
        with torch.no_grad(), regard.apply(model, Recycled(**settings)):  # type: ignore[arg-type]
            both = steps(model, IDS, decode(), SHORT)
            alone = steps(model, IDS[1:, 13:], [4] + [1] * 23)
        assert torch.allclose(both[1:, 13:], alone, atol=1e-9)


def test_right_padding_takes_the_row_of_the_last_token() -> None:
    model = tiny("llama").double()
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, 9:] = 0
    kept = []
    for rows, own in ((slice(None), mask), (slice(1, 2), mask[1:, :9])):
        cache = DynamicCache(config=model.config)
        with torch.no_grad(), regard.apply(model, Recycled(budget=5)):
            model(IDS[rows, : own.shape[1]], attention_mask=own, past_key_values=cache)
        layer: Any = cache.layers[0]
        kept.append(layer.positions.data[-1])
    assert torch.equal(*kept)


def test_a_new_turn_is_a_full_step() -> None:
    """Several tokens at once see everything, their last row chooses, the stride counts anew."""
    model, chunks = tiny("llama").double(), [PROMPT, 1, 1, 6, *[1] * 15]
    method, dense = Recycled(budget=4, stride=5), Dense(budget=4, stride=5)
    with torch.no_grad():
        with regard.apply(model, method):
            found = steps(model, IDS, chunks)
        with Session(model, [dense]):
            true = steps(model, IDS, chunks)
    assert torch.allclose(found, true, atol=1e-9)
    assert [n for layer, n in dense.fulls if layer == 0] == [5, 10, 15]


@pytest.mark.parametrize("evict", ["last_full", "current"])
def test_beams(evict: str) -> None:
    """Beam search gives what the masked dense model gives for the same beams."""
    model = tiny("llama")
    with torch.no_grad(), regard.apply(model, Recycled(budget=40, stride=3, evict=evict)):
        wide = model.generate(IDS[:, :PROMPT], num_beams=3, max_new_tokens=9, **GREEDY).sequences
    with torch.no_grad():
        plain = model.generate(IDS[:, :PROMPT], num_beams=3, max_new_tokens=9, **GREEDY).sequences
    assert torch.equal(wide, plain)
    other, outs = torch.tensor([1, 0]), []
    for swap in (False, True):
        method = Recycled(budget=5, query_check=2, threshold=0.3, evict=evict)
        with torch.no_grad(), regard.apply(model, method):
            cache = DynamicCache(config=model.config)
            model(IDS[:, :PROMPT], past_key_values=cache)
            for t in range(PROMPT, 28):
                if swap and t == 22:
                    cache.reorder_cache(other)
                ids = IDS[other] if swap and t >= 22 else IDS
                out = model(ids[:, t : t + 1], past_key_values=cache).logits
        outs.append(out[other] if swap else out)
    assert torch.allclose(*outs, atol=1e-6)


def test_generate_leaves_no_trace_and_holds_what_it_says() -> None:
    model, method = tiny("llama"), Recycled(budget=6, stride=4)
    ids = IDS[:, :PROMPT]
    given = {**GREEDY, "max_new_tokens": 9, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before = model(IDS).logits
        plain = model.generate(ids, **given).past_key_values
        with regard.apply(model, method):
            kept = model.generate(ids, **given).past_key_values
        assert torch.equal(model(IDS).logits, before)
        with pytest.raises(ReachError, match="go on inside"):
            model(IDS[:, :1], past_key_values=kept)
    assert kept.get_seq_length() == plain.get_seq_length() == PROMPT + 8
    row = 2 * 2 * 16 * 4  # batch, key heads, dim, bytes
    layer: Any = kept.layers[0]
    full, small = layer.rows[0], layer.kept[0]
    assert PROMPT + 8 <= full.nbytes / row <= PROMPT + 8 + 16 and small.nbytes / row <= 7 + 16
    assert method.steps()[0].full == 2
    # what a recycled step reads lies in one piece for each head
    assert small.data.stride()[-2:] == (16, 1)


def a_row(scores: Sequence[float]) -> Tensor:
    """Attention of one query over one head with these weights."""
    return torch.tensor(scores)[None, None, None]


def test_ranking() -> None:
    rank = recycled._rank
    assert rank(a_row([0.1, 0.4, 0.1, 0.1, 0.3]), None, 3, None).tolist() == [[[1, 4, 3]]], "ties"
    zeros = a_row([0.0, 0.0, 1.0, 0.0, 0.0])
    assert rank(zeros, None, 3, None).tolist() == [[[2, 4, 3]]]
    assert rank(zeros, None, 3, 3).tolist() == [[[3, 2, 1]]], "the pool widens a peak"
    assert rank(zeros, None, 9, 3).tolist() == [[[3, 2, 1, 4, 0]]], "distinct, and all there are"
    allowed = torch.tensor([[[True, False, True, True, False]]])
    found = rank(zeros, allowed, 4, 3)
    assert found[..., :3].tolist() == [[[3, 2, 0]]] and found[0, 0, 3] in (1, 4), "hidden ones last"
    grouped = torch.tensor([[[[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]]])
    assert rank(grouped, None, 2, None).tolist() == [[[2, 0]]], "the greatest of the group"


def test_the_dynamic_schedule_on_made_up_queries() -> None:
    """Cosines with the last full step's query, looked at every other token only."""
    site = Site(0, "layer", 0, "layers", "self")
    turns = [0, 170, 10, 0, 70, 70, 100, 180, 70, 0]
    cosine = math.cos(math.radians(60))
    method = Recycled(budget=2, query_check=2, threshold=cosine)
    method.sites([site])
    cache = DynamicCache()
    full = []
    make = torch.Generator().manual_seed(0)
    for t, turn in enumerate(turns):
        n = 5 if t == 0 else 1
        k, v = torch.randn(2, 1, 1, n, 2, generator=make)
        method.cache(cache)
        k, v = cache.update(k, v, 0)
        angle = torch.tensor(math.radians(turn))
        q = torch.stack([angle.cos(), angle.sin()]).expand(1, 2, n, 2)
        mask = Mask.causal()
        call = Call(site, q, k, v, mask, 1.0, query_offset=k.shape[2] - n)
        changed = method.before(call) or call
        full.append(changed is call)
        method.after(changed, changed.attend())
    # t = 2: 10 degrees away, t = 4: 70, a full step; t = 6: 30 from it; t = 8: 0
    assert full == [True, False, False, False, True, False, False, False, False, False]


def test_the_last_place_cycles() -> None:
    """More steps than kept rows without a full step: the newest stay."""
    model = tiny("llama").double()
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), regard.apply(model, Recycled(budget=3, stride=100)):
        model(IDS[:, :PROMPT], past_key_values=cache)
        for t in range(PROMPT, 31):
            model(IDS[:, t : t + 1], past_key_values=cache)
    layer: Any = cache.layers[1]
    assert layer.positions.data[..., 0].sort(-1).values.unique(dim=0).tolist() == [
        [[27, 28, 29, 30]] * 2
    ]


def test_with_act() -> None:
    model = tiny("llama").double()
    act: dict[str, Any] = {"beta": 0.2, "threshold": 0.08, "skip_layers": (0, 0)}
    with torch.no_grad():
        with regard.apply(model, ACT(**act)):
            alone = steps(model, IDS, decode())
        for order in (0, 1):
            pair = [ACT(**act), Recycled(budget=4, stride=1)]
            with regard.apply(model, *pair[:: 1 - 2 * order]):
                assert torch.equal(steps(model, IDS, decode()), alone)

        calls = Explicit(sinks := ACT(**act))
        with regard.apply(model, sinks, Recycled(budget=6, stride=4), calls):
            found = steps(model, IDS, decode())
        assert calls.recycled > 20 and calls.edited > 20 and calls.worst < 1e-9
    assert not torch.allclose(found, alone, atol=1e-3)


class Explicit(Handler):
    """Compares every edited recycled step with the explicit edit of its row over all keys."""

    def __init__(self, act: ACT) -> None:
        self.act, self.recycled, self.edited, self.worst = act, 0, 0, 0.0

    def after(self, call: Call, state: State) -> None:
        if call.positions is None:
            return
        self.recycled += 1
        sinks = self.act.found()[call.site.layer]
        at = call.positions.repeat_interleave(2, 1)
        p = probabilities(call.q, call.k, call.mask, call.scale)[:, :, 0]
        wide = torch.zeros(*p.shape[:2], int(at.max()) + 1, dtype=torch.float64).scatter(-1, at, p)
        on = torch.nn.functional.pad(sinks, (0, wide.shape[-1] - sinks.shape[-1]))
        held = (wide * on).sum(-1, keepdim=True)
        rest = 1 - held
        new = torch.where(on, 0.2 * wide, wide + 0.8 * held * wide / rest)
        v = call.v.repeat_interleave(2, 1)
        true = (new.gather(-1, at)[..., None] * v).sum(2)
        self.edited += bool((held > 0).any())
        self.worst = max(self.worst, float((state.out[:, :, 0] - true).abs().max()))


def test_an_encoder_and_a_decoder() -> None:
    for family in ("whisper", "t5"):
        model = tiny(family)
        given = {k: v for k, v in inputs(family, model).items() if not k.startswith("decoder")}
        options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
        with torch.no_grad():
            plain = model.generate(**given, **options)
            with regard.apply(model, method := Recycled(budget=50, stride=3)):
                same = model.generate(**given, **options)
            with regard.apply(model, small := Recycled(budget=2, stride=4)):
                model.generate(**given, **options)
        assert torch.equal(same, plain)
        assert method.steps() and small.entries_per_token < method.entries_per_token


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"stride": 0}, "stride"),
        ({"stride": 2.5}, "stride"),
        ({"query_check": -1}, "query_check"),
        ({"threshold": 1.5}, "threshold"),
        ({"pool": 4}, "pool"),
        ({"evict": "never"}, "evict"),
        ({"budget": None}, "budget is a whole number of at least 1, not None"),
        ({"budget": float("nan")}, "budget is a whole number"),
        ({"stride": None}, "stride is a whole number"),
        ({"threshold": "a"}, "threshold is a number of at least -1"),
        ({"pool": "7"}, "pool is an odd whole number"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recycled(**settings)


class Whole(MethodLayer):
    def store(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def stores(self) -> list[Rows]:
        return []


class Other(Handler):
    """Another method that stores keys and values."""

    stores_rows = True

    def cache(self, cache: Any) -> None:
        layers(cache, [Site(0, "layer", 0, "layers", "self")], "Other", lambda _: Whole("Other"))


def test_what_cannot_work_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InputError, match="both store"):
        regard.apply(model, Recycled(), Other())
    with pytest.raises(InputError, match="Recycled and TaskKV both store"):
        regard.apply(model, Recycled(), regard.TaskKV(ratio=0.5))
    with torch.no_grad(), regard.apply(model, Recycled(budget=4)):
        with pytest.raises(InputError, match="DynamicCache"):
            model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=50))
        cache = model(IDS).past_key_values
        with pytest.raises(ReachError, match="assistant"):
            cache.crop(-1)
        assert torch.isfinite(model(IDS, use_cache=False).logits).all()
    with (
        pytest.raises(InputError, match="both store"),
        regard.apply(model, Other()),
        regard.apply(model, Recycled()),
    ):
        pass
    for family, message in (("mistral", "sliding window"), ("bert", "both ways")):
        other = tiny(family)
        with (
            torch.no_grad(),
            regard.apply(other, Recycled()),
            pytest.raises(InputError, match=message),
        ):
            other(IDS)


def test_a_method_can_be_stored_and_copied() -> None:
    model, method = tiny("llama"), Recycled(budget=4, stride=3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), regard.apply(model, method):
        wanted = model.generate(IDS, **options)
    for other in (pickle.loads(pickle.dumps(method)), copy.deepcopy(method)):
        assert repr(other) == repr(method) and other.steps() == method.steps()
        with torch.no_grad(), regard.apply(model, other):
            assert torch.equal(model.generate(IDS, **options), wanted)


def test_gradients_of_a_prompt_still_flow() -> None:
    model = tiny("llama")
    with regard.apply(model, Recycled(budget=4)):
        model(IDS).logits.sum().backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_half_precision() -> None:
    model = tiny("llama").bfloat16()
    with torch.no_grad():
        with regard.apply(model, Recycled(budget=4, stride=3)):
            found = steps(model, IDS, decode())
        with Session(model, [Dense(budget=4, stride=3)]):
            true = steps(model, IDS, decode())
    assert float((found - true).abs().float().mean()) < 0.02
