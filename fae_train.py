"""FAE (arXiv 2103.00686): hot embedding rows on the device, hot and cold mini-batches interleaved.

A hot batch touches rows on the device only; a cold one brings its other rows along. Every input is
trained, so FAE differs from the baseline in where rows live and in which inputs share a batch. With
`--device cpu` all rows are in one memory and only the latter remains.

    python fae_train.py --segregated-data-dir input/kaggle/hot_cold
"""

from __future__ import annotations

import argparse
from typing import Any

from dlrm_data_pytorch import load_segregated
from dlrm_s_pytorch import run_training
from slipstream import cli
from slipstream.embedding import bytes_per_row


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    cli.add_segregated_flags(parser)
    cli.add_trainer_flags(parser)
    args = parser.parse_args(argv)
    cli.check_trainer_flags(parser, args)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train with FAE; returns the summary."""
    args = parse_args(argv)
    row_bytes = bytes_per_row(args.arch_sparse_feature_size, args.optimizer)
    prepared = load_segregated(
        args.segregated_data_dir, args.processed_data_file, row_bytes, args.max_memory
    )
    return run_training(args, "fae", prepared, args.schedule, None)


if __name__ == "__main__":
    cli.run_script(main)
