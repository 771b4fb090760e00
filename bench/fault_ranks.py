"""What happens to a run of two ranks when one of them, or their launcher, is killed.

As `bench.faults` does to one process: SIGKILL after a random time, and the same command again,
until it ends. The launcher must say in one line which rank was killed, with exit status 1, leave
no process behind, and the weights must be those of two ranks that nobody disturbed, byte for byte.
Scenes: a rank that is stopped, a launcher that is told to end, a disk that fills under rank 0, and
what torchrun makes of a rank that is killed.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from bench.small_log import REPOSITORY
from slipstream.training.saved import checkpoints_in, open_checkpoint

if TYPE_CHECKING:
    from bench.faults import Job

NUM_RANKS = 2
MAX_SECONDS = 60  # of a run, before it counts as one that hangs
LEFT_SECONDS = 10  # of ranks whose launcher has gone
START_S = 3.0  # about as long as ranks take to start
MAX_DELAY_S = 0.5  # between a run's first checkpoint and what happens to it
FULL_BYTES = 1_000_000  # of a file: more than the log, less than a checkpoint
TIMEOUT = {"SLIPSTREAM_RANK_TIMEOUT": "20"}
HOST = socket.gethostname()
_known: dict[Path, tuple[float, dict[str, bytes]]] = {}  # of undisturbed runs, by output
NOBODY = """
from slipstream.tools import processes
import slipstream_train
processes.START_S = 1.0
processes.run_script(slipstream_train.main)
"""


class RankRun:
    """A trainer's command as two ranks, started; what it says goes to a file.

    `launcher`: what stands between the interpreter and the script, as torchrun's; not given: the
    script's own one.
    """

    def __init__(self, job: Job, *launcher: str, **environment: str) -> None:
        self._said = job.folder / "said.txt"
        command = [sys.executable, *launcher, str(REPOSITORY / f"{job.script}.py"), *job.argv]
        if not launcher:
            command += ["--processes", str(NUM_RANKS)]
        with open(self._said, "w", encoding="utf-8") as file:
            self.launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **TIMEOUT, **environment},
            )
        self.ranks: list[int] = []

    @property
    def said(self) -> str:
        """What it said so far."""
        return self._said.read_text(encoding="utf-8", errors="replace")

    def runs_for(self, seconds: float, until: Callable[[], object] = lambda: False) -> bool:
        """Whether it still runs after so long, or as soon as something is so."""
        end = time.monotonic() + seconds
        while self.launcher.poll() is None and time.monotonic() < end and not until():
            self.find_ranks()
            time.sleep(0.002)
        return self.launcher.poll() is None

    def find_ranks(self) -> list[int]:
        """Process numbers of the ranks that were started, in that order."""
        pid = self.launcher.pid
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
            self.ranks = max(self.ranks, [int(word) for word in children.split()], key=len)
        return self.ranks

    def end(self) -> tuple[int, str, list[int]]:
        """Wait for the end: exit status, what was said, and processes that are left."""
        if self.runs_for(MAX_SECONDS):
            self.launcher.kill()
        status = self.launcher.wait()
        # Of a launcher that was killed the ranks write a last checkpoint.
        end = time.monotonic() + LEFT_SECONDS
        while (left := [pid for pid in self.ranks if _runs(pid)]) and time.monotonic() < end:
            time.sleep(0.02)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return status, self.said, left


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
    except OSError:
        return False
    return state != "Z"


def undisturbed(job: Job) -> tuple[float, dict[str, bytes]]:
    """Seconds and bytes of two ranks that nobody disturbs; what is there is deleted."""
    job.clear()
    if job.output not in _known:
        start = time.monotonic()
        status, said, _ = RankRun(job).end()
        if status:
            raise ValueError(f"{job.what} of {NUM_RANKS} ranks fails undisturbed: {said.strip()}")
        _known[job.output] = time.monotonic() - start, job.result()
        job.clear()
    return _known[job.output]


def kill_ranks(job: Job, num_kills: int, rng: np.random.Generator, bar: tqdm) -> dict[str, Any]:
    """Kill and start again until so many kills are made; counts, and what was wrong."""
    whole_run, expected = undisturbed(job)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    while counts["kills"] < num_kills:
        run = RankRun(job)
        is_killed = run.runs_for(float(rng.uniform(0, 1)) * whole_run)
        if rng.random() < 0.5:  # a checkpoint is half written
            is_killed = run.runs_for(MAX_SECONDS, lambda: any(job.output.glob("step-*.partial")))
        target = int(rng.integers(NUM_RANKS + 1))  # the last is the launcher
        ranks = run.find_ranks()
        victim = run.launcher.pid if target == NUM_RANKS or len(ranks) <= target else ranks[target]
        is_within = any(job.output.glob("*.partial"))
        is_killed = is_killed and _kill(victim)
        if is_killed:
            counts["in a checkpoint"] += is_within
            counts["kills"] += 1
            bar.update()
        status, said, left = run.end()
        counts["resumed"] += "going on with" in said
        if left:
            faults.append(f"{job.what}: processes {left} are left")
        if is_killed and status != 0:
            faults += _wrong_end(job, run, victim, status, said)
        elif status != 0:
            faults.append(f"{job.what}: status {status}: {said[-300:]}")
        faults += [f"{job.what}: {text}" for text in (_does_not_load(job),) if text]
        if status == 0 or counts["kills"] == num_kills:
            if status:
                faults += [f"{job.what}: {text}" for text in (_in_one_process(job),) if text]
                status, said, _ = RankRun(job).end()
                counts["resumed"] += "going on with" in said
            counts["runs compared"] += 1
            if status or job.result() != expected:
                faults.append(f"{job.what}: status {status}, other weights: {said[-300:]}")
            job.clear()
    return {**counts, "seconds": whole_run, "faults": faults}


def _kill(pid: int) -> bool:
    """Kill a process; False where it has ended meanwhile."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _does_not_load(job: Job) -> str | None:
    for path in checkpoints_in(job.output):
        try:
            open_checkpoint(path)
        except (OSError, ValueError) as error:
            return str(error)
    return None


def _in_one_process(job: Job) -> str | None:
    """Whether one process goes on, and what is wrong; the checkpoints stay as they are."""
    kept = job.folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    if job.output.exists():
        shutil.copytree(job.output, kept)
    status, said = job.run()
    job.clear()
    if kept.exists():
        kept.rename(job.output)
    return f"in one process: status {status}: {said[-300:]}" if status else None


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


def _goes_on(job: Job, run: RankRun, status: int, errors: Sequence[str]) -> str | None:
    """What is wrong about a run's end with a status and lines that begin so, or with its sequel."""
    found, said, left = run.end()
    lines = [line for line in said.splitlines() if ".py: error: " in line]
    is_said = all(line.startswith(text) for line, text in zip(lines, errors, strict=False))
    if found != status or left or len(lines) != len(errors) or not is_said:
        return f"status {found}, {left} are left: {said[-600:]}"
    if text := _does_not_load(job):
        return text
    if status:
        found, said, _ = RankRun(job).end()
        if found or "going on with" not in said:
            return f"gone on with: status {found}: {said[-300:]}"
    return None if job.result() == undisturbed(job)[1] else "other weights"


def _trains(job: Job, run: RankRun, rng: np.random.Generator) -> bool:
    """Whether it still runs some time after its first checkpoint."""
    is_there = run.runs_for(MAX_SECONDS, lambda: checkpoints_in(job.output))
    return is_there and run.runs_for(float(rng.uniform(0, MAX_DELAY_S)))


def _line_of_lost(job: Job, run: RankRun, rank: int) -> str:
    where = f"{HOST}, process {run.ranks[rank]}"
    return f"{job.script}.py: error: rank {rank} ({where}) does not answer"


def rank_stopped(job: Job, rng: np.random.Generator) -> str | None:
    """A rank does not answer (SIGSTOP)."""
    undisturbed(job)
    run, rank = RankRun(job, SLIPSTREAM_RANK_TIMEOUT="4"), int(rng.integers(NUM_RANKS))
    if not _trains(job, run, rng):
        return f"it ended: {run.said[-300:]}"
    os.kill(run.ranks[rank], signal.SIGSTOP)
    return _goes_on(job, run, 2, [_line_of_lost(job, run, rank)])


def launcher_told_to_end(job: Job, rng: np.random.Generator) -> str | None:
    """SIGTERM: all ranks end after a mini-batch, with a checkpoint."""
    undisturbed(job)
    run = RankRun(job)
    if not _trains(job, run, rng):
        return f"it ended: {run.said[-300:]}"
    run.launcher.terminate()
    return _goes_on(job, run, 128 + signal.SIGTERM, [])


def told_to_end_early(job: Job, rng: np.random.Generator) -> str | None:
    """SIGTERM while the ranks start: none is left, and no line speaks of another reason."""
    undisturbed(job)
    run = RankRun(job)
    run.runs_for(MAX_SECONDS, lambda: len(run.ranks) == NUM_RANKS)
    run.runs_for(float(rng.uniform(0, START_S)))
    run.launcher.terminate()
    status, said, left = run.end()
    is_right = status == 128 + signal.SIGTERM and not left and "rror" not in said
    return None if is_right else f"status {status}, {left} are left: {said[-600:]}"


def full_disk_of_checkpoints(job: Job, rng: np.random.Generator) -> str | None:
    """Rank 0 cannot write one: all ranks train on, as if it had."""
    undisturbed(job)
    run = RankRun(job)
    if not _trains(job, run, rng):
        return f"it ended: {run.said[-300:]}"
    limits = resource.prlimit(run.ranks[0], resource.RLIMIT_FSIZE)
    resource.prlimit(run.ranks[0], resource.RLIMIT_FSIZE, (FULL_BYTES, limits[1]))
    run.runs_for(MAX_SECONDS, lambda: "no checkpoint" in run.said)
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(run.ranks[0], resource.RLIMIT_FSIZE, limits)
    wrong = _goes_on(job, run, 0, [])
    return wrong or (None if "training goes on" in run.said else "the disk was not full")


def torchrun_rank_killed(job: Job, rng: np.random.Generator) -> str | None:
    """Torchrun ends the others at once: the line that names the rank comes before."""
    undisturbed(job)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS)]
    run, rank = RankRun(job, *launcher), int(rng.integers(NUM_RANKS))
    if not _trains(job, run, rng):
        return f"it ended: {run.said[-300:]}"
    os.kill(run.ranks[rank], signal.SIGKILL)
    return _goes_on(job, run, 1, [_line_of_lost(job, run, rank)])


def nobody_listens(job: Job, _: np.random.Generator) -> str | None:
    """A rank whose launcher is not where it is said to be."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        where = {"RANK": "1", "WORLD_SIZE": "2", **place}
        run = RankRun(job, "-c", NOBODY, SLIPSTREAM_RANK_TIMEOUT="1", **where)
        status, said, _ = run.end()
    line = f"-c: error: rank 1: the 2 ranks did not find each other at {':'.join(place.values())}"
    is_right = status == 2 and said.startswith(line) and said.count("\n") == 1
    return None if is_right else f"status {status}: {said[-600:]}"


SCENES: dict[str, Callable[[Job, np.random.Generator], str | None]] = {
    "rank stopped": rank_stopped,
    "launcher told to end": launcher_told_to_end,
    "launcher told to end early": told_to_end_early,
    "rank 0's disk full": full_disk_of_checkpoints,
    "torchrun, rank killed": torchrun_rank_killed,
    "nobody listens": nobody_listens,
}
