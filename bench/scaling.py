"""Training by several processes: measured here, and expected of GPUs by a log's own batches.

    python -m bench.scaling --segregated-data-dir D --out runs/scaling.csv
    python -m bench.scaling --segregated-data-dir D --model-only true --gpus 32 --nic 40

*Measured*: trainings by W = 1, 2 (`--processes`) processes on this machine, each with a W-th of the
cores, in turn, `--repetitions` times. Strong: `--mini-batch-size` inputs a step in all; weak: as
many a process. Speed-up and efficiency are over one process in the same round; communication is
what a process waits in collectives; CPU time is that of all processes, less a start's. A run that
finished is not repeated (`--runs-dir` holds one comparison).

*Expected*: of the distinct rows of the log's own batches (u, U, c) by the formulas of
`bench.scaling_model`, for any number of GPUs and bandwidths: MB received a step, memory, time of a
step, for our scheme, all rows sharded, and all rows replicated. No GPUs are needed for it, and
none has confirmed it: an estimate to plan by, not a measurement.

What is left of the command line goes to every training, and decides on the network and the rows.
Without a folder a small synthetic log is made. `--out` names a CSV of both kinds of lines; JSON and
figure stand beside it. Minutes: those of the trainings; seconds for the model alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/scaling.py`

import fae_train  # noqa: E402
import slipstream_train  # noqa: E402
from bench import scaling_runs  # noqa: E402
from bench.methods import code_of  # noqa: E402
from bench.run_records import claim_runs, save_table  # noqa: E402
from bench.scaling_figure import draw  # noqa: E402
from bench.scaling_model import (  # noqa: E402
    H100_DIM,
    H100_FIXED_MS,
    H100_INPUTS,
    H100_PARAMETERS,
    H100_STEP_MS,
    LATENCY_US,
    SCHEMES,
    Compute,
    Links,
    Sampler,
    Sizes,
    expected,
    received_bytes,
    sizes_of,
)
from bench.small_log import MODEL_FLAGS, make_small_log  # noqa: E402
from slipstream.model.networks import build_network  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.npz import fingerprint  # noqa: E402
from slipstream.tools.runlog import finite  # noqa: E402
from slipstream.tools.runtime import describe_machine, git_commit  # noqa: E402
from slipstream.training.build import features_seen, network_of  # noqa: E402
from slipstream.training.flags import Settings, settings_of  # noqa: E402
from slipstream.training.set_files import ROWS_FILE  # noqa: E402
from slipstream.training.sets import PreparedData, load_segregated  # noqa: E402

Lines = list[dict[str, Any]]
TRAINERS = {"fae": fae_train, "slipstream": slipstream_train}
RANKS = [1, 2, 4, 8, 16, 32, 64]  # of the figure
SAME_NETWORK = 0.1  # relative, of the parameters
SMALL_ROWS, SMALL_BUDGET = 20_000, 200_000  # bytes of hot rows

FLAGS = (
    cli.Flag("--segregated-data-dir", str, None, "a segregated folder; not given: a small log's"),
    cli.Flag("--method", tuple(TRAINERS), "fae", "the trainer that is run"),
    cli.Flag("--processes", cli.positive_int, [1, 2], "processes to run with", nargs="+"),
    cli.Flag("--repetitions", cli.positive_int, 3, "rounds of trainings"),
    cli.Flag(
        "--mini-batch-size",
        cli.positive_int,
        None,
        "inputs a step: in all (strong scaling), and a process (weak); not given: the trainer's",
    ),
    cli.Flag("--gpus", cli.positive_int, RANKS, "GPUs to expect something of", nargs="+"),
    cli.Flag("--gpus-per-machine", cli.positive_int, 8, "GPUs that NVLink joins"),
    cli.Flag("--nvlink", cli.positive_float, 300.0, "GB/s that a GPU receives in its machine"),
    cli.Flag(
        "--nic",
        cli.positive_float,
        50.0,
        "GB/s that a machine receives from the others, for all its GPUs: 400 Gb/s are 50",
    ),
    cli.Flag(
        "--latency-us",
        cli.nonnegative_float,
        LATENCY_US,
        "microseconds of a collective however small, an assumption",
    ),
    cli.Flag(
        "--step-ms",
        cli.positive_float,
        None,
        "milliseconds of a step with --mini-batch-size inputs on one GPU; not given: an H100's "
        f"{H100_STEP_MS} at {H100_INPUTS} of Kaggle's network, dim 16 (bench/results/overlap_"
        "nvidia_h100_*.csv, fae+adaptive+bf16)",
    ),
    cli.Flag(
        "--fixed-ms",
        cli.nonnegative_float,
        H100_FIXED_MS,
        "of it what a step with fewer inputs takes as well; the rest grows with the inputs",
    ),
    cli.Flag("--samples", cli.positive_int, 8, "joined mini-batches of each kind to look at"),
    cli.Flag("--model-only", cli.boolean, False, "no trainings, the expected lines alone"),
    cli.Flag("--runs-dir", str, "runs/scaling", "folder of this comparison"),
    cli.Flag("--out", str, None, "the CSV to write, and JSON beside it; not given: print only"),
    cli.Flag("--figure", str, None, "the PNG to write; not given: beside --out, if that is"),
)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; what is left goes to every training."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, "scaling", FLAGS)
    args, flags = parser.parse_known_args(argv)
    if args.step_ms is not None and args.fixed_ms > args.step_ms:
        parser.error(f"--fixed-ms: got {args.fixed_ms:g}; expected at most --step-ms")
    if args.step_ms is None and args.fixed_ms > H100_STEP_MS:
        parser.error(f"--fixed-ms: got {args.fixed_ms:g}; expected at most {H100_STEP_MS}")
    if args.out is not None and Path(args.out).suffix != ".csv":
        parser.error(f"--out: got {args.out}; expected a file that ends in .csv")
    return args, flags


def settings_for(args: argparse.Namespace, flags: list[str], num_train: int) -> Settings:
    """What the trainer makes of its flags; a bad one is refused here."""
    words = ["--segregated-data-dir", args.segregated_data_dir, *flags]
    if args.mini_batch_size is not None:
        words += ["--mini-batch-size", str(args.mini_batch_size)]
    return settings_of(TRAINERS[args.method].parse_args(words), num_train)


def sizes_for(settings: Settings, prepared: PreparedData) -> Sizes:
    """The sizes of the formulas; a network is made to count its parameters."""
    dim = settings.model.arch_sparse_feature_size
    spec, features = network_of(settings.model), features_seen(prepared, dim)
    network = build_network(spec, features, settings.training.seed)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    return sizes_of(prepared, dim, settings.training.optimizer, num_parameters)


def compute_of(args: argparse.Namespace, mini_batch: int, sizes: Sizes) -> Compute:
    """A step's time on one GPU; says where an H100's of another network stands for it."""
    if args.step_ms is not None:
        return Compute(args.step_ms, mini_batch, args.fixed_ms)
    if sizes.dim != H100_DIM or abs(sizes.num_parameters / H100_PARAMETERS - 1) > SAME_NETWORK:
        print(
            f"note: expected times are of a network of {H100_PARAMETERS:,} parameters and rows of "
            f"dim {H100_DIM}, not of this one: give --step-ms, as measured on a GPU"
        )
    return Compute(fixed_ms=args.fixed_ms)


def expect(
    ranks: Sequence[int],
    mini_batch: int,
    sizes: Sizes,
    sampler: Sampler,
    compute: Compute,
    links: Links,
) -> tuple[Lines, Lines]:
    """A line a scaling, number of GPUs and scheme; and what the log's batches are, with parts."""
    lines: Lines = []
    looked: Lines = []
    left_out: dict[str, list[str]] = {}
    for scaling in ("weak", "strong"):
        for number in ranks:
            part = mini_batch if scaling == "weak" else mini_batch // number
            if not part:
                continue  # more GPUs than inputs of a step
            found = sampler.measure(part, number)
            if not found.is_whole and number > 1:
                left_out.setdefault(scaling, []).append(str(number))
                continue
            lines += [
                {"kind": "expected", "scaling": scaling, **line}
                for line in expected(sizes, found, compute, links, mini_batch)
            ]
            parts = received_bytes(sizes, found)
            megabytes = {f"{name}_mb": value / 1e6 for name, value in parts.items()}
            looked.append({"scaling": scaling, **asdict(found), **megabytes})
    for scaling, numbers in left_out.items():
        print(
            f"note: no {scaling} scaling for W = {', '.join(numbers)}: the log has fewer hot or "
            "cold inputs than a mini-batch of all ranks would"
        )
    return lines, looked


def print_batches(looked: Lines, shown: Sequence[int]) -> None:
    """The distinct rows of batches, and MB received by part, of weak scaling."""
    own = [one for one in looked if one["scaling"] == "weak" and one["processes"] in shown]
    print("\ndistinct rows a batch (of hot inputs; of cold ones), with as many inputs a rank")
    print(
        f"{'W':>3}{'inputs':>8}{'hot batches':>13}{'u, hot of a part':>20}"
        f"{'U, hot of all parts':>22}{'c, cold of a part':>19}"
    )
    for one in own:
        hot, cold = one["hot"], one["cold"]
        part, joined = (f"{hot[n]:,.0f}; {cold[n]:,.0f}" for n in ("part_hot", "joined_hot"))
        print(
            f"{one['processes']:>3}{one['part']:>8,}{one['hot_share']:>13.1%}{part:>20}"
            f"{joined:>22}{cold['part_cold']:>19,.0f}"
        )
    print("\nMB received a rank and step, by the formulas")
    print(
        f"{'W':>3}{'network':>10}{'hot, owners':>13}{'(hot, pairs)':>14}{'(hot, dense)':>14}"
        f"{'cold':>8}{'all-sharded rows':>18}{'dense-replicated rows':>23}"
    )
    for one in own:
        by_owners = one["hot_gradients_mb"] + one["hot_new_rows_mb"]
        print(
            f"{one['processes']:>3}{one['network_mb']:>10.2f}{by_owners:>13.2f}"
            f"{one['hot_pairs_mb']:>14.2f}{one['hot_dense_mb']:>14.1f}{one['cold_mb']:>8.2f}"
            f"{one['all_sharded_mb']:>18.2f}{one['dense_replicated_mb']:>23,.1f}"
        )


def print_expected(lines: Lines, shown: Sequence[int]) -> None:
    """A line a scaling and number of GPUs; of each scheme its memory and its speed-up."""
    for scaling in ("weak", "strong"):
        print(
            f"\nexpected, {scaling} scaling: memory a rank in MB, communication in ms a step, "
            "speed-up (efficiency)"
        )
        print(f"{'W':>3}{'inputs':>8}{'compute ms':>12}" + "".join(f"{s:>32}" for s in SCHEMES))
        for number in shown:
            own = {
                line["scheme"]: line
                for line in lines
                if (line["scaling"], line["processes"]) == (scaling, number)
            }
            if not own:
                continue
            ours = own["ours"]
            print(
                f"{number:>3}{ours['inputs_a_rank']:>8,}{ours['compute_ms']:>12.3f}"
                + "".join(
                    f"{one['memory_mb']:>9,.1f}{one['communication_ms']:>9.3f}"
                    f"{one['speedup']:>7.2f} ({one['efficiency']:>4.0%})"
                    for one in own.values()
                )
            )


def advice(lines: Lines, gpus_per_machine: int) -> list[str]:
    """Where machines beside the first bring nothing but memory; for people."""
    rates = {
        line["processes"]: line["speedup"]
        for line in lines
        if (line["scaling"], line["scheme"]) == ("weak", "ours")
    }
    inside = [rate for number, rate in rates.items() if number <= gpus_per_machine]
    best = max(inside, default=0.0)
    slower = [n for n, rate in rates.items() if n > gpus_per_machine and rate <= best]
    if not slower:
        return []
    return [
        f"{' and '.join(map(str, slower))} GPUs over several machines are expected to train no "
        f"faster than one machine ({best:.1f}x): their memory would be the reason to take them"
    ]


def print_measured(lines: Lines) -> None:
    """A line a scaling and number of processes."""
    print("\nmeasured: medians of rounds; a step in ms; MB received a step, and by the formulas")
    print(
        "scaling   W  threads   samples/s   speed-up (lowest, highest)  efficiency      step"
        "   compute  communication  CPU time        MB   formula"
    )
    for one in lines:
        speedup = f"{one['speedup']:.2f} ({one['lowest']:.2f}, {one['highest']:.2f})"
        print(
            f"{one['scaling']:<8}{one['processes']:>3}{one['threads']:>9}"
            f"{one['samples_per_s']:>12,.0f}{speedup:>29}{one['efficiency']:>12.0%}"
            f"{one['step_ms']:>10.2f}{one['compute_ms']:>10.2f}{one['communication_ms']:>15.2f}"
            f"{one['cpu_ms']:>10.2f}{one['received_mb']:>10.2f}{one['formula_mb']:>10.2f}"
        )


def measure(
    args: argparse.Namespace, flags: list[str], mini_batch: int, sizes: Sizes, sampler: Sampler
) -> Lines:
    """Run the trainings; the lines of `scaling_runs.measured`, beside the formulas."""
    runs_dir = Path(args.runs_dir)
    compared = {"data": fingerprint(Path(args.segregated_data_dir) / ROWS_FILE), "flags": flags}
    compared |= {"method": args.method, "mini batch": mini_batch, **code_of(flags)}
    claim_runs(runs_dir, {**compared, "machine": describe_machine()}, ())
    jobs = scaling_runs.jobs_of(args.processes, args.repetitions)
    runs = scaling_runs.run_all(
        jobs, args.method, args.segregated_data_dir, mini_batch, flags, runs_dir
    )
    lines = []
    for line in scaling_runs.measured(runs, mini_batch):
        found = sampler.measure(max(line["inputs_a_rank"], 1), line["processes"])
        parts = received_bytes(sizes, found)
        about = {"kind": "measured", "scheme": "ours"}
        lines.append({**about, **scaling_runs.beside_formula(line, parts)})
    return lines


def save(out: Path, lines: Lines, about: dict[str, Any]) -> None:
    """The CSV, and all there is as JSON beside it."""
    save_table(lines, out)
    report = finite({**about, "lines": lines})
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> Lines:
    """Measure and expect; returns the CSV's lines."""
    args, flags = parse_args(argv)
    with contextlib.ExitStack() as stack:
        if args.segregated_data_dir is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scaling-")))
            hot_cold = make_small_log(folder, SMALL_ROWS, SMALL_BUDGET)[1]
            args.segregated_data_dir, args.runs_dir = str(hot_cold), str(folder / "runs")
            flags = [*MODEL_FLAGS, *flags]
        prepared = load_segregated(args.segregated_data_dir)
        settings = settings_for(args, flags, prepared.data.num_train)
        training = settings.training
        mini_batch, sizes = training.mini_batch_size, sizes_for(settings, prepared)
        sampler = Sampler(prepared, training.data_randomize, training.seed, args.samples)
        links = Links(args.nvlink, args.nic, args.gpus_per_machine, args.latency_us)
        title = (
            f"{sizes.num_rows:,} rows of dim {sizes.dim}, {sizes.num_hot:,} hot; a network of "
            f"{sizes.num_parameters:,} parameters; mini-batch {mini_batch:,}"
        )
        print(title)
        compute = compute_of(args, mini_batch, sizes)
        shown = sorted(set(args.gpus))
        ranks = sorted({*RANKS, *shown})
        lines, looked = expect(ranks, mini_batch, sizes, sampler, compute, links)
        measured = []
        if not args.model_only:
            measured = measure(args, flags, mini_batch, sizes, sampler)
            print_measured(measured)
        print_batches(looked, shown)
        print_expected(lines, shown)
        print("".join(f"{line}\n" for line in advice(lines, links.gpus_per_machine)), end="")
    if args.out:
        about = {"argv": sys.argv[1:] if argv is None else list(argv), "commit": git_commit()}
        about |= {"date": time.strftime("%Y-%m-%d"), "machine": describe_machine()}
        about |= {"sizes": asdict(sizes), "links": asdict(links), "compute": asdict(compute)}
        save(Path(args.out), [*measured, *lines], {**about, "batches": looked})
    if figure := args.figure or (args.out and Path(args.out).with_suffix(".png")):
        draw(lines, measured, links, title, Path(figure))
    return [*measured, *lines]


if __name__ == "__main__":
    cli.run_script(main)
