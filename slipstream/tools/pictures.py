"""Graphs as pictures: SVG or PDF, by Graphviz's `dot`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ENDS = (".svg", ".pdf")


def check_picture(flag: str, file: str | Path) -> None:
    """Raise `ValueError` where `file` cannot be drawn: its end, or no `dot`."""
    if Path(file).suffix not in ENDS:
        raise ValueError(f"{flag}: got {file}; expected a file that ends in {' or '.join(ENDS)}")
    if shutil.which("dot") is None:
        raise ValueError(
            f"{flag} needs dot, of Graphviz, which is not a Python package: apt install graphviz "
            "(or dnf, brew, conda), or https://graphviz.org/download"
        )


def draw(source: str, file: str | Path) -> None:
    """Write a graph in the dot language as a picture, beside `file`, and put it in its place.

    Raises `ValueError` with what `dot` says, and `OSError`.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    command = ["dot", f"-T{file.suffix.removeprefix('.')}"]
    drawn = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
    if drawn.returncode or not drawn.stdout:
        raise ValueError(f"{file}: dot: {drawn.stderr.decode(errors='replace').strip()}")
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(drawn.stdout)
    os.replace(partial, file)
