"""What real model classes do at the door: sparse masks, shared keys, windows, loops, wrappers, and
attention that modules compute by themselves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import regard
from regard.core import Mask, Rows
from regard.errors import ReachError
from regard.reach import Call, Handler, Session
from regard.reach.handed import Handed
from regard.zoo.tiny import tiny
from regard.zoo.tiny_vlm import tiny_vlm, vlm_inputs

SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
       "topk_group": 1, "first_k_dense_replace": 2, "moe_intermediate_size": 16,
       "num_key_value_heads": 4, "num_hidden_layers": 2, "pad_token_id": 0}  # fmt: skip
IDS = torch.randint(3, 127, (2, 12), generator=torch.Generator().manual_seed(0))
FACTS = ["received", "entropy"]


def spread(model: Any) -> Any:
    """Weights that make attention peaked, so that an error shows."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data.normal_(0, weight.shape[-1] ** -0.5 * 2)
    return model.eval()


def true_facts(p: Tensor) -> dict[str, Tensor]:
    p = p.double()
    return {"received": p.sum(-2), "entropy": -torch.special.xlogy(p, p).sum(-1)}


def agrees(seen: Any, maps: dict[Any, Tensor]) -> None:
    for key, p in maps.items():
        for name, value in true_facts(p).items():
            torch.testing.assert_close(seen[name][key].double(), value, rtol=1e-4, atol=1e-4)


def test_sparse_attention_stays_sparse() -> None:
    """The model looks at the name of its attention, and puts the picked keys into the mask."""
    config = T.DeepseekV32Config(
        **SMALL, **MLA, index_topk=4, index_n_heads=2, index_head_dim=16, max_position_embeddings=64
    )
    model, rows = spread(T.DeepseekV32ForCausalLM(config)), Rows((11,))
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    with torch.no_grad():
        plain = model(IDS, use_cache=False).logits
        with regard.watch(model, [rows]) as seen:
            watched = model(IDS, use_cache=False).logits
        with regard.watch(model, ["entropy"]) as left:
            model(IDS, attention_mask=padded, use_cache=False)
    assert torch.allclose(plain, watched, atol=1e-5)
    assert int((seen[rows][0][0, 0, 0] > 0).sum()) == 4
    assert not left["entropy"][0][0, :, :3].any()  # padding is still known


def test_layers_that_share_keys() -> None:
    config = T.Gemma4TextConfig(
        **SMALL, num_hidden_layers=4, num_key_value_heads=2, head_dim=16, global_head_dim=32,
        layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=6,
        num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=128,
    )  # fmt: skip
    model = spread(T.Gemma4ForCausalLM(config))
    with regard.watch(model, FACTS) as seen, torch.no_grad():
        model(IDS)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(IDS, output_attentions=True).attentions
    agrees(seen, dict(enumerate(maps)))


def test_the_stand_in_becomes_the_mask_when_touched() -> None:
    mask = Mask.causal() & Mask.padding(torch.tensor([[0, 1, 1, 1]]))
    real = mask.cells(4, 4)
    handed = Handed.of(mask, None, (0, 0), (1, 4, 4))
    assert handed[:, :, :, :4] is handed and handed.to("cpu") is handed
    assert handed.shape == real.shape and handed.dtype == torch.bool
    assert torch.equal(~handed, ~real)
    assert torch.equal(handed[..., :3], real[..., :3])
    assert torch.equal(torch.ones(4, 4).masked_fill(handed, 2.0), real + 1.0)


def test_a_function_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = T.AttentionInterface._global_mapping["sdpa"]

    def sharper(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **{**kwargs, "scaling": 3.0})

    def picks(module: Any, q: Any, k: Any, v: Any, mask: Any, picked: Any = None, **kw: Any) -> Any:
        return plain(module, q, k, v, mask, **kw)

    model: Any = tiny("llama")
    monkeypatch.setitem(T.AttentionInterface._global_mapping, "sdpa", sharper)
    with pytest.raises(ReachError, match="does not compute softmax attention"), Session(model):
        model(IDS)
    monkeypatch.setitem(T.AttentionInterface._global_mapping, "sdpa", picks)
    with pytest.raises(ReachError, match="hands picked= to its attention"), Session(model):
        model(IDS, picked=IDS)


def test_a_page_of_an_encoder_hides_no_token() -> None:
    from regard.watching.overview import overview

    model: Any = tiny("bert")
    with regard.watch(model, ["mean_received"]) as seen, torch.no_grad():
        model(torch.randint(3, 126, (1, 48)))
    page = overview(seen)
    assert None not in page["views"]["received"]["values"]
    assert page["views"]["received"]["help"].startswith("mean attention of all queries")
    assert page["meta"]["difference"] == seen.difference < 1e-4


def test_rows_that_end_early_agree_with_each_row_alone() -> None:
    model: Any = tiny("llama")
    ids = torch.randint(3, 127, (2, 8), generator=torch.Generator().manual_seed(1))
    kw = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
    kw["max_new_tokens"] = 10
    with torch.no_grad():
        stop = int(model.generate(ids, eos_token_id=None, **kw)[0, 10])
        with regard.watch(model, FACTS) as seen:
            out = model.generate(ids, eos_token_id=stop, **kw)
        end = 8 + out[0, 8:].tolist().index(stop) + 1  # its first padding
        with regard.watch(model, FACTS) as alone:
            model(out[:1, :end])
        with regard.watch(model, FACTS) as after:  # the next run begins afresh
            model(ids)
    assert out[0, end:].tolist() == [0] * (18 - end) and end < 17
    for fact in FACTS:
        for layer in (0, 1):
            found = seen[fact][layer][0]
            assert torch.allclose(found[:, :end], alone[fact][layer][0], atol=1e-5)
            assert not found[:, end:].any()
    assert after.record.live is None


GPT: dict[str, Any] = {"vocab_size": 128, "n_layer": 2, "n_head": 4}
RELATIVE: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
OWN: dict[str, Any] = {
    "bloom": lambda: T.BloomForCausalLM(T.BloomConfig(**GPT, hidden_size=32)),
    "mpt": lambda: T.MptForCausalLM(T.MptConfig(vocab_size=128, d_model=32, n_layers=2, n_heads=4)),
    "gptj": lambda: T.GPTJForCausalLM(T.GPTJConfig(**GPT, n_embd=32, rotary_dim=8)),
    "deberta": lambda: T.DebertaV2Model(
        T.DebertaV2Config(**SMALL, **RELATIVE, num_hidden_layers=2)
    ),
    "mpnet": lambda: T.MPNetModel(T.MPNetConfig(**SMALL, num_hidden_layers=2)),
    "xlnet": lambda: T.XLNetModel(T.XLNetConfig(**GPT, d_model=32, d_inner=32)),
    "roformer": lambda: T.RoFormerModel(
        T.RoFormerConfig(**SMALL, num_hidden_layers=2, embedding_size=32)
    ),
}


@pytest.mark.parametrize("family", OWN)
def test_attention_that_a_module_computes_itself(family: str) -> None:
    model = spread(OWN[family]())
    mask = torch.ones_like(IDS)
    mask[0, -3:] = 0
    with torch.no_grad():
        plain = model(IDS, attention_mask=mask, output_attentions=True)
        with regard.watch(model, FACTS) as seen:
            inside = model(IDS, attention_mask=mask)
        again = model(IDS, attention_mask=mask)
    live = mask.bool()[:, None, :, None]
    assert torch.allclose(inside[0][1], plain[0][1], atol=1e-4)
    assert torch.equal(again[0], plain[0])
    agrees(seen, {n: p * live for n, p in enumerate(plain.attentions)})


def test_a_module_that_attends_by_itself_generates_and_takes_changes() -> None:
    model = spread(OWN["bloom"]())

    class First(Handler):
        """Only the first key is seen."""

        def before(self, call: Call) -> Call:
            return call.change(mask=call.mask & Mask.prefix(1))

    kw = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        plain = model.generate(IDS, **kw)
        with regard.watch(model, FACTS) as seen:
            out = model.generate(IDS, **kw)
        with regard.watch(model, FACTS) as whole:
            model(out[:, :-1])
        with regard.apply(model, First()), regard.watch(model, ["received"]) as one:
            model(IDS)
    assert torch.equal(out, plain)
    for fact in FACTS:
        assert torch.allclose(seen[fact][1], whole[fact][1], atol=1e-4)
    assert torch.allclose(one["received"][1][..., 0], torch.tensor(12.0))


def test_torchs_own_attention_layer() -> None:
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1}
    config = T.SiglipVisionConfig(**vision, intermediate_size=32, num_attention_heads=4)
    model = spread(T.SiglipVisionModel(config))
    pixels, kept = torch.randn(2, 3, 16, 16), []
    with torch.no_grad(), regard.watch(model, FACTS) as seen:
        plain = model(pixels).pooler_output
    pool = next(m for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention))
    name = next(n for n, m in model.named_modules() if m is pool)
    pool.register_forward_pre_hook(lambda _, args: kept.append(args))
    with torch.no_grad():
        assert torch.allclose(model(pixels).pooler_output, plain, atol=1e-5)
        _, p = pool(*kept[0], need_weights=True, average_attn_weights=False)
    agrees(seen, {name: p})


def test_blocks_of_one_sparse_map_are_refused_by_name() -> None:
    sizes = {**SMALL, "num_hidden_layers": 1, "attention_window": 4, "max_position_embeddings": 64}
    model = T.LongformerModel(T.LongformerConfig(**sizes)).eval()
    with pytest.raises(ReachError, match="LongformerSelfAttention"), regard.watch(model):
        model(IDS)


def test_another_part_than_the_sparse_one_can_be_watched() -> None:
    config = T.PegasusXConfig(
        vocab_size=128, d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=32, block_size=4,
        num_global_tokens=2,
    )  # fmt: skip
    model = spread(T.PegasusXForConditionalGeneration(config))
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
    told = pytest.raises(ReachError, match=r'part="model\.decoder\.layers"')
    with told, regard.watch(model), torch.no_grad():
        model(**inputs)
    with regard.watch(model, FACTS, part="model.decoder.layers") as seen, torch.no_grad():
        model(**inputs)
    with torch.no_grad():
        model.set_attn_implementation("eager")
        maps = model(**inputs, output_attentions=True).decoder_attentions
    agrees(seen, dict(enumerate(maps)))


@pytest.mark.parametrize(
    ("name", "layer"), [("T5Gemma2ForConditionalGeneration", -1), ("DeepseekV4ForCausalLM", 1)]
)
def test_a_generation_over_keys_that_are_no_tokens_is_refused_at_once(
    name: str, layer: int
) -> None:
    """T5Gemma 2 appends the encoder's keys to its own, DeepSeek-V4 summaries of the text."""
    from regard.lab import architectures
    from regard.lab.smallest import run

    model, inputs = architectures.ready(architectures.classes(f"{name}$")[0])
    steps: list[int] = []
    count = model.register_forward_hook(lambda *_: steps.append(1))
    prompt = {n: x for n, x in inputs.items() if n != "decoder_input_ids"}
    with regard.watch(model, [*FACTS, "distance"]) as seen, torch.no_grad():
        with pytest.raises(ReachError, match="one forward over the finished text, without a"):
            model.generate(**prompt, max_new_tokens=3, do_sample=False)
        assert not steps
        run(model, inputs)  # the remedy, in the same session
    count.remove()
    joint = seen.sites[layer]
    assert joint in seen["received"]._values and joint not in seen["distance"]._values


def test_layers_are_numbered_as_they_run() -> None:
    swin = T.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=2
    )
    model = T.SwinModel(swin).eval()
    with torch.no_grad(), regard.watch(model, ["entropy"]) as seen:
        model(torch.randn(1, 3, 32, 32))
    assert list(seen["entropy"]) == [0, 1, 2, 3] and len(seen.table()) == 4
    audio = T.Wav2Vec2Config(
        **SMALL, num_hidden_layers=2, conv_dim=(16,), conv_stride=(5,), conv_kernel=(10,),
        num_feat_extract_layers=1, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    sites = Session(T.Wav2Vec2ForCTC(audio)).sites
    assert [(s.part, s.layer) for s in sites] == [("wav2vec2.encoder.layers", n) for n in (0, 1)]


def test_layers_that_run_again_are_layers_of_their_own() -> None:
    config = T.HrmTextConfig(
        **SMALL, num_layers_per_stack=2, H_cycles=2, L_cycles=2, num_key_value_heads=4, head_dim=8
    )
    model = spread(T.HrmTextForCausalLM(config))
    with torch.no_grad(), regard.watch(model, ["received"]) as seen:
        model(IDS)
        model(IDS)
    runs = {part: len(seen["received"][part]) for part in seen.parts}
    assert runs == {"model.L_module.layers": 8, "model.H_module.layers": 4}
    for value in seen["received"].values():
        assert torch.allclose(value.sum(-1), torch.tensor(12.0), atol=1e-4)


def test_images_are_joined_not_overwritten() -> None:
    """The vision encoder attends within each image; its calls are parts of one sequence."""
    model: Any = tiny_vlm("qwen2_vl")
    inputs = vlm_inputs("qwen2_vl", model, images=[2])
    vision = next(p for p in Session(model).sites if "visual" in p.part)
    patches = len(inputs["pixel_values"])
    for run in (model, lambda **kw: model.generate(**kw, max_new_tokens=2, do_sample=False)):
        with torch.no_grad(), regard.watch(model, FACTS) as seen:
            run(**inputs)
            run(**inputs)  # the second run begins afresh
        received = seen["received"][vision]
        assert received.shape[-1] == patches
        assert torch.allclose(received.sum(-1), torch.tensor(float(patches)), atol=1e-3)
        half = patches // 2  # each image looks at itself alone
        assert torch.allclose(received[..., :half].sum(-1), torch.tensor(float(half)), atol=1e-3)
        assert seen.main.endswith("language_model.layers")


def test_cross_attention_goes_on_with_the_generation() -> None:
    text = {**SMALL, "num_hidden_layers": 2, "num_key_value_heads": 4, "rope_parameters": None}
    text = {**text, "cross_attention_layers": [1], "pad_token_id": 0, "bos_token_id": 1}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    vision = {"hidden_size": 32, "image_size": 16, "patch_size": 8, "num_hidden_layers": 1}
    vision |= {"num_global_layers": 1, "attention_heads": 4, "intermediate_size": 32}
    vision |= {"vision_output_dim": 64, "intermediate_layers_indices": [0], "max_num_tiles": 1}
    vision |= {"supported_aspect_ratios": [[1, 1]]}
    config = T.MllamaConfig(vision_config=vision, text_config=text, image_token_index=120)
    model = spread(T.MllamaForConditionalGeneration(config))
    for name, weight in model.named_parameters():
        if "gate" in name:
            weight.data.fill_(1.0)
    inputs = {
        "input_ids": torch.cat([torch.tensor([[1, 120]]), IDS[:1, :6] % 100 + 3], 1),
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 8, 1, 1, dtype=torch.long),
    }
    kw = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad(), regard.watch(model, FACTS) as seen:
        model.generate(**inputs, **kw)
    cross = next(s for s in seen.sites if s.kind == "cross")
    assert seen["entropy"][cross].shape[-1] == 8 + 3


@pytest.mark.parametrize(
    "method",
    [
        regard.shrink.StreamingLLM(budget=12),
        regard.shrink.TaskKV(ratio=0.8, sinks=1, recent=2),
        regard.shrink.Recycled(budget=6, stride=3),
        regard.shrink.SnapKV(budget=6, window=2),
    ],
)
def test_latents_that_heads_share_are_refused_by_name(method: Handler) -> None:
    model = T.DeepseekV3ForCausalLM(T.DeepseekV3Config(**SMALL, **MLA)).eval()
    told = pytest.raises(ReachError, match="caches latents that all heads share")
    with told, regard.apply(model, method), torch.no_grad():
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None)


@pytest.mark.parametrize("padding", [0, 3])
def test_a_bidirectional_model_with_a_cache_writes_the_same(padding: int) -> None:
    """Its mask is as wide as the new tokens alone, and it looks at every cached key."""
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    model = BertLMHeadModel(config).eval()
    ids = torch.randint(5, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    how = {
        "max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0,
        "attention_mask": mask, "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    with torch.no_grad():
        plain = torch.stack(model.generate(ids, **how).logits)
        with regard.watch(model, ["received", "entropy"]) as seen:
            watched = torch.stack(model.generate(ids, **how).logits)
        model.set_attn_implementation("eager")
        maps = model.generate(ids, output_attentions=True, **how).attentions
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-6)
    first = torch.cat([-torch.xlogy(step[0], step[0]).sum(-1) for step in maps], -1)
    tokens = torch.cat([mask, mask.new_ones(2, 3)], 1).bool()[:, None].expand_as(first)
    torch.testing.assert_close(seen["entropy"][0][tokens], first[tokens], rtol=1e-4, atol=1e-5)


def test_one_mask_for_all_rows_of_a_batch() -> None:
    """LayoutLM makes a mask of one row, whatever the batch."""
    from transformers import LayoutLMConfig, LayoutLMModel

    torch.manual_seed(0)
    config = LayoutLMConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_2d_position_embeddings=64,
    )  # fmt: skip
    model = LayoutLMModel(config).eval()
    with torch.no_grad():
        plain = model(IDS % 100).last_hidden_state
        with regard.watch(model, ["received"]) as seen:
            watched = model(IDS % 100).last_hidden_state
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
    assert seen["received"][0].shape == (len(IDS), 4, IDS.shape[1])
