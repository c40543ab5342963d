"""A small causal model that reads letters, made and taught here: trainings in minutes on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .environments import Environment

LETTERS = '\n abcdefghijklmnopqrstuvwxyz0123456789+-*/=():,.?"'
PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"


def letters() -> Any:
    """A tokenizer of single characters.

    >>> letters()("3+4")["input_ids"]
    [34, 41, 35]
    """
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    words = {w: n for n, w in enumerate([PAD, END, UNKNOWN, *LETTERS])}
    made = Tokenizer(WordLevel(words, unk_token=UNKNOWN))
    made.normalizer = Lowercase()
    made.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
        padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def small_model(
    tokenizer: Any, *, layers: int = 4, width: int = 128, heads: int = 4, seed: int = 0
) -> Any:
    """A Llama of random weights for such a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def teach(
    model: Any,
    tokenizer: Any,
    env: Environment,
    *,
    steps: int,
    batch: int = 64,
    rate: float = 2e-3,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Supervised training on worked solutions; the loss by step. Only solutions are learnt."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    warm = max(1, steps // 20)
    plan = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 1 - 0.9 * n / max(steps, 1))
    )
    losses = []
    model.train()
    for step in range(steps):
        tasks = env.sample(batch, seed=10_000_019 * (seed + 1) + step)
        given = packed(tokenizer, [(t.prompt, t.solution) for t in tasks], model.device)
        loss = model(**given).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        plan.step()
        losses.append(float(loss.detach()))
        if report is not None:
            report(step, losses[-1])
    model.eval()
    return losses


def packed(tokenizer: Any, pairs: Sequence[tuple[str, str]], device: Any = None) -> dict[str, Any]:
    """Prompts with their solutions as a padded batch; labels on solutions and their end alone."""
    rows = []
    for prompt, solution in pairs:
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(solution, add_special_tokens=False)["input_ids"]
        rows.append((before, [*after, tokenizer.eos_token_id]))
    width = max(len(a) + len(b) for a, b in rows)
    pad = tokenizer.pad_token_id
    ids, labels, live = [], [], []
    for a, b in rows:
        rest = width - len(a) - len(b)
        ids.append([*a, *b, *[pad] * rest])
        labels.append([*[-100] * len(a), *b, *[-100] * rest])
        live.append([1] * (width - rest) + [0] * rest)
    made = {"input_ids": ids, "labels": labels, "attention_mask": live}
    return {n: torch.tensor(x, device=device) for n, x in made.items()}


@torch.no_grad()
def accuracy(
    model: Any, tokenizer: Any, env: Environment, *, count: int = 256, seed: int = 7,
    tokens: int = 64, instruct: bool = False, batch: int = 64,
) -> float:  # fmt: skip
    """Share of new tasks whose greedy answer earns the whole reward."""
    right = 0.0
    was = model.training
    model.eval()
    tasks = env.sample(count, seed=seed, instruct=instruct)
    for start in range(0, count, batch):
        some = tasks[start : start + batch]
        given = tokenizer(
            [t.prompt for t in some], return_tensors="pt", padding=True, padding_side="left",
            return_token_type_ids=False,
        ).to(model.device)  # fmt: skip
        out = model.generate(
            **given, max_new_tokens=tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        said = tokenizer.batch_decode(
            out[:, given["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(env.reward(t, s) == 1.0 for t, s in zip(some, said))
    model.train(was)
    return right / count
