"""Taobao's UserBehavior log as a click-through task.

The log says what users did, not what they were shown and passed over. So, as the papers on it do:

- a *click* (`pv`, the page of an item opened) is a row with label 1; `buy`, `cart` and `fav` are
  left out, and so are the few clicks outside the log's nine days;
- each click has one *negative*, label 0: the same user and time, but the item and category of a
  click drawn at random (seeded) from the whole log, again while it is the clicked item itself (32
  times at most). Popular items are drawn as often as they are clicked, so popularity alone does not
  tell clicks from negatives;
- the features are user, item, category, hour of day and weekday (UTC+8), the user's previous
  clicked item and its category, and, dense, the number of clicks the user made before.

Rows are sorted by time; a day is a date (UTC+8), the last one, 2017-12-03, held out.

Price: 60 bytes of disk a click until its rows are encoded; memory for one of the groups
of users, `USERS_CLICKS` clicks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from slipstream.logs.formats import LogFormat, Schema
from slipstream.logs.rawfile import RawFile, Tally, parse_file
from slipstream.logs.rows import Rows
from slipstream.logs.work_files import Clicks
from slipstream.tools.places import regular_file, remove_ours
from slipstream.tools.runtime import read_json, sync_file, write_json
from slipstream.tools.streams import stream

FORMAT = LogFormat(
    ("id", "id", "id", "behaviour", "time"),
    ("user", "item", "category", "behaviour", "time"),
    separator=",",
)
DAY = 86400
START = 1511539200  # 2017-11-25 in UTC+8
END = START + 9 * DAY
WEEKDAY_OF_START = 5  # a Saturday; Monday is 0
TABLES = ("user", "item", "category", "hour of day", "weekday", "previous item")
SCHEMA = Schema(
    ("position",),
    (*TABLES, "previous category"),
    np.dtype(np.int32),
    has_keys=True,
    day_rule="keys",
    day_length=DAY,
    day_start=START,
)
CLICK = np.dtype([("user", "i4"), ("item", "i4"), ("category", "i4"), ("time", "i8")])
PAIR = np.dtype([("click", CLICK), ("item", "i4"), ("category", "i4"), ("number", "i8")])
CLICK_FILES = re.compile(r"clicks|clicks\.json(\.partial)?|users_[0-9]+")
DISK_BYTES = CLICK.itemsize + PAIR.itemsize  # a click
CHUNK = 1 << 18
USERS_CLICKS = 1 << 21
MAX_DRAWS = 32


def read_rows(
    raw: RawFile, folder: Path, seed: int, block_bytes: int, max_ind_range: int, tally: Tally
) -> Iterator[Rows]:
    """Yield the rows of a log; its clicks are kept in `folder`, and found there by a later run."""
    try:
        noted = read_json(folder / "clicks.json", Clicks)
    except OSError:
        _keep_clicks(raw, folder, block_bytes, tally)
    else:
        raw.restore(noted["source"])
        tally.dropped, tally.examples = noted["dropped"], noted["examples"]
        tally.num_lines = noted["num_lines"]
    yield from _rows_of_clicks(folder, seed, max_ind_range)
    (folder / "clicks.json").unlink()  # first: without the clicks it must not be found
    remove_ours(folder, CLICK_FILES)


def _keep_clicks(raw: RawFile, folder: Path, block_bytes: int, tally: Tally) -> None:
    """Write the log's clicks to `folder`, in its order."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "clicks", "wb") as file:
        for rows in parse_file(raw, FORMAT, block_bytes, -1, tally):
            assert rows.keys is not None
            is_click = rows.labels == 1
            inside = (rows.keys >= START) & (rows.keys < END)
            tally.drop("not a click (pv)", int((~is_click).sum()))
            tally.drop("not within 2017-11-25 to 2017-12-03", int((is_click & ~inside).sum()))
            kept = rows.where(is_click & inside)
            clicks = np.empty(len(kept.labels), CLICK)
            clicks["user"], clicks["item"], clicks["category"] = kept.dense.T
            clicks["time"] = kept.keys
            file.write(clicks.data)
        sync_file(file)
    about = {"dropped": tally.dropped, "examples": tally.examples, "num_lines": tally.num_lines}
    write_json(folder / "clicks.json", {**about, "source": raw.describe()})


def _rows_of_clicks(folder: Path, seed: int, max_ind_range: int) -> Iterator[Rows]:
    """Rows of the clicks in `folder` and of their negatives, by groups of users."""
    num_clicks = (folder / "clicks").stat().st_size // CLICK.itemsize
    if not num_clicks:
        return
    clicks = np.memmap(regular_file(folder / "clicks"), CLICK, "r")
    num_groups = -(-num_clicks // USERS_CLICKS)  # of the log alone: ties in time keep their order
    names = [folder / f"users_{group}" for group in range(num_groups)]
    rng = stream(seed, "negatives")
    with ExitStack() as stack:
        files = [stack.enter_context(open(name, "wb")) for name in names]
        for start in range(0, num_clicks, CHUNK):
            pairs = _with_negatives(clicks, start, rng)
            group_of = pairs["click"]["user"] % num_groups
            for group, file in enumerate(files):
                file.write(pairs[group_of == group].data)
    for name in names:
        pairs = np.fromfile(name, PAIR)
        yield from _rows_of_users(pairs, max_ind_range)
        name.unlink()


def _with_negatives(clicks: np.ndarray, start: int, rng: np.random.Generator) -> np.ndarray:
    """The clicks from `start` on, each with the item and category of its negative."""
    chunk = clicks[start : start + CHUNK]
    pairs = np.empty(len(chunk), PAIR)
    pairs["click"], pairs["number"] = chunk, np.arange(start, start + len(chunk))
    same = np.arange(len(chunk))
    for _ in range(MAX_DRAWS):
        drawn = clicks[rng.integers(0, len(clicks), len(same))]
        pairs["item"][same], pairs["category"][same] = drawn["item"], drawn["category"]
        same = same[drawn["item"] == chunk["item"][same]]
        if not len(same):
            break
    return pairs


def _rows_of_users(pairs: np.ndarray, max_ind_range: int) -> Iterator[Rows]:
    """Rows of all clicks of some users: clicks by user and time, each before its negative."""
    click = pairs["click"]
    order = np.lexsort((pairs["number"], click["time"], click["user"]))
    pairs, click = pairs[order], click[order]
    num_clicks, user = len(pairs), click["user"]
    first = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]])) if num_clicks else user
    lengths = np.diff(first, append=num_clicks)
    position = np.arange(num_clicks) - np.repeat(first, lengths)
    previous = np.stack([click["item"], click["category"]], axis=1).astype(np.int64)
    previous = np.concatenate([np.full((1, 2), -1), previous[:-1]])
    previous[first] = -1
    hours, weekdays = hours_of(click["time"])
    for start in range(0, num_clicks, CHUNK):
        among = slice(start, start + CHUNK)
        both = []
        for item, category in ((click["item"], click["category"]), _negative(pairs)):
            columns = [user, item, category, hours, weekdays, *previous.T]
            both.append(np.column_stack([column[among] for column in columns]))
        # (clicks, 2, F): a click, then its negative.
        values = np.stack(both, axis=1).reshape(-1, len(SCHEMA.table_names)).astype(np.int64)
        yield Rows(
            np.tile(np.array([1, 0], np.int8), len(both[0])),
            np.repeat(position[among], 2)[:, None].astype(np.int32),
            codes_of(values, max_ind_range),
            np.repeat(click["time"][among], 2),
        )


class History:
    """Each user's clicks in a log that is read line by line: how many, and the last one."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[int, int, int]] = {}

    def candidates(self, rows: Rows, max_ind_range: int) -> Rows:
        """Lines as `FORMAT` has them, as inputs of the model; clicks among them are then history.

        What was clicked before is told by the order of the lines, not by their times.
        """
        assert rows.keys is not None
        user, item, category = (column.astype(np.int64) for column in rows.dense.T)
        number = len(user)
        order = np.argsort(user, kind="stable")
        is_first = np.ones(number, bool)
        is_first[1:] = user[order[1:]] != user[order[:-1]]
        starts = np.flatnonzero(is_first)
        clicked = (rows.labels == 1)[order]
        # Clicks before each line, of all users in this order, then less those of earlier users.
        before = np.concatenate([[0], np.cumsum(clicked)])
        lengths = np.diff(starts, append=number)
        known = [self._known.get(one, (0, -1, -1)) for one in user[order[starts]].tolist()]
        old = np.repeat(np.array(known, np.int64).reshape(-1, 3), lengths, axis=0)
        base = np.repeat(before[starts], lengths)
        count = before[:-1] - base
        clicks = np.flatnonzero(clicked)
        # The last click among these lines, where there is one.
        at = order[clicks[np.maximum(before[:-1] - 1, 0)]] if len(clicks) else order
        has_new = count > 0
        previous = [
            np.where(has_new, new[at], old[:, i + 1]) for i, new in ((0, item), (1, category))
        ]
        position = old[:, 0] + count
        for start, end in zip(starts.tolist(), (starts + lengths).tolist(), strict=True):
            one, last = order[start], end - 1
            num = int(position[last]) + int(clicked[last])
            newest = order[last] if clicked[last] else None
            of_last = (previous[0][last], previous[1][last])
            if newest is not None:
                of_last = (item[newest], category[newest])
            self._known[int(user[one])] = (num, int(of_last[0]), int(of_last[1]))
        back = np.empty(number, np.int64)
        back[order] = np.arange(number)
        hours, weekdays = hours_of(rows.keys)
        columns = [user, item, category, hours, weekdays, *(column[back] for column in previous)]
        dense = position[back][:, None].astype(np.int32)
        return Rows(
            rows.labels, dense, codes_of(np.column_stack(columns), max_ind_range), rows.keys
        )


def hours_of(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hour of day and weekday (UTC+8) of times in seconds since 1970."""
    seconds = times - START
    return seconds // 3600 % 24, (seconds // DAY + WEEKDAY_OF_START) % 7


def codes_of(values: np.ndarray, max_ind_range: int) -> np.ndarray:
    """Codes uint64 of values; -1 is no value."""
    if max_ind_range > 0:  # of all but what is empty, -1
        values = np.where(values < 0, -1, values % max_ind_range)
    return (values + 1).astype(np.uint64)


def _negative(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pairs["item"], pairs["category"]
