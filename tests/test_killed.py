"""Long commands that are killed at random moments go on, and end as if they had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here"),
]
# the state of a training is written after every step, and models are tiny where none is shipped
RUN = """
import sys
import pytest
from regard.cli import main
from regard.zoo.train import loop
loop.SAVE = -1.0
if sys.argv[1] == "tiny":
    from tests.cli.command import stand_in
    stand_in(pytest.MonkeyPatch(), 2)
main(sys.argv[2:])
"""
COMMANDS = {
    "zoo train": ["", "zoo train shapes-tower --steps 60 --batch 8 --out OUT"],
    "bench kernels": [
        "",
        "bench kernels --masks causal,full,prefix_lm_causal --lengths 64,96 --kernels attend,naive "
        "--rounds 1 --out OUT.json",
    ],
    "trial vqa": [
        "", "trial vqa --model shapes-vlm --questions 12 --with visiondrop --json OUT.json",
    ],
    "trial perplexity": [
        "tiny",
        "trial perplexity --with h2o,snapkv,random --ratio 0.25,0.5,0.75 --context 64 "
        "--continuation 16 --json OUT.json",
    ],
    "trial ruler": [
        "tiny", "trial ruler --with h2o,random --length 256 --examples 8 --json OUT.json",
    ],
    "build": [
        "",
        "build stable-semantics --model shapes-sd --prompts PROMPTS --steps 2 --parser rules "
        "--out OUT",
    ],
    "reproduce": ["", "reproduce structured-diffusion --quick --out OUT"],
    "train mma": [
        "",
        "train mma --steps 2 --batch 4 --seeds 1 --pool 8 --tower-steps 20 --out OUT.json",
    ],
}  # fmt: skip
TIMES = (
    "seconds", "date", "command", "environment", "throughput", "ms", "loss of", "spent", "setup",
    "first", "time", "peak", "counted", "rounds", "machine", "verdict",
)  # fmt: skip


def start(folder: Path, name: str) -> subprocess.Popen[bytes]:
    kind, words = COMMANDS[name]
    (folder / "prompts.txt").write_text("a red circle\na blue square\n" * 4, "utf-8")
    given = words.replace("OUT", "out").replace("PROMPTS", "prompts.txt").split()
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "HF_HUB_OFFLINE": "1",
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", RUN, kind or "real", *given], cwd=folder, env=env,
        stdout=subprocess.DEVNULL, stderr=(folder / "err.txt").open("ab"),
    )  # fmt: skip


def timeless(value: Any) -> Any:
    """Plain data without what differs from run to run."""
    if isinstance(value, dict):
        kept = {n: v for n, v in value.items() if not any(t in n.lower() for t in TIMES)}
        return {n: timeless(v) for n, v in kept.items()}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def result(folder: Path) -> dict[str, Any]:
    """What lies in a folder in the end: data without times, and weights."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".json":
            found[name] = timeless(json.loads(file.read_text("utf-8")))
        elif file.suffix == ".safetensors":
            found[name] = load_file(file)
        elif file.is_file() and file.suffix in (".parquet", ".png"):
            found[name] = file.read_bytes()
        elif file.is_file() and name not in ("err.txt", "prompts.txt"):
            found[name] = None
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[n], b[n]) for n in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_goes_on(name: str, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    cut.mkdir()
    began = time.monotonic()
    assert start(whole, name).wait() in (0, 1), (whole / "err.txt").read_text("utf-8")[-800:]
    usual = time.monotonic() - began
    draw, kills = random.Random(name), 0
    while kills < 4:
        process = start(cut, name)
        try:  # later each time, so that it gets on
            process.wait(usual * min(0.9, draw.uniform(0.2, 0.6) + 0.1 * kills))
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert start(cut, name).wait() in (0, 1), (cut / "err.txt").read_text("utf-8")[-800:]
    assert kills
    ours, theirs = result(cut), result(whole)
    left = sorted(n for n in ours.keys() - theirs.keys())
    assert all(".part" in n for n in left), left  # of a write that was cut off
    for file in theirs:
        assert same(ours[file], theirs[file]), file
