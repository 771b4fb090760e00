"""FAE (arXiv 2103.00686): hot embedding rows on the device, hot and cold mini-batches interleaved.

A hot batch touches rows on the device only; a cold one brings its other rows along. Every input is
trained, so FAE differs from the baseline in where rows live and in which inputs share a batch. With
`--device cpu` all rows are in one memory and only the latter remains.

    python fae_train.py --segregated-data-dir input/kaggle/hot_cold
"""

from __future__ import annotations

import argparse
from typing import Any

from dlrm_data_pytorch import PreparedData, load_segregated
from dlrm_s_pytorch import run_training
from slipstream import cli
from slipstream.batching import SCHEDULES
from slipstream.embedding import bytes_per_row


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of trainers that read a segregated folder."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--segregated-data-dir", required=True, help="a folder made by input_segregation.py"
    )
    group.add_argument(
        "--processed-data-file",
        default=None,
        help="refuse a folder that was not made from this processed .npz; not given: no check",
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="interleaved",
        help="hot and cold batches evenly mixed, or all cold, then all hot (the published code)",
    )


def load_data(args: argparse.Namespace) -> PreparedData:
    """Open the segregated folder; `ValueError` when its budget was counted for smaller rows."""
    folder, dim, optimizer = args.segregated_data_dir, args.arch_sparse_feature_size, args.optimizer
    prepared = load_segregated(folder, args.processed_data_file)
    options = prepared.manifest.get("options", {})
    budget = options.get("hot_emb_gpu_mem")
    needed = prepared.num_hot * bytes_per_row(dim, optimizer)
    if budget is not None and needed > budget:
        raise ValueError(
            f"{folder} fills its budget of {budget} bytes with rows of dim "
            f"{options['dim']} and {options['optimizer']}; with dim {dim} and {optimizer} its hot "
            f"rows take {needed}: run input_segregation.py with these"
        )
    return prepared


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    add_data_flags(parser)
    cli.add_trainer_flags(parser)
    args = parser.parse_args(argv)
    cli.check_model_flags(parser, args)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train with FAE; returns the summary."""
    args = parse_args(argv)
    return run_training(args, "fae", load_data(args), args.schedule, None)


if __name__ == "__main__":
    cli.run_script(main)
