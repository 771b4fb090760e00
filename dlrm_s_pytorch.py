"""DLRM (arXiv 1906.00091) on one machine: the baseline trainer's entry point, and the model.

`DLRM_Net` lives in `slipstream.model.dlrm`, its embedding rows in `slipstream.training.embedding`,
outside autograd. The baseline trains every input the same way: with a GPU the rows stay in host
memory and the MLPs run on the device.

    python dlrm_s_pytorch.py --processed-data-file input/kaggle/train_processed.npz
"""

from __future__ import annotations

import argparse
from typing import Any

from slipstream.model.dlrm import DLRM_Net
from slipstream.serving.export import exported_after
from slipstream.tools import cli, processes
from slipstream.training import data_flags, dlrm_flags, flags
from slipstream.training.run import run_training

__all__ = ["DLRM_Net", "main", "parse_args"]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__, dlrm_flags.TRAINERS)
    cli.add_flags(parser, "data", data_flags.GENERATED)
    cli.add_flags(parser, "random data", data_flags.LOOKUPS)
    flags.add_trainer_flags(parser)
    args = parser.parse_args(argv)
    flags.check_trainer_flags(parser, args)
    data_flags.check_generated(parser, args)
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train the baseline; returns the summary."""
    args = parse_args(argv)
    processes.start(args.processes, __file__, argv)
    data_flags.take_saved_model(args)
    prepared = data_flags.open_baseline(args)
    settings = flags.settings_of(args, prepared.data.num_train)
    with exported_after(args, prepared):
        return run_training("baseline", settings, prepared, "interleaved")


if __name__ == "__main__":
    processes.run_script(main)
