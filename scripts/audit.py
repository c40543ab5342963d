"""The versions to audit: constraints.txt as it is, and the lower bounds of pyproject.toml.

    python scripts/audit.py bounds      the lower bounds, as a requirements file, on stdout
    python scripts/audit.py check       whether constraints.txt satisfies the bounds

`make audit` gives both lists to pip-audit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def required() -> Iterator[Requirement]:
    """What regard and its extras ask for on this Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *(r for name in extras for r in extras[name])):
        one = Requirement(text)
        if one.name != project["name"] and (one.marker is None or one.marker.evaluate()):
            yield one


def bounds() -> dict[str, str]:
    """The lower bound of each package, the highest where several are stated."""
    from packaging.version import Version

    least: dict[str, str] = {}
    for one in required():
        for bound in one.specifier:
            if bound.operator in (">=", "=="):
                name = canonicalize_name(one.name)
                least[name] = max(least.get(name, "0"), bound.version, key=Version)
    return least


def pinned() -> dict[str, str]:
    """The versions of constraints.txt on this Python."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate():
                found[canonicalize_name(one.name)] = next(iter(one.specifier)).version
    return found


def unsatisfied() -> list[str]:
    """Constraints outside of what pyproject.toml asks for."""
    pins = pinned()
    return [
        f"{one} and constraints.txt has {pins[name]}"
        for one in required()
        if (name := canonicalize_name(one.name)) in pins and not one.specifier.contains(pins[name])
    ]


def main(words: list[str]) -> int:
    if words == ["bounds"]:
        print("\n".join(f"{name}=={version}" for name, version in sorted(bounds().items())))
        return 0
    if words == ["check"]:
        wrong = unsatisfied()
        print("\n".join(wrong) or "constraints.txt satisfies pyproject.toml")
        return 1 if wrong else 0
    print(__doc__)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
