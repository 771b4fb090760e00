"""A run's folder and its `log.jsonl`, the only thing figures and tables are made from; and its
clocks.

One JSON object a line: `start` (argv, flags, commit, versions, hardware, data), `evaluation` (test
set; the last one with a reliability table), `validation`, `training` (the loss, at each report),
`drop` (one per choice of inputs), `checkpoint`, and last `summary`, or `stopped` (by a signal) or
`failed`, both with reason and step. Each line is written at once, so a crash loses none, and whole
or not at all: what a full disk refuses is kept and tried again. A run that goes on from a
checkpoint has a log of its own, which begins with the evaluations, validations, losses and drops up
to there (`start` names the checkpoint), so the last log of a run is the whole run's.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from slipstream.tools.places import made_folder, regular_file
from slipstream.tools.runtime import involuntary_switches

# The clocks of choosing inputs, beside `training_s`.
OVERHEAD = ("snapshot_s", "threshold_s", "classification_s")
BUSY_SWITCHES, BUSY_S = 300, 5.0  # a second, over more seconds: other work on the same cores


class Log(Protocol):
    """What a run reports to."""

    def write(self, kind: str, **fields: Any) -> None:
        """Take one record."""


class NoLog:
    """Keeps nothing: for a run that is only timed."""

    def write(self, kind: str, **fields: Any) -> None:
        """Forget the record."""


class RunLog:
    """Appends records to `<runs_dir>/<name>/log.jsonl`.

    Without a name the folder is `<method>-<date>-<time>`. One that is taken gets a number behind
    it, but a name given for a run that is not `resumed` is refused with `ValueError`: two runs
    never share a file.
    """

    def __init__(
        self, runs_dir: str | Path, name: str | None, method: str, resumed: bool = False
    ) -> None:
        base = name or f"{method}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder, attempt = made_folder(runs_dir) / base, 1
        while (resumed or not name) and _is_taken(folder):
            attempt += 1
            folder = Path(runs_dir) / f"{base}-{attempt}"
        self.path = made_folder(folder) / "log.jsonl"
        if self.path.exists():
            raise ValueError(f"{self.path} exists; choose another --run-name or delete the folder")
        self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115 - open for the run
        self._end = 0  # of the last whole record
        self._waiting: list[tuple[str, bytes]] = []  # kinds and lines that could not be written
        self._is_warned = False
        self.failure: OSError | None = None  # what is lost, once closed

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record. NaN and infinity become null: the file stays strict JSON.

        Where the disk refuses it, it is kept, and tried again with the next one and by `close`.
        """
        record = {"kind": kind, **fields}
        line = json.dumps(finite(record), default=str) + "\n"
        self._waiting.append((kind, line.encode()))
        try:
            self._write_waiting()
        except OSError as error:
            if not self._is_warned:
                tqdm.write(f"{self.path}: {error}; its records are kept and tried again")
            self._is_warned = True

    def _write_waiting(self) -> None:
        """Write what waits, record by record; one that does not fit leaves no part of itself."""
        while self._waiting:
            line, done = self._waiting[0][1], 0
            try:
                while done < len(line):
                    done += os.pwrite(self._file.fileno(), line[done:], self._end + done)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file.fileno(), self._end)
                raise
            self._end += len(line)
            del self._waiting[0]

    def close(self) -> None:
        """Close the file; `failure` then says which records could not be written, and why."""
        if self._file.closed:
            return
        try:
            self._write_waiting()
            self._file.close()
        except OSError as error:
            counts = Counter(kind for kind, _ in self._waiting)
            lost = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            self.failure = OSError(f"{self.path} lacks records ({lost or 'maybe'}): {error}")
            with suppress(OSError):
                self._file.close()

    @contextmanager
    def until_the_end(self, step: Callable[[], int]) -> Iterator[None]:
        """Close the log after the body; where that fails, with a last record that says why.

        Records that are lost are in `failure`; where the body fails, they are said.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, (Exception, KeyboardInterrupt)):
                reason = " ".join(str(error).split()) or type(error).__name__
                self.write("failed", reason=reason, step=step())
            self.close()
            if self.failure is not None:
                tqdm.write(str(self.failure))
            raise
        self.close()


def _is_taken(folder: Path) -> bool:
    """Make `folder`; True when it was there, also when another run was a moment faster."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        if not os.path.lexists(folder):  # what it was to be made in is no folder
            raise
        return True
    return False


def finite(value: Any) -> Any:
    """A value for strict JSON: NaN and infinity become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a run's log, of one that is being written, too.

    A last line without an end is left out where it is no record: it is being written, or was when
    the machine stopped. `ValueError`, with the line's number: a damaged line, or no log of a run;
    `OSError`: it cannot be read.
    """
    *lines, rest = regular_file(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate([*lines, rest] if rest else lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
                raise ValueError("no object with a kind")
        except (ValueError, RecursionError) as error:
            if number > max(len(lines), 1):
                break
            raise ValueError(
                f"{path}, line {number}, is no record of a run ({error}): is it a log.jsonl of a "
                "trainer, undamaged?"
            ) from error
        records.append(record)
    if not records or records[0]["kind"] != "start":
        what = "begins with no start record" if records else "is empty"
        raise ValueError(f"{path} {what}: it is no log of a run, or one that has only begun")
    return records


def was_busy(switches_per_s: float, program_s: float) -> bool:
    """Whether other work took cores from a run so often that its times say little."""
    return switches_per_s > BUSY_SWITCHES and program_s > BUSY_S


class Clocks:
    """Seconds by activity, each counted once: an inner activity pauses the outer one.

    `training` counts forward, backward, update and staging; `paused` evaluation and checkpoints;
    others have names of their own (`snapshot`, `threshold`, `classification`). `program` runs from
    construction. On CUDA the device is waited for at each change of clock, so that queued work
    counts where it belongs.
    """

    def __init__(self, synchronize: Any = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._start = self._mark = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._active = ["other"]
        self._begin, self._switches = self._start, involuntary_switches()

    @property
    def activity(self) -> str:
        """What is being counted."""
        return self._active[-1]

    def switches_per_s(self) -> float:
        """How often a second other work took a core from a thread of this process, so far."""
        seconds = time.perf_counter() - self._begin
        return (involuntary_switches() - self._switches) / max(seconds, 1e-9)

    def add(self, seconds: dict[str, float]) -> None:
        """Count the time of the run before, as `seconds` gave it, too."""
        for activity, value in seconds.items():
            activity = activity.removesuffix("_s")
            if activity == "program":
                self._start -= value
            else:
                self._seconds[activity] = self._seconds.get(activity, 0.0) + value

    @contextmanager
    def count(self, activity: str) -> Iterator[None]:
        """Count the body's time as `activity`."""
        self._settle()
        self._active.append(activity)
        try:
            yield
        finally:
            self._settle()
            self._active.pop()

    def _settle(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        activity = self.activity
        self._seconds[activity] = self._seconds.get(activity, 0.0) + now - self._mark
        self._mark = now

    def seconds(self) -> dict[str, float]:
        """Seconds so far, as log fields: `training_s`, `paused_s`, `program_s` and the others'."""
        self._settle()
        counted = {"training": 0.0, "paused": 0.0, **self._seconds}
        counted.pop("other", None)
        counted["program"] = self._mark - self._start
        return {f"{activity}_s": round(value, 6) for activity, value in counted.items()}
