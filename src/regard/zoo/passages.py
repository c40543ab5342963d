"""The public-domain texts that are shipped with the package."""

from __future__ import annotations

from importlib import resources

from regard.errors import InputError, nearest


def texts() -> list[str]:
    """Return the names of the shipped texts.

    >>> texts()
    ['northanger-abbey']
    """
    folder = resources.files("regard.zoo") / "texts"
    return sorted(f.name[: -len(".txt")] for f in folder.iterdir() if f.name.endswith(".txt"))


def text(name: str) -> str:
    """Return a shipped text by name; InputError for a name that is not in `texts()`.

    >>> text("northanger-abbey")[:16]
    'NORTHANGER ABBEY'
    """
    # Only listed names are opened, so a name can never point outside the folder.
    if name not in texts():
        raise InputError(f"There is no shipped text {name!r}.{nearest(name, texts())}")
    return (resources.files("regard.zoo") / "texts" / f"{name}.txt").read_text(encoding="utf-8")
