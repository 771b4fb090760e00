"""All figures of the papers (Slipstream, FAE), made anew: one command, one folder, one page.

    bench/paper_figures.sh --quick
    bench/paper_figures.sh input/kaggle/train_processed.npz --seeds 3
    RAW_DATA=shop.csv DATA_SET=custom COLUMNS_FILE=shop.json bench/paper_figures.sh

DATA, before all flags, is a processed file (data_utils.py), which is segregated here. Without it
the wrappers' variables (RAW_DATA, DATA_SET, ...: README.md) say what the log is, as for
run_slipstream.sh, and without those it is their synthetic log. `--quick` takes 20,000 rows of a
synthetic log and a small network: its figures are real and say nothing of speed; two minutes on 2
cores.

`--out` gets index.html, which holds all figures beside what the papers claim, each figure as PNG
(`--also pdf`: and for print) with its numbers as CSV, and the runs that they are of, whose
`log.jsonl` is all that they are made of; where time goes in a step, how far rows move and which
rows are hot is measured in this process. A run that has finished is not repeated, nor what was
measured, so a killed command goes on; a folder with other data, flags, machine or code is refused.

Every method trains at the same recipe, D = 30 % of the hot inputs left where none is given; other
flags go to the trainers that have them (`--arch-mlp-top 256-1`). Each run of an epoch takes as long
as run_fae_baseline.sh; all figures take about 65 kinds of runs a seed, `--only` takes some.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/paper_figures.py`

from bench import paper_curves, paper_data, paper_page, paper_steps  # noqa: E402
from bench.methods import flags_in  # noqa: E402
from bench.paper_runs import Drawn, Job, Plan  # noqa: E402
from bench.paper_scaling import scaling  # noqa: E402
from bench.paper_style import ALSO, style  # noqa: E402
from bench.paper_sweeps import SWEEPS, sweep_figure  # noqa: E402
from bench.small_log import ROW_FLAGS, make_small_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.runtime import git_commit  # noqa: E402

QUICK_ROWS, QUICK_BUDGET = 20_000, 200_000
QUICK_FLAGS = (
    *ROW_FLAGS,
    # One thread: with so small a network two are no faster, and wait for other work.
    *"--arch-mlp-bot 13-32-8 --arch-mlp-top 32-1 --precision fp32 --device cpu "
    "--num-threads 1".split(),
)
NO_CLAIM = "No number of theirs is known to us."


class Figure(NamedTuple):
    """A figure: its title, what the papers claim, how it is drawn, and its runs."""

    title: str
    claim: str
    draw: Callable[[Plan], Drawn]
    jobs: Callable[[Plan], list[Job]] = lambda plan: []


def _sweep(name: str, title: str, claim: str) -> Figure:
    return Figure(title, claim, sweep_figure(name), SWEEPS[name].all_jobs)


FIGURES = {
    "data": Figure(
        "Data set and model",
        "Criteo Kaggle (last column), Criteo Terabyte (dim 64, mini-batch 2,048), Avazu, Taobao "
        "with TBSM (dim 16, mini-batch 256).",
        paper_data.data,
    ),
    "skew": Figure(
        "Accesses are skewed",
        "FAE: accesses are skewed, up to 10,000x.",
        paper_data.skew,
    ),
    "budget": Figure(
        "Memory for hot rows",
        "Slipstream: about 500 MB of rows take 75 % of the accesses (real logs).",
        paper_data.budget,
    ),
    "profiling": Figure(
        "Profiling a share of the inputs",
        "FAE finds hot rows by a sample of the inputs: 5 % of Kaggle.",
        paper_data.profiling,
    ),
    "embedding_share": Figure(
        "What a step is spent on",
        "Slipstream: embedding work takes up to 75 % of training time.",
        paper_steps.embedding_share,
    ),
    "change": Figure(
        "How far single rows move",
        "Slipstream: rows saturate, visibly after about 25 % of the iterations (dashed). By SGD; "
        "here by the recipe above, unless --optimizer says another.",
        paper_steps.change,
    ),
    "curves": Figure(
        "Quality against time",
        "Slipstream: accuracy and AUC equal to training everything. No control drops as many at "
        "random.",
        paper_curves.curves,
        paper_curves.main_jobs,
    ),
    "speed_up": Figure(
        "Speed-up",
        "Slipstream: 2x over XDL, 2.4x over Intel-optimised DLRM, 1.2x over FAE (17 % of its time "
        "removed), 1.175x over Hotline. FAE: 2.3x over XDL on a CPU, 1.52x on CPU and GPU.",
        paper_curves.speed_up,
        paper_curves.main_jobs,
    ),
    "overhead": Figure(
        "What choosing inputs costs",
        "The code classifies once an epoch, on the CPU, by one process a core. " + NO_CLAIM,
        paper_curves.overhead,
        lambda plan: [Job(method) for method in paper_curves.DROPPING],
    ),
    "schedule": Figure(
        "Hot and cold mixed, or in phases",
        "FAE: a scheduler interleaves hot and cold mini-batches, at a rate that follows the test "
        "loss; the published code trains all cold ones, then all hot ones.",
        paper_curves.schedule,
        paper_curves.schedule_jobs,
    ),
    "mini_batch": Figure(
        "Mini-batch",
        "Settings: 1,024 on Kaggle, 2,048 on Terabyte, 256 on Taobao.",
        paper_curves.mini_batch,
        paper_curves.mini_batch_jobs,
    ),
    "alpha": _sweep(
        "alpha",
        "Sensitivity: alpha",
        "The code asks for 26 of 26 stale rows (alpha 1), and looks for T in [0, 0.1].",
    ),
    "snapshot_start": _sweep(
        "snapshot_start",
        "Sensitivity: when the snapshot is taken",
        "Rows saturate after about 25 % of the iterations; the script waits for 1,000 hot "
        "mini-batches.",
    ),
    "snapshot_window": _sweep(
        "snapshot_window",
        "Sensitivity: snapshot window",
        "3 % of the epoch's mini-batches between snapshot and choice.",
    ),
    "sample_rate": _sweep(
        "sample_rate",
        "Sensitivity: sample rate",
        "T from 0.1 % of the hot inputs, the drop within 8 points of D = 30 %.",
    ),
    "hot_budget": _sweep(
        "hot_budget",
        "Sensitivity: hot memory",
        "256 MB on Kaggle. Hot rows are hundreds of MB, so that several snapshots fit on a GPU.",
    ),
    "min_count": _sweep("min_count", "Sensitivity: rare values share a row", NO_CLAIM),
}
SCALING = Figure(
    "Scaling over processes",
    NO_CLAIM,
    lambda plan: Drawn([], ""),
)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left are flags of the trainers."""
    parser = cli.Parser(__doc__)
    names = [*FIGURES, "scaling"]
    add = parser.add_argument
    add("--quick", action="store_true", help="a small synthetic log and network")
    add("--out", default=None, help="the folder; not given: figures/paper, or figures/paper_quick")
    add("--seeds", type=cli.positive_int, default=3, help="runs of each kind, seeds 1, 2, ...")
    add("--epochs", type=cli.positive_int, default=1, help="epochs of each run")
    add("--points", type=cli.positive_int, default=20, help="evaluations an epoch, for curves")
    add(
        "--hot-emb-gpu-mem",
        type=cli.byte_size,
        default=0,
        help="memory for hot rows, in bytes or as 256M; not given: 256M, at most an eighth of the "
        "rows",
    )
    add(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="FIGURE",
        help=f"figures to make, of {', '.join(names)}; others stay off the page",
    )
    add("--also", nargs="+", choices=ALSO, default=[], help="formats beside PNG, for print")
    add(
        "--scaling-dir",
        default=None,
        help="folder of the CSV files of bench.scaling --out; not given: scaling in --out",
    )
    parser.usage = "paper_figures.sh [DATA] [flags below] [flags of the trainers]"
    words = sys.argv[1:] if argv is None else list(argv)
    # Not argparse's: it would take the value of a trainer's flag for DATA.
    data = words.pop(0) if words and not words[0].startswith("-") else None
    args, flags = parser.parse_known_args(words)
    args.data = data
    if flags and not flags[0].startswith("-"):
        parser.error(f"got {flags[0]!r} among the flags; DATA comes first")
    if args.quick == (args.data is not None):
        parser.error("give DATA, a processed .npz, or --quick")
    if args.data is not None and not Path(args.data).is_file():
        parser.error(f"DATA: {args.data} is no file; expected a processed .npz of data_utils.py")
    try:
        flags_in(shlex.join(flags))
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return args, flags


def plan_of(args: argparse.Namespace, flags: list[str]) -> Plan:
    """The data, made first where they are the quick ones, and what all runs share."""
    out = Path(args.out or ("figures/paper_quick" if args.quick else "figures/paper"))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is no folder")
    out.mkdir(parents=True, exist_ok=True)
    processed, budget = args.data, args.hot_emb_gpu_mem
    if args.quick:
        folder = out / "work" / "small_log"
        folder.mkdir(parents=True, exist_ok=True)
        say(f"a small log of {QUICK_ROWS:,} rows")
        processed, _ = make_small_log(folder.absolute(), QUICK_ROWS, QUICK_BUDGET)
        flags, budget = [*QUICK_FLAGS, *flags], budget or QUICK_BUDGET
    seeds = range(1, args.seeds + 1)
    settings = (flags, seeds, args.epochs, args.points, budget)
    return Plan(Path(processed), out, *settings, here=args.quick)


def say(text: str) -> None:
    """A line of progress."""
    print(text, flush=True)


def make(
    plan: Plan, names: list[str], scaling_dir: Path, also: Sequence[str] = ()
) -> list[paper_page.Entry]:
    """Train what is missing and draw; figures are saved as they are drawn."""
    figures = {**FIGURES, "scaling": SCALING._replace(draw=lambda plan: scaling(scaling_dir))}
    names = [name for name in figures if name in names]
    jobs = {name: figures[name].jobs(plan) for name in names}
    jobs = {name: [] if plan.why_not(mine) else mine for name, mine in jobs.items()}
    plan.claim([job for mine in jobs.values() for job in mine])
    entries = []
    for number, name in enumerate(names, 1):
        figure, start, trained = figures[name], time.perf_counter(), plan.trained
        mine = jobs[name]
        kinds = f", {len(mine)} kinds of runs" if mine else ""
        say(f"{number} of {len(names)}, {name}{kinds} ...")
        with style():
            plan.train(mine)
            drawn = figure.draw(plan)
            paper_page.save_figure(name, drawn, plan.out, also)
        entries.append(paper_page.Entry(name, figure.title, figure.claim, drawn))
        trained, seconds = plan.trained - trained, time.perf_counter() - start
        say(f"  {seconds:.1f} s, {trained} runs trained: {drawn.said}")
    return entries


def about(plan: Plan, args: argparse.Namespace, argv: list[str], seconds: float) -> dict[str, str]:
    """What the page says of itself."""
    machine, train = plan.machine, plan.num_train
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['cpu_cores']} cores"
    drop = plan.parsed()
    share, batches = drop.snapshot_start
    before = f"{batches} mini-batches" if batches else f"{share:g}"
    network = shlex.join(plan.flags) or "the trainers' defaults"
    facts = {
        "command": shlex.join(["bench/paper_figures.sh", *argv]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": f"{where}, {machine['memory_bytes'] / 2**30:.0f} GiB; "
        f"PyTorch {machine['torch']}",
        "commit": str(git_commit()),
        "data": f"{plan.path}, {len(plan.log.inputs):,} rows, {train:,} to train on",
        "data's fingerprint": str(plan.claimed["processed"])[:16],
        "runs": f"{plan.out / 'runs'}, seeds {', '.join(map(str, plan.seeds))}, "
        f"{plan.epochs} epoch{'s' * (plan.epochs > 1)}; {plan.trained} trained by this call, in "
        f"{seconds:.0f} s in all",
        "flags of all runs": network,
        "recipe": f"mini-batch {plan.batch_size:,}, rows by {plan.recipe.optimizer} at "
        f"{plan.recipe.learning_rate:g}, network by {plan.recipe.dense_optimizer} at "
        f"{plan.recipe.dense_learning_rate:g}",
        "dropping": f"D = {drop.drop_percentage:g} % of the hot inputs left, alpha {drop.alpha:g}, "
        f"snapshot after {before}, window {drop.snapshot_window:g} of the hot inputs",
        "hot memory": f"{plan.budget:,} bytes",
    }
    if args.quick:
        facts["note"] = (
            "--quick: a synthetic log and a small network, all runs in one process (plain PyTorch "
            "has our CPU settings). Real runs, too short to say anything of speed or quality."
        )
    if why := plan.why_no_plain():
        facts["left out"] = f"{why}."
    return facts


def main(argv: list[str] | None = None) -> Path:
    """Make the figures and the page; returns the page's path."""
    start = time.perf_counter()
    args, flags = parse_args(argv)
    plan = plan_of(args, flags)
    scaling_dir = Path(args.scaling_dir or plan.out / "scaling")
    try:
        entries = make(plan, args.only, scaling_dir, args.also)
    except KeyboardInterrupt:
        say(f"the runs that have finished are kept in {plan.out}; the same command goes on")
        raise
    words = sys.argv[1:] if argv is None else list(argv)
    facts = about(plan, args, words, time.perf_counter() - start)
    return paper_page.write(entries, plan, facts)


if __name__ == "__main__":
    cli.run_script(main)
