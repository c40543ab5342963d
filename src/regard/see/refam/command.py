"""regard run refam: what an expression refers to in an image or a short clip."""

from __future__ import annotations

import dataclasses
import io
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli import diffusion
from regard.cli.common import err, numbers, write_json
from regard.cli.pages import check_places
from regard.errors import InputError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MOST = 300  # frames of a clip


def run(
    text: Annotated[str, typer.Argument(help='What to point at: "the blue square on the left".')],
    image: Annotated[
        Path, typer.Option(help="An image; an animated one, or a folder of frames, is a clip.")
    ],
    model: Annotated[
        str, typer.Option(help="A Stable Diffusion 3 or Flux pipeline: name, folder or hub id.")
    ] = "shapes-dit",
    mask: Annotated[
        Path | None, typer.Option(help="Write the mask here (.png; of a clip an animated one).")
    ] = None,
    magnets: Annotated[
        str | None, typer.Option(help='Words put behind the expression; "" for none.')
    ] = None,
    segmenter: Annotated[
        str, typer.Option(help="Who makes the mask from the point: threshold, sam or sam2.")
    ] = "threshold",
    gas: Annotated[
        str, typer.Option(help="Global attention sinks: off, suppress or redirect.")
    ] = "suppress",
    noise: Annotated[float, typer.Option(help="Time of the noised image, 0 to 1.")] = 0.5,
    draws: Annotated[int, typer.Option(min=1, help="Noises to average.")] = 1,
    layers: Annotated[
        str | None, typer.Option(help="Layers to average, such as 2,4-7 (the last 60 %).")
    ] = None,
    parser: Annotated[
        str | None, typer.Option(help="spacy, constituency or rules (spacy when installed).")
    ] = None,
    noun_phrase: Annotated[bool, typer.Option(help="Sum the head noun phrase alone.")] = True,
    spatial_bias: Annotated[bool, typer.Option(help="Weigh by left, right, top ...")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write a page with every map here.")] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything as JSON here; - for stdout.")
    ] = None,
) -> None:
    """RefAM: point at what an expression refers to, without any training.

    The image is noised and read once by the diffusion transformer; the attention of its pixels on
    the words of the expression gives a heat map, a point and a mask.

    [bold]Examples[/]

      regard run refam "the small blue square on the left" --image scene.png --mask mask.png

      regard run refam "the man in the red hat" --image street.jpg --segmenter sam --html page.html
      --model black-forest-labs/FLUX.1-schnell
    """
    from regard.see.refam.method import MAGNETS, RefAM

    notes: list[str] = []
    method = RefAM(
        magnets=list(MAGNETS) if magnets is None else magnets.replace(",", " ").split(),
        segmenter=segmenter,
        gas=gas,
        noise=noise,
        draws=draws,
        layers=numbers(layers, "layers"),
        noun_phrase=noun_phrase,
        spatial_bias=spatial_bias,
        parser=parser or _parser(notes),
        seed=seed,
    )
    method.chosen(text)
    check_places(json, mask, html)
    if mask is not None and mask.suffix.lower() not in (".png", ".gif"):
        raise InputError(f"--mask is a .png or .gif file, not {mask}")
    frames = _frames(image)
    pipe = diffusion.load(model)
    if segmenter != "threshold":
        from regard.see.refam.method import sam

        method = dataclasses.replace(method, segmenter=sam(segmenter))
    found, seconds = _ground(method, pipe, frames, text)
    result = _result(text, model, segmenter, method, found, seconds, notes)
    if mask is not None:
        _save(mask, [g.mask for g in found])
    if html is not None:
        from regard.files import write_text

        write_text(html, _page(result, frames, found))
    write_json(result, json)
    for note in result["notes"]:
        err().print(f"note: {note}", markup=False, highlight=False)
    if json is None or str(json) != "-":
        print(f"words: {', '.join(result['content'])}")
        for n, frame in enumerate(result["frames"]):
            x, y = frame["point"]
            print(f"frame {n}: column {x}, row {y}; mask {100 * frame['share']:.1f} % of the image")
        named = sorted({s["word"] for s in result["sinks"] if s["sink"]})
        print(f"global attention sinks: {', '.join(named) or 'none'}")
        print(f"padding's share of the attention to text: {result['padding']:.3f}")


def _parser(notes: list[str]) -> str:
    from regard.parts.text.phrases import noun_phrases

    try:
        noun_phrases("a", "spacy")
    except ImportError as problem:
        notes.append(f"phrases by the plain rule ({problem})")
        return "rules"
    return "spacy"


def _frames(path: Path) -> list[Any]:
    """The pictures of a file or a folder, in order, as RGB.

    Raises:
        InputError: nothing there that is a picture, or too many of them.
    """
    from PIL import Image, ImageSequence

    path = path.expanduser()
    if not path.exists():
        raise InputError(f"there is no image {path}: name a picture, or a folder of frames")
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not paths:
            raise InputError(f"{path} holds no pictures ({', '.join(PICTURES)})")
    frames: list[Any] = []
    for one in paths:
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
    found = []
    with bar(len(frames), "frames") as advance:
        for frame in frames:
            found.append(method.ground(pipe, frame, text))
            advance()
    return found, time.perf_counter() - started


def _result(
    text: str,
    model: str,
    segmenter: str,
    method: Any,
    found: list[Any],
    seconds: float,
    notes: list[str],
) -> dict[str, Any]:
    return {
        "text": text,
        "content": found[0].content,
        "frames": [
            {
                "point": list(g.point),
                "share": float(g.mask.float().mean()),
                "heat": [[float(f"{v:.4g}") for v in row] for row in g.heat.tolist()],
                "words": [{"word": w, "mean": float(m.mean())} for w, m in g.words],
            }
            for g in found
        ],
        "sinks": [dataclasses.asdict(s) for s in found[0].sinks],
        "padding": found[0].padding,
        "seconds": seconds,
        "settings": {
            "model": model,
            "magnets": list(method.magnets),
            "gas": method.gas,
            "noise": method.noise,
            "draws": method.draws,
            "segmenter": segmenter,
            "parser": method.parser,
            "seed": method.seed,
        },
        "notes": [*notes, *(n for g in found for n in g.notes)],
    }


def _save(path: Path, masks: list[Any]) -> None:
    from PIL import Image

    from regard.files import write_bytes

    images = [Image.fromarray(m.numpy().astype("uint8") * 255, "L") for m in masks]
    buffer = io.BytesIO()
    kind = "GIF" if path.suffix.lower() == ".gif" else "PNG"
    more = {"save_all": True, "append_images": images[1:]} if len(images) > 1 else {}
    images[0].save(buffer, format=kind, **more)
    write_bytes(path, buffer.getvalue())


def _page(result: dict[str, Any], frames: list[Any], found: list[Any]) -> str:
    from PIL import Image

    from regard.report.contact import figure, heat, marked, page

    sections: dict[str, list[str]] = {}
    wide = max(128, min(512, frames[0].width))
    for n, (frame, g) in enumerate(zip(frames, found)):
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
    sinks = sorted({s["word"] for s in result["sinks"] if s["sink"]})
    notes = [
        f"{settings['model']}, {result['seconds']:.1f} s, magnets: "
        f"{', '.join(settings['magnets']) or 'none'}; global attention sinks: "
        f"{', '.join(sinks) or 'none'}; padding's share of the attention to text: "
        f"{result['padding']:.3f}. Attention is attribution: a mask of it is a guess.",
        *result["notes"],
    ]
    return page(result["text"], notes, sections)


COMMANDS = {"run": run}
