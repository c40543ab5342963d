"""A small domain expert: SmolLM2 with a LoRA adapter that writes sentences like Jane Austen's.

`python -m regard.zoo.expert FOLDER` trains it again; the one that is shipped is named "austen".

>>> prompt("Write a sentence.", "Sentence")
'### Instruction: Write a sentence.\\n### Sentence:'
>>> real, held_out = sentences()
>>> len(set(real) & set(held_out))
0
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regard.errors import InputError, nearest
from regard.zoo.loading import load
from regard.zoo.passages import text

TEXT, BASE, HUB = "northanger-abbey", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"
ASK, FIELD = "Write one sentence of a novel.", "Sentence"
WORDS = (6, 24)
STEPS, BATCH, RATE, SEED, LONGEST = 140, 8, 1e-3, 0, 48
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
_SENTENCE = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)\s+(?=[\"A-Z])")


def prompt(ask: str = ASK, field: str = FIELD) -> str:
    """The form of the paper's task prompts."""
    return f"### Instruction: {ask}\n### {field}:"


def sentences() -> tuple[list[str], list[str]]:
    """Sentences of the shipped novel, 6 to 24 words: those to train on, and every tenth held out.

    Sentences with quotation marks are left out, because the marks seldom close within one.
    """
    found: dict[str, None] = {}
    for paragraph in text(TEXT).splitlines():
        for piece in _SENTENCE.split(paragraph.strip()):
            count = len(piece.split())
            if WORDS[0] <= count <= WORDS[1] and piece[-1] in ".!?" and '"' not in piece:
                found[piece] = None
    every = list(found)
    return [s for n, s in enumerate(every) if n % 10], every[::10]


def adapters() -> list[str]:
    """The shipped experts.

    >>> adapters()
    ['austen']
    """
    folder = Path(__file__).parent / "adapters"
    return sorted(f.parent.name for f in folder.glob("*/adapter_config.json"))


def adapter(name: str) -> Path:
    """The folder of an expert: a shipped one by name, or a PEFT adapter of the user's own."""
    given = Path(name).expanduser()
    if (given / "adapter_config.json").is_file():
        return given
    if name in adapters():
        return Path(__file__).parent / "adapters" / name
    if given.is_dir():
        raise InputError(f"{name} holds no adapter_config.json: name the folder of a PEFT adapter")
    raise InputError(
        f"there is no adapter {name!r}.{nearest(name, adapters())} "
        "`python -m regard.zoo.expert FOLDER` trains one"
    )


def load_expert(
    name: str, base: str = BASE, load: Callable[[str], tuple[Any, Any]] = load
) -> tuple[Any, Any]:
    """The base model with the adapter on it, in evaluation mode, and the tokenizer."""
    folder = adapter(name)
    peft = _peft()
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"the adapter {name} has no adapter_model.safetensors: save it again with peft, whose "
            "pickles (.bin) are not read"
        )
    model, tokenizer = load(base)
    try:
        expert = peft.PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError) as problem:
        said = str(problem).strip().splitlines()[0]
        raise InputError(f"the adapter {name} does not fit {base}: {said}") from None
    return expert.eval(), tokenizer


def train(folder: Path, *, steps: int = STEPS, base: str = BASE, show: bool = True) -> Path:
    """Train the expert and write the adapter (float16 safetensors) with its card, whole or not."""
    import torch

    if folder.exists():
        raise InputError(f"{folder} is there already: name a new folder, or remove it")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"the folder {folder.absolute().parent} does not exist: make it first")
    peft = _peft()
    torch.manual_seed(SEED)
    model, tokenizer = load(base)
    own, held_out = sentences()
    expert = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **LORA))
    before = loss(expert, tokenizer, held_out)
    weights = [p for p in expert.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.001)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, max(0.05, (steps - n) / (steps - warm + 1)))
    )
    expert.train()
    draw = random.Random(SEED)
    started = time.perf_counter()
    for step in range(steps):
        found = _loss(expert, tokenizer, draw.sample(own, BATCH)).mean()
        found.backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.3)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if show and (step < 3 or step % 10 == 9):
            spent = time.perf_counter() - started
            print(f"step {step + 1} of {steps}, loss {found.item():.3f}, {spent:.0f} s", flush=True)
    facts = {
        "steps": steps,
        "sentences": len(own),
        "held_out": len(held_out),
        "loss_before": round(before, 4),
        "loss_after": round(loss(expert.eval(), tokenizer, held_out), 4),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    expert.peft_config["default"].base_model_name_or_path = HUB if base == BASE else base
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        expert.half().save_pretrained(part)
        (part / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(_card(facts), encoding="utf-8")
        part.chmod(0o755)
        for file in part.iterdir():
            file.chmod(0o644)  # safetensors writes files for its user alone
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def loss(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Mean cross-entropy per token (nats) of sentences after the task prompt."""
    import torch

    with torch.no_grad():
        parts = [_loss(model, tokenizer, texts[n : n + 32]) for n in range(0, len(texts), 32)]
    return float(torch.cat(parts).mean())


def _loss(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """Cross-entropy of every token of the sentences and of the end token after each."""
    import torch

    head = tokenizer(prompt()).input_ids
    rows = [tokenizer(" " + t).input_ids[: LONGEST - len(head)] for t in texts]
    rows = [head + row + [tokenizer.eos_token_id] for row in rows]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids)
    for n, row in enumerate(rows):
        ids[n, : len(row)], real[n, : len(row)] = torch.tensor(row), 1
    wanted = real[:, 1:].bool()
    wanted[:, : len(head) - 1] = False
    logits = model(input_ids=ids, attention_mask=real).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits[wanted].float(), ids[:, 1:][wanted], reduction="none"
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("adapters need peft: pip install 'regard[steer]'") from None
    return peft


def _card(facts: dict[str, Any]) -> str:
    return f"""# A LoRA expert that writes sentences of a novel

- Base: {HUB} (Apache-2.0), all weights frozen, as `regard.load("{BASE}")` gives it.
- Data: {facts["sentences"]} sentences of Jane Austen's *Northanger Abbey* (public domain, shipped
  with regard), {WORDS[0]} to {WORDS[1]} words, without quotation marks; {facts["held_out"]} more
  held out.
- Task prompt: `{prompt()!r}`.
- Training: {facts["steps"]} steps of {BATCH} sentences, AdamW, rate {RATE}, LoRA of rank
  {LORA["r"]} on the four attention projections; {facts["minutes"]} minutes on two CPU cores.
- Loss per token on the held-out sentences: {facts["loss_before"]:.3f} before,
  {facts["loss_after"]:.3f} after.
- Made by `python -m regard.zoo.expert FOLDER`. Licence of the adapter: Apache-2.0.
- For experiments with guidance; it writes in the manner of 1803, and knows nothing else.
"""


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m regard.zoo.expert FOLDER")
    try:
        print(train(Path(sys.argv[1])))
    except InputError as problem:
        sys.exit(str(problem))
