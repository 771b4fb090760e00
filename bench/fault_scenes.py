"""Scenes for `bench.faults`: pipes that break, terminals that go, a disk that fills under the log.

Each takes a trainer's job, disturbs a run of it, and returns None, or what was wrong: lost output
must not change the exit status, the model or the log, a signal must leave a checkpoint from which
the same command ends with the undisturbed run's bytes, and of a log no part of a line may stay.
"""

from __future__ import annotations

import errno
import functools
import importlib
import json
import math
import os
import pty
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench import faults
from slipstream.tools import cli, runlog
from slipstream.training.saved import checkpoints_in

MAX_DELAY_S = 0.1  # between a run's first checkpoint and what ends it


class FullDisk:
    """`os` for a log whose disk is full: from its `first` write to before its `last`, from 1.

    As on a disk: a part of what is to be written fits, then none.
    """

    def __init__(self, first: int, last: float = math.inf) -> None:
        self._first, self._last, self._calls = first, last, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        """Write all, half or nothing."""
        self._calls += 1
        if not self._first <= self._calls < self._last:
            return os.pwrite(descriptor, data, offset)
        if (self._calls - self._first) % 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.pwrite(descriptor, data[: len(data) // 2], offset)


def begin(job: faults.Job, prepare: Callable[[], None]) -> int:
    """Run in a forked process that calls `prepare` first: its number.

    As at an interpreter's end, a standard stream that cannot be flushed is status 120.
    """
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70  # of a traceback
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` may have ignored it
        prepare()
        sys.argv = [job.script + ".py"]
        main = importlib.import_module(job.script).main
        try:
            cli.run_script(lambda: main(job.argv))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except OSError:
            status = 120
    finally:
        os._exit(status)


def say_to(stdout: int | None, stderr: int | None) -> None:
    """Let both go to these descriptors, or be closed, as an interpreter finds them at its start."""
    for name, number, given in (("stdout", 1, stdout), ("stderr", 2, stderr)):
        if given is None:
            os.close(number)
            setattr(sys, name, None)
        else:
            os.dup2(given, number)
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 - for good
            setattr(sys, name, stream)


def read_log(job: faults.Job) -> list[dict[str, Any]]:
    """The records of the newest log. Raises `ValueError` where a line is none."""
    paths = (job.folder / "runs").glob("*/log.jsonl")
    newest = max(paths, key=lambda path: path.stat().st_mtime_ns)
    text = newest.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError(f"the log ends with {text[-40:]!r}")
    return [json.loads(line) for line in text.splitlines()]


@functools.cache
def undisturbed(job: faults.Job) -> tuple[dict[str, bytes], list[str]]:
    """The bytes of a run that nobody disturbs, and the kinds of its log's records."""
    job.clear()
    status, said = job.run()
    if status:
        raise ValueError(f"{job.what} fails undisturbed: {said.strip()}")
    found = job.result(), [record["kind"] for record in read_log(job)]
    job.clear()
    return found


def check_loses(job: faults.Job, name: str, prepare: Callable[[], None]) -> str | None:
    """Run to the end while what is said on one stream is lost; what was wrong."""
    expected, kinds = undisturbed(job)
    job.clear()
    status = faults.wait(begin(job, prepare), faults.MAX_SECONDS)
    if status or job.result() != expected:
        return f"status {status}" + ("" if status else ", other weights")
    records = read_log(job)
    if [record["kind"] for record in records] != kinds:
        return "another log"
    lost = records[-1].get("lost_output")
    return None if lost and lost.startswith(name) else f"the log calls lost: {lost}"


def said_file(job: faults.Job) -> int:
    """A new file for what is said, open."""
    return os.open(job.folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def broken_pipe() -> int:
    """A pipe that nobody reads, open."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def stdout_closed(job: faults.Job, rng: np.random.Generator) -> str | None:
    """`| head -1`, or `>&-`."""
    is_pipe = rng.random() < 0.5

    def prepare() -> None:
        say_to(broken_pipe() if is_pipe else None, said_file(job))

    return check_loses(job, "standard output", prepare)


def stdout_full(job: faults.Job, _: np.random.Generator) -> str | None:
    """`> /dev/full`."""
    if not Path("/dev/full").exists():
        return None
    return check_loses(
        job, "standard output", lambda: say_to(os.open("/dev/full", os.O_WRONLY), said_file(job))
    )


def stderr_closed(job: faults.Job, _: np.random.Generator) -> str | None:
    """`2>&-`: the next file that is opened must not take its number."""
    return check_loses(job, "standard error", lambda: say_to(said_file(job), None))


def check_stops(
    job: faults.Job, read_end: int, write_end: int, signals: list[int], delay_s: float
) -> str | None:
    """After the first checkpoint close the output's other end and send signals; what was wrong."""
    expected, _ = undisturbed(job)
    job.clear()

    def prepare() -> None:
        os.close(read_end)
        say_to(write_end, write_end)

    process = begin(job, prepare)
    os.close(write_end)
    end = time.monotonic() + faults.MAX_SECONDS
    while not checkpoints_in(job.output) and time.monotonic() < end:
        time.sleep(0.002)
    time.sleep(delay_s)
    os.close(read_end)
    for number in signals:
        os.kill(process, number)
    status = faults.wait(process, faults.MAX_SECONDS)
    if status != 0:  # else it was faster
        last = read_log(job)[-1]
        if status != 128 + signals[0] or last["kind"] != "stopped":
            return f"status {status}, the log ends with {last['kind']}"
        if not (job.output / f"step-{last['step']:010}").exists():
            return f"step {last['step']} is not kept"
        status, text = job.run()
        if "going on with" not in text:
            return f"it is not gone on with: {text[-300:]}"
    return None if status == 0 and job.result() == expected else f"status {status}, other weights"


def tee_killed(job: faults.Job, rng: np.random.Generator) -> str | None:
    """Ctrl-C under `2>&1 | tee log`: the other end dies first."""
    return check_stops(job, *os.pipe(), [signal.SIGINT], rng.uniform(0, MAX_DELAY_S))


def hang_up(job: faults.Job, rng: np.random.Generator) -> str | None:
    """The terminal goes; the shell and the kernel both say so."""
    signals = [signal.SIGHUP, signal.SIGHUP]
    return check_stops(job, *pty.openpty(), signals, rng.uniform(0, MAX_DELAY_S))


def full_disk(job: faults.Job, rng: np.random.Generator) -> str | None:
    """The log's disk is full from some record on, for a while or for good."""
    expected, kinds = undisturbed(job)
    job.clear()
    first = int(rng.integers(1, len(kinds)))
    stays = rng.random() < 0.5
    last = math.inf if stays else first + int(rng.integers(2, len(kinds)))

    def prepare() -> None:
        said = said_file(job)
        say_to(said, said)
        runlog.os = FullDisk(first, last)  # type: ignore[assignment]

    status = faults.wait(begin(job, prepare), faults.MAX_SECONDS)
    said = (job.folder / "said.txt").read_text(encoding="utf-8")
    found = [record["kind"] for record in read_log(job)]
    missing = kinds[len(found) :]
    if found + missing != kinds or bool(missing) != (status == 2):
        return f"status {status}, {len(found)} of {len(kinds)} records: {said[-300:]}"
    lost = ", ".join(f"{count} {kind}" for kind, count in Counter(missing).items())
    if missing and f"lacks records ({lost})" not in said:
        return f"it does not say what is lost: {said[-300:]}"
    if stays and not missing:
        return "the disk was not full"
    return None if job.result() == expected else "other weights"


SCENES: dict[str, Callable[[faults.Job, np.random.Generator], str | None]] = {
    "stdout closed": stdout_closed,
    "stdout full": stdout_full,
    "stderr closed": stderr_closed,
    "tee killed by Ctrl-C": tee_killed,
    "hang-up": hang_up,
    "full disk under the log": full_disk,
}
