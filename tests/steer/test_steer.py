"""Guided sampling equals its formula computed without caches, row by row, whatever the batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from regard import ContrastiveExpertGuidance
from regard.errors import InputError
from regard.steer.steer.method import sample
from regard.zoo import tiny

PROMPTS = torch.tensor([[1, 9, 8, 7], [1, 40, 41, 42], [1, 100, 3, 77]])
NEGATIVES = [[5, 6, 7, 8, 9, 10], [50, 51], [90, 91, 92, 93]]


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    return tiny("llama", seed=0), tiny("llama", seed=1)


def log_p(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def plain(
    expert: Any, base: Any, context: list[int], said: list[int], n: list[int], g: float, e: float
) -> Tensor:
    """The card's line, from whole texts and without a cache."""
    f, b = log_p(expert, context + said), log_p(base, context + said)
    return f + g * (f - b) - e * log_p(expert, n + said)


def generate(model: Any, ids: Tensor, guide: Any, **more: Any) -> Any:
    torch.manual_seed(3)
    settings = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None, **more}
    return model.generate(
        ids,
        attention_mask=settings.pop("attention_mask", torch.ones_like(ids)),
        logits_processor=LogitsProcessorList([guide]),
        return_dict_in_generate=True,
        output_scores=True,
        top_k=0,
        **settings,
    )


@pytest.mark.parametrize("gamma, eta", [(0.5, 0.2), (1.0, 0.0), (0.0, 0.7)])
def test_cached_batch_equals_the_formula(pair: Any, gamma: float, eta: float) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, NEGATIVES, gamma, eta)
    out = generate(expert, PROMPTS, guide)
    for row, (context, negative) in enumerate(zip(PROMPTS.tolist(), NEGATIVES)):
        for step, scores in enumerate(out.scores):
            said = out.sequences[row, 4 : 4 + step].tolist()
            wanted = plain(expert, base, context, said, negative, gamma, eta)
            torch.testing.assert_close(scores[row], wanted, atol=1e-5, rtol=1e-5)


def test_a_batch_is_its_single_runs(pair: Any) -> None:
    expert, base = pair
    both = ContrastiveExpertGuidance(expert, base, NEGATIVES, 0.6, 0.4)
    together = generate(expert, PROMPTS, both, do_sample=False).sequences
    for row in range(3):
        guide = ContrastiveExpertGuidance(expert, base, [NEGATIVES[row]], 0.6, 0.4)
        alone = generate(expert, PROMPTS[row : row + 1], guide, do_sample=False).sequences
        assert torch.equal(alone[0], together[row])


def test_a_padded_prompt_is_the_prompt(pair: Any) -> None:
    expert, base = pair
    ids = torch.tensor([[0, 0, 1, 9], [1, 40, 41, 42]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    for own in (None, mask):
        guide = ContrastiveExpertGuidance(expert, base, [[5, 6]], attention_mask=own)
        out = generate(expert, ids, guide, attention_mask=mask)
        said = out.sequences[0, 4:8].tolist()
        wanted = plain(expert, base, [1, 9], said, [5, 6], 0.5, 0.2)
        torch.testing.assert_close(out.scores[4][0], wanted, atol=1e-5, rtol=1e-5)


def test_every_step_feeds_one_token(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, [[5, 6, 7]])
    seen: list[int] = []
    hook = base.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate(expert, PROMPTS, guide)
    hook.remove()
    assert seen == [4, 1, 1, 1, 1, 1]


def test_identities(pair: Any) -> None:
    expert, base = pair
    ids = PROMPTS[:1]
    context = ids[0].tolist()
    with torch.no_grad():
        logits = expert(ids).logits[:, -1]
    f, b = log_p(expert, context), log_p(base, context)
    # eta = 0: classifier-free guidance of scale 1 + gamma, the base being the unconditional model
    guided = ContrastiveExpertGuidance(expert, base, gamma=0.7, eta=0.0)(ids, logits)
    torch.testing.assert_close(guided[0], b + 1.7 * (f - b), atol=1e-5, rtol=1e-5)
    # expert and base the same: gamma has no say
    same = ContrastiveExpertGuidance(expert, expert, gamma=5.0, eta=0.0)(ids, logits)
    torch.testing.assert_close(same[0], f, atol=1e-4, rtol=1e-5)
    # negatives that are the prompt: a temperature of 1 / (1 - eta)
    warm = ContrastiveExpertGuidance(expert, None, [context], gamma=0.0, eta=0.4)(ids, logits)
    torch.testing.assert_close(warm[0], 0.6 * f, atol=1e-5, rtol=1e-5)


def test_neutral_settings_cost_nothing(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, gamma=0.0, eta=0.0)
    scores = torch.randn(1, 128)

    def fail(*_: Any) -> None:
        raise AssertionError("a pass was made")

    hooks = [m.register_forward_pre_hook(fail) for m in (expert, base)]
    assert guide(PROMPTS[:1], scores) is scores
    for hook in hooks:
        hook.remove()


def test_barred_tokens_stay_barred(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, [[5, 6]], gamma=1.0, eta=1.0)
    scores = torch.randn(1, 128)
    scores[0, 10:100] = -math.inf
    out = guide(PROMPTS[:1], scores)
    assert bool((out[0, 10:100] == -math.inf).all())
    assert bool(out[0, :10].isfinite().all()) and bool(out[0, 100:].isfinite().all())


def test_the_plausibility_bar(pair: Any) -> None:
    expert, base = pair
    scores = torch.randn(1, 128)
    out = ContrastiveExpertGuidance(expert, base, [[5]], alpha=0.3)(PROMPTS[:1], scores)
    share = scores.softmax(-1) / scores.softmax(-1).max()
    assert torch.equal(out[0] > -math.inf, share[0] >= 0.3)


def test_a_new_prompt_starts_anew(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, [[5, 6]])
    first = generate(expert, PROMPTS, guide).sequences
    again = generate(expert, PROMPTS, guide).sequences
    assert torch.equal(first, again)
    guide.reset()
    assert torch.equal(first, generate(expert, PROMPTS, guide).sequences)
    other = ContrastiveExpertGuidance(expert, base, [[5, 6]])
    fresh = generate(expert, PROMPTS[:, :3] + 1, other).sequences
    assert torch.equal(fresh, generate(expert, PROMPTS[:, :3] + 1, guide).sequences)


def test_returned_sequences_get_their_prompts_negatives(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, NEGATIVES[:2], 0.5, 0.5)
    out = generate(expert, PROMPTS[:2], guide, num_return_sequences=2)
    said = out.sequences[2, 4:6].tolist()
    wanted = plain(expert, base, PROMPTS[1].tolist(), said, NEGATIVES[1], 0.5, 0.5)
    torch.testing.assert_close(out.scores[2][2], wanted, atol=1e-5, rtol=1e-5)


def test_beams_are_refused(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, [[5, 6]])
    with pytest.raises(InputError, match="beam search"):
        generate(expert, PROMPTS[:1], guide, num_beams=3, do_sample=False, max_new_tokens=12)


def test_assisted_decoding_is_refused(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, [[5, 6]])
    with pytest.raises(InputError, match="assisted decoding"):
        generate(expert, PROMPTS[:1], guide, assistant_model=base, max_new_tokens=20)


def test_a_prompt_that_goes_on_asks_for_a_reset(pair: Any) -> None:
    expert, base = pair
    guide = ContrastiveExpertGuidance(expert, base, [[5, 6]])
    out = generate(expert, PROMPTS, guide).sequences
    longer = torch.cat([out, torch.full((3, 2), 4)], 1)
    with pytest.raises(InputError, match="reset"):
        generate(expert, longer, guide)
    guide.reset()
    assert generate(expert, longer, guide).sequences.shape[1] == longer.shape[1] + 6


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"eta": math.inf}, "eta"),
        ({"alpha": 1.0}, "alpha"),
        ({"k": 0}, "k, the number"),
        ({"negatives": []}, "needs negatives"),
        ({"negatives": [[]]}, "needs negatives"),
        ({"negatives": ["words"]}, "tokenizer"),
        ({"negatives": [[1] * 5000]}, "positions"),
        ({"negatives": [[500]]}, "beyond"),
        ({"base": None}, "PeftModel"),
    ],
)
def test_bad_input_is_refused_at_once(pair: Any, changes: dict[str, Any], said: str) -> None:
    expert, base = pair
    with pytest.raises(InputError, match=said):
        ContrastiveExpertGuidance(expert, **{"base": base, "negatives": [[5]], **changes})


def test_other_vocabularies_are_refused(pair: Any) -> None:
    base = tiny("llama")
    base.resize_token_embeddings(130)
    with pytest.raises(InputError, match="128 tokens and the base 130"):
        ContrastiveExpertGuidance(pair[0], base, [[5]])


def test_rows_without_negatives_of_their_own(pair: Any) -> None:
    guide = ContrastiveExpertGuidance(*pair, NEGATIVES[:2])
    with pytest.raises(InputError, match="for 2 rows and 3"):
        guide(PROMPTS, torch.randn(3, 128))


def test_the_adapter_switched_off_is_the_base() -> None:
    peft = pytest.importorskip("peft")
    base = tiny("llama")
    expert = peft.get_peft_model(
        tiny("llama"),
        peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    ).eval()
    one = ContrastiveExpertGuidance(expert, None, NEGATIVES, 0.8, 0.3)
    two = ContrastiveExpertGuidance(expert, base, NEGATIVES, 0.8, 0.3)
    a, b = (generate(expert, PROMPTS, guide) for guide in (one, two))
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.scores, b.scores):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
    off = generate(expert, PROMPTS, ContrastiveExpertGuidance(expert, None, gamma=0.0, eta=0.0))
    assert not torch.allclose(off.scores[0], a.scores[0])


class Letters:
    """A tokenizer of single characters."""

    eos_token_id = 2

    def __call__(self, words: str, return_tensors: str | None = None) -> Any:
        from transformers import BatchEncoding

        ids = [3 + ord(c) % 120 for c in words]
        return BatchEncoding({"input_ids": torch.tensor([ids]) if return_tensors else ids})

    def decode(self, row: Any, skip_special_tokens: bool = True) -> str:
        return "".join(chr(97 + int(n) % 26) for n in row)


def test_samples_join_the_pool_and_can_go_on(pair: Any) -> None:
    expert, base = pair
    more: dict[str, Any] = {"base": base, "k": 2, "tokens": 5, "batch": 2}
    pool = ["one", "two"]
    whole = list(sample(expert, Letters(), "say", pool, count=6, **more))
    assert pool == ["one", "two", *(s.text for s in whole)]
    assert max(max(s.negatives) for s in whole) > 1 and all(s.shift > 0 for s in whole)
    kept = ["one", "two", *(s.text for s in whole[:2])]
    assert list(sample(expert, Letters(), "say", kept, count=6, start=2, **more)) == whole[2:]
    with pytest.warns(UserWarning, match="only 1 of k=2"):
        next(sample(expert, Letters(), "say", ["one"], count=1, **more))
    with pytest.raises(InputError, match="empty"):
        next(sample(expert, Letters(), "say", [], count=1, **more))
    room = expert.config.max_position_embeddings
    with pytest.raises(InputError, match=f"a sample {room}, but the expert has {room} positions"):
        next(sample(expert, Letters(), "say", ["one"], count=1, base=base, k=1, tokens=room))


def test_the_command_line_goes_on_where_it_stopped(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import typer
    from typer.testing import CliRunner

    from regard.cli.app import build
    from regard.steer.steer import command as steer

    monkeypatch.setattr(steer, "_models", lambda *_: (*pair, Letters()))
    (tmp_path / "seen.txt").write_text("one\n\ntwo\n")
    out = tmp_path / "synth.jsonl"
    words = ["run", "steer", "--negatives", str(tmp_path / "seen.txt"), "--tokens", "5", "-n", "4"]
    words += ["--k", "2", "--out", str(out)]
    done = CliRunner().invoke(typer.main.get_command(build()), words)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and {"text", "negatives", "gamma", "eta", "seed"} <= set(rows[0])
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []

    whole = out.read_text()
    real = steer._collect

    def stop(made: Any, *rest: Any) -> None:
        real((next(made) for _ in range(2)), *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(steer, "_collect", stop)
    out.unlink()
    assert CliRunner().invoke(typer.main.get_command(build()), words).exit_code != 0
    assert not out.exists()
    monkeypatch.setattr(steer, "_collect", real)
    assert CliRunner().invoke(typer.main.get_command(build()), words).exit_code == 0
    assert out.read_text() == whole


@pytest.mark.real
def test_the_shipped_expert_beats_its_base(smollm2: tuple[Any, Any]) -> None:
    pytest.importorskip("peft")
    from regard.zoo.expert import load_expert, loss, sentences

    expert, tokenizer = load_expert("austen")
    held_out = sentences()[1][:8]
    tuned = loss(expert, tokenizer, held_out)
    with expert.disable_adapter():
        assert tuned < loss(expert, tokenizer, held_out) - 0.5


@pytest.mark.real
@pytest.mark.slow
def test_the_recipe_writes_a_folder_that_loads(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from regard.zoo.expert import load_expert, train

    folder = train(tmp_path / "mine", steps=2, show=False)
    facts = json.loads((folder / "training.json").read_text())
    assert facts["loss_after"] < facts["loss_before"]
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert load_expert(str(folder))[0].config.vocab_size == smollm2[0].config.vocab_size
    with pytest.raises(InputError, match="there already"):
        train(folder)


@pytest.mark.parametrize(
    "words, said",
    [
        (["--expert", "austin", "--eta", "0", "--prompt", "x"], "Did you mean 'austen'"),
        (["--expert", "austin", "--eta", "0"], "give --prompt"),
        ([], "--negatives FILE"),
        (["--negatives", "nowhere.txt"], "no file nowhere.txt"),
    ],
)
def test_the_command_line_refuses(words: list[str], said: str) -> None:
    import typer
    from typer.testing import CliRunner

    from regard.cli.app import build

    found = CliRunner().invoke(typer.main.get_command(build()), ["run", "steer", *words])
    assert isinstance(found.exception, InputError) and said in str(found.exception)
