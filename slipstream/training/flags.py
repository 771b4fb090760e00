"""The flags that trainers share: model, training, machine, evaluation, the run and its outputs."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from slipstream.model import flags as model_flags
from slipstream.model.flags import ModelSettings
from slipstream.tools import cli
from slipstream.tools.cli import Flag
from slipstream.tools.device import PRECISIONS
from slipstream.tools.processes import PROCESSES
from slipstream.training import output_flags
from slipstream.training.batching import RANDOMIZE
from slipstream.training.held_out import CORRECTION, SAVE_PREDICTIONS
from slipstream.training.optimizers import DENSE_OPTIMIZERS
from slipstream.training.output_flags import OUTPUTS, OutputSettings
from slipstream.training.recipe import (
    ADAM_RATE,
    DECAY_SHARE,
    MINI_BATCHES,
    REFERENCE,
    ROWS_RATE,
    SGD_RATE,
    Recipe,
    decide,
)
from slipstream.training.rows import OPTIMIZERS


def loss_weights(text: str) -> list[float]:
    """Parse two weights, as `1.0-2.5`."""
    try:
        weights = [float(weight) for weight in text.split("-")]
    except ValueError:
        weights = []
    if len(weights) != 2 or not all(0 < weight < math.inf for weight in weights):
        raise argparse.ArgumentTypeError(f"got {text!r}; expected two weights, as 1.0-2.5")
    return weights


OPTIMIZER = Flag(
    "--optimizer",
    OPTIMIZERS,
    None,
    "of the rows: rwsadagrad, row-wise Adagrad (4 more bytes a row), or the papers' sgd; not "
    "given: rwsadagrad, but with --learning-rate alone sgd for all, as in DLRM",
)
TRAINING = (
    OPTIMIZER,
    Flag(
        "--mini-batch-size",
        cli.positive_int,
        None,
        "inputs a mini-batch; not given: by the number of training inputs, "
        f"{MINI_BATCHES[0]} to {MINI_BATCHES[1]}",
    ),
    Flag("--nepochs", cli.positive_int, 1, "epochs to train"),
    Flag("--num-batches", cli.nonnegative_int, 0, "stop after so many mini-batches; 0: all epochs"),
    Flag(
        "--learning-rate",
        cli.positive_float,
        None,
        f"learning rate of the rows; not given: at mini-batch {REFERENCE} {ROWS_RATE} for "
        f"rwsadagrad, below by the cube root; for sgd {SGD_RATE}, below in proportion to it",
    ),
    Flag(
        "--dense-optimizer",
        DENSE_OPTIMIZERS,
        None,
        "of the network; not given: sgd beside sgd, adam beside rwsadagrad",
    ),
    Flag(
        "--dense-learning-rate",
        cli.positive_float,
        None,
        f"learning rate of the network, under the same schedule; not given: of adam {ADAM_RATE} at "
        f"mini-batch {REFERENCE}, below by the root of it; else the rows'",
    ),
    Flag(
        "--lr-num-warmup-steps", cli.nonnegative_int, 0, "mini-batches of linear warm-up; 0: none"
    ),
    Flag(
        "--lr-decay-start-step",
        cli.nonnegative_int,
        0,
        "mini-batch, from 1, at which quadratic decay starts; the last rate of warm-up until then",
    ),
    Flag("--lr-num-decay-steps", cli.nonnegative_int, 0, "mini-batches of decay; 0: none"),
    Flag(
        "--lr-decay-share",
        cli.share,
        None,
        "share (0 to 1) of the run, at its end, over which the rate falls to 0, linearly in the "
        f"inputs left to train, however many are dropped; 0: none; not given: {DECAY_SHARE}",
    ),
    Flag(
        "--data-randomize",
        RANDOMIZE,
        "total",
        "shuffle all inputs, or within each day, or not at all; anew every epoch",
    ),
    Flag(
        "--loss-function",
        ("bce", "wbce"),
        "bce",
        "bce: the log loss; wbce: with --loss-weights. DLRM's mse is not trained here",
    ),
    Flag(
        "--loss-weights",
        loss_weights,
        "1.0-1.0",
        "of wbce: weights of an input without and with a click",
        "W0-W1",
    ),
    Flag(
        "--loss-threshold",
        cli.number(float, 0, 0.5),
        0.0,
        "probabilities are cut to at least this and at most one minus this; 0: as they are",
    ),
    cli.SEED,
)
MACHINE = (
    PROCESSES,
    Flag(
        "--device",
        ("auto", "cpu", "cuda"),
        "auto",
        "where MLPs, lookups and row updates run; auto: CUDA where there is a device",
    ),
    Flag(
        "--num-threads",
        cli.number(int, 0, 1024),
        0,
        "CPU threads of PyTorch; 0: its own choice, one a physical core",
    ),
    Flag(
        "--precision",
        ("auto", *PRECISIONS),
        "auto",
        "of the MLPs and the interaction; weights and rows stay fp32. tf32 is CUDA's. auto: bf16 "
        "where the device multiplies in it (CUDA from Ampere on, AVX512-BF16, AMX), fp32 elsewhere "
        "and for a network of your own; a run that goes on keeps what it had",
    ),
    Flag(
        "--enable-profiling",
        cli.boolean,
        False,
        "profile some mini-batches: a trace in the run's folder, for a browser's chrome://tracing, "
        "and a table of the costliest operations",
    ),
    Flag(
        "--debug-mode",
        cli.boolean,
        False,
        "print the network, the tables and the first inputs before training",
    ),
    Flag(
        "--compile",
        cli.boolean,
        False,
        "compile the model with torch.compile: needs a C++ compiler, takes a minute to start",
    ),
    Flag(
        "--deterministic",
        cli.boolean,
        False,
        "CUDA: the same bits in every run, slower; a CPU gives them anyway",
    ),
    Flag(
        "--overlap",
        ("auto", "true", "false"),
        "auto",
        "prepare the next mini-batches on a host thread while the device trains; auto: on CUDA. "
        "The result is the same",
    ),
    Flag(
        "--cuda-graph",
        cli.boolean,
        True,
        "CUDA: replay full mini-batches as one graph, but with Adagrad for the network; what a "
        "network of your own decides in Python is then decided once",
    ),
    Flag(
        "--device-data",
        ("auto", "true", "false"),
        "auto",
        "CUDA: keep the training inputs whose rows are all resident on the device; auto: where "
        "they take at most half of its free memory",
    ),
    Flag(
        "--num-resident",
        cli.number(int, -1, math.inf),
        -1,
        "embedding rows kept on the device, most popular first; -1: all on a CPU, on CUDA the hot "
        "rows (baseline: none)",
    ),
    Flag(
        "--max-memory",
        cli.byte_size,
        None,
        "memory that the inputs may take, as 2G or 1500M: more of them are read from disk by "
        "blocks, and shuffled within windows of them; not given: half of what is free",
        "BYTES",
    ),
)
EVALUATION = (
    Flag(
        "--test-mini-batch-size",
        cli.number(int, -1, math.inf),
        16384,
        "inputs a mini-batch in evaluation; -1: as in training",
    ),
    Flag(
        "--test-freq",
        cli.steps,
        0,
        "mini-batches between evaluations on the test set, for a curve: nothing is chosen by them; "
        "0: at the end only",
    ),
    Flag(
        "--val-freq",
        cli.steps,
        0,
        "mini-batches between evaluations on the validation set; with --save-model the best model "
        "is kept in its folder best. 0: at the end only",
    ),
    Flag(
        "--mlperf-auc-threshold",
        cli.share,
        0.0,
        "stop when the validation AUC (0 to 1) reaches this; 0: do not. Needs --val-freq",
    ),
    Flag(
        "--mlperf-acc-threshold",
        cli.share,
        0.0,
        "stop when the validation accuracy (0 to 1) reaches this; 0: do not. Needs --val-freq",
    ),
    Flag(
        "--patience",
        cli.nonnegative_int,
        0,
        "stop after so many validations in a row without a new best AUC, and test the best weights "
        "(the folder best of --save-model, which it needs, as --val-freq). The rates fall at the "
        "end of the whole run: one that stops before has not had that. 0: do not",
    ),
    Flag(
        "--print-freq",
        cli.nonnegative_int,
        None,
        "mini-batches between progress reports; 0: none; not given: 100, all in the log, at most 5 "
        "of an epoch on the screen",
    ),
    CORRECTION,
)
RUN = (
    Flag("--runs-dir", str, "runs", "folder of all runs' logs"),
    Flag("--run-name", str, None, "folder of this run's log; a method and time where not given"),
    Flag(
        "--save-model",
        str,
        None,
        "folder of this run's checkpoints, the trained model among them; not given: none",
        "DIR",
    ),
    Flag(
        "--checkpoint-every",
        cli.every,
        "30m",
        "with --save-model: mini-batches (1000) or time (90s, 30m, 2h) from one checkpoint to the "
        "next; 0: at the end only",
        "STEPS|TIME",
    ),
    Flag("--keep", cli.positive_int, 2, "checkpoints that stay, the newest ones"),
    Flag(
        "--load-model",
        str,
        None,
        "go on from a checkpoint, or the newest one in a folder; one of another method, order or "
        "segregation gives its weights. auto: from --save-model, or anew where it is empty. Not "
        "given: new weights",
        "DIR|auto",
    ),
    Flag(
        "--inference-only",
        cli.boolean,
        False,
        "evaluate the model of --load-model, without training; it says what its network is, where "
        "a flag does not, or has its usual value",
    ),
    SAVE_PREDICTIONS,
)


@dataclass(frozen=True)
class TrainingSettings:
    """The values of `TRAINING`, with what `slipstream.training.recipe` decided where not given."""

    optimizer: str
    mini_batch_size: int
    nepochs: int
    num_batches: int
    learning_rate: float
    dense_optimizer: str
    dense_learning_rate: float
    lr_num_warmup_steps: int
    lr_decay_start_step: int
    lr_num_decay_steps: int
    lr_decay_share: float
    data_randomize: str
    loss_function: str
    loss_weights: list[float]
    loss_threshold: float
    seed: int


@dataclass(frozen=True)
class MachineSettings:
    """The values of `MACHINE`."""

    processes: int
    device: str
    num_threads: int
    precision: str
    enable_profiling: bool
    debug_mode: bool
    compile: bool
    deterministic: bool
    overlap: str
    cuda_graph: bool
    device_data: str
    num_resident: int
    max_memory: int | None


@dataclass(frozen=True)
class EvaluationSettings:
    """The values of `EVALUATION`."""

    test_mini_batch_size: int
    test_freq: int
    val_freq: int
    mlperf_auc_threshold: float
    mlperf_acc_threshold: float
    patience: int
    print_freq: int | None
    correct_sub_sampling: bool


@dataclass(frozen=True)
class RunSettings:
    """The values of `RUN`."""

    runs_dir: str
    run_name: str | None
    save_model: str | None
    checkpoint_every: tuple[int, float]
    keep: int
    load_model: str | None
    inference_only: bool
    save_predictions: str | None


@dataclass(frozen=True)
class Settings:
    """What a trainer was asked for; `flags` holds all of it as it was parsed, for the log."""

    model: ModelSettings
    training: TrainingSettings
    machine: MachineSettings
    evaluation: EvaluationSettings
    run: RunSettings
    outputs: OutputSettings
    flags: dict[str, Any]


def add_trainer_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all three trainers share, under DLRM's names."""
    cli.add_flags(parser, "model", model_flags.FLAGS)
    cli.add_flags(parser, "training", TRAINING)
    cli.add_flags(parser, "machine", MACHINE)
    cli.add_flags(parser, "evaluation", EVALUATION)
    cli.add_flags(parser, "run", RUN)
    cli.add_flags(parser, "output", OUTPUTS)


def check_trainer_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse flags that do not fit together, by `parser.error`; an empty --load-model is none."""
    if args.lr_num_decay_steps and args.lr_decay_start_step < args.lr_num_warmup_steps:
        parser.error("--lr-decay-start-step comes before --lr-num-warmup-steps are over")
    if args.lr_num_decay_steps and args.lr_decay_share:
        parser.error("--lr-num-decay-steps and --lr-decay-share are two decays; set one to 0")
    if args.test_mini_batch_size == 0:
        parser.error("--test-mini-batch-size: got 0; expected inputs, or -1 for those of training")
    if (args.mlperf_auc_threshold or args.mlperf_acc_threshold) and not args.val_freq:
        if not args.test_freq:
            parser.error("--mlperf-auc-threshold and --mlperf-acc-threshold need --val-freq")
        args.val_freq = args.test_freq
        print(f"note: thresholds are judged on the validation set: --val-freq {args.val_freq}")
    if args.loss_function != "wbce" and args.loss_weights != [1.0, 1.0]:
        parser.error("--loss-weights goes with --loss-function wbce")
    if args.patience and not (args.val_freq and args.save_model):
        parser.error("--patience needs --val-freq, and --save-model to keep the best weights in")
    args.load_model = args.load_model or None  # DLRM's lines may hold an empty one
    if args.load_model == "auto" and not args.save_model:
        parser.error("--load-model auto goes on from --save-model, which is not given")
    if args.inference_only and (not args.load_model or args.save_model):
        parser.error("--inference-only needs --load-model, and writes no --save-model")
    model_flags.check(parser, args)
    output_flags.check(parser, args)


def settings_of(args: argparse.Namespace, num_train: int) -> Settings:
    """The values of `add_trainer_flags`, out of what was parsed, for as many training inputs."""
    training = dataclasses.replace(
        cli.values_of(args, TrainingSettings), **dataclasses.asdict(recipe_of(args, num_train))
    )
    evaluation = cli.values_of(args, EvaluationSettings)
    if evaluation.test_mini_batch_size == -1:
        evaluation = dataclasses.replace(evaluation, test_mini_batch_size=training.mini_batch_size)
    return Settings(
        cli.values_of(args, ModelSettings),
        training,
        cli.values_of(args, MachineSettings),
        evaluation,
        cli.values_of(args, RunSettings),
        cli.values_of(args, OutputSettings),
        dict(vars(args)),
    )


def recipe_of(args: argparse.Namespace, num_train: int) -> Recipe:
    """What decides on the mini-batch, rates and decay: what was given, and the training inputs."""
    # A decay by steps takes the place of the one by share.
    share = 0.0 if args.lr_num_decay_steps else args.lr_decay_share
    return decide(
        num_train,
        args.optimizer,
        args.dense_optimizer,
        args.mini_batch_size,
        args.learning_rate,
        args.dense_learning_rate,
        share,
    )
