"""The runs of `bench.scaling`: trainings by W processes in turn, and what their logs say."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bench.run_records import Records, all_training_s, finished_records, run_once
from slipstream.tools.runtime import read_json, write_json

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS = {"fae": "fae_train.py", "slipstream": "slipstream_train.py"}
CPU_FILE = "cpu.json"  # beside a run's log: CPU seconds of all its processes
# By kind, as a summary's `communication` has them: the parts of `scaling_model.received_bytes`.
KINDS = {
    "network": ("network",),
    "hot_rows": ("hot_gradients", "hot_new_rows"),
    "cold_rows": ("cold",),
}
START = "start"


@dataclass(frozen=True)
class Job:
    """A training: `scaling` is strong, weak, or for one process both; or the start alone."""

    scaling: str
    processes: int
    repetition: int = 1

    @property
    def folder(self) -> str:
        """Its run's name."""
        return f"w{self.processes}-{self.scaling}-{self.repetition}"


def jobs_of(processes: Sequence[int], num_repetitions: int) -> list[Job]:
    """All trainings, so that what changes on the machine meets each number of processes alike.

    One process first, against which others are held, and a start of each: one mini-batch, whose
    CPU time is not that of the steps.
    """
    jobs = []
    for repetition in range(1, num_repetitions + 1):
        for number in sorted({1, *processes}):
            for scaling in (START, "both") if number == 1 else (START, "strong", "weak"):
                jobs.append(Job(scaling, number, repetition))
    return jobs


def threads_of(processes: int) -> int:
    """CPU threads of each of so many processes on this machine."""
    return max(len(os.sched_getaffinity(0)) // processes, 1)


def command_of(job: Job, method: str, data_dir: str, mini_batch: int, flags: list[str]) -> list:
    """What runs a job; `mini_batch` is the joined one, of weak scaling a rank's."""
    joined = mini_batch * (job.processes if job.scaling == "weak" else 1)
    words = ["env", f"OMP_NUM_THREADS={threads_of(job.processes)}", sys.executable]
    words += [str(REPOSITORY / SCRIPTS[method]), "--segregated-data-dir", data_dir, *flags]
    words += ["--mini-batch-size", str(joined), "--print-freq", "0"]
    if job.processes > 1:
        words += ["--processes", str(job.processes)]
    return [*words, "--num-batches", "1"] if job.scaling == START else words


def run(job: Job, folder: Path, command: list[str]) -> tuple[Records, float]:
    """A job's records and CPU seconds, of now or of when it finished before (NaN: not known)."""
    path, is_known = folder / CPU_FILE, finished_records(folder) is not None
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    records = run_once(folder, command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not is_known:
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        write_json(path, {"cpu_s": spent})
    cpu_s = read_json(path, dict[str, float])["cpu_s"] if path.exists() else float("nan")
    check_summary(records[-1], job, folder)
    return records, cpu_s


def check_summary(summary: dict[str, Any], job: Job, folder: Path) -> None:
    """Raise `ValueError` where several processes were asked for and the log speaks of others."""
    if job.processes == 1:
        return
    if summary.get("processes") != job.processes:
        said = summary.get("processes", "no number of")
        raise ValueError(f"{folder}: its log has {said} processes; expected {job.processes}")
    needed = ("communication_s", "received_bytes", "communication")
    if lacking := [name for name in needed if name not in summary]:
        raise ValueError(f"{folder}: its log's summary has no {lacking[0]}")


def run_all(
    jobs: Sequence[Job],
    method: str,
    data_dir: str,
    mini_batch: int,
    flags: list[str],
    runs_dir: Path,
) -> dict[Job, dict[str, float]]:
    """Run what has not finished yet; what each took, see `taken`."""
    found = {}
    for job in tqdm(jobs, desc="runs", disable=None):
        command = command_of(job, method, data_dir, mini_batch, flags)
        found[job] = taken(*run(job, runs_dir / job.folder, command))
    return found


def taken(records: Records, cpu_s: float) -> dict[str, float]:
    """A run's steps, samples, seconds of training, of communication, of all CPUs, and bytes."""
    summary = records[-1]
    found = {"steps": summary["step"], "samples": summary["samples"], "cpu_s": cpu_s}
    found["training_s"] = all_training_s(summary)
    found["communication_s"] = summary.get("communication_s", 0.0)
    found["received_bytes"] = summary.get("received_bytes", 0)
    for kind, part in summary.get("communication", {}).items():
        found |= {f"{kind}_s": part["seconds"], f"{kind}_bytes": part["bytes"]}
    return found


def measured(runs: dict[Job, dict[str, float]], mini_batch: int) -> list[dict[str, Any]]:
    """A line a scaling and number of processes: medians over repetitions, a mean step's times.

    The speed-up is over one process in the same repetition; `lowest` and `highest` are of those.
    CPU time a step is that of all processes together, less that of a start, which varies by some
    tenths of a second: short trainings do not tell.
    """
    lines = []
    ranks = sorted({job.processes for job in runs})
    for scaling in ("strong", "weak"):
        for processes in ranks:
            kept = "both" if processes == 1 else scaling
            own = {
                job.repetition: one
                for job, one in runs.items()
                if (job.scaling, job.processes) == (kept, processes)
            }
            line = _line(own, runs, processes)
            inputs = mini_batch if scaling == "weak" else mini_batch // processes
            lines.append({"scaling": scaling, "inputs_a_rank": inputs, **line})
    return lines


def _line(
    own: dict[int, dict[str, float]], runs: dict[Job, dict[str, float]], processes: int
) -> dict[str, Any]:
    def median(values: list[float]) -> float:
        return float(np.median(values))

    def a_step(name: str) -> float:
        return median([one.get(name, 0.0) / one["steps"] for one in own.values()])

    rates = {number: one["samples"] / one["training_s"] for number, one in own.items()}
    speedups = []
    for number, rate in rates.items():
        alone = runs[Job("both", 1, number)]
        speedups.append(rate * alone["training_s"] / alone["samples"])
    cpu_s = []
    for number, one in own.items():
        start = runs[Job(START, processes, number)]
        spent = one["cpu_s"] - start["cpu_s"]
        cpu_s.append(spent / max(one["steps"] - start["steps"], 1))
    step_ms, waiting_ms = 1e3 * a_step("training_s"), 1e3 * a_step("communication_s")
    line = {"processes": processes, "threads": threads_of(processes), "n": len(own)}
    line |= {"samples_per_s": median(list(rates.values())), "speedup": median(speedups)}
    line |= {"lowest": min(speedups), "highest": max(speedups)}
    line |= {"efficiency": line["speedup"] / processes, "step_ms": step_ms}
    line |= {"communication_ms": waiting_ms, "compute_ms": step_ms - waiting_ms}
    line |= {"cpu_ms": 1e3 * median(cpu_s), "received_mb": a_step("received_bytes") / 1e6}
    for kind in (*KINDS, "control"):
        line[f"{kind}_ms"] = 1e3 * a_step(f"{kind}_s")
        line[f"{kind}_mb"] = a_step(f"{kind}_bytes") / 1e6
    return line


def beside_formula(line: dict[str, Any], parts: dict[str, float]) -> dict[str, Any]:
    """A measured line with what the formulas say of it: `formula_mb`, in all and by kind."""
    by_kind = {kind: sum(parts[name] for name in names) / 1e6 for kind, names in KINDS.items()}
    named = {f"{kind}_formula_mb": value for kind, value in by_kind.items()}
    return {**line, "formula_mb": sum(by_kind.values()), **named}
