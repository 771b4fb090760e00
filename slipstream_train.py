"""Slipstream (arXiv 2404.04270): FAE, and hot inputs whose rows have gone stale are dropped.

In each epoch the hot rows are copied after a share of the hot inputs (--snapshot-start), compared a
little later (--snapshot-window), and of the hot inputs left, those that touch rows which hardly
changed are dropped: a target share D, or all below a threshold T.
`slipstream/training/staleness.py` says how T is found. --drop-policy random is the control: it
drops as many inputs, whichever.

    python slipstream_train.py --segregated-data-dir input/kaggle/hot_cold --drop-percentage 30
"""

from __future__ import annotations

import argparse
from typing import Any

from slipstream.serving.export import exported_after
from slipstream.tools import cli, processes
from slipstream.training import data_flags, dlrm_flags, drop_flags, flags
from slipstream.training.run import run_training


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__, dlrm_flags.SLIPSTREAM_TRAINER)
    cli.add_flags(parser, "data", data_flags.SEGREGATED)
    cli.add_flags(parser, "dropping", drop_flags.FLAGS)
    flags.add_trainer_flags(parser)
    args = parser.parse_args(argv)
    flags.check_trainer_flags(parser, args)
    data_flags.check_segregated(parser, args)
    drop_flags.check(parser, args)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train with Slipstream; returns the summary."""
    args = parse_args(argv)
    processes.start(args.processes, __file__, argv)
    data_flags.take_saved_model(args)
    prepared = data_flags.open_segregated(args)
    settings = flags.settings_of(args, prepared.data.num_train)
    drop = drop_flags.settings_of(args, len(prepared.data.hot), settings.training.mini_batch_size)
    with exported_after(args, prepared):
        return run_training(
            "slipstream", settings, prepared, args.schedule, drop, args.save_dropped
        )


if __name__ == "__main__":
    processes.run_script(main)
