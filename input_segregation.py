"""Number all embedding rows by popularity, and split the training inputs into hot and cold.

An input is hot when all its rows are among the `num_hot` most popular ones: as many as fit into
--hot-emb-gpu-mem, or all with at least a share --hot-threshold of the accesses.
`slipstream/training/segregation.py` says how; about 0.4 s per million inputs on 2 cores.

    python input_segregation.py --processed-data-file input/kaggle/train_processed.npz
"""

from __future__ import annotations

import argparse

from slipstream.tools import cli
from slipstream.tools.locks import exclusive
from slipstream.tools.places import resolved
from slipstream.training.data_flags import processed_file, undisturbed
from slipstream.training.dlrm_flags import SEGREGATION
from slipstream.training.segregation import FILE_FLAGS, HOT_ROW_FLAGS, default_folder, segregate


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__, SEGREGATION)
    cli.add_flags(parser, "files", FILE_FLAGS)
    cli.add_flags(parser, "hot rows", HOT_ROW_FLAGS)
    args = parser.parse_args(argv)
    if args.processed_data_file is None and args.raw_data_file is None:
        parser.error("--processed-data-file is needed, or --raw-data-file")
    return args


def main(argv: list[str] | None = None) -> bool:
    """Segregate; returns whether anything was built."""
    args = parse_args(argv)
    options = {flag.dest: getattr(args, flag.dest) for flag in HOT_ROW_FLAGS}
    with undisturbed(args):
        processed = processed_file(args)
        assert processed is not None
        named = args.segregated_data_dir or default_folder(processed, args.optimizer)
        folder = resolved(named)
        with exclusive(folder.parent):
            return segregate(processed, folder, verbose=args.verbose, **options)


if __name__ == "__main__":
    cli.run_script(main)
