"""What a damaged model folder does to its scores, for `bench.faults`: nothing, or it is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.fault_links import fresh_job
from bench.faults import Job, spoil

NUM_LINES = 300


def damaged_model(job: Job, rng: np.random.Generator) -> str | None:
    """A byte of a checkpoint or of the vocabulary is another, or the file is cut short."""
    with fresh_job(job, "FAE") as (run, away):
        status, said = run.run("--num-batches", "20", "--checkpoint-every", "0")
        if status:
            return f"training: status {status}: {said[-300:]}"
        model, log, scores = run.output, away / "new.txt", away / "scores.csv"
        lines = (job.folder / "train.txt").read_bytes().split(b"\n")[:NUM_LINES]
        log.write_bytes(b"\n".join(lines) + b"\n")
        run.script = "predict"
        run.argv = [
            "--load-model",
            str(model),
            "--raw-data-file",
            str(log),
            "--output",
            str(scores),
        ]
        status, said = run.run()
        if status:
            return f"undisturbed: status {status}: {said[-300:]}"
        expected = scores.read_bytes()
        scores.unlink()
        files = sorted(path for path in model.rglob("*") if path.is_file())
        what = spoil(files[int(rng.integers(len(files)))], rng)
        status, said = run.run()
        is_told = status == 2 and said.count(": error: ") == 1 and "Traceback" not in said
        if is_told and not scores.exists():
            return None
        if status == 0 and scores.read_bytes() == expected:
            return None
        return f"{what}: status {status}: {said[-300:]}"


SCENES: dict[str, Callable[[Job, np.random.Generator], str | None]] = {
    "damaged model": damaged_model,
}
