"""TRL's GRPO with credit: gamma = 1 is stock GRPO, other weights are the explicit loss; the
command, the environments, the small model that learns here. Without TRL its tests are skipped.
"""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.parts.training.environments import (
    OWN,
    answer_of,
    environment,
    solve,
    value_of,
)
from regard.parts.training.small import accuracy, letters, packed, small_model, teach
from regard.see.preplan_anchor.card import CreditSettings

from ..cli.command import run

ENV = OWN["arithmetic"]


def trainer_of(folder: Path, *, credit: CreditSettings | None, **more: Any) -> Any:
    """A trainer on a small model; TRL's own where there is no credit."""
    trl = pytest.importorskip("trl", reason="TRL is part of the extra 'rl'")
    from datasets import Dataset

    from regard.see.preplan_anchor.grpo import trainer_class

    tokenizer = letters()
    model = small_model(tokenizer, layers=3, width=32, seed=1)
    tasks = ENV.sample(16, seed=0)

    def reward(completions: list[str], number: list[int], **_: Any) -> list[float]:
        return [float(len(c) % 5) for c in completions]  # a spread that no policy flattens

    data = Dataset.from_dict({"prompt": [t.prompt for t in tasks], "number": list(range(16))})
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 8,
        "num_generations": 4, "max_completion_length": 24, "learning_rate": 1e-2, "seed": 3,
        "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": False, "optim": "sgd", **more,
    }  # fmt: skip
    kind = trl.GRPOTrainer if credit is None else trainer_class()
    extra = {} if credit is None else {"credit": credit}
    return kind(
        model=model, reward_funcs=reward, args=trl.GRPOConfig(**settings), train_dataset=data,
        processing_class=tokenizer, **extra,
    )  # fmt: skip


@pytest.mark.parametrize(
    "more", [{}, {"gradient_accumulation_steps": 2}, {"loss_type": "dapo"}], ids=str
)
def test_gamma_1_is_stock_grpo(tmp_path: Path, more: dict[str, Any]) -> None:
    """The same steps from the same start: losses and weights agree to 1e-6."""
    stock = trainer_of(tmp_path, credit=None, **more)
    first = copy.deepcopy(stock.model.state_dict())
    stock.train()
    ours = trainer_of(tmp_path, credit=CreditSettings(amplify=1.0), **more)
    ours.train()
    moved = 0.0
    for name, value in stock.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, rtol=0, atol=1e-6)
        moved = max(moved, float((value - first[name]).abs().max()))
    assert moved > 1e-4
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (stock, ours)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_loss_is_the_weighted_one(tmp_path: Path) -> None:
    """The credited loss and its gradients are those of advantages weighted by hand."""
    trainer = trainer_of(tmp_path, credit=CreditSettings("coupled", layers="all", horizon=(4, 20)))
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    made = super(type(trainer), trainer)._generate_and_score_completions(batch)

    made["advantages"] = torch.linspace(-1, 1, 8)

    def grads(advantages: torch.Tensor) -> tuple[float, list[torch.Tensor]]:
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, {**made, "advantages": advantages})
        loss.backward()
        return float(loss), [p.grad.clone() for p in trainer.model.parameters()]

    weighted = trainer.credited(made)
    assert weighted.shape == made["completion_ids"].shape
    gamma = weighted / made["advantages"][:, None]
    mask = made["completion_mask"].bool()
    assert float(gamma[mask].max()) > 1.2 and torch.allclose(gamma[~mask], torch.ones(()))
    loss, own = grads(weighted)
    # by hand: on policy the ratio is 1, so the gradient is that of gamma * A * log p
    ids = torch.cat([made["prompt_ids"], made["completion_ids"]], 1)
    live = torch.cat([made["prompt_mask"], made["completion_mask"]], 1)
    trainer.model.zero_grad()
    width = made["completion_ids"].shape[1]
    logits = trainer.model(ids, attention_mask=live).logits[:, -width - 1 : -1]
    logp = logits.log_softmax(-1).gather(-1, made["completion_ids"][..., None])[..., 0]
    per = -(logp - logp.detach()).exp() * weighted * mask
    norm = made["num_items_in_batch"].clamp(min=1) if trainer.loss_type == "dapo" else None
    want = per.sum() / norm if norm is not None else (per.sum(-1) / mask.sum(-1)).mean()
    want.backward()
    assert loss == pytest.approx(float(want), abs=1e-6)
    for a, p in zip(own, trainer.model.parameters()):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)
    # gamma = 1 by token is TRL's own advantage by row, to the last bit but rounding
    trainer.credit = CreditSettings(amplify=1.0)
    (l1, g1), (l2, g2) = grads(trainer.credited(made)), grads(made["advantages"])
    assert l1 == pytest.approx(l2, abs=1e-6)
    for a, b in zip(g1, g2):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    trainer.credit, trainer.signs = CreditSettings("local"), "positive"
    kept = trainer.credited(made)
    low = made["advantages"] < 0
    assert torch.equal(kept[low], made["advantages"][low, None].expand_as(kept[low]))


def test_losses_without_advantages_by_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vespo"):
        trainer_of(tmp_path, credit=CreditSettings(), loss_type="vespo")


def test_the_command_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="TRL is part of the extra 'rl'")
    out = tmp_path / "grpo.json"
    quick = ["--steps", "1", "--batch", "4", "--generations", "2", "--tokens", "16", "--taught",
             "1", "--checked", "4", "--device", "cpu", "--out", str(out)]  # fmt: skip
    code, text, said = run(capsys, "train", "grpo", "--credit", "local", *quick,
                           "--save", str(tmp_path / "model"))  # fmt: skip
    assert code == 0, said
    found = json.loads(out.read_text())
    assert [n for n, _ in found["accuracy"]] == [0, 1] and found["mean weight"] > 1
    assert "credit local" in text
    # what it saved is a model that it takes
    code, _, said = run(capsys, "train", "grpo", "--model", str(tmp_path / "model"), "--lora", "2",
                        "--env", "arithmetic", *quick)  # fmt: skip
    assert code == 0, said


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, what in (
        (["--credit", "best"], "credit"),
        (["--signs", "none"], "--signs"),
        (["--batch", "5"], "--generations"),
        (["--top", "0"], "top"),
        (["--horizon", "20,10"], "horizon"),
    ):
        code, _, said = run(capsys, "train", "grpo", *words)
        assert code == 2 and what in said, said


@pytest.mark.parametrize("name", list(OWN))
def test_solutions_earn_the_reward_and_others_do_not(name: str) -> None:
    env = environment(name)
    tasks = env.sample(50, seed=4)
    assert tasks == env.sample(50, seed=4) != env.sample(50, seed=5)
    assert all(env.reward(t, t.solution) == 1.0 for t in tasks)
    assert all(env.reward(t, t.solution.replace("answer:", "")) == 0.0 for t in tasks)
    assert sum(env.reward(a, b.solution) for a, b in pairwise(tasks)) < 5
    assert all("answer:" in t.prompt for t in env.sample(3, instruct=True))


def test_countdown_rewards_are_exact() -> None:
    task = OWN["countdown"].sample(1, seed=0)[0]
    task = type(task)("", "", {"numbers": [3, 4, 2], "target": 14})
    reward = OWN["countdown"].reward
    assert reward(task, "answer: (3+4)*2") == 1.0 == reward(task, "answer: 2*(4+3)\nmore")
    for wrong in (
        "14",
        "7*2",
        "(3+4)*2+0",
        "3+4*2",
        "__import__('os')",
        "(3+4)*2;1",
        "2**3",
        "9" * 300,
    ):
        assert reward(task, f"answer: {wrong}") == 0.0
    assert answer_of("no mark") == "" and solve([1, 1], 99) is None
    with pytest.raises(ValueError, match="division"):
        value_of("1/0")


def test_a_task_of_reasoning_gym_says_what_is_missing() -> None:
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install"):
            environment("leg_counting")
        return
    env = environment("leg_counting")
    task = env.sample(2, seed=1)[0]
    assert env.reward(task, task.solution) == 1.0
    with pytest.raises(InputError, match="no task"):
        environment("no such task")


def test_the_small_model_is_taught_solutions_alone() -> None:
    tokenizer = letters()
    given = packed(tokenizer, [("1+1: ", "2"), ("10+10: ", "20")])
    assert (given["labels"] != -100).sum(-1).tolist() == [2, 3]  # with the end
    said = tokenizer.decode(tokenizer("3 4 2 make 14: ")["input_ids"])
    assert said == "3 4 2 make 14: "
    model = small_model(tokenizer, layers=2, width=32)
    losses = teach(model, tokenizer, ENV, steps=12, batch=16, rate=5e-3)
    assert losses[-1] < losses[0] - 0.5
    assert accuracy(model, tokenizer, ENV, count=4, tokens=4) == 0.0
