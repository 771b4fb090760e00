"""Places on the disk: what may be read or written there, and what of it is ours to delete.

We delete what we wrote and nothing else: files whose names are ours, folders that are empty then,
and of a link the link. Where an output is a link, it is written to where that leads: what lies
beside it for a while must be on the same file system, or it could not be renamed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of_place(path: Path) -> str | None:
    """What is there where it is no regular file, `a pipe`; None: a file, or nothing."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), None)


def regular_file(path: str | Path, advice: str = "check the path") -> Path:
    """The path, of a file that ends and can be read as often as needed.

    Raises `FileNotFoundError`, with `advice`, where nothing is there, and `ValueError` for a pipe,
    a device (reading would wait, or go on, for ever) or a folder.
    """
    path = Path(path)
    if kind := kind_of_place(path):
        why = "" if kind == "a folder" else ", as it is read more than once"
        raise ValueError(f"{path} is {kind}; expected a regular file{why}")
    if not path.is_file():
        leads = f" is a link to {os.readlink(path)}, which" if path.is_symlink() else ""
        raise FileNotFoundError(f"{path}{leads} does not exist; {advice}")
    return path


def resolved(path: str | Path) -> Path:
    """The path of an output, or where it leads if it is a link; neither need be there.

    Raises `FileNotFoundError` for a link into a folder that is not there: of a disk, say, that is
    not mounted.
    """
    path = Path(path)
    for link in (path.absolute(), *path.absolute().parents):
        if link.is_symlink() and not link.exists():
            target = Path(os.path.realpath(link))
            if target.is_symlink() or not target.parent.is_dir():
                raise FileNotFoundError(
                    f"{link} is a link to {os.readlink(link)}, which cannot be made; make its "
                    "folder, or delete the link"
                )
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def output_file(flag: str, path: str | Path, inputs: Iterable[str | Path]) -> Path:
    """The file to write where a flag says, of a link where it leads.

    Raises `ValueError` where it is, or lies in, one of the `inputs`, or is no file that can be
    replaced, and `FileNotFoundError` where its folder is not there.
    """
    target = Path(os.path.realpath(resolved(path)))
    for one in map(Path, map(os.path.realpath, inputs)):
        if one == target or one in target.parents:
            what = "is read here" if one == target else f"lies in {one}, which is read here"
            raise ValueError(f"{flag} {path} {what}; choose another file")
    if kind := kind_of_place(target):
        raise ValueError(f"{flag} {path} is {kind}; expected a file name")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{flag} {path}: {target.parent} does not exist; make it first")
    return target


def made_folder(path: str | Path) -> Path:
    """Make a folder to write in, also where a link leads, and return its path.

    Raises `OSError` as `resolved` does, and where a file is in the way.
    """
    resolved(path)
    folder = Path(os.path.realpath(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = next((at for at in (folder, *folder.parents) if os.path.lexists(at)), folder)
        raise NotADirectoryError(
            f"{path} cannot be made: {there} is {kind_of_place(there) or 'a file'}; choose another "
            "folder"
        ) from error
    return Path(path)


def room_for(path: Path) -> Path:
    """The path, of a file of ours that is to be written: a link there is deleted.

    Raises `ValueError` for a pipe, a device or a folder: opening could wait for ever.
    """
    if path.is_symlink():
        path.unlink()
    elif os.path.lexists(path):
        regular_file(path)
    return path


def own_names(names: Iterable[str]) -> re.Pattern[str]:
    """The files of these names, and their unfinished forms, for `remove_ours`."""
    return re.compile(rf"(?:{'|'.join(map(re.escape, names))})(?:\.partial)?")


def _contents(folder: Path) -> Iterator[tuple[str, Path]]:
    """All below a folder, what is in a folder before it: the path in it, a folder's with a `/`."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for root, folders, files in os.walk(folder, topdown=False, onerror=refuse):
        names = sorted([*files, *folders])
        for path in (Path(root, name) for name in names):
            is_folder = path.is_dir() and not path.is_symlink()
            yield path.relative_to(folder).as_posix() + "/" * is_folder, path


def remove_ours(folder: Path, own: re.Pattern[str]) -> bool:
    """Delete what a folder holds of ours, and the folder if it is empty then; of a link, the link.

    `own` matches the paths in it that are ours, those of folders with a `/` at their end. What is
    not ours stays, and is named where something else went. What cannot be deleted stays, too.
    Returns whether nothing is left.
    """
    has_removed = False
    with contextlib.suppress(OSError):
        if folder.is_symlink():
            folder.unlink()
            return True
        foreign = []
        for name, path in _contents(folder):
            if not own.fullmatch(name):
                foreign.append(name)
                continue
            with contextlib.suppress(OSError):
                path.rmdir() if name.endswith("/") else path.unlink()
                has_removed = True
        if not foreign:
            folder.rmdir()
        elif has_removed:
            print(f"{folder} stays: it holds {min(foreign)}, which is not ours", flush=True)
    return not os.path.lexists(folder)


def check_replaceable(folder: Path, own: re.Pattern[str]) -> None:
    """Raise `ValueError` when `folder` is no folder, or holds anything but files of ours."""
    foreign = {name for name, _ in _contents(folder) if not own.fullmatch(name)}
    if foreign or (folder.exists() and not folder.is_dir()):
        raise ValueError(
            f"{folder} is not ours to replace: it "
            + (f"holds {min(foreign)}" if foreign else f"is {kind_of_place(folder) or 'a file'}")
            + "; choose another folder"
        )


def replace_folder(new: Path, target: Path, own: re.Pattern[str]) -> None:
    """Put the finished folder `new` in `target`'s place: `target` is a whole one or absent.

    The old one's files are deleted, see `check_replaceable`; of a link, the link.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file; expected a folder, or nothing")
    old = target.with_name(target.name + ".old")
    remove_ours(old, own)
    if os.path.lexists(target):
        os.rename(target, old)
    os.rename(new, target)
    remove_ours(old, own)
