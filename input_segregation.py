"""Number all embedding rows by popularity, and split the training inputs into hot and cold.

As FAE does (arXiv 2103.00686), but numbering rows instead of listing hot ones. Accesses are counted
over the training inputs. Slot 0 is the most accessed row of any table, ties by table, then id. The
first `num_hot` slots are hot: as many rows as fit into the hot memory budget, or all rows with at
least a share Lambda of the accesses. An input is hot when all its rows are, that is when its
largest slot is below `num_hot`; so any budget is a prefix, and the table budget -> hot inputs comes
from one pass.

Price: 28 bytes of memory a row of the tables, 4 bytes an input; about 1 s per million inputs on 2
cores.

    python input_segregation.py --processed-data-file input/kaggle/train_processed.npz
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dlrm_data_pytorch import ROWS_FILE, SEGREGATED_SETS, ClickInputs, ClickLog, load_processed
from slipstream import cli
from slipstream.embedding import bytes_per_row
from slipstream.npz import (
    ArrayStream,
    fingerprint,
    open_npz,
    pack_manifest,
    unpack_manifest,
    write_npz,
)
from slipstream.popularity import (
    Ranking,
    budget_table,
    chunks,
    count_accesses,
    largest_slots,
    rank_rows,
    rows_above,
)
from slipstream.runtime import check_free_disk, check_replaceable, exclusive, replace_folder

VERSION = 1
# A write that is killed leaves <name>.npz.partial in the partial folder.
OWN_FILES = [
    name + suffix
    for name in (ROWS_FILE, *(f"{name}.npz" for name in SEGREGATED_SETS))
    for suffix in ("", ".partial")
]


def _write_set(
    path: Path, inputs: ClickInputs, slot_of_row: np.ndarray, chosen: np.ndarray | None
) -> None:
    """Write the `chosen` inputs (booleans; None: all) with ids turned into slots."""
    num_inputs = len(inputs) if chosen is None else int(chosen.sum())
    if chosen is None:
        days = inputs.day_offsets
    else:
        days = np.concatenate([[0], np.cumsum(chosen)])[inputs.day_offsets]

    def parts() -> Iterator[slice | np.ndarray]:
        for part in chunks(len(inputs), f"writing {path.stem}"):
            yield part if chosen is None else part.start + np.flatnonzero(chosen[part])

    num_dense, num_features = inputs.dense.shape[1], inputs.categories.shape[1]
    int32, int8 = np.dtype(np.int32), np.dtype(np.int8)
    write_npz(
        path,
        {
            "X_int": ArrayStream(
                (num_inputs, num_dense), int32, (inputs.dense[part] for part in parts())
            ),
            "slots": ArrayStream(
                (num_inputs, num_features),
                int32,
                (slot_of_row[inputs.slots_of(part).numpy()] for part in parts()),
            ),
            "y": ArrayStream((num_inputs,), int8, (inputs.labels[part] for part in parts())),
            "days": np.asarray(days, np.int64),
        },
    )


def _num_hot(
    ranking: Ranking, budget_bytes: int, hot_threshold: float | None, row_bytes: int
) -> int:
    if hot_threshold is not None:
        return rows_above(ranking, hot_threshold)
    return min(len(ranking.slot_of_row), budget_bytes // row_bytes)


def segregate(
    processed_file: str | Path,
    folder: str | Path,
    *,
    hot_emb_gpu_mem: int,
    hot_threshold: float | None,
    ip_sampling_rate: float,
    arch_sparse_feature_size: int,
    optimizer: str,
    seed: int,
) -> bool:
    """Write the segregated folder of a processed file; False when it is up to date.

    `hot_emb_gpu_mem` is in bytes, weights and optimizer state counted; `hot_threshold` is Lambda
    and wins where given; `ip_sampling_rate` is the percentage of training inputs counted. The
    folder is written as `<folder>.partial` and renamed whole.
    """
    folder = Path(folder)
    options = {
        "hot_emb_gpu_mem": None if hot_threshold is not None else hot_emb_gpu_mem,
        "hot_threshold": hot_threshold,
        "ip_sampling_rate": ip_sampling_rate,
        "dim": arch_sparse_feature_size,
        "optimizer": optimizer,
        "seed": seed if ip_sampling_rate < 100 else None,
    }
    identity = {"version": VERSION, "source": fingerprint(processed_file), "options": options}
    current = _current_manifest(folder, identity)
    if current is not None:
        _print_figures(current["figures"])
        print(f"{folder} is up to date")
        return False
    if (folder / ROWS_FILE).exists():
        print(f"{folder} was made from another file or with other options: rebuilding")
    for suffix in ("", ".partial", ".old"):
        check_replaceable(folder.with_name(folder.name + suffix), OWN_FILES)
    start = time.perf_counter()
    log = load_processed(processed_file)
    train, test, val = log.splits()
    row_bytes = bytes_per_row(arch_sparse_feature_size, optimizer)
    ranking = rank_rows(
        count_accesses(
            train, int(log.table_sizes.sum()), _sample(len(train), ip_sampling_rate, seed)
        )
    )
    largest = largest_slots(train, ranking.slot_of_row)
    num_hot = _num_hot(ranking, hot_emb_gpu_mem, hot_threshold, row_bytes)
    is_hot = largest < num_hot
    figures = {
        "num_inputs": len(train),
        "num_hot_inputs": int(is_hot.sum()),
        "num_rows": len(ranking.slot_of_row),
        "num_hot": num_hot,
        "hot_bytes": num_hot * row_bytes,
        "lambda": ranking.hot_threshold(num_hot),
        "hot_access_share": ranking.share_of_accesses(num_hot),
        "hot_input_share": float(is_hot.mean()) if len(is_hot) else 0.0,
        "budgets": budget_table(ranking, largest, row_bytes),
    }
    manifest = {**identity, "figures": figures, "source_notes": log.manifest.get("source_notes")}
    sets = dict(
        zip(
            SEGREGATED_SETS,
            ((train, is_hot), (train, ~is_hot), (test, None), (val, None)),
            strict=True,
        )
    )
    _write_folder(folder, log, sets, ranking, num_hot, manifest, start)
    _print_figures(figures)
    seconds = time.perf_counter() - start
    print(f"segregated into {folder}: {seconds:.2f} s, {len(log.inputs) / seconds:,.0f} rows/s")
    return True


def _sample(num_inputs: int, sampling_rate: float, seed: int) -> np.ndarray | None:
    """Booleans (num_inputs,): the inputs whose accesses are counted; None: all."""
    if sampling_rate >= 100:
        return None
    rng = np.random.default_rng(seed)
    chosen = np.zeros(num_inputs, bool)
    size = max(1, round(num_inputs * sampling_rate / 100))
    chosen[rng.choice(num_inputs, min(size, num_inputs), replace=False)] = True
    return chosen


def _current_manifest(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a whole folder made from this file with these options; None otherwise."""
    try:
        manifest = unpack_manifest(open_npz(folder / ROWS_FILE))
        same = all(manifest.get(key) == value for key, value in identity.items())
        same = same and all(
            fingerprint(folder / f"{name}.npz") == manifest["files"][name]
            for name in SEGREGATED_SETS
        )
    except (OSError, ValueError, KeyError):
        return None
    return manifest if same else None


def _write_folder(
    folder: Path,
    log: ClickLog,
    sets: dict[str, tuple[ClickInputs, np.ndarray | None]],
    ranking: Ranking,
    num_hot: int,
    manifest: dict[str, Any],
    start: float,
) -> None:
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        num_dense, num_features = log.inputs.dense.shape[1], log.inputs.categories.shape[1]
        needed = len(log.inputs) * (4 * num_dense + 4 * num_features + 1)
        check_free_disk(partial, needed + 12 * len(ranking.slot_of_row), "the segregated folder")
        files = {}
        for name, (inputs, chosen) in sets.items():
            _write_set(partial / f"{name}.npz", inputs, ranking.slot_of_row, chosen)
            files[name] = fingerprint(partial / f"{name}.npz")
        seconds = time.perf_counter() - start
        write_npz(
            partial / ROWS_FILE,
            {
                "slot_of_row": ranking.slot_of_row,
                "access_counts": ranking.access_counts,
                "num_hot": np.array(num_hot, np.int64),
                "lambda": np.array(ranking.hot_threshold(num_hot)),
                "counts": log.table_sizes,
                "manifest": pack_manifest({**manifest, "files": files, "seconds": seconds}),
            },
        )
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _print_figures(figures: dict[str, Any]) -> None:
    print(
        f"embedding rows    {figures['num_rows']:>12,}\n"
        f"hot rows          {figures['num_hot']:>12,}   {figures['hot_bytes'] / 2**20:,.2f} MB\n"
        f"Lambda            {figures['lambda']:>12.3g}   least share of all accesses of a hot row\n"
        f"accesses hot      {figures['hot_access_share']:>12.2%}\n"
        f"inputs hot        {figures['hot_input_share']:>12.2%}   "
        f"{figures['num_hot_inputs']:,} of {figures['num_inputs']:,} training inputs\n"
    )
    print("   budget MB      hot rows   accesses hot   inputs hot")
    for num_bytes, num_hot, accesses, inputs in figures["budgets"]:
        print(f"{num_bytes / 2**20:>12,.3f} {num_hot:>13,} {accesses:>14.2%} {inputs:>12.2%}")
    if figures["hot_input_share"] == 1:
        print("every input is hot: a smaller --hot-emb-gpu-mem leaves cold ones")
    elif figures["hot_input_share"] == 0:
        print(
            "no input is hot: a larger --hot-emb-gpu-mem, or a smaller --hot-threshold, makes some"
        )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--processed-data-file", required=True, help="a processed .npz of data_utils.py"
    )
    group.add_argument(
        "--segregated-data-dir",
        default=None,
        help="folder to write; hot_cold beside the processed file where not given",
    )
    group = parser.add_argument_group("hot rows")
    group.add_argument(
        "--hot-emb-gpu-mem",
        type=cli.positive_int,
        default=268435456,
        help="memory for hot rows in bytes, weights and optimizer state",
    )
    group.add_argument(
        "--hot-threshold",
        type=cli.positive_share,
        default=None,
        help="Lambda: a row is hot with at least this share (0 to 1) of all accesses; used in "
        "place of --hot-emb-gpu-mem",
    )
    group.add_argument(
        "--ip-sampling-rate",
        type=cli.positive_percent,
        default=100.0,
        help="percentage of the training inputs whose accesses are counted",
    )
    cli.add_row_flags(group)
    cli.add_seed_flag(group)
    args = parser.parse_args(argv)
    if args.segregated_data_dir is None:
        args.segregated_data_dir = str(Path(args.processed_data_file).parent / "hot_cold")
    return args


def main(argv: list[str] | None = None) -> bool:
    """Segregate; returns whether anything was built."""
    args = parse_args(argv)
    folder = Path(args.segregated_data_dir).absolute()
    with exclusive(folder.parent):
        return segregate(
            args.processed_data_file,
            folder,
            hot_emb_gpu_mem=args.hot_emb_gpu_mem,
            hot_threshold=args.hot_threshold,
            ip_sampling_rate=args.ip_sampling_rate,
            arch_sparse_feature_size=args.arch_sparse_feature_size,
            optimizer=args.optimizer,
            seed=args.seed,
        )


if __name__ == "__main__":
    cli.run_script(main)
