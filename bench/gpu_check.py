"""Does the GPU compute what the CPU does? Loss curves, staging, and how fast copies are.

Trains a small synthetic log several ways on the CPU and on the GPU, from the same weights and in
the same order, and compares the losses along the way and the weights at the end; then measures what
staging and steps are held against, the bandwidth of copies and the time of a launch. Exits with
status 1 when a difference is too large.

    python -m bench.gpu_check

About a minute. With `--device cpu` it compares the CPU with itself, to try the script.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/gpu_check.py`

import fae_train  # noqa: E402
import input_segregation  # noqa: E402
import slipstream_train  # noqa: E402
from bench.throughput import hardware_name, make_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.device import choose_device  # noqa: E402
from slipstream.tools.npz import open_npz  # noqa: E402
from slipstream.tools.runtime import describe_machine, git_commit  # noqa: E402
from slipstream.training.saved import find_checkpoint  # noqa: E402

COPY_BYTES = 1 << 28
NUM_LAUNCHES = 1000
MIN_ROWS = 6000
# Small: at 0.3, a hundred steps make of another order of summation what bf16 makes of rounding.
LEARNING_RATE = "0.01"
# Largest difference from the CPU allowed: of a loss along the way, and of a weight at the end
# relative to how far training moved the weights. Noise of 1e-7 on the row gradients gives 4e-7 and
# 3e-5 on a CPU, bf16 there 4e-5 and 1e-3.
TOLERANCES = {"fp32": (1e-5, 3e-4), "tf32": (1e-3, 1e-2), "bf16": (1e-3, 3e-2)}
# The same run in several forms; the first one on the GPU is what the others must equal.
FORMS = {
    "all rows resident": ["--num-resident", "all"],
    "hot rows resident": [],
    "no row resident": ["--num-resident", "0"],
    "without overlap": ["--overlap", "false"],
    "without graph": ["--cuda-graph", "false"],
    "data on the host": ["--device-data", "false"],
}


class Bench:
    """A small log, and runs on it."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.processed = folder, folder / "log_processed.npz"
        make_log(self.processed, rows, False, 123)
        self.hot_cold = folder / "hot_cold"
        input_segregation.main(
            ["--processed-data-file", str(self.processed), "--hot-emb-gpu-mem", "500000"]
            + ["--segregated-data-dir", str(self.hot_cold), "--optimizer", "sgd"]
        )
        self.num_rows = int(open_npz(self.processed, ("counts",))["counts"].sum())
        self._num_runs = 0

    def train(self, device: str, *flags: str, script: Any = fae_train) -> dict[str, Any]:
        """One epoch; losses along the way and all weights at the end."""
        self._num_runs += 1
        name = str(self._num_runs)
        flags = tuple(str(self.num_rows) if flag == "all" else flag for flag in flags)
        script.main(
            ["--segregated-data-dir", str(self.hot_cold), "--device", device, "--print-freq", "0"]
            + ["--runs-dir", str(self.folder), "--run-name", name, "--test-freq", "10"]
            + ["--mini-batch-size", "512", "--save-model", str(self.folder / name)]
            + ["--optimizer", "sgd", "--lr-decay-share", "0"]
            # The usual precision is that of the device: a reference must not follow it.
            + ["--precision", "fp32", "--learning-rate", LEARNING_RATE, *flags]
        )
        lines = (self.folder / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        losses = [r["loss"] for r in records if r["kind"] == "evaluation"]
        saved = find_checkpoint(self.folder / name)
        assert saved is not None
        weights = [
            array.ravel()
            for key, array in saved.arrays.items()
            if key == "rows" or key.startswith("step.network.")
        ]
        return {"losses": np.array(losses), "weights": np.concatenate(weights)}


def difference(one: dict[str, Any], other: dict[str, Any], moved: float) -> dict[str, Any]:
    """Largest difference of a loss, and of a weight relative to how far training moved them."""
    weights = np.abs(one["weights"] - other["weights"])
    return {
        "loss": float(np.abs(one["losses"] - other["losses"]).max()),
        "weight": float(weights.max()) / moved,
        "same_bits": bool(np.array_equal(one["weights"], other["weights"])),
    }


def compare(bench: Bench, device: str) -> dict[str, dict[str, Any]]:
    """Every precision and form against the CPU, and deterministic forms against each other."""
    found: dict[str, dict[str, Any]] = {}
    still = bench.train("cpu", "--learning-rate", "1e-30")
    reference = bench.train("cpu")
    moved = float(np.abs(reference["weights"] - still["weights"]).max())
    precisions = ("fp32", "bf16") if device == "cpu" else ("fp32", "tf32", "bf16")
    for precision in precisions:
        got = bench.train(device, "--precision", precision)
        found[f"{precision} against the CPU"] = difference(got, reference, moved) | {
            "allowed": TOLERANCES[precision]
        }
    first = None
    for form, flags in FORMS.items():
        got = bench.train(device, "--deterministic", "true", *flags)
        first = first or got
        found[f"{form}, deterministic"] = difference(got, first, moved) | {
            "allowed": TOLERANCES["fp32"]
        }
    drop = ["--count-untouched-as-stale", "true", "--drop-percentage", "30"]
    dropped = [bench.train(where, *drop, script=slipstream_train) for where in ("cpu", device)]
    found["slipstream against the CPU"] = difference(*dropped, moved) | {
        # An input at the threshold may fall on either side of it.
        "allowed": TOLERANCES["bf16"]
    }
    return found


def copy_bandwidth(device: torch.device) -> dict[str, float]:
    """GB/s of page-locked copies to the device, from it, and on it (bytes read plus written)."""
    pin = device.type == "cuda"
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=pin)
    first, second = (torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2))

    def rate(target: torch.Tensor, source: torch.Tensor, factor: int) -> float:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            if pin:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return factor * COPY_BYTES / float(np.median(times[2:])) / 1e9

    return {
        "to_device": rate(first, host, 1),
        "from_device": rate(host, first, 1),
        "on_device": rate(second, first, 2),
    }


def launch_us(device: torch.device) -> float:
    """Microseconds that giving the device one small kernel takes Python."""
    value, times = torch.zeros(1, device=device), []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(NUM_LAUNCHES):
            value.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times)) / NUM_LAUNCHES


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="to be checked")
    parser.add_argument(
        "--rows", type=cli.positive_int, default=60_000, help="rows of the synthetic log"
    )
    parser.add_argument(
        "--output-dir", default="bench/results", help="folder of the JSON file; '': print only"
    )
    args = parser.parse_args(argv)
    if args.rows < MIN_ROWS:
        parser.error(f"--rows {args.rows}: at least {MIN_ROWS:,}, for ten mini-batches of 512")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Check; prints a table, and ends with status 1 where a difference is too large."""
    args = parse_args(argv)
    device = choose_device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Bench(Path(folder), args.rows), args.device)
    machine = describe_machine(device)
    report = {
        "commit": git_commit(),
        "machine": machine,
        "checks": found,
        "copies_gb_per_s": copy_bandwidth(device),
        "launch_us": launch_us(device),
    }
    print(f"\n{'check':<34}{'loss':>10}{'weight':>10}   (largest difference)")
    failed = []
    for name, row in found.items():
        loss, weight = row["allowed"]
        good = row["loss"] <= loss and row["weight"] <= weight  # NaN is not
        failed += [] if good else [name]
        bits = "same bits" if row["same_bits"] else ""
        print(
            f"{name:<34}{row['loss']:>10.2g}{row['weight']:>10.2g}   {bits}"
            + ("" if good else f"TOO LARGE, allowed {loss:g}, {weight:g}")
        )
    copies = (f"{way} {rate:.1f}" for way, rate in report["copies_gb_per_s"].items())
    print(f"copies, GB/s: {', '.join(copies)}; a launch takes {report['launch_us']:.1f} us")
    if args.output_dir:
        path = Path(args.output_dir) / f"gpu_check_{hardware_name(machine)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"results: {path}")
    if failed:
        print(f"differs: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
    return report


if __name__ == "__main__":
    cli.run_script(main)
