"""The flags of preprocessing: which log, where it goes, and which rows and ids of it."""

from __future__ import annotations

import argparse

from slipstream.logs import sources
from slipstream.logs.columnfile import separator_of
from slipstream.tools import cli
from slipstream.tools.runtime import num_threads


def bad_lines_of(text: str) -> int:
    """Parse `stop` (0) or `skip:N`."""
    word, _, number = text.partition(":")
    if text == "stop" or (word == "skip" and number.isdecimal()):
        return int(number or 0)
    raise argparse.ArgumentTypeError(f"got {text!r}; expected stop, or skip:N")


def separator_flag(text: str) -> str:
    """Parse one character, `tab` or `tsv`; `auto` is none."""
    try:
        separator = "" if text == "auto" else separator_of(text)
    except ValueError:
        separator = "parquet"
    if separator == "parquet":
        raise argparse.ArgumentTypeError(f"got {text!r}; expected one character, tab or auto")
    return separator


DATA_SET, RAW_FILE = (
    cli.Flag(
        "--data-set",
        tuple(sources.DATA_SETS),
        "kaggle",
        "which log: Criteo's of 7 days in one file (kaggle) or one file a day (terabyte), Avazu's,"
        " Taobao's UserBehavior, or one that --columns describes (custom)",
    ),
    cli.Flag(
        "--raw-data-file",
        str,
        cli.REQUIRED,
        "the log, plain or packed: train.txt (kaggle), train.csv (avazu), UserBehavior.csv"
        " (taobao), the prefix .../day for .../day_0, .../day_1, ... (terabyte), or the folder that"
        " holds them; custom: a file, or a folder of files",
    ),
)
VERBOSE = cli.Flag(
    "--verbose",
    cli.boolean,
    False,
    "also print the report of the log's columns, which is a file beside the processed one",
)
FILE_FLAGS = (
    DATA_SET,
    RAW_FILE,
    cli.Flag(
        "--columns",
        str,
        None,
        "custom: a JSON or YAML file that says what the log's columns are; see README.md",
        "FILE",
    ),
    cli.Flag(
        "--test-data-file",
        str,
        None,
        "hold out the rows of this file, or folder of files, of the same format, and train on all"
        " of --raw-data-file",
    ),
    cli.Flag(
        "--extend",
        str,
        None,
        "a processed file of the same columns, as yesterday's: its values keep their ids, new ones "
        "follow, and a model of it goes on with this one",
        "FILE",
    ),
    cli.Flag("--num-days", cli.positive_int, 24, "files read, from day_0; terabyte only"),
    cli.Flag(
        "--processed-data-file",
        str,
        None,
        "the .npz to write; not given: <stem>_processed.npz beside the raw file",
    ),
    cli.Flag(
        "--bad-lines",
        bad_lines_of,
        "stop",
        "stop at the first bad line, or leave out up to N and report them",
        "stop|skip:N",
    ),
    cli.Flag(
        "--jobs",
        cli.positive_int,
        num_threads(),
        "files read at once, a process each, where the log has several; usual: a core each",
    ),
    cli.Flag(
        "--max-memory",
        cli.byte_size,
        None,
        "memory it may take, as 2G or 1500M; not given: half of what is free",
        "BYTES",
    ),
    VERBOSE,
)
SPLIT = cli.Flag(
    "--split",
    str,
    None,
    "rows held out for test and validation, a half each: last-day, random:SEED (each row with odds"
    " of 1 in 5), or none; not given: last-day, or what the column file says",
    "RULE",
)
MIN_COUNT = cli.Flag(
    "--min-count",
    cli.positive_int,
    1,
    "values seen fewer times than this in the training rows share one row a table; 1 = off",
)
MAX_IND_RANGE, SUB_SAMPLE_RATE = (
    cli.Flag(
        "--max-ind-range",
        int,
        -1,
        "take hashes (of texts: digests) modulo this number, so that no table has more rows, beside"
        " that of empty values; -1 = off",
    ),
    cli.Flag(
        "--data-sub-sample-rate",
        cli.share,
        0.0,
        "share of the negative training rows to drop, from 0 (off) to less than 1",
    ),
)
HISTORY = cli.Flag(
    "--history",
    cli.nonnegative_int,
    0,
    "taobao: the last so many items that the user clicked, and their categories, as sequences for "
    "--model tbsm; 0: the last one's as two features",
)
ROW_FLAGS = (
    SPLIT,
    MAX_IND_RANGE,
    MIN_COUNT,
    HISTORY,
    SUB_SAMPLE_RATE,
    cli.Flag(
        "--sub-sample-held-out",
        cli.boolean,
        False,
        "drop held-out negative rows likewise, as DLRM does; their click rate is no log's then",
    ),
    cli.SEED,
)
# Of a script that preprocesses the log first, as DLRM's trainer does.
RAW_FLAGS = (
    DATA_SET._replace(
        type=tuple(name for name in sources.DATA_SETS if name != "custom"),
        help="of --raw-data-file: which log it is; data_utils.py reads others, too",
    ),
    RAW_FILE._replace(
        default=None,
        help="preprocess this log first, unless --processed-data-file is up to date with it; not"
        " given: --processed-data-file as it is",
    ),
    MAX_IND_RANGE._replace(help=f"of preprocessing: {MAX_IND_RANGE.help}"),
    SUB_SAMPLE_RATE._replace(help=f"of preprocessing: {SUB_SAMPLE_RATE.help}"),
    VERBOSE._replace(
        help="of preprocessing: also print the report of the log's columns; of segregation: what "
        "other budgets and --min-count would give"
    ),
)
