"""CTranslate2 files of Whisper: read with care, mapped name by name; sound from files."""

from __future__ import annotations

import json
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regard import zoo
from regard.errors import InputError
from regard.zoo import audio, whisper
from regard.zoo.entries import Entry, Part

VOCABULARY, WIDTH, LAYERS = 40, 64, 2
TOKENS = {"<|endoftext|>": 30, "<|startoftranscript|>": 31, "<|en|>": 32, "<|translate|>": 33,
          "<|transcribe|>": 34, "<|startofprev|>": 35, "<|notimestamps|>": 36}  # fmt: skip
FACTS = {"suppress_ids": [1, 2], "suppress_ids_begin": [3, 30], "alignment_heads": [[1, 0]]}


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """The arrays of a tiny Whisper, as CTranslate2 names and stacks them."""
    random = np.random.default_rng(seed)

    def noise(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.3).astype(np.float16)

    made: dict[str, np.ndarray] = {}

    def linear(name: str, out: int, inner: int, keys: slice | None = None) -> None:
        made[f"{name}/weight"], made[f"{name}/bias"] = noise(out, inner), noise(out)
        if keys is not None:
            made[f"{name}/bias"][keys] = 0

    def norm(name: str) -> None:
        made[f"{name}/gamma"], made[f"{name}/beta"] = noise(WIDTH), noise(WIDTH)

    for stack in ("encoder", "decoder"):
        made[f"{stack}/num_heads"] = np.array(WIDTH // 64, np.int16)
        made[f"{stack}/activation"] = np.array(3, np.int8)
        norm(f"{stack}/layer_norm")
        for i in range(LAYERS):
            at = f"{stack}/layer_{i}"
            linear(f"{at}/self_attention/linear_0", 3 * WIDTH, WIDTH, slice(WIDTH, 2 * WIDTH))
            linear(f"{at}/self_attention/linear_1", WIDTH, WIDTH)
            norm(f"{at}/self_attention/layer_norm")
            if stack == "decoder":
                linear(f"{at}/attention/linear_0", WIDTH, WIDTH)
                linear(f"{at}/attention/linear_1", 2 * WIDTH, WIDTH, slice(0, WIDTH))
                linear(f"{at}/attention/linear_2", WIDTH, WIDTH)
                norm(f"{at}/attention/layer_norm")
            linear(f"{at}/ffn/linear_0", 4 * WIDTH, WIDTH)
            linear(f"{at}/ffn/linear_1", WIDTH, 4 * WIDTH)
            norm(f"{at}/ffn/layer_norm")
    made["encoder/position_encodings/encodings"] = noise(10, WIDTH)
    made["decoder/position_encodings/encodings"] = noise(12, WIDTH)
    made["encoder/conv1/weight"], made["encoder/conv1/bias"] = noise(WIDTH, 8, 3), noise(WIDTH)
    made["encoder/conv2/weight"], made["encoder/conv2/bias"] = noise(WIDTH, WIDTH, 3), noise(WIDTH)
    made["decoder/embeddings/weight"] = noise(VOCABULARY, WIDTH)
    return made


def packed(arrays: dict[str, np.ndarray], version: int = 6, spec: str = "WhisperSpec") -> bytes:
    """The arrays as bytes of a CTranslate2 file, with the projection as an alias."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    codes = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    parts = [struct.pack("<I", version), string(spec), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        head = struct.pack("<BI", codes[str(array.dtype)], array.nbytes)
        parts += [string(name), shape, head, array.tobytes()]
    parts += [struct.pack("<I", 1), string("decoder/projection/weight")]
    parts += [string("decoder/embeddings/weight")]
    return b"".join(parts)


def test_reads_back_what_was_written() -> None:
    arrays = random_arrays()
    found = whisper.read(packed(arrays))
    assert set(found) == {*arrays, "decoder/projection/weight"}
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert found["decoder/projection/weight"] is found["decoder/embeddings/weight"]


def test_a_damaged_file_is_refused_wherever_it_ends() -> None:
    data = packed(random_arrays())
    random = np.random.default_rng(1)
    for cut in [0, 3, 10, 30, len(data) - 1, *random.integers(0, len(data), 40).tolist()]:
        with pytest.raises(InputError, match="no CTranslate2 file"):
            whisper.read(data[:cut])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (packed({}, version=7), "format version 7"),
        (packed({}, spec="TransformerSpec"), "TransformerSpec"),
        (packed({"decoder/embeddings/weight": np.zeros(3, np.int8)}) + b"\0", "1 bytes follow"),
        (packed({}), "stands for"),
        (b"\x06\0\0\0" + b"\x0c\0WhisperSpec\0" + b"\x03\0\0\0\xff\xff\xff\xff", "middle"),
    ],
)
def test_what_is_no_such_file_says_why(data: bytes, why: str) -> None:
    with pytest.raises(InputError, match=why):
        whisper.read(data)


def test_a_shape_that_lies_is_refused() -> None:
    data = bytearray(packed({"decoder/embeddings/weight": np.zeros((4, 8), np.float16)}))
    at = data.index(struct.pack("<II", 4, 8))
    data[at : at + 4] = struct.pack("<I", 2**31)
    with pytest.raises(InputError, match="is said to be"):
        whisper.read(bytes(data))


def explicit(arrays: dict[str, np.ndarray], model: Any, mels: Any, ids: Any) -> np.ndarray:
    """Logits `[tokens, vocabulary]` from the arrays alone, in float64: Whisper written out."""
    a = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * a[f"{name}/gamma"] + a[f"{name}/beta"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ a[f"{name}/weight"].T + a[f"{name}/bias"]

    def gelu(x: np.ndarray) -> np.ndarray:
        return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
        scores = q @ k.T / np.sqrt(64)  # one head
        if causal:
            scores = np.where(np.tri(*scores.shape, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True) @ v

    def conv(x: np.ndarray, name: str, stride: int) -> np.ndarray:
        return torch.nn.functional.conv1d(
            torch.from_numpy(x)[None], torch.from_numpy(a[f"{name}/weight"]),
            torch.from_numpy(a[f"{name}/bias"]), stride=stride, padding=1,
        )[0].numpy()  # fmt: skip

    def block(x: np.ndarray, name: str, heard: np.ndarray | None, causal: bool) -> np.ndarray:
        y = norm(x, f"{name}/self_attention/layer_norm")
        q, k, v = np.split(linear(y, f"{name}/self_attention/linear_0"), 3, -1)
        x = x + linear(attention(q, k, v, causal), f"{name}/self_attention/linear_1")
        if heard is not None:
            y = norm(x, f"{name}/attention/layer_norm")
            k, v = np.split(linear(heard, f"{name}/attention/linear_1"), 2, -1)
            mixed = attention(linear(y, f"{name}/attention/linear_0"), k, v, False)
            x = x + linear(mixed, f"{name}/attention/linear_2")
        y = gelu(linear(norm(x, f"{name}/ffn/layer_norm"), f"{name}/ffn/linear_0"))
        return x + linear(y, f"{name}/ffn/linear_1")

    x = gelu(conv(gelu(conv(mels, "encoder/conv1", 1)), "encoder/conv2", 2)).T
    x = x + a["encoder/position_encodings/encodings"]
    for i in range(LAYERS):
        x = block(x, f"encoder/layer_{i}", None, False)
    heard = norm(x, "encoder/layer_norm")
    y = a["decoder/embeddings/weight"][ids] + a["decoder/position_encodings/encodings"][: len(ids)]
    for i in range(LAYERS):
        y = block(y, f"decoder/layer_{i}", heard, True)
    return norm(y, "decoder/layer_norm") @ a["decoder/embeddings/weight"].T


def test_the_mapped_model_computes_what_the_arrays_say() -> None:
    arrays = random_arrays()
    model = whisper.build(whisper.read(packed(arrays)), TOKENS, FACTS)
    mels = np.random.default_rng(2).standard_normal((8, 20))
    ids = [31, 32, 5, 9, 7]
    with torch.no_grad():
        got = model(
            input_features=torch.from_numpy(mels)[None].float(),
            decoder_input_ids=torch.tensor([ids]),
        ).logits[0]
    want = explicit(arrays, model, mels, ids)
    assert np.abs(got.numpy() - want).max() < 2e-4 * np.abs(want).max()
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight


def test_config_and_generation_config_follow_the_file() -> None:
    arrays = whisper.read(packed(random_arrays()))
    model = whisper.build(arrays, TOKENS, FACTS)
    config, settings = model.config, model.generation_config
    assert (config.d_model, config.decoder_attention_heads, config.encoder_layers) == (64, 1, 2)
    assert (config.max_source_positions, config.max_target_positions) == (10, 12)
    assert (config.eos_token_id, config.decoder_start_token_id) == (30, 31)
    assert settings.alignment_heads == [[1, 0]] and settings.suppress_tokens == [1, 2]
    assert settings.is_multilingual and settings.task == "transcribe"
    assert settings.lang_to_id == {"<|en|>": 32}
    assert settings.task_to_id == {"transcribe": 34, "translate": 33}
    assert settings.no_timestamps_token_id == 36 and settings.prev_sot_token_id == 35


def test_arrays_that_no_whisper_has_are_refused() -> None:
    arrays = random_arrays()
    with pytest.raises(InputError, match="lacks"):
        whisper.state({k: v for k, v in arrays.items() if "conv2/bias" not in k})
    with pytest.raises(InputError, match="no Whisper has"):
        whisper.state(
            whisper.read(packed({**arrays, "extra/weight": arrays["encoder/conv1/bias"]}))
        )
    keyed = {**arrays}
    name = "encoder/layer_0/self_attention/linear_0/bias"
    keyed[name] = np.ones_like(keyed[name])
    with pytest.raises(InputError, match="bias on its keys"):
        whisper.state(keyed)
    gaps = {k.replace("layer_1/", "layer_2/"): v for k, v in arrays.items()}
    with pytest.raises(InputError, match="gaps"):
        whisper.state(gaps)
    heads = {**arrays, "decoder/num_heads": np.array(2, np.int16)}
    with pytest.raises(InputError, match="2 heads"):
        whisper.config(heads, TOKENS, FACTS)


def test_a_file_in_two_packages_is_joined_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.zoo.cache import sha256
    from regard.zoo.convert import checked_folder

    for name, data in (("part_one", b"first half, "), ("part_two", b"second half")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "model.bin").write_bytes(data)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = Entry(
        name="halves", what="", parameters="", licence="", requirement="halves", module="part_one",
        folder=".", files={"model.bin": sha256(tmp_path / "part_one" / "model.bin")},
        parts=(Part("part_two", {"model.bin": sha256(tmp_path / "part_two" / "model.bin")}),),
    )  # fmt: skip
    package = entry.package
    assert package is not None
    assert b"".join(p.read_bytes() for p in entry.pieces(package)) == b"first half, second half"
    checked_folder(entry, package)
    (tmp_path / "part_two" / "model.bin").write_bytes(b"other half.")
    with pytest.raises(InputError, match="SHA-256"):
        checked_folder(entry, package)
    (tmp_path / "part_two" / "model.bin").unlink()
    assert entry.package is None  # one half alone is not a model


# Sound


def wav(path: Path, samples: np.ndarray, rate: int = 16_000, width: int = 2) -> Path:
    """Write samples `[samples]` or `[samples, channels]` between -1 and 1."""
    samples = samples if samples.ndim == 2 else samples[:, None]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        whole = np.round(samples * (2.0 ** (8 * width - 1) - 1)).astype("<i4")
        if width == 1:
            raw = (whole + 128).astype(np.uint8).tobytes()
        else:
            raw = whole.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
        file.writeframes(raw)
    return path


def tone(seconds: float, rate: int, pitch: float = 440.0) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_of_sample_is_read(tmp_path: Path, width: int) -> None:
    sound = tone(0.1, 16_000)
    got = audio.read(wav(tmp_path / "a.wav", sound, width=width))
    assert got.samples.dtype == np.float32 and got.notes == ()
    assert np.abs(got.samples - sound).max() < 2.0 ** (2 - 8 * min(width, 2))


def test_stereo_is_averaged_and_other_rates_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="scipy is part of the extra 'speech'")
    left, right = tone(0.5, 44_100), tone(0.5, 44_100, 880.0)
    path = wav(tmp_path / "a.wav", np.stack([left, right], 1), rate=44_100)
    got = audio.read(path)
    assert "2 channels" in got.notes[0] and "44,100" in got.notes[1]
    assert got.rate == 16_000 and len(got.samples) == 8_000
    want = (tone(0.5, 16_000) + tone(0.5, 16_000, 880.0)) / 2
    inner = slice(200, -200)  # a filter needs a few samples at the ends
    assert np.abs(got.samples[inner] - want[inner]).max() < 0.01


def test_bad_sound_gets_one_clear_error_each(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("this is not sound at all, only words in a file")
    (tmp_path / "nothing.wav").touch()
    cases = {
        "text.wav": "no audio that can be read|no plain WAV",
        "nothing.wav": "empty file",
        "missing.wav": "there is no file",
        "empty.wav": "0 seconds",
        "silent.wav": "is silent",
        "long.wav": "lasts 31.0 s, and the model hears 30 s",
    }
    wav(tmp_path / "empty.wav", np.zeros(0))
    wav(tmp_path / "silent.wav", np.zeros(1600))
    wav(tmp_path / "long.wav", tone(31, 8_000), rate=8_000)
    for name, why in cases.items():
        with pytest.raises(InputError, match=why):
            audio.read(tmp_path / name)
    with pytest.raises(InputError, match="is a folder"):
        audio.read(tmp_path)
    with pytest.raises(InputError, match="Did you mean 'market'"):
        audio.read("@markt")
    assert audio.read(tmp_path / "long.wav", rate=8_000, limit=None).seconds == 31


def test_decimal_and_flac_files_need_soundfile_and_nan_is_refused(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="part of the extra 'speech'")
    sound = tone(0.2, 16_000)
    soundfile.write(tmp_path / "a.flac", sound, 16_000)
    assert np.abs(audio.read(tmp_path / "a.flac").samples - sound).max() < 1e-3
    soundfile.write(tmp_path / "f.wav", sound, 16_000, subtype="FLOAT")
    assert np.abs(audio.read(tmp_path / "f.wav").samples - sound).max() < 1e-6
    sound[7] = np.nan
    soundfile.write(tmp_path / "n.wav", sound, 16_000, subtype="FLOAT")
    with pytest.raises(InputError, match="not numbers"):
        audio.read(tmp_path / "n.wav")


def test_shipped_clips_are_whole_and_their_times_fit() -> None:
    for name in zoo.clips():
        clip = zoo.clip(name)
        words, times = clip.spoken["words"], np.array(clip.spoken["times"])
        assert clip.rate == 16_000 and 2 < clip.seconds < 4 and clip.spoken["made"]
        assert " ".join(words) == clip.spoken["text"]
        assert times.shape == (len(words), 2) and (np.diff(times.flatten()) >= 0).all()
        assert times[-1, 1] <= clip.seconds
    with pytest.raises(InputError, match="no shipped clip"):
        zoo.clip("nightingale")


# The real models


@pytest.fixture(scope="module", params=["whisper-tiny.en", "whisper-base"])
def real(request: pytest.FixtureRequest) -> Any:
    try:
        return zoo.load(request.param)
    except InputError as problem:
        pytest.skip(str(problem))


@pytest.mark.slow
def test_real_models_hear_the_shipped_clips(real: Any) -> None:
    """The word error rate on synthesised sentences with known text stays below a quarter."""
    from regard.parts.speech.words import word_errors

    model, processor = real
    wrong = total = 0
    for name in zoo.clips():
        clip = zoo.clip(name)
        made = processor(
            clip.samples, sampling_rate=clip.rate, return_tensors="pt", return_attention_mask=True
        )
        text = processor.batch_decode(model.generate(**made), skip_special_tokens=True)[0]
        errors, words = word_errors(clip.spoken["text"], text)
        wrong, total = wrong + errors, total + words
    assert wrong / total < 0.3, f"{wrong} of {total} words"


@pytest.mark.slow
def test_real_checkpoints_are_plain_float16_and_complete(real: Any) -> None:
    model, processor = real
    assert model.dtype == torch.float32 and type(processor).__name__ == "WhisperProcessor"
    assert len(processor.feature_extractor.mel_filters[0]) == model.config.num_mel_bins == 80
    assert model.config.max_source_positions == 1500
    folder = next(
        made for e in zoo.models() if e.name.startswith("whisper")
        for made in [zoo.cache.made_path(e.cache_name)] if made
    )  # fmt: skip
    saved = json.loads((folder / "config.json").read_text())
    assert saved["dtype"] == "float16" and (folder / "model.safetensors").is_file()
    ends = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert ends == model.config.eos_token_id == model.generation_config.eos_token_id
