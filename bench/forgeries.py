"""The jobs of `bench.faults --forgeries N`: what is forged, and which script reads it.

Small runs of forks: each takes 0.2 to 0.4 s, so 5,000 forgeries take half an hour on 2 cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from tqdm import tqdm

from bench import forger
from bench.forger import Forgery
from bench.small_log import ROW_FLAGS
from slipstream.tools.npz import NpzWriter, fingerprint

NUM_ROWS, BUDGET = 2400, 100_000  # bytes of hot rows
SHORT = "--nepochs 1 --val-freq 6 --mini-batch-size 64 --drop-min-steps 0".split()
STEPS = {"a window is open": 14, "a choice was made": 22, "between two epochs": 0}

Scene = tuple[Any, list[Path], list[Forgery], dict[str, bytes]]


def scenes(folder: Path, make_job: Callable[[Path, str], Any]) -> dict[str, Callable[[], Scene]]:
    """By name, what makes a job, the places that it reads, their forgeries, and the result."""
    processed, hot_cold = _small_log(folder, make_job)
    found: dict[str, Callable[[], Scene]] = {
        "segregated": lambda: _data(make_job(folder, "Slipstream"), hot_cold),
        "processed": lambda: _data(make_job(folder, "baseline"), processed),
        "to segregate": lambda: _data(make_job(folder, "segregation"), processed),
        "ranking": lambda: _ranking(make_job(folder, "segregation")),
        "encoded": lambda: _work(PrepareJob(folder, make_job), "Work.plan", _end),
        "written": lambda: _work(PrepareJob(folder, make_job), "NpzWriter", _Unfinished),
    }
    for name, step in STEPS.items():
        found[f"checkpoint, {name}"] = partial(_checkpoint, folder, make_job, "Slipstream", step)
    found["checkpoint, baseline"] = partial(_checkpoint, folder, make_job, "baseline", 7)
    return found


def _data(job: Any, place: Path) -> Scene:
    job.argv += _flags(job.what)
    expected = _undisturbed(job)
    if job.what == "segregation":  # its manifest names the file, which is another one
        files = [path.name for path in place.with_name("hot_cold").glob("*.npz")]
        job.result = lambda: {name: fingerprint(job.output / name).encode() for name in files}
        expected = _undisturbed(job)
    is_file = place.suffix == ".npz"
    return job, [place], (forger.of_npz if is_file else forger.of_segregated)(place), expected


def _checkpoint(folder: Path, make_job: Callable[[Path, str], Any], what: str, step: int) -> Scene:
    job = make_job(folder, what)
    # Where there is a best one, a checkpoint that is left out is not missed.
    job.argv += [*_flags(what), *(["--val-freq", "0"] if step else ["--nepochs", "2"])]
    expected = _undisturbed(job)
    more = ["--num-batches", str(step)] if step else ["--nepochs", "1"]
    status, said = job.run(*more, "--keep", "1")
    assert not status, said
    (found,) = job.output.glob("step-*")
    return job, [job.output], forger.of_checkpoint(found), expected


def _ranking(job: Any) -> Scene:
    expected = _undisturbed(job)
    partial_folder = job.output.with_name(job.output.name + ".partial")
    with mock.patch("slipstream.training.segregation._write_sets", _end):
        job.run()
    return job, [partial_folder], forger.of_npz(partial_folder / "ranking.npz"), expected


def _work(job: PrepareJob, name: str, ends: Any) -> Scene:
    """A work folder of preprocessing that ended where `name` of `stages` is called."""
    expected = _undisturbed(job)
    with mock.patch(f"slipstream.logs.stages.{name}", ends):
        job.run()
    (there,) = job.output.glob("*.work")
    found = [one for path in sorted(there.rglob("*.json")) for one in forger.of_json(path)]
    for path in sorted(there.rglob("vocabularies.npz")):
        found += forger.of_npz(path)
    return job, [job.output], found, expected


def _end(*_: Any) -> None:
    os._exit(0)


def _small_log(folder: Path, make_job: Callable[[Path, str], Any]) -> tuple[Path, Path]:
    """As `make_small_log`, by forks: imports take most of its time."""
    log, processed, hot_cold = (
        folder / name for name in ("train.txt", "train_processed.npz", "hot_cold")
    )
    words = ["--processed-data-file", processed, *ROW_FLAGS, "--segregated-data-dir", hot_cold]
    for script, flags in (
        ("bench.synthetic_log", ["--rows", NUM_ROWS, "--output", log]),
        ("data_utils", ["--raw-data-file", log, "--processed-data-file", processed]),
        ("input_segregation", [*words, "--hot-emb-gpu-mem", BUDGET]),
    ):
        job = make_job(folder, "segregation")
        job.script, job.argv = script, list(map(str, flags))
        status, said = job.run()
        if status:
            raise ValueError(f"{script}: {said.strip()}")
    return processed, hot_cold


def _flags(what: str) -> list[str]:
    if what == "segregation":
        return []
    only = SHORT[:6] if what == "baseline" else SHORT
    return [*only, "--checkpoint-every", "0"]


def _undisturbed(job: Any) -> dict[str, bytes]:
    job.clear()
    status, said = job.run()
    if status:
        raise ValueError(f"{job.what} fails undisturbed: {said.strip()}")
    expected = job.result()
    job.clear()
    return expected


class PrepareJob:
    """Preprocessing of the log in `folder`."""

    def __init__(self, folder: Path, make_job: Callable[[Path, str], Any]) -> None:
        self._job = make_job(folder, "segregation")
        self.what = self._job.what = "preprocessing"
        self.output = self._job.output = folder / "prepared"
        self._processed = self.output / "log.npz"
        self._job.script = "data_utils"
        log = ["--raw-data-file", folder / "train.txt", "--processed-data-file", self._processed]
        self._job.argv = list(map(str, log))

    def run(self, *more: str) -> tuple[int, str]:
        """Preprocess in a fork."""
        self.output.mkdir(exist_ok=True)
        return self._job.run(*more)

    def result(self) -> dict[str, bytes]:
        """What identifies the arrays."""
        return {"log": fingerprint(self._processed).encode()}

    def clear(self) -> None:
        """Delete what was written."""
        self._job.clear()


class _Unfinished(NpzWriter):
    def finish(self) -> None:
        """End the process before the file is whole."""
        os._exit(0)


def run_forgeries(
    folder: Path, make_job: Callable[[Path, str], Any], num: int, rng: np.random.Generator
) -> dict[str, dict[str, Any]]:
    """Of each scene's forgeries as many as its share of `num`, by chance; the counts."""
    folder.mkdir()
    found: dict[str, dict[str, Any]] = {}
    made = scenes(folder, make_job)
    with tqdm(total=num, desc="forgeries", disable=None) as bar:
        for number, (name, make) in enumerate(made.items()):
            share = num // len(made) + (number < num % len(made))
            if not share:
                continue
            job, places, forgeries, expected = make()
            chosen = sorted(rng.permutation(len(forgeries))[:share].tolist())
            cases = [forgeries[case] for case in chosen]
            found[name] = forger.forge(job, places, cases, expected, bar)
            found[name]["possible"] = len(forgeries)
    return found
