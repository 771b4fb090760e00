"""The flags of a model: the network, its layers, and the size of an embedding row."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from slipstream.tools import cli


def bottom_sizes(text: str) -> list[int]:
    """Parse a bottom MLP's sizes; the first is 0 for `auto`."""
    first, _, rest = text.partition("-")
    if first == "auto" and rest:
        return [0, *cli.layer_sizes(rest)]
    return cli.layer_sizes(text)


DIM = cli.Flag(
    "--arch-sparse-feature-size", cli.positive_int, 16, "dim: values of an embedding row"
)
FLAGS = (
    DIM,
    cli.Flag(
        "--arch-mlp-bot",
        bottom_sizes,
        None,
        "bottom MLP: dense features (auto: as many as the data have), hidden sizes, last dim; not "
        "given: 512-256-64 between the two",
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
        "dot: inner products of all pairs of vectors; cat: the vectors side by side",
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

    arch_sparse_feature_size: int
    arch_mlp_bot: list[int] | None
    arch_mlp_top: list[int]
    arch_interaction_op: str
    arch_interaction_itself: bool


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse layer sizes that do not fit together, by `parser.error`."""
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
