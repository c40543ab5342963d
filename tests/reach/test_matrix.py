"""Every family through the one door: same outputs, exact facts, nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.core import Distance, Entropy, Received, State
from regard.core.kernels.reference import probabilities
from regard.lab.check import check
from regard.reach import Call, Collector, Handler, Session
from regard.zoo.tiny import CAUSAL_LMS, FAMILIES, inputs, tiny


def own(family: str) -> Any:
    """A tiny model whose own attention honours its soft cap (older sdpa code left it out)."""
    model = tiny(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")
    return model


def output(out: Any) -> Tensor:
    return out["logits"] if "logits" in out else out["last_hidden_state"]


class Calls(Handler):
    def __init__(self) -> None:
        self.seen: list[tuple[Call, State]] = []

    def after(self, call: Call, state: State) -> None:
        self.seen.append((call, state))


def run(model: Any, handlers: list[Handler], **kwargs: Any) -> Any:
    with torch.no_grad(), Session(model, handlers):
        return model(**kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_is_the_models_own(family: str) -> None:
    model = own(family)
    x = inputs(family, model, padding=3)
    kept = x.get("attention_mask")
    with torch.no_grad():
        plain = output(model(**x))
        through = output(run(model, [], **x))
        again = output(model(**x))
    assert torch.equal(plain, again)
    gap = (plain - through).abs()
    if kept is not None and kept.shape[1] == gap.shape[1]:
        gap = gap * kept[..., None]  # what a padding token computes is nobody's business
    assert float(gap.max()) <= 2e-5 * float(plain.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_those_of_the_eager_map(family: str) -> None:
    """Against `output_attentions` of the model's own eager code, an independent witness."""
    model = tiny(family)
    x = inputs(family, model)
    facts = [Received(), Entropy(), Distance()]
    collector = Collector(facts)
    run(model, [collector], **x)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**x, output_attentions=True)
    maps = [
        out.get(n)
        for n in ("attentions", "decoder_attentions", "encoder_attentions", "cross_attentions")
    ]
    maps = [m for group in maps if group is not None for m in group if m is not None]
    assert maps
    records = list(collector.records.values())
    matched = 0
    for p in maps:
        p = p.double()
        for record in records:
            received = collector.value(record, facts[0])
            if received.shape != p.sum(2).shape or not torch.allclose(
                received.double(), p.sum(2), atol=1e-4
            ):
                continue
            entropy = -torch.special.xlogy(p, p).sum(-1)
            assert torch.allclose(collector.value(record, facts[1]).double(), entropy, atol=1e-4)
            if record.site.kind == "self":
                d = (torch.arange(p.shape[2])[:, None] - torch.arange(p.shape[3])).abs()
                assert torch.allclose(
                    collector.value(record, facts[2]).double(), (p * d).sum(-1), atol=1e-3
                )
            matched += 1
            break
    assert matched == len(maps)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_check_holds(family: str) -> None:
    report = check(own(family))
    assert report.ok, [f for f in report.findings if f.status == "failed"]


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_no_dense_mask_is_handed_over(family: str) -> None:
    """Windows, padding and causality arrive as descriptions."""
    model = tiny(family)
    calls = Calls()
    run(model, [calls], **inputs(family, model, padding=3))
    for call, _ in calls.seen:
        assert type(call.mask).__name__ in ("Band", "Both"), call.mask


@pytest.mark.parametrize("family", CAUSAL_LMS)
def test_generation_adds_up_to_one_forward(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(0))
    facts = [Received(), Entropy(), Distance()]
    live, whole = Collector(facts), Collector(facts)
    with torch.no_grad(), Session(model, [live]):
        text = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False)
    run(model, [whole], input_ids=text[:, :-1])  # the last token was never fed back
    for index, record in whole.records.items():
        for fact in facts:
            a, b = live.value(live.records[index], fact), whole.value(record, fact)
            assert torch.allclose(a, b, atol=2e-5), (fact, (a - b).abs().max())


def test_left_padded_batch_equals_each_row_alone() -> None:
    for family in CAUSAL_LMS:
        model = tiny(family)
        ids = torch.randint(3, 100, (2, 14), generator=torch.Generator().manual_seed(1))
        kept = torch.ones_like(ids)
        kept[1, :5] = 0
        together, alone = Collector([Received(), Entropy()]), Collector([Received(), Entropy()])
        position_ids = (kept.cumsum(-1) - 1).clamp_min(0)
        run(model, [together], input_ids=ids, attention_mask=kept, position_ids=position_ids)
        run(model, [alone], input_ids=ids[1:, 5:])
        for index, record in alone.records.items():
            for fact in alone.facts:
                found = together.value(together.records[index], fact)[1:, :, 5:]
                assert torch.allclose(found, alone.value(record, fact), atol=2e-5), (family, fact)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2", "gemma2"])
def test_right_padding_is_left_out_of_the_facts(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(3, 100, (2, 14), generator=torch.Generator().manual_seed(1))
    kept = torch.ones_like(ids)
    kept[1, 9:] = 0
    together, alone = Collector([Received(), Entropy()]), Collector([Received(), Entropy()])
    run(model, [together], input_ids=ids, attention_mask=kept)
    run(model, [alone], input_ids=ids[1:, :9])
    for index, record in alone.records.items():
        for fact in alone.facts:
            found = together.value(together.records[index], fact)[1:]
            assert torch.allclose(found[..., :9], alone.value(record, fact), atol=2e-5)
            assert float(found[..., 9:].abs().max()) < 1e-6


def test_gradients_flow_through_the_door() -> None:
    for family in ("llama", "gemma2", "gpt_oss", "t5"):
        model = own(family)
        x = inputs(family, model)
        grads = []
        for through in (False, True):
            model.zero_grad()
            if through:
                with Session(model):
                    output(model(**x)).pow(2).mean().backward()
            else:
                output(model(**x)).pow(2).mean().backward()
            grads.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
        assert grads[0].keys() == grads[1].keys()
        for name, true in grads[0].items():
            gap = float((grads[1][name] - true).abs().max())
            assert gap <= 1e-4 * max(1e-3, float(true.abs().max())), (family, name, gap)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_static_cache(family: str) -> None:
    model = tiny(family)
    ids = torch.randint(3, 100, (1, 11), generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    static, whole = Collector([Received()]), Collector([Received()])
    with torch.no_grad():
        plain = model.generate(ids, **settings)
        with Session(model, [static]):
            text = model.generate(
                ids, cache_implementation="static", disable_compile=True, **settings
            )
    assert torch.equal(plain, text)
    run(model, [whole], input_ids=text[:, :-1])
    for index, record in whole.records.items():
        a = static.value(static.records[index], static.facts[0])
        b = whole.value(record, whole.facts[0])
        assert torch.allclose(a[..., : b.shape[-1]], b, atol=2e-5)
        assert float(a[..., b.shape[-1] :].abs().sum()) < 1e-5


def test_packed_documents_stay_apart() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 100, (1, 18), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(7), torch.arange(11)])[None]
    packed, alone = Collector([Received()]), Collector([Received()])
    calls = Calls()
    run(model, [packed, calls], input_ids=ids, position_ids=positions, use_cache=False)
    run(model, [alone], input_ids=ids[:, 7:])
    assert all(type(c.mask).__name__ == "Both" for c, _ in calls.seen)
    for index, record in alone.records.items():
        found = packed.value(packed.records[index], packed.facts[0])[..., 7:]
        assert torch.allclose(found, alone.value(record, alone.facts[0]), atol=1e-5)


def test_a_ready_4d_mask() -> None:
    model = tiny("llama")
    ids = torch.randint(3, 100, (1, 9), generator=torch.Generator().manual_seed(0))
    allowed = torch.ones(9, 9, dtype=torch.bool).tril()
    allowed[:, 4] = False
    allowed[4, 4] = True
    for mask in (
        allowed[None, None],
        torch.zeros(1, 1, 9, 9).masked_fill(~allowed, torch.finfo().min),
    ):
        calls = Calls()
        with torch.no_grad():
            plain = model(ids, attention_mask=mask).logits
        through = run(model, [calls], input_ids=ids, attention_mask=mask).logits
        assert torch.allclose(plain, through, atol=1e-5)
        p = probabilities(calls.seen[0][0].q, calls.seen[0][0].k, calls.seen[0][0].mask)
        assert float(p[:, :, 5:, 4].max()) == 0
