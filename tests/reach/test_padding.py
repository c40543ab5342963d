"""Padding in modules that compute their own softmax: a padded row gets what it gets alone, and rows
of a batch that end early under `generate` add nothing after their end.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

import regard

from .test_doors import FACTS, GPT, IDS, OWN, SMALL, spread

WRITES: dict[str, Any] = {
    **{name: OWN[name] for name in ("bloom", "mpt", "gptj")},
    "codegen": lambda: T.CodeGenForCausalLM(T.CodeGenConfig(**GPT, n_embd=32, rotary_dim=8)),
    "falcon": lambda: T.FalconForCausalLM(T.FalconConfig(**SMALL, num_hidden_layers=2)),
    "falcon-alibi": lambda: T.FalconForCausalLM(
        T.FalconConfig(**SMALL, num_hidden_layers=2, alibi=True)
    ),
    "gpt-neo": lambda: T.GPTNeoForCausalLM(
        T.GPTNeoConfig(
            vocab_size=128, hidden_size=32, num_layers=2, num_heads=4, window_size=4,
            attention_types=[[["global", "local"], 1]],
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", WRITES)
def test_a_left_padded_row_is_what_it_is_alone(family: str) -> None:
    model = spread(WRITES[family]())
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    how = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 8}
    with torch.no_grad():
        free = model.generate(IDS, attention_mask=mask, eos_token_id=None, **how)
        stop = int(free[0, 14])  # the first row ends before the second
        with regard.watch(model, FACTS) as seen:
            out = model.generate(IDS, attention_mask=mask, eos_token_id=stop, **how)
        ends = [12 + row.index(stop) + 1 if stop in row else 20 for row in out[:, 12:].tolist()]
        assert len(set(ends)) == 2
        for row, (start, end) in enumerate(zip((3, 0), ends)):
            end = min(end, out.shape[1] - 1)  # the last token is read by nobody
            with regard.watch(model, FACTS) as alone:
                model(out[row : row + 1, start:end])
            for fact in FACTS:
                for layer in (0, 1):
                    value, true = seen[fact][layer][row], alone[fact][layer][0]
                    torch.testing.assert_close(value[:, start:end], true, rtol=1e-4, atol=1e-4)
                    assert not value[:, :start].any() and not value[:, end:].any()


@pytest.mark.parametrize("name", ["xlnet", "xlm"])
def test_padding_that_sees_itself_is_known_by_the_mask_given(name: str) -> None:
    """No score tells these queries from tokens; the model's own `attention_mask` does."""
    config = T.XLMConfig(vocab_size=128, emb_dim=32, n_layers=2, n_heads=4, causal=True)
    model = spread(OWN["xlnet"]() if name == "xlnet" else T.XLMModel(config))
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        maps = model(IDS, attention_mask=mask, output_attentions=True).attentions
        for given in ((IDS, mask), (IDS,)):  # by place or by name
            with regard.watch(model, FACTS) as seen:
                model(*given, **({} if len(given) == 2 else {"attention_mask": mask}))
            for layer, p in enumerate(maps):
                p = (p * mask[:, None, :, None]).double()
                torch.testing.assert_close(
                    seen["received"][layer].double(), p.sum(-2), rtol=1e-4, atol=1e-4
                )
                assert not seen["entropy"][layer][0, :, :3].any()
