"""What a run's `log.jsonl` must hold where figures and tables are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import UNSET, Struct, UnsetType

from slipstream.tools.schema import Amount, Count, Positive, Share, conform, decode_json

MAX_LOG_BYTES = 1 << 30


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


class Other(Struct):
    """Any other record."""

    kind: str


KINDS = {"start": Start, "evaluation": Judged, "validation": Judged, "summary": Judged}


def read_records(path: Path) -> list[dict[str, Any]]:
    """A log's lines. `OSError`, `ValueError`: it is not there, or a line is not whole JSON."""
    if path.stat().st_size > MAX_LOG_BYTES:
        raise ValueError(f"{path} is larger than any log")
    return [decode_json(line) for line in path.read_bytes().splitlines()]


def check_records(records: list[dict[str, Any]], path: Path) -> None:
    """Raise `ValueError` with the line and field that is not what a run writes."""
    for number, record in enumerate(records, 1):
        conform(record, Other, f"{path}, line {number}")
        conform(record, KINDS.get(record["kind"], Other), f"{path}, line {number}")
