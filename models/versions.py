"""Versions of the software that made a result, for manifests."""

from __future__ import annotations

import platform
import sys


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of Python and of these packages, which must be imported already."""
    return {"python": platform.python_version()} | {name: sys.modules[name].__version__ for name in packages}
