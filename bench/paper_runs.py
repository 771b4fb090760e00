"""The runs that the papers' figures are made of: which data, which flags, and each trained once."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import input_segregation
import slipstream_train
from bench import plain_dlrm
from bench.methods import SCRIPTS, code_of, script_of, split_setting
from bench.run_records import (
    RUN_FILES,
    Records,
    by_flag,
    claim_runs,
    finished_records,
    run_once,
)
from bench.time_to_auc import merge_rare
from slipstream.logs.processed import ClickLog, load_processed
from slipstream.model.dlrm import bottom_sizes
from slipstream.model.features import plain_features
from slipstream.tools.device import choose_device
from slipstream.tools.npz import fingerprint
from slipstream.tools.places import remove_ours
from slipstream.tools.runtime import describe_machine, read_json, write_json
from slipstream.training.flags import settings_of
from slipstream.training.rows import bytes_per_row

REPOSITORY = Path(__file__).resolve().parents[1]
MAX_BUDGET, SHARE_OF_ROWS = 256 << 20, 8  # the papers' hot memory; at most an eighth of the rows
# An epoch of few mini-batches would drop nothing; here each run does what its figure is of.
DROP = ("--drop-min-steps", "0")
# Our methods by their names in `bench.methods`.
METHODS = {
    "baseline": "baseline",
    "fae": "fae",
    "slipstream": "slipstream-stale",
    "random": "slipstream-random",
}
PLAIN = "plain"
# What measures in this process.
MEASURES = (
    *("bench/paper_data.py", "bench/paper_steps.py", "bench/plain_dlrm.py"),
    *("bench/run_figures.py", "bench/training_figures.py", "bench/turns.py"),
)
NAMES = {
    PLAIN: "plain PyTorch",
    "baseline": "baseline",
    "fae": "FAE",
    "slipstream": "Slipstream",
    "random": "random drop",
}


@dataclass(frozen=True)
class Job:
    """A kind of run: a method, and what tells it from the method's usual run.

    Attributes:
        setting: its name, as `alpha0.5`; empty for the usual run.
        words: its flags.
        budget_share: of the hot memory.
        min_count: values seen fewer times share a row.
    """

    method: str
    setting: str = ""
    words: tuple[str, ...] = ()
    budget_share: float = 1.0
    min_count: int = 1

    @property
    def name(self) -> str:
        """Its folder's name, but for the seed."""
        return f"{self.method}-{self.setting}" if self.setting else self.method


@dataclass
class Plan:
    """The data, what all runs share, and where everything lies.

    Attributes:
        log: the processed log, `path` its file.
        out: the folder of figures; runs are below `runs`, data made from the log below `work`.
        flags: the trainers' flags of all runs.
        budget: bytes of hot memory.
        here: train in this process, which has loaded PyTorch already, not in one of each run's own.
    """

    path: Path
    out: Path
    flags: list[str]
    seeds: range
    epochs: int
    points: int
    budget: int
    here: bool
    log: ClickLog = field(init=False)
    claimed: dict[str, Any] = field(init=False)
    trained: int = 0
    folders: dict[tuple[float, int], Path] = field(default_factory=dict)
    known: dict[Path, Records] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log = load_processed(self.path)
        if not len(self.log.splits()[1]):
            raise ValueError(f"{self.path} holds nothing out: there is no AUC to show")
        args = self.parsed()
        settings = settings_of(args, self.num_train)
        self.device = choose_device(args.device)
        if self.here and args.num_threads:  # of plain PyTorch, too
            torch.set_num_threads(args.num_threads)
        self.recipe, self.model = settings.training, settings.model
        self.row_bytes = bytes_per_row(
            self.model.arch_sparse_feature_size, settings.training.optimizer
        )
        if not self.budget:
            num_rows = int(self.log.table_sizes.sum())
            self.budget = min(MAX_BUDGET, max(num_rows // SHARE_OF_ROWS, 1) * self.row_bytes)
        self.machine = describe_machine(self.device)
        self.claimed = {
            "processed": fingerprint(self.path),
            "flags": by_flag(self.flags),
            "epochs": self.epochs,
            "points": self.points,
            "budget": self.budget,
            **code_of(self.flags, "bench/plain_dlrm.py"),
            "machine": {name: self.machine.get(name) for name in ("cpu", "cpu_cores", "gpu")},
        }

    @property
    def num_train(self) -> int:
        """Training inputs."""
        return len(self.log.splits()[0])

    @property
    def batch_size(self) -> int:
        """Inputs a mini-batch of the usual runs."""
        return self.recipe.mini_batch_size

    def parsed(self, *words: str) -> argparse.Namespace:
        """All runs' flags, as a trainer takes them; exits with one line for a bad one."""
        return slipstream_train.parse_args(["--segregated-data-dir", "-", *self.flags, *words])

    def claim(self, jobs: Sequence[Job]) -> None:
        """Note what the runs are of; `ValueError` where the folder holds others."""
        settings = {job.name: [*job.words, job.budget_share, job.min_count] for job in jobs}
        compared = {**self.claimed, "settings": settings}
        claim_runs(self.out / "runs", compared, ("settings",), "--out")

    def processed(self, min_count: int = 1) -> Path:
        """The processed file, its rare values merged where `min_count` says so."""
        if min_count == 1:
            return self.path
        known_by = self.claimed["processed"][:12]
        merged = self.out / "work" / f"{known_by}_min_count{min_count}.npz"
        if not merged.exists():  # it is renamed when it is whole, and its name has the log's sum
            merged.parent.mkdir(parents=True, exist_ok=True)
            merge_rare(self.path, min_count, merged)
        return merged

    def segregated(self, budget_share: float = 1.0, min_count: int = 1) -> Path:
        """The segregated folder of a hot memory, made where it is not up to date."""
        if (budget_share, min_count) in self.folders:
            return self.folders[budget_share, min_count]
        budget = max(1, round(self.budget * budget_share))
        folder = self.out / "work" / f"hot{budget}_min_count{min_count}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = ["--processed-data-file", str(self.processed(min_count))]
        words += ["--segregated-data-dir", str(folder), "--hot-emb-gpu-mem", str(budget)]
        words += ["--arch-sparse-feature-size", str(self.model.arch_sparse_feature_size)]
        words += ["--optimizer", self.recipe.optimizer]
        with contextlib.redirect_stdout(io.StringIO()):
            input_segregation.main(words)
        self.folders[budget_share, min_count] = folder
        return folder

    def folder_of(self, job: Job, seed: int) -> Path:
        """Where a run's log is."""
        return self.out / "runs" / f"{job.name}-seed{seed}"

    def command(self, job: Job, seed: int) -> tuple[str, list[str]]:
        """A run's script and flags, but for where its log goes."""
        if job.method == PLAIN:
            return "bench/plain_dlrm", self._plain_words(seed)
        method = METHODS[job.method]
        script, own = script_of(method)
        given = [*self.flags, "--nepochs", str(self.epochs), *DROP, *job.words]
        words = [*split_setting(shlex.join(given), method)[0], *own]
        words += ["--seed", str(seed), "--print-freq", "0"]
        size = settings_of(self.parsed(*job.words), self.num_train).training.mini_batch_size
        words += ["--test-freq", str(max(1, self.num_train // size // self.points))]
        words += ["--processed-data-file", str(self.processed(job.min_count))]
        if script != "dlrm_s_pytorch":
            folder = self.segregated(job.budget_share, job.min_count)
            words += ["--segregated-data-dir", str(folder)]
        return script, words

    def _plain_words(self, seed: int) -> list[str]:
        recipe, model = self.recipe, self.model
        words = {
            "--processed-data-file": self.path,
            "--arch-mlp-bot": "-".join(map(str, self.bottom())),
            "--arch-mlp-top": "-".join(map(str, model.arch_mlp_top)),
            "--mini-batch-size": recipe.mini_batch_size,
            "--optimizer": recipe.optimizer,
            "--learning-rate": recipe.learning_rate,
            "--lr-decay-share": recipe.lr_decay_share,
            "--test-freq": max(1, self.num_train // recipe.mini_batch_size // self.points),
            "--placement": "hybrid" if self.device.type == "cuda" else "cpu",
            "--seed": seed,
            "--tuned": str(self.here).lower(),  # as this process is, by the runs before
        }
        if recipe.dense_learning_rate:
            words["--dense-learning-rate"] = recipe.dense_learning_rate
        return [str(word) for pair in words.items() for word in pair]

    def bottom(self) -> list[int]:
        """The bottom MLP's sizes."""
        log, dim = self.log, self.model.arch_sparse_feature_size
        features = plain_features(log.inputs.num_dense, len(log.table_sizes), dim)
        return bottom_sizes(self.model.arch_mlp_bot, features)

    def why_no_plain(self) -> str | None:
        """Why plain PyTorch cannot stand beside these runs; None: it can."""
        if self.model.model != "dlrm":
            return f"plain PyTorch is a DLRM, and --model is {self.model.model}"
        if not self.log.layout.is_plain or self.log.inputs.weights is not None:
            return "plain PyTorch takes one row a feature and no weights, and this log has others"
        recipe = self.recipe
        adaptive = (recipe.optimizer, recipe.dense_optimizer) == ("rwsadagrad", "adam")
        one_rate = recipe.dense_learning_rate in (None, recipe.learning_rate)
        if not adaptive and not (recipe.optimizer == recipe.dense_optimizer == "sgd" and one_rate):
            return "plain PyTorch has row-wise Adagrad with Adam, or SGD at one rate"
        return "plain PyTorch trains one epoch" if self.epochs > 1 else None

    def why_not(self, jobs: Sequence[Job]) -> str | None:
        """Why some of these runs cannot be; None: they can."""
        merges = any(job.min_count > 1 for job in jobs)
        if merges and not self.log.layout.is_plain:
            return "rare values are merged here where features have one column, and some have more"
        return None

    def train(self, jobs: Sequence[Job]) -> None:
        """Train what has not been; seed by seed: a machine's drift meets all kinds alike."""
        runs = [(job, seed) for seed in self.seeds for job in dict.fromkeys(jobs)]
        for job, seed in tqdm(runs, desc="runs", disable=None):
            self._run(job, seed)

    def records(self, job: Job) -> list[Records]:
        """The runs' records, a seed each, trained unless they have been."""
        return [self._run(job, seed) for seed in self.seeds]

    def _run(self, job: Job, seed: int) -> Records:
        folder = self.folder_of(job, seed)
        if folder not in self.known:
            records = finished_records(folder)
            if records is None:
                records = self._train(folder, *self.command(job, seed))
                self.trained += 1
            self.known[folder] = records
        return self.known[folder]

    def noise(self, jobs: Sequence[Job]) -> str:
        """How far apart the same run ends by its seed, in a sentence."""
        if len(self.seeds) == 1:
            return "One seed: small differences may be chance."
        spreads = [mean_sd([log[-1]["auc"] for log in self.records(job)])[1] for job in jobs]
        return (
            f"Seeds of one kind of run differ by {np.median(spreads):.4f} (standard deviation of "
            f"{len(self.seeds)}, median over kinds)."
        )

    def _train(self, folder: Path, script: str, words: list[str]) -> Records:
        if self.here:
            remove_ours(folder, RUN_FILES)
            words = [*words, "--runs-dir", str(folder.parent), "--run-name", folder.name]
            with contextlib.redirect_stdout(io.StringIO()):
                SCRIPTS.get(script, plain_dlrm).main(words)
            records = finished_records(folder)
            if records is None:
                raise ValueError(f"{folder.name} did not finish; start again to go on")
            return records
        return run_once(folder, [sys.executable, str(REPOSITORY / f"{script}.py"), *words])

    def measured(self, name: str, measure: Callable[[], list[dict[str, Any]]]) -> Any:
        """What was measured in the same way on the same data and machine before, or is now."""
        path = self.out / "work" / f"{name}.json"
        of = {**self.claimed, **code_of(self.flags, *MEASURES)}
        if path.exists():
            with contextlib.suppress(ValueError):  # damaged: measured anew
                kept = read_json(path)
                if kept.get("of") == of:
                    return kept["rows"]
        with contextlib.redirect_stdout(io.StringIO()):
            rows = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"of": of, "rows": rows})
        return rows


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the sample's standard deviation; of one value that is unknown, NaN."""
    array = np.array(values, float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else float("nan")


@dataclass
class Drawn:
    """A figure or a table of the page.

    Attributes:
        rows: its numbers, for the CSV beside it.
        said: what it shows here, in a sentence or two.
        picture: matplotlib's figure; None: there is a table alone, or nothing.
        table: head and rows of texts.
        jobs: the runs it is of.
    """

    rows: list[dict[str, Any]]
    said: str
    picture: Any = None
    table: tuple[list[str], list[list[str]]] | None = None
    jobs: Sequence[Job] = ()
