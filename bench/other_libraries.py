"""Our trainer beside what people train such models with: samples a second and AUC on a CPU.

    python -m pip install deepctr-torch torch-rechub requests
    python -m bench.other_libraries --mini-batch-size 1024 4096

Methods: `ours`, the baseline with `--model dcnv2` and `dlrm`, in fp32 and, where the CPU has it,
bf16; `plain`, DLRM in plain PyTorch (`bench.plain_dlrm`: SGD, fp32); `deepctr`, DeepCTR-Torch's
DCN; `rechub`, torch-rechub's. All have tables of dimension 16 and MLPs like ours; the libraries'
DCN is their default, whose cross layers are vectors: fewer products than our low-rank dcnv2's. The
table shows how many weights each has outside its tables.

Each library is used as its documentation does, with its own loader, trainer, Adam at 1e-3 and
regularization, but without the metrics of each mini-batch in DeepCTR-Torch, which would cost it
time. Both step all rows of all tables in each mini-batch, so larger tables make them slower.
DeepCTR-Torch asks PyPI for its newest version when it is imported; it works without an answer.

Each method trains one epoch in a process of its own, one after the other, in `--rounds` turns;
rates are medians over these, of all steps after the first 10. Test AUC is that after the epoch, by
each method's usual settings at that mini-batch. Plain PyTorch and the libraries run with PyTorch's
usual settings of the CPU. The result is a table, and a CSV and a JSON file with the hardware in
their names.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/other_libraries.py`

from bench.library_runs import Data, work  # noqa: E402
from bench.run_records import save_table  # noqa: E402
from bench.throughput import answer, hardware_name, make_log, without_our_wait  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.device import has_bf16  # noqa: E402
from slipstream.tools.optional import need  # noqa: E402
from slipstream.tools.runtime import describe_machine, git_commit  # noqa: E402

CPU = torch.device("cpu")
ROWS = 200_000  # of the synthetic log
METHODS = ("ours", "plain", "deepctr", "rechub")
# DeepCTR-Torch reads `requests` without asking for it.
MODULES = {"deepctr": ("deepctr_torch", "requests"), "rechub": ("torch_rechub",)}

Run = Callable[[str, dict[str, Any]], dict[str, Any]]

FLAGS = (
    cli.Flag(
        "--methods", METHODS, list(METHODS), "what trains; ratios are to the first", nargs="+"
    ),
    cli.Flag("--mini-batch-size", cli.positive_int, [1024, 4096], "inputs a mini-batch", nargs="+"),
    cli.Flag(
        "--processed-data-file", str, None, "a processed .npz; not given: a synthetic log of --rows"
    ),
    cli.Flag(
        "--rows",
        cli.positive_int,
        None,
        f"rows of the synthetic log, {ROWS:,} if not given; of a file: its newest training inputs, "
        "all if not given",
    ),
    cli.Flag("--rounds", cli.positive_int, 3, "turns of all methods"),
    cli.Flag(
        "--seconds",
        cli.nonnegative_float,
        0.0,
        "end a run after so many seconds of training, then without AUC; 0: after the epoch",
    ),
    cli.Flag("--num-threads", cli.nonnegative_int, 0, "CPU threads; 0: PyTorch's"),
    cli.Flag("--work-dir", str, "input/bench", "where the synthetic log is made"),
    cli.Flag("--output-dir", str, "bench/results", "folder of CSV and JSON; '': print only"),
    cli.SEED,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, "measurement", FLAGS)
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    args.mini_batch_size = list(dict.fromkeys(args.mini_batch_size))
    for method in args.methods:
        need(f"--methods {method}", *MODULES.get(method, ()))
    return args


def runs_of(methods: list[str], with_bf16: bool) -> list[str]:
    """The runs of a round: `ours` is one for each network and precision."""
    precisions = ("fp32", "bf16") if with_bf16 else ("fp32",)
    ours = [
        f"ours {network} {precision}" for network in ("dcnv2", "dlrm") for precision in precisions
    ]
    return [run for method in methods for run in (ours if method == "ours" else [method])]


def run_apart(method: str, job: dict[str, Any]) -> dict[str, Any]:
    """A run in a process of its own; raises `ValueError` with what it failed of."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, method, job))
    with without_our_wait(not method.startswith("ours")):
        process.start()
    theirs.close()
    try:
        return answer(ours, method)
    finally:
        process.kill() if sys.exc_info()[0] else process.join()


def in_turn(
    methods: list[str], job: dict[str, Any], rounds: int, run: Run = run_apart
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """All methods at one mini-batch size: runs by method, and errors of those that failed."""
    results: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    for number in range(1, rounds + 1):
        for method in methods:
            if method in failed:
                continue
            try:
                found = run(method, job)
            except ValueError as error:
                print(error, file=sys.stderr)
                failed[method] = str(error)
                continue
            results.setdefault(method, []).append(found)
            rate = found["samples_per_s"] / 1e3
            print(
                f"mini-batch {job['batch_size']}, round {number}: {method} {rate:.1f}", flush=True
            )
    return {name: runs for name, runs in results.items() if name not in failed}, failed


def rows_of(batch_size: int, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The table, a row a method; `ratio` is to the first."""
    rows: list[dict[str, Any]] = []
    for method, runs in results.items():
        rates = [run["samples_per_s"] for run in runs]
        middle = statistics.median(rates)
        aucs = [run["auc"] for run in runs if run["auc"] is not None]
        rows.append(
            {
                "mini_batch_size": batch_size,
                "method": method,
                "version": runs[0]["version"],
                "weights_outside_tables": runs[0]["weights"],
                "rounds": len(runs),
                "samples_per_s": middle,
                "lowest": min(rates),
                "highest": max(rates),
                "ratio": middle / (rows[0]["samples_per_s"] if rows else middle),
                "auc": statistics.median(aucs) if aucs else None,
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            }
        )
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line a method of one mini-batch size."""
    print(f"\nmini-batch {rows[0]['mini_batch_size']}: thousand samples/s")
    print(
        f"{'method':<18}{'version':<22}{'weights':>9}{'median':>8}{'lowest':>8}{'highest':>8}"
        f"{'ratio':>7}{'AUC':>8}{'RSS MB':>8}"
    )
    for row in rows:
        rates = "".join(f"{row[of] / 1e3:>8.1f}" for of in ("samples_per_s", "lowest", "highest"))
        auc = "-" if row["auc"] is None else f"{row['auc']:.4f}"
        print(
            f"{row['method']:<18}{row['version']:<22}{row['weights_outside_tables'] / 1e3:>8.0f}k"
            f"{rates}{row['ratio']:>6.2f}x{auc:>8}{row['peak_rss_bytes'] / 1e6:>8.0f}"
        )
    print()


def save(report: dict[str, Any], rows: list[dict[str, Any]], folder: str) -> None:
    """Write CSV and JSON, named by the hardware."""
    stem = Path(folder) / f"other_libraries_{hardware_name(report['machine'])}"
    save_table(rows, stem.with_suffix(".csv"))
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"results: {stem.with_suffix('.json')}")


def main(argv: list[str] | None = None, run: Run = run_apart) -> dict[str, Any]:
    """Measure; returns what the JSON file holds. `run` is what trains one method."""
    args = parse_args(argv)
    processed, most = args.processed_data_file, args.rows or 0
    if processed is None:
        num_rows, most = args.rows or ROWS, 0
        processed = (
            Path(args.work_dir) / f"synthetic_{num_rows}_occurring_seed{args.seed}_processed.npz"
        )
        make_log(processed, num_rows, False, args.seed)
    log = load_processed(processed)
    for batch_size in args.mini_batch_size:
        num_train = len(Data(log, batch_size, most).train)  # before an hour is spent
    if args.output_dir:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "argv": sys.argv[1:] if argv is None else list(argv),
        "commit": git_commit(),
        "machine": describe_machine(CPU),
        "num_train": num_train,
        "table_rows": int(log.table_sizes.sum()),
        "sizes": {},
    }
    job: dict[str, Any] = {"processed": str(processed), "most": most, "seconds": args.seconds}
    job |= {"num_threads": args.num_threads, "seed": args.seed}
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    for batch_size in args.mini_batch_size:
        names = runs_of(args.methods, has_bf16(CPU))
        results, failed = in_turn(names, {**job, "batch_size": batch_size}, args.rounds, run)
        report["sizes"][str(batch_size)] = {"runs": results, "failed": failed}
        failures |= failed
        if results:
            latest = rows_of(batch_size, results)
            print_table(latest)
            rows += latest
        if rows and args.output_dir:  # after each size: a failure loses no other
            save(report, rows, args.output_dir)
    if failures:
        raise ValueError(f"these methods failed, see above: {', '.join(failures)}")
    return report


if __name__ == "__main__":
    cli.run_script(main)
