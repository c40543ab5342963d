"""What a long context costs while a model writes: stock transformers and the methods in turn.

The methods are those of the catalogue that only keep other rows of the prompt; the `DECODE` of a
method's `cost.py` says with which settings, and what is expected of it.

`regard bench decode --out benchmarks/results/decode.json` measures, and goes on where it was
interrupted.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from regard import catalog
from regard.errors import InputError
from regard.parts.decoding.cache import held_bytes
from regard.report.document import Page, Section
from regard.report.table import from_grid
from regard.zoo.options import Loading

from .record import (
    FAILED,
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
from .timer import seconds

BLOCK = 16  # tokens written by each way before the next one's turn
MB = 1e6


def _methods() -> dict[str, tuple[catalog.Method, dict[str, Any]]]:
    """The methods by the name of their row, each with what its folder says of decoding."""
    rows = {}
    for method in catalog.methods():
        card = method.card
        if card.takes == "text" and card.plain_prompt and method.has("method"):
            decode = method.load("cost").DECODE if method.has("cost") else {}
            rows[decode.get("row", card.slug)] = (method, decode)
    return rows


METHODS = _methods()
ROWS = {
    "stock": "stock transformers, sdpa",
    **{row: settings.get("title", method.card.name) for row, (method, settings) in METHODS.items()},
}
TARGETS: list[dict[str, Any]] = [
    {"row": row, **target}
    for row, (_, settings) in METHODS.items()
    for target in settings.get("targets", ())
]


def run(
    model: str = "smollm2-135m",
    *,
    context: int = 8192,
    rounds: int = 5,
    loading: Loading | None = None,
    out: str | Path | None = None,
    threads: int | None = None,
    progress: Any = show_progress,
) -> Result:
    """Read one prompt in every way, then let them write in turn, so many rounds.

    Args:
        model: a name of `regard.models()`, a folder or a hub id.
        context: tokens at the end, written ones included; the prompt is the beginning of
            northanger-abbey.
        loading: device, dtype and the like.
        rounds: how often each way writes `BLOCK` tokens, greedily, with `model.generate`.
        out: JSON file, written after every round.

    Raises:
        InputError: a context or number of rounds that cannot be, a file that holds another run.
    """
    prompt = context - 2 - rounds * BLOCK  # reading it gives a token, and one more warms up
    if rounds < 1 or prompt < 16:
        raise InputError(
            f"context holds a prompt of at least 16 tokens and {BLOCK} for each of at least one "
            f"round: {context} with {rounds} rounds does not"
        )
    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    loaded, ids = opening(model, prompt, context, loading)
    loaded.generation_config.eos_token_id = None  # every way writes as many tokens
    settings = {
        "model": Path(model).name,
        "context": context,
        "prompt": prompt,
        "rounds": rounds,
        "tokens a round": BLOCK,
        "methods": {row: decode.get("settings", {}) for row, (_, decode) in METHODS.items()},
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.config._attn_implementation,
    }
    fresh = Result(
        "decode", settings, environment(threads, str(loaded.device)), [dict(t) for t in TARGETS]
    )
    modules = [f"{method.package}.method" for method, _ in METHODS.values()]
    result = resume(out, fresh, __name__, *modules)
    for name in ROWS:
        result.cells.setdefault(name, Cell({"row": name}, values={"seconds": []}))
    if done(result) >= rounds:
        return result
    ways: dict[str, _Way] = {}
    for name in ROWS:
        try:
            ways[name] = way = _Way(loaded, _method(name), ids)
        except Exception as problem:  # one way that cannot run leaves the others to be measured
            if name == "stock":
                raise
            result.cells[name] = Cell({"row": name}, FAILED, f"{type(problem).__name__}: {problem}")
            progress(f"{name}: {result.cells[name].reason}")
            continue
        result.cells[name].outcome = "measured"
        result.cells[name].values.update(prefill=round(way.prefill, 2), bytes_prompt=way.bytes)
        progress(f"{name}: prompt of {prompt} tokens in {way.prefill:.1f} s, {way.bytes} bytes")
    # the first step grows the stores; a resumed run writes the tokens of the rounds before again
    for way in ways.values():
        way.write(1 + done(result) * BLOCK)
    while (count := done(result)) < rounds:
        taken = {name: way.write(BLOCK) for name, way in ways.items()}
        for name, value in taken.items():
            cell = result.cells[name]
            cell.values["seconds"].append(round(value, 4))
            cell.values["bytes_end"] = ways[name].bytes
            if hasattr(ways[name].method, "entries_per_token"):
                cell.values["entries"] = round(ways[name].method.entries_per_token, 1)
        result.save(out)
        progress(f"round {count + 1} of {rounds}: {_words(taken)}")
    return result


def opening(
    model: str, tokens: int, context: int, loading: Loading | None = None
) -> tuple[Any, torch.Tensor]:
    """The model, and so many first tokens of northanger-abbey for it.

    Raises:
        InputError: an encoder-decoder, fewer positions than `context`, a text that is too short.
    """
    from regard import zoo

    loaded, tokenizer = (loading or Loading()).load(model)
    if loaded.config.is_encoder_decoder:
        raise InputError(f"{model} is an encoder-decoder: name a decoder, such as smollm2-135m")
    room = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if room is not None and context > room:
        raise InputError(f"{model} has {room} positions: choose at most so many tokens")
    ids = tokenizer(zoo.text("northanger-abbey"), return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise InputError(f"the text has {ids.shape[1]} tokens: choose fewer")
    return loaded, ids.to(loaded.device)


class _Way:
    """One way to write: a cache of its own that has read the prompt."""

    def __init__(self, model: Any, method: Any, ids: torch.Tensor) -> None:
        from transformers import DynamicCache

        self.model, self.method, self.ids = model, method, ids
        self.cache = DynamicCache(config=model.config)
        self.prefill = self.write(1)

    def write(self, count: int) -> float:
        """Write so many tokens after those that are there; seconds."""
        from regard.watching import apply

        if count == 0:
            return 0.0

        def generate() -> None:
            self.ids = self.model.generate(
                self.ids,
                attention_mask=torch.ones_like(self.ids),
                past_key_values=self.cache,
                max_new_tokens=count,
                do_sample=False,
            )

        if self.method is None:  # stock: no session, transformers' own attention
            return seconds(generate, str(self.model.device))
        with torch.no_grad(), apply(self.model, self.method):
            return seconds(generate, str(self.model.device))

    @property
    def bytes(self) -> int:
        """Bytes of keys and values held, counted from storage."""
        return held_bytes(self.cache)


def _method(name: str) -> Any:
    if name not in METHODS:
        return None
    method, decode = METHODS[name]
    return method.run(**decode.get("settings", {}))


def done(result: Result) -> int:
    """How many rounds of stock transformers are there."""
    return len(result.cells["stock"].values.get("seconds", []))


def faster(result: Result, row: str) -> list[float]:
    """How many times the tokens a second of stock transformers, round by round."""
    return ratios(result, "stock", base=row)


def judge(result: Result) -> list[dict[str, str]]:
    """Every target with what was measured."""

    def measured(target: dict[str, Any]) -> tuple[float, str] | None:
        speeds = faster(result, target["row"])
        if "least" in target or not speeds:
            return median(speeds)
        held, stock = (result.cells[n].values["bytes_prompt"] for n in (target["row"], "stock"))
        return held / stock, f"{held / stock:.4f}"

    return judged(result, measured)


def markdown(result: Result, source: str) -> str:
    """The page as text; the same result gives the same text."""
    s = result.settings
    stock = result.cells["stock"].values
    count = done(result)
    intro = (
        f"{s['model']} ({s['dtype']}) reads {s['prompt']} tokens and then writes, greedily with "
        f"`model.generate`, {s['tokens a round']} tokens in every way in turn, {count} rounds in "
        f"one process, up to {s['context']} tokens of context. Stock transformers runs its own "
        f"{s['attention']} attention and cache."
    )
    grid = [["", "tokens/s", "range", "times stock", "range", "MB after the prompt",
             "share of stock", "MB at the end", "share of stock", "prompt, s"]]  # fmt: skip
    for row, name in ROWS.items():
        cell = result.get(row)
        if cell is None or not cell.values.get("seconds"):
            why = result.cells[row].reason if row in result.cells else ""
            grid.append([name, f"not measured: {why or 'no run'}", *[""] * 8])
            continue
        v = cell.values
        speed = spread([s["tokens a round"] / t for t in v["seconds"]])
        sizes = [
            text
            for when in ("bytes_prompt", "bytes_end")
            for text in (f"{v[when] / MB:.0f}", f"{v[when] / stock[when]:.3f}")
        ]
        of = spread(faster(result, row))
        grid.append([name, *ranged(speed, 1), *ranged(of), *sizes, f"{v['prefill']:.1f}"])
    note = (
        f"Medians of {count} rounds; a ratio compares the two ways within a round. Bytes are "
        "those of the storage behind keys, values and what each method keeps beside them. The "
        "time of the prompt is one measurement."
    )
    note = " ".join([note, *notes(result)])
    blocks = [from_grid(grid, keys=1), note, machine(result)]
    sections = [targets(judge(result)), Section("Time and memory", blocks)]
    source = f"{source} by `regard bench decode`"
    return Page("Writing after a long context", sections, [intro], source=source).markdown()


def notes(result: Result) -> list[str]:
    """What the methods' folders add to the numbers."""
    remarks = {row: remarks["note"] for row, (_, remarks) in METHODS.items() if "note" in remarks}
    cells = {row: result.get(row) for row in remarks}
    return [remarks[row].format(**cell.values) for row, cell in cells.items() if cell is not None]


def _words(taken: dict[str, float]) -> str:
    return ", ".join(
        f"{n} {BLOCK / t:.1f} tokens/s ({taken['stock'] / t:.2f})" for n, t in taken.items()
    )
