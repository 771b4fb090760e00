"""Locks on folders: one process at a time writes below one, from the first stage to open files.

A run script's stages are processes of their own. What one has written must not be replaced before a
later one has opened it: the script opens the folders concerned and names their descriptors in
SLIPSTREAM_LOCKS; the first stage locks them, a lock stays with the script's descriptor when a stage
ends, and the trainer gives them up once its files are open (`release`). A file that is replaced
then stays whole for those who have it mapped.

A lock is the folder's own, so it leaves no file and ends with the processes, however they end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from slipstream.tools.places import made_folder

VARIABLE = "SLIPSTREAM_LOCKS"  # descriptors, as `7 8`
Place = tuple[int, int]  # device and inode of a folder
_held: set[Place] = set()  # what `exclusive` holds in this process


@contextlib.contextmanager
def exclusive(*folders: Path) -> Iterator[None]:
    """Let one process at a time write below `folders`, which are made; another one waits.

    What the run script names is locked with them, and stays so. Within the body the same folders
    may be asked for again.
    """
    with contextlib.ExitStack() as stack:
        wanted = _handed_on()
        handed_on = set(wanted)
        for folder in folders:
            descriptor = os.open(made_folder(folder), os.O_RDONLY)
            stack.callback(os.close, descriptor)
            wanted.setdefault(_place_of(descriptor), descriptor)
        # All in one order: two that want the same ones do not wait for each other.
        for place in sorted(wanted.keys() - _held):
            _lock(wanted[place], folders)
            if place not in handed_on:
                _held.add(place)
                stack.callback(_held.discard, place)
        yield


def release() -> None:
    """Give up what the run script named: every file that its earlier stages made is open."""
    for descriptor in _handed_on().values():
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _lock(descriptor: int, folders: tuple[Path, ...]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        below = " and ".join(map(str, dict.fromkeys(folders)))
        print(f"waiting for another process that writes below {below}", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _place_of(descriptor: int) -> Place:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def _handed_on() -> dict[Place, int]:
    """The descriptors of folders that the run script named; what else stands there is none."""
    found: dict[Place, int] = {}
    for word in os.environ.get(VARIABLE, "").split():
        with contextlib.suppress(ValueError, OSError, OverflowError):
            if stat.S_ISDIR(os.fstat(int(word)).st_mode):
                found.setdefault(_place_of(int(word)), int(word))
    return found
