"""What watching a model collects equals its eager maps, call by call and part by part."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import regard
from regard.zoo.tiny import inputs, tiny

from ..core.cases import close


def test_learned_sinks_leave_less_for_the_keys() -> None:
    model: Any = tiny("gpt_oss")
    given = inputs("gpt_oss", model, padding=3)
    names = ["distance", "waad", "thumbnail", "entropy"]
    with torch.no_grad(), regard.watch(model, names) as seen:
        model(**given)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    live = given["attention_mask"].bool()
    far = torch.arange(live.shape[1])
    far = (far[:, None] - far).abs()
    for layer, p in enumerate(maps):
        p = p * live[:, None, :, None]
        close(seen["distance"][layer], (p * far).sum(-1), 1e-5, "distance")
        close(seen["waad"][layer], (p * far.clamp_max(10)).sum(-1), 1e-5, "waad")
        close(seen["thumbnail"][layer], p, 1e-5, "thumbnail")
        close(seen["entropy"][layer], -torch.special.xlogy(p, p).sum(-1), 1e-5, "entropy")


@pytest.mark.parametrize("heads", [None, [1], [3, 0]])
def test_a_mask_by_head(heads: list[int] | None) -> None:
    model: Any = tiny("llama")
    make = torch.Generator().manual_seed(0)
    allowed = torch.rand(1, 4, 9, 9, generator=make) < 0.6
    allowed = (allowed | torch.eye(9, dtype=torch.bool)).tril()
    given = {"input_ids": torch.arange(3, 12)[None], "attention_mask": allowed}
    with torch.no_grad(), regard.watch(model, ["mean_received", "entropy"], heads=heads) as seen:
        model(**given)
    model.set_attn_implementation("eager")
    penalty = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    given["attention_mask"] = penalty
    with torch.no_grad():
        maps = model(**given, output_attentions=True).attentions
    chosen = list(range(4)) if heads is None else heads
    for layer, p in enumerate(maps):
        mean = p.sum(2) / allowed.sum(2)
        close(seen["mean_received"][layer], mean[:, chosen], 1e-5)
        close(seen["entropy"][layer], -torch.special.xlogy(p, p).sum(-1)[:, chosen], 1e-5)


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_cross_attention_watched_alone_goes_on_through_a_generation(family: str) -> None:
    model: Any = tiny(family)
    given = {n: t for n, t in inputs(family, model, batch=1).items() if not n.startswith("deco")}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    found = []
    for alone in (False, True):
        part = next(p for p in regard.watch(model).parts if p.endswith(" cross"))
        with torch.no_grad(), regard.watch(model, ["entropy"], part=part if alone else None) as s:
            model.generate(**given, **settings)
        found.append(s["entropy"][part])
    for layer, entropy in found[0].items():
        assert entropy.shape[-1] > 1
        close(found[1][layer], entropy, 3e-6)


def test_which_queries_count_is_kept_with_the_facts() -> None:
    model: Any = tiny("llama")
    given = inputs("llama", model, padding=3)
    with torch.no_grad(), regard.watch(model, ["entropy"]) as seen:
        model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    mask = given["attention_mask"].bool()
    for record in seen._records():
        grown = torch.cat([mask, mask.new_ones(len(mask), record.rows - mask.shape[1])], 1)
        assert record.live is not None and torch.equal(record.live, grown)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "bert"])
def test_one_sweep_gives_the_facts_of_two_passes(family: str) -> None:
    model = tiny(family)
    facts = ["received", "mean_received", "entropy", "distance", "waad", "influence", "thumbnail"]
    with torch.no_grad():
        plain = model(**inputs(family, model))[0]
        with regard.watch(model, facts) as swept:
            together = model(**inputs(family, model))[0]
        with regard.watch(model, facts, exact_outputs=True) as twice:
            apart = model(**inputs(family, model))[0]
    close(together, plain, 2e-6)
    close(apart, plain, 2e-6)
    for fact in facts:
        for layer, value in twice[fact].items():
            close(swept[fact][layer], value, 1e-5, fact)
