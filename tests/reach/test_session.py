"""Sessions nest, end by exception, refuse by name, and leave no trace."""

from __future__ import annotations

import contextvars
import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

import regard
from regard.core import Received, State
from regard.errors import InputError, ReachError
from regard.reach import Call, Collector, Handler, Session, dispatch
from regard.reach.dispatch import _active
from regard.shrink import Recycled, SnapKV
from regard.zoo.tiny import inputs, tiny

WHOLE = {"do_sample": False, "return_dict_in_generate": True}
IDS = torch.randint(3, 100, (1, 10), generator=torch.Generator().manual_seed(0))


class Order(Handler):
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def before(self, call: Call) -> None:
        if call.site.layer == 0:
            self.log.append(f"before {self.name}")

    def after(self, call: Call, state: State) -> None:
        if call.site.layer == 0:
            self.log.append(f"after {self.name}")


def fingerprint(model: Any) -> list[str]:
    return [
        f"{n} {m.training} {len(m._forward_hooks)} {len(m._forward_pre_hooks)} "
        f"{sorted(map(str, vars(m.config).items()))}"
        for n, m in model.named_modules()
        if hasattr(m, "config")
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_trace(implementation: str) -> None:
    model = tiny("llama")
    model.set_attn_implementation(implementation)
    before, state = fingerprint(model), torch.random.get_rng_state()
    with torch.no_grad():
        plain = model(IDS).logits
        with Session(model, [Collector([Received()])]):
            model(IDS)
        with pytest.raises(KeyError), Session(model), Session(model):
            model(IDS)
            raise KeyError
        assert torch.equal(model(IDS).logits, plain)
    assert fingerprint(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not _active


def test_sessions_that_end_out_of_order() -> None:
    model = tiny("llama")
    seen, before = Collector([Received()]), vars(AttentionInterface)["get_interface"]
    a, b = Session(model).attach(), Session(model, [seen]).attach()
    a.detach()
    model(IDS)
    assert len(seen.records) == 2
    b.detach()
    b.detach()  # once more does nothing
    assert not _active
    assert vars(AttentionInterface)["get_interface"] is before
    assert "__getitem__" not in vars(AttentionInterface)


def test_order_of_handlers() -> None:
    model, log = tiny("llama"), list[str]()
    with (
        torch.no_grad(),
        Session(model, [Order("a", log), Order("b", log)]),
        Session(model, [Order("c", log)]),
    ):
        model(IDS)
    assert log == [f"{t} {n}" for t in ("before", "after") for n in "abc"]


def test_handlers_change_calls_and_states() -> None:
    model = tiny("llama")

    class Double(Handler):
        def before(self, call: Call) -> Call:
            return call.change(v=call.v * 2)

    class Halve(Handler):
        def after(self, call: Call, state: State) -> State:
            return State(state.out / 2, state.lse)

    with torch.no_grad():
        plain = model(IDS).logits
        with Session(model, [Double()]):
            assert not torch.allclose(model(IDS).logits, plain, atol=1e-4)
        with Session(model, [Double(), Halve()]):
            assert torch.allclose(model(IDS).logits, plain, atol=1e-5)


def test_two_models_at_once_do_not_mix() -> None:
    one, two = tiny("llama"), tiny("llama", seed=1)
    seen = Collector([Received()])
    with torch.no_grad(), Session(one, [seen]), Session(two):
        two(IDS)
        assert not seen.records
        one(IDS)
    assert len(seen.records) == 2


def test_models_that_share_a_config_do_not_mix() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    config = BartConfig(vocab_size=128, d_model=16, decoder_ffn_dim=16, **layers, **heads)
    given = {
        "input_ids": IDS.repeat(2, 1),
        "attention_mask": torch.ones(2, 10).long(),
        "decoder_input_ids": IDS[:, :4].repeat(2, 1),
    }
    given["attention_mask"][0, 6:] = 0
    one, two = (BartForConditionalGeneration(config).eval() for _ in range(2))
    seen = Collector([Received()])
    with torch.no_grad():
        plain = two(**given).logits
        with Session(one, [seen]):
            assert torch.allclose(two(**given).logits, plain, atol=1e-5)
        with Session(two.model.encoder):
            assert torch.allclose(two(**given).logits, plain, atol=1e-5)
    assert not seen.records


def test_a_submodel_on_its_own() -> None:
    model = tiny("llava")
    seen = Collector([Received()])
    with torch.no_grad(), Session(model.model.language_model, [seen]):
        model(**inputs("llava", model))
    assert [r.site.name for r in seen.records.values()] == [
        "layers.0.self_attn",
        "layers.1.self_attn",
    ]
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


def test_refusals() -> None:
    with pytest.raises(ReachError, match="not a transformers model"):
        Session(torch.nn.Linear(2, 2))
    from transformers import MambaConfig, MambaModel

    small = MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ReachError, match=r"MambaModel .* or has none"):
        Session(MambaModel(small))
    model = tiny("llama")
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with pytest.raises(ReachError, match=r"model\.eval\(\)"), Session(model):
        model(IDS)
    assert model.config._attn_implementation == "sdpa"


def test_a_foreign_attention_is_not_replaced() -> None:
    AttentionInterface.register("sigmoid_of_mine", lambda *a, **k: None)
    model = tiny("llama")
    model.config._attn_implementation_internal = "sigmoid_of_mine"
    with pytest.raises(ReachError, match="sigmoid_of_mine"), Session(model):
        pass
    assert model.config._attn_implementation == "sigmoid_of_mine"
    assert not _active


def test_asking_for_the_matrix_names_the_remedy() -> None:
    model = tiny("whisper")
    with pytest.raises((ReachError, ValueError), match=r"thumbnail|eager"), Session(model):
        model(**inputs("whisper", model), output_attentions=True)


def test_beam_search_and_cut_caches_are_refused() -> None:
    model = tiny("llama", seed=3)
    ids = IDS.repeat(2, 1)
    with (
        torch.no_grad(),
        pytest.raises(ReachError, match="num_beams=1"),
        Session(model, [Collector([Received()])]),
    ):
        model.generate(ids, num_beams=4, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    with (
        torch.no_grad(),
        pytest.raises(ReachError, match="cut back"),
        Session(model, [Collector([Received()])]),
    ):
        cache = model(ids, use_cache=True).past_key_values
        cache.crop(-4)
        model(ids[:, 6:8], past_key_values=cache)


def test_a_new_prompt_begins_anew() -> None:
    model = tiny("llama")
    seen = Collector([Received()])
    with torch.no_grad(), Session(model, [seen]):
        model(IDS)
        model(IDS[:, :6])
    assert seen.value(seen.records[0], seen.facts[0]).shape[-1] == 6


def test_weights_that_are_not_finite() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
        with (
            pytest.raises(InputError, match=r"layers\.1\.self_attn are not finite"),
            Session(model, [Collector([Received()])]),
        ):
            model(IDS)


def test_totals_that_a_gpu_left_unread_are_read_with_the_result() -> None:
    model = tiny("llama")
    seen = Collector([Received()])
    with torch.no_grad(), Session(model, [seen]):
        model(IDS)
    record = seen.records[1]
    record.total = torch.tensor(1.0)
    assert seen.value(record, seen.facts[0]) is not None
    record.total = torch.tensor(float("nan"))
    with pytest.raises(InputError, match=r"layers\.1\.self_attn are not finite"):
        seen.value(record, seen.facts[0])


def test_a_model_that_changed_since_the_session_was_made() -> None:
    model: Any = tiny("llama")
    session, whole = Session(model), model.model.layers
    model.model.layers = whole[:1]
    with pytest.raises(ReachError, match="make the session anew"), session:
        pass
    assert model.config._attn_implementation == "sdpa"
    assert not _active and not session.attached
    model.model.layers = whole
    with session:
        model(IDS)


def test_an_error_on_the_way_in_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model, join = tiny("llama"), dispatch.join
    session, before = Session(model), fingerprint(model)

    def fails(module: Any, *rest: Any) -> Any:
        if _active:
            raise MemoryError
        return join(module, *rest)

    monkeypatch.setattr(dispatch, "join", fails)
    with pytest.raises(MemoryError):
        session.attach()
    assert fingerprint(model) == before
    assert not _active and not session.attached


def test_a_thread_takes_part_with_the_context_of_the_session() -> None:
    model, seen = tiny("llama"), Collector([Received()])

    def stream() -> None:
        model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)

    with Session(model, [seen]):
        for run in ((stream,), (contextvars.copy_context().run, stream)):
            assert not seen.records
            thread = threading.Thread(target=run[0], args=run[1:])
            thread.start()
            thread.join()
    assert [r.rows for r in seen.records.values()] == [13, 13]


def test_threads_that_share_a_model() -> None:
    """Two watch texts of their own, one changes them, one runs plainly, all at the same time."""
    model = tiny("llama")
    texts = [torch.randint(3, 127, (1, 8 + 3 * n)) for n in range(4)]
    whole = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}

    def generate(n: int) -> torch.Tensor:
        return torch.stack(model.generate(texts[n], return_dict_in_generate=True, **whole).logits)

    def watch(n: int) -> torch.Tensor:
        seen = Collector([Received()])
        with Session(model, [seen]):
            generate(n)
        return seen.value(seen.records[1], seen.facts[0])

    def apply(n: int) -> torch.Tensor:
        with Session(model, [SnapKV(budget=6, window=2)]):
            return generate(n)

    tasks = [watch, watch, apply, generate]
    alone = [task(n) for n, task in enumerate(tasks)]
    wrong: list[str] = []

    def work(n: int) -> None:
        try:
            for _ in range(6):
                if not torch.equal(tasks[n](n), alone[n]):
                    wrong.append(f"thread {n} differs")
        except Exception as error:
            wrong.append(f"thread {n}: {error}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not _active


def test_a_session_that_ends_within_a_forward_pass() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        plain = model(IDS).logits
        session = Session(model, [Collector([Received()])]).attach()
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_: session.detach())
        assert torch.equal(model(IDS).logits, plain)
        hook.remove()


@pytest.mark.parametrize("method", [SnapKV(budget=12, window=4), Recycled(budget=4, stride=3)])
def test_a_copy_made_in_a_session_is_plain(method: Handler) -> None:
    model, ids = tiny("llama"), IDS.repeat(1, 3)

    def logits(model: Any) -> torch.Tensor:
        out = model.generate(ids, max_new_tokens=6, output_logits=True, **WHOLE)
        return torch.stack(out.logits)

    plain = logits(model)
    with Session(model, [method]):
        own = logits(model)
        other = copy.deepcopy(model)
        assert torch.allclose(logits(other), plain, atol=1e-4)
        assert torch.equal(logits(model), own)
    assert torch.allclose(logits(other), plain, atol=1e-4)
    assert not torch.allclose(own, plain, atol=1e-2)


def test_a_copy_of_a_watched_model_is_not_watched() -> None:
    model = tiny("llama")
    with regard.watch(model, ["received"]) as seen:
        model(IDS)
        other = copy.deepcopy(model)
        other(IDS[:, :4])
    other(IDS[:, :4])
    assert torch.equal(seen.input_ids, IDS) and seen["received"][0].shape[-1] == 10


def test_attaching_twice() -> None:
    session = Session(tiny("llama")).attach()
    with pytest.raises(RuntimeError, match="attached already"):
        session.attach()
    session.detach()


def test_layers_that_share_a_module() -> None:
    """ALBERT runs all its layers through one module: each is a layer of its own here."""
    from transformers import AlbertConfig, AlbertModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = AlbertConfig(vocab_size=128, embedding_size=16, num_hidden_layers=6, **sizes)
    model = AlbertModel(config).eval()
    model.set_attn_implementation("eager")
    seen = Collector([Received()], layers=[0, 3, 5])
    with torch.no_grad():
        maps = model(IDS, output_attentions=True).attentions
        with Session(model, [seen]):
            model(IDS)
            model(IDS)
    assert [r.site.layer for r in seen.records.values()] == [0, 3, 5]
    for record in seen.records.values():
        found = seen.value(record, seen.facts[0])
        assert torch.allclose(found, maps[record.site.layer].sum(2), atol=1e-5)
    assert not model._forward_pre_hooks


class Split(Handler):
    """One call for the heads of every key head."""

    def __init__(self) -> None:
        self.caches: list[int] = []

    def cache(self, cache: Any) -> None:
        self.caches.append(-1 if cache is None else cache.get_seq_length())

    def before(self, call: Call) -> list[Call]:
        group = call.q.shape[1] // call.k.shape[1]
        return [
            call.change(
                q=call.q[:, n * group : (n + 1) * group],
                k=call.k[:, n : n + 1],
                v=call.v[:, n : n + 1],
                heads=torch.arange(n * group, (n + 1) * group),
            )
            for n in reversed(range(call.k.shape[1]))
        ]


def test_a_call_answered_in_groups_of_heads() -> None:
    model, split = tiny("llama"), Split()
    with torch.no_grad():
        plain = model.generate(IDS, max_new_tokens=4, output_logits=True, **WHOLE)
        with Session(model, [split]):
            parts = model.generate(IDS, max_new_tokens=4, output_logits=True, **WHOLE)
            model(IDS, use_cache=False)
    assert torch.equal(parts.sequences, plain.sequences)
    assert torch.allclose(torch.stack(parts.logits), torch.stack(plain.logits), atol=1e-5)
    assert split.caches == [0, 10, 11, 12, -1]


def test_facts_of_groups_of_heads_are_refused() -> None:
    session = Session(tiny("llama"), [Split(), Collector([Received()])])
    with pytest.raises(ReachError, match="different keys"), torch.no_grad(), session:
        session.model(IDS)


def test_a_model_saved_in_a_session_is_as_it_was(tmp_path: Path) -> None:
    model: Any = tiny("llama")
    before = model.config.to_dict()
    with Session(model):
        assert model.config.to_dict() == before
        model.save_pretrained(tmp_path)
    assert "regard" not in (tmp_path / "config.json").read_text()


def test_an_attention_chosen_within_a_session_stays() -> None:
    model: Any = tiny("llama")
    with Session(model), Session(model):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"


def test_a_wrapper_stands_for_its_model() -> None:
    model: Any = tiny("llama")
    for wrapper in (torch.compile(model), torch.nn.DataParallel(model)):
        assert Session(wrapper).model is model
