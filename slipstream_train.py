"""Slipstream (arXiv 2404.04270): FAE, and hot inputs whose rows have gone stale are dropped.

In each epoch the hot rows are copied after a share of the hot inputs (--snapshot-start), compared a
little later (--snapshot-window), and of the hot inputs left, those that touch rows which hardly
changed are dropped: a target share D, or all below a threshold T. `slipstream/staleness.py` says
how T is found. --drop-policy random is the control: it drops as many inputs, whichever.

    python slipstream_train.py --segregated-data-dir input/kaggle/hot_cold --drop-percentage 30
"""

from __future__ import annotations

import argparse
from typing import Any

from dlrm_data_pytorch import load_segregated
from dlrm_s_pytorch import run_training
from slipstream import cli
from slipstream.embedding import bytes_per_row
from slipstream.staleness import POLICIES, DropSettings


def add_drop_flags(parser: argparse.ArgumentParser) -> None:
    """Add what decides which inputs are dropped, and when."""
    defaults = DropSettings()
    group = parser.add_argument_group("dropping")
    group.add_argument(
        "--drop-policy",
        choices=POLICIES,
        default=defaults.policy,
        help="what goes. stale: the paper's, inputs whose rows changed least. At random, as many "
        "as stale would: random (of the hot inputs), uniform (of all), cold (of the cold ones). "
        "none: FAE",
    )
    group.add_argument(
        "--drop-percentage",
        type=cli.percent,
        default=100 * defaults.drop_fraction,
        help="D: percentage (0 to 100) of the hot inputs left at the choice that are dropped",
    )
    group.add_argument(
        "--alpha",
        type=cli.positive_share,
        default=defaults.alpha,
        help="share (above 0, to 1) of an input's rows that must be stale",
    )
    group.add_argument(
        "--threshold",
        type=cli.nonnegative_float,
        default=None,
        help="T by hand, in units of the weights, in place of --drop-percentage",
    )
    group.add_argument(
        "--sample-rate",
        type=cli.positive_share,
        default=defaults.sample_rate,
        help="share (above 0, to 1) of the hot inputs left from which T is found",
    )
    group.add_argument(
        "--snapshot-start",
        type=cli.share,
        default=defaults.start,
        help="share (0 to 1) of the epoch's hot inputs trained before the snapshot",
    )
    group.add_argument(
        "--snapshot-window",
        type=cli.positive_share,
        default=defaults.window,
        help="share (above 0, to 1) of the epoch's hot inputs between snapshot and comparison",
    )
    group.add_argument(
        "--recalibrate-every",
        type=cli.share,
        default=defaults.recalibrate_every,
        help="share (0 to 1) of the hot inputs from a choice to the next snapshot; 0: one choice "
        "an epoch. Each drops as many as the first, of those left and those dropped before",
    )
    group.add_argument(
        "--stale-keep-rate",
        type=cli.share,
        default=defaults.keep_rate,
        help="share r (0 to 1) of the stale inputs trained all the same, with loss weight 1/r",
    )
    group.add_argument(
        "--stratify-drop",
        type=cli.boolean,
        default=str(defaults.stratify).lower(),
        metavar="true|false",
        help="drop the same share of clicks and non-clicks",
    )
    group.add_argument(
        "--drop-negatives-only",
        type=cli.boolean,
        default=str(defaults.negatives_only).lower(),
        metavar="true|false",
        help="choose among non-clicks only; with --stale-keep-rate, so that the share of clicks in "
        "the loss stays",
    )
    group.add_argument(
        "--count-untouched-as-stale",
        type=cli.boolean,
        default=str(defaults.count_untouched_as_stale).lower(),
        metavar="true|false",
        help="as in the original code: a row that no batch touched in the window is stale",
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    cli.add_segregated_flags(parser)
    add_drop_flags(parser)
    cli.add_trainer_flags(parser)
    args = parser.parse_args(argv)
    cli.check_trainer_flags(parser, args)
    if args.snapshot_start + args.snapshot_window >= 1:
        parser.error(
            "--snapshot-start plus --snapshot-window must be below 1: nothing would be left to drop"
        )
    if args.stale_keep_rate and args.recalibrate_every:
        parser.error(
            "--stale-keep-rate and --recalibrate-every exclude each other: reweighted inputs stand "
            "for dropped ones, which would come back"
        )
    if args.stratify_drop and args.drop_negatives_only:
        parser.error("--stratify-drop and --drop-negatives-only exclude each other")
    if 0 < args.drop_percentage < 1:
        print(f"note: --drop-percentage {args.drop_percentage:g} is in percent, not a share")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train with Slipstream; returns the summary."""
    args = parse_args(argv)
    row_bytes = bytes_per_row(args.arch_sparse_feature_size, args.optimizer)
    prepared = load_segregated(
        args.segregated_data_dir, args.processed_data_file, row_bytes, args.max_memory
    )
    settings = DropSettings(
        policy=args.drop_policy,
        drop_fraction=args.drop_percentage / 100,
        alpha=args.alpha,
        threshold=args.threshold,
        sample_rate=args.sample_rate,
        start=args.snapshot_start,
        window=args.snapshot_window,
        recalibrate_every=args.recalibrate_every,
        keep_rate=args.stale_keep_rate,
        stratify=args.stratify_drop,
        negatives_only=args.drop_negatives_only,
        count_untouched_as_stale=args.count_untouched_as_stale,
    )
    return run_training(args, "slipstream", prepared, args.schedule, settings)


if __name__ == "__main__":
    cli.run_script(main)
