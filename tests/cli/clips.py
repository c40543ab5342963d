"""Sound files for the tests of the command line."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np


def sound(
    path: Path, seconds: float = 1.0, rate: int = 16_000, channels: int = 1, loud: int = 8000
) -> str:
    """A tone as a WAV file of 16 bits; `loud` 0 is silence."""
    time = np.arange(round(seconds * rate)) / rate
    tone = np.round(loud * np.sin(2 * np.pi * 300 * time)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.repeat(tone, channels).tobytes())
    return str(path)
