"""Checkpoints of a training run: each a folder that is whole or absent. No pickle.

    <folder>/step-0000001200/checkpoint.json   what it belongs to, where the run stands, checksums
                             state.npz         rows, MLPs, optimizer; in mid-epoch the order so far
    <folder>/best/                             the same, at the best AUC on the validation set

A checkpoint is written under another name, synced and renamed. Rows are stored by table and id, not
by slot, and are read in chunks where they live, so saving needs no second copy of them, and weights
load whatever the method, the hot budget or the device. Every byte that is used is covered by a
checksum, which is compared before anything is made of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from slipstream.tools.mapped import advise
from slipstream.tools.npz import NpzWriter, Spec, check_sums, fingerprint, open_npz
from slipstream.tools.runtime import (
    check_free_disk,
    check_replaceable,
    read_json,
    replace_folder,
    sync_folder,
    write_json,
)
from slipstream.training.embedding import EmbeddingTable

VERSION = 1
CHUNK_BYTES = 1 << 23  # of rows in memory at once
DESCRIPTION, STATE, BEST = "checkpoint.json", "state.npz", "best"
OWN_FILES = (DESCRIPTION, STATE)
FLOAT = np.dtype(np.float32)
DAMAGED = "is damaged or of another version"

Parts = Mapping[str, tuple[Mapping[str, Any], Mapping[str, np.ndarray]]]


class Every(NamedTuple):
    """How often to write a checkpoint: after so many steps, or seconds; 0: not."""

    steps: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was opened and found whole.

    Attributes:
        folder: where it lies.
        identity: of the run that wrote it: `model`, `data` and `run`, see `differences`.
        values: where the run stood, by part.
        arrays: mapped, by `<part>.<name>`; `rows` and `row_sums` by table and id.
    """

    folder: Path
    identity: dict[str, dict[str, Any]]
    values: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def step(self) -> int:
        """Mini-batches that were trained."""
        return int(self.values["trainer"]["progress"]["step"])

    def part(self, name: str) -> tuple[Any, dict[str, np.ndarray]]:
        """One part's values (None where it has none) and arrays."""
        start = name + "."
        arrays = {key[len(start) :]: a for key, a in self.arrays.items() if key.startswith(start)}
        return self.values.get(name), arrays

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Contents that do not fit together raise a `ValueError` that names the checkpoint."""
        try:
            yield
        except (
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            OverflowError,
            RuntimeError,  # PyTorch, for a number beyond fp32
        ) as error:
            raise ValueError(f"{self.folder} {DAMAGED}: {error!r}") from error
        except ValueError as error:
            raise ValueError(f"{self.folder} does not fit: {error}") from error

    def load_model(self, model: nn.Module) -> None:
        """Copy the MLPs' weights into `model`."""
        _, arrays = self.part("step")
        with self.reading(), torch.no_grad():
            for name, value in model.state_dict().items():
                stored = arrays[f"mlp.{name}"]
                if stored.shape != tuple(value.shape):
                    raise ValueError(f"{name} has shape {stored.shape}; {tuple(value.shape)} here")
                value.copy_(torch.from_numpy(np.array(stored)))

    def load_rows(
        self,
        num_rows: int,
        dim: int,
        slot_of_row: np.ndarray | None,
        with_sums: bool,
        null_row: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Rows (num_rows, dim) in slot order and, where asked for, Adagrad's sums (num_rows,).

        With `null_row` zeros follow, see `EmbeddingTable`.
        """
        with self.reading():
            loaded = [self._by_slot("rows", (num_rows, dim), slot_of_row, null_row)]
            if with_sums:
                loaded.append(self._by_slot("row_sums", (num_rows,), slot_of_row, null_row))
        return loaded[0], loaded[1] if with_sums else None

    def _by_slot(
        self, name: str, shape: tuple[int, ...], slot_of_row: np.ndarray | None, null_row: bool
    ) -> Tensor:
        stored = self.arrays[name]
        if stored.shape != shape or stored.dtype != FLOAT:
            raise ValueError(f"{name} has shape {stored.shape} of {stored.dtype}; {shape} here")
        by_slot = np.empty((shape[0] + null_row, *shape[1:]), np.float32)
        by_slot[shape[0] :] = 0
        for part in _chunks(shape):
            by_slot[part if slot_of_row is None else slot_of_row[part]] = stored[part]
            advise(stored[part], mmap.MADV_DONTNEED)
        return torch.from_numpy(by_slot)


def _chunks(shape: Sequence[int]) -> Iterator[slice]:
    step = max(1, CHUNK_BYTES // (4 * int(np.prod(shape[1:]))))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def open_checkpoint(folder: str | Path) -> Saved:
    """Open one checkpoint and compare its checksums.

    Raises `ValueError` where a byte is not what was written, or it is of another version.
    """
    folder = Path(folder)
    try:
        described = read_json(folder / DESCRIPTION)
        checksum = described.pop("checksum")
        if described["version"] != VERSION or _checksum(described) != checksum:
            raise ValueError("its checksum differs")
        identity, values = described["identity"], described["values"]
        state = described["state"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / DESCRIPTION} {DAMAGED} ({error})") from error
    path = folder / STATE
    arrays = open_npz(path, ("rows",))
    if fingerprint(path) != state:
        raise ValueError(f"{path} does not belong to {folder / DESCRIPTION}")
    check_sums(path)
    return Saved(folder, identity, values, arrays)


def _checksum(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def find_checkpoint(folder: str | Path) -> Saved | None:
    """`folder` itself if it is a checkpoint, else the newest whole one in it; None: it has none.

    One that is damaged is named, and the one before it taken, last `best`. Raises `ValueError` when
    none is whole.
    """
    folder = Path(folder)
    if (folder / DESCRIPTION).exists():
        return open_checkpoint(folder)
    found = checkpoints_in(folder)
    if (folder / BEST / DESCRIPTION).exists():
        found.insert(0, folder / BEST)
    for path in reversed(found):
        try:
            return open_checkpoint(path)
        except (ValueError, OSError) as error:
            print(f"{error}; it is left out", flush=True)
    if found:
        raise ValueError(f"{folder} has no checkpoint that is whole; delete it to start anew")
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{DESCRIPTION}") if _is_own(path))


def _is_own(path: Path) -> bool:
    return path.parent.name.removeprefix("step-").isdecimal()


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _set_aside(path: Path) -> None:
    """Rename a checkpoint that is damaged; `ValueError` for a whole one."""
    try:
        open_checkpoint(path)
    except (ValueError, OSError):
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another run writes to {folder}; choose another --save-model, or wait"
            ) from None
        if not goes_on and (checkpoints_in(folder) or (folder / BEST).exists()):
            raise ValueError(
                f"{folder} holds checkpoints: --load-model auto goes on from there; or choose "
                "another --save-model, or delete the folder"
            )
        check_replaceable(folder / BEST, OWN_FILES)
        _clear(folder)
        yield folder
    finally:
        os.close(descriptor)


def _clear(folder: Path) -> None:
    """Finish or undo what was being renamed or deleted, and check that files can be made."""
    probe = folder / "step-0.partial"
    probe.mkdir(exist_ok=True)
    for path in (*folder.glob("step-*.partial"), folder / f"{BEST}.partial"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("step-*"):  # their deletion was cut short
        is_own = path.name.removeprefix("step-").isdecimal() and path.is_dir()
        if is_own and {item.name for item in path.iterdir()} <= {STATE}:
            shutil.rmtree(path, ignore_errors=True)
    for old in (*folder.glob("step-*.old"), *folder.glob(f"{BEST}.old")):
        place = old.with_suffix("")
        if place.exists() or not (old / DESCRIPTION).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, place)


class Checkpoints:
    """Writes a run's checkpoints.

    Args:
        folder: from `checkpoint_folder`.
        identity: of the run, see `differences`.
        table: the rows; they must be at home when `save` is called.
        slot_of_row: (num_rows,) as the table is numbered; None: in order of table and id.
        every: when one is due.
        keep: the newest ones that stay; at least 1.
        start: the checkpoint in `folder` that the run goes on from; None: it begins.

    Raises `ValueError` where `folder` has whole checkpoints of later steps than `start`. Damaged
    ones are set aside, as `step-<step>.damaged`.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, dict[str, Any]],
        table: EmbeddingTable,
        slot_of_row: np.ndarray | None,
        every: Every,
        keep: int,
        start: Saved | None = None,
    ) -> None:
        self.folder, self.identity, self.table, self._slots = folder, identity, table, slot_of_row
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
            (old / DESCRIPTION).unlink()
            shutil.rmtree(old, ignore_errors=True)
        return path

    def save_best(self, step: int, parts: Parts) -> Path:
        """Write the checkpoint `best`; the step's own one shares its arrays where it was saved."""
        is_saved = step == self.last_step and self.last_path is not None
        newest = self.last_path / STATE if is_saved and self.last_path is not None else None
        return self._write(self.folder / BEST, parts, newest)

    def _write(self, target: Path, parts: Parts, written: Path | None) -> Path:
        check_replaceable(target, OWN_FILES)
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            if written is None or not _link(written, partial / STATE):
                self._write_state(partial / STATE, parts)
            described = {
                "version": VERSION,
                "identity": self.identity,
                "values": {name: values for name, (values, _) in parts.items()},
                "state": fingerprint(partial / STATE),
            }
            # As it will be read: lists for tuples, and texts for keys.
            described = json.loads(json.dumps(described))
            described["checksum"] = _checksum(described)
            write_json(partial / DESCRIPTION, described)
            sync_folder(partial)
            replace_folder(partial, target)
            sync_folder(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
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
            if name.startswith("step.") and not np.isfinite(array).all():
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
            for part in _chunks(shape):
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


def differences(here: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """What two descriptions of a model, of data or of a run differ in, in words."""
    found = []
    for key in dict.fromkeys([*here, *saved]):
        mine, other = json.loads(json.dumps(here.get(key))), saved.get(key)
        if mine == other:
            continue
        if isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other):
            place = next(
                i for i, pair in enumerate(zip(mine, other, strict=True)) if pair[0] != pair[1]
            )
            found.append(f"{key}[{place}] is {other[place]} there, {mine[place]} here")
        elif isinstance(mine, dict) and isinstance(other, dict):
            found += [f"{key}: {text}" for text in differences(mine, other)]
        else:
            short = [
                text if len(text := str(value)) < 40 else text[:37] + "..."
                for value in (other, mine)
            ]
            found.append(f"{key} is {short[0]} there, {short[1]} here")
    return found
