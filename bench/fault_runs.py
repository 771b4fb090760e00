"""What two runs at once do to each other: scenes of `bench.faults`.

Each scene starts `run_fae_baseline.sh` twice, the second after a random time, with files of the
same names: of two logs, or of one log with two budgets. A run that ends with status 0 must have
trained on what its own call asked for; one that does not must say why in one line, with status 2.
Half a minute a scene on 2 busy cores.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.small_log import MODEL_FLAGS, REPOSITORY, run_here
from slipstream.tools.npz import fingerprint

if TYPE_CHECKING:
    from bench.faults import Job

NUM_ROWS = 3000
MAX_DELAY_S = 8.0  # about as long as a run takes
Variables = dict[str, str]


def two_logs(job: Job, rng: np.random.Generator) -> str | None:
    """Two logs whose processed file has one name."""
    folder = _emptied(job.folder / "two-logs")
    calls = []
    for seed in (1, 2):
        log, alone = folder / f"{seed}.txt", folder / f"{seed}_processed.npz"
        run_here("bench/synthetic_log.py", "--rows", NUM_ROWS, "--seed", seed, "--output", log)
        run_here("data_utils.py", "--raw-data-file", log, "--processed-data-file", alone)
        calls.append(({"RAW_DATA": str(log)}, (fingerprint(alone), 20_000)))
    return _side_by_side(folder, calls, float(rng.uniform(0, MAX_DELAY_S)))


def two_budgets(job: Job, rng: np.random.Generator) -> str | None:
    """One log, with two amounts of memory for hot rows."""
    folder = _emptied(job.folder / "two-budgets")
    log, alone = folder / "1.txt", folder / "1_processed.npz"
    run_here("bench/synthetic_log.py", "--rows", NUM_ROWS, "--output", log)
    run_here("data_utils.py", "--raw-data-file", log, "--processed-data-file", alone)
    calls = []
    for budget in (20_000, 60_000):
        asked = {"RAW_DATA": str(log), "HOT_EMB_GPU_MEM": str(budget)}
        calls.append((asked, (fingerprint(alone), budget)))
    return _side_by_side(folder, calls, float(rng.uniform(0, MAX_DELAY_S)))


SCENES: dict[str, Callable[[Job, np.random.Generator], str | None]] = {
    "two logs at once": two_logs,
    "two budgets at once": two_budgets,
}


def _emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _side_by_side(
    folder: Path, calls: Sequence[tuple[Variables, tuple[str, int]]], delay_s: float
) -> str | None:
    """Start each call `delay_s` after the one before; what is wrong.

    A call is its variables, and the log and the budget that it is to be trained with.
    """
    started = []
    for number, (variables, _) in enumerate(calls):
        time.sleep(delay_s * (number > 0))
        started.append(_start(folder, f"run-{number}", variables))
    wrong = []
    for number, (process, (_, asked)) in enumerate(zip(started, calls, strict=True)):
        said, status = process.communicate()[0], process.returncode
        errors = [line for line in said.splitlines() if "error: " in line]
        if status == 2 and len(errors) == 1 and "Traceback" not in said:
            continue
        found = None if status else _trained_with(folder / "runs" / f"run-{number}" / "log.jsonl")
        if found != asked:
            wrong.append(f"run {number}: status {status}, {found} for {asked}: {said[-300:]}")
    return f"{delay_s:.2f} s apart: {'; '.join(wrong)}" if wrong else None


def _start(folder: Path, name: str, variables: Variables) -> subprocess.Popen[str]:
    files = {"PROCESSED_DATA": folder / "p.npz", "HOT_COLD": folder / "hot_cold"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLIPSTREAM_")}
    environment |= {"PYTHON": sys.executable, "HOT_EMB_GPU_MEM": "20000", "EMB_DIM": "8"}
    environment |= {**{k: str(v) for k, v in files.items()}, **variables}
    flags = [*MODEL_FLAGS, *"--num-threads 1 --num-batches 3".split()]
    return subprocess.Popen(
        ["./run_fae_baseline.sh", *flags, "--runs-dir", str(folder / "runs"), "--run-name", name],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )


def _trained_with(log: Path) -> tuple[str, int]:
    """The fingerprint of the log's processed file, and the budget, that a run began with."""
    with open(log, encoding="utf-8") as file:
        begun: dict[str, Any] = json.loads(file.readline())
    return begun["log_identity"], begun["data"]["options"]["hot_emb_gpu_mem"]
