"""Make a multi-hot log of Criteo's 26 categories out of a processed one, as MLPerf does for DCNv2.

    python -m bench.multi_hot --processed-data-file input/kaggle/train_processed.npz \
        --output input/kaggle/multi_hot_processed.npz
    python dlrm_s_pytorch.py --model dcnv2 \
        --processed-data-file input/kaggle/multi_hot_processed.npz

Criteo gives one value a category; MLPerf's benchmark of DLRM-DCNv2 makes several of it by a
synthetic rule: value i of a category comes with as many others as `--values` says, the same ones
wherever i stands, drawn uniformly from its table. Here they are a hash of (seed, category, i,
number), so nothing of a table's size is kept, and a value may come twice. The rows of a category's
values are summed. Nothing is learned from the others but what they share: the log is for measuring
speed and memory, and AUC against AUC of the same kind.

The file is 4 bytes a value: 214 a row with MLPerf's numbers, 39 GB for Kaggle, 3.7 TB for Terabyte.
One core writes about 50 thousand rows a second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/multi_hot.py`

from slipstream.logs.features import Feature, FeatureLayout  # noqa: E402
from slipstream.logs.processed import ClickLog, load_processed  # noqa: E402
from slipstream.logs.sub_sampling import SUB_SAMPLING  # noqa: E402
from slipstream.logs.transforms import TRANSFORMS  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import ArrayStream, open_npz, pack_manifest, write_npz  # noqa: E402
from slipstream.tools.places import output_file  # noqa: E402
from slipstream.tools.runtime import check_free_disk  # noqa: E402

# MLPerf Training 3.0 and later, values a category.
MLPERF = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)
CHUNK = 1 << 14  # rows at once
KEPT = (TRANSFORMS, SUB_SAMPLING)


def hashed(values: np.ndarray, key: int) -> np.ndarray:
    """64 well-mixed bits of each value (uint64) and a key: splitmix64's finisher."""
    mixed = values + np.uint64(key * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def several(ids: np.ndarray, num_values: int, size: int, seed: int, column: int) -> np.ndarray:
    """Ids (n,) of a table of `size` rows and the others that each comes with: (n, num_values)."""
    values = np.empty((len(ids), num_values), np.int32)
    values[:, 0] = ids
    for number in range(1, num_values):
        key = (seed * 1000 + column) * 1000 + number + 1
        values[:, number] = hashed(ids.astype(np.uint64), key) % np.uint64(size)
    return values


def chunks(log: ClickLog, values: list[int], seed: int) -> Iterator[np.ndarray]:
    """The rows' ids (n, sum of values) int32, chunk by chunk."""
    for start in range(0, len(log.inputs), CHUNK):
        ids = np.asarray(log.inputs.categories[start : start + CHUNK])
        parts = [
            several(ids[:, column], num, int(log.table_sizes[column]), seed, column)
            for column, num in enumerate(values)
        ]
        yield np.concatenate(parts, axis=1)


def layout_with(log: ClickLog, values: list[int]) -> FeatureLayout:
    """Which columns are of which category."""
    starts = np.cumsum([0, *values]).tolist()
    return FeatureLayout(
        tuple(
            Feature(
                feature.name,
                tuple(range(start, start + num)),
                feature.table,
                "sum" if num > 1 else "none",
            )
            for feature, start, num in zip(log.layout.features, starts, values, strict=False)
        )
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--processed-data-file", required=True, help="a processed .npz")
    parser.add_argument("--output", required=True, help="the processed .npz to write")
    parser.add_argument(
        "--values",
        nargs="+",
        type=cli.positive_int,
        default=MLPERF,
        help="values of each category; not given: MLPerf's, of 26",
    )
    cli.add_flag(parser, cli.SEED)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Write the log."""
    args = parse_args(argv)
    target = output_file("--output", args.output, (args.processed_data_file,))
    log, values = load_processed(args.processed_data_file), list(args.values)
    if not log.layout.is_plain or len(values) != len(log.table_sizes):
        raise ValueError(
            f"{args.processed_data_file} has {len(log.table_sizes)} tables and "
            f"{log.layout.num_columns} columns; expected one column for each of --values, "
            f"{len(values)}"
        )
    found = open_npz(args.processed_data_file, ("X_int", "y"))
    members = {name: found[name] for name in ("X_int", "y", "weights", "days") if name in found}
    shape = (len(log.inputs), sum(values))
    check_free_disk(target.parent, 4 * shape[0] * shape[1], str(target))
    manifest = {key: log.manifest[key] for key in KEPT if key in log.manifest}
    manifest["features"] = layout_with(log, values).describe()
    ids = ArrayStream(shape, np.dtype(np.int32), chunks(log, values, args.seed))
    members |= {"counts": log.table_sizes, "manifest": pack_manifest(manifest)}
    members["days"] = log.inputs.day_offsets
    write_npz(target, {**members, "X_cat": ids})
    print(f"wrote {target}: {shape[0]:,} rows of {shape[1]} values, {len(values)} tables")


if __name__ == "__main__":
    cli.run_script(main)
