"""bench facts: what exact facts cost beside fused attention, for one call and for a whole model.

`regard bench facts` measures, in rounds, torch's fused attention alone, `attend`, and `attend` with
facts; and a language model of SmolLM2's shape with random weights, alone and under `regard.watch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regard.core import Mask, attend
from regard.core.facts import FACTS, measure
from regard.core.kernels import reference
from regard.errors import InputError
from regard.report.document import Page, Section
from regard.report.table import Table, right

from . import timer
from .kernels import DTYPES
from .record import (
    Cell,
    Result,
    environment,
    outcome_of,
    pick_device,
    resume,
    show_progress,
    spread,
    targets,
)

CHECKED = 333  # tokens at which facts are compared with the dense float64 map
LIMIT, SHORTEST = 1.7, 16_384
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
CALLS: dict[str, tuple[str, ...] | None] = {
    "fused attention": None,
    "attend": (),
    "received": ("received",),
    "entropy": ("entropy",),
    "received, entropy": ("received", "entropy"),
    "received, entropy, distance": ("received", "entropy", "distance"),
}
MODELS: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "model, received": ("received",),
    "model, received, entropy": ("received", "entropy"),
}
TARGETS: list[dict[str, Any]] = [
    {
        "key": "call",
        "row": "received, entropy",
        "rule": f"one call on a GPU, {SHORTEST // 1024}k tokens or more: attention, received and "
        f"entropy take at most {LIMIT} times the fused attention alone",
    },
    {
        "key": "model",
        "row": "model, received, entropy",
        "rule": f"a whole model on a GPU, {SHORTEST // 1024}k tokens or more: watched for received "
        f"and entropy it takes at most {LIMIT} times the plain model",
    },
    {
        "key": "exact",
        "rule": f"facts at {CHECKED} tokens are within 1e-4 (float32) or 1e-2 (16 bits) of the "
        "dense float64 map of the same inputs, relative to their largest value",
    },
]


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    heads: tuple[int, int]
    dim: int
    dtype: torch.dtype
    device: str
    seed: int

    def tensors(self, total: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of so many tokens."""
        make = torch.Generator().manual_seed(self.seed)
        many, few = self.heads
        shapes = [(1, h, total, self.dim) for h in (many, few, few)]
        q, k, v = (torch.randn(s, generator=make).to(self.device, self.dtype) for s in shapes)
        return q, k, v


def run(
    lengths: Sequence[int] = (1024, 4096),
    *,
    heads: tuple[int, int] = (16, 4),
    dim: int = 64,
    dtype: str = "float32",
    device: str | None = None,
    rounds: int = 7,
    seed: int = 0,
    model: bool = True,
    out: str | Path | None = None,
    progress: Callable[[str], None] = show_progress,
) -> Result:
    """Measure every row at every length; a run that was cut off goes on from `out`.

    Raises:
        InputError: heads that do not fit, an unknown dtype, a device that is not here.

    >>> result = run([64], rounds=1, model=False, progress=lambda line: None)
    >>> result.cells["64 | attend"].outcome
    'measured'
    """
    device = pick_device(device)
    if dtype not in DTYPES or DTYPES[dtype] not in TOLERANCE:
        raise InputError(f"unknown dtype {dtype!r}: choose float32, bfloat16 or float16")
    if heads[1] < 1 or heads[0] % heads[1]:
        raise InputError(f"{heads[0]} query heads are not a multiple of {heads[1]} key heads")
    if not lengths or min(lengths) < 2 or rounds < 1:
        raise InputError("lengths are at least 2 tokens, rounds at least 1")
    setting = Setting(heads, dim, DTYPES[dtype], device, seed)
    settings = {
        "heads": heads[0], "kv_heads": heads[1], "dim": dim, "dtype": dtype, "device": device,
        "seed": seed, "rounds": rounds,
    }  # fmt: skip
    machine = environment(torch.get_num_threads(), device)
    fresh = Result("facts", settings, machine, [dict(t) for t in TARGETS])
    result = resume(out, fresh, __name__)
    result.save(out)
    if "exact" not in result.cells:
        result.cells["exact"] = Cell({"tokens": CHECKED}, values=_errors(setting))
    for total in sorted(set(lengths)):
        q, k, v = setting.tensors(total)
        calls = {n: _call(names, q, k, v) for n, names in CALLS.items()}
        _group(result, total, calls, device, rounds, out, progress)
        del q, k, v, calls
        if model:
            _group(result, total, _models(setting, total), device, rounds, out, progress)
    return result


def _group(
    result: Result,
    total: int,
    calls: dict[str, Callable[[], Any]],
    device: str,
    rounds: int,
    out: str | Path | None,
    progress: Callable[[str], None],
) -> None:
    """Time calls in turn, so that the machine's moods hit all alike."""
    if all(result.settled(f"{total} | {name}") for name in calls):
        return
    progress(f"{total} tokens: {', '.join(calls)}")
    live, taken = dict(calls), {name: list[float]() for name in calls}
    for n in range(rounds + 1):
        for name, call in list(live.items()):
            try:
                spent = timer.seconds(call, device)
            except Exception as problem:
                result.cells[f"{total} | {name}"] = Cell(
                    {"row": name, "tokens": total}, *outcome_of(problem)
                )
                del live[name]
                continue
            if n:  # the first call compiles and warms up
                taken[name].append(spent)
    for name, call in live.items():
        amount, counter = timer.peak(call, device)
        values = {"seconds": taken[name], "peak_bytes": amount, "peak_counted": counter}
        result.cells[f"{total} | {name}"] = Cell({"row": name, "tokens": total}, values=values)
    result.save(out)


def _call(names: Sequence[str] | None, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    if names is None:

        def plain() -> Tensor:
            with torch.no_grad():
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return plain
    facts = [FACTS[n]() for n in names]

    def watched() -> Any:
        with torch.no_grad():
            state = attend(q, k, v, mask=Mask.causal())
            return state, measure(q, k, state.lse, facts, mask=Mask.causal()) if facts else None

    return watched


def _models(setting: Setting, total: int) -> dict[str, Callable[[], Any]]:
    """A model of SmolLM2's shape, plain and watched; only the last logits are computed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from regard.watching import watch

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=max(total, 8192),
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        model: Any = LlamaForCausalLM(config)
    model = model.to(setting.device, setting.dtype).eval()
    make = torch.Generator().manual_seed(setting.seed)
    ids = torch.randint(0, 49152, (1, total), generator=make).to(setting.device)

    def call(names: Sequence[str] | None) -> Callable[[], Any]:
        def forward() -> Any:
            with torch.no_grad():
                if names is None:
                    return model(ids, use_cache=False, logits_to_keep=1)
                with watch(model, facts=list(names)) as seen:
                    model(ids, use_cache=False, logits_to_keep=1)
                return seen[names[0]]

        return forward

    return {name: call(names) for name, names in MODELS.items()}


def _errors(setting: Setting) -> dict[str, float]:
    """Largest difference of each fact from the dense float64 map, over its largest value."""
    q, k, v = setting.tensors(CHECKED)
    mask = Mask.causal()
    p = reference.probabilities(q.double(), k.double(), mask)
    at = torch.arange(CHECKED, device=p.device)
    true = {
        "received": p.sum(2),
        "entropy": -torch.xlogy(p, p).sum(-1),
        "distance": (p * (at[:, None] - at).abs()).sum(-1),
    }
    facts = [FACTS[n]() for n in true]
    measured = measure(q, k, attend(q, k, v, mask=mask).lse, facts, mask=mask)
    return {
        n: float((f.finish(s).double() - true[n]).abs().max() / true[n].abs().max())
        for (n, f), s in zip(zip(true, facts), measured)
    }


def lengths_of(result: Result) -> list[int]:
    """The lengths that were measured."""
    return sorted({c.settings["tokens"] for c in result.cells.values() if "row" in c.settings})


def ratio(result: Result, total: int, row: str) -> dict[str, float] | None:
    """Median and range of a row's time over that of its baseline in the same round."""
    base = next(iter(MODELS)) if row in MODELS else next(iter(CALLS))
    cells = [result.cells.get(f"{total} | {n}") for n in (row, base)]
    times = [c.values.get("seconds") if c is not None and c.values else None for c in cells]
    if not times[0] or not times[1]:
        return None
    return dict(spread([a / b for a, b in zip(*times)]))


def judge(result: Result) -> list[dict[str, str]]:
    """Every target with what was measured."""
    verdicts = []
    for target in result.targets:
        if target["key"] == "exact":
            errors = result.cells["exact"].values
            limit = TOLERANCE[DTYPES[result.settings["dtype"]]]
            shown = ", ".join(f"{n} {e:.1e}" for n, e in errors.items())
            met: bool | None = max(errors.values()) <= limit
        else:
            ratios = {
                t: r["median"]
                for t in lengths_of(result)
                if t >= SHORTEST and (r := ratio(result, t, target["row"])) is not None
            }
            on_gpu = str(result.settings["device"]).startswith("cuda")
            met = max(ratios.values()) <= LIMIT if ratios and on_gpu else None
            shown = ", ".join(f"{t // 1024}k {r:.2f}x" for t, r in ratios.items()) or "-"
        verdict = "not measured" if met is None else "met" if met else "missed"
        verdicts.append({"rule": target["rule"], "measured": shown, "verdict": verdict})
    return verdicts


def table(result: Result) -> Table:
    """A row for each length and way."""
    rows = []
    for total in lengths_of(result):
        for name in (*CALLS, *MODELS):
            cell = result.cells.get(f"{total} | {name}")
            if cell is None:
                continue
            if not cell.values:
                rows.append([f"{total:,}", name, cell.outcome, "", cell.reason[:60], ""])
                continue
            of = ratio(result, total, name) or {"median": 1.0, "low": 1.0, "high": 1.0}
            middle = sorted(cell.values["seconds"])[len(cell.values["seconds"]) // 2]
            rows.append(
                [
                    f"{total:,}",
                    name,
                    f"{1000 * middle:.2f}",
                    f"{of['median']:.2f}x",
                    f"{of['low']:.2f} to {of['high']:.2f}",
                    f"{cell.values['peak_bytes'] / 2**20:.0f}",
                ]
            )
    names = [right("tokens"), "way", right("ms"), right("times"), "range", right("peak MiB")]
    return Table(names, rows)


def markdown(result: Result, source: str) -> str:
    """The page as text; the same result gives the same text."""
    s, e = result.settings, result.environment
    intro = (
        f"One causal attention call of {s['heads']} query and {s['kv_heads']} key heads of "
        f"{s['dim']}, {s['dtype']}; and a language model of SmolLM2's shape with random "
        "weights (30 layers of 9 query and 3 key heads of 64), of which only the last logits "
        "are computed. `times` is over torch's fused attention, or the plain model, in the "
        f"same round; medians of {s['rounds']} rounds."
    )
    versions = f"torch {e.get('torch')}, transformers {e.get('transformers')}."
    sections = [targets(judge(result)), Section("Times", [table(result), versions])]
    source = f"{source} by `regard bench facts`"
    title = f"What exact facts cost on {e.get('device')}"
    return Page(title, sections, [intro], source=source).markdown()
