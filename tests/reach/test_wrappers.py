"""What people wrap models in, and how they run them: each row works exactly, or is refused before
the first token by a cause and a remedy.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import regard
from regard.errors import InputError, ReachError
from regard.reach import Handler, Session
from regard.reach.dispatch import _active, _kept
from regard.zoo.tiny import tiny

from .test_doors import FACTS, agrees

IDS = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
HOW: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
HOW |= {"eos_token_id": None, "min_new_tokens": 5, "attention_mask": torch.ones_like(IDS)}


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def maps(model: Any, ids: Tensor, **kwargs: Any) -> dict[Any, Tensor]:
    """What eager attention of the same weights gives over a finished text."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return dict(enumerate(model(ids, output_attentions=True, **kwargs).attentions))


def generated(**settings: Any) -> Callable[[Any], Tensor]:
    return lambda model: model.generate(IDS, **{**HOW, **settings})


def second_turn(model: Any) -> Tensor:
    """The cache of the first answer is given to the second."""
    first = model.generate(IDS, return_dict_in_generate=True, **HOW)
    ids = torch.cat([first.sequences, IDS[:, :4]], 1)
    how = {**HOW, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, past_key_values=first.past_key_values, **how)


# -- ways to generate ----------------------------------------------------------------------------
EXACT: dict[str, Callable[[Any], Tensor]] = {
    "plain": generated(),
    "no cache": generated(use_cache=False),
    "static cache": generated(cache_implementation="static", disable_compile=True),
    "prompt in chunks": generated(prefill_chunk_size=5),
    "sampling, two answers": generated(do_sample=True, num_return_sequences=2),
    "second turn": second_turn,
}


@pytest.mark.parametrize("way", EXACT)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generations_that_agree_with_the_finished_text(way: str, family: str) -> None:
    model: Any = tiny(family)
    texts = []
    for session in (None, seen := regard.watch(model, FACTS)):
        torch.manual_seed(0)
        with torch.no_grad():
            if session is not None:
                session.attach()
            texts.append(EXACT[way](model))
    seen.detach()
    assert torch.equal(*texts)
    agrees(seen, maps(model, texts[0][:, :-1]))


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "beam search": (generated(num_beams=3), "watch with num_beams=1, or"),
    "assistant": (
        lambda m: m.generate(IDS[:1], assistant_model=tiny("llama", seed=4), max_new_tokens=4),
        "watch with no assistant, or",
    ),
    "early exit": (
        lambda m: m.generate(IDS[:1], assistant_early_exit=1, max_new_tokens=4),
        "watch with no assistant, or",
    ),
    "prompt lookup": (
        lambda m: m.generate(IDS[:1], prompt_lookup_num_tokens=2, max_new_tokens=4),
        "watch with no prompt lookup, or",
    ),
    "maps": (lambda m: m(IDS, output_attentions=True), "name facts instead"),
    "export": (
        lambda m: torch.export.export(m, (IDS,), {"use_cache": False}),
        "export it outside of the session",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_ways_that_are_refused_before_the_first_token(way: str) -> None:
    model: Any = tiny("llama")
    run, remedy = REFUSED[way]
    passes: list[int] = []
    with torch.no_grad():
        plain = model(IDS).logits
        count = model.model.layers[1].register_forward_hook(lambda *_: passes.append(1))
        with pytest.raises(ReachError, match=remedy), regard.watch(model, FACTS):
            run(model)
        assert not passes
        count.remove()
        assert torch.equal(model(IDS).logits, plain)
        # asked for maps, transformers itself hangs its recorders on the model, for good
        assert way == "maps" or not hooks(model)


def test_a_quantized_cache_is_refused_by_its_name() -> None:
    """Its packages are optional: the settings are judged as a generation would."""
    model: Any = tiny("llama")
    told = pytest.raises(ReachError, match="watch with a plain cache, or")
    with told, regard.watch(model, FACTS) as seen:
        seen.handlers[0].generation(T.GenerationConfig(cache_implementation="quantized"))


def test_an_assistant_says_nothing_of_the_next_generation() -> None:
    model: Any = tiny("llama")
    with torch.no_grad(), regard.watch(model, FACTS) as seen:
        with pytest.raises(ReachError, match="no assistant"):
            REFUSED["assistant"][0](model)
        out = generated()(model)
    agrees(seen, maps(model, out[:, :-1]))


def test_a_prompt_in_chunks_is_no_prompt() -> None:
    told = pytest.raises(InputError, match="prefill_chunk_size")
    model: Any = tiny("llama")
    with told, regard.apply(model, regard.shrink.SnapKV(budget=6, window=2)), torch.no_grad():
        model.generate(IDS[:1], max_new_tokens=2, do_sample=False, prefill_chunk_size=4)


def test_packed_texts_are_what_they_are_alone() -> None:
    """Positions that begin anew say where a text begins."""
    model: Any = tiny("llama")
    places = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad(), regard.watch(model, [*FACTS, "distance"]) as seen:
        model(IDS[:1], position_ids=places, use_cache=False)
    for text in (slice(0, 7), slice(7, 12)):
        with torch.no_grad(), regard.watch(model, [*FACTS, "distance"]) as alone:
            model(IDS[:1, text])
        for fact in (*FACTS, "distance"):
            for layer in (0, 1):
                torch.testing.assert_close(
                    seen[fact][layer][..., text], alone[fact][layer], rtol=1e-4, atol=1e-5
                )


# -- wrappers ------------------------------------------------------------------------------------
class Parallel(torch.nn.Module):
    """As `DataParallel` holds a model."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def adapted(model: Any, folder: Path) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def in_memory(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def on_disk(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def compiled_in_place(model: Any, folder: Path) -> Any:
    model.compile(backend="eager")
    return model


WRAPPED: dict[str, Callable[[Any, Path], Any]] = {
    "parallel": lambda m, _: Parallel(m),
    "PEFT": adapted,
    "offloaded to memory": in_memory,
    "offloaded to disk": on_disk,
    "compiled": lambda m, _: torch.compile(m, backend="eager"),
    "compiled, full graph": lambda m, _: torch.compile(m, backend="aot_eager", fullgraph=True),
    "compiled in place": compiled_in_place,
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers(wrapper: str, tmp_path: Path) -> None:
    model: Any = WRAPPED[wrapper](tiny("llama"), tmp_path)
    true = tiny("llama") if wrapper != "PEFT" else model.base_model.model
    with torch.no_grad():
        plain = model(IDS).logits
        with regard.watch(model, FACTS) as seen:
            watched = model(IDS).logits
        assert torch.equal(model(IDS).logits, plain)
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(seen.input_ids, IDS)
    agrees(seen, maps(true, IDS))
    if "compiled" in wrapper:
        torch._dynamo.reset()
        assert torch._dynamo.eval_frame._stance.stance == "default"


def test_a_model_inside_a_compiled_one_names_the_compiled_one() -> None:
    model: Any = tiny("llama")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(IDS)
        with regard.watch(model, FACTS) as seen:
            compiled(IDS)
    with pytest.raises(InputError, match="pass the compiled model"):
        seen["received"]
    torch._dynamo.reset()


def test_a_pipeline_of_texts() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"[PAD]": 0, **{f"w{n}": n for n in range(1, 120)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="[PAD]", padding_side="left"
    )
    model: Any = tiny("llama")
    pipeline = T.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["w5 w6 w7 w8", "w9 w10"]
    with regard.watch(pipeline, FACTS) as seen:
        pipeline(texts, batch_size=2, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with regard.watch(model, FACTS) as alone:
        pipeline(texts[1:], max_new_tokens=3, do_sample=False, pad_token_id=0)
    for fact in FACTS:
        for layer in (0, 1):
            value = seen[fact][layer][1:]
            assert not value[..., :2].any()
            torch.testing.assert_close(value[..., 2:], alone[fact][layer], rtol=1e-4, atol=1e-5)


# -- sessions that nobody ends -------------------------------------------------------------------
def test_a_watch_that_is_dropped_leaves_no_hook() -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        plain, forward = model(IDS).logits, T.AttentionInterface.get_interface
        seen = regard.watch(model, FACTS).attach()
        model(IDS)
        dropped = weakref.ref(seen)
        del seen
        gc.collect()
        assert dropped() is None and not hooks(model) and not _active
        assert T.AttentionInterface.get_interface is forward
        assert torch.equal(model(IDS).logits, plain)


def test_a_watch_in_a_with_that_nobody_names_works() -> None:
    model: Any = tiny("llama")
    with regard.watch(model, FACTS), torch.no_grad():
        gc.collect()
        model(IDS)
        assert hooks(model)
    assert not hooks(model)


def test_a_method_goes_on_until_it_is_detached() -> None:
    calls: list[int] = []

    class Counts(Handler):
        def before(self, call: Any) -> None:
            calls.append(call.site.layer)

    model: Any = tiny("llama")
    regard.apply(model, Counts()).attach()
    gc.collect()
    with torch.no_grad():
        model(IDS)
    assert calls == [0, 1]
    for session in list(_kept):
        session.detach()
    assert not _kept and not hooks(model) and not _active


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_copies_of_a_watched_model_hold_no_session(copied: Callable[[Any], Any]) -> None:
    model: Any = tiny("llama")
    with torch.no_grad():
        plain = model(IDS).logits
        with regard.watch(model, FACTS) as seen:
            model(IDS)
            other = copied(model)
            held = [h for m in other.modules() for h in m._forward_pre_hooks.values()]
            assert all(h._session is None and h._run() is None for h in held)
            assert torch.equal(other(IDS[:, :5]).logits, copy.deepcopy(other)(IDS[:, :5]).logits)
            assert torch.equal(other(IDS).logits, plain)
        agrees(seen, maps(model, IDS))


def test_sessions_take_what_holds_a_model() -> None:
    model: Any = tiny("llama")

    class Pipeline:
        def __init__(self) -> None:
            self.model = model

    assert Session(Pipeline()).model is model
