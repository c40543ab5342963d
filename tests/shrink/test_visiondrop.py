"""VisionDrop: the cuts are those of an explicit model; caches, batches, labels, rivals, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import regard
from regard.errors import InputError, ReachError
from regard.parts.decoding.cache import held_bytes
from regard.shrink.visiondrop.method import VisionDrop
from regard.shrink.visiondrop.plan import Plan, one_cut, prefill_flops, schedule, visual_score
from regard.zoo.tiny import tiny
from regard.zoo.tiny_vlm import IMAGE, tiny_vlm, vlm_inputs

from ..vlms import alone, cast

CUTS = {1: (6, 2), 3: (3, 1)}
FAMILIES = ["llava", "llava_siglip", "llava_next", "qwen2_vl", "qwen3_vl"]


def settings(family: str) -> dict[str, Any]:
    if family in ("llava", "llava_siglip"):
        return {"encoder": (8, 3), "cuts": CUTS}
    return {"cuts": CUTS}


def pick(score: Tensor, metric: Tensor, size: tuple[int, int]) -> list[list[int]]:
    """Dominant and contextual tokens, loop by loop."""
    metric, values = metric.detach(), score.tolist()
    best = sorted(sorted(range(len(values)), key=lambda n: (-values[n], n))[: size[0]])
    left = [n for n in range(len(score)) if n not in best]
    step = max(1, len(left) // size[1]) if size[1] else 1
    targets = [left[n * step] for n in range(size[1])]
    groups = {t: [t] for t in targets}
    for n in left:
        if targets and n not in targets:
            near = [float(torch.cosine_similarity(metric[n], metric[t], 0)) for t in targets]
            groups[targets[near.index(max(near))]].append(n)
    return [[n] for n in best] + list(groups.values())


def blend(x: Tensor, groups: list[list[int]]) -> Tensor:
    return torch.stack([x[g[0]] + (x[g[1:]].mean(0) if g[1:] else 0 * x[0]) for g in groups])


def plain_double(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def explicit(model: Any, inputs: dict[str, Any], s: VisionDrop) -> tuple[Tensor, list[int], Tensor]:
    """Logits of the tokens left of one row, the image tokens of every layer, and which tokens left
    are text; no batch, no padding, every attention a matrix.
    """
    AttentionInterface.register("plain_double", plain_double)
    AttentionMaskInterface.register("plain_double", eager_mask)
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("plain_double")
    ids = inputs["input_ids"][0]
    size = 52 if "next" in model.config.model_type else 16
    image = (ids == IMAGE).nonzero()[:, 0].tolist()
    spans = image[::size]
    body = twin.get_decoder()
    embeds = twin.get_input_embeddings()(ids[None])
    kinds = [n for n in inputs if n not in ("input_ids", "attention_mask", "labels")]
    deep = None
    if "image_grid_thw" in inputs:
        found = twin.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True
        )
        features = list(found.pooler_output)
        deep = getattr(found, "deepstack_features", None)
        positions, _ = twin.model.get_rope_index(
            ids[None], inputs["mm_token_type_ids"], inputs["image_grid_thw"]
        )
    else:
        extra = {n: inputs[n] for n in kinds if n != "pixel_values"}
        features = list(
            twin.model.get_image_features(inputs["pixel_values"], **extra).pooler_output
        )
        positions = torch.arange(len(ids))[None]
    x = embeds[0].clone()
    for start, f in zip(spans, features):
        x[start : start + size] = f
    pieces = [[x[a : a + size], list(range(a, a + size))] for a in spans]
    if s.encoder is not None:
        pieces = tower(twin, inputs, s, [p[1] for p in pieces])
    edges = [0, *[v for a in spans for v in (a, a + size)], len(ids)]
    text = [[x[a:b], list(range(a, b))] for a, b in zip(edges[::2], edges[1::2])]
    cos, sin = body.rotary_emb(embeds, position_ids=positions)
    counts, last = [], None
    for n, layer in enumerate(body.layers):
        parts = [p for pair in zip(text, pieces) for p in pair] + [text[-1]]
        h = torch.cat([p[0] for p in parts])[None]
        columns = [c for p in parts for c in p[1]]
        if s.positions != "keep" and "image_grid_thw" not in inputs:
            columns = list(range(len(columns)))
        around = (cos[:, columns], sin[:, columns])
        if n in (s.cuts or {}):
            attention = layer.self_attn
            q, k = (
                getattr(attention, name)(layer.input_layernorm(h)).unflatten(-1, (-1, 16))
                for name in ("q_proj", "k_proj")
            )
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *around)
            scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3))[0] / 4
            hidden = torch.ones(len(columns), len(columns)).triu(1).bool()
            p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            done = 0
            for index, (piece, before) in enumerate(zip(pieces, text)):
                done += len(before[1])
                own = slice(done, done + len(piece[1]))
                if s.score == "visual":
                    score = p[:, own, own].mean(1).mean(0)
                else:
                    score = p[:, -1, own].mean(0)
                done += len(piece[1])
                target = s.cuts[n] if s.merge else (sum(s.cuts[n]), 0)
                groups = pick(score, k[0, :, own].mean(0), target)
                pieces[index] = [blend(piece[0], groups), [piece[1][g[0]] for g in groups]]
            parts = [p for pair in zip(text, pieces) for p in pair] + [text[-1]]
            h = torch.cat([p[0] for p in parts])[None]
            columns = [c for p in parts for c in p[1]]
            if s.positions != "keep" and "image_grid_thw" not in inputs:
                columns = list(range(len(columns)))
            around = (cos[:, columns], sin[:, columns])
        counts.append(len(pieces[0][1]) if pieces else 0)
        count = h.shape[1]
        causal = torch.zeros(count, count).masked_fill(torch.ones(count, count).triu(1) > 0, -1e30)
        h = layer(h, attention_mask=causal[None, None].to(h), position_embeddings=around)
        h = h[0] if isinstance(h, tuple) else h
        if deep is not None and n < len(deep):
            h = h.clone()
            where = torch.tensor([c for a in spans for c in range(a, a + size)])
            h[0, where] += torch.cat(deep[n])
        lengths = [len(p[1]) for p in parts]
        cut = h[0].split(lengths)
        text = [[c, p[1]] for c, p in zip(cut[::2], parts[::2])]
        pieces = [[c, p[1]] for c, p in zip(cut[1::2], parts[1::2])]
        last = h
    logits = twin.lm_head(body.norm(last))[0]
    words = [torch.full((len(p[1]),), n % 2 == 0) for n, p in enumerate(parts)]
    return logits, counts, torch.cat(words)


def tower(model: Any, inputs: dict[str, Any], s: VisionDrop, spans: list[list[int]]) -> list[Any]:
    """The images as the projector hands them on after the cut."""
    out = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    feature, has_class = out.hidden_states[-2], "siglip" not in str(model.config.vision_config)
    own = model.model.vision_tower
    block = getattr(own, "vision_model", own).encoder.layers[-2]
    inner = block.layer_norm1(out.hidden_states[-3])
    queries, keys = (
        getattr(block.self_attn, n)(inner).unflatten(-1, (4, -1)) for n in ("q_proj", "k_proj")
    )
    maps = (queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1) / 4).softmax(-1)
    keys = keys.mean(2)
    pieces = []
    for n, columns in enumerate(spans):
        p = maps[n]
        if has_class:
            groups = pick(p[:, 0, 1:].sum(0), keys[n, 1:], (s.encoder[0] - 1, s.encoder[1]))
            x = torch.cat([feature[n, :1], blend(feature[n, 1:], groups)])
            at = [columns[0]] + [columns[g[0]] for g in groups]
        else:
            groups = pick(p.mean((0, 1)), keys[n], s.encoder)
            x, at = blend(feature[n], groups), [columns[g[0]] for g in groups]
        pieces.append([model.model.multi_modal_projector(x[None])[0], at])
    return pieces


def left(logits: Tensor, ids: Tensor) -> Tensor:
    """The logits of the text."""
    return logits[ids != IMAGE]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", [{}, {"score": "text", "merge": False}, {"positions": "keep"}])
def test_it_is_the_explicit_model(family: str, how: dict[str, Any]) -> None:
    model = tiny_vlm(family).double()
    for images in ([1], [2]):
        inputs = cast(vlm_inputs(family, model, images=images), torch.float64)
        method = VisionDrop(**settings(family), **how)
        if how.get("score") == "text":
            method = VisionDrop(cuts=CUTS, **how)
        with torch.no_grad():
            true, counts, words = explicit(model, inputs, method)
            plain = model(**inputs).logits
            with regard.apply(model, method):
                found = model(**inputs).logits
        ids = inputs["input_ids"][0]
        assert found.shape == plain.shape
        bar = 1e-9 * max(float(true.abs().max()), 1)
        assert float((left(found[0], ids) - true[words]).abs().max()) < bar
        assert method.counts() == [counts] * images[0]
        assert float((left(found[0], ids) - left(plain[0], ids))[-1].abs().max()) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_neutral_is_the_plain_model_and_no_trace_is_left(family: str) -> None:
    model = tiny_vlm(family)
    inputs = vlm_inputs(family, model, images=[1, 2, 0])

    def hooks() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    with torch.no_grad():
        plain = model(**inputs).logits
        before = hooks()  # transformers leaves some of its own after a first pass
        with regard.apply(model, VisionDrop(ratio=1.0)):
            assert torch.equal(model(**inputs).logits, plain)
        with regard.apply(model, VisionDrop(**settings(family))):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, plain)
    assert hooks() == before


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_is_alone(family: str) -> None:
    """Rows with one image, two and none in a left-padded batch."""
    model, images = tiny_vlm(family).double(), [1, 2, 0]
    inputs = cast(vlm_inputs(family, model, images=images), torch.float64)
    mask = inputs["attention_mask"]
    extra = {} if family[0] == "q" else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    for how in ({}, {"score": "random"}, {"score": "text"}):
        method = VisionDrop(**settings(family), **how)
        with torch.no_grad(), regard.apply(model, method):
            together = model(**inputs, **extra).logits
            for row in range(3):
                own = alone(family, inputs, row, images)
                single = model(**own).logits[0]
                ids = own["input_ids"][0]
                assert torch.allclose(
                    left(together[row, -len(ids) :], ids), left(single, ids), atol=1e-9
                )
    with torch.no_grad():  # the row without an image is the plain model's
        plain = model(**alone(family, inputs, 2, images)).logits[0]
    assert torch.allclose(single, plain, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_is_decode(family: str) -> None:
    """The visual score does not look at later text, so token by token gives the same."""
    model = tiny_vlm(family).double()
    inputs = cast(vlm_inputs(family, model, images=[1, 2, 0]), torch.float64)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    cut = ids.shape[1] - 3
    short = ("input_ids", "attention_mask", "mm_token_type_ids")
    first = {n: x[:, :cut] if n in short else x for n, x in inputs.items()}
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    if family[0] != "q":
        inputs["position_ids"], first["position_ids"] = positions, positions[:, :cut]
    with torch.no_grad(), regard.apply(model, VisionDrop(**settings(family))):
        whole = model(**inputs).logits
        out = model(**first, use_cache=True)
        for a, b in ((cut, cut + 1), (cut + 1, cut + 3)):  # one token, then two at once
            at = positions[:, a:b]
            if family[0] == "q":
                at = (at + model.model.rope_deltas).expand(3, -1, -1)
            out = model(
                input_ids=ids[:, a:b], attention_mask=mask[:, :b], position_ids=at,
                past_key_values=out.past_key_values,
            )  # fmt: skip
            assert torch.allclose(out.logits, whole[:, a:b], atol=1e-9)


def test_every_layer_of_the_cache_has_its_own_length() -> None:
    model = tiny_vlm("llava")
    inputs = vlm_inputs("llava", model, images=[1])
    with torch.no_grad():
        full = held_bytes(model(**inputs, use_cache=True).past_key_values)
        with regard.apply(model, method := VisionDrop(encoder=(8, 3), cuts=CUTS)):
            cache = model(**inputs, use_cache=True).past_key_values
    assert method.counts() == [[11, 8, 8, 4]]
    assert [layer.rows[0].data.shape[2] for layer in cache.layers] == [21, 18, 18, 14]
    assert cache.get_seq_length() == 26
    assert held_bytes(cache) == full * (21 + 18 + 18 + 14) / (4 * 26)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str) -> None:
    model = tiny_vlm(family)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [IMAGE]
    inputs = vlm_inputs(family, model, images=[1, 2])
    ids = inputs["input_ids"]
    with torch.no_grad(), regard.apply(model, VisionDrop(**settings(family))):
        greedy = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        longer = {**inputs, "input_ids": greedy}
        longer["attention_mask"] = torch.nn.functional.pad(
            inputs["attention_mask"], (0, 5), value=1
        )
        if family[0] == "q":
            longer["mm_token_type_ids"] = (greedy == IMAGE).int()
        else:
            longer["position_ids"] = (longer["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        logits = model(**longer, use_cache=False).logits[:, -6:-1]
        logits[..., IMAGE] = -torch.inf
        again = logits.argmax(-1)
        beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(greedy[:, -5:], again) and torch.equal(greedy[:, :-5], ids)
    assert beams.shape == (2, ids.shape[1] + 4)


def test_labels_and_gradients() -> None:
    """The loss is that of the explicit model's logits at the text, and its gradient flows."""
    model = tiny_vlm("llava").double()
    inputs = cast(vlm_inputs("llava", model, images=[1]), torch.float64)
    labels = inputs["input_ids"].clone()
    labels[:, :20] = -100  # the first label follows the second word after the image
    method = VisionDrop(encoder=(8, 3), cuts=CUTS)
    true, _, _ = explicit(model, inputs, method)
    want = torch.nn.functional.cross_entropy(true[-7:-1], labels[0, -6:])
    with regard.apply(model, method):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
    assert torch.allclose(loss.double(), want, atol=1e-6)
    grads = [p.grad for p in model.model.multi_modal_projector.parameters()]
    assert all(g is not None and bool(g.abs().sum() > 0) for g in grads)
    labels[0, 5] = 3
    with regard.apply(model, method), pytest.raises(InputError, match="labels lie on image"):
        model(**inputs, labels=labels)


def test_the_label_right_after_the_image_is_judged_by_the_last_token_left() -> None:
    model = tiny_vlm("llava").double()
    inputs = cast(vlm_inputs("llava", model, images=[1]), torch.float64)
    method = VisionDrop(encoder=(8, 3), cuts=CUTS)
    with torch.no_grad():
        true, counts, _ = explicit(model, inputs, method)
        with regard.apply(model, method):
            found = model(**inputs).logits[0]
    assert torch.allclose(found[18], true[3 + counts[-1] - 1], atol=1e-9)


def test_what_was_kept_is_told() -> None:
    model = tiny_vlm("llava")
    inputs = vlm_inputs("llava", model, images=[2, 0])
    with torch.no_grad(), regard.apply(model, method := VisionDrop(encoder=(8, 3), cuts=CUTS)):
        model(**inputs)
    one, two = method.kept()[0]
    assert method.kept()[1] == [] and one != two
    for cuts in (one, two):
        assert [c.layer for c in cuts] == [0, 1, 3]
        assert [len(c.groups) for c in cuts] == [11, 8, 4]
        assert [c.dominant for c in cuts] == [8, 6, 3]
        for c in cuts:  # nothing is lost: every patch is in one token
            assert sorted(m for g in c.groups for m in g) == list(range(16))
        assert cuts[0].groups[0] == ()
    assert method.counts() == [[11, 8, 8, 4]] * 2 and method.mean_tokens() == 31 / 4


def test_budgets_have_one_vocabulary() -> None:
    """`tokens`, the older name, meant a share below 1 and a count from 1 on: 1.0 was one token."""
    assert VisionDrop().ratio == 0.25 and VisionDrop(ratio=1.0).budget is None
    share, count = VisionDrop(tokens=0.5), VisionDrop(tokens=7.0)
    assert (share.ratio, share.budget, count.ratio, count.budget) == (0.5, None, None, 7)
    assert "tokens" not in count.settings()


def test_rivals_keep_as_many() -> None:
    model = tiny_vlm("llava", layers=8)
    inputs = vlm_inputs("llava", model, images=[1])
    answers = []
    with torch.no_grad():
        for how in (
            {},
            {"score": "text"},
            {"score": "random"},
            {"stages": "encoder"},
            {"stages": "fastv", "score": "text", "merge": False},
            {"score_mask": "bidirectional"},
            {"keep_cls": False},
        ):
            with regard.apply(model, method := VisionDrop(budget=8, **how)):
                answers.append(model(**inputs).logits[0, -1])
            assert abs(method.mean_tokens() - 8) <= 0.5
    for n, one in enumerate(answers):
        assert all(not torch.equal(one, other) for other in answers[n + 1 :])
    # the control of one random token
    with (
        torch.no_grad(),
        regard.apply(
            model, method := VisionDrop(encoder=(1, 0), merge=False, score="random", keep_cls=False)
        ),
    ):
        model(**inputs)
    assert method.mean_tokens() == 1


def test_watching_what_is_left() -> None:
    """Facts under VisionDrop are those of the tokens left; generation goes on over the cache."""
    model = tiny_vlm("llava")
    inputs = vlm_inputs("llava", model, images=[1, 0])
    model.generation_config.eos_token_id = None
    method = VisionDrop(encoder=(8, 3), cuts=CUTS)
    with torch.no_grad(), regard.apply(model, method), regard.watch(model, ["received"]) as seen:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    found = seen["received"]
    assert [found[n].shape[-1] for n in range(4)] == [23, 20, 20, 16]
    for n, text in enumerate([23, 20, 20, 16]):
        sums = found[n].sum(-1)  # every live query hands out one
        assert torch.allclose(sums[0], torch.full((4,), float(text)), atol=1e-4)


def test_flops_fall_with_the_tokens() -> None:
    model = tiny_vlm("llava")
    body = model.get_decoder()
    linear = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    one = 2 * 26 * linear + 4 * 4 * 16 * 26 * 27 // 2
    assert prefill_flops(body, [26] * 4) == 4 * one
    assert prefill_flops(body, [26, 18, 18, 14]) < prefill_flops(body, [26, 26, 18, 14])


def test_schedule() -> None:
    released = Plan((42, 6), {8: (30, 5), 16: (22, 4), 24: (16, 3)})
    assert schedule(32, 576, 32) == released and released.mean(576, 32) == 32
    for tokens, count, depth in ((192, 576, 32), (0.25, 64, 8), (16, 256, 12), (9, 100, 30)):
        plan = schedule(tokens, count, depth)
        plan.check(count, True)
        mean = tokens * count if tokens < 1 else tokens
        assert abs(plan.mean(count, depth) - mean) < 0.5
    for plan in (schedule(200, 576, 32, encoder=False), schedule(500, 576, 32)):
        assert plan.encoder is None and abs(plan.mean(576, 32) - plan.counts(576, 32)[9]) > 0
        plan.check(576, True)
    assert abs(schedule(200, 576, 32, encoder=False).mean(576, 32) - 200) < 0.5
    assert one_cut(64, 576, 32, 0).mean(576, 32) == 64
    assert abs(one_cut(192, 576, 32, 2).mean(576, 32) - 192) < 0.5


def test_the_causal_score_favours_early_tokens() -> None:
    """With flat logits: 0.521, 0.271, 0.146, 0.0625 (the card's example)."""
    from regard.core import Mask
    from regard.reach import Call, Site

    zero = torch.zeros(1, 2, 4, 8)
    call = Call(Site(0, "x", 0, "x", "self"), zero, zero, zero, Mask.causal(), 1.0)
    causal = visual_score(call, 0, 0, (0, 4), "causal")
    assert torch.allclose(causal, torch.tensor([0.5208, 0.2708, 0.1458, 0.0625]), atol=1e-4)
    assert torch.allclose(visual_score(call, 0, 0, (0, 4), "bidirectional"), torch.full((4,), 0.25))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"budget": 7, "encoder": (4, 1)}, "by hand"),
        ({"budget": 7, "ratio": 0.5}, "one of the three"),
        ({"ratio": 1.5}, "ratio is a number above 0 and at most 1"),
        ({"score": "loud"}, "score is one of"),
        ({"encoder": (15, 1)}, "must decrease"),
        ({"encoder": (8, 0)}, "at least 1"),
        ({"cuts": {1: (5, 1), 2: (5, 1)}}, "must decrease"),
        ({"cuts": {0: (5, 1)}}, "inside the model"),
        ({"cuts": {4: (5, 1)}}, "inside the model"),
        ({"budget": 2}, "cannot be reached"),
        ({"budget": 3, "stages": "fastv"}, "raise the budget"),
        ({"budget": "4"}, "budget is a whole number of at least 1, not '4'"),
        ({"ratio": float("nan")}, "ratio is a number"),
        ({"encoder": 8}, "a cut is a pair"),
        ({"encoder": (4.5, 1)}, "whole number"),
        ({"cuts": {"1": (5, 1)}}, "the layer of a cut is a whole number"),
        ({"cuts": {1: 5}}, "a cut is a pair"),
    ],
)
def test_bad_settings(how: dict[str, Any], message: str) -> None:
    model = tiny_vlm("llava")
    inputs = vlm_inputs("llava", model)
    with pytest.raises(InputError, match=message), regard.apply(model, VisionDrop(**how)):
        model(**inputs)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_models_and_caches_that_cannot_work() -> None:
    drop = {"cuts": CUTS}
    with (
        pytest.raises(InputError, match="no images"),
        regard.apply(tiny("llama"), VisionDrop(budget=5)),
    ):
        pass
    for family in ("qwen2_vl", "llava_next"):
        with (
            pytest.raises(InputError, match="encoder of"),
            regard.apply(tiny_vlm(family), VisionDrop(encoder=(5, 1))),
        ):
            pass
    with (
        pytest.raises(InputError, match="cannot be renumbered"),
        regard.apply(tiny_vlm("qwen3_vl"), VisionDrop(positions="renumber", **drop)),
    ):
        pass
    model = tiny_vlm("llava")
    inputs = vlm_inputs("llava", model, images=[1])
    with torch.no_grad():
        with regard.apply(model, VisionDrop(**drop)):
            cache = model(**inputs, use_cache=True).past_key_values
            with pytest.raises(InputError, match="later turn"):
                model(**{**inputs, "attention_mask": None}, past_key_values=cache)
        with pytest.raises(ReachError, match="filled under VisionDrop"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache = model(**inputs, use_cache=True).past_key_values
        with (
            regard.apply(model, VisionDrop(**drop)),
            pytest.raises(InputError, match="filled without"),
        ):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        bad = {**inputs, "input_ids": inputs["input_ids"][:, :-9]}
        bad["input_ids"] = bad["input_ids"][:, 4:]
        with regard.apply(model, VisionDrop(**drop)), pytest.raises(InputError, match="do not mat"):
            model(input_ids=bad["input_ids"], pixel_values=inputs["pixel_values"])
    model.get_decoder().gradient_checkpointing = True
    with regard.apply(model.train(), VisionDrop(**drop)), pytest.raises(ReachError, match="checkp"):
        model(**inputs)
