"""Packages that nothing but a flag needs: imported where it is given, and asked for in one line."""

from __future__ import annotations

import importlib.util

REQUIREMENTS = "requirements-optional.txt"


def need(flag: str, *modules: str) -> None:
    """Raise `ValueError` with what to install where one of `modules` is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{flag} needs {' and '.join(missing)}: python -m pip install -r {REQUIREMENTS}, or "
            f"python -m pip install {' '.join(missing)}"
        )
