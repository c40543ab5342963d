"""regard bench: what things cost, measured in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import bench_costs, parallel
from regard.cli.common import check_file, count, write_json
from regard.cli.derive import Commands
from regard.cli.pages import check_places
from regard.cli.parallel import pair_of
from regard.errors import InputError
from regard.zoo.options import Loading

app = Commands("Measure what things cost, in one run and one table.")


@app.command("see")
def see(
    lengths: Annotated[
        str, typer.Option(help="Lengths in tokens, for example 1k,2k,4k,8k.")
    ] = "1k,2k,4k",
    model: bench_costs.Model = "smollm2-135m",
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repetitions of each cell.")] = 3,
    peer: Annotated[
        str | None, typer.Option(help="Also a peer library: nnsight or transformer_lens.")
    ] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="The Python that has the peer installed.")
    ] = None,
    out: bench_costs.Out = None,
    *,
    loading: Loading,
) -> None:
    """What watching costs: the fused model alone, with each fact, the eager route, and a peer.

    [bold]Example[/]

      regard bench see --lengths 1k,2k,4k,8k
    """
    from regard.report.screen import Console

    sizes = [count(n) for n in lengths.split(",") if n.strip()]
    if not sizes:
        raise InputError("--lengths is empty: write, for example, 1k,2k,4k")
    check_file(out)
    from regard.lab.bench import see as bench

    result = bench.run(
        lengths=sizes,
        model=model,
        repeats=repeats,
        loading=loading,
        peer=peer,
        peer_python=None if peer_python is None else str(peer_python),
        out=out,
    )
    Console().print(bench.table(result))


masks_app = Commands("The named masks.")
app.add_typer(masks_app, name="masks")
parallel.app_commands(app)
bench_costs.app_commands(app)

Masks = Annotated[
    str,
    typer.Option(
        help="Names or groups (all, static, dynamic, regular, heterogeneous), with parameters if "
        "wanted: block_sparse:block=64,density=0.1"
    ),
]
Lengths = Annotated[str, typer.Option(help="Lengths in tokens, for example 1k,4k,16k.")]
Kernels = Annotated[str, typer.Option(help="Names, or all; an unknown name lists them.")]
Backward = Annotated[bool, typer.Option("--backward", help="Also gradients of q, k and v.")]
Heads = Annotated[str, typer.Option(help="Query heads:key heads.")]
Dim = Annotated[int, typer.Option(min=1, help="Size of one head.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed calls of each cell, in turns.")]
Memory = Annotated[float, typer.Option(min=0.001, help="GiB above which a call is not started.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads of torch.")]
Seed = Annotated[int, typer.Option(help="Of tensors and drawn masks.")]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Result file (JSON); a run that was cut off goes on from it."
    ),
]
Html = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the tables and plots as a page here.")
]


@app.command("kernels")
def bench_kernels(
    masks: Masks = "all",
    lengths: Lengths = "1k,4k",
    kernels: Kernels = "all",
    backward: Backward = False,
    heads: Heads = "8:2",
    dim: Dim = 64,
    dtype: Dtype = "float32",
    device: Device = None,
    rounds: Rounds = 5,
    memory_limit: Memory = 4.0,
    threads: Threads = None,
    seed: Seed = 42,
    kernel_file: Annotated[
        list[str] | None,
        typer.Option(help="Your own kernel beside the rest: mykernel.py:function (runs the file)."),
    ] = None,
    out: Out = None,
    html: Html = None,
) -> None:
    """Attention kernels on masks and lengths: throughput on allowed pairs, memory, support, error.

    What a kernel cannot do is in the table with its reason; so is what would not fit in memory.

    [bold]Example[/]

      regard bench kernels --masks all --lengths 1k,4k --backward --html kernels.html
    """
    from regard.report.screen import Console

    sizes = [count(n) for n in lengths.split(",") if n.strip()]
    if not sizes:
        raise InputError("--lengths is empty: write, for example, 1k,4k")
    check_places(None, out, html)
    from regard.lab.bench import kernels as bench
    from regard.lab.bench import kernels_page
    from regard.lab.bench.registry import load

    result = bench.run(
        masks=masks,
        lengths=sizes,
        kernels=kernels,
        extra=[load(f) for f in kernel_file or []],
        heads=pair_of(heads),
        dim=dim,
        dtype=dtype,
        device=device,
        backward=backward,
        rounds=rounds,
        seed=seed,
        memory_limit=memory_limit,
        threads=threads,
        out=out,
    )
    _write_html(kernels_page.html(result) if html else "", html)
    Console().print(kernels_page.table(result))


@app.command("facts")
def facts(
    lengths: Lengths = "1k,4k",
    heads: Heads = "16:4",
    dim: Dim = 64,
    dtype: Dtype = "float32",
    device: Device = None,
    rounds: Rounds = 7,
    model: Annotated[
        bool, typer.Option("--model/--no-model", help="Also a whole model of SmolLM2's shape.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    out: bench_costs.Out = None,
    page: bench_costs.Page = None,
) -> None:
    """What exact facts cost beside fused attention, for one call and for a whole model.

    [bold]Example[/]

      regard bench facts --lengths 16k,32k,64k --dtype bfloat16 --device cuda
    """
    from regard.lab.bench import facts as bench
    from regard.report.screen import Console

    check_places(None, out, page)
    result = bench.run(
        [count(n) for n in lengths.split(",") if n.strip()],
        heads=pair_of(heads),
        dim=dim,
        dtype=dtype,
        device=device,
        rounds=rounds,
        seed=seed,
        model=model,
        out=out,
    )
    Console().print(bench.table(result))
    bench_costs.finish(bench, result, out, page)


@app.command("add")
def add(
    kernel: Annotated[
        list[str], typer.Argument(help="mykernel.py:function, one or several (runs the file).")
    ],
    masks: Masks = "causal,sliding_window_causal,causal_document",
    lengths: Lengths = "1k,2k",
    kernels: Kernels = "attend,sdpa,naive",
    backward: Backward = False,
    heads: Heads = "8:2",
    dim: Dim = 64,
    dtype: Dtype = "float32",
    device: Device = None,
    rounds: Rounds = 5,
    memory_limit: Memory = 4.0,
    threads: Threads = None,
    seed: Seed = 42,
    out: Out = None,
    html: Html = None,
) -> None:
    """Your own kernel beside the rest, for this run only: nothing is installed or remembered.

    The function is fn(q, k, v, mask) -> out or (out, lse); raise NotImplementedError, with the
    reason, for what it does not do.

    [bold]Example[/]

      regard bench add mykernel.py:attention --masks all --backward
    """
    bench_kernels(
        masks, lengths, kernels, backward, heads, dim, dtype, device, rounds, memory_limit,
        threads, seed, kernel, out, html,
    )  # fmt: skip


@masks_app.command("show")
def show(
    masks: Annotated[str, typer.Argument(help="Names or groups.")] = "all",
    size: Annotated[int, typer.Option(min=4, max=256, help="Tokens of the drawing.")] = 32,
    seed: Seed = 42,
    html: Html = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE|-", help="Write names, parameters and areas as JSON; - for stdout."
        ),
    ] = None,
) -> None:
    """Draw the named masks, with their definitions.

    [bold]Example[/]

      regard bench masks show --html masks.html
    """
    from regard.report.screen import Console

    check_places(json, html)
    from regard.lab.bench import patterns_page

    made = patterns_page.cases(masks, size, seed)
    _write_html(patterns_page.html(made) if html else "", html)
    rows = [
        {"name": c.name, "parameters": c.parameters, "tokens": c.total, "area": c.area}
        for c in made
    ]
    write_json(rows, json)
    if json is None or str(json) != "-":
        Console().print(patterns_page.table(made))


def _write_html(text: str, path: Any) -> None:
    if path is not None:
        from regard.lab.bench.record import write_text

        write_text(path, text)
