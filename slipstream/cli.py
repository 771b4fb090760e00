"""What every script's command line shares: parser, value types, flag groups, error lines."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from slipstream.batching import RANDOMIZE, SCHEDULES

MAX_NUMBER = 1e300
TRACEBACK_VARIABLE = "SLIPSTREAM_TRACEBACK"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks and add each flag's default."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes `--mini_batch_size` for `--mini-batch-size`, and no
    abbreviations.
    """

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=HelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, without the usage, and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help explains the flags)\n")

    def parse_known_args(self, args=None, namespace=None):  # noqa: D102 - argparse's own
        tokens = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_hyphenated(token) for token in tokens], namespace)


def _hyphenated(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return name.replace("_", "-") + equals + value


def run_script(main: Callable[[], Any]) -> None:
    """Run a script's `main`; bad input becomes one line on stderr and exit status 2.

    `ValueError` and `OSError` are what our code raises for input it cannot use. Set
    SLIPSTREAM_TRACEBACK=1 to see where one came from.
    """
    try:
        main()
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if os.environ.get(TRACEBACK_VARIABLE) or not _is_expected(error):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        script = os.path.basename(sys.argv[0])
        print(f"{script}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _is_expected(error: BaseException) -> bool:
    """False for a defect of ours. PyTorch reports a failed allocation as a `RuntimeError`."""
    if not isinstance(error, RuntimeError):
        return True
    return "allocate memory" in str(error) or "out of memory" in str(error)


def _number(
    kind: type, low: float, high: float, low_open: bool = False
) -> Callable[[str], int | float]:
    """Make an argparse type: a finite number from `low` (excluded when `low_open`) to `high`."""
    interval = f"{'more than' if low_open else 'at least'} {low:g}"
    if high < math.inf:
        interval += f" and at most {high:g}"

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
            is_number = abs(value) < MAX_NUMBER  # False for NaN, infinity, and absurd integers
        except ValueError:
            is_number = False
        if not is_number or value < low or value > high or (low_open and value == low):
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {noun}, {interval}")
        return value

    return parse


positive_int = _number(int, 1, math.inf)
nonnegative_int = _number(int, 0, math.inf)
positive_float = _number(float, 0, math.inf, low_open=True)
nonnegative_float = _number(float, 0, math.inf)
share = _number(float, 0, 1)
positive_share = _number(float, 0, 1, low_open=True)
percent = _number(float, 0, 100)
positive_percent = _number(float, 0, 100, low_open=True)


def boolean(text: str) -> bool:
    """Parse `true` or `false`: the ancestors' `--flag=False` meant True."""
    values = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected true or false")
    return values[text.lower()]


def byte_size(text: str) -> int:
    """Parse a number of bytes, with K, M, G or T for powers of 1024: `1500M`."""
    powers = {unit: 1024**power for power, unit in enumerate("KMGT", start=1)}
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in powers else (text, "")
    if not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected bytes, as 2G or 1500M")
    return int(number) * powers.get(unit, 1)


def every(text: str) -> tuple[int, float]:
    """Parse mini-batches, `1000`, or a time, `90s`, `30m`, `2h`: (steps, seconds), one is 0."""
    seconds = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in seconds else (text, "")
    try:
        value = float(number) if unit else int(number)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf or (unit and not value):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected mini-batches, as 1000, or a time, as 90s, 30m or 2h"
        )
    return (0, value * seconds[unit]) if unit else (int(value), 0.0)


def layer_sizes(text: str) -> list[int]:
    """Parse layer or table sizes in DLRM's spelling, `13-512-256-64-16`."""
    try:
        sizes = [int(size) for size in text.split("-")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected sizes like 13-512-256-64-16")
    return sizes


def add_seed_flag(parser: argparse._ActionsContainer) -> None:
    """Add `--numpy-rand-seed` (DLRM's name; `--seed` for short)."""
    parser.add_argument(
        "--numpy-rand-seed",
        "--seed",
        dest="seed",
        type=nonnegative_int,
        default=123,
        help="seed of every random choice",
    )


def add_row_flags(group: argparse._ActionsContainer) -> None:
    """Add what decides the bytes of an embedding row: its dimension and the optimizer's state."""
    from slipstream.embedding import (
        OPTIMIZERS,
    )  # imports torch: not for scripts without these flags

    group.add_argument(
        "--arch-sparse-feature-size",
        type=positive_int,
        default=16,
        help="dim: values of an embedding row",
    )
    group.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="sgd",
        help="sgd, or rwsadagrad: row-wise Adagrad for the rows (4 more bytes a row), Adagrad for "
        "the MLPs",
    )


def add_segregated_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of trainers that read a segregated folder."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--segregated-data-dir", required=True, help="a folder made by input_segregation.py"
    )
    group.add_argument(
        "--processed-data-file",
        default=None,
        help="refuse a folder that was not made from this processed .npz; not given: no check",
    )
    group.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="interleaved",
        help="hot and cold batches evenly mixed, or all cold, then all hot (the published code)",
    )


def add_trainer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all three trainers share, under DLRM's names: model, training, run."""
    _add_model_flags(parser.add_argument_group("model"))
    _add_training_flags(parser.add_argument_group("training"))
    _add_run_flags(parser.add_argument_group("run"))


def _add_model_flags(group: argparse._ActionsContainer) -> None:
    add_row_flags(group)
    group.add_argument(
        "--arch-mlp-bot",
        type=layer_sizes,
        default="13-512-256-64-16",
        help="bottom MLP: dense features, hidden sizes, last the row dimension",
    )
    group.add_argument(
        "--arch-mlp-top",
        type=layer_sizes,
        default="512-256-1",
        help="top MLP after the interaction: hidden sizes, last 1; its input size is derived",
    )
    group.add_argument(
        "--arch-interaction-op",
        choices=("dot", "cat"),
        default="dot",
        help="dot: inner products of all pairs of vectors; cat: the vectors side by side",
    )
    group.add_argument(
        "--arch-interaction-itself",
        type=boolean,
        default="false",
        metavar="true|false",
        help="with dot: also each vector with itself",
    )


def _add_training_flags(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--mini-batch-size", type=positive_int, default=1024, help="inputs a mini-batch"
    )
    group.add_argument("--nepochs", type=positive_int, default=1, help="epochs to train")
    group.add_argument(
        "--num-batches",
        type=nonnegative_int,
        default=0,
        help="stop after this many mini-batches; 0: train all epochs",
    )
    group.add_argument(
        "--learning-rate",
        type=positive_float,
        default=0.3,
        help="learning rate of MLPs and rows (0.1 at mini-batch 128 is DLRM's for Kaggle)",
    )
    group.add_argument(
        "--lr-num-warmup-steps",
        type=nonnegative_int,
        default=0,
        help="mini-batches of linear warm-up; 0: none",
    )
    group.add_argument(
        "--lr-decay-start-step",
        type=nonnegative_int,
        default=0,
        help="mini-batch at which quadratic decay starts",
    )
    group.add_argument(
        "--lr-num-decay-steps",
        type=nonnegative_int,
        default=0,
        help="mini-batches of decay; 0: none",
    )
    group.add_argument(
        "--lr-decay-share",
        type=share,
        default=0.0,
        help="share (0 to 1) of the run, at its end, over which the rate falls to 0, linearly in "
        "the inputs left to train, however many are dropped; 0: none",
    )
    group.add_argument(
        "--data-randomize",
        choices=RANDOMIZE,
        default="total",
        help="shuffle all inputs, or within each day, or not at all; anew every epoch",
    )
    add_seed_flag(group)


def _add_run_flags(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where MLPs, lookups and row updates run; auto: CUDA where there is a device",
    )
    group.add_argument(
        "--num-threads",
        type=_number(int, 0, 1024),
        default=0,
        help="CPU threads of PyTorch; 0: its own choice, one a physical core",
    )
    group.add_argument(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        default="fp32",
        help="of the MLPs and the interaction; weights and rows stay fp32. tf32 is CUDA's; bf16 "
        "pays on CUDA and on CPUs with AVX512-BF16",
    )
    group.add_argument(
        "--compile",
        type=boolean,
        default="false",
        metavar="true|false",
        help="compile the model with torch.compile: needs a C++ compiler, takes a minute to start",
    )
    group.add_argument(
        "--deterministic",
        type=boolean,
        default="false",
        metavar="true|false",
        help="CUDA: the same bits in every run, slower; a CPU gives them anyway",
    )
    group.add_argument(
        "--overlap",
        choices=("auto", "true", "false"),
        default="auto",
        help="prepare the next mini-batches on a host thread while the device trains; auto: on "
        "CUDA. The result is the same",
    )
    group.add_argument(
        "--cuda-graph",
        type=boolean,
        default="true",
        metavar="true|false",
        help="CUDA with sgd: replay full mini-batches as one graph",
    )
    group.add_argument(
        "--device-data",
        choices=("auto", "true", "false"),
        default="auto",
        help="CUDA: keep the training inputs whose rows are all resident on the device; auto: "
        "where they take at most half of its free memory",
    )
    group.add_argument(
        "--num-resident",
        type=_number(int, -1, math.inf),
        default=-1,
        help="embedding rows kept on the device, most popular first; -1: all on a CPU, on CUDA the "
        "hot rows (baseline: none)",
    )
    group.add_argument(
        "--test-mini-batch-size",
        type=positive_int,
        default=16384,
        help="inputs a mini-batch in evaluation",
    )
    group.add_argument(
        "--test-freq",
        type=nonnegative_int,
        default=0,
        help="mini-batches between evaluations on the test set, for a curve: nothing is chosen by "
        "them; 0: at the end only",
    )
    group.add_argument(
        "--val-freq",
        type=nonnegative_int,
        default=0,
        help="mini-batches between evaluations on the validation set; with --save-model the best "
        "model is kept in its folder best. 0: at the end only",
    )
    group.add_argument(
        "--mlperf-auc-threshold",
        type=share,
        default=0.0,
        help="stop when the validation AUC (0 to 1) reaches this; 0: do not. Needs --val-freq",
    )
    group.add_argument(
        "--mlperf-acc-threshold",
        type=share,
        default=0.0,
        help="stop when the validation accuracy (0 to 1) reaches this; 0: do not. Needs --val-freq",
    )
    group.add_argument(
        "--print-freq",
        type=nonnegative_int,
        default=100,
        help="mini-batches between progress reports; 0: none",
    )
    group.add_argument(
        "--max-memory",
        type=byte_size,
        default=None,
        metavar="BYTES",
        help="memory that the inputs may take, as 2G or 1500M: more of them are read from disk by "
        "blocks, and shuffled within windows of them; not given: half of what is free",
    )
    group.add_argument("--runs-dir", default="runs", help="folder of all runs' logs")
    group.add_argument(
        "--run-name",
        default=None,
        help="folder of this run's log; a method and time where not given",
    )
    group.add_argument(
        "--save-model",
        default=None,
        metavar="DIR",
        help="folder of this run's checkpoints, the trained model among them; not given: none",
    )
    group.add_argument(
        "--checkpoint-every",
        type=every,
        default="30m",
        metavar="STEPS|TIME",
        help="with --save-model: mini-batches (1000) or time (90s, 30m, 2h) from one checkpoint to "
        "the next; 0: at the end only",
    )
    group.add_argument(
        "--keep", type=positive_int, default=2, help="checkpoints that stay, the newest ones"
    )
    group.add_argument(
        "--load-model",
        default=None,
        metavar="DIR|auto",
        help="go on from a checkpoint, or the newest one in a folder; one of another method, order "
        "or segregation gives its weights. auto: from --save-model, or anew where it is empty. "
        "Not given: new weights",
    )
    group.add_argument(
        "--inference-only",
        type=boolean,
        default="false",
        metavar="true|false",
        help="evaluate the model of --load-model, without training",
    )


def check_trainer_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse layer sizes and a schedule that do not fit together, by `parser.error`."""
    if args.lr_num_decay_steps and args.lr_decay_start_step < args.lr_num_warmup_steps:
        parser.error("--lr-decay-start-step comes before --lr-num-warmup-steps are over")
    if args.lr_num_decay_steps and args.lr_decay_share:
        parser.error("--lr-num-decay-steps and --lr-decay-share are two decays; set one to 0")
    if (args.mlperf_auc_threshold or args.mlperf_acc_threshold) and not args.val_freq:
        parser.error("--mlperf-auc-threshold and --mlperf-acc-threshold need --val-freq")
    if args.load_model == "auto" and not args.save_model:
        parser.error("--load-model auto goes on from --save-model, which is not given")
    if args.inference_only and (not args.load_model or args.save_model):
        parser.error("--inference-only needs --load-model, and writes no --save-model")
    dim = args.arch_sparse_feature_size
    if args.arch_mlp_bot[-1] != dim:
        parser.error(
            f"--arch-mlp-bot ends in {args.arch_mlp_bot[-1]}; expected {dim}, the value of "
            "--arch-sparse-feature-size"
        )
    check_mlp_top(parser, args.arch_mlp_top)


def check_mlp_top(parser: argparse.ArgumentParser, sizes: list[int]) -> None:
    """Refuse a top MLP that does not end in one value, by `parser.error`."""
    if sizes[-1] != 1:
        parser.error(f"--arch-mlp-top ends in {sizes[-1]}; expected 1, the click's logit")


def check_mlp_bot(sizes: list[int], num_dense: int) -> None:
    """Raise `ValueError` for a bottom MLP that does not start with the data's dense features."""
    if sizes[0] != num_dense:
        raise ValueError(
            f"--arch-mlp-bot starts with {sizes[0]}; the data have {num_dense} dense features"
        )
