"""Click probabilities of new rows, by a model that a trainer saved.

The model folder says how its log was read and which values its rows stand for, so nothing else is
needed. One probability a line, in the order of the log's lines; a label is not needed. A value that
the model's log never had takes the row of rare values where preprocessing made one (--min-count),
else none. Where the log has labels, AUC, log loss and calibration are printed. In Python:
`slipstream.serving.model.load_model`.

    python predict.py --load-model runs/model --raw-data-file new.csv --output scores.csv
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slipstream.logs.flags import bad_lines_of, separator_flag
from slipstream.serving import scores
from slipstream.serving.model import BATCH_SIZE, CORRECTION, LOAD_MODEL, NETWORK, load_model
from slipstream.tools import cli
from slipstream.tools.device import PRECISIONS
from slipstream.tools.runlog import finite
from slipstream.tools.runtime import write_json

FLAGS = (
    LOAD_MODEL,
    cli.Flag(
        "--raw-data-file",
        str,
        cli.REQUIRED,
        "the log: as the model's own, plain or packed; of a column file also CSV for Parquet and "
        "the other way round, columns in any order, or a folder of files",
    ),
    cli.Flag(
        "--output",
        str,
        cli.REQUIRED,
        "where the probabilities go: a CSV file (with a header line where the log has one; a line "
        "without a score is empty, so pandas needs skip_blank_lines=False), Parquet where it ends "
        "in .parquet, or - for standard output",
        "FILE",
    ),
    cli.Flag(
        "--separator",
        separator_flag,
        "auto",
        "what parts this log's columns, where it is not what parted the model's own: one character "
        "or tab (a comma: fields may be quoted)",
        "CHARACTER",
    ),
    cli.Flag(
        "--decimal",
        ("auto", ".", ","),
        "auto",
        "before the decimals of this log's numbers, where the model's own log had another",
    ),
    cli.Flag(
        "--bad-lines",
        bad_lines_of,
        "stop",
        "stop at the first bad line, or give up to N an empty score",
        "stop|skip:N",
    ),
    cli.Flag(
        "--by",
        str,
        "",
        "with labels: metrics also by the values of this column of the log",
        "COLUMN",
    ),
    cli.Flag("--report", str, None, "write what is printed to this file, as JSON", "FILE"),
    CORRECTION,
    NETWORK,
    cli.Flag(
        "--test-mini-batch-size",
        cli.positive_int,
        BATCH_SIZE,
        "rows that go through the network at once",
    ),
    cli.Flag("--device", ("auto", "cpu", "cuda"), "auto", "auto: CUDA where there is a device"),
    cli.Flag("--precision", ("auto", *PRECISIONS), "auto", "auto: as the model was trained"),
    cli.Flag("--num-threads", cli.nonnegative_int, 0, "of PyTorch on the CPU; 0: a core each"),
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, "files", FLAGS[:8])
    cli.add_flags(parser, "model", FLAGS[8:])
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Score a log; returns what was found."""
    args = parse_args(argv)
    said = sys.stderr if args.output == scores.STANDARD_OUTPUT else sys.stdout
    model = load_model(
        args.load_model,
        network=args.model,
        device=args.device,
        precision=args.precision,
        num_threads=args.num_threads,
        batch_size=args.test_mini_batch_size,
    )
    if args.report:
        if args.report == scores.STANDARD_OUTPUT:
            raise ValueError("--report -: expected the name of a file; --output may be -")
        scores.check_output(model, "--report", args.report, args.raw_data_file)
        if os.path.realpath(args.report) == os.path.realpath(args.output):
            raise ValueError("--report and --output name one file; choose another for one of them")
    where = f"{model.saved.folder}, step {model.saved.step}, in {model.precision}"
    print(f"scoring with {where}", file=said)
    found = scores.score_log(
        model,
        args.raw_data_file,
        args.output,
        bad_lines=args.bad_lines,
        by=args.by,
        corrects=args.correct_sub_sampling,
        separator=args.separator,
        decimal="" if args.decimal == "auto" else args.decimal,
    )
    scores.say(found, model, said)
    if args.report:
        write_json(Path(args.report), finite(found))
    if args.output != scores.STANDARD_OUTPUT:
        print(f"wrote {args.output}", file=said)
    return found


if __name__ == "__main__":
    cli.run_script(main)
