"""regard run localist: a question about documents, answered at dial 0 and with the dial turned."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli.common import err, load, read_text, working, write_json
from regard.cli.pages import check_places
from regard.errors import InputError, nearest
from regard.files import write_text
from regard.zoo.options import Loading

from .card import RunSettings


def run(
    settings: RunSettings,
    loading: Loading,
    docs: Annotated[
        list[str],
        typer.Option(help="Text file of a block; all that follow, or once for each."),
    ],
    question: Annotated[str, typer.Option(help="The question itself, or @file.")],
    toward: Annotated[
        str, typer.Option(help="Documents to look at, by the name of the file; by commas.")
    ] = "",
    more: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    model: Annotated[
        str, typer.Option(help="A name of `regard models`, a folder or a hub id.")
    ] = "smollm2-135m",
    tokens: Annotated[int, typer.Option("-n", "--tokens", min=1, help="Length of answers.")] = 24,
    metadata: Annotated[
        list[str] | None, typer.Option(help="key=value of the request, which rules may ask for.")
    ] = None,
    leakage: Annotated[
        float | None,
        typer.Option(help="Find the strength for this mean leakage, in place of --beta."),
    ] = None,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if any.")] = True,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the audit sheet here.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE|-", help="All as one JSON; - for stdout.")
    ] = None,
) -> None:
    """Answer a question about documents at dial 0 and at the dial, toward some of the documents.

    Shows both answers, and at each setting leakage, fidelity, entropy and whether the bounds held.
    """
    check_places(json, html)
    names = [*docs, *(more or [])]
    documents = _read(names)
    wanted = [w.strip() for w in toward.split(",") if w.strip()]
    if not wanted and settings.rules is None:
        raise InputError("--toward names the documents to look at; or give --rules")
    for one in wanted:
        if one not in documents:
            raise InputError(
                f"--toward {one} is none of {', '.join(documents)}.{nearest(one, documents)}"
            )
    if settings.bias == "distance" or leakage is not None:
        if settings.bias == "distance":
            raise InputError("documents are blocks: leave --bias at blocks")
        if not 0 < (leakage or 0) < 1:
            raise InputError(f"--leakage lies between 0 and 1, not {leakage}")
    from .rules import read_rules

    for rule in read_rules(settings.rules):
        rule.check(list(documents))
    from .answering import answered

    asked, given = read_text(question), _metadata(metadata)
    content: dict[str, Any] = {
        "documents": documents,
        "question": asked,
        "toward": wanted,
        "metadata": given,
    }
    loaded, tokenizer = load(model, loading)
    with working("answering at both settings"):
        result = answered(
            loaded, tokenizer, settings, tokens=tokens, leakage=leakage, chat=chat, **content
        )
    result["settings"]["model"] = model
    write_json(result, json)
    if html is not None:
        from .sheet import sheet

        write_text(html, sheet(result).html())
        err().print(f"audit sheet: {html}", markup=False, highlight=False)
    if str(json) != "-":
        _show(result)


def _show(result: dict[str, Any]) -> None:
    from regard.report.document import show
    from regard.report.table import Table

    from .sheet import figures_table
    from .view import ranges

    settings = [("0", result["plain"]), (f"{result['locality']:g}", result["dialled"])]
    show(Table(["dial", "answer"], [[name, one["answer"]] for name, one in settings]))
    show(figures_table(result["figures"]))
    fired = result["dialled"]["report"]["fired"]
    for one in fired:
        show(f"rule {one['rule']} fired on tokens {ranges(one['queries'])}")
    show(
        f"beta {result['beta']:.3g} nats; figures are of question and answer tokens, over all "
        "layers and heads."
    )


def _read(names: list[str]) -> dict[str, str]:
    """The documents by name of their file."""
    documents: dict[str, str] = {}
    for name in names:
        label = Path(name.removeprefix("@")).stem or name
        if label in documents:
            raise InputError(f"two documents are called {label}: rename one of the files")
        documents[label] = read_text(name if name.startswith("@") else f"@{name}")
    if len(documents) < 2:
        raise InputError("the dial chooses among documents: give two at least, --docs a.txt b.txt")
    return documents


def _metadata(given: list[str] | None) -> dict[str, str]:
    made = {}
    for one in given or []:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise InputError(f"--metadata is key=value, not {one[:40]!r}")
        made[key] = value
    return made


def train(
    data: Annotated[
        str, typer.Option(help="topics: synthetic texts that interleave two of four topics.")
    ] = "topics",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each of the two trainings.")] = 400,
    batch: Annotated[int, typer.Option(min=1, help="Texts a step.")] = 32,
    length: Annotated[int, typer.Option(min=8, help="Tokens a text.")] = 64,
    width: Annotated[int, typer.Option(min=8, help="Width; a multiple of 16.")] = 64,
    rho: Annotated[float, typer.Option(min=0, max=10, help="Weight of the group penalty.")] = 1e-3,
    mu: Annotated[float, typer.Option(min=0, max=100, help="Weight of -ln fidelity.")] = 0.1,
    beta: Annotated[float, typer.Option(min=0.01, max=1000, help="Dial strength, nats.")] = 8.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and texts.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON of the run.")] = Path(
        "localist-training.json"
    ),
) -> None:
    """Train a model with locality drawn anew for each batch, and the same one without.

    Prints perplexity, entropy, fidelity and leakage over the dial for both, and certificate D1.
    """
    from regard.report.document import show
    from regard.report.table import Table, right
    from regard.zoo.options import pick_device

    from .topics import Topics
    from .training import Plan, dial_table, train_topics

    _only_topics(data)
    check_places(None, out)
    if width % 16:
        raise InputError(f"--width is a multiple of 16, not {width}")
    plan = Plan(steps=steps, batch=batch, length=length, width=width, rho=rho, mu=mu, beta=beta,
                seed=seed)  # fmt: skip
    topics, place = Topics(), pick_device(device)
    found: dict[str, Any] = {}
    for name, localist in (("localist", True), ("plain", False)):
        with working(f"training, {name}"):
            model, facts = train_topics(topics, plan, localist=localist, device=place)
        found[name] = {"training": facts, "dial": dial_table(model, topics, plan)}
    settings = {n: getattr(plan, n) for n in plan.__dataclass_fields__}
    write_json({"settings": {"data": data, **settings}, **found}, out)
    names = ("perplexity", "accuracy", "entropy_bits", "fidelity", "leakage")
    columns = ["model", "dial", *(right(n, "{:.4f}".format) for n in names), "violations"]
    rows = [
        [
            name,
            f"{row['locality']:g}",
            *(row[n] for n in names),
            str(sum(row["violations"].values())),
        ]
        for name, one in found.items()
        for row in one["dial"]
    ]
    show(Table(columns, rows))
    for name, value in found["localist"]["training"].get("certificate", {}).items():
        show(f"{name}: {'-' if value is None else value}")


def recruit(
    data: Annotated[
        str, typer.Option(help="topics: two of four topics and noise that the model knows.")
    ] = "topics",
    known: Annotated[int, typer.Option(min=2, max=4, help="Topics known at the start.")] = 2,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the model.")] = 200,
    texts: Annotated[int, typer.Option(min=1, help="Texts of each of the two shards.")] = 256,
    eta: Annotated[
        float, typer.Option(min=0.001, help="Bits a block saves beyond its cost.")
    ] = 10.0,
    anchors: Annotated[int, typer.Option(min=1, help="Tokens that name a block, at most.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Rank of a block's map to logits.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and texts.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON of the trace.")] = Path(
        "recruitment.json"
    ),
) -> None:
    """Add blocks to a model that knows some of the topics, while that shortens the description.

    Prints every candidate with the bits that it saves and costs, and whether it was taken.
    """
    from regard.report.document import show
    from regard.report.table import Table, right

    from .recruit import recruit as run_recruitment
    from .recruit import shard
    from .topics import Topics
    from .training import Plan, train_topics

    _only_topics(data)
    check_places(None, out)
    topics = Topics(noise=8, seed=seed)
    plan = Plan(steps=steps, length=64, width=32, heads=2, seed=seed)
    texture: dict[str, Any] = {"run": 14, "noisy": 0.2}
    among = tuple(range(known))
    with working("training the model that knows some topics"):
        model, _ = train_topics(topics, plan, localist=False, among=among, **texture)
    with working("recruiting"):
        shards = [shard(model, topics.draw(texts, 64, seed + n, **texture)) for n in (1, 2)]
        first = 1 + topics.glue
        have = [list(range(first + n * topics.words, first + (n + 1) * topics.words))
                for n in among]  # fmt: skip
        trace = run_recruitment(*shards, known=have, eta=eta, anchors=anchors, rank=rank, seed=seed)
    result = {
        "start": trace.start,
        "end": trace.end,
        "steps": trace.rows,
        "blocks": [b.tokens for b in trace.blocks],
    }
    write_json(result, out)
    bits = "{:+.0f}".format
    columns = ["step", "tokens", right("bits saved", bits), right("bits paid", bits), "taken",
               right("description", "{:.0f}".format)]  # fmt: skip
    rows = [
        [r["step"], " ".join(map(str, r["tokens"])), r["saved"], r["paid"],
         "yes" if r["accepted"] else "no", r["length"]]
        for r in trace.rows
    ]  # fmt: skip
    show(Table(columns, rows))
    show(f"{trace.start:.0f} bits at the start, {trace.end:.0f} at the end.")


def _only_topics(data: str) -> None:
    if data != "topics":
        raise InputError(f"--data is topics, not {data}: texts of your own are not read yet")


COMMANDS = {"run": run, "train localist": train, "train recruit": recruit}
