"""Turn raw click logs into one processed .npz file that the trainers map into memory.

    python data_utils.py --data-set kaggle --raw-data-file input/kaggle/train.txt

The log is streamed once, parsed on all cores and checked to the last byte: 2 s per million rows of
Criteo on 2 cores. A run that was interrupted goes on; one that finds its file up to date does
nothing. `slipstream/logs/preprocess.py` says what is in the file and what it costs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from slipstream.logs import flags
from slipstream.logs.preprocess import preprocess
from slipstream.tools import cli
from slipstream.training.dlrm_flags import PREPROCESSING

__all__ = ["main", "parse_args", "preprocess"]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__, PREPROCESSING)
    cli.add_flags(parser, "files", flags.FILE_FLAGS)
    cli.add_flags(parser, "rows and tables", flags.ROW_FLAGS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess the log that the command line names."""
    preprocess(**vars(parse_args(argv)))


if __name__ == "__main__":
    cli.run_script(main)
