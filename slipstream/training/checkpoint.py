"""Checkpoints of a training run: each a folder that is whole or absent. No pickle.

    <folder>/step-0000001200/checkpoint.json   what it belongs to, where the run stands, the network
                                               with its options, text and features, checksums
                             state.npz         rows, weights, buffers, optimizer, random state; in
                                               mid-epoch the order so far; what a drop policy
                                               remembers
    <folder>/best/                             the same, at the best AUC on the validation set

A checkpoint is written under another name, synced and renamed. Rows are stored by table and id, not
by slot, and are read in chunks where they live, so saving needs no second copy of them, and weights
load whatever the method, the hot budget or the device. Every byte that is used is covered by a
checksum, which is compared before anything is made of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from slipstream.tools.npz import NpzWriter, Spec, fingerprint
from slipstream.tools.places import (
    check_replaceable,
    made_folder,
    own_names,
    remove_ours,
    replace_folder,
    resolved,
)
from slipstream.tools.runtime import check_free_disk, sync_folder, write_json
from slipstream.training.loader import Table
from slipstream.training.saved import (
    BEST,
    DESCRIPTION,
    FLOAT,
    STATE,
    STEP_NAME,
    VERSION,
    Saved,
    checkpoints_in,
    checksum_of,
    open_checkpoint,
    row_chunks,
)

OWN_FILES = own_names((DESCRIPTION, STATE))
UNFINISHED = re.compile(rf"({STEP_NAME.pattern}|{BEST})\.(partial|old)")
FINITE = ("step.network.", "step.optimizer.")

Parts = Mapping[str, tuple[Mapping[str, Any], Mapping[str, np.ndarray]]]


class Every(NamedTuple):
    """How often to write a checkpoint: after so many steps, or seconds; 0: not."""

    steps: int = 0
    seconds: float = 0.0


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path) -> None:
    """Rename a checkpoint that is damaged; `ValueError` for a whole one."""
    try:
        open_checkpoint(path)
    except (ValueError, OSError):
        aside, attempt = path.with_name(f"{path.name}.damaged"), 1
        while not remove_ours(aside, OWN_FILES):
            attempt += 1
            aside = path.with_name(f"{path.name}.damaged-{attempt}")
        os.rename(path, aside)
        return
    raise ValueError(
        f"{path} is later than the step that the run is to go on from; choose another --save-model,"
        " or delete what is later"
    )


@contextmanager
def checkpoint_folder(folder: str | Path, goes_on: bool) -> Iterator[Path]:
    """Make and lock a run's folder while the body runs, and clear what a killed run left half done.

    Raises `ValueError` when another run writes there, or when it holds checkpoints and the run is
    not to go on from there; `OSError` when it cannot be written to.
    """
    folder = made_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run writes to {folder}; choose another --save-model, or wait"
            ) from None
        if not goes_on and (checkpoints_in(folder) or (folder / BEST / DESCRIPTION).exists()):
            raise ValueError(
                f"{folder} holds checkpoints: --load-model auto goes on from there; or choose "
                "another --save-model, or delete the folder"
            )
        _check_best(folder)
        _clear(folder)
        yield folder
    finally:
        os.close(descriptor)


def _best_in(folder: Path) -> Path:
    """Where the best checkpoint lies; `ValueError` where that is another checkpoint's place."""
    best = resolved(folder / BEST)
    if best.name != BEST and best.parent == folder.resolve():
        raise ValueError(f"{folder / BEST} is a link to {best.name} beside it; delete the link")
    return best


def _check_target(target: Path) -> None:
    """As `check_replaceable`, but raises `OSError`: as on a full disk, training goes on."""
    try:
        check_replaceable(target, OWN_FILES)
    except ValueError as error:
        raise OSError(str(error)) from error


def _check_best(folder: Path) -> None:
    best = _best_in(folder)
    for suffix in ("", ".partial", ".old"):
        check_replaceable(best.with_name(best.name + suffix), OWN_FILES)


def _clear(folder: Path) -> None:
    """Finish or undo what was being renamed or deleted, and check that files can be made."""
    (folder / f"step-{0:010}.partial").mkdir(exist_ok=True)
    best = _best_in(folder)
    places = [path for path in folder.iterdir() if UNFINISHED.fullmatch(path.name)]
    places += [best.with_name(best.name + suffix) for suffix in (".partial", ".old")]
    for path in places:
        place = path.with_suffix("")
        if path.suffix == ".old" and (path / DESCRIPTION).exists() and not place.exists():
            os.rename(path, place)
        else:
            remove_ours(path, OWN_FILES)
    for path in folder.iterdir():  # their deletion was cut short
        is_own = STEP_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        if is_own and not (path / DESCRIPTION).exists():
            remove_ours(path, OWN_FILES)


class Checkpoints:
    """Writes a run's checkpoints.

    Args:
        folder: from `checkpoint_folder`.
        identity: of the run, see `differences`.
        network: what it is, see `Saved`.
        table: the rows; they must be at home when `save` is called.
        slot_of_row: (num_rows,) as the table is numbered; None: in order of table and id.
        every: when one is due.
        keep: the newest ones that stay; at least 1.
        start: the checkpoint in `folder` that the run goes on from; None: it begins.
        about: of the data, `vocabulary` and `files`, see `Saved`.

    Raises `ValueError` where `folder` has whole checkpoints of later steps than `start`. Damaged
    ones are set aside, as `step-<step>.damaged`.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, dict[str, Any]],
        network: dict[str, Any],
        table: Table,
        slot_of_row: np.ndarray | None,
        every: Every,
        keep: int,
        start: Saved | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._about = {"vocabulary": None, "files": {}, **(about or {})}
        self.folder, self.identity, self.network = folder, identity, network
        self.table, self._slots = table, slot_of_row
        self.every, self.keep = every, keep
        self.last_step = -1 if start is None else start.step
        self.last_path = None if start is None else start.folder
        for path in checkpoints_in(folder):
            if _step_of(path) > self.last_step:
                _set_aside(path)
        self._last_time = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether one is to be written after `step` steps."""
        if step == self.last_step:
            return False
        if self.every.steps and step % self.every.steps == 0:
            return True
        return bool(self.every.seconds and time.monotonic() - self._last_time >= self.every.seconds)

    def save(self, step: int, parts: Parts) -> Path:
        """Write the checkpoint of a step; older ones than the newest `keep` are deleted.

        Raises `OSError` (full disk) and `ValueError` (rows that are not finite): nothing of it is
        left then, and those before stay.
        """
        path = self._write(self.folder / f"step-{step:010}", parts, None)
        self.last_step, self.last_path = step, path
        for old in checkpoints_in(self.folder)[: -self.keep]:
            # Without its description it is none, however far a kill lets the deletion come.
            if not old.is_symlink():
                (old / DESCRIPTION).unlink()
            remove_ours(old, OWN_FILES)
        return path

    def load_best(self, network: nn.Module) -> None:
        """Put the weights of `best` into a network and the table; no optimizer's sums."""
        saved = open_checkpoint(self.folder / BEST)
        saved.load_network(network)
        rows = saved.arrays["rows"]
        for part in row_chunks(rows.shape):
            slots = np.arange(part.start, part.stop) if self._slots is None else self._slots[part]
            self.table.write(slots, torch.from_numpy(np.array(rows[part])))

    def save_best(self, step: int, parts: Parts) -> Path:
        """Write the checkpoint `best`; the step's own one shares its arrays where it was saved."""
        newest = self.last_path if step == self.last_step else None
        written = None if newest is None else newest / STATE
        return self._write(_best_in(self.folder), parts, written)

    def _write(self, target: Path, parts: Parts, written: Path | None) -> Path:
        partial = target.with_name(target.name + ".partial")
        try:
            _check_target(target)
            remove_ours(partial, OWN_FILES)
            partial.mkdir()
            if written is None or not _link(written, partial / STATE):
                self._write_state(partial / STATE, parts)
            described = {
                "version": VERSION,
                "identity": self.identity,
                "network": self.network,
                **self._about,
                "values": {name: values for name, (values, _) in parts.items()},
                "state": fingerprint(partial / STATE),
            }
            # As it will be read: lists for tuples, and texts for keys.
            described = json.loads(json.dumps(described))
            described["checksum"] = checksum_of(described)
            write_json(partial / DESCRIPTION, described)
            sync_folder(partial)
            replace_folder(partial, target, OWN_FILES)
            sync_folder(target.parent)
        except BaseException:
            remove_ours(partial, OWN_FILES)
            raise
        finally:
            self._last_time = time.monotonic()
        return target

    def _write_state(self, path: Path, parts: Parts) -> None:
        arrays = {
            f"{part}.{name}": np.asarray(array)
            for part, (_, named) in parts.items()
            for name, array in named.items()
        }
        for name, array in arrays.items():
            # A buffer may be infinite: that of a mask is.
            if name.startswith(FINITE) and not np.isfinite(array).all():
                raise ValueError(f"{name.removeprefix('step.')} is not finite")
        specs = {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}
        shape = (self.table.num_rows, self.table.dim)
        sample = self.table.read(slice(0, 0))
        rows = {name: Spec((shape[0], *array.shape[1:]), FLOAT) for name, array in sample.items()}
        specs |= rows
        check_free_disk(path.parent, sum(spec.num_bytes for spec in specs.values()), "a checkpoint")
        writer = NpzWriter(path, specs)
        try:
            for name, array in arrays.items():
                writer.append(name, array)
            for part in row_chunks(shape):
                slots = part if self._slots is None else self._slots[part]
                for name, values in self.table.read(slots).items():
                    if not bool(torch.isfinite(values).all()):
                        raise ValueError("the embedding rows are not finite")
                    writer.append(name, values.numpy())
            writer.finish()
        finally:
            writer.discard()


def _link(source: Path, target: Path) -> bool:
    """Let a file have a second name; False where its file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        return False
    return True
