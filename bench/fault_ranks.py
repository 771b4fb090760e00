"""What happens to a run of two ranks when one of them, or their launcher, is killed.

As `bench.faults` does to one process: SIGKILL after a random time, and the same command again,
until it ends. The launcher must say in one line which rank was killed, with exit status 1, leave
no process behind, and the weights must be those of two ranks that nobody disturbed, byte for byte.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from bench.small_log import REPOSITORY

if TYPE_CHECKING:
    from bench.faults import Job

NUM_RANKS = 2
MAX_SECONDS = 60  # of a run, before it counts as one that hangs
TIMEOUT = {"SLIPSTREAM_RANK_TIMEOUT": "20"}


class RankRun:
    """A trainer's command as two ranks, started; what it says goes to a file."""

    def __init__(self, job: Job) -> None:
        self._said = job.folder / "said.txt"
        command = [sys.executable, str(REPOSITORY / f"{job.script}.py"), *job.argv]
        with open(self._said, "w", encoding="utf-8") as file:
            self.launcher = subprocess.Popen(
                [*command, "--processes", str(NUM_RANKS)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **TIMEOUT},
            )
        self.ranks: list[int] = []

    def find_ranks(self) -> list[int]:
        """Process numbers of the ranks that run, in the order of their start."""
        pid = self.launcher.pid
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
            self.ranks = [int(word) for word in children.split()] or self.ranks
        return self.ranks

    def end(self) -> tuple[int, str, list[int]]:
        """Wait for the end: exit status, what was said, and processes that are left."""
        end = time.monotonic() + MAX_SECONDS
        while self.launcher.poll() is None and time.monotonic() < end:
            self.find_ranks()
            time.sleep(0.02)
        if self.launcher.poll() is None:
            self.launcher.kill()
        status = self.launcher.wait()
        # Of a launcher that was killed the ranks write a last checkpoint.
        while (left := [pid for pid in self.ranks if _runs(pid)]) and time.monotonic() < end:
            time.sleep(0.02)
        return status, self._said.read_text(encoding="utf-8", errors="replace"), left


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z"


def kill_ranks(job: Job, num_kills: int, rng: np.random.Generator, bar: tqdm) -> dict[str, Any]:
    """Kill and start again until so many kills are made; counts, and what was wrong."""
    job.clear()
    start = time.monotonic()
    status, said, _ = RankRun(job).end()
    if status:
        raise ValueError(f"{job.what} of {NUM_RANKS} ranks fails undisturbed: {said.strip()}")
    whole_run, expected = time.monotonic() - start, job.result()
    job.clear()
    counts: Counter[str] = Counter()
    faults: list[str] = []
    while counts["kills"] < num_kills:
        run = RankRun(job)
        moment = time.monotonic() + float(rng.uniform(0.3, 1.0)) * whole_run
        while run.launcher.poll() is None and time.monotonic() < moment:
            time.sleep(0.005)
        target = int(rng.integers(NUM_RANKS + 1))  # the last is the launcher
        ranks = run.find_ranks()
        victim = run.launcher.pid if target == NUM_RANKS or len(ranks) <= target else ranks[target]
        is_killed = run.launcher.poll() is None
        if is_killed:
            counts["in a checkpoint"] += any(job.output.glob("*.partial"))
            os.kill(victim, signal.SIGKILL)
            counts["kills"] += 1
            bar.update()
        status, said, left = run.end()
        counts["resumed"] += "going on with" in said
        if left:
            faults.append(f"{job.what}: processes {left} are left")
        if is_killed and status != 0:
            faults += _wrong_end(job, run, victim, status, said)
        if status == 0 or counts["kills"] == num_kills:
            if status:
                status, said, _ = RankRun(job).end()
                counts["resumed"] += "going on with" in said
            counts["runs compared"] += 1
            if status or job.result() != expected:
                faults.append(f"{job.what}: status {status}, other weights: {said[-300:]}")
            job.clear()
    return {**counts, "seconds": whole_run, "faults": faults}


def _wrong_end(job: Job, run: RankRun, victim: int, status: int, said: str) -> list[str]:
    """What is wrong about how a run ended after a kill."""
    errors = [line for line in said.splitlines() if "error: " in line]
    if victim == run.launcher.pid:
        is_right = status == -signal.SIGKILL and not errors
    else:
        rank = run.ranks.index(victim) if victim in run.ranks else "?"
        line = f"error: rank {rank} (process {victim}) was killed by SIGKILL"
        is_right = status == 1 and len(errors) == 1 and line in errors[0]
    is_right = is_right and "Traceback" not in said
    return [] if is_right else [f"{job.what}, killed {victim}: status {status}: {said[-400:]}"]
