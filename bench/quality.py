"""Whether the default recipe is any good: beside a logistic regression, and gradient boosting.

    python -m bench.quality --processed-data-file input/mine/train_processed.npz

Trains, on the training inputs of any processed file,

    dlrm        the baseline with its defaults (further flags are the trainer's), from several seeds
    logistic    scikit-learn's, each value of a column one-hot, dense features as ln(1 + x), with
                the C of `--costs` that is best on the validation half of the held-out day
    lightgbm    where it is installed: values as categories, stopped by the validation half

and prints AUC and log loss on the test half and on the whole held-out day, whose validation half
chose C and the number of trees, and nothing of dlrm's. Beside each AUC stands its 95 % interval,
and that of dlrm's AUC less this model's, by bootstrap over the held-out inputs; one that holds 0 is
a tie. Half a minute for 100 k rows on 2 cores.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/quality.py`

from bench.run_records import save_table  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.metrics import click_metrics  # noqa: E402
from slipstream.training.sets import PreparedData, baseline_data  # noqa: E402

COSTS = (0.01, 0.03, 0.1, 0.3, 1.0)
MAX_ITERATIONS = 3000
INTERVAL = (2.5, 97.5)
BOOSTING = {"objective": "binary", "learning_rate": 0.05, "num_leaves": 63, "verbose": -1}
MAX_TREES, PATIENCE = 2000, 50


@dataclass(frozen=True)
class Scored:
    """What a model says of the held-out day, test half first.

    Attributes:
        name: of the model, with what was chosen for it.
        logits: one array (n,) a seed.
        seconds: of training, a seed.
    """

    name: str
    logits: list[np.ndarray]
    seconds: float


def parts_of(prepared: PreparedData) -> dict[str, Any]:
    """The inputs to train on, to choose by and to test on."""
    data = prepared.data
    if data.test.weights is not None:
        raise ValueError("the log has weights, and the other models here take every input alike")
    return {"train": data.cold, "val": data.val, "test": data.test}


def one_hot(inputs: Any, num_rows: int) -> Any:
    """Sparse features (n, num_dense + num_rows): dense values, and a 1 at each present row."""
    from scipy.sparse import csr_array, hstack

    dense, slots, _ = inputs.batch(slice(0, len(inputs)))
    present = slots.numpy() >= 0
    ends = np.concatenate([[0], present.sum(1).cumsum()])
    rows = slots.numpy()[present]
    ones = csr_array((np.ones(len(rows), np.float32), rows, ends), (len(inputs), num_rows))
    return hstack([csr_array(dense.numpy()), ones], format="csr")


def logistic(prepared: PreparedData, costs: list[float]) -> Scored:
    """Logistic regression to convergence, at the cost that validates best."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    num_rows = int(prepared.table_sizes.sum())
    parts = parts_of(prepared)
    matrices = {name: one_hot(inputs, num_rows) for name, inputs in parts.items()}
    labels = {name: np.asarray(inputs.labels) > 0 for name, inputs in parts.items()}
    start, best = time.perf_counter(), (-1.0, None, 0.0)
    model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=1e-4, warm_start=True)
    for cost in sorted(costs):
        model.set_params(C=cost).fit(matrices["train"], labels["train"])
        if model.n_iter_.max() >= MAX_ITERATIONS:
            print(f"note: the logistic regression at C = {cost:g} has not converged")
        auc = roc_auc_score(labels["val"], model.decision_function(matrices["val"]))
        if auc > best[0]:
            scores = [model.decision_function(matrices[name]) for name in ("test", "val")]
            best = (auc, np.concatenate(scores), cost)
    assert best[1] is not None
    seconds = (time.perf_counter() - start) / len(costs)
    return Scored(f"logistic, C = {best[2]:g}", [best[1]], seconds)


def boosted(prepared: PreparedData, seed: int) -> Scored | None:
    """LightGBM with categories; None where it is not installed."""
    try:
        import lightgbm
    except ImportError:
        print("LightGBM is not installed: left out (pip install lightgbm)")
        return None
    arrays, parts = {}, parts_of(prepared)
    for name, inputs in parts.items():
        dense, slots, _ = inputs.batch(slice(0, len(inputs)))
        arrays[name] = np.concatenate([dense.numpy(), slots.numpy()], axis=1)
    num_dense = parts["train"].num_dense
    columns = list(range(num_dense, arrays["train"].shape[1]))
    start = time.perf_counter()
    train = lightgbm.Dataset(
        arrays["train"],
        np.asarray(parts["train"].labels) > 0,
        params={"verbose": -1},
        categorical_feature=columns,
    )
    val = train.create_valid(arrays["val"], np.asarray(parts["val"].labels) > 0)
    model = lightgbm.train(
        {**BOOSTING, "metric": "auc", "seed": seed},
        train,
        MAX_TREES,
        [val],
        callbacks=[lightgbm.early_stopping(PATIENCE, verbose=False)],
    )
    scores = [model.predict(arrays[name], raw_score=True) for name in ("test", "val")]
    seconds = time.perf_counter() - start
    return Scored(f"lightgbm, {model.best_iteration} trees", [np.concatenate(scores)], seconds)


def ours(prepared: PreparedData, num_seeds: int, flags: list[str]) -> Scored:
    """The baseline at its defaults, from each seed."""
    from bench.baseline_run import predict, train_baseline

    logits, seconds = [], 0.0
    for seed in range(1, num_seeds + 1):
        trainer, settings = train_baseline(prepared, [*flags, "--seed", str(seed)])
        seconds += trainer.clocks.seconds()["training_s"] / num_seeds
        inputs = (prepared.data.test, prepared.data.val)
        logits.append(np.concatenate([predict(trainer, part) for part in inputs]))
    training = settings.training
    name = f"dlrm, {training.optimizer} {training.learning_rate:g}, {training.dense_optimizer} "
    name += f"{training.dense_learning_rate:g}, mini-batch {training.mini_batch_size}"
    return Scored(name, logits, seconds)


def bootstrap(
    scored: list[Scored], labels: np.ndarray, num_samples: int, seed: int
) -> list[np.ndarray]:
    """Each model's AUC, mean over its seeds, on so many samples of the inputs, the same for all."""
    from sklearn.metrics import roc_auc_score

    rng, num = np.random.default_rng(seed), len(labels)
    found: list[np.ndarray] = [np.empty(num_samples) for _ in scored]
    for sample in range(num_samples):
        chosen = rng.integers(0, num, num)
        for aucs, model in zip(found, scored, strict=True):
            values = [roc_auc_score(labels[chosen], logits[chosen]) for logits in model.logits]
            aucs[sample] = np.mean(values)
    return found


def measure(
    scored: list[Scored], labels: np.ndarray, where: str, num_samples: int, seed: int
) -> list[dict[str, Any]]:
    """A line for each model on some inputs; `differs` is the interval of the first one's AUC less
    its own.
    """
    samples = bootstrap(scored, labels, num_samples, seed)
    lines = []
    for model, aucs in zip(scored, samples, strict=True):
        found = [click_metrics(logits, labels) for logits in model.logits]
        low, high = np.percentile(aucs, INTERVAL)
        line = {"where": where, "inputs": len(labels), "model": model.name, "seeds": len(found)}
        line |= {"auc": float(np.mean([one["auc"] for one in found])), "low": low, "high": high}
        line["log_loss"] = float(np.mean([one["log_loss"] for one in found]))
        line["training_s"] = model.seconds
        line["differs_low"], line["differs_high"] = np.percentile(samples[0] - aucs, INTERVAL)
        lines.append(line)
    return lines


def print_table(lines: list[dict[str, Any]]) -> None:
    """For people, a block for each part of the held-out day."""
    width = max(len(line["model"]) for line in lines) + 2
    where = None
    for line in lines:
        if line["where"] != where:
            where = line["where"]
            print(f"\n{where}, {line['inputs']:,} inputs")
            print(
                f"{'':<{width}}seeds  AUC     95 %              log loss  training s  "
                "dlrm's AUC less this one's, 95 %"
            )
        said = f"{line['model']:<{width}}{line['seeds']:>5}  {line['auc']:.4f}  "
        said += f"{line['low']:.4f} to {line['high']:.4f}  {line['log_loss']:>8.4f}  "
        said += f"{line['training_s']:>10.1f}  "
        low, high = line["differs_low"], line["differs_high"]
        if low != high:  # itself
            said += f"{low:+.4f} to {high:+.4f}" + (" (tie)" if low <= 0 <= high else "")
        print(said)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left goes to the trainer."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--processed-data-file", required=True, help="a processed .npz")
    parser.add_argument("--num-seeds", type=cli.positive_int, default=3, help="of dlrm")
    parser.add_argument(
        "--costs",
        nargs="+",
        type=cli.positive_float,
        default=COSTS,
        help="of the logistic regression, C: the inverse of its penalty",
    )
    parser.add_argument(
        "--num-samples", type=cli.positive_int, default=200, help="bootstrap samples"
    )
    parser.add_argument("--csv", default=None, help="write the table here; not given: print only")
    cli.add_flag(parser, cli.SEED)
    return parser.parse_known_args(argv)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Train all, print the table; its lines."""
    args, flags = parse_args(argv)
    prepared = baseline_data(load_processed(args.processed_data_file))
    parts = parts_of(prepared)
    labels = [np.asarray(parts[name].labels) > 0 for name in ("test", "val")]
    if any(part.all() or not part.any() for part in labels):
        raise ValueError("the held-out day has inputs of one class alone: no AUC to compare")
    scored = [ours(prepared, args.num_seeds, flags), logistic(prepared, args.costs)]
    if (trees := boosted(prepared, args.seed)) is not None:
        scored.append(trees)
    num_test = len(labels[0])
    halves = [Scored(m.name, [one[:num_test] for one in m.logits], m.seconds) for m in scored]
    common = (args.num_samples, args.seed)
    lines = measure(halves, labels[0], "test half of the held-out day", *common)
    lines += measure(scored, np.concatenate(labels), "the whole held-out day", *common)
    print_table(lines)
    if args.csv:
        save_table(lines, args.csv)
    return lines


if __name__ == "__main__":
    cli.run_script(main)
