"""One reinforcement learning run: TRL's GRPO with credit, on tasks with exact rewards."""

from __future__ import annotations

import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.parts.training.environments import Environment, Task, environment
from regard.parts.training.small import accuracy, letters, small_model, teach
from regard.versions import versions
from regard.zoo.options import Loading, pick_device

from .card import CreditSettings
from .grpo import SIGNS, trainer_class

__all__ = ["SIGNS", "Run", "train"]
TASKS = 4096  # that a run draws its prompts from


@dataclass(frozen=True)
class Run:
    """The settings of one run, apart from the credit's."""

    model: str = "small"
    env: str = "countdown"
    steps: int = 50
    batch: int = 64
    generations: int = 8
    accumulate: int = 1
    tokens: int = 64
    rate: float = 1e-4
    kl: float = 0.0
    signs: str = "both"
    taught: int = 300
    lora: int = 0
    vllm: bool = False
    seed: int = 0
    check_every: int = 0
    checked: int = 128


def train(
    run: Run, credit: CreditSettings, loading: Loading | None = None, save: Path | None = None,
    start: tuple[Any, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train; accuracies on new tasks by step, rewards, losses and what the credit cost.

    Args:
        save: a folder for the trained model.
        start: model and tokenizer to begin with, in place of `run.model`; the model is trained.
    """
    task_env = environment(run.env)
    loading = loading or Loading()
    instruct = run.model != "small" and start is None
    if instruct:
        start = _start(run, task_env, loading)
    make = trainer_class()
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig

    model, tokenizer = start or _start(run, task_env, loading)
    chat = instruct and bool(getattr(tokenizer, "chat_template", None))
    tasks = task_env.sample(TASKS, seed=run.seed + 1, instruct=instruct)
    prompts = [[{"role": "user", "content": t.prompt}] if chat else t.prompt for t in tasks]
    data = Dataset.from_dict({"prompt": prompts, "number": list(range(len(tasks)))})
    pace: list[list[float]] = []

    def reward(completions: list[Any], number: list[int], **_: Any) -> list[float]:
        said = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [task_env.reward(tasks[n], s) for n, s in zip(number, said)]

    def look(step: int) -> None:
        body = trainer.accelerator.unwrap_model(trainer.model) if trainer else model
        share = accuracy(
            body, tokenizer, _asked(task_env, tokenizer, chat), count=run.checked,
            tokens=run.tokens, instruct=instruct,
        )  # fmt: skip
        pace.append([step, share])

    class Look(TrainerCallback):
        """Accuracy on new tasks while it trains."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if run.check_every and state.global_step % run.check_every == 0 < run.steps:
                look(state.global_step)

    trainer: Any = None
    peft_config = None
    if run.lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=run.lora, target_modules="all-linear", task_type="CAUSAL_LM")
    cpu = model.device.type == "cpu"
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        settings = GRPOConfig(
            output_dir=scratch, max_steps=run.steps, per_device_train_batch_size=run.batch,
            num_generations=run.generations, gradient_accumulation_steps=run.accumulate,
            max_completion_length=run.tokens, learning_rate=run.rate, beta=run.kl, seed=run.seed,
            lr_scheduler_type="constant", use_cpu=cpu, bf16=False, report_to=[], logging_steps=1,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
            loss_type="grpo", use_vllm=run.vllm,
        )  # fmt: skip
        look(0)
        trainer = make(
            model=model, reward_funcs=reward, args=settings, train_dataset=data,
            processing_class=tokenizer, peft_config=peft_config, callbacks=[Look()],
            credit=credit, signs=run.signs,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # the command shows what it found
        began = time.perf_counter()
        trainer.train()
        spent = time.perf_counter() - began
        if pace[-1][0] != run.steps:
            look(run.steps)
        if save is not None:
            trainer.save_model(str(save))
            tokenizer.save_pretrained(save)
    history = [e for e in trainer.state.log_history if "reward" in e]
    cost = sum(e.get("credit/seconds", 0.0) for e in history)
    weights = [e["credit/mean"] for e in history if "credit/mean" in e]
    return {
        "settings": {**asdict(run), "credit": credit.settings()},
        "accuracy": pace,
        "reward": [round(float(e["reward"]), 5) for e in history],
        "loss": [round(float(e["loss"]), 6) for e in history if "loss" in e],
        "mean weight": sum(weights) / max(len(weights), 1),
        "credit share": cost / spent,
        "seconds a step": spent / run.steps,
        "versions": versions(),
    }


def _asked(env: Environment, tokenizer: Any, chat: bool) -> Environment:
    """The environment whose prompts are in the chat template."""
    if not chat:
        return env

    def sample(count: int, seed: int = 0, **more: Any) -> list[Task]:
        return [
            Task(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": t.prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                ),
                t.solution,
                t.goal,
            )
            for t in env.sample(count, seed=seed, **more)
        ]

    return Environment(env.name, sample, env.reward)


def _start(run: Run, env: Environment, loading: Loading) -> tuple[Any, Any]:
    """The model to begin with, and its tokenizer."""
    if run.model == "small":
        tokenizer = letters()
        model = small_model(tokenizer, seed=run.seed).to(pick_device(loading.device))
        teach(model, tokenizer, env, steps=run.taught, seed=run.seed)
        return model, tokenizer
    model, tokenizer = loading.load(run.model)
    if tokenizer is None:
        raise InputError(f"{run.model} carries no tokenizer: save it beside the weights")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
