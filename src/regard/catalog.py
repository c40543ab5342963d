"""Finding the methods: every folder of a verb that holds a `card.py`.

No list of methods is typed anywhere. A new folder appears in `regard methods`, in `regard run`,
`trial` and `reproduce`, in the exports of `regard`, in the README, in docs/methods.md and in the
matrix of tests.

`python -m regard.catalog FILE` writes the table as a page, into a README between its marks, or the
type stub of the package (.pyi); without FILE it prints the table.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from regard.cards import VERBS, Card, Checked
from regard.errors import InputError, nearest
from regard.files import write_text

VERDICTS = ("reproduced", "partly", "not reproduced", "needs scale")


@dataclass(frozen=True)
class Method:
    """A card and the package that it lies in, `regard.steer.act` for example."""

    card: Card
    package: str
    folder: Path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.card, name)

    def has(self, file: str) -> bool:
        """Whether the folder has this module."""
        return (self.folder / f"{file}.py").is_file()

    def load(self, file: str = "method") -> Any:
        """One of its modules, imported."""
        return import_module(f"{self.package}.{file}")

    @property
    def run(self) -> Any:
        """The class, or the function, that runs it."""
        if self.card.method is None:
            raise InputError(f"{self.card.slug} is planned, not built yet")
        return getattr(self.load(), self.card.method)

    @property
    def settings(self) -> type[Checked] | None:
        """The dataclass of its settings; None where there is nothing to set."""
        found: type[Checked] | None = getattr(self.load("card"), "Settings", None)
        return found

    @property
    def names(self) -> dict[str, str]:
        """What can be imported from `regard`: name -> module."""
        given = [*filter(None, [self.card.method]), *self.card.exports]
        pairs = [name.rpartition(".") for name in given]
        return {name: f"{self.package}.{file or 'method'}" for file, _, name in pairs}

    @property
    def status(self) -> str:
        """Whether it is "available" or only "planned"."""
        return "available" if self.has("method") or self.has("claims") else "planned"

    @property
    def reproduction(self) -> str:
        """What our own measurements say of the paper's claims, "-" where there are none."""
        package = Path(__file__).resolve().parent
        for folder in (package / "reproductions", package.parents[1] / "reproductions"):
            file = folder / f"{self.card.slug}.json"
            if file.is_file():
                return verdicts(json.loads(file.read_text(encoding="utf-8")))
        return "-"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        card, paper = self.card, self.card.paper
        return {
            "slug": card.slug,
            "name": card.name,
            "verb": card.verb,
            "does": card.does,
            "families": list(card.families),
            "title": paper.title,
            "authors": paper.authors,
            "year": paper.year,
            "arxiv": paper.arxiv,
            "url": paper.url,
            "status": self.status,
            "reproduction": self.reproduction,
            "exports": sorted(self.names),
        }


def verdicts(result: dict[str, object]) -> str:
    """Sum up a result file: how many claims got which verdict.

    >>> verdicts({"claims": [{"verdict": "partly"}, {"verdict": "reproduced"}]})
    '1 reproduced, 1 partly'
    """
    claims = result.get("claims")
    if not isinstance(claims, list):
        return str(result.get("verdict", "-"))
    counts = Counter(claim.get("verdict") for claim in claims if isinstance(claim, dict))
    return ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v]) or "-"


def everything() -> list[Method]:
    """The methods and the rules they are compared with, by verb, the built ones first."""
    known = []
    for verb in VERBS:
        package = import_module(f"regard.{verb}")
        folders = [f.parent for p in package.__path__ for f in Path(p).glob("*/card.py")]
        for folder in sorted(folders, key=lambda f: f.name):
            card = import_module(f"{package.__name__}.{folder.name}.card").CARD
            known.append(Method(card, f"{package.__name__}.{folder.name}", folder))
    return known


def methods() -> list[Method]:
    """All methods of the catalogue, in the order of the verbs.

    >>> "see" == methods()[0].verb
    True
    """
    return [m for m in everything() if not m.card.baseline]


def method(slug: str) -> Method:
    """The method of this slug.

    Raises:
        InputError: there is none.
    """
    known = {m.card.slug: m for m in everything()}
    if slug not in known:
        raise InputError(f"unknown method {slug!r}.{nearest(slug, known)}")
    return known[slug]


def exports(verb: str | None = None) -> dict[str, str]:
    """Names that `regard`, or the package of a verb, offers: name -> module."""
    found = [m.names for m in everything() if verb in (None, m.card.verb)]
    return {name: module for names in found for name, module in names.items()}


def lazy(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a verb's package: a name is imported when it is asked for."""
    verb = package.rpartition(".")[2]

    def get(name: str) -> Any:
        if not name.startswith("_"):
            known = exports(verb)
            if name in known:
                return getattr(import_module(known[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted(exports(verb))


# -- pages ---------------------------------------------------------------------------------------
def as_markdown() -> str:
    """The catalogue as a Markdown page."""
    rows = methods()
    ready = sum(row.status == "available" for row in rows)
    lines = [
        "<!-- Made by `make docs` from the cards in src/regard. Do not edit by hand. -->",
        "",
        "# Methods",
        "",
        f"{len(rows)} methods, {ready} of them available so far. The last column sums up what our "
        "own measurements say of the paper's claims; `-` means that nothing has been measured yet.",
    ]
    for verb, promise in VERBS.items():
        lines += [
            "",
            f"## {verb}: {promise}",
            "",
            "| method | what it does | models | paper | status | reproduced? |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            if row.verb == verb:
                paper = row.paper
                cited = f"[{paper.title}]({paper.url}), {paper.authors} {paper.year}"
                lines.append(
                    f"| {row.name} (`{row.slug}`) | {row.does} | {', '.join(row.families)} "
                    f"| {cited} | {row.status} | {row.reproduction} |"
                )
    return "\n".join(lines) + "\n"


MARKS = ("<!-- methods: made by `make docs` -->", "<!-- end of methods -->")


def into_readme(readme: str) -> str:
    """The README with the short catalogue renewed between its two marks."""
    head, _, rest = readme.partition(MARKS[0])
    _, _, tail = rest.partition(MARKS[1])
    lines = ["| verb | what a person gets | methods |", "| --- | --- | --- |"]
    for verb, promise in VERBS.items():
        names = [
            f"**{row.slug}**" if row.status == "available" else row.slug
            for row in methods()
            if row.verb == verb
        ]
        lines.append(f"| **{verb}** | {promise} | {', '.join(names)} |")
    table = "\n".join(lines)
    return f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{tail}"


def stub() -> str:
    """The type stub of `regard`: what its lazy names are, for editors and type checkers."""
    package: Any = import_module("regard")
    lines = [
        "# Made by `make docs` from the cards; not edited by hand.",
        "",
        "__version__: str",
        "",
    ]
    named = sorted({**package._LAZY, **exports()}.items(), key=lambda pair: (pair[1], pair[0]))
    lines += [f"from {module} import {name} as {name}" for name, module in named]
    for name, module in sorted(package._MODULES.items()):
        parent, _, leaf = module.rpartition(".")
        lines.append(f"from {parent} import {leaf} as {name}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Print the catalogue, or write it to the file named; into a README, between its marks."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) > 1:
        print("usage: python -m regard.catalog [FILE]", file=sys.stderr)
        return 2
    page = as_markdown()
    if not arguments:
        print(page, end="")
        return 0
    path = Path(arguments[0])
    if path.suffix == ".pyi":
        page = stub()
    elif path.is_file() and MARKS[0] in (old := path.read_text(encoding="utf-8")):
        page = into_readme(old)
    try:
        write_text(path, page)
    except OSError as problem:
        print(f"Cannot write {path}: {problem.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
