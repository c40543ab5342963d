"""A fingerprint of the code that a measurement uses, so that a change of it is noticed.

It follows the imports of this package, those inside functions too, and reads what they say: neither
comments, docstrings and layout nor the words of an error, a card or a help line count. What lists,
prints and draws is left out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regard import catalog

PACKAGE = Path(__file__).resolve().parents[1]
LEFT_OUT = (
    *("cli", "report", "studio", "catalog", "errors", "files", "progress", "versions"),
    *("lab.fingerprint", "lab.journal"),
)
"""Parts of the package that no number depends on, beside the pages and summaries of `lab`."""


def fingerprint(*modules: str, data: Any = None) -> str:
    """Twelve digits that change with the code of these modules, and of all that they import.

    Args:
        modules: their names, `regard.steer.act.claims` for example.
        data: what is measured, as JSON values.

    >>> fingerprint("regard.core.state") == fingerprint("regard.core.state", data=["a text"])
    False
    """
    mark = hashlib.sha256(json.dumps(data).encode())
    for name, path in sorted(sources(modules).items()):
        mark.update(f"{name} {_read(path, path.stat().st_mtime_ns)[0]}".encode())
    return mark.hexdigest()[:12]


def sources(modules: Iterable[str]) -> dict[str, Path]:
    """The files of some modules and of those that they import, by the modules' names."""
    files: dict[str, Path] = {}
    todo = list(modules)
    while todo:
        name = todo.pop()
        path = _file(name)
        if name in files or path is None or _left_out(name):
            continue
        files[name] = path
        for base, imported in _read(path, path.stat().st_mtime_ns)[1]:
            todo += _meant(_absolute(base, name, path), imported)
    return files


def _file(name: str) -> Path | None:
    """The file of a module; None where there is none, or not in this package."""
    first, *rest = name.split(".")
    if first != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*rest)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def _left_out(name: str) -> bool:
    _, _, place = name.partition(".")
    if not place or any(place == part or place.startswith(f"{part}.") for part in LEFT_OUT):
        return True
    return place.startswith("lab.") and place.endswith(("page", "pages", "summary"))


def _absolute(base: str, module: str, path: Path) -> str:
    """The module that a base such as ".card" means in a module."""
    level = len(base) - len(base.lstrip("."))
    if not level:
        return base
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    return ".".join([*package[: len(package) - level + 1], *filter(None, [base[level:]])])


def _meant(base: str, imported: str | None) -> list[str]:
    """The modules that `from base import imported` reads."""
    if imported is None:
        return [base]
    if _file(f"{base}.{imported}") is not None:
        return [f"{base}.{imported}"]
    # names that a package brings when they are asked for
    known = catalog.names().get(imported) if base.count(".") < 2 else None
    return [base] if known is None else [base, known]


@functools.lru_cache(maxsize=1024)
def _read(path: Path, changed: int) -> tuple[str, list[tuple[str, str | None]]]:
    """What a file says, as a digest, and what it imports: (module, name or None)."""
    tree = _Plain(path.name == "card.py").visit(ast.parse(path.read_text(encoding="utf-8")))
    imports: list[tuple[str, str | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            imports += [(base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            imports += [(node.value.id, node.attr)] if node.value.id == PACKAGE.name else []
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest(), imports


class _Plain(ast.NodeTransformer):
    """Takes out what no number depends on."""

    def __init__(self, card: bool) -> None:
        self.card = card

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        words = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if words else self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        if isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        return node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return None
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        named = isinstance(node.targets[0], ast.Name) and node.targets[0].id
        return None if self.card and named == "CARD" else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if self.card and isinstance(node.func, ast.Name) and node.func.id == "setting":
            del node.args[1:]  # the line of help
        return self.generic_visit(node)
