"""Number all embedding rows by popularity, and split the training inputs into hot and cold.

As FAE does (arXiv 2103.00686), but numbering rows instead of listing hot ones. Accesses are counted
over the training inputs. Slot 0 is the most accessed row of any table, ties by table, then id. The
first `num_hot` slots are hot: as many rows as fit into the hot memory budget, or all rows with at
least a share Lambda of the accesses. An input is hot when all its rows are, that is when its
largest slot is below `num_hot`; so any budget is a prefix, and the table budget -> hot inputs comes
from one pass. That pass also tells what each K of preprocessing's --min-count would give
(`slipstream/training/min_counts.py`), unless only a sample of the accesses is counted or
--min-count-report is false.

Accesses are counted one by one, whatever the inputs' weights: memory serves each alike.

Price: 28 bytes of memory a row of the tables, none that grows with the inputs; about 0.4 s per
million inputs on 2 cores.

    python input_segregation.py --processed-data-file input/kaggle/train_processed.npz
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.flags import RAW_FLAGS
from slipstream.logs.inputs import ClickInputs
from slipstream.logs.manifests import manifest_of_log
from slipstream.logs.processed import ClickLog, load_processed
from slipstream.model.flags import DIM
from slipstream.tools import cli
from slipstream.tools.npz import (
    NpzWriter,
    Spec,
    fingerprint,
    open_npz,
    pack_manifest,
    unpack_manifest,
    write_npz,
)
from slipstream.tools.output import say_current
from slipstream.tools.places import (
    check_replaceable,
    own_names,
    remove_ours,
    replace_folder,
    resolved,
)
from slipstream.tools.runtime import check_free_disk, ordered, write_json
from slipstream.training.flags import OPTIMIZER
from slipstream.training.min_counts import merge_rare, min_counts_after, rare_ids_of
from slipstream.training.popularity import (
    Ranking,
    budgets_of,
    chunks,
    count_hot_inputs,
    rank_inputs,
    slots_of_rows,
)
from slipstream.training.rows import bytes_per_row
from slipstream.training.set_files import (
    RANKING_FILE,
    ROWS_FILE,
    SEGREGATED_SETS,
    TIMES_FILE,
    current_manifest,
    is_ranking,
    is_set,
)
from slipstream.training.sets import HANDED_ON, PROCESSED_FILE

VERSION = 2
# A write that is killed leaves <name>.npz.partial in the partial folder.
OWN_FILES = own_names(
    (ROWS_FILE, RANKING_FILE, TIMES_FILE, *(f"{name}.npz" for name in SEGREGATED_SETS))
)
FILE_FLAGS = (
    cli.Flag("--processed-data-file", str, None, "a processed .npz of data_utils.py"),
    *RAW_FLAGS,
    cli.Flag(
        "--segregated-data-dir",
        str,
        None,
        "folder to write; not given: hot_cold beside the processed file, with sgd hot_cold_sgd",
    ),
)
HOT_ROW_FLAGS = (
    cli.Flag(
        "--hot-emb-gpu-mem",
        cli.byte_size,
        268435456,
        "memory for hot rows, weights and optimizer state: bytes, or as 256M",
    ),
    cli.Flag(
        "--hot-threshold",
        cli.positive_share,
        None,
        "Lambda: a row is hot with at least this share (0 to 1) of all accesses; used in place of "
        "--hot-emb-gpu-mem",
    ),
    cli.Flag(
        "--ip-sampling-rate",
        cli.positive_percent,
        100.0,
        "percentage of the training inputs whose accesses are counted",
    ),
    cli.Flag(
        "--min-count-report",
        cli.boolean,
        True,
        "tell what larger --min-count of preprocessing would give, in 2 to 8 percent more time; "
        "not from a sample (--ip-sampling-rate); no folder that is up to date is made again for it",
    ),
    DIM,
    OPTIMIZER._replace(
        default="rwsadagrad",
        help="of the trainers: rows of rwsadagrad take 4 bytes more than those of sgd",
    ),
    cli.SEED,
)


def default_folder(processed_file: str | Path, optimizer: str) -> Path:
    """Beside the processed file. Rows of another optimizer take other memory: two names, so that
    neither replaces the other.
    """
    return Path(processed_file).absolute().parent / (
        "hot_cold" if optimizer == "rwsadagrad" else f"hot_cold_{optimizer}"
    )


def segregate(
    processed_file: str | Path,
    folder: str | Path,
    *,
    hot_emb_gpu_mem: int,
    hot_threshold: float | None,
    ip_sampling_rate: float,
    min_count_report: bool,
    arch_sparse_feature_size: int,
    optimizer: str,
    seed: int,
    verbose: bool = False,
) -> bool:
    """Write the segregated folder of a processed file; False when it is up to date.

    `hot_emb_gpu_mem` is in bytes, weights and optimizer state counted; `hot_threshold` is Lambda
    and wins where given; `ip_sampling_rate` is the percentage of training inputs counted;
    `min_count_report` adds to the figures, which `verbose` prints, not to what the folder is of.
    The folder is written as `<folder>.partial` and renamed whole; one left by a killed process is
    gone on with after its last whole file. Of a link, all that happens where it leads.
    """
    folder = resolved(folder)
    options = {
        "hot_emb_gpu_mem": None if hot_threshold is not None else hot_emb_gpu_mem,
        "hot_threshold": hot_threshold,
        "ip_sampling_rate": ip_sampling_rate,
        "dim": arch_sparse_feature_size,
        "optimizer": optimizer,
        "seed": seed if ip_sampling_rate < 100 else None,
    }
    identity = _identity(processed_file, options)
    for suffix in ("", ".partial", ".old"):
        check_replaceable(folder.with_name(folder.name + suffix), OWN_FILES)
    current = current_manifest(folder, identity)
    if current is not None:
        remove_ours(folder.with_name(folder.name + ".old"), OWN_FILES)
        say_current(folder)
        _print_figures(current["figures"], verbose, is_new=False)
        return False
    start = time.perf_counter()
    log = load_processed(processed_file, verify=True)
    row_bytes = bytes_per_row(arch_sparse_feature_size, optimizer)
    partial = _begin(folder, identity, log, hot_emb_gpu_mem // row_bytes, row_bytes)
    try:
        if not (partial / RANKING_FILE).exists():
            check_free_disk(partial, _disk_bytes(log), "the segregated folder")
            num_rows, most_rows = int(log.table_sizes.sum()), hot_emb_gpu_mem // row_bytes
            ranking = rank_inputs(log.splits()[0], num_rows, ip_sampling_rate, seed)
            num_hot = ranking.num_hot(hot_threshold, most_rows)
            _write_ranking(partial, log, ranking, num_hot, row_bytes, identity, min_count_report)
        _write_sets(partial, log)
        seconds = time.perf_counter() - start
        figures = _finish_folder(partial, log, seconds)
        replace_folder(partial, folder, OWN_FILES)
    except Exception:  # a killed process leaves what is whole; an error leaves nothing
        remove_ours(partial, OWN_FILES)
        raise
    print(f"segregated into {folder} in {seconds:.1f} s: ", end="")
    _print_figures(figures, verbose, is_new=True)
    return True


def _identity(processed_file: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """What a folder is of; of what a file hands on, None where it does not say."""
    identity = {"version": VERSION, "source": fingerprint(processed_file), "options": options}
    # A fingerprint leaves out the manifest.
    described = manifest_of_log(open_npz(processed_file, others=False), processed_file)
    if "features" in described:
        identity["features"] = described["features"]
    return identity | {name: described.get(name) for name in HANDED_ON}


def _begin(
    folder: Path, identity: dict[str, Any], log: ClickLog, most_rows: int, row_bytes: int
) -> Path:
    """The partial folder: that of a killed run of the same identity, or an empty one."""
    if (folder / ROWS_FILE).exists():
        print(f"{folder} was made from another file or with other options: rebuilding")
    partial = folder.with_name(folder.name + ".partial")
    handed_on: dict[str, Any] = {"features": log.layout.describe()}
    handed_on["source_notes"] = log.manifest.get("source_notes")
    numbers = (int(log.inputs.day_offsets[-2]), most_rows, row_bytes)
    is_link = partial.is_symlink()
    if is_link or not is_ranking(partial / RANKING_FILE, identity | handed_on, *numbers):
        remove_ours(partial, OWN_FILES)
        partial.mkdir(parents=True)
    else:
        print(f"going on with {partial}")
    return partial


def _disk_bytes(log: ClickLog) -> int:
    num_columns = log.inputs.dense.shape[1] + log.inputs.categories.shape[1]
    # Rows: slots and access counts, for a while in two files.
    weight = 0 if log.inputs.weights is None else 4
    return len(log.inputs) * (4 * num_columns + 1 + weight) + 2 * 12 * int(log.table_sizes.sum())


def _write_ranking(
    partial: Path,
    log: ClickLog,
    ranking: Ranking,
    num_hot: int,
    row_bytes: int,
    identity: dict[str, Any],
    min_count_report: bool,
) -> None:
    """Write the slots, and what is known of the hot inputs before any is written."""
    train = log.splits()[0]
    budgets = budgets_of(ranking)
    min_counts = min_counts_after(log.manifest)
    if not min_count_report or identity["options"]["ip_sampling_rate"] < 100:
        min_counts = min_counts[:1]  # accesses of a sample cannot be compared with another K
    rare_ids = rare_ids_of(log.manifest, len(log.table_sizes))
    merged = merge_rare(ranking, log.table_sizes, rare_ids, min_counts, num_hot)
    counts, by_day, by_bits = count_hot_inputs(
        train, ranking.slot_of_row, [num_hot, *budgets], merged.hot_bits
    )
    num_hot_inputs = int(counts[0])
    figures = {
        "num_inputs": len(train),
        "num_hot_inputs": num_hot_inputs,
        "num_rows": len(ranking.slot_of_row),
        "num_hot": num_hot,
        "hot_bytes": num_hot * row_bytes,
        "lambda": ranking.hot_threshold(num_hot),
        "hot_access_share": ranking.share_of_accesses(num_hot),
        "hot_input_share": num_hot_inputs / len(train),
        "budgets": [
            (rows * row_bytes, rows, ranking.share_of_accesses(rows), inputs / len(train))
            for rows, inputs in zip(budgets, counts[1:].tolist(), strict=True)
        ],
        "min_counts": merged.figures(by_bits, row_bytes),
    }
    manifest = {name: value for name, value in identity.items() if value is not None}
    manifest |= {"figures": figures, "source_notes": log.manifest.get("source_notes")}
    manifest.setdefault("features", log.layout.describe())
    write_npz(
        partial / RANKING_FILE,
        {
            "slot_of_row": ranking.slot_of_row,
            "access_counts": ranking.access_counts,
            "hot_days": np.concatenate([[0], np.cumsum(by_day)]),
            "manifest": pack_manifest(manifest),
        },
    )


def _write_sets(partial: Path, log: ClickLog) -> None:
    """Write the sets that are not there yet, hot and cold training inputs in one pass."""
    ranking = open_npz(partial / RANKING_FILE)
    slot_of_row = ranking["slot_of_row"]
    num_hot = unpack_manifest(ranking, partial / RANKING_FILE)["figures"]["num_hot"]
    train, test, val = log.splits()
    hot_days = ranking["hot_days"]
    splits = (
        (train, num_hot, {"train_hot": hot_days, "train_cold": train.day_offsets - hot_days}),
        (test, len(slot_of_row), {"test": test.day_offsets}),
        (val, len(slot_of_row), {"val": val.day_offsets}),
    )

    def write(split: tuple[ClickInputs, int, dict[str, np.ndarray]]) -> None:
        inputs, num_below, days = split
        are_there = (
            is_set(partial / f"{name}.npz", _specs_of(inputs, offsets), offsets)
            for name, offsets in days.items()
        )
        if not all(are_there):
            _write_split(partial, inputs, slot_of_row, num_below, days)

    with ThreadPoolExecutor(len(splits)) as pool:  # one waits for the disk, others work
        list(pool.map(write, splits))


def _specs_of(inputs: ClickInputs, offsets: np.ndarray) -> dict[str, Spec]:
    """The arrays of a set of these inputs, as many as its day offsets end in."""
    num_inputs, num_columns = int(offsets[-1]), inputs.categories.shape[1]
    specs = {
        "X_int": Spec((num_inputs, inputs.num_dense), inputs.dense.dtype),
        "slots": Spec((num_inputs, num_columns), np.dtype(np.int32)),
        "y": Spec((num_inputs,), np.dtype(np.int8)),
        "days": Spec(offsets.shape, np.dtype(np.int64)),
    }
    if inputs.weights is not None:
        specs["weights"] = Spec((num_inputs,), np.dtype(np.float32))
    return specs


def _write_split(
    partial: Path,
    inputs: ClickInputs,
    slot_of_row: np.ndarray,
    num_hot: int,
    days: dict[str, np.ndarray],
) -> None:
    """Write the inputs whose slots are below `num_hot` to the first set, others to the second.

    `days` names the sets and gives their day offsets, the last one their number of inputs.
    """
    dense = inputs.dense
    writers = [
        NpzWriter(partial / f"{name}.npz", _specs_of(inputs, offsets))
        for name, offsets in days.items()
    ]

    def cut(part: slice) -> tuple[slice, list[dict[str, np.ndarray]]]:
        """The arrays of a chunk's inputs for each set."""
        slots = slots_of_rows(slot_of_row, inputs, part)
        arrays = {"X_int": dense[part], "slots": slots, "y": inputs.labels[part]}
        if (weights := inputs.weights_of(part)) is not None:
            arrays["weights"] = weights
        if len(writers) == 1:
            return part, [arrays]
        hot = slots.max(axis=1) < num_hot
        return part, [
            {name: array.take(places, axis=0) for name, array in arrays.items()}
            for places in (np.flatnonzero(hot), np.flatnonzero(~hot))
        ]

    def append(writer: NpzWriter, arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            writer.append(name, array)

    try:
        with ThreadPoolExecutor(len(writers)) as pool:
            for part, cuts in ordered(cut, chunks(len(inputs), f"writing {', '.join(days)}")):
                list(pool.map(append, writers, cuts))
                inputs.release(part)
        for writer, offsets in zip(writers, days.values(), strict=True):
            writer.append("days", offsets)
            writer.finish()
    finally:
        for writer in writers:
            writer.discard()


def _finish_folder(partial: Path, log: ClickLog, seconds: float) -> dict[str, Any]:
    """Write the rows' file, which makes the folder whole; returns the figures."""
    ranking = open_npz(partial / RANKING_FILE)
    manifest = unpack_manifest(ranking, partial / RANKING_FILE)
    figures = manifest["figures"]
    files = {name: fingerprint(partial / f"{name}.npz") for name in SEGREGATED_SETS}
    write_npz(
        partial / ROWS_FILE,
        {
            "slot_of_row": ranking["slot_of_row"],
            "access_counts": ranking["access_counts"],
            "num_hot": np.array(figures["num_hot"], np.int64),
            "lambda": np.array(figures["lambda"]),
            "counts": log.table_sizes,
            "manifest": pack_manifest({**manifest, "files": files}),
        },
    )
    # Beside the files, which are the same in every run.
    about: dict[str, Any] = {"seconds": seconds}
    if log.path is not None:
        about[PROCESSED_FILE] = os.path.relpath(log.path.absolute(), partial.absolute())
    write_json(partial / TIMES_FILE, about)
    (partial / RANKING_FILE).unlink()
    return figures


def _print_figures(figures: dict[str, Any], verbose: bool, is_new: bool) -> None:
    """Print what is hot, where that is new, or all that is known, and where one kind lacks."""
    if is_new or verbose:
        print(
            f"hot are {figures['num_hot']:,} of {figures['num_rows']:,} embedding rows\n"
            f"({figures['hot_bytes'] / 2**20:,.2f} MB, {figures['hot_access_share']:.2%} of the "
            f"accesses) and {figures['num_hot_inputs']:,} of {figures['num_inputs']:,} training "
            f"inputs ({figures['hot_input_share']:.2%})"
        )
    if verbose:
        _print_tables(figures)
    if figures["hot_input_share"] == 1:
        print("every input is hot: a smaller --hot-emb-gpu-mem leaves cold ones")
    elif figures["hot_input_share"] == 0:
        print(
            "no input is hot: a larger --hot-emb-gpu-mem, or a smaller --hot-threshold, makes some"
        )


def _print_tables(figures: dict[str, Any]) -> None:
    print(
        f"Lambda, the least share of all accesses that a hot row has: {figures['lambda']:.3g}\n"
        "shares of all accesses and of the training inputs that would be hot:\n"
        "   budget MB      hot rows   accesses hot   inputs hot"
    )
    for num_bytes, num_hot, accesses, inputs in figures["budgets"]:
        print(f"{num_bytes / 2**20:>12,.3f} {num_hot:>13,} {accesses:>14.2%} {inputs:>12.2%}")
    min_counts = figures.get("min_counts", [])  # folders of before have none
    if len(min_counts) > 1:
        print("\n --min-count     rows left    MB of rows   inputs hot with as much hot memory")
        for min_count, num_rows, num_bytes, inputs in min_counts:
            print(f"{min_count:>12,} {num_rows:>13,} {num_bytes / 2**20:>13,.3f} {inputs:>12.2%}")
