"""A text dealt out to ranks: the facts of every family equal those of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from regard.core.parallel import RankLost
from regard.errors import InputError

HERE = Path(__file__).parent


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank."""
    source = str(HERE.parents[1] / "src")
    found = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
    }
    if sys.platform == "linux":
        found["GLOO_SOCKET_IFNAME"] = "lo"
    return found


def launch(ranks: int, *command: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    said = [p.communicate(timeout=240) for p in processes]
    return [(p.returncode, *s) for p, s in zip(processes, said)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("ranks") / "results.json"
    ended = launch(2, str(HERE / "ranks.py"), str(path))
    assert all(code == 0 for code, *_ in ended), ended
    return json.loads(path.read_text())


def test_facts_of_every_family_equal_one_process(results: dict[str, Any]) -> None:
    found = {n: x for n, x in results.items() if n != "refused"}
    assert len(found) == 8
    assert max(found.values()) < 1e-4, found


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("encoder-decoder", "has an encoder and a decoder"),
        ("fact", "does not add up over ranks"),
        ("scheme", "Did you mean 'ring'"),
        ("head", "out of range"),
        ("positions", "depend on the length"),
        ("mixing", "mixes tokens outside its attention"),
        ("not finite", "produced NaN or inf"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(results: dict[str, Any], what: str, says: str) -> None:
    assert says in results["refused"][what]


def test_see_writes_one_report_and_the_other_rank_is_silent(tmp_path: Path) -> None:
    import regard

    folder, out = tmp_path / "model", tmp_path / "shared.json"
    regard.zoo.tiny("llama").save_pretrained(folder)
    tokenizer(folder)
    text = "the cat sat on the mat because it was tired and the mat was warm"
    command = ["-m", "regard", "see", text, "--model", str(folder), "--json", str(out)]
    ended = launch(2, *command, "--context-parallel", "2")
    assert [code for code, *_ in ended] == [0, 0], ended
    assert ended[0][1] and not ended[1][1]
    page = json.loads(out.read_text())
    model, words = regard.load(folder)
    with torch.no_grad(), regard.watch(model, facts=["entropy"]) as seen:
        model(**words(text, return_tensors="pt"))
    want = torch.stack([seen["entropy"][n][0] for n in seen["entropy"]]).mean((0, 1))
    assert page["views"]["entropy"]["values"] == pytest.approx(want.tolist(), abs=2e-5)


def test_what_the_user_got_wrong_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.cli.parallel import one_voice

    monkeypatch.setattr("regard.cli.parallel.PATIENCE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError), one_voice():
        raise InputError("wrong")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as silent, one_voice():
        raise InputError("wrong")
    assert silent.value.code == 2
    with pytest.raises(RankLost), one_voice():  # each rank says that it lost another
        raise RankLost("rank 1 of 2: ...")


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("error", [InputError("wrong"), RankLost("rank 1 of 2: ...")])
def test_the_summary_of_torchrun_names_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, error: Exception
) -> None:
    """torchrun reads a file that a failed rank leaves; the lost rank is named by every rank."""
    from regard.cli.parallel import one_voice

    monkeypatch.setattr("regard.cli.parallel.PATIENCE", 0.0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises((InputError, RankLost, SystemExit)), one_voice():
        raise error
    files = list(tmp_path.iterdir())
    if rank == "1" and isinstance(error, InputError):
        assert not files
    else:
        said = json.loads(files[0].read_text())["message"]
        assert said["message"] == said["extraInfo"]["py_callstack"] == f"regard: {error}"
        assert said["extraInfo"]["timestamp"].isdigit()


@pytest.mark.slow
def test_a_rank_needs_a_fraction_of_the_memory(tmp_path: Path) -> None:
    """What one process needs for a wide model at 4k tokens, each of four ranks needs a part of."""
    grown: dict[int, list[float]] = {}
    for ranks in (1, 4):
        ended = launch(ranks, str(HERE / "ranks.py"), "memory")
        assert all(code == 0 for code, *_ in ended), ended
        grown[ranks] = [float(out) for _, out, _ in ended]
    assert grown[1][0] > 200  # MiB, or there would be nothing to share
    assert max(grown[4]) < 0.5 * grown[1][0], grown


def tokenizer(folder: Path) -> None:
    """A word tokenizer beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "cat", "sat", "on", "mat", "because", "it", "was", "tired", "and", "warm"]
    known = {w: n + 3 for n, w in enumerate(words)} | {"<unk>": 0}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(folder)
