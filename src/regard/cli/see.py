"""regard see: exact facts and pictures of attention over a text."""

from __future__ import annotations

import inspect
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import parallel
from regard.cli.common import Loading, count, err, first_tokens, load, numbers, read_text
from regard.cli.pages import check_outputs, command, deliver
from regard.cli.taken import KINDS, taken
from regard.errors import InputError

DEFAULT = "smollm2-135m"
CLICKED = 128  # tokens of a text whose rows are all kept, for a click on the page
LONGEST = 256  # characters that a token stands for, at most: what is read for each
FACTS = ("mean_received", "entropy", "distance", "waad", "influence", "thumbnail")


def see(
    ctx: typer.Context,
    loading: Loading,
    text: Annotated[
        str,
        typer.Argument(
            help="The text itself, @file, @name of a shipped text, or - for standard input; or a "
            "file with a sound, a picture or a video, or a folder of pictures."
        ),
    ],
    question: Annotated[
        str | None, typer.Argument(help="With a picture: what to ask about it.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="A name of `regard models`, a folder or a hub id; smollm2-135m for text, "
            "whisper-tiny.en for sound and shapes-vlm for pictures if not given."
        ),
    ] = None,
    max_tokens: Annotated[
        str, typer.Option(help="Look at the first so many tokens at most (2k = 2048).")
    ] = "4k",
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report page here.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE|-", help="Write everything as JSON here; - for stdout."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Only these layers: 0,3,5-7.")] = None,
    heads: Annotated[str | None, typer.Option(help="Only these heads: 0,3,5-7.")] = None,
    facts: Annotated[
        str, typer.Option(help="Facts to measure, by name; fewer run faster.")
    ] = ",".join(FACTS),
    row: Annotated[
        list[str] | None,
        typer.Option(
            help="What this token looks at: a word of the text, word:1 for its second place, or a "
            "position (-1 the last). Can be given several times."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Also time the plain model, for the ratio.")
    ] = False,
    context_parallel: Annotated[
        int | None,
        typer.Option(min=1, help="Deal the text out to the processes that torchrun started."),
    ] = None,
    transcript: Annotated[
        str | None, typer.Option(help="Sound: look under this transcript, not the model's own.")
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="Sound: the language spoken (en, de, ...).")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Sound: transcribe or translate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Diffusion pipeline: seed of the image.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Diffusion pipeline: denoising steps.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Diffusion pipeline: guidance scale.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Diffusion pipeline: 512, or 768x512.")] = None,
    negative: Annotated[
        str | None, typer.Option(help="Diffusion pipeline: negative prompt.")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Diffusion pipeline: write the image here (.png)."),
    ] = None,
) -> None:
    """See what a model attends to, exactly, at any length.

    [bold]Examples[/]

      regard see "The cat sat on the mat because it was tired."

      regard see @book.txt --max-tokens 8k --html out.html --json out.json

      regard see "The cat sat because it was tired." --row it --html out.html

      regard see @northanger-abbey --model path/to/checkpoint --layers 0-3

      torchrun --nproc-per-node 4 -m regard see @book.txt --context-parallel 4

      regard see talk.wav --model whisper-tiny.en --html out.html

      regard see "a red circle left of a blue square" --model shapes-sd --html out.html

      regard see photo.png "what is left of the red circle?" --model shapes-vlm --html out.html
    """
    from regard.cli import see_diffusion, see_image, see_speech

    wanted = taken(text, model)
    refuse_unused(ctx, wanted.kind)
    if question is not None and wanted.kind != "picture":
        raise InputError("a second text is a question about a picture: name a picture first")
    if wanted.note and wanted.kind in ("sound", "picture"):
        err().print(f"note: {wanted.note}", markup=False, highlight=False)
    if wanted.kind == "sound":
        return see_speech.see_speech(
            wanted.given, model or see_speech.DEFAULT, loading, html=html, json=json,
            compare=compare, transcript=transcript, language=language, task=task,
        )  # fmt: skip
    if wanted.kind == "picture":
        return see_image.see(
            wanted.given, question, model or see_image.DEFAULT, loading, html=html, json=json
        )
    chosen = numbers(layers, "layers"), numbers(heads, "heads")
    if wanted.kind == "prompt":
        return see_diffusion.see(
            text, str(model), loading, html, json, *chosen, seed=seed, steps=steps,
            guidance=guidance, size=size, negative=negative, image=image,
        )  # fmt: skip
    names = [n.strip() for n in facts.split(",") if n.strip()]
    with parallel.one_voice(context_parallel) if context_parallel else nullcontext():
        _see(
            wanted.given, model or DEFAULT, loading, count(max_tokens), html, json, names, chosen,
            compare, context_parallel, row or [],
        )  # fmt: skip


# which kinds of input an option is for; those that are not named here are for all
FOR = {
    **dict.fromkeys(("max_tokens", "facts", "context_parallel", "row"), ("text",)),
    **dict.fromkeys(("layers", "heads"), ("text", "prompt")),
    "compare": ("text", "sound"),
    **dict.fromkeys(("transcript", "language", "task"), ("sound",)),
    **dict.fromkeys(("seed", "steps", "guidance", "size", "negative", "image"), ("prompt",)),
}


def refuse_unused(ctx: typer.Context, kind: str) -> None:
    """Refuse an option that was typed and does nothing with this kind of input."""
    for name, kinds in FOR.items():
        typed = getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"
        if typed and kind not in kinds:
            option = "--" + name.replace("_", "-")
            given = " or ".join(KINDS[k] for k in kinds)
            raise InputError(f"{option} is for {given}, and this is {KINDS[kind]}: leave it out")


def _see(
    text: str,
    model: str,
    loading: Loading,
    limit: int,
    html: Path | None,
    json: Path | None,
    names: list[str],
    wanted: tuple[Any, Any],
    compare: bool,
    ranks: int | None,
    asked: list[str],
) -> None:
    if asked and ranks is not None:
        raise InputError("--row reads one process: leave it out, or --context-parallel")
    if compare and ranks is not None:
        raise InputError("--compare times one process: leave it out, or --context-parallel")
    check_outputs(html, json)
    from regard.core import Rows

    content = read_text(text, LONGEST * limit + 1)
    loaded, tokenizer = load(model, loading)
    ids, notes = _tokens(content, loaded, tokenizer, limit)
    from regard.watching.tokens import pieces

    words = pieces(tokenizer, ids[0].tolist())
    chosen = [_positions(token, words) for token in asked]
    rows = tuple(range(len(words))) if len(words) <= CLICKED else tuple(sorted({*sum(chosen, ())}))
    if ranks is None:
        facts = [*names, *([Rows(rows)] if rows and "rows" not in names else [])]
        seen, meta = _run(loaded, ids, facts, wanted, compare)
    else:
        seen, meta = parallel.see_shared(loaded, ids, names, wanted, ranks), {}
        if not parallel.first_rank():
            return
    from regard.report import terminal, write_page
    from regard.watching.overview import overview

    page = overview(
        seen, tokens=words, model_name=model, notes=notes, command=command(), asked=chosen, **meta
    )
    deliver(page, notes, show=terminal.show, write_page=write_page, json=json, html=html)


def _positions(given: str, words: list[str]) -> tuple[int, ...]:
    """The tokens that `--row` means: a position, a word, or word:1 for its second place."""
    from regard.watching.rows import positions

    if given.lstrip("-").isdecimal():
        return positions(int(given), words)
    word, _, place = given.rpartition(":")
    if word and place.isdecimal():
        return positions(word, words, int(place))
    try:
        return positions(given, words)
    except InputError as error:
        raise InputError(str(error).replace("occurrence=", f"--row {given}:1")) from None


def _tokens(content: str, model: Any, tokenizer: Any, limit: int) -> tuple[Any, list[str]]:
    """Token ids `[1, tokens]`, cut to what the user and the model allow, and notes on what was
    cut.
    """
    if tokenizer is None or not hasattr(tokenizer, "decode") or not callable(tokenizer):
        raise InputError(f"{type(model).__name__} came without a tokenizer, so it cannot read text")
    import torch

    from regard.watching.tokens import reader

    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise InputError(
            f"{type(model).__name__} reads {model.main_input_name}, not text: "
            "give it a sound file such as talk.wav, or name a text model"
        )
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    room = getattr(text, "max_position_embeddings", None) or limit
    allowed = min(limit, room)
    ids, total = first_tokens(reader(tokenizer), content, allowed)
    cut = len(content) > LONGEST * limit
    if allowed < 2:
        raise InputError("attention needs at least two tokens: raise --max-tokens")
    if len(ids) < 2:
        raise InputError("attention needs at least two tokens: give a longer text")
    notes = []
    if cut or total is None or len(ids) < total:
        has = f"{total:,} tokens" if total is not None and not cut else f"more than {len(ids):,}"
        why = f"the model has {room:,} positions" if room <= limit else "raise it with --max-tokens"
        notes.append(f"the text has {has}; only the first {len(ids):,} were looked at ({why})")
    return torch.tensor([ids], device=model.device), notes


def _run(
    model: Any, ids: Any, facts: list[Any], wanted: tuple[Any, Any], compare: bool
) -> tuple[Any, dict[str, Any]]:
    """One watched forward with a progress bar, and what it cost."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from regard.reach import Handler, Session
    from regard.watching import watch

    keywords = {"input_ids": ids}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        keywords["logits_to_keep"] = 1  # the vocabulary is not what we look at
    if getattr(model.config, "is_encoder_decoder", False):
        keywords["decoder_input_ids"] = ids
    seen = watch(model, facts, layers=wanted[0], heads=wanted[1])
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err(), transient=True, disable=not err().is_terminal) as bar:
        task = bar.add_task(f"attention over {ids.shape[1]:,} tokens", total=len(seen.sites))

        class Tick(Handler):
            def after(self, call: Any, state: Any) -> None:
                bar.advance(task)

        with torch.no_grad(), seen, Session(model, [Tick()]):
            model(**keywords)
    plain = None
    if compare:
        with torch.no_grad():
            started = time.perf_counter()
            model(**keywords)
            plain = time.perf_counter() - started
    return seen, {"plain_seconds": plain, "peak_mib": _peak_mib()}


def _peak_mib() -> float | None:
    """Peak memory of this process so far, the model included."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
