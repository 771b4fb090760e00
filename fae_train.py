"""FAE (arXiv 2103.00686): hot embedding rows on the device, hot and cold mini-batches interleaved.

A hot batch touches rows on the device only; a cold one brings its other rows along. Every input is
trained, so FAE differs from the baseline in where rows live and in which inputs share a batch. With
`--device cpu` all rows are in one memory and only the latter remains.

    python fae_train.py --segregated-data-dir input/kaggle/hot_cold
"""

from __future__ import annotations

import argparse
from typing import Any

from slipstream.serving.export import exported_after
from slipstream.tools import cli, processes
from slipstream.training import data_flags, dlrm_flags, flags
from slipstream.training.run import run_training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__, dlrm_flags.TRAINERS)
    cli.add_flags(parser, "data", data_flags.SEGREGATED)
    flags.add_trainer_flags(parser)
    args = parser.parse_args(argv)
    flags.check_trainer_flags(parser, args)
    data_flags.check_segregated(parser, args)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train with FAE; returns the summary."""
    args = parse_args(argv)
    processes.start(args.processes, __file__, argv)
    data_flags.take_saved_model(args)
    prepared = data_flags.open_segregated(args)
    settings = flags.settings_of(args, prepared.data.num_train)
    with exported_after(args, prepared):
        return run_training("fae", settings, prepared, args.schedule)


if __name__ == "__main__":
    processes.run_script(main)
