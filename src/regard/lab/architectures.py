"""check --all-architectures: every model class of transformers, small and random, put to the test.

Each class is built from its own configuration, shrunk by rules on the names of fields; its inputs
are found by trial: the first that the plain model runs, and that its output depends on. What regard
measures must then equal the eager attention of the same weights. Every class runs in a process of
its own, so that one that hangs or dies costs one line.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from regard.errors import InputError, RegardError
from regard.files import write_text
from regard.report.document import Page, Section
from regard.report.table import Cell, Table, right
from regard.report.table import markdown as markup
from regard.watching.session import watch

from .eager import eager
from .smallest import Inputs, build, output, run, settle, small

RIGHT, REFUSED, UNBUILT, WRONG = "right", "refused", "cannot be built", "WRONG"
TOLERANCE = 1e-4  # of the largest value compared
SECONDS = 90  # for one class
MEMORY = 12 * 2**30
COLORS = {RIGHT: "green", REFUSED: "yellow", UNBUILT: "dim", WRONG: "bold red"}
UNPROVEN = "facts not compared"
INTRODUCTION = (
    "The smallest random model of every class in the causal, masked, seq2seq, image-text, vision, "
    "audio and video mappings of transformers, put to the test by "
    "`regard check --all-architectures`.",
    "*Right*: the facts of every module that ran equal those of eager attention with the same "
    "weights (float32, 1e-4), the outputs while watched equal the plain ones, and `generate`, "
    "where it runs plainly, writes the same tokens. A picture or a sound was sent to the classes "
    "whose line in the JSON names it, and changed their output; the others read tokens alone. "
    "*Refused*: one error names the reason. *Cannot be built*: the rules that shrink "
    "configurations, or those that try inputs, found nothing that runs: nothing is said of these "
    "classes.",
)
SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
FACTS = ("received", "entropy")

MAPPINGS = {
    "CAUSAL_LM": "causal",
    "MASKED_LM": "masked",
    "SEQ_TO_SEQ_CAUSAL_LM": "seq2seq",
    "IMAGE_TEXT_TO_TEXT": "image and text",
    "IMAGE_CLASSIFICATION": "vision",
    "SPEECH_SEQ_2_SEQ": "audio",
    "CTC": "audio",
    "AUDIO_CLASSIFICATION": "audio",
    "VIDEO_CLASSIFICATION": "video",
}


class Class(NamedTuple):
    """A model class, the kind of its mapping, and the `model_type` of its configuration."""

    name: str
    kind: str
    type: str


class Outcome(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    result: str
    detail: str


def classes(only: str | None = None) -> list[Class]:
    """Every class of the mappings once, or those whose name or kind the pattern is found in."""
    from transformers.models.auto import modeling_auto

    try:
        wanted = re.compile(only or "")
    except re.error as problem:
        raise InputError(f"--only {only!r} is no regular expression: {problem}") from None
    every: dict[str, Class] = {}
    for mapping, kind in MAPPINGS.items():
        for type_, names in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            name = names if isinstance(names, str) else names[0]
            every.setdefault(name, Class(name, kind, type_))
    chosen = [c for c in every.values() if wanted.search(f"{c.kind} {c.name}")]
    if not chosen:
        raise InputError(f"--only {only!r} is found in no class: try its first letters")
    return chosen


# -- one class -------------------------------------------------------------------------------------
def examine(given: Class) -> Outcome:
    """Build one class and compare what regard measures of it with its own eager attention."""
    warnings.simplefilter("ignore")
    try:
        model, inputs = ready(given)
    except Exception as problem:
        return Outcome(given.name, given.kind, UNBUILT, _said(problem))
    try:
        result, detail = judge(model, inputs)
    except RegardError as refusal:
        result, detail = REFUSED, _said(refusal)
    except Exception as problem:
        result, detail = WRONG, f"ends in {_said(problem)}"
    return Outcome(given.name, given.kind, result, detail)


def ready(given: Class) -> tuple[Any, Inputs]:
    """The smallest model of a class, and inputs for it.

    Raises:
        InputError: no inputs were found, or the rules leave a large model.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = getattr(transformers, given.name)
    own = cls.config_class or CONFIG_MAPPING[given.type]
    ways = [(rotary, spread) for rotary in (None, [2, 3, 3], [1, 1, 2]) for spread in (True, False)]
    problem: Exception | None = None
    for rotary, spread in ways:
        try:
            model = build(cls, small(own(), rotary), spread)
            inputs = settle(model, given.kind)
            if bool(torch.isfinite(output(run(model, inputs))).all()):
                return model, inputs
            raise InputError("its random weights give numbers that are not finite")
        except Exception as new:
            problem = problem or new
    assert problem is not None
    raise problem


def judge(model: Any, inputs: Inputs) -> tuple[str, str]:
    """Right or WRONG, and what was found.

    Raises:
        RegardError: the class is refused.
    """
    plain = output(run(model, inputs))
    with watch(model, FACTS) as seen:
        watched = output(run(model, inputs))
    if (moved := _error(watched, plain)) > TOLERANCE:
        return WRONG, f"its output moves by {moved:.1e} while it is watched"
    if not torch.equal(output(run(model, inputs)), plain):
        return WRONG, "its output is another one afterwards"
    if problem := _generation(model, inputs):
        return WRONG, problem
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(modules[site.name]): site.name for site in seen.sites}
    values: dict[tuple[int, str], list[Tensor]] = defaultdict(list)
    for fact in FACTS:
        for site in seen.sites:
            if site in (layers := seen[fact]._values):
                values[id(modules[site.name]), fact].append(layers[site])
    with eager(model, set(names)) as maps:
        differs = _error(output(run(model, inputs)), plain)
    if differs > 1e-3:
        return RIGHT, f"{UNPROVEN}: its eager attention gives another output ({differs:.0e})"
    worst = 0.0
    for module, those in maps.items():
        name = names.get(module) or next(n for n, m in modules.items() if id(m) == module)
        for fact, sums in (("received", _received), ("entropy", _entropy)):
            if not values[module, fact]:
                return WRONG, f"{name} attends, and nothing is said of it"
            error = _apart(values[module, fact], [sums(p.double()) for p in those])
            if not error <= max(TOLERANCE, 10 * differs):
                return WRONG, f"{fact} of {name} is off by {error:.1e}"
            worst = max(worst, error)
    if not maps:
        return RIGHT, f"{UNPROVEN}: its maps are not at hand"
    sent = [n for n in inputs if "mask" not in n and inputs[n].is_floating_point()]
    return (
        RIGHT,
        f"{len(maps)} of {len(names)} modules, {worst:.0e}" + f" {' '.join(sent)}".rstrip(),
    )


def _error(value: Tensor, true: Tensor) -> float:
    """The largest difference, relative to the largest true value (entropies of one key are 0)."""
    if value.shape != true.shape:
        return float("inf")
    size = true.abs().max().clamp_min(0.1) if true.numel() else 1.0
    return float((value - true).abs().max() / size) if true.numel() else 0.0


def _received(p: Tensor) -> Tensor:
    return p.sum(-2)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)


def _apart(values: list[Tensor], true: list[Tensor]) -> float:
    """How far values are from the true ones; those of several calls, which may have been joined or
    padded, are compared in order of size.
    """
    if len(values) == len(true) == 1 and values[0].shape == true[0].shape:
        return _error(values[0].double(), true[0])
    if len(true) > len(values):  # a map that weighs several values is one call
        true = [x for n, x in enumerate(true) if not any(torch.equal(x, y) for y in true[:n])]
    count = max(sum(x.numel() for x in values), sum(x.numel() for x in true))
    one, other = (torch.zeros(count, dtype=torch.float64) for _ in range(2))
    for line, parts in ((one, values), (other, true)):
        flat = torch.cat([x.double().flatten() for x in parts])
        line[: len(flat)] = flat
    return _error(one.sort().values, other.sort().values)


def _generation(model: Any, inputs: Inputs) -> str:
    """What is wrong with `generate` while it is watched: it must write the plain tokens."""
    if "input_ids" not in inputs or not model.can_generate():
        return ""
    given = {n: x for n, x in inputs.items() if n != "decoder_input_ids"}

    def write() -> Tensor:
        torch.manual_seed(0)
        copies = {n: x.clone() for n, x in given.items()}
        with torch.no_grad():
            return model.generate(**copies, **SETTINGS)

    try:
        plain = write()
    except Exception:  # it needs more than a forward: nothing to compare with
        return ""
    with watch(model, FACTS):
        watched = write()
    return "" if torch.equal(plain, watched) else "generate writes other tokens while it is watched"


def _said(problem: Exception) -> str:
    words = " ".join(str(problem).split())
    kind = "" if isinstance(problem, RegardError) else f"{type(problem).__name__}: "
    return kind + (words if len(words) < 300 else words[:299] + "…")


# -- all of them -----------------------------------------------------------------------------------
def sweep(chosen: list[Class], step: Callable[[], None] = lambda: None) -> Iterator[Outcome]:
    """The outcome of every class, each in a process of its own."""
    for given in chosen:
        yield _alone(given)
        step()


def _alone(given: Class) -> Outcome:
    context: Any = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, given), daemon=True)
    process.start()
    there.close()
    try:
        if not here.poll(SECONDS):
            return Outcome(given.name, given.kind, UNBUILT, f"not done in {SECONDS} s")
        return Outcome(*json.loads(here.recv_bytes()))
    except EOFError:
        process.join()
        return Outcome(given.name, given.kind, UNBUILT, f"its process died ({process.exitcode})")
    finally:
        process.kill()
        process.join()


def _send(there: Any, given: Class) -> None:
    torch.set_num_threads(1)  # threads do not live on in a fork
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        there.send_bytes(json.dumps(examine(given)).encode())


def result(outcomes: list[Outcome]) -> dict[str, Any]:
    """The outcomes as plain data, with the versions they were found with."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    counts = {name: sum(o.result == name for o in outcomes) for name in COLORS}
    rows = [o._asdict() for o in outcomes]
    return {"versions": versions, "counts": counts, "classes": rows}


def table(outcomes: list[Outcome]) -> Table:
    """One row a class."""
    rows = [[o.name, o.kind, Cell(o.result, COLORS[o.result]), o.detail] for o in outcomes]
    counts = Counter(o.result for o in outcomes)
    note = ", ".join(f"{counts[name]} {name}" for name in COLORS)
    return Table(["class", "kind", "result", "what was found"], rows, note=note, keys=1)


def page(
    source: str = "benchmarks/results/architectures.json", path: str = "docs/architectures.md"
) -> None:
    """Write the page of a saved result."""
    write_text(Path(path), markdown(json.loads(Path(source).read_text("utf-8")), source))


def markdown(found: dict[str, Any], source: str) -> str:
    """The page of a result: counts by kind, and every class that is not right with the reason."""
    outcomes = [Outcome(**row) for row in found["classes"]]
    kinds = list(dict.fromkeys(o.kind for o in outcomes))
    counts = Counter((o.kind, o.result) for o in outcomes)
    rows: list[list[Any]] = [[k, *(counts[k, r] for r in COLORS)] for k in kinds]
    rows.append(["all", *(found["counts"][r] for r in COLORS)])
    sections = [Section("Counts", [Table(["kind", *(right(r) for r in COLORS)], rows)])]
    unproven = [o.name for o in outcomes if o.result == RIGHT and o.detail.startswith(UNPROVEN)]
    for title, status in (("Wrong", WRONG), ("Refused", REFUSED), ("Cannot be built", UNBUILT)):
        those = [
            [Cell(o.name, "code"), o.kind, markup(o.detail)] for o in outcomes if o.result == status
        ]
        if those:
            sections.append(Section(title, [Table(["class", "kind", "reason"], those)]))
    proven = [f"`{o.name}`" for o in outcomes if o.result == RIGHT and o.name not in unproven]
    if unproven:
        words = ", ".join(f"`{name}`" for name in unproven)
        sections.append(Section("Right in outputs, facts not compared", [words]))
    sections.append(Section("Right", [", ".join(proven)]))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return Page(
        "Every architecture",
        sections,
        [*INTRODUCTION, f"Measured with {versions}."],
        source=f"{source} by `make docs`",
    ).markdown()


if __name__ == "__main__":
    page()
