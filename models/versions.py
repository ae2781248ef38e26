"""Versions of the software that made a result, for manifests."""

from __future__ import annotations

import platform
from importlib import import_module


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of these packages, which are imported unless they are already."""
    return {"python": platform.python_version()} | {name: import_module(name).__version__ for name in packages}
