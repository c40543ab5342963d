"""Every mixer is causal, masked, cached, padded and saved as softmax attention is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regard
from regard.core import Mask, State, attend, merge
from regard.errors import InputError
from regard.parts.mixers import KEEPS, KINDS, SEVEN, MixerConfig, MixerForCausalLM, counts, placed
from regard.parts.mixers.caches import StateLayer, held, prepare
from regard.parts.mixers.kinds import kept
from regard.parts.mixers.operations import FORMS, operate
from regard.parts.mixers.recurrent import features, scan, second_order, separate_orders, summed

VOCAB, LONGEST = 64, 40
NAMES = list(KINDS)
HYBRIDS = {f"{m}+standard": [m, "standard"] for m in SEVEN[1:]}


def config(mixers: str | list[str], layers: int = 2, **changes: Any) -> MixerConfig:
    if isinstance(mixers, str):
        mixers = [mixers] * layers
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": len(mixers), "num_attention_heads": 2,
        "max_position_embeddings": LONGEST, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": None, "mixers": mixers,
    }  # fmt: skip
    return MixerConfig(**(settings | changes))


def tiny(mixers: str | list[str], **changes: Any) -> Any:
    torch.manual_seed(0)
    model = MixerForCausalLM(config(mixers, **changes)).eval()
    if "fixed_seq_qk" in model.config.mixers:
        model.set_fixed_text(torch.randint(1, VOCAB, (LONGEST,)))
    return model


def tokens(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.manual_seed(seed))


ALL = {**{n: n for n in NAMES}, **HYBRIDS}


@pytest.fixture(params=ALL.values(), ids=ALL.keys())
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


# -- what holds for every mixer ------------------------------------------------------------------
@torch.no_grad()
def test_no_token_sees_a_later_one(model: Any) -> None:
    ids = tokens()
    other = ids.clone()
    other[:, 5] = ids[:, 5] % (VOCAB - 1) + 1
    before, after = model(ids).logits, model(other).logits
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert (before[:, 5] - after[:, 5]).abs().max() > 1e-3
    later = (before[:, 6:] - after[:, 6:]).abs().max()
    if model.config.mixers == ["mlp", "mlp"]:
        assert later == 0  # no mixing
    else:
        assert later > 1e-4


@torch.no_grad()
def test_a_left_padded_batch_gives_what_each_row_gives_alone(model: Any) -> None:
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    padded = model(ids, attention_mask=mask).logits
    assert torch.allclose(padded[0, 3:], model(ids[:1, 3:]).logits[0], atol=1e-4)
    assert torch.allclose(padded[1], model(ids[1:]).logits[0], atol=1e-4)
    ids[0, :3] = 7
    assert torch.equal(model(ids, attention_mask=mask).logits[0, 3:], padded[0, 3:])


@torch.no_grad()
def test_right_padding_changes_nothing(model: Any) -> None:
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    padded = model(ids, attention_mask=mask).logits
    assert torch.allclose(padded[0, :6], model(ids[:1, :6]).logits[0], atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_gives_what_one_pass_gives(model: Any, padded: bool) -> None:
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :2] = 0
    whole = model(ids, attention_mask=mask).logits
    cache, parts = None, []
    for a, b in ((0, 4), (4, 5), (5, 8), (8, 9)):  # a chunk of several tokens too
        out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    live = mask.bool()
    assert torch.allclose(torch.cat(parts, 1)[live], whole[live], atol=1e-4)
    assert cache.get_seq_length() == 9


def test_generation_takes_the_cache(model: Any) -> None:
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    with_cache = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    without = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False
    )
    assert torch.equal(with_cache, without)
    alone = model.generate(ids[:1, 3:], max_new_tokens=5, do_sample=False)
    assert torch.equal(alone[0, 6:], with_cache[0, 9:])


def test_beams_are_reordered(model: Any) -> None:
    ids = tokens(1)
    settings: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    with_cache = model.generate(ids, **settings)
    assert torch.equal(with_cache, model.generate(ids, use_cache=False, **settings))


def test_a_saved_model_is_loaded_by_the_auto_class(model: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MixerForCausalLM and loaded.config.mixers == model.config.mixers
    saved = model.state_dict()
    assert all(torch.equal(x, saved[name]) for name, x in loaded.state_dict().items())
    with torch.no_grad():
        assert torch.allclose(loaded(tokens()).logits, model(tokens()).logits, atol=1e-5)


def test_every_parameter_gets_a_gradient_and_checkpointing_gives_the_same(model: Any) -> None:
    ids = tokens()
    grads = []
    for checkpointed in (False, True):
        trained = copy.deepcopy(model).train()
        for part in trained.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        if checkpointed:
            trained.gradient_checkpointing_enable()
        trained(ids, labels=ids).loss.backward()
        missing = [n for n, p in trained.named_parameters() if p.grad is None]
        assert not missing
        grads.append({n: p.grad for n, p in trained.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5), name


def test_bfloat16_autocast_stays_near(model: Any) -> None:
    ids = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
        loss.backward()
    with torch.no_grad():
        exact = model(ids, labels=ids).loss
    assert abs(float(loss) - float(exact)) < 0.15 * float(exact)


# -- sums ----------------------------------------------------------------------------------------
def inputs(keys: int = 7, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    q = torch.randn(2, heads, 7, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, keys, 8, dtype=torch.float64) for _ in range(2))
    return tuple(x.requires_grad_() for x in (q, k, v))  # type: ignore[return-value]


MASKS = {
    "causal": Mask.causal(),
    "window": Mask.causal() & Mask.band(2, None),
    "padding": Mask.causal() & Mask.padding(torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])),
}


@pytest.mark.parametrize("norm", ["none", "sum", "signed"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("form", FORMS)
def test_sums_and_gradients_equal_the_dense_ones(form: str, mask: str, norm: str) -> None:
    q, k, v = inputs()
    table = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(2, 4, 7, dtype=torch.float64, requires_grad=True)
    allowed = MASKS[mask].cells(7, 7)
    away = (torch.arange(7)[:, None] - torch.arange(7)).clamp_min(0)
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    s = q @ wide[0].mT * 8**-0.5 + table[:, away] - lse[..., None]
    truth = {
        "sigmoid": torch.sigmoid, "elu": lambda s: torch.nn.functional.elu(s) + 1,
        "identity": lambda s: s, "one": torch.ones_like, "taylor": lambda s: 1 + s + s**2 / 2,
    }[form]  # fmt: skip
    w = truth(s) * allowed
    total = w.sum(-1)
    dense = w @ wide[1]
    if norm == "sum":
        dense = dense / (total + 1e-8)[..., None]
    elif norm == "signed":
        dense = dense / total.abs().clamp_min(1)[..., None]
    call: dict[str, Any] = {"norm": norm, "mask": MASKS[mask], "table": table, "lse": lse}
    out, sums = operate(q, k, v, form, **call)
    live = allowed.any(-1).expand(2, 4, 7)
    assert torch.allclose(out[live], dense[live], atol=1e-9)
    assert torch.allclose(sums[live], total[live], atol=1e-9)
    weight = torch.randn_like(dense) * live[..., None]
    given = (q, k, v, table, lse)

    def grads(x: Tensor, t: Tensor) -> Any:
        loss = (x * weight).sum() + (t * live).sum()
        return torch.autograd.grad(loss, given, allow_unused=True)

    for name, a, b in zip(["q", "k", "v", "table", "lse"], grads(out, sums), grads(dense, total)):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=1e-8), name


def test_a_sigmoid_is_the_mass_of_a_key_beside_one_of_score_zero() -> None:
    """The identity of States: sigmoid(s) is the share of a key merged with an empty value."""
    q, k, v = inputs()
    out, _ = operate(q, k, v, "sigmoid", mask=Mask.full())
    total: Any = 0
    for j in range(7):
        alone = attend(q, k[:, :, j : j + 1], v[:, :, j : j + 1])
        blank = State(torch.zeros_like(alone.out), torch.zeros_like(alone.lse))
        total = total + merge(alone, blank).out
    assert torch.allclose(out, total, atol=1e-9)


@pytest.mark.parametrize("length", [1, 7, 64, 150])
def test_a_scan_is_softmax_attention_with_one_score_a_key(length: int) -> None:
    torch.manual_seed(0)
    s = (20 * torch.randn(2, 3, length, dtype=torch.float64)).requires_grad_()
    v = torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True)
    out, _ = scan(s, v)
    truth = attend(torch.ones_like(s)[..., None], s[..., None], v, mask=Mask.causal(), scale=1.0)
    assert torch.allclose(out, truth.out, atol=1e-9)
    weight = torch.randn_like(out)
    mine = torch.autograd.grad((out * weight).sum(), (s, v))
    theirs = torch.autograd.grad((truth.out * weight).sum(), (s, v))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(mine, theirs))


def test_a_scan_goes_on_from_its_state_and_survives_huge_scores() -> None:
    torch.manual_seed(0)
    s, v = 2000 * torch.randn(1, 2, 100), torch.randn(1, 2, 100, 4)
    whole, _ = scan(s, v)
    state, parts = None, []
    for cut in (slice(0, 70), slice(70, 71), slice(71, 100)):
        out, state = scan(s[..., cut], v[..., cut, :], state)
        parts.append(out)
    assert whole.isfinite().all()
    assert torch.allclose(torch.cat(parts, 2), whole, atol=1e-6)


def test_second_order_weights_are_products_of_features() -> None:
    q, k, v = inputs()
    out = second_order(q, k, v, Mask.causal(), 0.25)
    s = 0.25 * q @ k.repeat_interleave(2, 1).mT
    phi = features(q * 0.5) @ features(k * 0.5).repeat_interleave(2, 1).mT
    assert torch.allclose(phi, 1 + s + s**2 / 2)
    w = phi.tril()
    truth = w @ v.repeat_interleave(2, 1) / w.sum(-1, keepdim=True)
    assert torch.allclose(out, truth, atol=1e-7)
    state = summed(k[:, :, :5], v[:, :, :5], 0.25, None)
    late = second_order(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:], Mask.causal(), 0.25, state)
    assert torch.allclose(late, truth[:, :, 5:], atol=1e-7)


def test_the_printed_orders_give_three_values_at_the_first_token() -> None:
    q, k, v = inputs()
    out = separate_orders(q, k, v, Mask.causal(), 0.25)
    assert torch.allclose(out[:, :, 0], 3 * v.repeat_interleave(2, 1)[:, :, 0], atol=1e-6)


@pytest.mark.parametrize("mixer", ["sigmoid_norm", "approximate", "non_approximate"])
def test_what_backward_keeps_grows_with_the_length_not_its_square(mixer: str) -> None:
    model = tiny(mixer, max_position_embeddings=2048)
    kept_cells = []
    for length in (512, 1024):
        saved: list[int] = []

        def pack(x: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(tokens(1, length)).logits.sum()
        kept_cells.append(sum(saved))
    assert kept_cells[1] < 2.2 * kept_cells[0]


# -- biases --------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("mixer", ["k_bias", "kv_bias", "v_bias"])
def test_a_learned_bias_is_a_gate_of_softmax(mixer: str) -> None:
    """`o = sigmoid(lse - s*) o_softmax + sigmoid(s* - lse) v*`, with s* = q . k* / sqrt(d)."""
    model = tiny(mixer, layers=1).double()
    plain = MixerForCausalLM(config("standard", layers=1)).eval().double()
    plain.load_state_dict(model.state_dict(), strict=False)
    seen: dict[str, Tensor] = {}
    mixing, other = (m.model.layers[0].self_attn for m in (model, plain))
    for name, module in (("biased", mixing), ("plain", other)):
        module.o_proj.register_forward_hook(
            lambda m, args, out, name=name: seen.__setitem__(name, args[0])
        )
    ids = tokens()
    model(ids)
    with regard.watch(plain, facts=["entropy"]) as watched:
        plain(ids)
    assert watched
    x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(ids))
    step = plain.model._step(x, None, None, None)
    q, k = other.queries_keys(x, step)
    state = attend(q, k, other.split(other.v_proj(x)), mask=Mask.causal())
    gate, value = torch.ones_like(state.lse), torch.zeros(2, 16, dtype=torch.float64)
    if mixer != "v_bias":
        gate = torch.sigmoid(state.lse - torch.einsum("bhtd,hd->bht", q, mixing.key_bias) / 4)
    if mixer != "k_bias":
        value = mixing.value_bias
    share = 1 - gate if mixer == "kv_bias" else torch.ones_like(gate)
    truth = gate[..., None] * state.out + share[..., None] * value[None, :, None]
    assert torch.allclose(seen["biased"], truth.transpose(1, 2).flatten(2), atol=1e-9)


@torch.no_grad()
def test_the_learned_first_token_is_a_token_of_the_sequence() -> None:
    """With its embedding put first, plain attention gives the same."""
    model = tiny("sink_token")
    plain = MixerForCausalLM(config("standard")).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = tokens()
    embeds = plain.model.embed_tokens(ids)
    first = model.model.sink.expand(2, 1, -1)
    longer = plain(inputs_embeds=torch.cat([first, embeds], 1)).logits[:, 1:]
    assert torch.allclose(model(ids).logits, longer, atol=1e-4)


def test_a_fixed_value_of_the_bias() -> None:
    outs = [
        tiny("k_bias", bias_value=value, bias_norm=5.0)(tokens()).logits
        for value in ("zero", "first", "all")
    ]
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])


# -- second streams ------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("mixer", ["rnd_emb_qk", "fixed_seq_qk"])
def test_maps_of_a_second_stream_do_not_depend_on_the_input(mixer: str) -> None:
    model = tiny([mixer, "standard", mixer])
    maps = []
    for seed in (1, 2):
        with regard.watch(model, facts=["received"]) as seen:
            model(tokens(seed=seed))
        maps.append(seen["received"])
    for layer, same in ((0, True), (1, False), (2, True)):
        assert torch.allclose(maps[0][layer], maps[1][layer], atol=1e-6) == same


@torch.no_grad()
def test_a_second_stream_is_a_row_of_the_batch() -> None:
    """X <- block(X): the stream of a fixed text gives the maps of standard attention on it."""
    model = tiny("fixed_seq_qk")
    plain = MixerForCausalLM(config("standard")).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    text = model.model.fixed_ids[None, :9]
    assert torch.allclose(model(text).logits, plain(text).logits, atol=1e-5)


def test_kept_maps_follow_the_weights() -> None:
    model, ids = tiny("rnd_emb_qk"), tokens()
    with torch.no_grad():
        before = model(ids).logits
        held_maps = model.model._streams
        model(tokens(seed=5))
        assert model.model._streams is held_maps  # computed once
        model.model.layers[0].self_attn.q_proj.weight.mul_(2)
        after = model(ids).logits
        fresh = copy.deepcopy(model)
        fresh.model._streams = None
        assert torch.equal(after, fresh(ids).logits)
    assert not torch.allclose(before, after)
    assert torch.allclose(model(ids).logits, after, atol=1e-5)  # with gradients: computed anew


@pytest.mark.parametrize("mixer", ["rnd_emb_qk", "fixed_seq_qk"])
def test_no_position_beyond_a_fixed_map(mixer: str) -> None:
    model = tiny(mixer)
    model(tokens(1, LONGEST))
    with pytest.raises(InputError, match="beyond the fixed maps"):
        model(tokens(1, LONGEST + 1))
    mask = torch.ones(1, LONGEST + 1, dtype=torch.long)
    mask[0, 0] = 0  # padding takes no position
    model(tokens(1, LONGEST + 1), attention_mask=mask)


# -- placements and parameters -------------------------------------------------------------------
def test_placements_name_the_layers_of_the_table() -> None:
    by_name = {name: [n + 1 for n in kept(name, 24)] for name in KEEPS}
    assert by_name == {
        "none": [], "even": list(range(2, 25, 2)), "odd": list(range(1, 25, 2)),
        "top": list(range(1, 13)), "middle": [*range(1, 7), *range(19, 25)],
        "bottom": list(range(13, 25)), "quarter": [4, 8, 12, 16, 20, 24],
        "first": [1], "last": [24], "ends": [1, 24],
    }  # fmt: skip


@pytest.mark.parametrize("layout", ["llama", "qwen2"])
def test_the_seven_have_equally_many_parameters(layout: str) -> None:
    table = {}
    for keep in ("none", "even"):
        for mixer in SEVEN:
            model = MixerForCausalLM(config(placed(mixer, keep, 2), layout=layout))
            table[mixer, keep] = counts(model)["total"]
    print(table)
    assert len(set(table.values())) == 1, table


@torch.no_grad()
def test_skipping_leaves_out_whole_blocks() -> None:
    model = tiny(placed("non_approximate", "even", 4))
    short = tiny(["standard", "standard"])
    for n, layer in enumerate((1, 3)):
        short.model.layers[n].load_state_dict(model.model.layers[layer].state_dict())
    short.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    short.lm_head.load_state_dict(model.lm_head.state_dict())
    whole = model(tokens()).logits
    with model.skipping():
        skipped = model(tokens(), use_cache=False).logits
    assert torch.allclose(skipped, short(tokens()).logits, atol=1e-5)
    assert torch.equal(model(tokens()).logits, whole)


# -- positions, windows, prefixes ----------------------------------------------------------------
POSITIONS = ("rope", "nope", "absolute", "learned", "relative", "alibi")


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["standard", "sigmoid_no_norm", "k_bias", "sink_token"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_with_cache_and_padding(positions: str, mixer: str) -> None:
    model = tiny(mixer, positions=positions)
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    whole = model(ids, attention_mask=mask).logits
    assert torch.allclose(whole[0, 3:], model(ids[:1, 3:]).logits[0], atol=1e-4)
    first = model(ids[:, :6], attention_mask=mask[:, :6], use_cache=True)
    rest = model(ids[:, 6:], attention_mask=mask, past_key_values=first.past_key_values)
    assert torch.allclose(rest.logits, whole[:, 6:], atol=1e-4)


@torch.no_grad()
def test_repeated_tokens_without_absolute_positions_are_all_alike() -> None:
    for positions in POSITIONS:
        logits = tiny("standard", positions=positions)(torch.full((1, 9), 5)).logits[0]
        alike = torch.allclose(logits[0], logits[-1], atol=1e-4)
        assert alike == (positions not in ("absolute", "learned")), positions


def moved(model: Any, ids: Tensor, key: int) -> list[int]:
    """Tokens whose logits depend on token `key`."""
    other = ids.clone()
    other[:, key] = ids[:, key] % (VOCAB - 1) + 1
    change = (model(ids).logits - model(other).logits).abs().amax((0, 2))
    return (change > 1e-5).nonzero().flatten().tolist()


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["standard", "sigmoid_no_norm", "k_bias", "static_emb_qk"])
def test_window_and_prefix_say_who_sees_whom(mixer: str) -> None:
    windowed = tiny(mixer, layers=1, window=3)
    assert moved(windowed, tokens(), 2) == [2, 3, 4]
    prefixed = tiny(mixer, layers=1, prefix=4)
    assert moved(prefixed, tokens(), 2) == list(range(9))
    assert moved(prefixed, tokens(), 5) == [5, 6, 7, 8]
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    whole = prefixed(ids, attention_mask=mask).logits
    assert torch.allclose(whole[0, 3:], prefixed(ids[:1, 3:]).logits[0], atol=1e-4)


def test_a_prefix_carries_no_loss() -> None:
    model, ids = tiny("standard", prefix=4), tokens()
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert torch.allclose(model(ids, labels=ids).loss, loss)


# -- caches --------------------------------------------------------------------------------------
@torch.no_grad()
def test_states_have_the_size_of_the_card() -> None:
    """Recurrent states do not grow; mlp keeps nothing; shared maps keep values alone."""
    batch, width, heads, dim = 2, 32, 2, 16
    sizes = {}
    for mixer in SEVEN:
        model = tiny(mixer, layers=1)
        sizes[mixer] = [
            held(model(tokens(batch, n), use_cache=True).past_key_values)[0] / 4 for n in (5, 15)
        ]
    assert sizes["standard"] == sizes["static_emb_qk"] == [2 * batch * n * width for n in (5, 15)]
    assert sizes["mlp"] == [0, 0]
    assert sizes["non_approximate"] == [batch * width + 2 * batch * heads] * 2
    assert sizes["approximate"] == [batch * heads * (1 + dim + dim**2) * (dim + 1)] * 2
    for mixer in ("rnd_emb_qk", "fixed_seq_qk"):  # values, and a position of 8 bytes a token
        assert sizes[mixer] == [batch * n * width + 2 * n for n in (5, 15)]


def test_a_cache_that_does_not_fit_is_refused() -> None:
    from transformers import DynamicCache, StaticCache

    model = tiny("non_approximate")
    with pytest.raises(InputError, match="empty DynamicCache"):
        model(tokens(), past_key_values=StaticCache(model.config, max_cache_len=20))
    cache = DynamicCache()
    plain = tiny("standard")
    plain(tokens(), past_key_values=cache)
    with pytest.raises(InputError, match="keeps a state"):
        model(tokens(), past_key_values=cache)
    with pytest.raises(InputError, match="cannot forget"):
        StateLayer().crop(-1)
    empty = DynamicCache()
    prepare(empty, ["mlp", "standard"], "joint")
    assert empty.get_seq_length() == 0


# -- what is refused -----------------------------------------------------------------------------
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown mixer": ({"mixers": ["standrd"] * 2}, "Did you mean 'standard'"),
    "too few": ({"mixers": ["standard"], "num_hidden_layers": 2}, "name one a layer"),
    "heads": ({"num_attention_heads": 2, "num_key_value_heads": 3}, "take a divisor"),
    "positions": ({"positions": "rop"}, "Did you mean 'rope'"),
    "window": ({"window": 0}, "at least 1"),
    "window of a state": ({"mixers": ["non_approximate"] * 2, "window": 4}, "cannot have a window"),
    "prefix": ({"prefix": -1}, "prefix"),
    "bias of a state": (
        {"mixers": ["approximate"] * 2, "positions": "alibi"}, "takes other mixers",
    ),
    "gin": ({"mixers": ["gin"] * 2, "head_dim": 8}, "not the width"),
    "gin groups": ({"mixers": ["gin"] * 2, "num_key_value_heads": 1}, "a key head for every head"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_work(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises(InputError, match=message):
        config(**({"mixers": "standard"} | changes))


def test_an_mlp_of_unequal_parts_is_refused() -> None:
    with pytest.raises(InputError, match="set mlp_mixer_size"):
        tiny("mlp", num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    tiny("mlp", num_attention_heads=4, num_key_value_heads=2, head_dim=8, mlp_mixer_size=20)


def test_packed_rows_are_refused() -> None:
    with pytest.raises(InputError, match="one sample a row"):
        tiny("standard")(tokens(1, 4), position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_watching_sees_softmax_layers_alone() -> None:
    model = tiny(["sigmoid_no_norm", "standard", "mlp", "k_bias"])
    with torch.no_grad(), regard.watch(model, facts=["received"]) as seen:
        model(tokens())
    assert list(seen["received"]) == [1, 3]
