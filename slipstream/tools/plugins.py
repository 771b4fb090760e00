"""Classes and functions by name, or out of a reader's own file: `dlrm`, or `path/to/file.py:Class`.

A file is run when it is asked for on the command line, and then alone: one whose text lies in a
saved folder never is.
"""

from __future__ import annotations

import hashlib
import os
import sys
import traceback
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipstream.tools.cli import TRACEBACK_VARIABLE
from slipstream.tools.places import regular_file
from slipstream.tools.ranks import RankLost


class PluginError(ValueError):
    """A reader's own code failed: the text says which file, where, and with what."""


@dataclass(frozen=True)
class Plugin:
    """Something that a flag named.

    Attributes:
        flag: the flag.
        name: `dlrm`, or `file.py:Class`, without the folder.
        found: the class or function.
        path: of the file; None: it is built in.
        text: of the file.
        module: what the file became.
    """

    flag: str
    name: str
    found: Any
    path: Path | None = None
    text: str | None = None
    module: Any = None

    @property
    def sha256(self) -> str | None:
        """Of the file's text; None: built in."""
        return None if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"name": self.name, "sha256": self.sha256, "text": self.text}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Errors of a reader's own code become a `PluginError` that says where they came from."""
        try:
            yield
        except (PluginError, RankLost):
            raise  # of another file, which this one called; or of no file
        except (Exception, SystemExit) as error:
            if self.path is None or os.environ.get(TRACEBACK_VARIABLE):
                raise
            raise PluginError(self._described(error)) from error

    def _described(self, error: BaseException) -> str:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(self.path)]
        if isinstance(error, SyntaxError) and error.lineno is not None:
            lines.append(error.lineno)
        where = f"line {lines[-1]}" if lines else "when it was called"
        return f"{self.flag} {self.path}, {where}: {type(error).__name__}: {error}"


def find_plugin(name: str, known: Mapping[str, Any], flag: str) -> Plugin:
    """What `name` stands for: one of `known`, or `path/to/file.py:object`.

    Raises `ValueError` for a name that is neither, and where the file cannot be run or lacks the
    object; `FileNotFoundError` where it is missing.
    """
    if name in known:
        return Plugin(flag, name, known[name])
    file, colon, wanted = name.rpartition(":")
    if not colon or not file.endswith(".py") or not wanted.isidentifier():
        raise ValueError(
            f"{flag}: got {name!r}; expected {', '.join(known)}, or path/to/file.py:Name"
        )
    path = Path(file).resolve()
    if not path.exists():
        raise FileNotFoundError(f"{flag}: {file} does not exist")
    try:
        text = regular_file(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: {file} is not UTF-8: {error}") from error
    plugin = Plugin(flag, f"{path.name}:{wanted}", None, path, text)
    with plugin.running():
        module = _run(path, text)
    if not hasattr(module, wanted):
        raise ValueError(f"{flag}: {file} has no {wanted}")
    return Plugin(flag, plugin.name, getattr(module, wanted), path, text, module)


def _run(path: Path, text: str) -> Any:
    # The text that is kept is the text that runs: no bytecode of another day.
    name = f"slipstream_plugin_{path.stem}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module  # dataclasses look themselves up there
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)  # for what the file imports from beside it
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module
