"""Runs as a report reads them: out of `log.jsonl` alone, finished or not.

A log may be of older code, or damaged inside its records, so every value is looked at before it is
used: what is missing, or no number, is None.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slipstream.tools.runlog import OVERHEAD, read_log

LOG = "log.jsonl"
Point = tuple[float, float]
# What an unfinished run's records say of how far it came.
COUNTS = ("step", "samples", "hot_share", "dropped", "dropped_share", "loss")
CLOCKS = ("training_s", *OVERHEAD, "paused_s", "program_s")
JUDGED = ("auc", "log_loss", "normalized_entropy", "accuracy")


def finite(value: Any) -> float | None:
    """The value where it is a finite number; None where not."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not abs(value) < 1e300:  # NaN, too
        return None
    return value if abs(value) > 1e-300 else 0.0


def number(record: Mapping[str, Any], name: str) -> float | None:
    """A record's value where it is a finite number; None where not."""
    return finite(record.get(name))


def mapping(record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A record's value where it is an object; an empty one where not."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's log.

    Attributes:
        name: as the report calls it.
        place: among the report's runs, from 0: it decides the colour.
        records: of its log; the first one is `start`.
    """

    name: str
    place: int
    records: Sequence[Mapping[str, Any]]

    @property
    def start(self) -> Mapping[str, Any]:
        """The first record."""
        return self.records[0]

    @property
    def method(self) -> str:
        """The method, with Slipstream's policy."""
        method, policy = str(self.start.get("method", "?")), mapping(self.start, "flags")
        return f"{method}, {policy.get('drop_policy')}" if method == "slipstream" else method

    @property
    def last(self) -> Mapping[str, Any]:
        """The last record: `summary` where the run finished."""
        return self.records[-1]

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """Its records of a kind, in order."""
        return [record for record in self.records if record["kind"] == kind]

    @property
    def unfinished(self) -> str | None:
        """Why and where it ended without a result; None: it finished."""
        kind = self.last["kind"]
        if kind == "summary":
            return None
        step = number(self.end, "step")
        where = f" at step {step:,.0f}" if step is not None else ""
        if kind in ("stopped", "failed"):
            how = "stopped by" if kind == "stopped" else "failed:"
            return f"{how} {self.last.get('reason')}{where}"
        return f"still going on, or killed{where.replace(' at', ', after', 1)}"

    @property
    def final(self) -> Mapping[str, Any]:
        """The last evaluation on the test set; an empty record where there is none."""
        evaluations = self.of("evaluation")
        return evaluations[-1] if evaluations else {}

    @property
    def end(self) -> Mapping[str, Any]:
        """The summary; of an unfinished run, what its records say of how far it came."""
        if self.last["kind"] == "summary":
            return self.last
        found: dict[str, Any] = {}
        for record in self.records[1:]:
            found |= {name: record[name] for name in (*COUNTS, *CLOCKS) if name in record}
        validations = self.of("validation")
        found["val"] = validations[-1] if validations else {}
        return found | {name: self.final.get(name) for name in JUDGED}

    def curve(self, kind: str, name: str, by_time: bool) -> list[Point]:
        """A value along training: against inputs trained, or seconds of training, choosing
        included.
        """
        points = []
        for record in self.of(kind):
            x = training_s(record) if by_time else number(record, "samples")
            y = number(record, name)
            if x is not None and y is not None:
                points.append((x, y))
        return points

    def reliability(self) -> list[tuple[float, float, float]]:
        """(inputs, mean probability, share of clicks) of the last evaluation's groups."""
        table = self.final.get("reliability")
        groups: list[Any] = []
        for group in table if isinstance(table, list) else []:
            values = [finite(value) for value in group] if isinstance(group, list) else []
            if len(values) == 3 and None not in values:
                groups.append(tuple(values))
        return groups


def training_s(record: Mapping[str, Any]) -> float | None:
    """Seconds of training up to a record, the choice of inputs included."""
    seconds = number(record, "training_s")
    if seconds is None:
        return None
    return seconds + sum(number(record, name) or 0.0 for name in OVERHEAD)


def find_runs(places: Sequence[str]) -> list[Run]:
    """The runs of folders, of `log.jsonl` files, and of folders of runs; each once, in order.

    `ValueError`: none there, or a damaged log; `OSError`: one that cannot be read.
    """
    paths: dict[Path, Path] = {}
    for place in places:
        for path in _logs_of(Path(place)):
            paths.setdefault(path.resolve(), path)
    resolved = list(paths)
    names = [path.parent.name for path in resolved]
    runs = []
    for path, name in zip(resolved, names, strict=True):
        if names.count(name) > 1:
            name = f"{path.parent.parent.name}/{name}"
        runs.append(Run(name, len(runs), read_log(paths[path])))
    return runs


def _logs_of(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if (place / LOG).is_file():
        return [place / LOG]
    if logs := sorted(place.glob(f"*/{LOG}")):
        return logs
    what = "holds no run" if place.is_dir() else "does not exist"
    raise ValueError(f"{place} {what}; give a run's folder, its {LOG}, or a folder of runs")
