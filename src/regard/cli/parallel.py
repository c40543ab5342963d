"""regard bench parallel, regard bench plan, and `regard see` over several processes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cards import DIGITS
from regard.cli.common import check_output, count, write_json
from regard.cli.pages import check_places
from regard.errors import InputError
from regard.files import write_text

PATIENCE = 2.0  # seconds
SCHEMES = "ulysses,ring,allgather,usp,loongtrain"


def app_commands(app: typer.Typer) -> None:
    """Add `parallel` and `plan` to the commands of `regard bench`."""
    app.command("parallel")(parallel)
    app.command("plan")(plan)


def parallel(
    schemes: Annotated[str, typer.Option(help="Which schemes, by name.")] = SCHEMES,
    mask: Annotated[str, typer.Option(help="A mask of `regard bench masks`.")] = "causal_document",
    tokens_per_rank: Annotated[str, typer.Option(help="Tokens of each rank: 1024 or 1k.")] = "1k",
    heads: Annotated[str, typer.Option(help="Query and key heads.")] = "8:2",
    dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    documents: Annotated[
        str | None,
        typer.Option(help="Lengths of the documents, 500,300,224; like a corpus by default."),
    ] = None,
    ulysses: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a head group of usp and loongtrain.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls after one warm-up.")] = 5,
    backward: Annotated[bool, typer.Option(help="Also time gradients.")] = True,
    peer: Annotated[
        bool, typer.Option(help="Also torch's context_parallel and diffusers' schemes.")
    ] = True,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds after which a silent rank counts as lost.")
    ] = 600,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Result file; a run that was cut off goes on from it."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the table and the bytes sent as a page here."),
    ] = None,
) -> None:
    """Five schemes of context parallelism on the processes that torchrun started.

    [bold]Example[/]

      torchrun --nproc-per-node 4 -m regard bench parallel --mask causal --tokens-per-rank 1k
    """
    with one_voice():
        from regard.core.parallel import started
        from regard.lab.bench import parallel as bench
        from regard.lab.bench import parallel_page

        check_places(None, out, html)
        names = [n.strip() for n in schemes.split(",") if n.strip()]
        pair = pair_of(heads)
        rows = count(tokens_per_rank)
        bench.check(names, mask, pair, dtype)
        lengths = None
        if documents is not None:
            lengths = [count(n) for n in documents.split(",") if n.strip()]
            total = rows * int(os.environ.get("WORLD_SIZE", "1"))
            if sum(lengths) != total:
                raise InputError(
                    f"the documents have {sum(lengths)} tokens together, the ranks {total}: change "
                    "the lengths or --tokens-per-rank"
                )
        with started(timeout):
            result = bench.run(
                names,
                mask=mask,
                tokens_per_rank=rows,
                heads=pair,
                dim=dim,
                dtype=dtype,
                lengths=lengths,
                ulysses=ulysses,
                repeats=repeats,
                backward=backward,
                peer=peer,
                out=out,
                timeout=timeout,
            )
        if first_rank():
            from regard.report.screen import Console

            if html is not None:
                write_text(html, parallel_page.html(result))
            Console().print(parallel_page.table(result))


def plan(
    ranks: Annotated[int, typer.Option(min=1, help="How many devices.")],
    tokens: Annotated[str, typer.Option(help="Length of the sequence: 1M, 128k.")],
    heads: Annotated[str, typer.Option(help="Query and key heads.")] = "64:8",
    dim: Annotated[int, typer.Option(min=1, help="Size of a head.")] = 128,
    device: Annotated[
        str, typer.Option(help="a100, h100, h200, or TFLOP/s and GiB as 400:80.")
    ] = "h100",
    link: Annotated[
        str,
        typer.Option(help="Links within and between nodes: nvlink4:ib-ndr, or GB/s as 450:50."),
    ] = "nvlink4:ib-ndr",
    node: Annotated[int, typer.Option(min=1, help="Devices of a node.")] = 8,
    latency: Annotated[float, typer.Option(min=0, help="Microseconds of a message.")] = 10,
    efficiency: Annotated[
        float, typer.Option(help="Share of the device's peak that attention reaches.")
    ] = 0.6,
    reserve: Annotated[
        float, typer.Option(min=0, help="GiB of each device that the model and the rest take.")
    ] = 0,
    mask: Annotated[
        str, typer.Option(help="causal, full, causal_document or full_document.")
    ] = "causal",
    schemes: Annotated[str, typer.Option(help="Which schemes, by name.")] = SCHEMES,
    ulysses: Annotated[
        int | None, typer.Option(min=1, help="Ranks of a head group of usp and loongtrain.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE|-", help="Write the figures as JSON here; - for stdout."),
    ] = None,
) -> None:
    """Which scheme would be fastest on machines you do not have here, and where each hits a wall.

    Computed from byte and FLOP formulas and from the figures you give; nothing is measured.

    [bold]Example[/]

      regard bench plan --ranks 96 --tokens 1M --heads 64:8 --device h100 --link nvlink4:ib-ndr
    """
    from regard.lab.bench import plan as bench

    check_output(json)
    length = count(tokens)
    on = bench.machine(
        device, link, node=node, latency=latency, efficiency=efficiency, reserve=reserve
    )
    names = [n.strip() for n in schemes.split(",") if n.strip()]
    found = bench.plan(
        ranks,
        length,
        on,
        heads=pair_of(heads),
        dim=dim,
        mask=mask,
        schemes=names,
        ulysses=ulysses,
    )
    write_json(bench.as_dict(found, on), json)
    if json is None or str(json) != "-":
        from regard.report.screen import Console

        title = f"{mask}, {length:,} tokens on {ranks} x {device} ({link}), heads {heads} x {dim}"
        Console().print(bench.table(found, title))


def see_shared(model: Any, ids: Any, facts: Any, wanted: tuple[Any, Any], ranks: int) -> Any:
    """What `regard see --context-parallel` watches; the same call on every rank."""
    from regard.core.parallel import device, started
    from regard.watching.parallel import SharedWatch

    with started(ranks=ranks):
        where = device()
        watch = SharedWatch(
            model.to(where), facts, ids.to(where), layers=wanted[0], heads=wanted[1]
        )
        return watch.see()


def pair_of(heads: str) -> tuple[int, int]:
    """ "64:8" or "64" as query and key heads."""
    parts = heads.split(":")
    if len(parts) > 2 or not all(_count(p) for p in parts):
        raise InputError(f"--heads takes query and key heads such as 64:8, not {heads[:40]!r}")
    return int(parts[0]), int(parts[-1])


def _count(text: str) -> int:
    digits = text.strip()
    return int(digits) if digits.isdecimal() and len(digits) <= DIGITS else 0


def first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def one_voice(ranks: int | None = None) -> Iterator[None]:
    """What the user got wrong is said once, by the first rank; a lost rank is said by every one.

    Refuses at once where torchrun did not start the `ranks` that were asked for.
    """
    from regard.core.parallel import RankLost, expect

    try:
        expect(ranks)
        yield
    except RankLost as error:
        _tell_torchrun(error)
        raise
    except (InputError, ValueError) as error:
        if first_rank():
            _tell_torchrun(error)
            raise
        # torchrun ends all ranks with the first that ends: let rank 0 speak
        time.sleep(PATIENCE)
        sys.exit(2)


def _tell_torchrun(error: Exception) -> None:
    """Leave the message where torchrun looks for it: the summary it ends with then names the cause,
    in place of a trace of its own alone.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if place:
        said = f"regard: {error}"
        more = {"py_callstack": said, "timestamp": str(int(time.time()))}
        with suppress(OSError):  # the message is on stderr in any case
            write_text(Path(place), json.dumps({"message": {"message": said, "extraInfo": more}}))
