"""What links, pipes and files of others do to a run, for `bench.faults`.

Each scene sets one up beside a job's data, runs, and tells what was wrong, or None: an archive that
a link leads to stays whole, outputs lie where their links lead, files of others stay, and nothing
is waited for. `rng` decides on steps and names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/faults.py`

from slipstream.training.saved import DESCRIPTION, STATE, checkpoints_in  # noqa: E402

if TYPE_CHECKING:
    from bench.faults import Job


def _contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@contextlib.contextmanager
def fresh_job(job: Job, what: str) -> Iterator[tuple[Job, Path]]:
    """A job of one script on the same data, and a folder for what links lead to."""
    fresh, away = type(job)(job.folder, what), job.folder / "elsewhere"
    shutil.rmtree(away, ignore_errors=True)
    _clear(fresh)
    away.mkdir()
    try:
        yield fresh, away
    finally:
        _clear(fresh)
        shutil.rmtree(away)


def _clear(job: Job) -> None:
    """As `Job.clear`; of an output that is a link, the link."""
    if job.output.is_symlink():
        job.output.unlink()
    job.clear()


def _linked(place: Path, target: Path) -> None:
    place.rename(target)
    place.symlink_to(target, target_is_directory=True)


def linked_checkpoint(job: Job, rng: np.random.Generator) -> str | None:
    """A checkpoint that was moved away for safety, and linked, is rotated out."""
    with fresh_job(job, "FAE") as (run, away):
        run.run("--num-batches", "21")
        link = checkpoints_in(run.output)[int(rng.integers(2))]
        archive = away / link.name
        _linked(link, archive)
        before = _contents(archive)
        status, said = run.run("--num-batches", str(rng.integers(42, 60)))
        if status:
            return f"status {status}: {said[-300:]}"
        if _contents(archive) != before:
            return f"the archive held {sorted(before)}, and holds {sorted(_contents(archive))}"
        return "the link is still there" if os.path.lexists(link) else None


def files_of_others(job: Job, rng: np.random.Generator) -> str | None:
    """A user's files in a checkpoint, and in folders named almost as ours, stay."""
    with fresh_job(job, "FAE") as (run, _):
        run.run("--num-batches", "21")
        step = checkpoints_in(run.output)[0].name
        ends = ("partial", "old", "damaged")
        names = [f"{name}.{end}" for name in ("step-by-step", "step-7", step) for end in ends]
        names = [step, *rng.permutation(names)[:4].tolist()]
        for name in names:
            (run.output / name).mkdir(exist_ok=True)
            (run.output / name / "notes.txt").write_text("mine", encoding="utf-8")
        status, said = run.run("--num-batches", str(rng.integers(42, 60)))
        if status:
            return f"status {status}: {said[-300:]}"
        lost = [name for name in names if not (run.output / name / "notes.txt").exists()]
        if lost:
            return f"notes.txt is gone from {', '.join(lost)}"
        left = [name for name in (DESCRIPTION, STATE) if (run.output / step / name).exists()]
        return f"{step} still holds {', '.join(left)}" if left else None


def linked_best(job: Job, rng: np.random.Generator) -> str | None:
    """The best model lies elsewhere; whether anything is there yet is drawn."""
    stops = [["--num-batches", str(number)] for number in (rng.integers(41, 80), 100)]
    with fresh_job(job, "FAE") as (run, away):
        for stop in stops:
            run.run(*stop)
        expected = _contents(run.output / "best")
        run.clear()
        run.output.mkdir()
        best = away / "best"
        (run.output / "best").symlink_to(best)
        if rng.random() < 0.5:
            best.mkdir()
        for stop in stops:
            status, said = run.run(*stop)
            if status:
                return f"status {status}: {said[-300:]}"
        if not (run.output / "best").is_symlink():
            return "the link is gone"
        return None if _contents(best).get(STATE) == expected[STATE] else "another best model"


def linked_output(job: Job, rng: np.random.Generator) -> str | None:
    """Segregation into a link, again and again, with other budgets and with the first."""
    with fresh_job(job, "segregation") as (run, away):
        run.run()
        expected, target = run.result(), away / "hc"
        if rng.random() < 0.5:
            _linked(run.output, target)
        else:
            run.clear()
            run.output.symlink_to(target)
        for budget in (str(rng.integers(10_000, 50_000)), str(rng.integers(10_000, 50_000)), None):
            status, said = run.run(*(["--hot-emb-gpu-mem", budget] if budget else []))
            if status:
                return f"status {status}: {said[-300:]}"
        if not run.output.is_symlink() or run.result() != expected:
            return "the link is gone, or leads to another result"
        beside = sorted({*os.listdir(away), *os.listdir(job.folder)})
        left = [name for name in beside if name.endswith((".old", ".partial"))]
        return f"left behind: {', '.join(left)}" if left else None


def runs_nowhere(job: Job, rng: np.random.Generator) -> str | None:
    """--runs-dir is a link to what cannot be made, or lies under a file."""
    with fresh_job(job, "baseline") as (run, away):
        (away / "link").symlink_to("gone/runs")
        (away / "file").touch()
        name = ("link", "link/deeper", "file", "file/deeper")[int(rng.integers(4))]
        status, said = run.run("--num-batches", "3", "--runs-dir", str(away / name))
        is_told = status == 2 and said.count(": error: ") == 1 and "Traceback" not in said
        return None if is_told else f"{name}: status {status}: {said[-300:]}"


def endless_files(job: Job, rng: np.random.Generator) -> str | None:
    """A pipe, or a link to a device, where a trainer looks for a file."""
    with fresh_job(job, "FAE") as (run, away):
        names = [path.name for path in sorted((job.folder / "hot_cold").iterdir())]
        name = names[int(rng.integers(len(names)))]
        path = job.folder / "hot_cold" / name
        path.rename(away / name)
        try:
            os.mkfifo(path) if rng.random() < 0.5 else path.symlink_to("/dev/zero")
            status, said = run.run("--num-batches", "3")
        finally:
            path.unlink()
            (away / name).rename(path)
        is_told = status == 2 and said.count(": error: ") == 1 and "Traceback" not in said
        return None if is_told else f"{name}: status {status}: {said[-300:]}"


def endless_notes(job: Job, rng: np.random.Generator) -> str | None:
    """A pipe, or a link to a device, where notes of a raw log would lie."""
    with fresh_job(job, "segregation") as (run, away):
        log = away / "train.txt"
        head = (job.folder / "train.txt").read_bytes()[:400_000]
        log.write_bytes(head[: head.rindex(b"\n") + 1])
        notes = away / "train.txt.json"
        os.mkfifo(notes) if rng.random() < 0.5 else notes.symlink_to("/dev/zero")
        run.script = "data_utils"
        run.argv = ["--raw-data-file", str(log), "--processed-data-file", str(away / "p.npz")]
        status, said = run.run()
        return None if status == 0 else f"status {status}: {said[-300:]}"


SCENES: dict[str, Callable[[Job, np.random.Generator], str | None]] = {
    "linked checkpoint": linked_checkpoint,
    "files of others": files_of_others,
    "linked best": linked_best,
    "linked output": linked_output,
    "runs nowhere": runs_nowhere,
    "endless files": endless_files,
    "endless notes": endless_notes,
}
