"""Taobao's UserBehavior log as a click-through task.

The log says what users did, not what they were shown and passed over. So, as the papers on it do:

- a *click* (`pv`, the page of an item opened) is a row with label 1; `buy`, `cart` and `fav` are
  left out, and so are the few clicks outside the log's nine days;
- each click has one *negative*, label 0: the same user and time, but the item and category of a
  click drawn at random (seeded) from the whole log, again while it is the clicked item itself (32
  times at most). Popular items are drawn as often as they are clicked, so popularity alone does not
  tell clicks from negatives;
- the features are user, item, category, hour of day and weekday (UTC+8), the user's previous
  clicked item and its category, and, dense, the number of clicks the user made before. With a
  `history` of L, in place of the previous item and category: the last L clicked items and their
  categories, as two sequences (the oldest first) that share the tables of item and category.

What came *before* a click are the same user's clicks at earlier times, and those at the same time
that stand before it in the log; a negative sees what its click does. Clicks outside the nine days
are no history either.

Rows are sorted by time; a day is a date (UTC+8), the last one, 2017-12-03, held out.

Price: 56 bytes of disk a click until its rows are encoded; memory for one of the groups of users,
`USERS_CLICKS` clicks. A history of L adds 8 L bytes a row to the processed file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from slipstream.logs.features import Feature, FeatureLayout
from slipstream.logs.formats import LogFormat, Schema
from slipstream.logs.rawfile import RawFile, Tally, parse_file
from slipstream.logs.rows import ABSENT, Rows
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
TABLES = ("user", "item", "category", "hour of day", "weekday")
PREVIOUS = ("previous item", "previous category")
HISTORY = ("items before", "categories before")
MAX_HISTORY = 1000
CLICK = np.dtype([("user", "i4"), ("item", "i4"), ("category", "i4"), ("time", "i8")])
PAIR = np.dtype([("click", CLICK), ("item", "i4"), ("category", "i4"), ("number", "i8")])
CLICK_FILES = re.compile(r"clicks|clicks\.json(\.partial)?|users_[0-9]+")
DISK_BYTES = CLICK.itemsize + PAIR.itemsize  # a click
CHUNK_VALUES = 1 << 21  # of codes made at once
CHUNK = 1 << 18
USERS_CLICKS = 1 << 21
MAX_DRAWS = 32


def schema_of(history: int) -> Schema:
    """What the rows become; `history`: clicks before, as sequences; 0: the last one's features.

    Raises `ValueError` for a history below 0 or above `MAX_HISTORY`.
    """
    if not 0 <= history <= MAX_HISTORY:
        raise ValueError(f"--history: got {history}; expected 0 to {MAX_HISTORY}")
    tables: tuple[str, ...] = (*TABLES, *PREVIOUS)
    features: tuple[Feature, ...] = ()
    if history:
        tables = TABLES
        shared = (TABLES.index("item"), TABLES.index("category"))
        starts = (len(TABLES), len(TABLES) + history)
        features = (
            *(Feature(name, (at,), at) for at, name in enumerate(TABLES)),
            *(
                Feature(name, tuple(range(start, start + history)), table, "sequence")
                for name, start, table in zip(HISTORY, starts, shared, strict=True)
            ),
        )
    return Schema(
        ("position",),
        tables,
        np.dtype(np.int32),
        has_keys=True,
        day_rule="keys",
        day_length=DAY,
        day_start=START,
        features=features,
    )


def history_of(layout: FeatureLayout) -> int:
    """The history that a log of this layout was made with."""
    return next((len(f.columns) for f in layout.features if f.pooling == "sequence"), 0)


def read_rows(
    raw: RawFile,
    folder: Path,
    seed: int,
    block_bytes: int,
    max_ind_range: int,
    history: int,
    tally: Tally,
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
    yield from _rows_of_clicks(folder, seed, max_ind_range, history)
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


def _rows_of_clicks(folder: Path, seed: int, max_ind_range: int, history: int) -> Iterator[Rows]:
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
        yield from _rows_of_users(pairs, max_ind_range, history)
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


def _rows_of_users(pairs: np.ndarray, max_ind_range: int, history: int) -> Iterator[Rows]:
    """Rows of all clicks of some users: clicks by user and time, each before its negative."""
    click = pairs["click"]
    order = np.lexsort((pairs["number"], click["time"], click["user"]))
    pairs, click = pairs[order], click[order]
    num_clicks, user = len(pairs), click["user"]
    first = np.flatnonzero(np.concatenate([[True], user[1:] != user[:-1]])) if num_clicks else user
    first = np.repeat(first, np.diff(first, append=num_clicks))
    clicked = np.stack([click["item"], click["category"]], axis=1)
    size = max(1, min(CHUNK, CHUNK_VALUES // schema_of(history).num_columns))
    for start in range(0, num_clicks, size):
        among = slice(start, start + size)
        at = np.arange(start, min(start + size, num_clicks))
        before = clicks_before(clicked, first[among], at, history)
        both = []
        for item, category in ((click["item"], click["category"]), _negative(pairs)):
            own = (user[among], item[among], category[among])
            both.append(codes_of(*own, click["time"][among], before, history, max_ind_range))
        # (clicks, 2, C): a click, then its negative.
        codes = np.stack(both, axis=1).reshape(2 * len(at), -1)
        yield Rows(
            np.tile(np.array([1, 0], np.int8), len(at)),
            np.repeat(at - first[among], 2)[:, None].astype(np.int32),
            codes,
            np.repeat(click["time"][among], 2),
        )


def clicks_before(
    clicked: np.ndarray, first: np.ndarray, at: np.ndarray, history: int
) -> np.ndarray:
    """The last clicks of `clicked` (all, 2), a user's in order, in [first, at), for each of n.

    (n, L, 2) int64, the oldest first, with -1 behind the newest where there are fewer; `history` 0
    is the last one alone, as one of 1.
    """
    length = max(history, 1)
    number = np.minimum(at - first, length)[:, None]
    places = at[:, None] - number + np.arange(length)
    is_there = np.arange(length) < number
    if not len(clicked):
        return np.full((len(at), length, 2), -1, np.int64)
    found = clicked[np.where(is_there, places, 0)]
    return np.where(is_there[:, :, None], found, -1).astype(np.int64)


class History:
    """Each user's clicks in a log that is read line by line: how many, and the last ones.

    `history` as of `schema_of`.
    """

    def __init__(self, history: int) -> None:
        self.history = history
        self._known: dict[int, tuple[int, np.ndarray]] = {}  # number, (at most L, 2) last ones

    def candidates(self, rows: Rows, max_ind_range: int) -> Rows:
        """Lines as `FORMAT` has them, as inputs of the model; clicks among them are then history.

        What was clicked before is told by the order of the lines, not by their times.
        """
        assert rows.keys is not None
        user, item, category = (column.astype(np.int64) for column in rows.dense.T)
        order = np.argsort(user, kind="stable")
        sorted_user, clicked = user[order], (rows.labels == 1)[order]
        is_first = np.ones(len(user), bool)
        is_first[1:] = sorted_user[1:] != sorted_user[:-1]
        starts = np.flatnonzero(is_first)
        of_user = is_first.cumsum() - 1  # (n,) which user
        none = (0, np.empty((0, 2), np.int64))
        known = [self._known.get(one, none) for one in sorted_user[starts].tolist()]
        num_old = np.array([len(last) for _, last in known], np.int64)
        so_far = clicked.cumsum()
        num_new = np.diff(np.append(so_far[starts] - clicked[starts], so_far[-1:]))
        # All clicks, user by user: those known from before, then those of these lines.
        first = np.cumsum(num_old + num_new) - num_old - num_new
        events = np.empty((int((num_old + num_new).sum()), 2), np.int64)
        rank = so_far - clicked - (so_far - clicked)[starts][of_user]
        at = (first + num_old)[of_user] + rank
        events[at[clicked]] = np.stack([item, category], axis=1)[order[clicked]]
        position = np.array([number for number, _ in known], np.int64)[of_user] + rank
        for one, (number, last), start, new in zip(
            sorted_user[starts].tolist(), known, first.tolist(), num_new.tolist(), strict=True
        ):
            end = start + len(last) + new
            events[start : start + len(last)] = last
            kept = events[max(start, end - max(self.history, 1)) : end].copy()
            self._known[one] = (number + new, kept)
        before = clicks_before(events, first[of_user], at, self.history)
        back = np.empty(len(user), np.int64)
        back[order] = np.arange(len(user))
        own = (user, item, category, rows.keys, before[back])
        codes = codes_of(*own, self.history, max_ind_range)
        return Rows(rows.labels, position[back][:, None].astype(np.int32), codes, rows.keys)


def hours_of(times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hour of day and weekday (UTC+8) of times in seconds since 1970."""
    seconds = times - START
    return seconds // 3600 % 24, (seconds // DAY + WEEKDAY_OF_START) % 7


def codes_of(
    user: np.ndarray,
    item: np.ndarray,
    category: np.ndarray,
    time: np.ndarray,
    before: np.ndarray,
    history: int,
    max_ind_range: int,
) -> np.ndarray:
    """Codes (n, C) of the features; `before` (n, L, 2) as `clicks_before` gives it."""
    own = np.column_stack([user, item, category, *hours_of(time)]).astype(np.int64)
    # (n, 2 L): all items, then all categories.
    values = np.concatenate(
        [own, before.swapaxes(1, 2).reshape(len(own), 2 * before.shape[1])], axis=1
    )
    if max_ind_range > 0:  # of all but what is empty, -1
        values = np.where(values < 0, -1, values % max_ind_range)
    codes = (values + 1).astype(np.uint64)
    if history:
        codes[:, len(TABLES) :][values[:, len(TABLES) :] < 0] = ABSENT
    return codes


def _negative(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return pairs["item"], pairs["category"]
