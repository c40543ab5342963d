"""Weights are read from safetensors; from a pickle only on request, and then tensors alone."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from regard import zoo
from regard.cli import main
from regard.errors import InputError
from regard.zoo.tiny import tiny


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A checkpoint whose weights are a pickle of tensors."""
    folder, model = tmp_path / "pickled", tiny("llama")
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def test_a_pickle_is_read_on_request_alone(pickled: Path) -> None:
    with pytest.raises(InputError, match=r"pickled \(pytorch_model\.bin\).*--allow-pickle"):
        zoo.load(pickled)
    model, _ = zoo.load(pickled, allow_pickle=True)
    theirs = tiny("llama").state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in model.state_dict().items())


def test_a_pickle_beside_safetensors_is_not_read(pickled: Path, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(pickled)
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    zoo.load(pickled)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("allow", [False, True])
def test_nothing_in_a_pickle_runs(
    allow: bool, pickled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    words = ["check", str(pickled), *(["--allow-pickle"] if allow else [])]
    with pytest.raises(SystemExit) as end:
        main(words)
    err = capsys.readouterr().err
    assert end.value.code == 2 and "pickle" in err and "safetensors" in err
    assert "weights_only" not in err and not (tmp_path / "ran").exists()


def test_pipelines_and_adapters_take_no_pickle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from regard.zoo.expert import load_expert

    with pytest.raises(SystemExit):
        main(["see", "a cat", "--model", "shapes-sd", "--allow-pickle"])
    assert "leave --allow-pickle out" in capsys.readouterr().err
    (tmp_path / "adapter_config.json").write_text("{}", "utf-8")
    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"pickles .* are not read"):
        load_expert(str(tmp_path), load=lambda _: pytest.fail("a model was loaded"))
    assert not (tmp_path / "ran").exists()


def test_every_load_of_weights_says_safetensors() -> None:
    """Of the calls in the source that read weights; tokenizers and configs have none."""
    source = Path(zoo.__file__).parents[1]
    call = re.compile(r"(\w+)\.from_pretrained\(((?:[^()]|\([^()]*\))*)\)", re.S)
    read = 0
    for file in source.rglob("*.py"):
        text = file.read_text("utf-8")
        assert not re.search(r"torch\.load\(|pickle\.load|weights_only=False", text), file
        for name, given in call.findall(text):
            if not re.search(r"Model|Autoencoder|Pipeline|model_class", name) or not given.strip():
                continue
            if "PeftModel" in name or "gguf_file" in given or "**loading" in given:
                continue  # looked at before, no pickle, or put into `loading`
            if "**kwargs" in given:
                assert 'kwargs.setdefault("use_safetensors", True)' in text
            else:
                # the shipped rxnmapper is checked against its hash, and read as tensors
                assert "use_safetensors=" in given, f"{file}: {name}.from_pretrained({given})"
            read += 1
    assert read >= 6
