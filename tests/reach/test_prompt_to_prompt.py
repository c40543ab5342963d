"""Prompt-to-Prompt by the values equals the edit of explicit maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is part of the extra 'diffusion'")

from regard.core import State
from regard.errors import InputError, ReachError
from regard.parts.diffusion.inversion import encode_text, replay
from regard.parts.diffusion.prompt_to_prompt import (
    PromptToPrompt,
    align,
    refined,
    swapped,
    token_ids,
    word_columns,
)
from regard.reach import Call, Handler
from regard.zoo.tiny_diffusion import tiny_pipeline

SOURCE, TARGET = "a red circle and a blue square", "a red circle and a green square"


def pair(
    pipe: Any, source: str, target: str, *handlers: Handler, steps: int = 2, **more: Any
) -> Any:
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.cat([encode_text(pipe, p) for p in (source, target)]).detach()
    empty = encode_text(pipe, "").detach()
    return replay(pipe, noise, [text] * steps, [empty] * steps, handlers=handlers, **more)


def test_align() -> None:
    assert align([1, 2, 3], [1, 2, 3]) == [0, 1, 2]
    assert align([1, 2, 3], [1, 9, 3]) == [0, None, 2]
    assert align([1, 2, 3], [1, 3]) == [0, 2]
    assert align([1, 2], [5, 6, 1, 2]) == [None, None, 0, 1]
    assert align([], [1]) == [None] and align([1], []) == []


class Dense(Handler):
    """The released way: maps are made, edited column by column, and multiplied with the values."""

    def __init__(self, edit: Any, cross: int, self_: int) -> None:
        self.edit, self.cross, self.self_ = edit, cross, self_

    def after(self, call: Call, state: State) -> State | None:
        place = call.denoising
        assert place is not None
        maps = (call.scale * call.q.double() @ call.k.double().transpose(-1, -2)).softmax(-1)
        source, edit = place.conditional.tolist()
        if call.site.kind == "cross" and place.step < self.cross:
            maps[edit] = self.edit.of(maps[source], maps[edit])
        elif call.site.kind == "self" and place.step < self.self_:
            maps[edit] = maps[source]
        return State((maps @ call.v.double()).to(call.v), state.lse)


@pytest.mark.parametrize("kind", ["swap", "refine", "weigh", "pieces"])
def test_equals_the_edit_of_explicit_maps(sd: Any, kind: str) -> None:
    words = sd.tokenizer
    target = TARGET
    if kind == "swap":
        edit = swapped(words, SOURCE, TARGET)
    elif kind == "refine":
        target = "a red circle and a small blue striped square"
        edit = refined(words, SOURCE, target)
    elif kind == "weigh":
        target = SOURCE
        edit = refined(words, SOURCE, SOURCE).scaled(words, SOURCE, {"blue": 3.0, "circle": -1.0})
    else:
        target = "a red circle and a zebu square"
        edit = swapped(words, SOURCE, target)
        assert len(word_columns(words, target, "zebu")) > 1
    fast = pair(sd, SOURCE, target, PromptToPrompt(edit, 2, 1))
    dense = pair(sd, SOURCE, target, Dense(edit, 2, 1))
    plain = pair(sd, SOURCE, target)
    assert torch.allclose(fast, dense, atol=5e-4)
    assert not torch.allclose(fast[1], plain[1], atol=5e-3)
    # the source's row is never touched
    assert torch.allclose(fast[0], plain[0], atol=1e-5)


def test_columns_add_up(sd: Any) -> None:
    """A swap hands out every column of the source once; weights are not renormalised."""
    words = sd.tokenizer
    for target in (TARGET, "a red circle and a zebu square"):
        edit = swapped(words, SOURCE, target)
        assert not edit.keep.any()
        # what the source spends on the swapped word is shared by the pieces of the new one
        ones = edit.take.sum(1)[: len(token_ids(words, SOURCE))]
        assert torch.allclose(ones, torch.ones_like(ones))
    edit = refined(words, SOURCE, "a red circle and a small blue square")
    assert edit.keep.nonzero()[:, 0].tolist() == [6]
    heavy = edit.scaled(words, "a red circle and a small blue square", {"small": 2.0})
    assert float(heavy.keep[6]) == 2.0 and torch.equal(heavy.take, edit.take)


def test_off_is_off(sd: Any) -> None:
    edit = swapped(sd.tokenizer, SOURCE, TARGET)
    assert torch.equal(
        pair(sd, SOURCE, TARGET, PromptToPrompt(edit, 0, 0)), pair(sd, SOURCE, TARGET)
    )
    same = PromptToPrompt(swapped(sd.tokenizer, SOURCE, SOURCE), 2, 2)
    both = pair(sd, SOURCE, SOURCE, same)
    assert torch.allclose(both[0], both[1], atol=1e-5)


def test_self_attention_above_the_limit_is_its_own(sd: Any) -> None:
    edit = swapped(sd.tokenizer, SOURCE, TARGET)
    none = pair(sd, SOURCE, TARGET, PromptToPrompt(edit, 0, 2, self_cells=1))
    assert torch.equal(none, pair(sd, SOURCE, TARGET))


def test_blend_keeps_the_source_outside(sd: Any) -> None:
    words = sd.tokenizer
    at = word_columns(words, SOURCE, "blue square"), word_columns(words, TARGET, "green square")
    one = PromptToPrompt(swapped(words, SOURCE, TARGET), 1, 0, blend=at, threshold=0.6)
    out = pair(sd, SOURCE, TARGET, one, after_step=one.after_step)
    assert one.mask is not None and 0 < int(one.mask.sum()) < one.mask.numel()
    assert torch.equal(out[1][:, ~one.mask], out[0][:, ~one.mask])
    assert not torch.equal(out[1][:, one.mask], out[0][:, one.mask])


def test_bad_input(sd: Any) -> None:
    words = sd.tokenizer
    with pytest.raises(InputError, match="'triangle' is not in"):
        word_columns(words, SOURCE, "triangle")
    with pytest.raises(InputError, match=r"stands 2 times .* 'a \(2\)'"):
        word_columns(words, SOURCE, "a")
    assert word_columns(words, SOURCE, "a (2)") == [5]
    with pytest.raises(InputError, match="as many words on both sides, not 7 and 2"):
        swapped(words, SOURCE, "a circle")
    with pytest.raises(InputError, match="lies behind"):
        word_columns(words, "very " * 30 + "red", "red")
    edit = swapped(words, SOURCE, TARGET)
    text = encode_text(sd, SOURCE).detach()
    with pytest.raises(InputError, match="there are 1"):
        replay(sd, torch.zeros(1, 4, 16, 16), [text], [text], handlers=[PromptToPrompt(edit, 1, 1)])
    from regard.reach.session import Session

    with pytest.raises(ReachError, match="this model has none"):
        Session(tiny_pipeline("sd3"), [PromptToPrompt(edit, 1, 1)])
