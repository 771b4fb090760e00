"""Validation AUC over mini-batches, rates and decays: what the default recipe was chosen by.

    python -m bench.recipe_grid --logs criteo8k=input/criteo8k/train_processed.npz \
        globo=input/globo/clicks_processed.npz@1000000 --csv bench/results/recipe_grid.csv

Trains the baseline for one epoch, rows by row-wise Adagrad and the network by Adam, in each cell of
the grid, from every seed; `@N` takes the first N training inputs. Each result is appended to the
CSV as it comes, and what is there is not trained again, so an interrupted grid goes on and a finer
one adds to it. Then the table: the best cell of each log and mini-batch by the mean over seeds, and
what `slipstream.training.recipe` decides, which is trained, too. The test set is never looked at.
Seconds are of one process among `--workers`, not to be compared.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/recipe_grid.py`

from bench.baseline_run import train_baseline, with_training  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import open_npz  # noqa: E402
from slipstream.training.recipe import decide  # noqa: E402
from slipstream.training.sets import baseline_data  # noqa: E402

COLUMNS = (
    *("log", "num_train", "mini_batch_size", "learning_rate", "dense_learning_rate"),
    *("lr_decay_share", "seed", "val_auc", "val_log_loss", "training_s"),
)


class Cell(NamedTuple):
    """One run of the grid; the first seven columns of the CSV, but for the number of inputs."""

    log: str
    mini_batch_size: int
    learning_rate: float
    dense_learning_rate: float
    lr_decay_share: float
    seed: int


def train(
    cell: Cell, path: str, num_rows: int, num_threads: int, flags: list[str]
) -> dict[str, Any]:
    """Train one cell's model; its line of the CSV."""
    prepared = _prepared(path, num_rows)
    words = [*flags, "--optimizer", "rwsadagrad", "--dense-optimizer", "adam"]
    words += ["--num-threads", str(num_threads)]
    for name, value in zip(Cell._fields[1:], cell[1:], strict=True):
        words += [f"--{name.replace('_', '-')}", str(value)]
    trainer, _ = train_baseline(prepared, words)
    val = trainer.progress.validations[-1]
    return {
        **cell._asdict(),
        "num_train": prepared.data.num_train,
        "val_auc": round(val["auc"], 5),
        "val_log_loss": round(val["log_loss"], 5),
        "training_s": round(trainer.clocks.seconds()["training_s"], 2),
    }


@lru_cache(2)
def _prepared(path: str, num_rows: int) -> Any:
    prepared = baseline_data(load_processed(path))
    num_train = prepared.data.num_train
    return with_training(prepared, 0, min(num_rows or num_train, num_train))


def train_all(
    cells: dict[Cell, tuple[str, str, int]], num_workers: int, num_threads: int, flags: list[str]
) -> Iterator[dict[str, Any]]:
    """The cells' lines as they come, by so many processes; one: this one."""
    if num_workers == 1:
        for cell, log in cells.items():
            yield train(cell, *log[1:], num_threads, flags)
        return
    spawn = multiprocessing.get_context("spawn")  # PyTorch's threads do not survive a fork
    with ProcessPoolExecutor(num_workers, spawn) as pool:
        runs = [
            pool.submit(train, cell, *log[1:], num_threads, flags) for cell, log in cells.items()
        ]
        try:
            for run in as_completed(runs):
                yield run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_results(path: Path) -> dict[Cell, dict[str, Any]]:
    """The CSV's lines by cell; empty where there is none."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    if lines and tuple(lines[0]) != COLUMNS:
        raise ValueError(f"{path} has other columns; expected {','.join(COLUMNS)}")
    return {_cell_of(line): line for line in lines}


def _cell_of(line: dict[str, Any]) -> Cell:
    log, size, *rates, seed = (line[name] for name in Cell._fields)
    return Cell(log, int(size), *(float(rate) for rate in rates), int(seed))


def means(results: Iterable[dict[str, Any]], num_seeds: int) -> dict[tuple, dict[str, float]]:
    """Validation AUC's mean and deviation by cell without its seed, where it has all seeds."""
    found: dict[tuple, list[float]] = {}
    for line in results:
        found.setdefault(_cell_of(line)[:-1], []).append(float(line["val_auc"]))
    return {
        key: {"mean": float(np.mean(aucs)), "sd": float(np.std(aucs, ddof=min(1, num_seeds - 1)))}
        for key, aucs in found.items()
        if len(aucs) >= num_seeds
    }


def table(results: Iterable[dict[str, Any]], num_seeds: int) -> str:
    """For a README: the best cell of each log and mini-batch."""
    results = list(results)
    sizes = {line["log"]: int(line["num_train"]) for line in results}
    best: dict[tuple[str, int], tuple[dict[str, float], tuple]] = {}
    for key, found in means(results, num_seeds).items():
        place = key[:2]
        if place not in best or found["mean"] > best[place][0]["mean"]:
            best[place] = found, key
    lines = [
        "| log | training inputs | mini-batch | rows' rate | network's | decay | validation AUC |",
        "|---|---|---|---|---|---|---|",
    ]
    for (log, size), (found, key) in sorted(best.items(), key=lambda item: item[0]):
        lines.append(
            f"| {log} | {sizes[log]:,} | {size} | {key[2]:g} | {key[3]:g} | {key[4]:g} "
            f"| {found['mean']:.4f} ± {found['sd']:.4f} |"
        )
    return "\n".join(lines)


def decided_table(results: Iterable[dict[str, Any]], cells: dict[str, Cell], num_seeds: int) -> str:
    """For a README: what the recipe decides for each log, and how far below the best cell it is."""
    found = means(results, num_seeds)
    lines = [
        "| log | decided: mini-batch, rates | validation AUC | best cell | its AUC |",
        "|---|---|---|---|---|",
    ]
    for log, cell in cells.items():
        mine = found[cell[:-1]]
        best = max((key for key in found if key[0] == log), key=lambda key: found[key]["mean"])
        size, *rates = (f"{value:g}" for value in cell[1:4])
        lines.append(
            f"| {log} | {size}, {' and '.join(rates)} | {mine['mean']:.4f} ± {mine['sd']:.4f} "
            f"| {best[1]}, {best[2]:g} and {best[3]:g}, decay {best[4]:g} "
            f"| {found[best]['mean']:.4f} ± {found[best]['sd']:.4f} |"
        )
    return "\n".join(lines)


def decided(log: tuple[str, str, int]) -> Cell:
    """The cell, but for its seed, that the recipe decides for a log."""
    num_train = int(open_npz(log[1], ("days",))["days"][-2])
    recipe = decide(min(num_train, log[2] or num_train), "rwsadagrad")
    return Cell(
        log[0],
        recipe.mini_batch_size,
        recipe.learning_rate,
        recipe.dense_learning_rate,
        recipe.lr_decay_share,
        0,
    )


def log_of(text: str) -> tuple[str, str, int]:
    """Parse `NAME=FILE` or `NAME=FILE@N`."""
    name, equals, rest = text.partition("=")
    path, at, rows = rest.rpartition("@")
    if not at:
        path, rows = rest, "0"
    if not (name and equals and path and rows.isdecimal()):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected NAME=FILE or NAME=FILE@N")
    return name, path, int(rows)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left goes to the trainer."""
    parser = cli.Parser(__doc__)
    rate = cli.positive_float
    for name, kind, default, text in (
        ("--logs", log_of, [], "processed files, @N for their first N training inputs"),
        ("--mini-batch-sizes", cli.positive_int, [64, 256, 1024, 4096, 16384], "inputs"),
        ("--learning-rates", rate, [0.01, 0.02, 0.05, 0.1], "of the rows"),
        ("--dense-learning-rates", rate, [0.0005, 0.001, 0.002, 0.005], "of the network"),
        ("--lr-decay-shares", cli.share, [0.3], "of the run, see the trainers"),
    ):
        parser.add_argument(name, nargs="+", type=kind, default=default, help=text)
    parser.add_argument("--num-seeds", type=cli.positive_int, default=3, help="seeds a cell")
    parser.add_argument("--workers", type=cli.positive_int, default=1, help="processes at a time")
    parser.add_argument(
        "--num-threads", type=cli.positive_int, default=1, help="threads of each process"
    )
    parser.add_argument("--csv", required=True, help="results; what is there is not repeated")
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train what is missing, then print the table."""
    args, flags = parse_args(argv)
    path = Path(args.csv)
    results = read_results(path)
    axes = (args.mini_batch_sizes, args.learning_rates, args.dense_learning_rates)
    wanted = {
        Cell(log[0], *values, seed): log
        for seed in range(1, args.num_seeds + 1)
        for log in args.logs
        for values in itertools.product(*axes, args.lr_decay_shares)
    }
    ours = {log[0]: decided(log) for log in args.logs}
    for seed, log in itertools.product(range(1, args.num_seeds + 1), args.logs):
        wanted[ours[log[0]]._replace(seed=seed)] = log
    missing = {cell: log for cell, log in wanted.items() if cell not in results}
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            lines = train_all(missing, args.workers, args.num_threads, flags)
            for line in tqdm(lines, total=len(missing), unit=" runs", disable=None):
                writer.writerow(line)
                file.flush()
    lines = list(read_results(path).values())
    print(table(lines, args.num_seeds))
    print(f"\n{decided_table(lines, ours, args.num_seeds)}")


if __name__ == "__main__":
    cli.run_script(main)
