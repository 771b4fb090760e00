"""What crashes and damaged files do to a run: kills it at random, and spoils its files.

    python -m bench.faults

**Kills**: each trainer is killed (SIGKILL) after random times and started again with the same
command, `--load-model auto`, until it ends; its weights, and those of its best validation, must be
those of a run that nobody disturbed, byte for byte. So are runs of two ranks, of which either is
killed, or their launcher (`bench.fault_ranks`). **Damage**: one random byte of a checkpoint or
a data file is changed, or the file cut short; the script must refuse it in one line with exit
status 2, or end with the same bytes as ever. **Forgeries**: the same of one field or array that is
changed to nonsense, with checksums that are right (`bench.forger`). **Scenes**: those of the
modules in `SCENES`, each a function of a job and a generator that returns what was wrong, or None.
Prints tables and writes one JSON file with the hardware in its name; status 1 where anything else
happened. 11 minutes on 2 cores; `--quick` is a short form.

Runs are forks of a process that has imported PyTorch, so most of a run's time is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/faults.py`

from bench.fault_ranks import kill_ranks  # noqa: E402
from bench.forgeries import run_forgeries  # noqa: E402
from bench.small_log import MODEL_FLAGS, ROW_FLAGS, make_small_log  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.runtime import describe_machine, git_commit, write_json  # noqa: E402

SCENES = (
    "bench.fault_scenes",
    "bench.fault_links",
    "bench.fault_runs",
    "bench.fault_models",
    "bench.fault_ranks",
)
TRAINERS = {
    "baseline": "dlrm_s_pytorch",
    "FAE": "fae_train",
    "Slipstream": "slipstream_train",
}
FLAGS = [*MODEL_FLAGS, *"--num-threads 1 --val-freq 40 --print-freq 0 --nepochs 2".split()]
DROP_FLAGS = "--alpha 0.5 --snapshot-window 0.2 --recalibrate-every 0.2".split()
NUM_ROWS, BUDGET = 14_000, 60_000  # bytes of hot rows
EDGE_BYTES = 1024  # headers and directories: half of the damage goes there
MAX_SECONDS = 60  # of a run, before it counts as one that hangs


class Job:
    """One script on the data in `folder`, and what it writes."""

    def __init__(self, folder: Path, what: str) -> None:
        self.folder, self.what = folder, what
        processed, hot_cold = folder / "train_processed.npz", folder / "hot_cold"
        self.script = TRAINERS.get(what, "input_segregation")
        if what == "segregation":
            self.inputs = [processed]
            self.output = folder / "segregated"
            flags = ["--processed-data-file", processed, "--segregated-data-dir", self.output]
            flags += ["--hot-emb-gpu-mem", BUDGET, *ROW_FLAGS]
        else:
            self.inputs = [processed] if what == "baseline" else sorted(hot_cold.iterdir())
            self.output = folder / f"model-{what}"
            flags = ["--processed-data-file", processed]
            if what != "baseline":
                flags = ["--segregated-data-dir", hot_cold]
            flags += [*FLAGS, *(DROP_FLAGS if what == "Slipstream" else [])]
            flags += ["--runs-dir", folder / "runs", "--save-model", self.output]
            flags += ["--checkpoint-every", "7", "--load-model", "auto"]
        self.argv = [str(flag) for flag in flags]

    def start(self, *more: str) -> tuple[int, Path]:
        """Run in a forked process: its number, and the file of what it says."""
        said = self.folder / "said.txt"
        process = os.fork()
        if process:
            return process, said
        status = 70  # of a traceback
        try:
            with open(said, "w", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.argv = [self.script + ".py"]
            main = importlib.import_module(self.script).main
            cli.run_script(lambda: main([*self.argv, *more]))
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def run(self, *more: str) -> tuple[int, str]:
        """Run to the end: exit status, and what it said."""
        process, said = self.start(*more)
        status = wait(process, MAX_SECONDS)
        return status, said.read_text(encoding="utf-8", errors="replace")

    def result(self) -> dict[str, bytes]:
        """The bytes that must not depend on what happened on the way."""
        if self.what == "segregation":
            names = sorted(path for path in self.output.glob("*.npz"))
        else:
            names = [sorted(self.output.glob("step-*"))[-1] / "state.npz"]
            names.append(self.output / "best" / "state.npz")
        return {str(path): path.read_bytes() for path in names if path.exists()}

    def clear(self) -> None:
        """Delete what was written."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.folder / "runs", ignore_errors=True)


def wait(process: int, seconds: float) -> int:
    """Exit status of a process (negative: the signal that ended it); killed after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_often(job: Job, num_kills: int, rng: np.random.Generator, bar: tqdm) -> dict[str, Any]:
    """Kill and start again until so many kills are made; counts, and what was wrong."""
    start = time.monotonic()
    status, said = job.run()
    if status:
        raise ValueError(f"{job.what} fails undisturbed: {said.strip()}")
    whole_run, expected = time.monotonic() - start, job.result()
    job.clear()
    counts: Counter[str] = Counter()
    faults = []
    while counts["kills"] < num_kills:
        process, said_file = job.start()
        status = wait(process, float(rng.uniform(0, whole_run)))
        said = said_file.read_text(encoding="utf-8", errors="replace")
        counts["resumed"] += "going on with" in said
        if status == -signal.SIGKILL:
            counts["kills"] += 1
            counts["in a checkpoint"] += any(job.output.glob("*.partial"))
            bar.update()
        elif status:
            faults.append(f"{job.what}: status {status}: {said[-300:]}")
            job.clear()
        if status == 0 or counts["kills"] == num_kills:
            if status:
                status, said = job.run()
                counts["resumed"] += "going on with" in said
            counts["runs compared"] += 1
            if status or job.result() != expected:
                faults.append(f"{job.what}: status {status}, other weights: {said[-300:]}")
            job.clear()
    return {**counts, "seconds": whole_run, "faults": faults}


def spoil(path: Path, rng: np.random.Generator) -> str:
    """Change one byte of a file, or cut it; what was done."""
    content = bytearray(path.read_bytes())
    place = int(rng.integers(len(content)))
    if rng.random() < 0.5:  # at an edge
        place = min(int(rng.integers(EDGE_BYTES)), len(content) - 1)
        place = place if rng.random() < 0.5 else len(content) - 1 - place
    if rng.random() < 0.1:
        path.write_bytes(content[:place])
        return f"{path.name} cut at {place}"
    content[place] ^= int(rng.integers(1, 256))
    path.write_bytes(content)
    return f"{path.name}, byte {place} of {len(content)}"


def damage(job: Job, num_flips: int, rng: np.random.Generator, bar: tqdm) -> dict[str, Any]:
    """Spoil one file at a time and run; counts, and what was wrong."""
    job.clear()
    job.run()
    expected = job.result()
    job.clear()
    files = job.inputs
    if job.what != "segregation":
        # Half a run: two checkpoints to go on from, and the best one, which nobody reads.
        job.run("--num-batches", "50")
        *older, newest = sorted(job.output.glob("step-*"))
        files = [*files, *sorted(newest.iterdir()) * 3, *sorted(older[0].iterdir())]
    halfway = job.folder / "halfway"
    shutil.rmtree(halfway, ignore_errors=True)
    if job.output.exists():
        shutil.copytree(job.output, halfway)
    counts: Counter[str] = Counter()
    faults = []
    for _ in range(num_flips):
        job.clear()
        if halfway.exists():
            shutil.copytree(halfway, job.output)
        path = files[int(rng.integers(len(files)))]
        content, times = path.read_bytes(), path.stat()
        what = spoil(path, rng)
        status, said = job.run()
        lines = [line for line in said.splitlines() if ": error: " in line]
        if status == 2 and len(lines) == 1 and "Traceback" not in said:
            counts["refused"] += 1
        elif status == 0 and job.result() == expected:
            counts["left out" if "it is left out" in said else "harmless"] += 1
        else:
            faults.append(f"{job.what}, {what}: status {status}: {said[-400:]}")
        if path in job.inputs:
            path.write_bytes(content)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        bar.update()
    return {"damaged": num_flips, **counts, "faults": faults}


def run_scenes(folder: Path, times: int, rng: np.random.Generator) -> dict[str, dict[str, Any]]:
    """Run each scene of `SCENES` so many times; by name how often, and what was wrong."""
    found: dict[str, dict[str, Any]] = {}
    for module in SCENES if times else ():
        for name, scene in importlib.import_module(module).SCENES.items():
            said = [scene(Job(folder, "Slipstream"), rng) for _ in range(times)]
            found[name] = {"run": times, "faults": [text for text in said if text is not None]}
    return found


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--kills", type=cli.positive_int, default=60, help="of all trainers together"
    )
    parser.add_argument(
        "--rank-kills",
        type=cli.nonnegative_int,
        default=20,
        help="of either of two ranks, or their launcher, about 6 s each",
    )
    parser.add_argument(
        "--damages", type=cli.positive_int, default=300, help="spoiled files, of all scripts"
    )
    parser.add_argument(
        "--forgeries",
        type=cli.nonnegative_int,
        default=500,
        help="fields changed to nonsense, with checksums that are right; 5000 take half an hour",
    )
    parser.add_argument(
        "--scenes", type=cli.nonnegative_int, default=1, help="times each scene of SCENES is run"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="3 kills, 4 spoiled files, 3 forgeries; no ranks, no scene",
    )
    parser.add_argument(
        "--work-dir", default=None, help="folder for the data; not given: a temporary one"
    )
    parser.add_argument(
        "--output-dir", default="bench/results", help="folder of the JSON file; '': none"
    )
    cli.add_flag(parser, cli.SEED)
    args = parser.parse_args(argv)
    if args.quick:
        args.kills, args.damages, args.forgeries, args.scenes = 3, 4, 3, 0
        args.rank_kills = 0
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Kill, spoil, compare; returns the counts."""
    args = parse_args(argv)
    rng = np.random.default_rng(args.seed)
    with contextlib.ExitStack() as stack:
        if args.work_dir:
            folder = Path(args.work_dir).absolute()
            folder.mkdir(parents=True, exist_ok=True)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        make_small_log(folder, NUM_ROWS, BUDGET)
        # Forks must find PyTorch without threads: it is imported here, and never used.
        # What a run would load on the way, too.
        late = ("torch._dynamo", "sklearn.metrics", "polars")
        for name in (*TRAINERS.values(), "input_segregation", "data_utils", "predict", *late):
            importlib.import_module(name)
        found: dict[str, Any] = {"kills": {}, "damage": {}}
        with tqdm(total=args.kills, desc="kills", disable=None) as bar:
            for number, what in enumerate(TRAINERS):
                if share := args.kills // 3 + (number < args.kills % 3):
                    found["kills"][what] = kill_often(Job(folder, what), share, rng, bar)
        with tqdm(total=args.rank_kills, desc="kills of ranks", disable=None) as bar:
            if args.rank_kills:
                job = Job(folder, "Slipstream")
                found["kills"]["2 ranks"] = kill_ranks(job, args.rank_kills, rng, bar)
        jobs = [*TRAINERS, "segregation"]
        with tqdm(total=args.damages, desc="damages", disable=None) as bar:
            for number, what in enumerate(jobs):
                if share := args.damages // 4 + (number < args.damages % 4):
                    found["damage"][what] = damage(Job(folder, what), share, rng, bar)
        found["forgeries"] = {}
        if args.forgeries:
            found["forgeries"] = run_forgeries(folder / "forged", Job, args.forgeries, rng)
        found["scenes"] = run_scenes(folder, args.scenes, rng)
    report(found)
    if args.output_dir:
        from bench.throughput import hardware_name

        machine = describe_machine()
        path = Path(args.output_dir) / f"faults_{hardware_name(machine)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**found, "machine": machine, "commit": git_commit(), "seed": args.seed})
        print(f"wrote {path}")
    return found


def report(found: dict[str, Any]) -> None:
    """Print the two tables, and every fault."""
    for title, columns in (
        ("kills", ("kills", "in a checkpoint", "resumed", "runs compared")),
        ("damage", ("damaged", "refused", "left out", "harmless")),
        ("forgeries", ("possible", "forged", "refused", "harmless")),
        ("scenes", ("run",)),
    ):
        if not found[title]:
            continue
        print(f"{title:<32}" + "".join(f"{name:>17}" for name in columns) + "           faults")
        for what, counts in found[title].items():
            numbers = "".join(f"{counts.get(name, 0):>17}" for name in columns)
            print(f"{what:<32}{numbers}{len(counts['faults']):>17}")
    for part in found.values():
        for what, counts in part.items():
            for fault in counts["faults"]:
                print(f"FAULT {what}: {fault}")


def run() -> None:
    """Exit status 1 where a fault was found."""
    found = main()
    if any(counts["faults"] for part in found.values() for counts in part.values()):
        sys.exit(1)


if __name__ == "__main__":
    cli.run_script(run)
