"""The versions that figures depend on."""

from __future__ import annotations

import platform
from importlib import import_module, metadata


def versions() -> dict[str, str]:
    """Of Python, regard, and the libraries that compute; those not installed are left out.

    >>> list(versions())[:2]
    ['python', 'regard']
    """
    found = {"python": platform.python_version(), "regard": import_module("regard").__version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
