"""Runs that tables and figures are made of: what a `log.jsonl` must hold, and runs done once."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from slipstream.tools.places import own_names, remove_ours
from slipstream.tools.runlog import OVERHEAD, read_log
from slipstream.tools.runtime import read_json, write_json
from slipstream.tools.schema import Amount, Count, Positive, Share, conform
from slipstream.training.inspection import TRACE

REPOSITORY = Path(__file__).resolve().parents[1]
RUN_FILES = own_names(("log.jsonl", TRACE))
OF_CHECKPOINTS = re.compile(
    r"(?:(?:step-\d+|best)[^/]*/)?(?:checkpoint\.json|state\.npz|vocabulary\.npz)?(?:\.partial)?"
)
CLAIM, CHECKPOINTS = "comparison.json", ".checkpoints"
TOLD = 4  # differences that a refusal lists
WAIT, OURS = "GOMP_SPINCOUNT", "1000"  # as `slipstream` sets it

Records = list[dict[str, Any]]


class Machine(Struct):
    """Where it ran."""

    cpu: str | None = None
    cpu_cores: Count | None = None
    gpu: str | None = None


class Plugin(Struct):
    """A file of the reader's own."""

    name: str
    sha256: str | None = None


class Start(Struct):
    """A log's first line."""

    method: str
    flags: dict[str, Any] = {}
    machine: Machine | UnsetType = UNSET
    data: dict[str, Any] | None = None
    network: Plugin | None = None
    policy: Plugin | None = None
    commit: str | None = None
    table_sizes: list[Positive] | UnsetType = UNSET
    num_hot: Count | UnsetType = UNSET
    num_train: Count | UnsetType = UNSET
    log_identity: str | None = None
    loaded: str | None = None
    resumed: bool | UnsetType = UNSET


class Exchanged(Struct):
    """What a rank waited for, and received, of one kind of communication."""

    seconds: Amount
    bytes: Count


class Judged(Struct):
    """An evaluation, or the summary; null where nothing is held out."""

    auc: Share | None = None
    log_loss: Amount | None = None
    accuracy: Share | None = None
    normalized_entropy: Amount | None = None
    step: Count | UnsetType = UNSET
    samples: Count | UnsetType = UNSET
    dropped: Count | UnsetType = UNSET
    dropped_share: Share | UnsetType = UNSET
    training_s: Amount | UnsetType = UNSET
    snapshot_s: Amount | UnsetType = UNSET
    threshold_s: Amount | UnsetType = UNSET
    classification_s: Amount | UnsetType = UNSET
    processes: Positive | UnsetType = UNSET
    communication_s: Amount | UnsetType = UNSET
    received_bytes: Count | UnsetType = UNSET
    communication: dict[str, Exchanged] | UnsetType = UNSET


class Other(Struct):
    """Any other record."""

    kind: str


KINDS = {"start": Start, "evaluation": Judged, "validation": Judged, "summary": Judged}


def check_records(records: list[dict[str, Any]], path: Path) -> None:
    """Raise `ValueError` with the line and field that is not what a run writes."""
    for number, record in enumerate(records, 1):
        conform(record, Other, f"{path}, line {number}")
        conform(record, KINDS.get(record["kind"], Other), f"{path}, line {number}")


def finished_records(folder: Path) -> Records | None:
    """The records of a finished run's log; None for one that did not finish or does not exist.

    `ValueError`: a field of one that did is not what a run writes.
    """
    path = folder / "log.jsonl"
    try:
        records = read_log(path)
    except (OSError, ValueError):
        return None
    if records[-1]["kind"] != "summary":
        return None
    check_records(records, path)
    return records


def run_once(folder: Path, command: Sequence[str], checkpoint_every: str | None = None) -> Records:
    """Run a training into `folder`, unless one has finished there before; its log's records.

    With `checkpoint_every`, as the trainers' flag has it, one that was cut off goes on where its
    last checkpoint was, to the same bits; its checkpoints are beside `folder` until it is finished.
    Where no bar can be shown, a line says that it has. `ValueError`, with what it said: it failed.
    """
    if (records := finished_records(folder)) is not None:
        return records
    remove_ours(folder, RUN_FILES)
    words = [*command, "--runs-dir", str(folder.parent), "--run-name", folder.name]
    checkpoints = folder.with_name(folder.name + CHECKPOINTS)
    if checkpoint_every is not None:
        words += ["--save-model", str(checkpoints), "--load-model", "auto"]
        words += ["--checkpoint-every", checkpoint_every]
    environment = dict(os.environ)
    if any(word.endswith("plain_dlrm.py") for word in words) and environment.get(WAIT) == OURS:
        del environment[WAIT]  # plain PyTorch's threads wait as they do without this package
    start = time.perf_counter()
    done = subprocess.run(
        words, capture_output=True, encoding="utf-8", check=False, env=environment
    )
    records = finished_records(folder)
    if done.returncode or records is None:
        raise ValueError(f"{folder.name} failed: {done.stderr.strip() or 'no summary in its log'}")
    remove_ours(checkpoints, OF_CHECKPOINTS)
    if not sys.stderr.isatty():
        said = f"{folder.name}: finished in {time.perf_counter() - start:.0f} s"
        print(said, file=sys.stderr, flush=True)
    return records


def code_texts(*more: str) -> dict[str, str]:
    """Checksums of the code that a training runs, and of `more` files, by path.

    Not the commit: one of notes, tests or figures leaves runs as they are.
    """
    paths = [*REPOSITORY.glob("*.py"), *(REPOSITORY / "slipstream").rglob("*.py")]
    return {
        str(path.relative_to(REPOSITORY)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted([*paths, *(REPOSITORY / name for name in more)])
    }


def by_flag(words: Sequence[str]) -> dict[str, str]:
    """A command line's flags, by name, with their values."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            found[name] = [value] if equals else []
        else:
            found.setdefault(name, []).append(word)
    return {name: shlex.join(values) for name, values in found.items()}


def claim_runs(
    folder: Path, compared: dict[str, Any], growing: Sequence[str], flag: str = "--runs-dir"
) -> None:
    """Note in `folder` what its runs compare; `ValueError` where finished ones were others.

    `growing` parts are tables by kind of run, as `KIND-seed1`, to which a later call may add: where
    an entry differs, runs of that kind alone are refused. `flag` names the folder.
    """
    path = folder / CLAIM
    before = read_json(path) if path.exists() else {}
    if any(not isinstance(before.get(key, {}), dict) for key in growing):
        raise ValueError(f"{path} is damaged; delete it, and the runs beside it")
    differing = [
        told
        for key in compared.keys() - set(growing)
        for told in _differences(key, before.get(key), compared[key])
    ]
    if differing and _finished(folder, ".*"):
        more = f", and {len(differing) - TOLD} more" if len(differing) > TOLD else ""
        raise ValueError(
            f"{folder} holds runs of another comparison: {'; '.join(sorted(differing)[:TOLD])}"
            f"{more}; choose another {flag}, or delete it"
        )
    others = [".*"] if differing else []
    for key in growing:
        known, now = before.get(key, {}), compared[key]
        for name in sorted(known.keys() & now):
            if not (differing_here := _differences("", known[name], now[name])):
                continue
            kind = rf"{re.escape(name)}-seed\d+"
            if _finished(folder, kind):
                raise ValueError(
                    f"{folder} holds runs of another {name}: {'; '.join(differing_here)}; delete "
                    f"{folder / name}-seed[0-9]* alone, or choose another {flag}: the other runs "
                    "there are kept, and used again"
                )
            others.append(kind)
        compared[key] = now if differing else {**known, **now}
    for checkpoints in folder.glob(f"*{CHECKPOINTS}"):  # of unfinished runs that were others
        if any(re.fullmatch(kind, checkpoints.name.removesuffix(CHECKPOINTS)) for kind in others):
            remove_ours(checkpoints, OF_CHECKPOINTS)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, compared)


def _finished(folder: Path, kind: str) -> bool:
    """Whether a run has finished there whose name matches."""
    return any(
        re.fullmatch(kind, log.parent.name) and finished_records(log.parent)
        for log in folder.glob("*/log.jsonl")
    )


def _differences(name: str, before: Any, now: Any) -> list[str]:
    """What differs, with both values; of tables only the entries that do."""
    if before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        parts = sorted(before.keys() | now)
        return [
            told
            for part in parts
            for told in _differences(f"{name} {part}".strip(), before.get(part), now.get(part))
        ]
    return [f"{name} was {_told(before)}, is {_told(now)}"]


def _told(value: Any) -> str:
    if isinstance(value, list):
        return shlex.join(map(str, value))
    if isinstance(value, dict):
        return "there"
    is_checksum = isinstance(value, str) and len(value) == 64
    return "not given" if value is None else value[:8] if is_checksum else repr(value)


def curve_of(records: Records) -> Records:
    """The evaluations on the test set, in order."""
    return [r for r in records if r["kind"] == "evaluation" and r["auc"] is not None]


def all_training_s(record: Mapping[str, Any]) -> float:
    """Training time up to a record; the clocks count choosing inputs beside it."""
    return record["training_s"] + sum(record.get(name, 0.0) for name in OVERHEAD)


def save_table(rows: Sequence[Mapping[str, Any]], file: str | Path) -> None:
    """Write a bench's table as CSV, in a folder made for it, and say where it is."""
    import pandas

    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")
    print(f"table: {path}")


def short_commit(value: Any) -> str:
    """A log's commit, short; of changes beside it the beginning of their checksum."""
    commit, plus, changes = str(value).partition("+")
    return commit[:8] + plus + changes.removeprefix("changes").strip("-")[:6]
