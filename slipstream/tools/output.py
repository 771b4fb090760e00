"""Standard output and standard error that may fail: what is said is lost then, never the work.

A reader that ended (`| head -1`, a `tee` that the same Ctrl-C killed), a full disk under `> file`,
a terminal that is gone, `>&-`: a line that cannot be written is dropped, the first failure is kept
for the run's log, and the next line is tried again, for a disk may have room by then.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Any

from tqdm import tqdm

NAMES = {"stdout": "standard output", "stderr": "standard error"}
# A stage's progress on a terminal, and none elsewhere; what came of it has a line of its own. One
# place for all: tqdm leaves the cursor inside a line where one below another is the last to end.
stage_bar = partial(tqdm, disable=None, leave=False, position=0)
# What a run script hands on: a descriptor that takes what is up to date, and its last lines.
CURRENT_VARIABLE, NEXT_VARIABLE = "SLIPSTREAM_CURRENT", "SLIPSTREAM_NEXT"


class Lossy:
    """A text stream that drops what it cannot write; `failure` is the first error, or None."""

    def __init__(self, stream: Any, failure: Exception | None = None) -> None:
        self.stream, self.failure = stream, failure

    def write(self, text: str) -> int:
        """Write, or drop, the text."""
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:  # ValueError: closed
            self.failure = self.failure or error
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write, or drop, each text."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, where the stream can: also the interpreter's last call, at exit."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self.failure = self.failure or error

    @property
    def closed(self) -> bool:
        """Always open: the interpreter would not flush, but report, one that is closed."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def survive() -> None:
    """Let standard output and error fail from here on without an exception.

    A name of a column or file that the locale cannot spell is shown as its code on both.
    """
    for descriptor in range(3):
        # Else the next file that is opened, a checkpoint, gets the number, and what is said.
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in NAMES:
        stream = getattr(sys, name)
        if isinstance(stream, Lossy):
            continue
        failure: Exception | None = None
        if stream is None:  # how Python says that it was closed
            failure = ValueError("closed")
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for good
        try:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        except (OSError, ValueError) as error:  # it flushes
            failure = error
        setattr(sys, name, Lossy(stream, failure))


def say_current(what: object) -> None:
    """Say that an output is up to date: to a run script, which says it of all its stages at once,
    or else on the screen.
    """
    try:
        os.write(int(os.environ.get(CURRENT_VARIABLE, "")), os.fsencode(f"{what}\n"))
    except (ValueError, OSError):
        print(f"{what} is up to date")


def say_next() -> None:
    """Say what the run script that has started this program proposes to do next."""
    if text := os.environ.get(NEXT_VARIABLE):
        print(text)


def lost() -> str | None:
    """What could not be said so far, and why: for a log. None: all was."""
    found = []
    for name, spoken in NAMES.items():
        stream = getattr(sys, name)
        if isinstance(stream, Lossy):
            stream.flush()
            if stream.failure is not None:
                found.append(f"{spoken}: {stream.failure}")
    return "; ".join(found) or None


def say_lost() -> None:
    """Say on standard error what standard output lost, unless nobody wanted it (`| head -1`)."""
    found, failure = lost(), getattr(sys.stdout, "failure", None)
    if isinstance(failure, OSError) and not isinstance(failure, BrokenPipeError):
        print(f"note: some of what was said is lost: {found}", file=sys.stderr)
