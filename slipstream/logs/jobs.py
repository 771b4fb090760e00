"""A log's raw files to parts: one after another on all cores, or several at once, a process each.

A file's parts depend on the file alone, but for where one ends and the next begins, and on that no
byte of the processed file depends; so it is the same for any number of processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from tqdm import tqdm

from slipstream.logs import taobao
from slipstream.logs.encoding import encode_file
from slipstream.logs.formats import LogFormat, Schema
from slipstream.logs.rawfile import RawFile, Tally, parse_file
from slipstream.logs.rows import Rows
from slipstream.logs.selection import Choice, chooser
from slipstream.tools.output import stage_bar, survive
from slipstream.tools.runtime import THREADS_VARIABLE, num_threads

SECONDS_SHOWN = 0.3  # between two looks at how far the processes are


@dataclass(frozen=True)
class Reading:
    """How raw files become parts.

    Attributes:
        folder: of the work.
        data_set, log_format, schema, choice: of the log.
        max_ind_range, bad_lines: options of preprocessing.
        block_bytes: of a file, read at once.
        max_bytes: memory that the vocabularies of all files at hand may take.
    """

    folder: Path
    data_set: str
    log_format: LogFormat
    schema: Schema
    choice: Choice
    max_ind_range: int
    bad_lines: int
    block_bytes: int
    max_bytes: int

    def encode(self, number: int, raw: RawFile, num_bad: int, show: Callable[[int], None]) -> int:
        """Encode a file; returns its bad lines. `num_bad`: of files before; `show`: bytes read."""
        tally = Tally(self.bad_lines, num_bad)
        if self.data_set == "taobao":
            rows = taobao.read_rows(
                *(
                    raw,
                    self.folder / "clicks",
                    self.choice.seed,
                    self.block_bytes,
                    self.max_ind_range,
                    taobao.history_of(self.schema.layout),
                ),
                tally,
            )
        else:
            rows = parse_file(raw, self.log_format, self.block_bytes, self.max_ind_range, tally)
        choose = chooser(self.choice, self.schema, number, tally.drop)
        chosen = with_progress(map(choose, rows), raw, show)
        encode_file(self.folder, self.schema, self.max_bytes, number, chosen, tally, raw.describe)
        return tally.dropped.get("bad line", 0)


def with_progress(
    rows: Iterator[Rows], raw: RawFile, show: Callable[[int], None]
) -> Iterator[Rows]:
    """The same rows, while `show` is told how many more bytes of their file were read."""
    num_shown = 0
    for block in rows:
        show(raw.num_read - num_shown)
        num_shown = raw.num_read
        yield block
    show(raw.num_read - num_shown)


def encode_files(
    reading: Reading, raws: Sequence[RawFile], done: dict[int, dict[str, Any]], num_jobs: int
) -> int:
    """Encode every raw file that is not `done`, in `num_jobs` processes where it is over 1.

    Returns the bad lines of all files. Raises `ValueError` for a file that is no log.
    """
    num_bad = sum(info["dropped"].get("bad line", 0) for info in done.values())
    num_bytes = sum(raw.size_and_time["bytes"] for raw in raws)
    left = [number for number in range(len(raws)) if number not in done]
    with stage_bar(total=num_bytes, unit="B", unit_scale=True, desc="encoding") as bar:
        bar.update(sum(raws[number].size_and_time["bytes"] for number in done))
        if num_jobs < 2 or len(left) < 2:
            for number in left:
                num_bad += reading.encode(number, raws[number], num_bad, bar.update)
            return num_bad
        num_jobs = min(num_jobs, len(left))
        return num_bad + _encode_at_once(reading, raws, left, num_bad, num_jobs, bar)


def check_bad_lines(num_bad: int, most: int) -> None:
    """Raise `ValueError` for more bad lines than are left out: files at once count each its own."""
    if num_bad > most:
        raise ValueError(
            f"the files have {num_bad:,} bad lines in all; --bad-lines skip:{most} leaves out fewer"
        )


def _encode_at_once(
    reading: Reading,
    raws: Sequence[RawFile],
    left: Sequence[int],
    num_bad: int,
    num_jobs: int,
    bar: tqdm,
) -> int:
    """Encode files in processes of their own; returns their bad lines."""
    context = multiprocessing.get_context("spawn")  # polars' threads do not survive a fork
    num_read = context.Value("q", 0)
    of_one = replace(reading, max_bytes=reading.max_bytes // num_jobs)
    threads = max(1, num_threads() // num_jobs)
    before = multiprocessing.active_children()
    executor = ProcessPoolExecutor(num_jobs, context, _begin, (num_read, threads))
    try:
        waiting: Collection[Future[int]] = [
            executor.submit(_encode, of_one, number, raws[number].given, num_bad) for number in left
        ]
        found, num_shown = 0, 0
        while waiting:
            ended, waiting = wait(waiting, SECONDS_SHOWN, FIRST_COMPLETED)
            found += sum(future.result() for future in ended)
            bar.update(num_read.value - num_shown)
            num_shown = num_read.value
        return found
    except BaseException:
        for process in set(multiprocessing.active_children()) - set(before):
            process.kill()  # what it has not finished is made again
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _begin(num_read: Any, threads: int) -> None:
    """Begin a process: so many threads, no signals of its own, its end with its parent's."""
    survive()
    os.environ[THREADS_VARIABLE] = os.environ["POLARS_MAX_THREADS"] = str(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent's
    _encode.num_read = num_read  # type: ignore[attr-defined]
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        wait_for([parent.sentinel])
        os._exit(1)  # else it would write beside the next run's processes

    threading.Thread(target=end, daemon=True).start()


def _encode(reading: Reading, number: int, given: tuple[Any, ...], num_bad: int) -> int:
    """`Reading.encode` in a process of its own."""
    num_read = _encode.num_read  # type: ignore[attr-defined]

    def show(num_bytes: int) -> None:
        with num_read.get_lock():
            num_read.value += num_bytes

    return reading.encode(number, RawFile(*given), num_bad, show)
