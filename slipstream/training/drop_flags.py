"""The flags that decide which inputs are dropped, and when."""

from __future__ import annotations

import argparse

from slipstream.tools import cli
from slipstream.tools.cli import Flag
from slipstream.training.dropped import SAVE_DROPPED
from slipstream.training.dropping import DropSettings
from slipstream.training.policies import BUILT_IN

DEFAULTS = DropSettings()
MIN_STEPS = 100  # an epoch of fewer is short, see bench/README.md


def share_or_batches(text: str) -> tuple[float, int]:
    """Parse a share, `0.25`, or mini-batches, `1000b`: (share, batches), one is 0."""
    if text.endswith("b"):
        return 0.0, int(cli.nonnegative_int(text[:-1]))
    return float(cli.share(text)), 0


POLICY_ARGS = Flag(
    "--drop-policy-args",
    cli.option,
    [],
    "options of a policy of your own: of its function, or of its class's constructor, as keep=0.9",
    "NAME=VALUE",
    "+",
)
FILE_FLAG = Flag(
    SAVE_DROPPED,
    str,
    None,
    "at the end write epoch, number, set (hot, cold), row there and label of each input that an "
    "epoch did not train to this CSV file; not given: none",
    "FILE",
)
FLAGS = (
    Flag(
        "--drop-policy",
        str,
        DEFAULTS.policy,
        "what goes. stale: the paper's, inputs whose rows changed least. At random, as many: "
        "random (of the hot inputs), uniform (of all), cold (of the cold ones). none: FAE. Or one "
        "of your own, path/to/file.py:function, or a class",
        f"{'|'.join(BUILT_IN)}|FILE:NAME",
    ),
    POLICY_ARGS,
    Flag(
        "--drop-percentage",
        cli.percent,
        100 * DEFAULTS.drop_fraction,
        "D: percentage (0 to 100) of the hot inputs left at the choice that are dropped",
    ),
    Flag(
        "--drop-of-all",
        cli.percent,
        100 * DEFAULTS.of_all,
        "at most so many: percentage (0 to 100) of all the epoch's inputs, so that logs with more "
        "and with fewer hot inputs lose the same share; 100: as many as D says",
    ),
    Flag(
        "--alpha",
        cli.positive_share,
        DEFAULTS.alpha,
        "of stale: share (above 0, to 1) of an input's rows that must be",
    ),
    Flag(
        "--threshold",
        cli.nonnegative_float,
        None,
        "of stale: T by hand, in units of the weights, in place of --drop-percentage",
    ),
    Flag(
        "--sample-rate",
        cli.positive_share,
        DEFAULTS.sample_rate,
        "of stale: share (above 0, to 1) of the hot inputs left from which T is found; at least so "
        "many that one of them is dropped",
    ),
    Flag(
        "--snapshot-start",
        share_or_batches,
        str(DEFAULTS.start),
        "share (0 to 1) of the epoch's hot inputs trained before the snapshot; or hot "
        "mini-batches, as 1000b",
        "SHARE|BATCHESb",
    ),
    Flag(
        "--snapshot-window",
        cli.positive_share,
        DEFAULTS.window,
        "share (above 0, to 1) of the epoch's hot inputs between snapshot and comparison",
    ),
    Flag(
        "--recalibrate-every",
        cli.share,
        DEFAULTS.recalibrate_every,
        "share (0 to 1) of the hot inputs from a choice to the next snapshot; 0: one choice an "
        "epoch. Each drops as many as D says at the first, of those left and those dropped before",
    ),
    Flag(
        "--stale-keep-rate",
        cli.share,
        DEFAULTS.keep_rate,
        "share r (0 to 1) of the stale inputs trained all the same, with loss weight 1/r",
    ),
    Flag(
        "--stratify-drop",
        cli.boolean,
        DEFAULTS.stratify,
        "drop the same share of clicks and non-clicks",
    ),
    Flag(
        "--drop-negatives-only",
        cli.boolean,
        DEFAULTS.negatives_only,
        "choose among non-clicks only; with --stale-keep-rate, so that the share of clicks in the "
        "loss stays",
    ),
    Flag(
        "--count-untouched-as-stale",
        cli.boolean,
        DEFAULTS.count_untouched_as_stale,
        "as in the original code: a row that no batch touched in the window is stale",
    ),
    Flag(
        "--drop-min-steps",
        cli.nonnegative_int,
        MIN_STEPS,
        "mini-batches of an epoch, below which nothing is dropped: a short one needs all it has; "
        "0: always drop",
    ),
    FILE_FLAG,
)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what decides on dropping and does not fit together, by `parser.error`."""
    if args.snapshot_start[0] + args.snapshot_window >= 1:
        parser.error(
            "--snapshot-start plus --snapshot-window must be below 1: nothing would be left to drop"
        )
    if args.stale_keep_rate and args.recalibrate_every:
        parser.error(
            "--stale-keep-rate and --recalibrate-every exclude each other: reweighted inputs stand "
            "for dropped ones, which would come back"
        )
    _check_policy(parser, args)
    if args.threshold is not None and args.drop_of_all < 100:
        parser.error("--threshold takes all that is stale: give --drop-of-all 100 with it")
    if args.stratify_drop and args.drop_negatives_only:
        parser.error("--stratify-drop and --drop-negatives-only exclude each other")
    if args.save_dropped and args.inference_only:
        parser.error(f"{SAVE_DROPPED}: --inference-only trains nothing, and drops nothing")
    if 0 < args.drop_percentage < 1:
        print(f"note: --drop-percentage {args.drop_percentage:g} is in percent, not a share")


def _check_policy(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a policy that there is not, and flags of another one; say which ones it ignores."""
    policy = args.drop_policy
    if policy not in BUILT_IN and ".py:" not in policy:
        known = ", ".join(BUILT_IN)
        parser.error(f"--drop-policy: got {policy!r}; expected {known}, or path/to/file.py:name")
    if args.threshold is not None and policy != "stale":
        parser.error(f"--threshold is stale's; {policy} takes --drop-percentage")
    of_stale = {"--alpha": DEFAULTS.alpha, "--sample-rate": DEFAULTS.sample_rate}
    given = (args.alpha, args.sample_rate)
    unread = [flag for flag, value in zip(of_stale, given, strict=True) if value != of_stale[flag]]
    # Controls are held against stale with the same flags.
    if unread and policy not in BUILT_IN:
        print(f"note: --drop-policy {policy} does not read {', '.join(unread)}")
    cli.check_options(parser, POLICY_ARGS.name, args.drop_policy_args)
    if args.drop_policy_args and policy in BUILT_IN:
        parser.error(f"{POLICY_ARGS.name} goes with a policy of your own")


def settings_of(
    args: argparse.Namespace, num_hot_inputs: int = 0, batch_size: int = 1
) -> DropSettings:
    """The values of `FLAGS`, for an epoch of so many hot inputs.

    Raises `ValueError` where as many mini-batches leave no room for the window.
    """
    start, batches = args.snapshot_start
    if batches:
        start = batches * batch_size / max(num_hot_inputs, 1)
        if start + args.snapshot_window >= 1:
            raise ValueError(
                f"--snapshot-start {batches}b: the epoch has {num_hot_inputs // batch_size:,} hot "
                "mini-batches; nothing would be left to drop"
            )
    return DropSettings(
        policy=args.drop_policy,
        drop_fraction=args.drop_percentage / 100,
        of_all=args.drop_of_all / 100,
        alpha=args.alpha,
        threshold=args.threshold,
        sample_rate=args.sample_rate,
        start=start,
        window=args.snapshot_window,
        recalibrate_every=args.recalibrate_every,
        keep_rate=args.stale_keep_rate,
        stratify=args.stratify_drop,
        negatives_only=args.drop_negatives_only,
        count_untouched_as_stale=args.count_untouched_as_stale,
        min_steps=args.drop_min_steps,
        options=dict(args.drop_policy_args),
    )
