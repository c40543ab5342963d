"""regard bench: what things cost, measured in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regard.cli.common import check_output, count
from regard.errors import InputError

app = typer.Typer(help="Measure what things cost, in one run and one table.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Measure what things cost, in one run and one table."""


@app.command("see")
def see(
    lengths: Annotated[
        str, typer.Option(help="Lengths in tokens, for example 1k,2k,4k,8k.")
    ] = "1k,2k,4k",
    model: Annotated[
        str, typer.Option(help="A name of `regard models`, a folder or a hub id.")
    ] = "smollm2-135m",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repetitions of each cell.")] = 3,
    peer: Annotated[
        str | None, typer.Option(help="Also a peer library: nnsight or transformer_lens.")
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="The Python that has the peer installed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Result file; a run that was cut off goes on from it.")
    ] = None,
) -> None:
    """What watching costs: the fused model alone, with each fact, the eager route, and a peer.

    [bold]Example[/]

      regard bench see --lengths 1k,2k,4k,8k
    """
    from rich.console import Console

    sizes = [count(n) for n in lengths.split(",") if n.strip()]
    if not sizes:
        raise InputError("--lengths is empty: write, for example, 1k,2k,4k")
    check_output(out)
    from regard.bench import see as bench

    result = bench.run(
        lengths=sizes,
        model=model,
        repeats=repeats,
        peer=peer,
        peer_python=None if peer_python is None else str(peer_python),
        out=out,
    )
    Console().print(bench.table(result))
