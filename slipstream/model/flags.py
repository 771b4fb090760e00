"""The flags of a model: the network, its layers, and the size of an embedding row."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slipstream.tools import cli


def bottom_sizes(text: str) -> list[int]:
    """Parse a bottom MLP's sizes; the first is 0 for `auto`."""
    first, _, rest = text.partition("-")
    if first == "auto" and rest:
        return [0, *cli.layer_sizes(rest)]
    return cli.layer_sizes(text)


# The networks of ours, and which of the --arch flags shape each.
MLPS = ("arch_mlp_bot", "arch_mlp_top")
SHAPED_BY = {
    "dlrm": (*MLPS, "arch_interaction_op", "arch_interaction_itself"),
    "dcnv2": MLPS,
    "tbsm": MLPS,
}
DIM = cli.Flag(
    "--arch-sparse-feature-size", cli.positive_int, 16, "dim: values of an embedding row"
)
FLAGS = (
    cli.Flag(
        "--model",
        str,
        "dlrm",
        "the network: dlrm, dcnv2 (low-rank cross network), tbsm (attention over sequences of what "
        "came before), or one of your own, path/to/file.py:Class",
        f"{'|'.join(SHAPED_BY)}|FILE:CLASS",
    ),
    cli.Flag(
        "--model-args",
        cli.option,
        [],
        "options of the network's constructor: dcnv2's layers=3 rank=0 (a quarter of the width); "
        "tbsm's step_width=32 attention=dot (or mlp); your own's, as width=64 dropout=0.1",
        "NAME=VALUE",
        "+",
    ),
    DIM,
    cli.Flag(
        "--arch-mlp-bot",
        bottom_sizes,
        None,
        "bottom MLP: dense features (auto: as many as the data have), hidden sizes, last dim; not "
        "given: 512-256-64 between the two (tbsm: 16)",
    ),
    cli.Flag(
        "--arch-mlp-top",
        cli.layer_sizes,
        "512-256-1",
        "top MLP after the interaction: hidden sizes, last 1; its input size is derived",
    ),
    cli.Flag(
        "--arch-interaction-op",
        ("dot", "cat"),
        "dot",
        "of dlrm; dot: inner products of all pairs of vectors; cat: the vectors side by side",
    ),
    cli.Flag(
        "--arch-interaction-itself",
        cli.boolean,
        False,
        "with dot: also each vector with itself",
    ),
)


@dataclass(frozen=True)
class ModelSettings:
    """The values of `FLAGS`."""

    model: str
    model_args: list[tuple[str, Any]]
    arch_sparse_feature_size: int
    arch_mlp_bot: list[int] | None
    arch_mlp_top: list[int]
    arch_interaction_op: str
    arch_interaction_itself: bool


def take_saved(args: argparse.Namespace, saved: Mapping[str, Any]) -> None:
    """Let a checkpoint's model stand where the command line says nothing of it.

    `saved` are its values by flag. A network of a file must be named all the same: its text is
    kept, and never run.
    """
    for flag in FLAGS:
        if flag.name in saved and getattr(args, flag.dest) == flag.usual:
            setattr(args, flag.dest, saved[flag.name])


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse layer sizes and options that do not fit together, by `parser.error`."""
    if args.model not in SHAPED_BY and ".py:" not in args.model:
        known = ", ".join(SHAPED_BY)
        parser.error(f"--model: got {args.model!r}; expected {known}, or path/to/file.py:Class")
    names = [name for name, _ in args.model_args]
    if args.model in SHAPED_BY and (arch := [name for name in names if name.startswith("arch_")]):
        parser.error(f"--model-args {arch[0]}: give --{arch[0].replace('_', '-')}")
    cli.check_options(parser, "--model-args", args.model_args)
    if names and args.model == "dlrm":
        parser.error("--model-args goes with another --model; the --arch flags shape dlrm")
    bottom, dim = args.arch_mlp_bot, args.arch_sparse_feature_size
    if bottom is not None and bottom[-1] != dim:
        parser.error(
            f"--arch-mlp-bot ends in {bottom[-1]}; expected {dim}, the value of "
            "--arch-sparse-feature-size"
        )
    check_mlp_top(parser, args.arch_mlp_top)


def check_mlp_top(parser: argparse.ArgumentParser, sizes: list[int]) -> None:
    """Refuse a top MLP that does not end in one value, by `parser.error`."""
    if sizes[-1] != 1:
        parser.error(f"--arch-mlp-top ends in {sizes[-1]}; expected 1, the click's logit")
