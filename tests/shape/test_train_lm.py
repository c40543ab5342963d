"""`regard train lm`: a queue that goes on, errors before it begins, and NaN that stops it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.errors import InputError
from regard.parts.training import lm
from regard.parts.training.data import Switches, blocks, recalls, texts, tokenizer
from regard.parts.training.settings import Training, Variant
from regard.shape.deconstructed_attention import command, compare

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the quick brown fox jumps over the lazy dog and so on. " * 120


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def nano(text: Path, **changes: Any) -> Training:
    settings: dict[str, Any] = {
        "size": "nano", "data": str(text), "context": 64, "steps": 6, "batch": 4, "warmup": 1,
        "measure_every": 3, "save_every": 2, "checked": 2, "device": "cpu",
    }  # fmt: skip
    return Training(**(settings | changes))


def test_a_run_is_trained_measured_saved_and_loaded(text: Path, tmp_path: Path) -> None:
    queue = command.variants("standard,mlp", "even", 1)
    assert [v.name for v in queue] == ["standard-seed0", "mlp-keep-even-seed0"]
    results = command.run(tmp_path / "runs", nano(text), queue)
    folder = tmp_path / "runs" / "mlp-keep-even-seed0"
    assert sorted(f.name for f in folder.iterdir()) == ["checkpoint", "curve.jsonl", "run.json"]
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert [line["step"] for line in lm.read_lines(folder / "curve.jsonl")] == [0, 3, 6]
    final = results["mlp-keep-even-seed0"]["final"]
    assert final["loss"] < lm.read_lines(folder / "curve.jsonl")[0]["loss"]
    assert final["skip_loss"] != final["loss"] and 0 <= final["recall"] <= 1
    import regard

    model, tokens = regard.load(folder / "checkpoint")
    assert model.config.mixers == ["mlp", "standard"] and tokens("the")["input_ids"]
    # in a process of its own, by name
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from regard.parts import mixers\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder / 'checkpoint')!r})\n"
        f"tokens = AutoTokenizer.from_pretrained({str(folder / 'checkpoint')!r})\n"
        "out = model.generate(**tokens('the', return_tensors='pt'), max_new_tokens=3)\n"
        "print(model.config.mixers, tokens.decode(out[0])[:3])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.stdout.strip() == "['mlp', 'standard'] the", done.stderr


def test_a_stopped_queue_goes_on_within_a_run(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second run after a checkpoint: the first is not trained again, and the second
    ends with the weights of a run that was never stopped.
    """
    queue = command.variants("standard,non_approximate", "none", 1)
    whole = command.run(tmp_path / "whole", nano(text), queue)
    from regard.parts.training import measure

    plain, calls = measure.curve, []

    def stopping(model: Any, settings: Training, data: Any) -> dict[str, Any]:
        calls.append(model.config.mixers[0])
        if len(calls) == 7:  # the end of the second run
            raise KeyboardInterrupt
        return plain(model, settings, data)

    monkeypatch.setattr(measure, "curve", stopping)
    with pytest.raises(KeyboardInterrupt):
        command.run(tmp_path / "runs", nano(text), queue)
    state = tmp_path / "runs" / "non_approximate-seed0" / "state"
    assert (state / "checkpoint-4").is_dir()
    monkeypatch.setattr(measure, "curve", plain)
    trained = []
    monkeypatch.setattr(
        lm, "built", lambda s, v, d, f=lm.built: (trained.append(v.mixer), f(s, v, d))[1]
    )
    again = command.run(tmp_path / "runs", nano(text), queue)
    assert trained == ["non_approximate"] and not state.exists()
    assert again["non_approximate-seed0"]["resumed"]
    for name in whole:
        assert again[name]["final"]["loss"] == pytest.approx(whole[name]["final"]["loss"], abs=1e-5)
        steps = [x["step"] for x in lm.read_lines(tmp_path / "runs" / name / "curve.jsonl")]
        assert steps == [0, 3, 6]


@pytest.mark.slow
def test_a_killed_process_is_taken_up(text: Path, tmp_path: Path) -> None:
    arguments = (
        f"train lm --size nano --mixer standard --seeds 2 --data {text} --context 64 --steps 400 "
        f"--batch 4 --measure-every 50 --save-every 10 --checked 2 --device cpu --out "
        f"{tmp_path / 'runs'}"
    )
    call = [sys.executable, "-m", "regard", *arguments.split()]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(call, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "runs" / "standard-seed0" / "state"
    for _ in range(600):
        if list(state.glob("checkpoint-*")):
            break
        time.sleep(0.1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(call, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    runs = compare.read([tmp_path / "runs"])
    assert [r["steps"] for r in runs] == [400, 400] and runs[0]["resumed"]


def test_telemetry_is_written_where_there_is_softmax_attention(text: Path, tmp_path: Path) -> None:
    queue = command.variants("standard,sigmoid_no_norm", "none", 1)
    command.run(tmp_path / "runs", nano(text, telemetry=3), queue)
    lines = lm.read_lines(tmp_path / "runs" / "standard-seed0" / "telemetry.jsonl")
    assert [line["step"] for line in lines] == [3, 6]
    assert not (tmp_path / "runs" / "sigmoid_no_norm-seed0" / "telemetry.jsonl").exists()


def test_half_a_checkpoint_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    for n in (2, 10):
        (tmp_path / f"checkpoint-{n}").mkdir()
    assert lm._last_checkpoint(tmp_path) is None
    for n, words in ((4, "{}"), (12, "{")):
        (tmp_path / f"checkpoint-{n}").mkdir()
        (tmp_path / f"checkpoint-{n}" / "trainer_state.json").write_text(words)
    assert lm._last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-4"]


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.parts.mixers import MixerForCausalLM

    plain, calls = MixerForCausalLM.forward, []

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        if self.training:
            calls.append(1)
            if len(calls) == 4:
                out.loss = out.loss * torch.nan
        return out

    monkeypatch.setattr(MixerForCausalLM, "forward", forward)
    with pytest.raises(lm.Diverged, match=r"loss of step 4 is nan.*checkpoint-2"):
        command.run(tmp_path / "runs", nano(text), [Variant("standard")])
    kept = tmp_path / "runs" / "standard-seed0" / "state" / "checkpoint-2"
    assert (kept / "model.safetensors").is_file()
    assert not (tmp_path / "runs" / "standard-seed0" / "checkpoint").exists()


# -- refused before any training -----------------------------------------------------------------
def refused(text: Path, out: Path, message: str, queue: Any = None, **changes: Any) -> None:
    with pytest.raises(InputError, match=message):
        command.run(out, nano(text, **changes), queue or [Variant("standard")])


def test_what_cannot_be_trained_is_refused_before_it_begins(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    refused(text, out, "tokens, and training needs", batch=4000)
    refused(text, out, "no file or folder", data="nowhere.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    refused(text, out, "no text in", data=str(tmp_path / "empty.txt"))
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    refused(text, out, "not UTF-8", data=str(tmp_path / "bytes.txt"))
    refused(text, out, "leaves nothing of a block", fixed_token=64)
    refused(text, out, "cannot have a window", [Variant("non_approximate")], window=8)
    refused(text, out, "keeps none", [Variant("mlp", "quarter")])
    assert not out.exists()
    with pytest.raises(InputError, match="Did you mean 'non_approximate'"):
        command.variants("non_aproximate", "none", 1)
    with pytest.raises(InputError, match="unknown placement"):
        command.variants("mlp", "evn", 1)
    with pytest.raises(InputError, match="lr is a number above 0"):
        nano(text, lr=0.0)


def test_a_folder_of_other_settings_or_in_use_is_refused(text: Path, tmp_path: Path) -> None:
    from regard.lab.journal import Journal

    out = tmp_path / "runs"
    command.run(out, nano(text), [Variant("standard")])
    refused(text, out, "holds runs with lr 0.001, not 0.002", lr=0.002)
    key = {"kind": "lm", **nano(text).settings()}
    key.pop("device")
    with Journal(out / "queue.json", key):
        refused(text, out, "another run")


def test_a_checkpoint_of_another_layout_is_refused(text: Path, tmp_path: Path) -> None:
    settings, folder = nano(text), tmp_path / "run"
    data = lm.prepared(settings)
    model = lm.built(settings, Variant("mlp"), data)
    model.save_pretrained(folder / "state" / "checkpoint-2")
    # without it the checkpoint is half written, and is not gone on from
    (folder / "state" / "checkpoint-2" / "trainer_state.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="is of another model"):
        lm.train(folder, settings, Variant("standard"), data, progress=False)


# -- data ----------------------------------------------------------------------------------------
def test_default_data_is_there_on_every_machine() -> None:
    assert len(texts("novel,python")) > 50


def test_blocks_hold_the_text_once(text: Path) -> None:
    data = blocks(str(text), 64)
    whole = torch.cat([data.train, data.valid]).numel()
    assert 0 <= len(WORDS) - whole < 64 and len(data.valid) == max(1, whole // 64 // 20)
    assert data.tokenizer.decode(data.train[0])[:9] == "the quick"
    assert len(blocks(str(text), 64, limit=640).train) == 9
    merged = blocks(str(text), 64, vocabulary=300)
    assert len(merged.train) < len(data.train) and merged.tokenizer.vocab_size <= 300


def test_a_recall_block_can_be_known_from_its_first_pairs() -> None:
    ids, answers = recalls(tokenizer([], 258), 3, 64, seed=0)
    for row, known in zip(ids.tolist(), answers.tolist()):
        seen: dict[int, int] = {}
        for at in range(0, 64, 2):
            if at >= 16:
                assert known[at + 1] and seen[row[at]] == row[at + 1]
            seen[row[at]] = row[at + 1]
    assert not answers[:, :16].any()


def test_switches_fix_and_shuffle_tokens() -> None:
    tokens = tokenizer([], 258)
    ids = torch.full((5, 10), 7)
    rng = torch.Generator().manual_seed(0)
    switched = Switches(fixed=2, random=(0, 4))(ids, tokens, rng)
    assert (switched[:, 1] == tokens.bos_token_id).all() and (switched[:, 4:] == 7).all()
    assert (switched[:, [0, 2, 3]] != 7).float().mean() > 0.8 and (ids == 7).all()


# -- the page ------------------------------------------------------------------------------------
def test_runs_are_compared_with_intervals(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    queue = command.variants("standard,k_bias", "none", 2)
    command.run(out, nano(text, steps=3, fixed_token=2), queue)
    runs = compare.read([out])
    numbers = command.numbers(runs)
    assert numbers["standard"]["seeds"] == 2 and "star" not in numbers["standard"]
    assert numbers["k_bias"]["star"]["low"] <= numbers["k_bias"]["star"]["high"]
    html = compare.page(runs, command.numbers(runs)).html()
    assert "Sink of the learned key" in html and "validation loss" in html and "<svg" in html
    assert len(compare.read([out / "standard-seed0", out / "k_bias-seed1"])) == 2
    with pytest.raises(InputError, match="no run of"):
        compare.read([tmp_path])
    shutil.rmtree(out / "standard-seed0")
    assert json.loads((out / "k_bias-seed0" / "run.json").read_text())["arm"] == "k_bias"


def test_more_variants_than_colours_are_still_compared() -> None:
    runs = [
        {"arm": f"m{n}", "settings": {"lr": 1}, "curve": [{"step": 0, "loss": 1.0}],
         "final": {"loss": 1.0, "by_context": [1.0] * 4}}
        for n in range(compare.MOST + 2)
    ]  # fmt: skip
    assert f"first {compare.MOST} of" in compare.page(runs, command.numbers(runs)).html()
