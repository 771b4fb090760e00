"""Search rates, mini-batch and width for a log of one's own, by validation AUC.

    pip install optuna
    python -m bench.tune --processed-data-file input/mine/train_processed.npz --max-runs 40

Each run trains the baseline for one epoch on the newest `--max-inputs` training inputs, with values
that Optuna chooses (its TPE sampler); the first run is that of the defaults. Runs are kept in a
journal beside the processed file, so an interrupted search goes on, and a later call adds to it. At
the end the best and the defaults are trained from `--num-seeds` other seeds each, since the best of
many is lucky in part, and the flags of the better one are printed. The test set is never looked at.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/tune.py`

from bench.baseline_run import train_baseline, with_training  # noqa: E402
from bench.comparison_tables import half_interval  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import fingerprint  # noqa: E402
from slipstream.training.recipe import decide, mini_batch_for  # noqa: E402
from slipstream.training.sets import PreparedData, baseline_data  # noqa: E402

FACTORS = (0.25, 0.5, 1, 2, 4)  # of the default mini-batch
RATES, DENSE_RATES = (0.01, 0.5), (1e-4, 0.01)
WIDTHS = {"small": ("64", "256-64-1"), "usual": ("512-256-64", "512-256-1")}


def defaults_for(num_train: int) -> dict[str, Any]:
    """What is trained with where no flag is given, as a run's values."""
    recipe = decide(num_train, "rwsadagrad")
    return {
        "mini_batch_size": recipe.mini_batch_size,
        "learning_rate": recipe.learning_rate,
        "dense_learning_rate": recipe.dense_learning_rate,
        "width": "usual",
    }


def words_of(values: dict[str, Any], dim: int) -> list[str]:
    """A run's values as flags of the trainer."""
    words = ["--optimizer", "rwsadagrad"] if values else []
    for name, value in values.items():
        if name == "width":
            bottom, top = WIDTHS[value]
            words += ["--arch-mlp-bot", f"auto-{bottom}-{dim}", "--arch-mlp-top", top]
        else:
            text = str(value) if isinstance(value, int) else f"{value:.4g}"
            words += [f"--{name.replace('_', '-')}", text]
    return words


def validated(
    prepared: PreparedData, values: dict[str, Any], args: argparse.Namespace, seed: int
) -> float:
    """The validation AUC of a model that is trained with these values; 0.5 where it diverges."""
    words = [*args.flags, *words_of(values, args.dim), "--seed", str(seed)]
    try:
        trainer, _ = train_baseline(prepared, words)
    except ValueError as error:
        if "lower --learning-rate" not in str(error):
            raise
        return 0.5
    return float(trainer.progress.validations[-1]["auc"])


def search(prepared: PreparedData, args: argparse.Namespace) -> dict[str, Any]:
    """Run what is left of `--max-runs`; the best run's values."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=f"{fingerprint(args.processed_data_file)} {args.max_inputs} {args.flags}",
        storage=JournalStorage(JournalFileBackend(args.journal)),
        direction="maximize",
        load_if_exists=True,
    )
    defaults = defaults_for(prepared.data.num_train)
    sizes = [max(8, int(factor * defaults["mini_batch_size"])) for factor in FACTORS]

    def run(trial: optuna.Trial) -> float:
        values = {
            "mini_batch_size": trial.suggest_categorical("mini_batch_size", sizes),
            "learning_rate": trial.suggest_float("learning_rate", *RATES, log=True),
            "dense_learning_rate": trial.suggest_float(
                "dense_learning_rate", *DENSE_RATES, log=True
            ),
            "width": trial.suggest_categorical("width", list(WIDTHS)),
        }
        auc = validated(prepared, values, args, args.seed)
        said = " ".join(words_of(values, args.dim))
        print(f"run {trial.number + 1}: validation AUC {auc:.4f}  {said}")
        return auc

    finished = [trial for trial in study.trials if trial.state.is_finished()]
    if finished:
        print(f"{len(finished)} runs are in {args.journal}")
    else:
        study.enqueue_trial(defaults)
    # Another seed when it goes on: the same one would draw the same runs again.
    study.sampler = optuna.samplers.TPESampler(seed=args.seed + len(finished))
    left = args.max_runs - len(finished)
    if left > 0:
        study.optimize(run, n_trials=left, timeout=60 * args.max_minutes or None)
    return dict(study.best_trial.params)


def confirm(
    prepared: PreparedData, best: dict[str, Any], args: argparse.Namespace
) -> dict[str, Any]:
    """The best, or the defaults where other seeds cannot tell it from them; none: no flag."""
    defaults = defaults_for(prepared.data.num_train)
    if best == defaults:
        return {}
    seeds = range(args.seed + 1, args.seed + 1 + args.num_seeds)
    aucs = {
        name: np.array([validated(prepared, values, args, seed) for seed in seeds])
        for name, values in (("defaults", defaults), ("best", best))
    }
    for name, found in aucs.items():
        print(f"{name}: validation AUC {found.mean():.4f}, mean of {len(found)} other seeds")
    difference = aucs["best"] - aucs["defaults"]
    if not difference.mean() > half_interval(difference):
        print("the difference is inside the noise: a tie, so the defaults")
        return {}
    return best


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; what is left goes to the trainer, in `flags`."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--processed-data-file", required=True, help="a processed .npz")
    parser.add_argument(
        "--max-runs", type=cli.positive_int, default=40, help="runs of the search in all"
    )
    parser.add_argument(
        "--max-minutes",
        type=cli.nonnegative_float,
        default=0.0,
        help="minutes after which no further run begins; 0: no limit",
    )
    parser.add_argument(
        "--max-inputs",
        type=cli.positive_int,
        default=1_000_000,
        help="newest training inputs that a run trains on",
    )
    parser.add_argument(
        "--num-seeds", type=cli.number(int, 2, math.inf), default=3, help="of the last runs"
    )
    parser.add_argument(
        "--journal", default=None, help="file of the runs; not given: beside the processed file"
    )
    parser.add_argument("--arch-sparse-feature-size", dest="dim", type=int, default=16, help="dim")
    cli.add_flag(parser, cli.SEED)
    args, flags = parser.parse_known_args(argv)
    args.flags = [*flags, "--arch-sparse-feature-size", str(args.dim)]
    if args.journal is None:
        args.journal = str(Path(args.processed_data_file).with_suffix(".tune.log"))
    return args


def main(argv: list[str] | None = None) -> list[str]:
    """Search, confirm, print the flags to use; returns them."""
    args = parse_args(argv)
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ValueError("the search needs Optuna: pip install optuna") from None
    whole = baseline_data(load_processed(args.processed_data_file))
    num_train = whole.data.num_train
    prepared = with_training(whole, max(0, num_train - args.max_inputs), num_train)
    values = confirm(prepared, search(prepared, args), args)
    sizes = [mini_batch_for(data.data.num_train) for data in (prepared, whole)]
    if values:  # the mini-batch grows as the defaults' does, from the sample to the whole
        values = {**values, "mini_batch_size": values["mini_batch_size"] * sizes[1] // sizes[0]}
    words = words_of(values, args.dim)
    print(f"use: {' '.join(words)}" if words else "use the defaults: no flags are needed here")
    return words


if __name__ == "__main__":
    cli.run_script(main)
