"""Train by several methods, seeds and settings, one process at a time, and tabulate what it cost.

    python -m bench.compare --processed-data-file input/synthetic/train_processed.npz \
        --segregated-data-dir input/synthetic/hot_cold \
        --settings 'd30=--drop-percentage 30' 'd60=--drop-percentage 60'

Reads each run's `log.jsonl` only. A run that finished is not repeated, so an interrupted comparison
goes on; `--runs-dir` holds one comparison, and runs on other data, with other flags or of other
code there are refused, those of another text of one policy alone.

Differences are to the first method, over paired seeds (same seed, same initial weights); one inside
its 95 % confidence interval (Student's t) is called a tie. Policies also have theirs to
`slipstream-random` in the same setting, where that is among the methods. Dropping trains less:
where rates are constant, the first method *stopped earlier* stands beside each; where they fall at
a run's end, the setting that trains FAE as much less is printed, for a run of its own.

About a minute a run on 1 M synthetic rows and 2 cores (long ones: `--checkpoint-every 10m`);
`--smoke` makes a small log of its own, and takes a minute in all. Seeds of two machines:
`--first-seed 11` on the second, then both folders' runs in one, and all seeds once more there.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/compare.py`

import slipstream_train  # noqa: E402
from bench.comparison_tables import (  # noqa: E402
    by_run,
    decays,
    markdown,
    metrics_of,
    not_dropped,
    print_table,
    tabulate,
)
from bench.methods import (  # noqa: E402
    DEFAULT_METHODS,
    METHODS,
    OWN_POLICY,
    Kind,
    check_flags,
    code_of,
    command_of,
    flags_in,
    folder_of,
    kinds_of,
    method_of,
    script_of,
    split_setting,
    texts_of,
)
from bench.run_records import (  # noqa: E402
    Records,
    by_flag,
    claim_runs,
    finished_records,
    run_once,
    save_table,
)
from bench.small_log import MODEL_FLAGS, make_small_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import fingerprint, open_npz  # noqa: E402
from slipstream.training.flags import recipe_of  # noqa: E402

SMOKE_ROWS, SMOKE_BUDGET = 20_000, 200_000  # bytes of hot rows

Run = tuple[str, str, int]  # method, setting, seed


def kind_name(kind: Kind) -> str:
    """The name of a kind's folders, but for the seed."""
    method, setting = kind
    return "-".join(filter(None, [folder_of(method), setting]))


def run_name(run: Run) -> str:
    """The folder of a run."""
    return f"{kind_name(run[:2])}-seed{run[2]}"


def train(run: Run, args: argparse.Namespace, flags: list[str]) -> Records:
    """Run one training, unless it has finished before; its log's records."""
    method, setting, seed = run
    folder = Path(args.runs_dir) / run_name(run)
    script, words = command_of((method, setting), args, flags)
    command = [sys.executable, str(REPOSITORY / f"{script}.py"), *words, "--seed", str(seed)]
    command += ["--print-freq", "0", "--test-freq", str(args.test_freq)]
    return run_once(folder, command, args.checkpoint_every)


def claim(kinds: list[Kind], args: argparse.Namespace, flags: list[str]) -> None:
    """Note in `--runs-dir` what is compared there; `ValueError` where finished runs were others."""
    compared: dict[str, Any] = {
        "processed": fingerprint(args.processed_data_file),
        "segregated": fingerprint(Path(args.segregated_data_dir) / "embedding_rows.npz"),
        "flags": by_flag(flags),
        "--points": args.points,
        **code_of(flags),
        "kinds": {},  # a later call may bring more of these
    }
    for method, name in kinds:
        words = split_setting(args.settings.get(name, ""), method)[0]
        texts = texts_of(words)
        for text in texts_of(script_of(method)[1]).values():
            texts[folder_of(method)] = text  # another file's runs would lie in the same folder
        compared["kinds"][kind_name((method, name))] = {"flag": by_flag(words), "own file": texts}
    claim_runs(Path(args.runs_dir), compared, ("kinds",))


def training_less(
    rows: Records, logs: dict[Kind, list[Records]], settings: dict[str, str]
) -> list[str]:
    """Settings of FAE that train as few inputs as what dropped some, but for those that were run.

    They are the control of dropping at all where learning rates fall at a run's end: a curve on its
    way there has not had that yet.
    """
    table, found = by_run(rows), []
    for (method, name), metrics in table.items():
        if not (method.startswith("slipstream-") and metrics["dropped_share"]["mean"] > 0):
            continue
        samples = metrics["samples"]["mean"]
        size = logs[method, name][0][0]["training"]["mini_batch_size"]
        is_run = any(
            other == "fae" and 0 <= samples - run["samples"]["mean"] <= size
            for (other, _), run in table.items()
        )
        if not is_run:
            steps = int(samples / size)
            words = [*split_setting(settings.get(name, ""), "fae")[0], "--num-batches", str(steps)]
            found.append(f"less{steps}={shlex.join(words)}")
    return list(dict.fromkeys(found))


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left goes to every trainer."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--processed-data-file", default=None, help="a processed .npz")
    parser.add_argument("--segregated-data-dir", default=None, help="the folder made from it")
    parser.add_argument(
        "--methods",
        nargs="+",
        type=method_of,
        default=DEFAULT_METHODS,
        metavar="METHOD",
        help=f"methods to compare, of {', '.join(METHODS)}, or {OWN_POLICY}; differences are to the"
        " first",
    )
    parser.add_argument(
        "--settings",
        nargs="+",
        type=setting,
        default=[],
        metavar="NAME=FLAGS",
        help="flags, in one word each: each method is run with each of them, or with those of its"
        " flags that it has; what is left out is said. Not given: with the defaults",
    )
    parser.add_argument("--num-seeds", type=cli.positive_int, default=3, help="seeds a method")
    parser.add_argument("--first-seed", type=cli.nonnegative_int, default=1, help="the first seed")
    parser.add_argument(
        "--points", type=cli.positive_int, default=20, help="evaluations an epoch, for curves"
    )
    parser.add_argument("--runs-dir", default="runs/compare", help="folder of this comparison")
    parser.add_argument(
        "--checkpoint-every",
        type=text_of_every,
        default=None,
        metavar="10m",
        help="of each run, in mini-batches or time: one that was interrupted goes on there, to the "
        "same bits, and the model is deleted when it is finished. It costs disk, and seconds: a "
        "comparison of times is better without. Not given: it starts again",
    )
    parser.add_argument("--csv", default=None, help="write the table here; not given: print only")
    parser.add_argument("--markdown", action="store_true", help="print a README's table, too")
    parser.add_argument(
        "--smoke", action="store_true", help="a small synthetic log and model, to see that it works"
    )
    args, flags = parser.parse_known_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    args.settings = dict(args.settings)
    has_data = args.processed_data_file is not None and args.segregated_data_dir is not None
    if len({folder_of(method) for method in args.methods}) < len(args.methods):
        parser.error("--methods: two policies of one's own have the same name; rename a file")
    taken = [flag for flag in ("--seed", "--numpy-rand-seed") if flag in by_flag(flags)]
    if args.checkpoint_every is not None:
        taken += [flag for flag in ("--load-model", "--save-model") if flag in by_flag(flags)]
    if taken:
        parser.error(f"{taken[0]} is decided by --num-seeds, --first-seed or --checkpoint-every")
    if args.smoke == has_data:
        parser.error("give --processed-data-file and --segregated-data-dir, or --smoke")
    return args, flags


def text_of_every(text: str) -> str:
    """Check a `--checkpoint-every`, for the trainers to parse."""
    cli.every(text)
    return text


def setting(text: str) -> tuple[str, str]:
    """Parse `NAME=FLAGS`."""
    name, equals, flags = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected a name and flags, as 'd60=--drop-percentage 60'"
        )
    flags_in(flags)
    return name, flags


def test_freq(processed: str, flags: list[str], num_points: int) -> int:
    """Mini-batches between evaluations; a bad flag of a trainer, or a log without held-out rows, is
    refused here.
    """
    trainer = slipstream_train.parse_args(["--segregated-data-dir", "-", *flags])
    days = open_npz(processed, ("days",))["days"]
    num_train = int(days[-2])
    if days[-1] == num_train:
        raise ValueError(f"{processed} holds nothing out: there is no AUC to compare")
    batch_size = recipe_of(trainer, num_train).mini_batch_size
    return max(1, num_train // batch_size // num_points)


def train_all(kinds: list[Kind], args: argparse.Namespace, flags: list[str]) -> dict[Run, Records]:
    """All runs' records, seed by seed: a machine's drift meets all kinds alike."""
    seeds = range(args.first_seed, args.first_seed + args.num_seeds)
    runs = [(*kind, seed) for seed in seeds for kind in kinds]
    try:
        return {run: train(run, args, flags) for run in tqdm(runs, desc="runs", disable=None)}
    except KeyboardInterrupt:
        folders = [Path(args.runs_dir) / run_name(run) for run in runs]
        kept = sum(finished_records(folder) is not None for folder in folders)
        if not args.smoke:
            where = "where its last checkpoint was" if args.checkpoint_every else "from its start"
            print(
                f"{kept} of {len(runs)} runs are finished and kept in {args.runs_dir}; the same "
                f"command goes on, the run that was interrupted {where}",
                file=sys.stderr,
            )
        raise


def report(
    logs: dict[Kind, list[Records]], args: argparse.Namespace, left_out: list[str]
) -> Records:
    """Print the tables and what belongs beside them; returns the rows."""
    of_first = next(iter(logs.values()))
    results = {
        kind: [metrics_of(log, first) for log, first in zip(runs, of_first, strict=True)]
        for kind, runs in logs.items()
    }
    rows = tabulate(results)
    print_table(rows, of_first[0][-1].get("planted_auc"))
    notes = [*left_out, *not_dropped(logs)]
    print("".join(f"{line}\n" for line in notes), end="")
    if decays(of_first[0]) and (less := training_less(rows, logs, args.settings)):
        print(
            "is dropping better than training less? rates fall at the end of each run: hold it "
            "against FAE's shorter runs, by the same command with\n"
            f"  --methods fae --settings {shlex.join(less)}\n"
            f"and python -m bench.front --runs-dir {shlex.quote(args.runs_dir)}"
        )
    if args.markdown:
        print(markdown(rows) + "".join(f"\n\n{line}" for line in notes))
    if args.csv:
        save_table(rows, args.csv)
    return rows


def main(argv: list[str] | None = None) -> Records:
    """Compare; returns the table's rows."""
    args, flags = parse_args(argv)
    with contextlib.ExitStack() as stack:
        if args.smoke:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-")))
            paths = make_small_log(folder, SMOKE_ROWS, SMOKE_BUDGET)
            args.processed_data_file, args.segregated_data_dir = map(str, paths)
            args.runs_dir, flags = str(folder / "runs"), [*MODEL_FLAGS, *flags]
        kinds, left_out = kinds_of(args)
        check_flags(kinds, args, flags)
        args.test_freq = test_freq(args.processed_data_file, flags, args.points)
        claim(kinds, args, flags)
        logs: dict[Kind, list[Records]] = {kind: [] for kind in kinds}
        for run, records in train_all(kinds, args, flags).items():
            logs[run[:2]].append(records)
        return report(logs, args, left_out)


if __name__ == "__main__":
    cli.run_script(main)
