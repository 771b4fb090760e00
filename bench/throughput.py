"""Samples a second of our trainers beside plain PyTorch, with the loader and the phases of a step.

Each method runs in a process of its own with its own settings, and they train in turn, a block of
mini-batches each, so that the machine's drift meets all alike. The engines run their real training
loop, `--epochs` times over the log, in whole blocks; plain PyTorch (`bench.plain_dlrm`) its usual
one. The result is a table and a JSON file with the hardware in its name. A method that fails is
left out, and named at the end. Ctrl-C or SIGTERM (`timeout`) ends it with what was measured so far.

    python -m bench.throughput --model kaggle --mini-batch-size 128 512 2048 16384

A method is a name and options joined by `+`: plain, baseline, fae, slipstream; bf16, tf32, compile,
eager (no CUDA graph), serial (no overlap of
staging and training), resident (all rows on the device), hot (train hot inputs alone), budget=BYTES
(hot rows), adaptive (row-wise Adagrad and Adam; else SGD); for plain: tuned (our CPU settings),
fbgemm, hybrid, gpu. For instance `plain+hybrid`, `fae+budget=268435456+bf16`.

`consumed` counts dropped inputs as done: samples of the log a second. p10, p50 and p90 are over
blocks. The first block of each method is a warm-up. `loader` and `step` are each alone: cutting
mini-batches (ours takes the logarithm of dense features, plain has it ready), and a step on one at
hand, its copies and row updates included. Segregation is not in a rate; its time is in the file.
About 12 minutes for the four sizes on 2 cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

# Before `slipstream`, which sets how OpenMP's threads wait unless it is set. torch's library reads
# it when it loads, so plain PyTorch's processes, which import this module, must have it by then.
import torch  # noqa: F401

WAIT = "GOMP_SPINCOUNT"
WAIT_OF_USER = os.environ.get(WAIT)
REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/throughput.py`

import input_segregation  # noqa: E402
from bench.floor import measure_floor  # noqa: E402
from bench.turns import (  # noqa: E402
    END,
    check_batch,
    parse_method,
    percentiles,
    work,
)
from slipstream.logs.formats import equal_days  # noqa: E402
from slipstream.logs.processed import ClickLog, load_processed  # noqa: E402
from slipstream.logs.synthetic import KAGGLE_TABLE_SIZES, planted_clicks  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.device import choose_device  # noqa: E402
from slipstream.tools.npz import write_npz  # noqa: E402
from slipstream.tools.runtime import StopRequest, describe_machine, git_commit  # noqa: E402

MODELS = {
    "kaggle": {"dim": 16, "bot": "13-512-256-64-16", "top": "512-256-1"},
    "terabyte": {"dim": 64, "bot": "13-512-256-64", "top": "512-512-256-1"},
}
NUM_BLOCKS = 12  # at least as many in the log, for the percentiles
DEFAULT_METHODS = ["plain", "plain+tuned", "baseline", "baseline+bf16", "fae", "slipstream"]


def make_log(path: Path, num_rows: int, published_sizes: bool, seed: int) -> None:
    """Write a synthetic processed log, unless it is there.

    `published_sizes`: tables of Kaggle's size (34 M rows); else of the values that occur.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    clicks = planted_clicks(num_rows, KAGGLE_TABLE_SIZES, seed)
    ids, sizes = np.ascontiguousarray(clicks.X_cat), np.array(KAGGLE_TABLE_SIZES, np.int64)
    if not published_sizes:
        columns = [np.unique(column, return_inverse=True) for column in ids.T]
        ids = np.stack([inverse for _, inverse in columns], axis=1).astype(np.int32)
        sizes = np.array([len(values) for values, _ in columns], np.int64)
    members = {"X_int": np.ascontiguousarray(clicks.X_int), "X_cat": ids, "y": clicks.y}
    write_npz(path, {**members, "counts": sizes, "days": equal_days(num_rows)})


def hot_cold_folder(processed: Path, budget: int, dim: int) -> Path:
    """The folder that a hot-row budget gives, made where it is not there."""
    folder = processed.parent / f"{processed.stem}_dim{dim}_hot{budget}"
    input_segregation.main(
        ["--processed-data-file", str(processed), "--segregated-data-dir", str(folder)]
        + ["--hot-emb-gpu-mem", str(budget), "--arch-sparse-feature-size", str(dim)]
    )
    return folder


def ask(connection: Connection, method: str) -> dict[str, Any]:
    """Give a method its turn; raises `ValueError` with its error."""
    try:
        connection.send("go")
    except OSError:
        pass  # the answer says what became of it
    return answer(connection, method)


def answer(connection: Connection, method: str) -> dict[str, Any]:
    """What a process sends."""
    try:
        got = connection.recv()
    except (EOFError, OSError):
        raise ValueError(
            f"{method}: its process was ended from outside, perhaps for want of memory"
        ) from None
    if "error" in got:
        raise ValueError(f"{method}: {got['error']}")
    return got


def compare(methods: list[str], job: dict[str, Any], stop: StopRequest) -> dict[str, Any]:
    """All methods at one mini-batch size, block by block in turn, until `stop` is asked for.

    A method that fails is left out from there on, with its error under `failed`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=measure_floor, args=(theirs, job))
    process.start()
    theirs.close()
    results: dict[str, Any] = {"floor": answer(ours, "matrix products"), "failed": {}}
    process.join()
    connections, processes = {}, []
    for method in methods:
        connections[method], theirs = context.Pipe()
        processes.append(context.Process(target=work, args=(theirs, method, job)))
        with usual_thread_wait(method):
            processes[-1].start()
        theirs.close()

    def each(get: Callable[[Connection, str], Any], among: list[str]) -> dict[str, Any]:
        found = {}
        for method in among:
            try:
                found[method] = get(connections[method], method)
            except ValueError as error:
                print(error, file=sys.stderr)
                results["failed"][method] = str(error)
        return found

    try:
        ready = each(answer, methods)  # nobody measures while another still starts
        alone = {} if stop.signal else each(ask, list(ready))
        blocks: dict[str, list[dict[str, Any]]] = {method: [] for method in alone}
        running = list(alone)
        while running and not stop.signal:
            latest = each(ask, running)
            for method, block in latest.items():
                blocks[method].append(block)
            running = [method for method, block in latest.items() if not block["done"]]
        for method in running:
            connections[method].send(END)
        failed, least = results["failed"], 2 if stop.signal else 0  # blocks
        finished = [name for name in alone if name not in failed and len(blocks[name]) >= least]
        for method, peaks in each(ask, finished).items():
            results[method] = {**alone[method], **_totals(blocks[method]), **peaks}
    finally:
        for process in processes:
            process.kill() if sys.exc_info()[0] or stop.signal else process.join()
    return results


@contextlib.contextmanager
def usual_thread_wait(method: str) -> Iterator[None]:
    """Leave threads' wait to libgomp for a process that the body starts, if plain PyTorch's."""
    name, options, _ = parse_method(method)
    with without_our_wait(name == "plain" and "tuned" not in options):
        yield


@contextlib.contextmanager
def without_our_wait(is_usual: bool) -> Iterator[None]:
    """Leave threads' wait to libgomp for a process that the body starts, if `is_usual`.

    What the user chose stays.
    """
    ours = os.environ.pop(WAIT, None) if is_usual and WAIT_OF_USER is None else None
    try:
        yield
    finally:
        if ours is not None:
            os.environ[WAIT] = ours


def _totals(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    counted = blocks[1:]  # the first one warms up
    if not counted:
        raise ValueError("the log is one block long; take more --rows or fewer --block-samples")
    seconds = sum(block["seconds"] for block in counted)
    return {
        "num_blocks": len(counted),
        "trained_per_s": percentiles([b["trained"] / b["seconds"] for b in counted]),
        "consumed_per_s": sum(block["consumed"] for block in counted) / seconds,
    }


def print_table(batch_size: int, results: dict[str, Any], methods: list[str]) -> None:
    """One line a method; ratios are to the first that ran."""
    methods = [method for method in methods if method in results]
    print(f"\nmini-batch {batch_size}: thousand samples/s")
    print(
        f"{'method':<28}{'blocks':>7}{'p10':>8}{'p50':>8}{'p90':>8}{'consumed':>10}{'ratio':>7}{'loader':>9}"
        f"{'step':>9}{'RSS MB':>8}{'GPU MB':>8}"
    )
    first = results[methods[0]]["consumed_per_s"]
    for method in methods:
        row = results[method]
        trained = "".join(f"{row['trained_per_s'][f'p{q}'] / 1e3:>8.1f}" for q in (10, 50, 90))
        device = row["peak_device_bytes"]
        print(
            f"{method:<28}{row['num_blocks']:>7}{trained}{row['consumed_per_s'] / 1e3:>10.1f}"
            f"{row['consumed_per_s'] / first:>6.2f}x{row['loader']['p50'] / 1e3:>9.0f}"
            f"{row['step']['p50'] / 1e3:>9.1f}{row['peak_rss_bytes'] / 1e6:>8.0f}"
            + (f"{device / 1e6:>8.0f}" if device is not None else f"{'-':>8}")
        )
    for method in methods:
        if "phases_ms" in results[method]:
            phases = results[method]["phases_ms"]
            words = ", ".join(f"{phase} {value:.2f}" for phase, value in phases.items())
            print(f"  {method} ms: {words}")
        if "staged_bytes" in results[method]:
            kilobytes = results[method]["staged_bytes"] / 1e3
            rate = kilobytes / max(results[method]["phases_ms"]["staging"], 1e-9) / 1e3
            print(f"  {method} stages {kilobytes:,.0f} kB a cold batch, {rate:.2f} GB/s")
    for precision, floor in results["floor"].items():
        flops = floor["flops"] / floor["products_ms"] / 1e6
        print(
            f"  matrix products {precision}: {floor['products_ms']:.2f} ms, {flops:,.0f} GFLOP/s; "
            f"2048 x 2048 x 2048: {floor['peak_gflops']:,.0f} GFLOP/s"
        )


def hardware_name(machine: dict[str, Any]) -> str:
    """The machine as a part of a file name."""
    words = machine.get("gpu") or f"{machine['cpu']} {machine['cpu_cores']}core"
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


FLAGS = (
    cli.Flag("--model", tuple(MODELS), "kaggle", "dimensions and MLPs"),
    cli.Flag(
        "--mini-batch-size",
        cli.positive_int,
        [128, 512, 2048, 16384],
        "inputs a mini-batch",
        nargs="+",
    ),
    cli.Flag("--methods", str, DEFAULT_METHODS, "see above; ratios are to the first", nargs="+"),
    cli.Flag(
        "--processed-data-file",
        str,
        None,
        "a processed .npz; not given: a synthetic log of --rows",
    ),
    cli.Flag("--rows", cli.positive_int, 1_000_000, "rows of the synthetic log"),
    cli.Flag(
        "--published-sizes",
        cli.boolean,
        False,
        "synthetic log with tables of Kaggle's size, 34 M rows; false: the values that occur",
    ),
    cli.Flag(
        "--hot-emb-gpu-mem",
        cli.byte_size,
        4194304,
        "memory for hot rows, in bytes or as 4M, where a method names no budget",
    ),
    cli.Flag("--drop-percentage", cli.percent, 30, "D of slipstream, in percent"),
    cli.Flag("--block-samples", cli.positive_int, 65536, "inputs a block, about"),
    cli.Flag("--device", ("auto", "cpu", "cuda"), "auto", "of our trainers"),
    cli.Flag("--epochs", cli.positive_int, 1, "how often the log is consumed"),
    cli.Flag("--num-threads", cli.nonnegative_int, 0, "CPU threads; 0: PyTorch's"),
    cli.Flag("--num-workers", cli.nonnegative_int, 0, "of plain's DataLoader"),
    cli.Flag("--learning-rate", cli.positive_float, 0.1, "of every method"),
    cli.Flag(
        "--seconds-alone",
        cli.positive_float,
        1.0,
        "seconds for which a loader and a step are measured alone; ten times a matrix product's",
    ),
    cli.Flag("--work-dir", str, "input/bench", "where the synthetic log and its folders are made"),
    cli.Flag("--output-dir", str, "bench/results", "folder of the JSON file; '': print only"),
    cli.SEED,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, "measurement", FLAGS)
    args = parser.parse_args(argv)
    for method in args.methods:
        try:
            parse_method(method)
        except (ValueError, argparse.ArgumentTypeError) as error:
            parser.error(str(error))
    args.methods = list(dict.fromkeys(args.methods))
    return args


def job_of(
    args: argparse.Namespace,
    batch_size: int,
    log: ClickLog,
    num_train: int,
    folders: dict[str, str],
) -> dict[str, Any]:
    """What the processes of a mini-batch size are told, but for the model and where it runs."""
    return {
        "folders": folders,
        "budget": args.hot_emb_gpu_mem,
        "batch_size": batch_size,
        "num_features": len(log.table_sizes),
        "block_steps": max(min(args.block_samples, num_train // NUM_BLOCKS) // batch_size, 1),
        "num_epochs": args.epochs,
        "num_threads": args.num_threads,
        "num_workers": args.num_workers,
        "learning_rate": args.learning_rate,
        "drop_percentage": args.drop_percentage,
        "seconds_alone": args.seconds_alone,
        "seed": args.seed,
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Measure; returns what the JSON file holds."""
    args = parse_args(argv)
    device = choose_device(args.device)
    processed = args.processed_data_file
    kind = "published" if args.published_sizes else "occurring"
    if processed is None:
        name = f"synthetic_{args.rows}_{kind}_seed{args.seed}_processed.npz"
        processed = Path(args.work_dir) / name
        make_log(processed, args.rows, args.published_sizes, args.seed)
    shape = MODELS[args.model]
    log = load_processed(processed)
    num_train = len(log.splits()[0])
    for batch_size in args.mini_batch_size:
        check_batch(num_train, batch_size)
    folders = {}
    for name, _, budget in map(parse_method, args.methods):
        if name in ("fae", "slipstream"):
            budget = budget or args.hot_emb_gpu_mem
            folders[str(budget)] = str(hot_cold_folder(Path(processed), budget, shape["dim"]))
    machine = describe_machine(device)
    report: dict[str, Any] = {
        "argv": sys.argv[1:] if argv is None else list(argv),
        "commit": git_commit(),
        "machine": machine,
        "model": args.model,
        "methods": args.methods,
        "sizes": {},
    }
    for batch_size in args.mini_batch_size:
        job = job_of(args, batch_size, log, num_train, folders)
        job |= {**shape, "processed": str(processed), "device": device.type}
        with StopRequest(speaks=False) as stop:
            results = compare(args.methods, job, stop)
        report["sizes"][str(batch_size)] = results
        if len(results) > 2:  # a method ran
            print_table(batch_size, results, args.methods)
        if args.output_dir:  # after each size: a failure loses no other
            path = Path(args.output_dir)
            path.mkdir(parents=True, exist_ok=True)
            tables = "_published_sizes" if args.published_sizes else ""
            path = path / f"throughput_{args.model}{tables}_{hardware_name(machine)}.json"
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
            print(f"results: {path}")
        if stop.signal:
            print(f"stopped by {signal.Signals(stop.signal).name} at mini-batch {batch_size}")
            sys.exit(128 + stop.signal)
    failed = [name for results in report["sizes"].values() for name in results["failed"]]
    if failed:
        raise ValueError(f"these methods failed, see above: {', '.join(dict.fromkeys(failed))}")
    return report


if __name__ == "__main__":
    cli.run_script(main)
