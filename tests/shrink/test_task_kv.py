"""Task-KV: the choice is the card's, decoding is the masked dense model, bytes really fall."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import regard
from regard.core import State
from regard.errors import InputError, ReachError
from regard.reach import Call, Handler
from regard.shrink import StreamingLLM, TaskKV
from regard.shrink.task_kv.method import Plan, distances, semantic, split
from regard.steer.act.method import ACT
from regard.zoo.tiny import tiny

from .explicit import Dense, decode, dense, ids, maps, wide

SMALL: dict[str, Any] = {"sinks": 2, "recent": 5, "window": 7, "pool": 3, "top": 20}


def explicit_choice(
    p: Tensor, v: Tensor, method: TaskKV, layer: int, layers: int
) -> tuple[list[int], dict[int, list[int]], list[float]]:
    """The card, step by step, for one row: full heads, positions of the others, distances."""
    n, tokens, _ = v.shape
    groups = len(p) // n
    received = p[:, -method.window :].mean(1)
    received = torch.stack([received[h * groups : (h + 1) * groups].mean(0) for h in range(n)])
    smooth = torch.zeros_like(received)
    half = method.pool // 2
    for j in range(tokens):
        smooth[:, j] = received[:, max(0, j - half) : j + half + 1].sum(-1) / method.pool
    vectors = torch.zeros(n, v.shape[-1], dtype=v.dtype)
    for h in range(n):
        ranked = sorted(range(tokens), key=lambda j: (-float(smooth[h, j]), j))
        for j in ranked[: method.top or tokens]:
            vectors[h] += received[h, j] * v[h, j]
    apart = [float((x - vectors.mean(0)).norm()) for x in vectors]
    plan = method.plan(n, tokens, layer, layers)
    far = sorted(range(n), key=lambda h: (-apart[h], h))
    near = sorted(range(n), key=lambda h: (apart[h], h))
    close = min(method.nearest, plan.full - 1) if plan.full else 0
    full = set(far[: plan.full - close])
    full |= set([h for h in near if h not in full][:close])
    others = {}
    for h in sorted(set(range(n)) - full):
        middle = range(plan.sinks, tokens - plan.recent)
        best = sorted(middle, key=lambda j: (-float(smooth[h, j]), j))[: plan.middle]
        ends = [*range(plan.sinks), *range(tokens - plan.recent, tokens)]
        others[h] = sorted([*ends, *best])
    return sorted(full), others, apart


@pytest.mark.parametrize("top", [20, None])
@pytest.mark.parametrize("nearest", [0, 1, 2])
def test_the_choice_is_the_cards(top: int | None, nearest: int) -> None:
    model, text = wide(), ids(61, rows=2)
    method = TaskKV(ratio=0.7, beta=0.5, m=2, nearest=nearest, **{**SMALL, "top": top})
    with torch.no_grad(), regard.apply(model, method, seen := Dense()):
        model(text)
    assert [s.plan.full for s in method.heads().values()] == [3, 3, 2]
    for number, layer in method._found.items():
        call = seen.calls[number]
        p = maps(call)
        for row in range(2):
            full, others, apart = explicit_choice(p[row], call.v[row], method, number, 3)
            found = method.heads()[number]
            assert found.full[row].tolist() == full
            assert found.distances[row].tolist() == pytest.approx(apart, rel=1e-9)
            whole, thin = layer.groups
            assert whole.heads is not None and whole.heads[row].tolist() == full
            assert thin.heads is not None and thin.positions is not None
            assert dict(zip(thin.heads[row].tolist(), thin.positions[row].tolist())) == others
            at = thin.positions[row, 0].long()
            head = int(thin.heads[row, 0])
            assert torch.equal(thin.keys.data[row, 0], call.k[row, head, at])
            assert torch.equal(whole.values.data[row], call.v[row, full])


def test_without_top_the_vector_is_the_mean_output() -> None:
    """The identity: all weights times the values is the mean output of the last queries."""
    model, text = wide(heads=6), ids(40)
    outs: dict[int, Tensor] = {}

    class Outs(Handler):
        def after(self, call: Call, state: State) -> None:
            outs[call.site.layer] = state.out[:, :, -7:].mean(2)

    method = TaskKV(ratio=0.9, **{**SMALL, "top": None})
    with torch.no_grad(), regard.apply(model, method, Outs()):
        model(text)
    for number, found in method.heads().items():
        assert torch.allclose(found.distances, distances(outs[number]), rtol=1e-9)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("step", [1, 9])
def test_decoding_is_the_masked_dense_model(rows: int, step: int) -> None:
    """Token by token and several at once; the rows of a batch may keep different heads whole."""
    model, text = wide(), ids(70, rows=rows)
    method = TaskKV(ratio=0.5, beta=0.34, m=1, **SMALL)
    found = decode(model, text, 43, method, step=step)
    splits = [s.full for s in method.heads().values()]
    if rows == 2:
        assert any(s[0].tolist() != s[1].tolist() for s in splits), "rows should differ here"
    assert torch.allclose(found, dense(model, text, 43, method), atol=1e-9)
    with torch.no_grad():
        plain = model(text).logits[:, 43:]
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "gpt2"])
def test_families(family: str) -> None:
    """Soft caps, learned sinks and layers with a window, which stay as they are."""
    # the experts of gpt-oss know no float64
    model = tiny(family) if family == "gpt_oss" else tiny(family).double()
    text, method = ids(40), TaskKV(ratio=0.8, **SMALL)
    found = decode(model, text, 31, method)
    near = 1e-8 if found.dtype == torch.float64 else 2e-5
    assert torch.allclose(found, dense(model, text, 31, method), atol=near)
    sliding = [t != "full_attention" for t in getattr(model.config, "layer_types", None) or []]
    full = [n for n in range(model.config.num_hidden_layers) if not any(sliding[n : n + 1])]
    assert list(method.heads()) == full


def test_learned_sinks_take_one_sequence() -> None:
    """Rows that keep different heads whole would need sinks of their own."""
    # four key heads: of two, both lie equally far from their mean
    config = copy.deepcopy(tiny("gpt_oss").config)
    config.num_key_value_heads = config.num_attention_heads
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(tiny("gpt_oss"))(config).eval()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            projection.weight.data *= 40
    method = TaskKV(ratio=0.8, **SMALL)
    with torch.no_grad(), regard.apply(model, method):
        alone = []
        for seed in range(12):
            model(ids(40, seed=seed))
            alone.append([s.full.tolist() for s in method.heads().values()])
        other = next(n for n, full in enumerate(alone) if full != alone[0])
        both = torch.cat([ids(40), ids(40, seed=other)])
        with pytest.raises(InputError, match="learned sinks, and the rows"):
            model(both)


def test_a_batch_is_each_row_alone() -> None:
    model, text = wide(), ids(60, rows=3)
    both = decode(model, text, 50, TaskKV(ratio=0.5, **SMALL))
    for row in range(3):
        alone = decode(model, text[row : row + 1], 50, TaskKV(ratio=0.5, **SMALL))
        assert torch.allclose(both[row], alone[0], atol=1e-9)


def test_the_prompt_reads_as_before_and_no_trace_is_left() -> None:
    model, text = tiny("llama"), ids(50)
    with torch.no_grad():
        plain = model(text).logits
        with regard.apply(model, TaskKV(ratio=0.8, **SMALL)):
            assert torch.equal(model(text).logits, plain)
        assert torch.equal(model(text).logits, plain)


def test_ratio_one_is_the_plain_model() -> None:
    model, text = tiny("llama"), ids(50, rows=2)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": -1, "pad_token_id": 0}
    real = torch.ones_like(text)
    real[1, :9] = 0
    for mask in (torch.ones_like(text), real):
        with torch.no_grad():
            plain = model.generate(text, attention_mask=mask, **options)
            with regard.apply(model, method := TaskKV(ratio=1)):
                same = model.generate(text, attention_mask=mask, **options)
            with regard.apply(model):
                routed = model.generate(text, attention_mask=mask, **options)
        assert torch.equal(same.sequences, plain.sequences)
        assert torch.equal(torch.stack(same.logits), torch.stack(routed.logits))
        for a, b in zip(same.logits, plain.logits):
            assert torch.allclose(a, b, atol=1e-5)
        assert len(method.heads()) == 2 and method.full_nbytes > 0


def test_calls_without_the_cache_read_nothing_of_it() -> None:
    """Rows of an earlier run stay out of a pass without a cache, and of a part called alone."""
    model, text = tiny("llama"), ids(30)
    with torch.no_grad():
        plain, inner = model(text).logits, model.model(text).last_hidden_state
        with regard.apply(model, TaskKV(ratio=1)):
            model(ids(50))
            assert torch.allclose(model(text, use_cache=False).logits, plain, atol=1e-6)
        with regard.apply(model, TaskKV(ratio=0.8, **SMALL)):
            model(ids(50))
            assert torch.allclose(model.model(text).last_hidden_state, inner, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.4, 0.6, 0.93])
def test_the_bytes_held_are_those_of_the_ratio(ratio: float) -> None:
    model, text = wide().float(), ids(501)
    method = TaskKV(ratio=ratio, beta=0.2, m=1, sinks=4, recent=32)
    with torch.no_grad(), regard.apply(model, method):
        cache = model(text).past_key_values
        dim = model.config.head_dim
        full = 2 * 3 * 6 * 501 * dim * 4
        assert method.full_nbytes == full
        assert ratio * full * 0.98 <= method.nbytes <= ratio * full
        for _ in range(40):
            model(text[:, :1], past_key_values=cache)
    grown = 40 * 2 * 3 * 6 * dim * 4
    assert method.full_nbytes == full + grown
    assert method.nbytes <= (ratio * full + grown) * 1.02 + 2 * 3 * 6 * 16 * dim * 4
    stored = sum(rows._store.numel() * 4 for x in cache.layers for rows in x.stores())
    assert method.nbytes == stored


def test_plans_meet_the_budget() -> None:
    made = 0
    grid = itertools.product(
        (0.2, 0.4, 0.6, 0.95), (2, 3, 8, 32), (30, 300, 601, 2048), (0.1, 0.25, 0.5), (16, 4)
    )
    for ratio, heads, tokens, beta, sinks in grid:
        method = TaskKV(ratio=ratio, beta=beta, sinks=sinks, recent=16 * sinks)
        for layer in range(4):
            try:
                plan = method.plan(heads, tokens, layer, 4)
            except InputError:
                assert int(ratio * heads * tokens) < heads * 17 * sinks or tokens <= 17 * sinks
                continue
            made += 1
            budget = int(ratio * heads * tokens + 1e-9)
            used = plan.full * tokens + (heads - plan.full) * plan.thin
            assert used <= budget and budget - used < heads - plan.full
            assert plan.thin <= tokens and min(plan.sinks, plan.middle, plan.recent) >= 0
            assert plan.recent <= 16 * sinks and plan.sinks <= sinks
            if plan.middle:
                assert (plan.sinks, plan.recent) == (sinks, 16 * sinks), "ends come first"
            if plan.recent:
                assert plan.sinks == sinks, "recent tokens give way before sinks"
    assert made > 500


def test_the_schedule_of_the_paper() -> None:
    llama = TaskKV(ratio=0.6, beta=0.25, m=4)
    falls = [llama.plan(32, 4096, r, 32).full for r in range(32)]
    assert falls[0] == 8 and falls[-1] == 4 and sum(falls) / 32 == 6
    assert falls == sorted(falls, reverse=True)
    mistral = TaskKV(ratio=0.6, beta=0.3, m=1)
    assert [mistral.plan(8, 4096, r, 32).full for r in (0, 31)] == [2, 1]
    # k = (B - N f) / (n - f) - s1 - s2, by hand
    plan = TaskKV(ratio=0.4, beta=0.25, m=4).plan(32, 2000, 0, 32)
    assert plan.middle == (25600 - 2000 * 8) // 24 - 16 - 256


def test_budgets_that_do_not_fit() -> None:
    method = TaskKV(ratio=0.3, beta=0.5, sinks=2, recent=8)
    plan = method.plan(4, 100, 0, 2)  # 120 entries: two whole heads would take 200
    assert plan == Plan(full=(120 - 40) // 90, sinks=2, middle=30 - 10, recent=8, lowered=True)
    with pytest.raises(InputError, match="raise ratio, or lower sinks and recent"):
        TaskKV(ratio=0.3, beta=0.5).plan(4, 600, 0, 2)
    model = tiny("llama")
    with (
        torch.no_grad(),
        regard.apply(model, method),
        pytest.warns(UserWarning, match="holds only 0 whole heads in layer 0") as caught,
    ):
        model(ids(60))
    assert len(caught) == 1
    assert {s.full.shape for s in method.heads().values()} == {(1, 0)}
    text = ids(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decode(model.double(), text, 50, method)
    assert torch.allclose(found, dense(model.double(), text, 50, method), atol=1e-8)


def test_beams() -> None:
    model, text, other = wide(), ids(60, rows=2), torch.tensor([1, 0])
    results = []
    for swap in (False, True):
        method = TaskKV(ratio=0.5, **SMALL)
        with torch.no_grad(), regard.apply(model, method):
            cache = DynamicCache(config=model.config)
            model(text[:, :50], past_key_values=cache)
            if swap:
                cache.reorder_cache(other)
            order = other if swap else torch.tensor([0, 1])
            outs = [
                model(text[order, n : n + 1], past_key_values=cache).logits for n in range(50, 60)
            ]
        results.append(torch.cat(outs, 1)[order])
    assert torch.allclose(results[0], results[1], atol=1e-12)
    with torch.no_grad(), regard.apply(tiny("llama"), TaskKV(ratio=0.8, **SMALL)) as session:
        beams = session.model.generate(
            text[:1], num_beams=3, max_new_tokens=6, do_sample=False, eos_token_id=-1
        )
    assert beams.shape == (1, 66)


def test_a_second_turn_is_appended() -> None:
    """Several tokens on a compressed cache: every head keeps them all, none is compressed again."""
    model, text = wide(), ids(80)
    method = TaskKV(ratio=0.5, **SMALL)
    with torch.no_grad(), regard.apply(model, method):
        cache = model(text[:, :50]).past_key_values
        before = [len(r) for x in cache.layers for r in x.stores()]
        model(text[:, 50:], past_key_values=cache)
        after = [len(r) for x in cache.layers for r in x.stores()]
        assert [b + 30 for b in before] == after and cache.get_seq_length() == 80
        model(ids(33, seed=5))
        assert next(iter(method._found.values())).length == 33, "a new prompt begins anew"


def test_half_precision_sums_in_float32() -> None:
    model = wide().to(torch.bfloat16)
    method = TaskKV(ratio=0.5, **SMALL)
    logits = decode(model, ids(60), 50, method)
    assert torch.isfinite(logits).all() and logits.dtype == torch.bfloat16
    assert {s.distances.dtype for s in method.heads().values()} == {torch.float32}


class Edited(Dense):
    """The dense model with ACT's edit written out."""

    sinks: dict[int, Tensor]

    def edit(self, call: Call, p: Tensor) -> Tensor:
        s = self.sinks[call.site.layer]
        s = torch.nn.functional.pad(s, (0, p.shape[-1] - s.shape[-1]))[:, :, None]
        w, others = (p * s).sum(-1, keepdim=True), p * ~s
        rest = others.sum(-1, keepdim=True)
        edited = torch.where(s, 0.3 * p, p + 0.7 * w * p / rest.clamp_min(1e-300))
        return torch.where(rest > 0, edited, p)


@pytest.mark.parametrize("first", ["act", "task-kv"])
def test_beside_act(first: str) -> None:
    model, text = wide(), ids(60)
    settings: dict[str, Any] = {"beta": 0.3, "threshold": 0.06, "skip_layers": (0, 0)}

    def both(ratio: float) -> tuple[Tensor, ACT, TaskKV]:
        act, method = ACT(**settings), TaskKV(ratio=ratio, **SMALL)
        pair = (act, method) if first == "act" else (method, act)
        return decode(model, text, 50, *pair), act, method

    neutral, _, _ = both(1.0)
    assert torch.allclose(neutral, decode(model, text, 50, ACT(**settings)), atol=1e-12)
    found, act, method = both(0.5)
    assert all(bool(s.any()) for s in act.found().values())
    like = type("Own", (Edited,), {"sinks": {n: s[..., :50] for n, s in act.found().items()}})
    assert torch.allclose(found, dense(model, text, 50, method, like), atol=1e-8)
    assert not torch.allclose(found, dense(model, text, 50, method), atol=1e-3)


def test_act_cannot_follow_rows_that_differ() -> None:
    act = ACT(threshold=0.06, skip_layers=(0, 0))
    with pytest.raises(InputError, match="one sequence at a time"):
        decode(wide(), ids(60, rows=2), 50, act, TaskKV(ratio=0.5, **SMALL))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ratio": 0}, "ratio"),
        ({"ratio": 1.1}, "ratio"),
        ({"beta": 0}, "beta"),
        ({"m": -1}, "m is"),
        ({"window": 0}, "window"),
        ({"top": 0}, "top"),
        ({"pool": 4}, "odd"),
        ({"nearest": -1}, "nearest"),
        ({"distance": "manhattan"}, "distance"),
        ({"ratio": "0.5"}, "ratio is a number above 0"),
        ({"ratio": None}, "ratio is a number"),
        ({"sinks": 1.5}, "sinks is a whole number"),
        ({"recent": None}, "recent is a whole number"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TaskKV(**settings)


def test_what_cannot_work_is_refused() -> None:
    model, text = tiny("llama"), ids(40, rows=2)
    with torch.no_grad():
        with pytest.raises(InputError, match="at least 2 key-value heads"):
            regard.apply(wide(kv_heads=1), TaskKV(ratio=0.8)).attach()
        with regard.apply(model, TaskKV(ratio=0.8, **SMALL)):
            real = torch.ones_like(text)
            real[1, :9] = 0
            with pytest.raises(InputError, match="unpadded"):
                model(text, attention_mask=real)
            with pytest.raises(InputError, match="use_cache=True"):
                model(text, use_cache=False)
            with pytest.raises(InputError, match="plain causal"):
                square = torch.ones(2, 1, 40, 40, dtype=torch.bool)
                model(text, attention_mask=square)
            cache = model(text).past_key_values
            longer = torch.cat([real, real[:, :1]], 1)
            with pytest.raises(InputError, match="unpadded"):
                model(text[:, :1], past_key_values=cache, attention_mask=longer)
        with pytest.raises(ReachError, match="go on inside"):
            model(text[:, :1], past_key_values=cache)
        with pytest.raises(InputError, match="apply one of them"):
            regard.apply(model, TaskKV(ratio=0.8, **SMALL), StreamingLLM(ratio=0.5))
        bert = tiny("bert")
        with (
            regard.apply(bert, TaskKV(ratio=0.8)),
            pytest.raises(InputError, match="causal language model"),
        ):
            bert(text)
        with pytest.raises(InputError, match="reads it in an encoder"):
            regard.apply(tiny("t5"), TaskKV(ratio=0.8)).attach()
        mistral = tiny("mistral")
        with (
            regard.apply(mistral, TaskKV(ratio=0.8, **SMALL)),
            pytest.raises(InputError, match="window"),
        ):
            mistral(text, past_key_values=DynamicCache())


def test_ties_go_to_the_lower_head() -> None:
    apart = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 2.0, 0.0]])
    assert split(apart, 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert split(apart, 1).tolist() == [[0], [1]]
    assert split(apart, 3, nearest=0).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert split(apart, 0).shape == (2, 0)
    vectors = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    cosine = distances(vectors, "cosine")
    assert torch.allclose(cosine, torch.tensor([[1 - 0.5**0.5, 1 - 0.5**0.5, 0.0]]), atol=1e-6)


def test_the_weights_of_the_top_tokens_are_not_rescaled() -> None:
    weights = torch.tensor([[[0.1, 0.6, 0.3]]])
    v = torch.eye(3)[None, None]
    ranks = torch.tensor([[[3.0, 1.0, 2.0]]])
    assert torch.allclose(semantic(weights, ranks, v, 2), torch.tensor([0.1, 0.0, 0.3]))


@pytest.mark.slow
@pytest.mark.real
def test_on_real_weights(smollm2: tuple[Any, Any]) -> None:
    """Decoding over the thin cache of a trained model is the masked dense model."""
    model, tokenizer = smollm2
    text = tokenizer(regard.zoo.text("northanger-abbey")[:3000], return_tensors="pt").input_ids
    text = text[:, :420]
    method = TaskKV(ratio=0.45, sinks=4, recent=32)
    found = decode(model, text, 400, method, step=20)
    # 20 new rows in each head, and up to 16 spare ones
    assert method.nbytes <= (0.45 * 400 + 20 + 16) * 30 * 3 * 64 * 8
    assert len({tuple(s.full[0].tolist()) for s in method.heads().values()}) > 1
    assert torch.allclose(found, dense(model, text, 400, method), atol=2e-3)
    with torch.no_grad():
        assert not torch.allclose(found, model(text).logits[:, 400:], atol=0.1)
