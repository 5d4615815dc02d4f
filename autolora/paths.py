"""Where the package finds its configuration files and keeps what it caches. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def config_root() -> Path:
    """The folder of the configuration files: in the installed package, else at the top of the checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def cache_root() -> Path:
    """The folder for what can be made again: ``$XDG_CACHE_HOME/autolora``, or ``~/.cache/autolora``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "autolora"
