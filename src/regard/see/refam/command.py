"""regard run refam: what an expression refers to in an image or a short clip."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.pages import check_places
from regard.errors import InputError
from regard.files import write_bytes, write_text
from regard.zoo.options import Loading, placed

from .card import Settings

MOST = 300  # frames of a clip


def run(
    text: Annotated[str, typer.Argument(help='What to point at: "the blue square on the left".')],
    settings: Settings,
    loading: Loading,
    image: Annotated[
        Path, typer.Option(help="An image; an animated one, or a folder of frames, is a clip.")
    ],
    model: Annotated[
        str, typer.Option(help="A Stable Diffusion 3 or Flux pipeline: name, folder or hub id.")
    ] = "shapes-dit",
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the mask here (.png; of a clip an animated one)."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with every map here.")
    ] = None,
    json: diffusion.Json = None,
) -> None:
    """RefAM: point at what an expression refers to, without any training.

    The image is noised and read once by the diffusion transformer; the attention of its pixels on
    the words of the expression gives a heat map, a point and a mask.
    """
    from .method import RefAM

    method = RefAM(**settings.settings())
    method.chosen(text)
    check_places(json, mask, html)
    if mask is not None and mask.suffix.lower() not in (".png", ".gif"):
        raise InputError(f"--mask is a .png or .gif file, not {mask}")
    frames = _frames(image)
    pipe = diffusion.load(model, loading)
    _ = method.segment  # one that cannot be loaded is refused before any work
    groundings, seconds = _ground(method, pipe, frames, text)
    result = _result(text, model, method, groundings, seconds, placed(pipe))
    if mask is not None:
        _save(mask, [g.mask for g in groundings])
    if html is not None:
        write_text(html, _page(result, frames, groundings))
    lines = [f"words: {', '.join(result['content'])}"]
    for n, frame in enumerate(result["frames"]):
        x, y = frame["point"]
        lines.append(f"frame {n}: column {x}, row {y}; mask {frame['share']:.1%} of the image")
    lines += [
        f"global attention sinks: {_sinks(result)}",
        f"padding's share of the attention to text: {result['padding']:.3f}",
        diffusion.loaded_as(model, pipe),
    ]
    diffusion.finish(result, json, lines, result["notes"])


def _frames(path: Path) -> list[Any]:
    """The pictures of a file or a folder, in order, as RGB.

    Raises:
        InputError: nothing there that is a picture, or too many of them.
    """
    from PIL import Image, ImageSequence

    path = path.expanduser()
    if not path.exists():
        raise InputError(f"there is no image {path}: name a picture, or a folder of frames")
    frames: list[Any] = []
    for one in diffusion.pictures(path) if path.is_dir() else [path]:
        try:
            with Image.open(one) as opened:
                for frame in ImageSequence.Iterator(opened):
                    frames.append(frame.convert("RGB"))
                    if len(frames) > MOST:
                        raise InputError(f"{path} has more than {MOST} frames: cut the clip")
        except (OSError, SyntaxError, Image.DecompressionBombError) as problem:
            raise InputError(f"{one} cannot be read as an image: {problem}") from None
    return frames


def _ground(method: Any, pipe: Any, frames: list[Any], text: str) -> tuple[list[Any], float]:
    from regard.progress import bar

    started = time.perf_counter()
    groundings = []
    with bar(len(frames), "frames") as advance:
        for frame in frames:
            groundings.append(method.ground(pipe, frame, text))
            advance()
    return groundings, time.perf_counter() - started


def _result(
    text: str, model: str, method: Any, groundings: list[Any], seconds: float, loaded: str
) -> dict[str, Any]:
    """Everything as plain data; sinks and padding are those of the first frame."""
    frames = [g.report() for g in groundings]
    first = dict(frames[0])
    per_frame = ("point", "share", "heat", "words")
    return {
        "text": text,
        **{name: first[name] for name in ("content", "sinks", "padding")},
        "frames": [{name: frame[name] for name in per_frame} for frame in frames],
        "seconds": seconds,
        "settings": {
            "model": model,
            **{n: v for n, v in method.settings().items() if n != "stop_words"},
            "parser": method.parser_and_note[0],
        },
        "loaded": loaded,
        "notes": list(dict.fromkeys(note for frame in frames for note in frame["notes"])),
    }


def _sinks(result: dict[str, Any]) -> str:
    return ", ".join(sorted({s["word"] for s in result["sinks"] if s["sink"]})) or "none"


def _save(path: Path, masks: list[Any]) -> None:
    from PIL import Image

    images = [Image.fromarray(m.numpy().astype("uint8") * 255, "L") for m in masks]
    buffer = io.BytesIO()
    kind = "GIF" if path.suffix.lower() == ".gif" else "PNG"
    more = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(buffer, format=kind, **more)
    write_bytes(path, buffer.getvalue())


def _page(result: dict[str, Any], frames: list[Any], groundings: list[Any]) -> str:
    from PIL import Image

    from regard.report.contact import figure, heat, marked, page

    sections: dict[str, list[str]] = {}
    wide = max(128, min(512, frames[0].width))
    for n, (frame, g) in enumerate(zip(frames, groundings)):
        tall = max(1, round(wide * frame.height / frame.width))
        shown = frame.resize((wide, tall), Image.Resampling.NEAREST)
        at = (round(g.point[0] * wide / frame.width), round(g.point[1] * tall / frame.height))
        dim = Image.blend(shown, Image.new("RGB", shown.size), 0.7)
        mask = Image.fromarray(g.mask.numpy().astype("uint8") * 255, "L").resize(shown.size)
        cut = Image.composite(shown, dim, mask)
        figures = [
            figure(marked(shown, at), f"point: column {g.point[0]}, row {g.point[1]}"),
            figure(heat(g.heat, (wide, tall)), "heat: " + ", ".join(g.content)),
            figure(cut, "mask"),
        ]
        if n == 0:
            figures += [figure(heat(m, (wide // 2, tall // 2)), w) for w, m in g.words]
        sections[f"frame {n}"] = figures
    settings = result["settings"]
    notes = [
        f"{settings['model']}, {result['seconds']:.1f} s, magnets: "
        f"{', '.join(settings['magnets']) or 'none'}; global attention sinks: {_sinks(result)}; "
        "padding's share of the attention to text: "
        f"{result['padding']:.3f}. Attention is attribution: a mask of it is a guess.",
        *result["notes"],
    ]
    return page(result["text"], notes, sections)


COMMANDS = {"run": run}
