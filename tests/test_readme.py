"""The README's Python runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.real
def test_quick_start(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("README.md")
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(compile(block, "README.md", "exec"), names)
    assert names["seen"]["entropy"][11].shape[:2] == (1, 9)
    assert (tmp_path / "attention.html").stat().st_size > 100_000


def test_guide(tmp_path: Path) -> None:
    """The blocks of the guide, on tiny models."""
    import regard
    from regard.core import Mask, attend
    from regard.zoo.scenes import scene
    from regard.zoo.tiny import inputs, tiny

    from .models import deep, word_tokenizer

    settings, rows, parts, steering, guided, pictures, algebra = blocks("docs/guide.md")
    model = tiny("llama")
    ids = torch.randint(3, 100, (1, 190), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"regard": regard, "model": model, "batch": {"input_ids": ids}}
    code = settings.replace("layers=[3, 11], heads=[0, 4]", "layers=[0, 1], heads=[0, 3]")
    with torch.no_grad():
        exec(compile(code.replace('["mass"][11]', '["mass"][1]'), "guide", "exec"), names)
    assert names["seen"]["mass"][1].shape[:2] == (1, 2)

    text = "the cat sat on the mat because it was tired"
    tokenizer = word_tokenizer(text)
    with torch.no_grad(), regard.watch(model, tokenizer=tokenizer) as seen:
        model(tokenizer(text, return_tensors="pt").input_ids)
    exec(compile(rows.replace("[3]", "[1]"), "guide", "exec"), {"seen": seen})

    whisper = tiny("whisper")
    with torch.no_grad(), regard.watch(whisper, ["received"]) as seen:
        whisper(**inputs("whisper", whisper))
    exec(compile(parts, "guide", "exec"), {"regard": regard, "seen": seen, "model": whisper})

    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = {"regard": regard, "model": deep(4, 2.0), "batch": batch}
    code = steering.replace('heads="heads.json"', "heads={2: [0, 3]}")
    code = code.replace("ratio=0.4", "ratio=0.6")  # of two key heads one stays whole
    with torch.no_grad():
        exec(compile(code, "guide", "exec"), names)
    assert names["kept"].nbytes < 0.7 * names["kept"].full_nbytes

    few = {name: x[:, :9] for name, x in batch.items()}
    names = {"expert": tiny("llama"), "base": tiny("llama"), "negatives": [[5, 6, 7]]}
    with torch.no_grad():
        exec(compile(guided, "guide", "exec"), {"regard": regard, "batch": few, **names})

    drawn = Image.fromarray(scene(3).draw(64))
    names = {"regard": regard, "picture": drawn}
    code = pictures.replace("pipe(prompt)", "pipe(prompt, num_inference_steps=2)")
    with torch.no_grad():
        exec(compile(code, "guide", "exec"), names)
    assert names["image"].size == (64, 64) and names["maps"]["circle"].shape[-2:] == (16, 16)
    assert names["drop"].mean_tokens() == 16

    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    names = {"q": q, "k": k, "v": v}
    exec(compile(algebra, "guide", "exec"), names)
    names["gentle"].out.sum().backward()
    assert q.grad is not None
    assert torch.allclose(names["whole"].out, attend(q, k, v, mask=Mask.causal()).out)
