"""regard train lm and regard compare: variants by seeds as a queue, and their page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from regard import files
from regard.cli.common import check_file, check_output, write_json
from regard.errors import InputError
from regard.files import check_folder
from regard.lab.intervals import bootstrap, mean
from regard.lab.journal import Journal
from regard.parts.training.settings import Training, Variant

from . import compare as comparing


def train(
    settings: Training,
    mixer: Annotated[
        str | None, typer.Option(help="Mixers by commas, each one model; see --list.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="The same as --mixer: attention operations and biases.")
    ] = None,
    keep: Annotated[
        str, typer.Option(help="Where standard attention stays, by commas: none, even, ...")
    ] = "none",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of every variant.")] = 1,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the runs; a stopped queue goes on.")
    ] = Path("runs"),
    matched: Annotated[
        bool, typer.Option(help="Choose the width of graph mixers for equal parameters.")
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Only list mixers, placements and the runs.")
    ] = False,
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE|-", help="Write the results as JSON here; - stdout."),
    ] = None,
) -> None:
    """Train language models that differ in their token mixers, all else equal.

    Variants and seeds are a queue: typed again, the same command goes on where it was stopped,
    within a run from its last checkpoint. Each run is a folder with `checkpoint` (loaded by
    `AutoModelForCausalLM` after `from regard.parts import mixers`), `curve.jsonl` and `run.json`.
    """
    check_output(json_out)
    if mixer is not None and attention is not None:
        raise InputError("--mixer and --attention are mutually exclusive: both name the mixers")
    queue = variants(mixer or attention or "standard", keep, seeds)
    if matched:
        from regard.parts.training.lm import matched as equal

        queue = [equal(settings, variant) for variant in queue]
    if list_:
        _listed(queue)
        return
    results = run(out, settings, queue, progress=True)
    write_json(results, json_out)
    if str(json_out) != "-":
        from regard.report.document import show

        show(comparing.table(numbers(list(results.values()))))


def variants(mixers: str, keeps: str, seeds: int) -> list[Variant]:
    """Every mixer with every placement and seed; standard attention with one placement alone.

    Raises:
        InputError: an unknown name, or none.
    """
    from regard.parts.mixers import named
    from regard.parts.mixers.kinds import kept

    names = list(dict.fromkeys(named(m.strip()) for m in mixers.split(",") if m.strip()))
    places = list(dict.fromkeys(k.strip() for k in keeps.split(",") if k.strip()))
    if not names or not places:
        raise InputError("name at least one mixer and one placement")
    for place in places:
        kept(place, 24)  # refuses an unknown one
    arms = [(m, k) for m in names for k in (places if m != "standard" else ["none"])]
    return [Variant(m, k, seed) for seed in range(seeds) for m, k in arms]


def run(
    out: Path, settings: Training, queue: Sequence[Variant], progress: bool = False
) -> dict[str, Any]:
    """The results of all runs by name, those of a folder that is done already read from it.

    Raises:
        InputError: a folder of other settings or in use, data too small, sizes that do not fit;
            all before the first training begins.
    """
    from regard.parts.training import lm, measure
    from regard.zoo.options import pick_device

    settings.device = pick_device(settings.device)
    out = check_folder(out)
    key = {"kind": "lm", **settings.settings()}
    key.pop("device")
    _same_settings(out, key)
    data = lm.prepared(settings)
    for variant in queue:
        lm.configured(settings, variant, len(data.tokenizer))
    out.mkdir(parents=True, exist_ok=True)
    with Journal(out / "queue.json", key) as journal:
        for number, variant in enumerate(queue):
            if variant.name in journal.parts:
                continue
            if progress:
                typer.echo(f"{number + 1} of {len(queue)}: {variant.name}", err=True)

            def watch(model: Any, step: int) -> dict[str, Any]:
                return measure.curve(model, settings, data)

            record = lm.train(
                out / variant.name, settings, variant, data, measure=watch, progress=progress
            )
            model = record.pop("model")
            record["final"] = measure.final(model, settings, data)
            record["curve"] = lm.read_lines(out / variant.name / "curve.jsonl")
            del model
            text = json.dumps(record, indent=1, default=float)
            files.write_text(out / variant.name / "run.json", text + "\n")
            journal.put(variant.name, record)
        results = {v.name: journal.parts[v.name] for v in queue}
        _equal_parameters(results)
        return results


def _same_settings(out: Path, key: dict[str, Any]) -> None:
    """Refuse a folder whose runs were trained otherwise: they could not be compared."""
    try:
        held = json.loads((out / "queue.json").read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    other = [n for n in {*key, *held} if key.get(n) != held.get(n)]
    if other:
        name = sorted(other)[0]
        raise InputError(
            f"{out} holds runs with {name} {held.get(name)}, not {key.get(name)}: name another "
            "folder, or the same settings"
        )


def _equal_parameters(results: dict[str, Any]) -> None:
    """The condition of the comparison: the seven mixers have equally many parameters."""
    from regard.parts.mixers import SEVEN

    of = {
        name: r["final"]["parameters"]["total"]
        for name, r in results.items()
        if r["variant"]["mixer"] in SEVEN
    }
    layouts = {r["settings"]["layout"] for r in results.values()}
    if layouts != {"qwen3"} and len(set(of.values())) > 1:
        raise InputError(f"the models differ in their parameters: {of}")
    typer.echo(f"parameters: {sorted(set(of.values()))}", err=True)


def _listed(queue: Sequence[Variant]) -> None:
    from regard.parts.mixers import KEEPS, KINDS
    from regard.report.document import show
    from regard.report.table import Table

    show(
        Table(["mixer", "what it does"], [[n, kind.does] for n, kind in KINDS.items()]),
        Table(["keep", "layers of standard attention"], [list(row) for row in KEEPS.items()]),
        Table(["run"], [[v.name] for v in queue]),
    )


def compare(
    runs: Annotated[list[str], typer.Argument(help="Folders of runs, or of queues of runs.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page, one HTML file.")] = Path(
        "compare.html"
    ),
    json_out: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE|-", help="Write the numbers as JSON here; - stdout."),
    ] = None,
) -> None:
    """Compare trained language models: loss, sinks and indicators, with intervals over seeds."""
    check_file(out)
    check_output(json_out)
    if empty := [run for run in runs if not run.strip()]:
        raise InputError(f"{empty[0]!r} is no folder of a run: name the folder given to --out")
    found = comparing.read([Path(run).expanduser() for run in runs])
    by_arm = numbers(found)
    page = comparing.page(found, by_arm)
    files.write_text(out, page.html())
    write_json(by_arm, json_out)
    if str(json_out) != "-":
        from regard.report.document import show

        show(comparing.table(by_arm))
        typer.echo(f"{out}", err=True)


def numbers(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % interval over seeds of every number, by arm."""
    found: dict[str, Any] = {}
    for arm, own in comparing.arms(runs).items():
        values: dict[str, Any] = {"seeds": len(own)}
        for name in comparing.COLUMNS:
            each = [r["final"][name] for r in own if r["final"].get(name) is not None]
            if each:
                low, high = bootstrap(each)
                values[name] = {"mean": mean(each), "low": low, "high": high, "each": each}
        found[arm] = values
    return found


COMMANDS = {"train lm": train, "compare": compare}
