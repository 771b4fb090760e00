"""A log day by day: each day is scored by yesterday's model, and then trained on.

    python -m bench.days --logs input/mine/day_*.csv --data-set custom --columns columns.json

Of each day's log a processed file is made that extends the one before (`data_utils.py --extend`).
The model is tested on it as it is, all rows of the day (progressive validation), and goes on with
it. Beside its AUC, with --compare, those of the first day's model as it is, and of one that is
trained anew on all days before; which of the three to use is what this tells, at a cost that grows
with the square of the number of days.

Every stage is one of the scripts, whose own state tells what is done: the same command goes on
after an interruption. Results go to <work-dir>/days.json; the newest model is <work-dir>/going/...,
for `predict.py`. Flags that are not of this script are the trainer's.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/days.py`

from slipstream.logs.containers import TEXT, kind_of_file  # noqa: E402
from slipstream.logs.sources import DATA_SETS  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.metrics import click_metrics  # noqa: E402
from slipstream.tools.npz import fingerprint  # noqa: E402
from slipstream.tools.runtime import read_json, write_json  # noqa: E402

SCRIPTS = {
    "baseline": "dlrm_s_pytorch.py",
    "fae": "fae_train.py",
    "slipstream": "slipstream_train.py",
}
GOING, STILL, ANEW = "going on", "as it is", "anew"


class Days:
    """The days of a log, and where their files are."""

    def __init__(self, args: argparse.Namespace, trainer_flags: list[str]) -> None:
        self.args, self.trainer_flags = args, trainer_flags
        self.logs = [Path(log).absolute() for log in args.logs]
        self.folder = Path(args.work_dir).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.script = SCRIPTS[args.method]
        days = len(self.logs)
        self.num_trainings = days - args.no_last + (days - 1 if args.compare else 0)
        self.num_begun = 0

    def call(self, script: str, *flags: Any) -> None:
        """Run a script of ours, in this process."""
        main = importlib.import_module(script.removesuffix(".py")).main
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            silence = contextlib.redirect_stdout(nowhere)
            with contextlib.nullcontext() if self.args.verbose else silence:
                main([str(flag) for flag in flags])

    def preprocess(self, log: Path, target: Path, extends: Path | None) -> Path:
        """The processed file of a log, all rows for training."""
        args = self.args
        flags = ["--data-set", args.data_set, "--raw-data-file", log, "--split", "none"]
        flags += ["--processed-data-file", target, "--min-count", args.min_count]
        flags += ["--columns", args.columns] if args.columns else []
        flags += ["--extend", extends] if extends is not None else []
        self.call("data_utils.py", *flags)
        return target

    def train(self, processed: Path, model: Path, before: Path | None, what: str) -> Path:
        """A model of a processed file, which goes on from the one before; `what`: said of it.

        `ValueError`: one is there that was made of other data or with other flags.
        """
        self.num_begun += 1
        is_done = (model / "done.json").exists()
        said = f"training {self.num_begun} of {self.num_trainings}: {what}"
        print(said + (", done before" if is_done else ""), flush=True)
        done = {"data": fingerprint(processed), "method": self.args.method}
        done |= {"flags": " ".join(self.trainer_flags), "from": str(before)}
        if is_done:
            if read_json(model / "done.json") != done:
                raise ValueError(f"{model} is of other logs or flags; choose another --work-dir")
            return model
        flags = ["--processed-data-file", processed, "--save-model", model, "--keep", 1]
        flags += ["--runs-dir", self.folder / "runs", *self.trainer_flags]
        # What an interrupted run left is gone on with; else yesterday's model is.
        is_begun = any(model.glob("step-*/checkpoint.json"))
        if is_begun or before is None:
            flags += ["--load-model", "auto"]
        else:
            flags += ["--load-model", before]
        self.call(self.script, *flags)
        write_json(model / "done.json", done)
        return model

    def test(self, model: Path, data: Path, day: Path) -> dict[str, float]:
        """Metrics of a model on all rows of a day's processed file."""
        scores = self.folder / "scores.csv"
        flags = ["--inference-only", "--load-model", model, "--processed-data-file", data]
        flags += ["--test-data-file", day, "--save-predictions", scores]
        flags += ["--runs-dir", self.folder / "runs"]
        self.call("dlrm_s_pytorch.py", *flags)
        with open(scores, encoding="utf-8", newline="") as file:
            rows = [(float(row["probability"]), int(row["label"])) for row in csv.DictReader(file)]
        scores.unlink()
        found = np.array(rows)
        logits = np.log(found[:, 0]) - np.log1p(-found[:, 0])
        return {"rows": len(rows), **click_metrics(logits, found[:, 1])}

    def all_before(self, day: int) -> Path:
        """One log of all days before one: a folder of links, or one file."""
        target = self.folder / "anew" / f"until_{day}{self.logs[0].suffix}"
        if self.args.data_set == "custom":
            target = target.with_suffix("")
            target.mkdir(parents=True, exist_ok=True)
            for number, log in enumerate(self.logs[:day]):
                link = target / f"{number:05}-{log.name}"
                link.unlink(missing_ok=True)
                link.symlink_to(log)
            return target
        target.parent.mkdir(exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with open(partial, "wb") as file:
            for number, log in enumerate(self.logs[:day]):
                if kind_of_file(log) != TEXT:
                    raise ValueError(f"--compare joins plain logs; {log} is {kind_of_file(log)}")
                with open(log, "rb") as source:
                    if number and self.args.data_set == "avazu":
                        source.readline()  # the header
                    shutil.copyfileobj(source, file)
                    source.seek(-1, os.SEEK_END)
                    file.write(b"" if source.read() == b"\n" else b"\n")
        partial.replace(target)
        return target

    def run(self) -> list[dict[str, Any]]:
        """All days; what each one's tests said."""
        found: list[dict[str, Any]] = []
        processed = self.preprocess(self.logs[0], self.folder / "day_0.npz", None)
        first = model = self.train(
            processed, self.folder / "going" / "day_0", None, f"{GOING}, {self.logs[0].name}"
        )
        first_data = processed
        for day, log in enumerate(self.logs[1:], 1):
            today = self.preprocess(log, self.folder / f"day_{day}.npz", processed)
            tested = {GOING: self.test(model, processed, today)}
            if self.args.compare:
                tested[STILL] = self.test(first, first_data, today)
                tested[ANEW] = self.anew(day, log)
            found.append({"day": day, "log": str(log), "tested": tested})
            write_json(self.folder / "days.json", {"days": found})  # type: ignore[arg-type]
            said = ", ".join(f"{name} {one['auc']:.4f}" for name, one in tested.items())
            print(f"{log.name} ({tested[GOING]['rows']:,} rows): test AUC {said}", flush=True)
            if day < len(self.logs) - 1 or not self.args.no_last:
                target = self.folder / "going" / f"day_{day}"
                model = self.train(today, target, model, f"{GOING}, {log.name}")
            processed = today
        print(f"model: {model}\nresults: {self.folder / 'days.json'}")
        return found

    def anew(self, day: int, log: Path) -> dict[str, float]:
        """The test of a model that is trained on all days before one, from new weights."""
        folder = self.folder / "anew"
        target = folder / f"until_{day}.npz"
        raw = self.all_before(day)
        self.preprocess(raw, target, None)
        if raw.is_file():
            raw.unlink()  # the next run, too, finds its processed file
        days = f"{day} days" if day > 1 else "1 day"
        model = self.train(target, folder / f"model_{day}", None, f"{ANEW}, {days}")
        today = self.preprocess(log, folder / f"day_{day}.npz", target)
        return self.test(model, target, today)


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the command line; the rest are the trainer's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--logs", nargs="+", required=True, help="raw logs, a day each, in order")
    parser.add_argument(
        "--data-set", choices=tuple(DATA_SETS), default="kaggle", help="of the logs"
    )
    parser.add_argument("--columns", default=None, help="custom: the column file")
    parser.add_argument("--method", choices=tuple(SCRIPTS), default="baseline", help="of training")
    parser.add_argument(
        "--min-count",
        type=cli.positive_int,
        default=1,
        help="values seen fewer times on a day share a row until they are not; 1 = off",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="also the first model as it is, and training anew on all days before: with D days "
        "D - 1 more trainings, of D (D - 1) / 2 days' inputs in all, preprocessed for each (30 "
        "days: 29 trainings, 435 days' inputs, where going on trains on 30)",
    )
    parser.add_argument("--work-dir", default="runs/days", help="folder of all files that it makes")
    parser.add_argument("--no-last", action="store_true", help="do not train on the last day")
    parser.add_argument("--verbose", action="store_true", help="show what the scripts say")
    args, rest = parser.parse_known_args(argv)
    for path in (*args.logs, *([args.columns] if args.columns else [])):
        if not Path(path).is_file():
            parser.error(f"{path} does not exist; check the path")
    if len(args.logs) < 2:
        parser.error("--logs: got one; expected at least two days, the second is tested on first")
    return args, rest


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Go through the days; returns what each one's tests said."""
    args, trainer_flags = parse_args(argv)
    return Days(args, trainer_flags).run()


if __name__ == "__main__":
    cli.run_script(main)
