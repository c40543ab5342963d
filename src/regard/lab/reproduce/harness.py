"""Claims, their verdicts, and the run that turns one into the other.

A method's file lists its claims with the rule of each verdict, as text and as a function, before
anything is measured; `run` measures, settles every claim and writes `reproductions/<slug>.json`.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from regard import catalog, files
from regard.errors import InputError, nearest
from regard.lab.fingerprint import fingerprint
from regard.lab.journal import Journal
from regard.progress import bar
from regard.versions import versions
from regard.zoo.options import Loading, placed

VERDICTS = ("reproduced", "partly", "not reproduced", "needs scale")
MODEL = "smollm2-135m"
Judge = Callable[[dict[str, float]], str]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval of the measured value, or the p-value of a permutation test, or both."""

    kind: str
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and what became of it here.

    Attributes:
        key: short name, unique within the method.
        statement: what the paper claims; paper: its figure.
        rule: how numbers become the verdict, in words; judge: the same as a function of `values`.
        command: for a claim that needs scale, what to type on a big machine.
        built: False when that command does not exist yet.
        here: the measured value in words; control: that of the control; values: all numbers.

    >>> claim = Claim("x", "x grows", "+3", "reproduced if x > 0", lambda v: verdict(v["x"] > 0))
    >>> claim.settle({"x": 2.0}, here="+2", control="0").verdict
    'reproduced'
    """

    key: str
    statement: str
    paper: str
    rule: str
    judge: Judge | None = field(default=None, repr=False, compare=False)
    command: str | None = None
    built: bool = True
    here: str = ""
    control: str = ""
    interval: Interval | None = None
    values: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    verdict: str = ""

    def settle(
        self,
        values: dict[str, Any],
        *,
        here: str,
        control: str,
        interval: Interval | None = None,
        note: str = "",
    ) -> Claim:
        """The claim with its measurement, and the verdict that its own rule gives."""
        if self.judge is None:
            raise ValueError(
                f"the claim {self.key!r} needs scale: there is no rule to settle it by"
            )
        if any(isinstance(v, float) and math.isnan(v) for v in values.values()):
            raise ValueError(
                f"the claim {self.key!r} was measured as NaN: nothing can be concluded"
            )
        verdict = self.judge(values)
        if verdict not in VERDICTS:
            raise ValueError(f"{verdict!r} is no verdict: choose one of {', '.join(VERDICTS)}")
        return replace(
            self,
            values=values,
            here=here,
            control=control,
            interval=interval,
            note=note,
            verdict=verdict,
        )

    def unmeasured(self) -> Claim:
        """The claim as one that this machine cannot settle."""
        if self.command is None:
            raise ValueError(f"the claim {self.key!r} needs scale: say with which command")
        return replace(self, verdict="needs scale")

    def as_dict(self) -> dict[str, Any]:
        plain = {n: v for n, v in self.__dict__.items() if n != "judge"}
        return {**plain, "interval": asdict(self.interval) if self.interval else None}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Claim:
        interval = plain.get("interval")
        return cls(**{**plain, "interval": Interval(**interval) if interval else None})


@dataclass(frozen=True)
class Result:
    """What one method's claims came to, and everything needed to run them again."""

    slug: str
    title: str
    paper: str
    claims: list[Claim]
    model: str
    data: str
    seeds: dict[str, int]
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    commit: str | None
    source: str  # a fingerprint of the files that measured, for when the commit does not tell
    date: str
    seconds: float
    quick: bool
    command: str
    picture: str | None = None  # what the picture beside the result shows
    weights: str | None = None  # a fingerprint of the model's, None for results older than that

    @property
    def counts(self) -> dict[str, int]:
        """How many claims got which verdict."""
        return {v: sum(c.verdict == v for c in self.claims) for v in VERDICTS}

    def as_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "claims": [c.as_dict() for c in self.claims]}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Result:
        return cls(**{**plain, "claims": [Claim.from_dict(c) for c in plain["claims"]]})

    def write(self, folder: Path) -> Path:
        """Write `<slug>.json` (a quick run `<slug>.quick.json`) into the folder."""
        path = folder / f"{self.slug}{'.quick' if self.quick else ''}.json"
        write_text(path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
        return path


@dataclass
class Setup:
    """What a method's `measure` gets: the model, the size of the run, and a memory of its parts."""

    model: Any
    tokenizer: Any
    model_name: str
    quick: bool
    journal: Journal
    show: bool

    def progress(self, total: int, label: str) -> AbstractContextManager[Callable[[], None]]:
        """A bar on stderr, where that is a terminal; gives what to call after each step."""
        return bar(total, label, self.show)

    def parts(self, label: str, made: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """Parts by name, in order: from the journal, or measured now and put there."""
        with self.progress(len(made), label) as step:
            parts = {}
            for name, make in made.items():
                parts[name] = self.journal.get(name, make)
                step()
        return parts


@dataclass(frozen=True)
class Measured:
    """What a method's `measure` gives back: the settled claims, those that need scale left out;
    `picture` is a PIL image of real outputs and what it shows, written beside the result.
    """

    claims: Iterable[Claim]
    data: str
    seeds: dict[str, int]
    settings: dict[str, Any]
    picture: tuple[Any, str] | None = None


def available() -> list[str]:
    """The methods whose claims can be measured here, by the slug of `regard methods`."""
    return sorted(m.slug for m in catalog.everything() if m.has("claims"))


def run(
    slug: str,
    *,
    quick: bool = False,
    model: Any = None,
    loading: Loading | None = None,
    out: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Measure the claims of one method, and write the result.

    Args:
        slug: one of `available()`.
        quick: a much smaller run, to see that it works; its verdicts mean little, and its result
            goes to `<slug>.quick.json`.
        model: a name for `regard.load`, or a pair (model, tokenizer); the method's own if None.
        loading: device, dtype and the like of a model given by name.
        out: the folder of the result; `reproductions` of the clone, or of the working folder.
        progress: show a bar on stderr where that is a terminal.

    An interrupted run goes on where it stopped when it is called again.

    Raises:
        InputError: an unknown slug or model, a folder that cannot be written.
    """
    if slug not in available():
        raise InputError(f"there is no reproduction of {slug!r}.{nearest(slug, available())}")
    folder = files.check_folder(Path(out) if out is not None else results_folder())
    entry, loading = catalog.method(slug), loading or Loading()
    claims = entry.load("claims")
    default = getattr(claims, "MODEL", MODEL)
    if default is None and model is not None:
        raise InputError(f"{slug} measures attention alone: leave the model out")
    loaded, tokenizer, name = None, None, "none"
    if default is not None:
        loaded, tokenizer, name = _model(default if model is None else model, default, loading)
    source = fingerprint(f"{entry.package}.claims")
    weights = None if loaded is None else weights_of(loaded)
    key = {
        "slug": slug,
        "model": name,
        "weights": weights,
        "on": None if loaded is None else placed(loaded),
        "quick": quick,
        "source": source,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(folder / f".{slug}{'.quick' if quick else ''}.partial.json", key) as journal:
        measured = claims.measure(Setup(loaded, tokenizer, name, quick, journal, progress))
        settled = {c.key: c for c in measured.claims}
        if set(settled) != {c.key for c in claims.CLAIMS if c.judge}:
            raise ValueError(f"{slug} settled {[*settled]}, which are not the claims it had stated")
        result = Result(
            slug=slug,
            title=entry.card.paper.title,
            paper=entry.card.paper.url,
            claims=[settled[c.key] if c.judge else c.unmeasured() for c in claims.CLAIMS],
            model=name,
            data=measured.data,
            seeds=measured.seeds,
            settings=measured.settings,
            versions=versions(),
            device=device(loaded),
            commit=commit(),
            source=source,
            date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            seconds=round(journal.seconds, 1),
            quick=quick,
            command=_command(slug, quick, "none" if name == default else name, loading),
            picture=None if measured.picture is None else measured.picture[1],
            weights=weights,
        )
        if measured.picture is not None:
            picture = folder / f"{slug}{'.quick' if quick else ''}.png"
            files.write_bytes(picture, _few_colors(measured.picture[0]))
        result.write(folder)
        journal.clear()
    return result


def _few_colors(picture: Any) -> bytes:
    """A picture as a small PNG of 256 colours. They are chosen by coverage: median cut, the usual
    way, spends them on the many shades of a map, and a small thing takes another's colour.
    """
    from PIL.Image import Dither, Quantize

    kept = io.BytesIO()
    few = picture.convert("RGB").quantize(256, Quantize.MAXCOVERAGE, dither=Dither.NONE)
    few.save(kept, format="PNG", optimize=True)
    return kept.getvalue()


@contextmanager
def quiet(message: str) -> Iterator[None]:
    """Without the warnings that begin so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=message)
        yield


def verdict(whole: bool, half: bool = False) -> str:
    """ "reproduced" if the whole rule holds, "partly" if half of it does, else "not reproduced".

    >>> verdict(False, True)
    'partly'
    """
    return "reproduced" if whole else "partly" if half else "not reproduced"


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; a place that cannot be written to is the user's to mend."""
    try:
        files.write_text(path, text)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as problem:
        raise InputError(f"{path} cannot be written: {problem.strerror}") from None


# -- where and with what -----------------------------------------------------------------------
def root() -> Path | None:
    """The clone that this package lies in, None when it is installed elsewhere."""
    folder = Path(__file__).resolve().parents[4]
    return folder if (folder / "pyproject.toml").is_file() else None


def results_folder() -> Path:
    return (root() or Path.cwd()) / "reproductions"


def device(model: Any) -> str:
    """Device and dtype, with the name of the GPU or the number of CPU cores."""
    import torch

    body = getattr(model, "unet", None) or getattr(model, "transformer", None) or model
    where = torch.empty(0) if model is None else next(body.parameters())
    if where.device.type == "cuda":
        name = torch.cuda.get_device_name(where.device)
    else:
        name = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{where.device.type} ({name}), {str(where.dtype).removeprefix('torch.')}"


def commit() -> str | None:
    """The commit of the clone, marked when files differ from it; None outside a clone."""
    folder = root()
    if folder is None:
        return None

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "src")
    return f"{head}+changes" if head and changed else head


def weights_of(model: Any) -> str:
    """Twelve digits that change when a weight of a model, or of a pipeline's parts, does.

    >>> import torch
    >>> one = torch.nn.Linear(2, 2)
    >>> before = weights_of(one)
    >>> _ = one.bias.data.add_(1)
    >>> weights_of(one) == before
    False
    """
    import torch

    parts = {"": model} if isinstance(model, torch.nn.Module) else model.components
    mark = hashlib.sha256()
    for part in sorted(n for n, m in parts.items() if isinstance(m, torch.nn.Module)):
        for name, tensor in sorted(parts[part].state_dict().items()):
            mark.update(f"{part}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            mark.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return mark.hexdigest()[:12]


def _model(model: Any, default: str, loading: Loading) -> tuple[Any, Any, str]:
    """A model as it is given or named, its tokenizer and its name; a pipeline where the default
    is one.
    """
    if not isinstance(model, (str, os.PathLike)):
        loaded, tokenizer = model
        if not hasattr(loaded.config, "_name_or_path"):  # a diffusion pipeline
            return loaded, tokenizer, type(loaded).__name__
        # a folder is named, not where it lies: results are read on other machines
        return loaded, tokenizer, Path(loaded.config._name_or_path).name or type(loaded).__name__
    from regard.zoo.pipelines import is_pipeline

    if is_pipeline(model) and not is_pipeline(default):
        raise InputError(
            f"{model} is a diffusion pipeline: the claims need a model such as {default}"
        )
    if is_pipeline(default):
        return loading.pipeline(model), None, Path(model).name
    loaded, tokenizer = loading.load(model)
    if tokenizer is None:
        raise InputError(f"{model} carries no tokenizer, and the claims need texts")
    name = os.fspath(model)
    return loaded, tokenizer, Path(name).name if os.path.isdir(name) else name


def _command(slug: str, quick: bool, model: str, loading: Loading) -> str:
    words = ["regard", "reproduce", slug]
    if model not in (MODEL, "none"):
        words += ["--model", model]
    for option in fields(loading):
        value = getattr(loading, option.name)
        if value != option.default:
            words += [
                f"--{option.name.replace('_', '-')}",
                *([] if value is True else [str(value)]),
            ]
    return " ".join([*words, "--quick"] if quick else words)
