"""What cross-attention facts cost: half a minute of sound, transcribed plainly and with the facts.

`regard bench speech --out benchmarks/results/speech.json` measures, and goes on where it was
interrupted.

Memory was first compared at the peak of the whole call. That peak is the encoder's, and hid what
the plain model's decoder takes while it showed what ours takes (27 MB more at 400 tokens than at
50, at half the plain model's peak); so both are now counted from the end of the encoder on. The
limit stayed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from regard.errors import InputError
from regard.report.document import Block, Page, Section
from regard.report.table import from_grid
from regard.zoo.options import Loading

from . import timer
from .record import (
    Cell,
    Result,
    environment,
    judged,
    machine,
    median,
    ranged,
    ratios,
    resume,
    show_progress,
    spread,
    targets,
)
from .timer import peak, seconds

SECONDS = 30.0
LENGTHS = (50, 400)  # generated tokens between which memory is compared
MB = 1e6
ROWS = {
    "look": "facts and word times of a transcript",
    "live": "facts while `generate` writes",
    "stamps": "transformers' own token time stamps",
}
KEPT = {
    "plain": "plain transcription",
    "facts": "with facts",
    "rows": "with the row of every token kept",
}
TARGETS: list[dict[str, Any]] = [
    {"row": "look", "most": 1.2, "rule": "facts and words: at most 1.2 times plain transcription"},
    {"row": "live", "most": 1.2, "rule": "facts under generate: at most 1.2 times the same"},
    {
        "row": "memory",
        "most": 4.0,
        "rule": f"facts under generate, while decoding: at {LENGTHS[1]} tokens at most 4 MB more "
        f"above the plain model than at {LENGTHS[0]}",
    },
]


def half_minute(seconds: float = SECONDS) -> Any:
    """So many seconds of the shipped clips, one after another."""
    import numpy as np

    from regard import zoo

    joined = np.concatenate([zoo.clip(name).samples for name in zoo.clips()])
    samples = round(16_000 * seconds)
    return np.tile(joined, -(-samples // len(joined)))[:samples]


def run(
    model: str = "whisper-tiny.en",
    *,
    loading: Loading | None = None,
    rounds: int = 5,
    out: str | Path | None = None,
    threads: int | None = None,
    progress: Any = show_progress,
) -> Result:
    """Time the ways in turn, so many rounds, and the memory at two lengths of transcript.

    Args:
        model: a speech model by name, folder or hub id.
        loading: device, dtype and the like.
        out: JSON file, written after every round.

    Raises:
        InputError: a number of rounds that cannot be, a file that holds another run.
    """
    from regard.parts.speech.cross_attention import cross_attention, prepare
    from regard.zoo.convert import errors_only

    if rounds < 1:
        raise InputError("rounds is at least 1")
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    loaded, processor = (loading or Loading()).load(model)
    device = str(loaded.device)
    sound = half_minute()
    settings = {
        "model": Path(model).name,
        "seconds": SECONDS,
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    fresh = Result("speech", settings, environment(threads, device), [dict(t) for t in TARGETS])
    result = resume(out, fresh, __name__)

    def plain(**more: Any) -> Any:
        given, _ = prepare(loaded, processor, sound)
        with torch.no_grad():
            return loaded.generate(**given, **more)

    look = partial(cross_attention, loaded, processor, sound)
    stamps = partial(plain, return_token_timestamps=True, return_dict_in_generate=True)
    ways: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "look": look,
        "live": partial(look, live=True),
        "stamps": stamps,
    }
    for name in ways:
        result.cells.setdefault(name, Cell({"row": name}, values={"seconds": []}))
    result.save(out)
    with errors_only():
        if len(result.cells["stamps"].values["seconds"]) < rounds:
            result.settings.setdefault("tokens", len(look().tokens))  # and what is made once
        while (done := len(result.cells["stamps"].values["seconds"])) < rounds:
            taken = {name: seconds(way, device) for name, way in ways.items()}
            for name, value in taken.items():
                result.cells[name].values["seconds"].append(round(value, 4))
            result.save(out)
            shown = ", ".join(f"{n} {t:.2f} s ({t / taken['plain']:.2f})" for n, t in taken.items())
            progress(f"round {done + 1} of {rounds}: {shown}")
        if not result.settled("memory"):
            result.cells["memory"] = Cell(
                {"row": "memory"}, values=_memory(loaded, plain, look, progress)
            )
            result.save(out)
    return result


def _memory(
    model: Any, plain: Callable[..., Any], look: Callable[..., Any], progress: Any
) -> dict[str, Any]:
    """Bytes at the peak of each way at each length, once the encoder has run, and what it keeps."""
    memory: dict[str, Any] = {"how": "", "peak": {}, "kept": {}}
    plain(max_new_tokens=LENGTHS[-1], min_new_tokens=LENGTHS[-1])  # what is made once
    for length in LENGTHS:
        exact = {"max_new_tokens": length, "min_new_tokens": length}
        ways: dict[str, Callable[[], Any]] = {
            "plain": partial(plain, **exact),
            "facts": partial(look, live=True, rows=False, **exact),
            "rows": partial(look, live=True, **exact),
        }
        for name, way in ways.items():
            kept: list[Any] = []
            grown = []
            for _ in range(3):
                kept.clear()

                def keep(way: Callable[[], Any] = way, kept: list[Any] = kept) -> None:
                    kept.append(way())

                bytes_, memory["how"] = _decoding(model, keep)
                grown.append(bytes_)
            memory["peak"][f"{name} {length}"] = sorted(grown)[1]
            if name != "plain":
                memory["kept"][f"{name} {length}"] = kept[0].kept_bytes
        progress(f"memory at {length} tokens: {memory['peak']}")
    few, many = LENGTHS
    over = {n: memory["peak"][f"facts {n}"] - memory["peak"][f"plain {n}"] for n in LENGTHS}
    memory["grown"] = over[many] - over[few]
    return memory


def _decoding(model: Any, call: Callable[[], Any]) -> tuple[int, str]:
    """(bytes at the peak of a call over those when its encoder had run, how they were counted).

    The encoder works in far more memory than any decoder step, so that a peak over the whole call
    would not show how the decoder's grows.
    """
    before: list[int | None] = []

    device = str(model.device)

    def ran(*_: Any) -> None:
        before.append(None if device.startswith("cuda") else timer.mark())

    hook = model.get_encoder().register_forward_hook(ran)
    try:
        whole, counter = peak(call, device)
    finally:
        hook.remove()
    at = before[-1] if before else None
    if at is None:
        return whole, counter
    return timer.since(at), f"{counter}, from the end of the encoder on"


def judge(result: Result) -> list[dict[str, str]]:
    """Every target with what was measured."""

    def measured(target: dict[str, Any]) -> tuple[float, str] | None:
        if target["row"] != "memory":
            return median(ratios(result, target["row"]))
        cell = result.get("memory")
        if cell is None:
            return None
        amount = cell.values["grown"] / MB
        return amount, f"{amount:.1f} MB"

    return judged(result, measured)


def markdown(result: Result, source: str) -> str:
    """The page as text; the same result gives the same text."""
    s = result.settings
    intro = (
        f"{s['model']} ({s['dtype']}) transcribes {s['seconds']:g} s of sound into {s['tokens']} "
        "tokens, plainly and in the other ways by turns in one process."
    )
    grid = [["", "times plain transcription", "range"]]
    for row, name in ROWS.items():
        if of := ratios(result, row):
            grid.append([name, *ranged(spread(of))])
    blocks: list[Block] = [from_grid(grid)]
    memory = result.get("memory")
    if memory is not None:
        kept = [["", *(f"{n} tokens" for n in LENGTHS)]]
        for name, words in KEPT.items():
            peaks = [memory.values["peak"][f"{name} {n}"] / MB for n in LENGTHS]
            kept.append([words, *(f"{x:.1f} MB" for x in peaks)])
        blocks += [from_grid(kept), f"Memory: {memory.values['how']}, the middle of three."]
    blocks.append(machine(result))
    sections = [targets(judge(result)), Section("Time and memory", blocks)]
    source = f"{source} by `regard bench speech`"
    title = "What cross-attention facts of speech cost"
    return Page(title, sections, [intro], source=source).markdown()
