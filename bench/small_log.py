"""A small synthetic log, preprocessed and segregated, for short forms of the benchmarks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# A model for it: an epoch takes less than a second, and learns.
ROW_FLAGS = ("--arch-sparse-feature-size", "8", "--optimizer", "rwsadagrad")
MODEL_FLAGS = (
    *ROW_FLAGS,
    *"--arch-mlp-bot 13-32-8 --arch-mlp-top 32-1 --mini-batch-size 128".split(),
    *"--learning-rate 0.05 --lr-decay-share 0 --precision fp32 --device cpu".split(),
)


def make_small_log(folder: Path, num_rows: int, budget_bytes: int) -> tuple[Path, Path]:
    """Its processed file and segregated folder, below `folder`, by processes of their own."""
    log, processed, hot_cold = (
        folder / name for name in ("train.txt", "train_processed.npz", "hot_cold")
    )
    for words in (
        ["bench/synthetic_log.py", "--rows", num_rows, "--output", log],
        ["data_utils.py", "--raw-data-file", log, "--processed-data-file", processed],
        ["input_segregation.py", "--processed-data-file", processed, *ROW_FLAGS]
        + ["--segregated-data-dir", hot_cold, "--hot-emb-gpu-mem", budget_bytes],
    ):
        run_here(*words)
    return processed, hot_cold


def run_here(*words: object) -> None:
    """Run a script of the repository; `ValueError` with what it said where it fails."""
    command: Sequence[str] = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip()}")
