"""lm-evaluation-harness with methods applied, on a task that needs no download."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.lab.trials import lm_eval as trial
from regard.lab.trials.configurations import read
from regard.zoo.tiny import tiny

from ..cli.command import run

WORDS = [f"w{n}" for n in range(120)]


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer(
        models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, "?": 3}
                         | {w: n + 4 for n, w in enumerate(WORDS)}, unk_token="?")
    )  # fmt: skip
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two tasks of the harness over local files: choices, and answers to generate."""
    pytest.importorskip("lm_eval", reason="lm-eval is the extra regard[lm-eval]")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    lines = [{"q": " ".join(WORDS[(7 * n + k) % 120] for k in range(30)), "a": n % 2}
             for n in range(6)]  # fmt: skip
    data.write_text("\n".join(map(json.dumps, lines)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    shared = (
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        'doc_to_text: "{{q}}"\n'
    )
    (tasks / "choose.yaml").write_text(
        f"task: own_choose\noutput_type: multiple_choice\n{shared}"
        'doc_to_target: "{{a}}"\ndoc_to_choice: ["w5", "w9"]\n'
        "metric_list:\n  - metric: acc\n"
    )
    (tasks / "write.yaml").write_text(
        f"task: own_write\noutput_type: generate_until\n{shared}"
        'doc_to_target: "w5"\ngeneration_kwargs:\n  until: ["</s>"]\n  max_gen_toks: 3\n'
        "metric_list:\n  - metric: exact_match\n"
    )
    return tasks


@pytest.mark.slow
def test_a_local_task(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("llama"), _tokenizer()
    monkeypatch.setattr("regard.zoo.load", lambda name, **_: (model, tokenizer))
    before = [p.clone() for p in model.parameters()]
    out = folder.parent / "out.json"
    code, shown, err = run(
        capsys, "trial", "lm-eval", "--tasks", "own_choose,own_write", "--include", str(folder),
        "--with", "act:beta=1,snapkv:window=4,act:skip_layers=0/0,threshold=0.05,beta=0",
        "--json", str(out),
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out.read_text())
    scores = found["scores"]
    assert list(scores)[:2] == ["full", "act:beta=1"] and scores["full"] == scores["act:beta=1"]
    assert scores["full"]["own_choose"]["acc,none"] == _by_hand(model, tokenizer, folder.parent)
    assert "own_write" in scores["snapkv:window=4@0.25"] and "own_choose" in shown
    assert scores["snapkv:window=4@0.25"]["own_choose"] == scores["full"]["own_choose"]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def _by_hand(model: Any, tokenizer: Any, folder: Path) -> float:
    lines = [json.loads(x) for x in (folder / "data.jsonl").read_text().splitlines()]
    right = 0
    for line in lines:
        with torch.no_grad():
            logits = model(**tokenizer(line["q"], return_tensors="pt")).logits[0, -1]
        a, b = (tokenizer(w)["input_ids"][-1] for w in ("w5", "w9"))
        right += int(logits[b] > logits[a]) == line["a"]
    return right / len(lines)


@pytest.mark.slow
def test_mistakes(folder: Path) -> None:
    with pytest.raises(InputError, match=r"no task 'own_chose'\. Did you mean 'own_choose'"):
        trial.tasks(["own_chose"], folder)
    with pytest.raises(InputError, match="no folder"):
        trial.tasks(["own_choose"], folder / "none")
    with pytest.raises(InputError, match="name at least one"):
        trial.tasks([" "])
    with pytest.raises(InputError, match="recycled-attention:budget=256"):
        trial.check(tiny("llama"), read("recycled-attention", ratios=[0.5]))
    trial.check(tiny("llama"), read("h2o,act", ratios=[0.5]))


def test_without_the_package(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = run(capsys, "trial", "lm-eval", "--tasks", "arc_easy")
    assert code == 2 and "pip install 'regard[lm-eval]'" in err
    assert len(err.strip().splitlines()) == 1
