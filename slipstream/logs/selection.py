"""Which of a log's rows are trained on, which are held out, and which negative rows are left out.

Most logs tell only at their end which day is the last: so rows are chosen when all are encoded, and
a part's `kept` then says which of them stay. Rows whose set is known when they are read (of a file
that is a day, of a test file, drawn at random) are chosen at once, and never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slipstream.logs.encoding import INT8, INT32, INT64, Part, write_synced
from slipstream.logs.formats import (
    RANDOM_SHARE,
    TEST,
    TRAINING,
    VALIDATION,
    Schema,
    class_of,
    equal_days,
    keys_in,
)
from slipstream.logs.rows import Rows
from slipstream.logs.sub_sampling import SUB_SAMPLING, SubSampling
from slipstream.tools.npz import write_npz
from slipstream.tools.places import regular_file
from slipstream.tools.streams import seed_sequence, stream

MIN_HELD_OUT = 2  # rows: a half each for test and validation
CHUNK_ROWS = 1 << 18
SUB_SAMPLED = "sub-sampled negative"


@dataclass(frozen=True)
class Choice:
    """What decides about rows and values.

    Attributes:
        rate: share of the negative training rows to leave out.
        seed: of that.
        thins_held_out: held-out rows are thinned likewise, as DLRM does.
        min_count: values seen fewer times in the training rows share one row a table; 1: none do.
        first_test_file: from it on, files are held out; None: none is given for that.
        num_files: of the log.
    """

    rate: float = 0.0
    seed: int = 0
    thins_held_out: bool = False
    min_count: int = 1
    first_test_file: int | None = None
    num_files: int = 1

    def is_late(self, schema: Schema) -> bool:
        """Whether only the whole log tells which negative rows are left out."""
        is_last_day = schema.split.rule == "last day" and schema.day_rule != "files"
        return bool(self.rate) and not self.thins_held_out and is_last_day

    def is_held_out(self, file: int, schema: Schema) -> bool:
        """Whether all rows of a file are held out."""
        if self.first_test_file is not None:
            return file >= self.first_test_file
        by_file = schema.split.rule == "last day" and schema.day_rule == "files"
        return by_file and file == self.num_files - 1


def chooser(
    choice: Choice, schema: Schema, file: int, drop: Callable[[str, int], None]
) -> Callable[[Rows], Rows]:
    """A function rows -> rows of a file to keep, with the keys that tell their set.

    It takes one draw a row, in order, so the choice does not depend on how rows are blocked.
    """
    split, rate = schema.split, 0.0 if choice.is_late(schema) else choice.rate
    thinning = stream(choice.seed, "thinning", file)
    drawing = stream(split.seed, "split", file)
    is_test = choice.is_held_out(file, schema)

    def choose(rows: Rows) -> Rows:
        classes = np.full(len(rows.labels), TEST if is_test else TRAINING, np.int8)
        if split.rule == "random":
            drawn = drawing.random(len(rows.labels))
            classes[drawn < RANDOM_SHARE] = VALIDATION
            classes[drawn < RANDOM_SHARE / 2] = TEST
        if split.is_drawn and schema.has_keys:
            rows = rows._replace(keys=keys_in(classes, rows.keys))
        if not rate:
            return rows
        kept = (thinning.random(len(rows.labels)) >= rate) | (rows.labels == 1)
        if not choice.thins_held_out:
            kept |= classes != TRAINING
        drop(SUB_SAMPLED, int((~kept).sum()))
        return rows.where(kept)

    return choose


class Selection:
    """The rows of all parts: which are trained on, and which are left out.

    Attributes:
        days: row offsets (days + 1,) int64 of the rows that stay; the last day is held out.

    Raises `ValueError` for a log that leaves nothing to train on, or nothing to hold out.
    """

    def __init__(self, parts: Sequence[Part], schema: Schema, choice: Choice) -> None:
        self.parts, self.schema, self.choice = parts, schema, choice
        self.is_sorted = _is_sorted(parts)
        self._starts = np.cumsum([0, *(part.num_rows for part in parts)])
        self.num_rows = int(self._starts[-1])
        if not self.num_rows:
            raise ValueError("no rows are left of the log; see --data-sub-sample-rate, --bad-lines")
        self._bound: tuple[int, int] | None = None
        lengths = self._day_lengths()
        if schema.split.rule == "last day":
            _check_last_day(lengths)
            self._held_out = lengths[-1]
            if schema.day_rule == "equal" and schema.has_keys and not self.is_sorted:
                self._bound = bound = _key_at(parts, self.num_rows - self._held_out)
                ties = [
                    sum(int((keys == bound[0]).sum()) for keys in _key_chunks(p)) for p in parts
                ]
                self._ties_before = np.cumsum([0, *ties])
        if choice.is_late(schema):
            lengths = self._thin(lengths)
        self.days = np.cumsum([0, *lengths]).astype(np.int64)
        if not self.days[-2]:
            raise ValueError(
                "no rows to train on are left; expected some that are not held out (--split) nor"
                " left out (--data-sub-sample-rate)"
            )

    def _day_lengths(self) -> list[int]:
        """Rows of each day, the held-out ones last."""
        schema, split = self.schema, self.schema.split
        held_out = sum(map(self._num_held_out, self.parts))
        days = self._rows_of_days()
        if split.rule == "last day":
            if days is not None:
                return days
            if self.num_rows < schema.num_days:
                raise ValueError(
                    f"got {self.num_rows} rows; expected at least {schema.num_days} rows, one a day"
                )
            return np.diff(equal_days(self.num_rows, schema.num_days)).tolist()
        if self.num_rows == held_out:
            return [0, held_out]
        if split.rule != "none" and held_out < MIN_HELD_OUT:
            raise ValueError(f"{held_out} rows are held out; expected at least {MIN_HELD_OUT}")
        if days is None:
            num_training = self.num_rows - held_out
            days = np.diff(equal_days(num_training, min(schema.num_days, num_training))).tolist()
        return [*days, held_out]

    def _rows_of_days(self) -> list[int] | None:
        """Rows of each day that files or keys tell, but for those drawn or of a test file."""
        if self.schema.day_rule == "equal":
            return None
        rows_of: dict[int, int] = {}
        is_apart = self.schema.split.rule != "last day"
        for part in self.parts:
            of_part = part.info["day_rows"]
            if self.schema.day_rule == "files":
                num_apart = self._num_held_out(part) if is_apart else 0
                of_part = {part.info["file"]: part.num_rows - num_apart}
            for day, num in of_part.items():
                rows_of[int(day)] = rows_of.get(int(day), 0) + num
        if is_apart:
            rows_of = {day: num for day, num in rows_of.items() if num}
        return [rows_of[day] for day in sorted(rows_of)]

    def _num_held_out(self, part: Part) -> int:
        """Rows of a part that were drawn to be held out, or are of the test file."""
        if self.choice.first_test_file is not None:
            is_test = self.choice.is_held_out(part.info["file"], self.schema)
            return part.num_rows if is_test else 0
        return part.info["num_held_out"]

    def training(self, number: int) -> np.ndarray:
        """Which rows (n,) bool of a part are of the training days, those left out among them."""
        part, schema = self.parts[number], self.schema
        rule = schema.split.rule
        if rule == "none":
            return np.ones(part.num_rows, bool)
        if schema.split.is_drawn and schema.has_keys:
            return _of_keys(part, lambda keys: class_of(keys) == TRAINING)
        if rule == "file" or schema.day_rule == "files":
            held_out = self.choice.is_held_out(part.info["file"], schema)
            return np.full(part.num_rows, not held_out)
        if schema.day_rule == "keys":
            last = max(int(day) for p in self.parts for day in p.info["day_rows"])
            return _of_keys(part, lambda keys: schema.day_of(keys) < last)
        num_training = self.num_rows - self._held_out
        if self._bound is None:
            training = np.zeros(part.num_rows, bool)
            training[: max(0, num_training - int(self._starts[number]))] = True
            return training
        bound, num_ties = self._bound  # in the log's order the first rows of a key train
        tie = _of_keys(part, lambda keys: keys == bound)
        is_first = tie & (np.cumsum(tie) + self._ties_before[number] <= num_ties)
        return is_first | _of_keys(part, lambda keys: keys < bound)

    def _thin(self, lengths: list[int]) -> list[int]:
        """Note which rows of each part stay; the lengths of days without the others."""
        choice, schema = self.choice, self.schema
        kept_of_day: dict[int, int] = {}
        num_kept, first_row, file = 0, 0, -1
        for number, part in enumerate(self.parts):
            if part.info["file"] != file:
                file, first_row = part.info["file"], 0
            bits = np.random.PCG64(seed_sequence(choice.seed, "thinning", file))
            bits.advance(first_row)  # a draw a row
            first_row += part.num_rows
            kept = (np.random.Generator(bits).random(part.num_rows) >= choice.rate) | (
                part.array("y", INT8) == 1
            )
            kept |= ~self.training(number)
            write_synced(part.folder / "kept", kept)
            num_kept += int(kept.sum())
            if schema.day_rule == "keys":
                days, counts = np.unique(
                    schema.day_of(part.array("keys", INT64)[kept]), return_counts=True
                )
                for day, num in zip(days.tolist(), counts.tolist(), strict=True):
                    kept_of_day[day] = kept_of_day.get(day, 0) + num
        self.num_thinned = self.num_rows - num_kept
        if schema.day_rule == "keys":
            return [kept_of_day[day] for day in sorted(kept_of_day)]
        held_out = lengths[-1]
        num_training = num_kept - held_out
        if not num_training:
            return [0, held_out]
        num_days = min(len(lengths) - 1, num_training)
        return [*np.diff(equal_days(num_training, num_days)).tolist(), held_out]

    num_thinned = 0

    def held_out_files(self) -> list[str]:
        """Names of the files that held-out rows come from."""
        names = {p.info["file"]: p.info["source"]["name"] for p in self.parts if p.info["is_last"]}
        apart = [p.info["file"] for at, p in enumerate(self.parts) if not self.training(at).all()]
        return [names[file] for file in sorted(set(apart))]

    def _stays(self, number: int) -> np.ndarray:
        """Which rows (n,) bool of a part stay."""
        stays = np.zeros(self.parts[number].num_rows, bool)
        stays[kept_rows(self.parts[number])] = True
        return stays

    def count(self) -> None:
        """Write each part's accesses of its values by the rows that stay, and by those trained on.

        Needed where a value may be dropped, or share a row; one pass over the ids.
        """
        if self.choice.min_count == 1 and not self.choice.is_late(self.schema):
            return
        num_tables = len(self.schema.table_names)
        columns = [self.schema.layout.columns_of(table) for table in range(num_tables)]
        for number, part in enumerate(self.parts):
            if (part.folder / "counts.npz").exists() or not part.num_rows:
                continue
            ids = part.array("ids", INT32, self.schema.num_columns)
            stays = self._stays(number)
            trains = stays & self.training(number)
            arrays = {}
            for table, places in enumerate(columns):
                size = part.info["values"][table]
                for name, rows in (("kept", stays), ("training", trains)):
                    arrays[f"{name}_{table}"] = _accesses(ids, rows, places, size)
            write_npz(part.folder / "counts.npz", arrays)

    def statistics(self) -> list[tuple[float, float]]:
        """Mean and standard deviation of each standardized dense feature in the training rows.

        A column of one value has a deviation of 1.
        """
        chosen = np.flatnonzero(self.schema.is_standardized)
        number, mean, squares = (np.zeros(len(chosen)) for _ in range(3))
        for at, part in enumerate(self.parts if len(chosen) else []):
            dense = part.array("dense", self.schema.dense_type, len(self.schema.dense_names))
            stays = self._stays(at) & self.training(at)
            for start in range(0, part.num_rows, CHUNK_ROWS):
                rows = slice(start, start + CHUNK_ROWS)
                values = dense[rows][stays[rows]][:, chosen].astype(np.float64)
                # Chan, Golub and LeVeque's update: sums of squares would cancel.
                size = np.maximum(np.isfinite(values).sum(axis=0), 1e-300)
                center = np.nansum(values, axis=0) / size
                apart = center - mean
                squares += np.nansum((values - center) ** 2, axis=0)
                squares += apart**2 * number * size / (number + size)
                mean += apart * size / (number + size)
                number += size
        deviation = np.sqrt(squares / np.maximum(number, 1))
        return list(
            zip(mean.tolist(), np.where(deviation > 0, deviation, 1.0).tolist(), strict=True)
        )


def _accesses(ids: np.ndarray, rows: np.ndarray, places: Sequence[int], size: int) -> np.ndarray:
    """Accesses (size,) int64 of each provisional id of a table's columns by some rows."""
    counts = np.zeros(size, np.int64)
    for start in range(0, len(ids), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        found = ids[part][:, places][rows[part]].ravel()
        counts += np.bincount(found[found >= 0], minlength=size)
    return counts


def kept_rows(part: Part) -> np.ndarray | slice:
    """Which rows of a part stay: booleans (n,), or all."""
    if not part.num_rows or not (part.folder / "kept").exists():
        return slice(None)
    return np.asarray(np.memmap(regular_file(part.folder / "kept"), np.bool_, "r"))


def _key_chunks(part: Part) -> Iterator[np.ndarray]:
    keys = part.array("keys", INT64)
    for start in range(0, part.num_rows, CHUNK_ROWS):
        yield keys[start : start + CHUNK_ROWS]


def _of_keys(part: Part, test: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What a test says of each of a part's keys (n,) bool."""
    return np.concatenate([np.empty(0, bool), *map(test, _key_chunks(part))])


def _is_sorted(parts: Sequence[Part]) -> bool:
    keyed = [part.info for part in parts if "first_key" in part.info]
    in_turn = zip(keyed, keyed[1:], strict=False)
    return all(info["is_sorted"] for info in keyed) and all(
        before["last_key"] <= after["first_key"] for before, after in in_turn
    )


def _check_last_day(lengths: Sequence[int]) -> None:
    if len(lengths) < 2:
        raise ValueError(
            "all rows are of one day; expected at least two, the last is held out (or a --split)"
        )
    if lengths[-1] < MIN_HELD_OUT:
        raise ValueError(
            f"the last of {len(lengths):,} days has {lengths[-1]} row: no test and "
            "validation set; where each row has a time of its own, name it by order, not day"
        )


def _key_at(parts: Sequence[Part], place: int) -> tuple[int, int]:
    """The key of the row at `place` when all are sorted, and how many of its rows are before it.

    Four passes over the keys, 16 bits each.
    """
    low, high_bits, before = 0, 0, 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for signed in (keys for part in parts for keys in _key_chunks(part)):
            # Unsigned numbers in the order of the signed keys.
            keys = signed.view(np.uint64) ^ np.uint64(1 << 63)
            if high_bits:
                keys = keys[keys >> np.uint64(64 - high_bits) == np.uint64(low)]
            digits = (keys >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, place - before, side="right"))
        before += int(ends[digit] - counts[digit])
        low, high_bits = (low << 16) | digit, high_bits + 16
    return low - (1 << 63), place - before


def check_halves(labels: np.ndarray) -> None:
    """Raise `ValueError` unless both halves of the held-out rows have rows of both labels."""
    half = len(labels) // 2
    for name, part in (("test", labels[:half]), ("validation", labels[half:])):
        if len(np.unique(part)) < 2:
            only = f"{len(part):,} rows, {'all' if part.any() else 'none'} of them clicks"
            raise ValueError(
                f"the {name} half of the held-out rows has {only}: no AUC can be told from it; hold"
                " out others with --split (random:1), or name a time to sort by as order, not day"
            )


def describe(choice: Choice, schema: Schema) -> dict[str, Any]:
    """What a manifest says of the choice of rows, where it is not the usual one."""
    described: dict[str, Any] = {}
    if choice.rate:
        held_out = "thinned" if choice.thins_held_out else "whole"
        described[SUB_SAMPLING] = SubSampling(choice.rate, held_out).describe()
    if schema.split.rule != "last day":
        described["split"] = {"rule": schema.split.rule}
        if schema.split.rule == "random":
            described["split"]["seed"] = schema.split.seed
    return described
