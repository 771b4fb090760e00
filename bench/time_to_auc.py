"""Seconds and inputs until a test AUC: what each part of the recipe and of the engine brings.

    python -m bench.time_to_auc --csv bench/results/time_to_auc.csv

Each method adds one thing to the one before, and trains an epoch with a schedule that covers it:

    plain           plain PyTorch (`bench.plain_dlrm`) by Meta's recipe: SGD 0.1, mini-batch 128
    plain-tuned     by our optimizers, rates, mini-batch and CPU settings
    engine          our baseline, fp32
    bf16            and in bf16
    min-count       and values that come fewer than `--min-count` times share a row
    fae             and popular rows on the device; their inputs in mini-batches of their own
    slipstream      and D percent of the remaining hot inputs dropped: the most stale ones
    random          the control: any D percent of them

`engine@4096` takes another mini-batch. On CUDA also `plain-gpu`, `plain-tuned-gpu` (plain's tables
there, too; else on the CPU) and `engine-resident`, `bf16-resident` (all our rows there).

The target is what the first method reaches at its end, mean over seeds, unless `--target` says it.
A method is there at its first evaluation, on a grid of inputs that all share (as near as a
mini-batch allows), at or above it (the first one at its end); evaluations are not counted, the
start of an engine is. `--shorten true` then looks for the shortest schedule, in steps of a
twentieth of an epoch, whose final AUC, mean over seeds, is at or above the target; of methods that
drop nothing, for dropping is a way to shorten.

One process at a time; a run that finished is not repeated, so an interrupted measurement goes on.
Without `--processed-data-file` a synthetic log of `--rows`. About 25 minutes for 1 M rows and 3
seeds on 2 cores; `--smoke true` takes a minute.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/time_to_auc.py`

import input_segregation  # noqa: E402
from bench.comparison_tables import standard_deviation  # noqa: E402
from bench.methods import code_of  # noqa: E402
from bench.run_records import (  # noqa: E402
    Records,
    all_training_s,
    claim_runs,
    curve_of,
    run_once,
    save_table,
)
from bench.throughput import make_log  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.logs.sub_sampling import SUB_SAMPLING  # noqa: E402
from slipstream.logs.transforms import TRANSFORMS  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.device import choose_device  # noqa: E402
from slipstream.tools.npz import fingerprint, open_npz, pack_manifest, write_npz  # noqa: E402
from slipstream.tools.runtime import describe_machine, git_commit  # noqa: E402
from slipstream.training.recipe import decide  # noqa: E402

META = ("--learning-rate", "0.1", "--mini-batch-size", "128")
# A method's script and flags; what it is not given follows from its name, see `Plan.command`.
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("bench/plain_dlrm.py", META),
    "plain-gpu": ("bench/plain_dlrm.py", META),
    "plain-tuned": ("bench/plain_dlrm.py", ("--tuned", "true")),
    "plain-tuned-gpu": ("bench/plain_dlrm.py", ("--tuned", "true")),
    "engine": ("dlrm_s_pytorch.py", ("--precision", "fp32")),
    "engine-resident": ("dlrm_s_pytorch.py", ("--precision", "fp32")),
    "bf16": ("dlrm_s_pytorch.py", ("--precision", "bf16")),
    "bf16-resident": ("dlrm_s_pytorch.py", ("--precision", "bf16")),
    "min-count": ("dlrm_s_pytorch.py", ("--precision", "bf16")),
    "fae": ("fae_train.py", ("--precision", "bf16")),
    "slipstream": ("slipstream_train.py", ("--precision", "bf16")),
    "random": ("slipstream_train.py", ("--precision", "bf16", "--drop-policy", "random")),
}
DEFAULT = "plain plain-tuned engine bf16 min-count fae slipstream random".split()
USE_RARE = ("min-count", "fae", "slipstream", "random")  # whose data share the rows of rare values
NUM_SHARES = 20  # schedules are shortened by these parts of an epoch
SMOKE = {"rows": 30_000, "num_seeds": 1, "points": 8, "shorten": False}


def base_of(method: str) -> str:
    """A method's name without its mini-batch."""
    return method.partition("@")[0]


def method_of(text: str) -> str:
    """Check a method's name."""
    name, at, size = text.partition("@")
    if name not in METHODS or (at and not (size.isdecimal() and int(size))):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected one of {', '.join(METHODS)}, or with a mini-batch, engine@4096"
        )
    if at and "--mini-batch-size" in METHODS[name][1]:
        raise argparse.ArgumentTypeError(f"{text}: Meta's recipe has its own mini-batch")
    return text


def merge_rare(processed: Path, min_count: int, target: Path) -> None:
    """Write the log anew, values with fewer than `min_count` training inputs as one row a table.

    For logs whose raw form is not at hand; else preprocessing's `--min-count` does it. Raises
    `ValueError` for a log whose features have several columns.
    """
    log = load_processed(processed)
    if not log.layout.is_plain:
        raise ValueError(
            f"{processed} has lists or sequences: give --rare-data-file, or --min-count 1"
        )
    train = log.splits()[0]
    columns, sizes = [], []
    for number, size in enumerate(log.table_sizes.tolist()):
        counts = np.bincount(np.asarray(train.categories[:, number]), minlength=size)
        kept = counts >= min_count
        new = np.where(kept, np.cumsum(kept), 0)  # the shared row is 0
        columns.append(new[np.asarray(log.inputs.categories[:, number])])
        sizes.append(1 + int(kept.sum()))
    found = open_npz(processed, ("X_int", "y"))
    members = {name: found[name] for name in ("X_int", "y", "days", "weights") if name in found}
    kept_parts = {
        key: log.manifest[key] for key in (TRANSFORMS, SUB_SAMPLING) if key in log.manifest
    }
    ids = np.stack(columns, axis=1).astype(np.int32)
    members |= {"X_cat": ids, "counts": np.array(sizes, np.int64)}
    write_npz(target, {**members, "manifest": pack_manifest(kept_parts)})


class Plan:
    """The data of a measurement, and the command of each run."""

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        self.args, self.flags, self.device = args, flags, choose_device(args.device)
        self.log = Path(args.processed_data_file or self._synthetic())
        log = load_processed(self.log)
        self.num_train, test = (len(part) for part in log.splits()[:2])
        if not test:
            raise ValueError(f"{self.log} holds nothing out: there is no AUC to reach")
        for method in args.methods:
            if base_of(method).endswith(("-gpu", "-resident")) and self.device.type != "cuda":
                raise ValueError(f"{method} is for CUDA; --device is {self.device.type}")
        self.rare = Path(args.rare_data_file or self.log)
        if args.min_count > 1 and args.rare_data_file is None and self._uses(USE_RARE):
            known_by = fingerprint(self.log)[:12]
            name = f"{self.log.stem}_{known_by}_min_count{args.min_count}.npz"
            self.rare = Path(args.work_dir) / name
            if not self.rare.exists():
                self.rare.parent.mkdir(parents=True, exist_ok=True)
                merge_rare(self.log, args.min_count, self.rare)
        self.folder = self.rare.parent / f"{self.rare.stem}_hot{args.hot_emb_gpu_mem}"
        if self._uses(("fae", "slipstream", "random")):
            input_segregation.main(
                ["--processed-data-file", str(self.rare), "--segregated-data-dir", str(self.folder)]
                + ["--hot-emb-gpu-mem", str(args.hot_emb_gpu_mem), *self._dim()]
            )

    def _dim(self) -> list[str]:
        """The rows' size as the runs get it, for segregation."""
        name = "--arch-sparse-feature-size"
        found = [at for at, word in enumerate(self.flags) if word.partition("=")[0] == name]
        return self.flags[found[-1] :][: 1 if "=" in self.flags[found[-1]] else 2] if found else []

    def _uses(self, names: tuple[str, ...]) -> bool:
        return any(base_of(method) in names for method in self.args.methods)

    def _synthetic(self) -> Path:
        path = Path(self.args.work_dir) / f"synthetic_{self.args.rows}_occurring_seed123.npz"
        make_log(path, self.args.rows, False, 123)
        return path

    def mini_batch(self, method: str) -> int:
        """Inputs a mini-batch of a method."""
        own = METHODS[base_of(method)][1]
        if "--mini-batch-size" in own:
            return int(own[own.index("--mini-batch-size") + 1])
        size = method.partition("@")[2]
        return int(size) if size else decide(self.num_train).mini_batch_size

    def command(self, method: str, seed: int, share: float) -> list[str]:
        """A run over a share of an epoch."""
        base, size = base_of(method), self.mini_batch(method)
        script, own = METHODS[base]
        words = [sys.executable, str(REPOSITORY / script), *self.flags, *own]
        words += ["--mini-batch-size", str(size), "--seed", str(seed)]
        data = self.rare if base in USE_RARE else self.log
        words += ["--processed-data-file", str(data)]
        on_cuda = self.device.type == "cuda"
        if script.startswith("bench"):
            place = ("gpu" if base.endswith("-gpu") else "hybrid") if on_cuda else "cpu"
            words += ["--placement", place]
            if "--tuned" in own:
                recipe = decide(self.num_train, mini_batch_size=size)
                words += ["--optimizer", recipe.optimizer]
                words += ["--learning-rate", str(recipe.learning_rate)]
                words += ["--dense-learning-rate", str(recipe.dense_learning_rate)]
                words += ["--lr-decay-share", str(recipe.lr_decay_share)]
        else:
            words += ["--device", self.device.type, "--print-freq", "0"]
            if not script.startswith("dlrm"):
                words += ["--segregated-data-dir", str(self.folder)]
            if script.startswith("slipstream"):
                words += ["--drop-percentage", str(self.args.drop_percentage)]
            if base.endswith("-resident"):
                num_rows = int(load_processed(self.log).table_sizes.sum())
                words += ["--num-resident", str(num_rows)]
        if share < 1:
            words += ["--num-batches", str(max(1, round(share * self.num_train / size)))]
            return words
        grid = self.num_train / self.args.points / size
        return [*words, "--test-freq", str(max(1, round(grid)))]

    def run(self, method: str, seed: int, share: float = 1.0) -> Records:
        """Train, unless that is done."""
        part = "" if share == 1 else f"-{round(100 * share)}percent"
        folder = Path(self.args.runs_dir) / f"{method.replace('@', '-at-')}{part}-seed{seed}"
        return run_once(folder, self.command(method, seed, share))


def reached(records: Records, target: float) -> dict[str, float]:
    """Inputs and seconds of training at the first evaluation at or above a target; NaN: none."""
    for record in curve_of(records):
        if record["auc"] >= target:
            return {"samples": record["samples"], "training_s": all_training_s(record)}
    return {"samples": np.nan, "training_s": np.nan}


def shortest(
    plan: Plan, method: str, target: float, seeds: range, whole_auc: float
) -> tuple[float, list[Records]]:
    """The least share of an epoch whose final AUC reaches the target, and its runs; NaN: none."""

    def runs_at(parts: int) -> list[Records]:
        return [plan.run(method, seed, parts / NUM_SHARES) for seed in seeds]

    if not whole_auc >= target:
        return np.nan, []
    low, high = 0, NUM_SHARES
    while high - low > 1:
        parts = (low + high) // 2
        auc = float(np.mean([records[-1]["auc"] for records in runs_at(parts)]))
        low, high = (low, parts) if auc >= target else (parts, high)
    return high / NUM_SHARES, runs_at(high)


def median(values: list[float]) -> float:
    """The median; NaN where a seed has none."""
    return float(np.median(values)) if all(np.isfinite(values)) else float("nan")


def tabulate(
    plan: Plan, runs: dict[str, list[Records]], target: float, seeds: range
) -> list[dict[str, Any]]:
    """A line a method; ratios are to the first one's seconds."""
    lines: list[dict[str, Any]] = []
    for method, logs in runs.items():
        aucs = [records[-1]["auc"] for records in logs]
        found = [reached(records, target) for records in logs]
        line: dict[str, Any] = {"method": method, "mini_batch": plan.mini_batch(method)}
        line |= {"n": len(logs), "num_there": sum(np.isfinite(one["samples"]) for one in found)}
        line |= {"final_auc": np.mean(aucs), "sd": standard_deviation(np.array(aucs))}
        whole = [all_training_s(records[-1]) for records in logs]
        line |= {"epoch_s": median(whole)}
        line |= {name: median([one[name] for one in found]) for name in ("samples", "training_s")}
        first = lines[0] if lines else line
        if first is line and plan.args.target is None:
            line |= {"samples": plan.num_train, "training_s": line["epoch_s"]}  # by definition
        line["share_of_first"] = line["training_s"] / first["training_s"]
        if plan.args.shorten and base_of(method) not in ("slipstream", "random"):
            share, short = shortest(plan, method, target, seeds, line["final_auc"])
            seconds = [all_training_s(records[-1]) for records in short]
            line |= {"short_share": share, "short_s": median(seconds) if seconds else np.nan}
            line["short_auc"] = np.mean([r[-1]["auc"] for r in short]) if short else np.nan
            line["short_of_first"] = line["short_s"] / first["training_s"]
        lines.append(line)
    return lines


def shown(value: float, form: str) -> str:
    """A number, or a dash."""
    return (
        f"{value:{form}}" if np.isfinite(value) else "-".rjust(int(form.split(".")[0].strip(",")))
    )


def print_table(lines: list[dict[str, Any]], target: float) -> None:
    """For people."""
    print(f"\ntarget: test AUC {target:.4f}; medians over seeds, seconds of training")
    print(
        f"{'method':<22}mini-batch  there    final AUC       epoch s      inputs         s"
        "  of first   shortened: share       s  of first"
    )
    for line in lines:
        said = f"{line['method']:<22}{line['mini_batch']:>10,}  {line['num_there']}/{line['n']}  "
        said += f"{line['final_auc']:.4f} ± {line['sd']:.4f}  {line['epoch_s']:>9.2f}  "
        said += f"{shown(line['samples'], '10,.0f')}{shown(line['training_s'], '10.2f')}"
        said += shown(line["share_of_first"], "10.3f")
        if "short_share" in line:
            said += f"{shown(line['short_share'], '19.2f')}{shown(line['short_s'], '8.2f')}"
            said += shown(line["short_of_first"], "10.3f")
        print(said)


FLAGS = (
    cli.Flag("--processed-data-file", str, None, "a processed .npz; not given: a synthetic log"),
    cli.Flag("--rows", cli.positive_int, 1_000_000, "rows of the synthetic log"),
    cli.Flag("--min-count", cli.positive_int, 4, "of the methods from min-count on; 1: off"),
    cli.Flag(
        "--rare-data-file",
        str,
        None,
        "the log as preprocessing's --min-count makes it; not given: made from the processed file",
    ),
    cli.Flag("--hot-emb-gpu-mem", cli.byte_size, 4 << 20, "memory for hot rows, in bytes or as 4M"),
    cli.Flag("--drop-percentage", cli.percent, 30, "D of slipstream and random, in percent"),
    cli.Flag("--target", cli.share, None, "the AUC; not given: the first method's at its end"),
    cli.Flag("--num-seeds", cli.positive_int, 3, "seeds a method"),
    cli.Flag("--points", cli.positive_int, 40, "evaluations an epoch"),
    cli.Flag("--shorten", cli.boolean, False, "look for the shortest schedule, too"),
    cli.Flag("--device", ("auto", "cpu", "cuda"), "auto", "where to train"),
    cli.Flag("--runs-dir", str, "runs/time_to_auc", "folder of this measurement"),
    cli.Flag("--work-dir", str, "input/bench", "where the synthetic log and its folders are made"),
    cli.Flag("--csv", str, None, "write the table here; not given: print only"),
    cli.Flag("--smoke", cli.boolean, False, "a small log, to see that it works"),
)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left goes to every run, plain ones, too."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--methods", nargs="+", type=method_of, default=DEFAULT, metavar="METHOD", help="see above"
    )
    cli.add_flags(parser, "measurement", FLAGS)
    args, flags = parser.parse_known_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    return args, flags


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure; returns the table's lines."""
    args, flags = parse_args(argv)
    with contextlib.ExitStack() as stack:
        if args.smoke:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="time-to-auc-"))
            vars(args).update(SMOKE, runs_dir=f"{folder}/runs", work_dir=folder, device="cpu")
            args.hot_emb_gpu_mem = 1 << 18
        plan, seeds = Plan(args, flags), range(1, args.num_seeds + 1)
        claimed = {"log": fingerprint(plan.log), "rare log": fingerprint(plan.rare), "flags": flags}
        for name in ("hot_emb_gpu_mem", "drop_percentage", "points"):
            claimed[name] = getattr(args, name)
        machine = describe_machine(plan.device)
        claimed |= {**code_of(flags, "bench/plain_dlrm.py"), "machine": machine}
        claim_runs(Path(args.runs_dir), claimed, ())
        runs: dict[str, list[Records]] = {method: [] for method in args.methods}
        todo = [(method, seed) for seed in seeds for method in args.methods]
        for method, seed in tqdm(todo, desc="runs", disable=None):
            runs[method].append(plan.run(method, seed))
        finals = [records[-1]["auc"] for records in next(iter(runs.values()))]
        target = float(np.mean(finals)) if args.target is None else args.target
        lines = tabulate(plan, runs, target, seeds)
    print_table(lines, target)
    if args.csv:
        where = machine.get("gpu") or machine["cpu"]
        about = {"target": target, "machine": where, "commit": git_commit()}
        save_table([{**line, **about} for line in lines], args.csv)
    return lines


if __name__ == "__main__":
    cli.run_script(main)
