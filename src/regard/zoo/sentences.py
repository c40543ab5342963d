"""Short spoken sentences with known words and known word times, shipped with the package.

They are self-written and spoken by the synthesiser eSpeak NG in several voices, so that a
measurement on speech runs offline, and every word's true place is known. The sound is stored as
8-bit mu-law, which costs a little noise, at 16 kHz.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from regard.errors import InputError
from regard.files import write_text

RATE = 16_000
_MU = 255.0
VOICES = (
    *("en-us", "en", "en-us+f3", "en+m3", "en-gb-scotland", "en-us+m7", "en+f2"),
    *("en-gb-x-rp", "en-us+f5"),
)
TEXTS = (
    *("The train leaves at seven tonight.", "My brother plays the old piano."),
    *("We bought fresh bread this morning.", "The river was cold and deep."),
    *("She closed the door very quietly.", "Nobody answered the telephone today."),
    *("The children ran across the field.", "He painted the kitchen wall yellow."),
    *("Our neighbors have three small dogs.", "The doctor will see you now."),
    *("Winter came early this year.", "Please put the books on the table."),
    *("I forgot my umbrella at work.", "The soup needs a little salt."),
    *("They walked along the sandy beach.", "The moon is bright tonight."),
    *("A black cat slept near the fire.", "Her letter arrived on Monday."),
    *("The teacher asked a simple question.", "We drove through the mountains."),
    *("The window was open all night.", "He drinks his coffee without sugar."),
    *("The farmer sold twenty white sheep.", "Call me when you get home."),
    *("The museum opens at ten.", "She wrote a book about birds."),
    *("The old bridge is made of stone.", "Rain fell on the empty street."),
    *("He lost his keys in the garden.", "The market was full of people."),
    *("My sister lives in a small town.", "The bus stopped near the station."),
    *("We need more water and wood.", "The baby is asleep upstairs."),
    *("The ship sailed before sunrise.", "An apple fell from the tree."),
    *("They sang a song together.", "The clock on the wall is slow."),
    *("I read the newspaper every day.", "The boy threw the ball high."),
    *("Summer evenings are long and warm.", "The lawyer wore a gray suit."),
    *("You should visit the castle.", "The road turns left at the church."),
    *("The horse jumped over the fence.", "Dinner will be ready soon."),
    *("Someone knocked twice at the gate.", "The lamp fell to the floor."),
    *("He carried the heavy box inside.", "The wind blew my hat away."),
    *("Many people work in this office.", "The king lived a happy life."),
)


@dataclass(frozen=True)
class Sentence:
    """One spoken sentence.

    Attributes:
        name: short name; text: what is said; voice: of the synthesiser.
        audio: float32 samples in [-1, 1] at 16 kHz.
        words: each with its start and end in seconds.
    """

    name: str
    text: str
    voice: str
    audio: Any
    words: list[tuple[str, float, float]]


def sentences(folder: str | Path | None = None) -> list[Sentence]:
    """The shipped sentences, in a fixed order.

    >>> found = sentences()
    >>> len(found) >= 50, found[0].text, found[0].words[0][0]
    (True, 'The train leaves at seven tonight.', 'The')
    """
    from safetensors.numpy import load_file

    where = files("regard.zoo") / "speech" / "sentences" if folder is None else Path(folder)
    try:
        index = json.loads((where / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{where} holds no sentences: there is no index.json") from None
    sound = load_file(str(where / "sound.safetensors"))["mulaw"]
    made = []
    for one in index["sentences"]:
        audio = _expand(sound[one["start"] : one["end"]])
        words = [(str(w), float(a), float(b)) for w, a, b in one["words"]]
        made.append(Sentence(one["name"], one["text"], one["voice"], audio, words))
    return made


def _squeeze(audio: Any) -> Any:
    """Samples in [-1, 1] as mu-law bytes."""
    import numpy

    loud = numpy.log1p(_MU * numpy.abs(audio)) / numpy.log1p(_MU)
    return numpy.round((numpy.sign(audio) * loud + 1) / 2 * 255).astype(numpy.uint8)


def _expand(coded: Any) -> Any:
    """Mu-law bytes as samples in [-1, 1], float32."""
    import numpy

    y = coded.astype(numpy.float32) / 255 * 2 - 1
    return (numpy.sign(y) * numpy.expm1(numpy.abs(y) * numpy.log1p(_MU)) / _MU).astype("float32")


def speak(text: str, voice: str, speed: int = 175) -> tuple[Any, int, list[tuple[int, int]]]:
    """What eSpeak NG makes of a text: int16 samples, their rate, and (character, sample) of each
    word. The recipe of the shipped sentences; needs the library libespeak-ng.
    """
    import ctypes
    import ctypes.util

    import numpy

    found = ctypes.util.find_library("espeak-ng")
    if found is None:
        raise InputError("speaking needs the library eSpeak NG: install espeak-ng")
    lib = ctypes.CDLL(found)

    class Event(ctypes.Structure):
        _fields_ = [
            ("type", ctypes.c_int),
            ("unique", ctypes.c_uint),
            ("text", ctypes.c_int),
            ("length", ctypes.c_int),
            ("ms", ctypes.c_int),
            ("sample", ctypes.c_int),
            ("user", ctypes.c_void_p),
            ("id", ctypes.c_char * 8),
        ]

    kind = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(Event)
    )
    sound: list[Any] = []
    words: list[tuple[int, int]] = []

    def hear(wave: Any, count: int, events: Any) -> int:
        if count and wave:
            sound.append(numpy.ctypeslib.as_array(wave, (count,)).copy())
        n = 0
        while events[n].type:
            if events[n].type == 1:  # a word begins
                words.append((events[n].text - 1, events[n].sample))
            n += 1
        return 0

    kept = kind(hear)
    rate = lib.espeak_Initialize(1, 0, None, 0)  # 1: hand the sound over after synthesis
    lib.espeak_SetSynthCallback(kept)
    lib.espeak_Synth.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint),
        *(ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p),
    ]
    if lib.espeak_SetVoiceByName(voice.encode()):
        raise InputError(f"eSpeak NG has no voice {voice!r}")
    lib.espeak_SetParameter(1, speed, 0)
    data = text.encode()
    lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, 1, None, None)
    lib.espeak_Synchronize()
    lib.espeak_Terminate()
    return numpy.concatenate(sound), int(rate), words


def make(folder: str | Path) -> None:
    """Speak all sentences anew into a folder: `index.json` and `sound.safetensors`."""
    import numpy
    from safetensors.numpy import save_file
    from scipy.signal import resample_poly

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    index, pieces, at = [], [], 0
    for n, text in enumerate(TEXTS):
        voice = VOICES[n % len(VOICES)]
        wave, rate, marks = speak(text, voice)
        step = numpy.gcd(RATE, rate)
        audio = resample_poly(wave / 32768.0, RATE // step, rate // step)
        loud = numpy.flatnonzero(numpy.abs(audio) > 0.01 * numpy.abs(audio).max())
        end = min(len(audio), int(loud[-1]) + RATE // 20)  # 50 ms of silence stay
        audio = audio[:end] / numpy.abs(audio).max() * 0.6
        words = _words(text, marks, rate, float(loud[-1]) / RATE)
        coded = _squeeze(audio)
        index.append(
            {
                **{"name": f"s{n:02d}", "text": text, "voice": voice},
                **{"start": at, "end": at + len(coded), "words": words},
            }
        )
        pieces.append(coded)
        at += len(coded)
    save_file({"mulaw": numpy.concatenate(pieces)}, folder / "sound.safetensors")
    lines = ",\n".join(json.dumps(one) for one in index)
    write_text(folder / "index.json", f'{{"rate": {RATE}, "sentences": [\n{lines}\n]}}\n')


def _words(
    text: str, marks: list[tuple[int, int]], rate: int, end: float
) -> list[tuple[str, float, float]]:
    """Each word with its start and end in seconds; words that the synthesiser runs together
    ("of the") count as one.
    """
    begin = {n for n in range(len(text)) if text[n] != " " and (n == 0 or text[n - 1] == " ")}
    first = {place: sample / rate for place, sample in reversed(marks) if place in begin}
    places = sorted(first)
    stops = [*(first[n] for n in places[1:]), end]
    cuts = [*places[1:], len(text)]
    return [
        (text[a:b].strip(" ."), round(first[a], 4), round(stop, 4))
        for a, b, stop in zip(places, cuts, stops)
    ]
