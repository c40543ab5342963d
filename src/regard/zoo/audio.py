"""Sound from a file or from the shipped clips, as the mono samples that a speech model takes.

WAV files of whole numbers are read with the standard library; other formats need `soundfile`, and
other sampling rates `scipy`: both come with `pip install 'regard[speech]'`.
"""

from __future__ import annotations

import json
import math
import wave
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regard.errors import InputError, nearest

if TYPE_CHECKING:
    import numpy as np

RATE = 16_000  # samples a second, of every speech model of transformers so far
LIMIT = 30.0  # seconds that Whisper hears at once
QUIET = 1e-4  # of full scale: below this there is nothing but the noise of a converter
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".oga", ".opus", ".aif", ".aiff", ".w64", ".au")


@dataclass(frozen=True)
class Audio:
    """One clip: `samples` float32 `[samples]` between -1 and 1, `rate` a second, where it is from.

    `notes` says what was done to it (mixed down, resampled); `spoken` is what is known about a
    shipped clip: its text, how it was made, and its word times where the synthesiser tells them.
    """

    samples: np.ndarray
    rate: int
    name: str
    notes: tuple[str, ...] = ()
    spoken: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Its length in seconds."""
        return len(self.samples) / self.rate


def sounds(path: Path, start: bytes) -> bool:
    """Whether a file that begins with these bytes holds sound, by what it contains.

    >>> sounds(Path("talk"), b"RIFF____WAVEfmt "), sounds(Path("talk.wav"), b"words")
    (True, False)
    >>> sounds(Path("photo"), b"\\x89PNG\\r\\n\\x1a\\n\\0\\0\\0\\x0d")
    False
    """
    marks = (b"fLaC", b"OggS", b"ID3", b".snd", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2", b"riff")
    forms = {b"RIFF": b"WAVE", b"FORM": b"AIF", b"RF64": b"WAVE"}
    form = forms.get(start[:4])
    if start.startswith(marks) or (form is not None and start[8:12].startswith(form)):
        return True
    # containers of phones (.m4a): read where soundfile can, refused with a remedy where not
    return start[4:11] in (b"ftypM4A", b"ftypm4a") or start[4:12] == b"ftyp3gp4"


def clips() -> list[str]:
    """Return the names of the shipped clips.

    >>> clips()
    ['lighthouse', 'market', 'minutes']
    """
    return sorted(_catalogue())


def clip(name: str) -> Audio:
    """Return a shipped clip by name, with its text; InputError for a name not in `clips()`.

    >>> clip("minutes").spoken["text"][:11]
    'The meeting'
    """
    known = _catalogue()
    if name not in known:
        raise InputError(f"There is no shipped clip {name!r}.{nearest(name, known)}")
    place = resources.files("regard.zoo") / "speech" / f"{name}.wav"
    with resources.as_file(place) as path:
        samples, rate, _ = _read_wav(path)
    return Audio(samples[:, 0], rate, f"@{name}", (), known[name])


def read(given: str | Path, *, rate: int = RATE, limit: float | None = LIMIT) -> Audio:
    """Return the clip in a file, or a shipped one by `@name`, as mono samples at `rate`.

    Several channels are averaged and other sampling rates are converted; `notes` says so.

    Raises:
        InputError: no such file, not audio, empty, silent, samples that are no numbers, or longer
            than `limit` seconds (None: any length).
    """

    name = str(given)
    path = Path(name.removeprefix("@")).expanduser()
    if name.startswith("@") and not path.exists():
        return _checked(clip(name[1:]), limit)
    if not path.exists():
        shipped = ", ".join(f"@{known}" for known in clips())
        raise InputError(f"there is no file {name!r}; the shipped clips are {shipped}")
    if path.is_dir():
        raise InputError(f"{name} is a folder: name an audio file in it")
    if path.stat().st_size == 0:
        raise InputError(f"{name} is an empty file: name an audio file")
    samples, found, why = _read_wav(path)
    if why:
        samples, found = _read_other(path, why)
    notes = []
    if samples.shape[1] > 1:
        notes.append(f"{samples.shape[1]} channels were averaged to one")
    mono = samples.mean(1)
    _check_samples(mono, name, found, limit)
    if found != rate:
        mono = _resampled(mono, found, rate)
        notes.append(f"resampled from {found:,} to {rate:,} samples a second")
    return Audio(mono.astype("float32", order="C"), rate, path.name, tuple(notes))


def _checked(audio: Audio, limit: float | None) -> Audio:
    _check_samples(audio.samples, audio.name, audio.rate, limit)
    return audio


def _check_samples(mono: np.ndarray, name: str, rate: int, limit: float | None) -> None:
    """Refuse what holds no sound or too much of it."""
    import numpy as np

    if not len(mono):
        raise InputError(f"{name} holds no sound (0 seconds): name a longer clip")
    if not np.isfinite(mono).all():
        raise InputError(f"{name} holds samples that are not numbers (NaN or inf): export it again")
    if float(np.abs(mono).max()) < QUIET:
        raise InputError(f"{name} is silent: record it again, or name another clip")
    seconds = len(mono) / rate
    if limit is not None and seconds > limit:
        raise InputError(
            f"{name} lasts {seconds:.1f} s, and the model hears {limit:.0f} s at once: cut it into "
            f"pieces, for example with ffmpeg -i {name} -t {limit:.0f} first.wav"
        )


def _read_wav(path: Path) -> tuple[np.ndarray, int, str]:
    """Return samples `[samples, channels]` and the rate of a WAV file of whole numbers, or why
    another reader has to take it."""
    import numpy as np

    nothing = np.zeros((0, 1), np.float32)
    try:
        with wave.open(str(path), "rb") as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            rate, raw = file.getframerate(), file.readframes(file.getnframes())
    except (wave.Error, EOFError) as problem:
        return nothing, 0, str(problem) or "it is cut short"
    except OSError as problem:
        raise InputError(f"{path} cannot be read: {problem.strerror}") from problem
    if not rate or not channels or width not in (1, 2, 3, 4):
        return nothing, 0, f"{8 * width} bits a sample"
    usable = len(raw) // (width * channels) * width * channels
    data = np.frombuffer(raw[:usable], np.uint8).reshape(-1, width)
    if width == 1:  # the only unsigned one
        values = data[:, 0].astype(np.float32) - 128.0
    else:
        wide = np.zeros((len(data), 4), np.uint8)
        wide[:, 4 - width :] = data  # as the high bytes of 32: the sign comes along
        values = wide.view("<i4")[:, 0].astype(np.float32) / 2.0 ** (32 - 8 * width)
    return (values / 2.0 ** (8 * width - 1)).reshape(-1, channels), rate, ""


def _read_other(path: Path, why: str) -> tuple[np.ndarray, int]:
    """Return samples `[samples, channels]` and the rate of whatever `soundfile` can read."""
    try:
        import soundfile
    except ImportError:
        raise InputError(
            f"{path} is no plain WAV file ({why}): convert it, or pip install 'regard[speech]' for "
            "FLAC, Ogg, MP3 and WAV of decimal numbers"
        ) from None
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError):
        raise InputError(
            f"{path} is no audio that can be read: name a WAV, FLAC, Ogg or MP3 file"
        ) from None
    return samples, int(rate)


def _resampled(mono: np.ndarray, old: int, new: int) -> np.ndarray:
    import numpy as np

    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise InputError(
            f"the clip has {old:,} samples a second and the model wants {new:,}: convert it, or "
            "pip install 'regard[speech]'"
        ) from None
    shared = math.gcd(old, new)
    return np.asarray(resample_poly(mono.astype(np.float64), new // shared, old // shared))


def _catalogue() -> dict[str, dict[str, Any]]:
    place = resources.files("regard.zoo") / "speech" / "clips.json"
    return dict(json.loads(place.read_text(encoding="utf-8")))
