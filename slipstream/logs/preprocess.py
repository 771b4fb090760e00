"""Turn raw click logs into one processed .npz file that the trainers map into memory.

    python data_utils.py --data-set kaggle --raw-data-file input/kaggle/train.txt

The log is streamed once, in blocks of whole lines, parsed on all cores and checked to the last
byte. A category's id is its rank among the sorted distinct values of its column (texts: of their
digests), empty first, so ids depend on the log alone. Price: 2 s per million rows of Criteo on 2
cores; disk for the rows (157 bytes each for Criteo), and for 8 million more while it runs; memory
for the distinct categories of 8 million rows, at most --max-memory. A run that was interrupted goes
on after the last raw file, table or part that was finished; a run that finds its file up to date
does nothing.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slipstream.logs import sources, taobao
from slipstream.logs.columnfile import read_column_file
from slipstream.logs.folders import root_of
from slipstream.logs.formats import (
    FORMATS,
    LogFormat,
    Schema,
    Split,
    describe_format,
    format_of,
    split_of,
)
from slipstream.logs.jobs import Reading, check_bad_lines, encode_files
from slipstream.logs.manifests import manifest_of_log
from slipstream.logs.parquet import check_types
from slipstream.logs.rawfile import BLOCK_BYTES, RawFile, is_same_file
from slipstream.logs.report import print_summary, report_lines
from slipstream.logs.selection import Choice
from slipstream.logs.stages import Work, remove_work, work_folder
from slipstream.logs.vocabulary import Known, known_of
from slipstream.tools.locks import exclusive
from slipstream.tools.npz import open_npz
from slipstream.tools.output import say_current
from slipstream.tools.places import kind_of_place, resolved
from slipstream.tools.runtime import (
    available_memory_bytes,
    check_free_disk,
    num_threads,
    read_json,
)

VERSION = 3
MAX_NOTES_BYTES = 1 << 20
PROCESS_BYTES = 150 << 20  # Python and its libraries
MIN_STAGE_BYTES = 128 << 20
BLOCK_COPIES = 6  # of a block's bytes, in all forms it takes while it is parsed


def preprocess(
    data_set: str,
    raw_data_file: str | Path,
    processed_data_file: str | Path | None = None,
    *,
    columns: str | Path | None = None,
    test_data_file: str | Path | None = None,
    split: str | None = None,
    num_days: int = 24,
    max_ind_range: int = -1,
    min_count: int = 1,
    data_sub_sample_rate: float = 0.0,
    sub_sample_held_out: bool = False,
    bad_lines: int = 0,
    max_memory: int | None = None,
    seed: int = 123,
    jobs: int = 1,
    extend: str | Path | None = None,
    history: int = 0,
    verbose: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> bool:
    """Build `processed_data_file` from a raw log; False when it was up to date already.

    Raises `ValueError` (bad options, a bad line, a corrupt file) and `OSError` (missing file, full
    disk); the output is then what it was before. Raw files that were encoded to their ends are kept
    in `<processed_data_file>.work` for the next run. With `jobs` over 1, so many files are read at
    once, in processes that import the caller's main module. With `extend`, a processed file of the
    same columns, values that it holds keep their ids, others follow, and dense columns are
    standardized as there. With `verbose` the report of the columns is printed, too.
    """
    check_numbers(data_set, num_days, max_ind_range, min_count, data_sub_sample_rate)
    log_format = choose_format(data_set, columns)
    roots, paths, first_test = files_of(data_set, raw_data_file, test_data_file, num_days, columns)
    rates = (data_sub_sample_rate, seed, sub_sample_held_out, min_count)
    choice = Choice(*rates, first_test, len(paths))
    log_format = sources.as_found(log_format, paths) if data_set == "custom" else log_format
    split_by = (split, test_data_file is not None)
    schema = schema_of(data_set, log_format, *split_by, max_ind_range, history)
    processed = target_of(data_set, raw_data_file, processed_data_file, extend)
    options: dict[str, Any] = {"max_ind_range": max_ind_range, "bad_lines": bad_lines}
    options |= options_of(data_set, choice, schema, num_days, max_ind_range, history)
    known = None
    if extend is not None:
        log_format, known = extending(log_format, schema, extend, data_set, max_ind_range)
        options["extends"] = known.describe()
    manifest = manifest_of(data_set, options, log_format)
    with writable(processed), exclusive(processed.parent):
        raws = [RawFile(path, len(paths) > 1, root_of(path, roots)) for path in paths]
        if is_up_to_date(processed, manifest, raws, verbose):
            return False
        if schema.split.rule == "last day" and not data_sub_sample_rate and max_ind_range == -1:
            manifest |= source_notes(raw_data_file, paths)
        of_log = (work_folder(processed), data_set, log_format, schema, choice)
        reading = Reading(*of_log, max_ind_range, bad_lines, block_bytes, 0)
        numbers, seconds = build(processed, raws, manifest, reading, max_memory, jobs, known)
        print_summary(processed, numbers, seconds, verbose)
        return True


def files_of(
    data_set: str,
    raw_data_file: str | Path,
    test_data_file: str | Path | None,
    num_days: int,
    columns: str | Path | None,
) -> tuple[list[str | Path], list[Path], int | None]:
    """What was named, all its files, and the number of the first held-out one; None: not so."""
    roots = [root for root in (raw_data_file, test_data_file) if root is not None]
    found = [sources.find_raw_files(data_set, root, num_days, columns) for root in roots]
    first_test = len(found[0]) if test_data_file is not None else None
    return roots, [path for of_root in found for path in of_root], first_test


def check_numbers(
    data_set: str, num_days: int, max_ind_range: int, min_count: int, data_sub_sample_rate: float
) -> None:
    """Raise `ValueError` for an option out of its range."""
    if max_ind_range < 1 and max_ind_range != -1:
        raise ValueError(f"--max-ind-range: got {max_ind_range}; expected -1 (off) or at least 1")
    if data_set == "terabyte" and num_days < 2:
        raise ValueError(f"--num-days: got {num_days}; expected at least 2, the last is held out")
    if not 0 <= data_sub_sample_rate < 1:
        got = f"--data-sub-sample-rate: got {data_sub_sample_rate}"
        raise ValueError(f"{got}; expected at least 0 and less than 1")
    if min_count < 1:
        raise ValueError(f"--min-count: got {min_count}; expected at least 1, which is off")


def schema_of(
    data_set: str,
    log_format: LogFormat,
    split: str | None,
    has_test_file: bool,
    modulus: int,
    history: int,
) -> Schema:
    """What the rows become, by the flags that say which are held out."""
    if history and data_set != "taobao":
        raise ValueError("--history goes with --data-set taobao; other logs name their sequences")
    schema = taobao.schema_of(history) if data_set == "taobao" else log_format.schema
    if split is not None:
        try:
            schema = dataclasses.replace(schema, split=split_of(split))
        except ValueError as error:
            raise ValueError(f"--split: {error}") from None
    if has_test_file:
        if schema.split.rule != "last day":
            raise ValueError("--test-data-file and --split exclude each other")
        schema = dataclasses.replace(schema, split=Split("file"))
    if schema.split.rule == "random":
        schema = dataclasses.replace(schema, has_keys=True)
    if modulus > 0 and log_format.lax:
        schema = dataclasses.replace(schema, moduli=log_format.text_moduli(modulus))
    return schema


def extending(
    log_format: LogFormat, schema: Schema, extend: str | Path, data_set: str, max_ind_range: int
) -> tuple[LogFormat, Known]:
    """How to read a log whose file extends another; `ValueError`: they have other columns."""
    known = known_of(extend)
    described = known.vocabulary.described
    columns = describe_format(log_format) if data_set == "custom" else None
    asked = {"data_set": data_set, "max_ind_range": max_ind_range}
    there, here = {**described}, {**asked}
    if data_set == "taobao":
        options = manifest_of_log(open_npz(extend), extend).get("options") or {}
        there["history"] = options.get("history", 0)
        here["history"] = taobao.history_of(schema.layout)
    if columns is not None and isinstance(there["columns"], dict):
        # What a file looks like may change from day to day, and what is held out.
        before = format_of(described["columns"])
        for what, one in ((here, log_format), (there, before)):
            meant = describe_format(one.unspelled(one.names))
            what.update(json.loads(json.dumps({key: meant[key] for key in ("order", "details")})))
        of_kind = dict(zip(columns["names"], columns["kinds"], strict=True))
        here["kinds"] = {name: of_kind[name] for name in columns["order"]}
        of_kind = dict(zip(before.names, before.kinds, strict=True))
        there["kinds"] = {name: of_kind.get(name) for name in columns["order"]}
    for key, value in json.loads(json.dumps(here)).items():
        if there.get(key) != value:
            raise ValueError(f"--extend: {key} is {there.get(key)!r} there, and {value!r} here")
    whole = known.vocabulary.number_tables(schema.table_names)
    return dataclasses.replace(log_format, integers=log_format.of_tables(whole)), known


def options_of(
    data_set: str, choice: Choice, schema: Schema, num_days: int, modulus: int, history: int
) -> dict[str, Any]:
    """Options as a manifest has them; those that older files have no word of only where they say
    something.
    """
    options: dict[str, Any] = {
        "data_sub_sample_rate": choice.rate,
        "seed": choice.seed if choice.rate or data_set == "taobao" else None,
        "num_days": num_days if data_set == "terabyte" else None,
    }
    if choice.min_count > 1:
        options["min_count"] = choice.min_count
    if schema.split.rule != "last day":
        options["split"] = dataclasses.asdict(schema.split)
    if choice.first_test_file is not None:
        options["first_test_file"] = choice.first_test_file
    if choice.rate and not choice.thins_held_out:
        options["held_out"] = "whole"
    if modulus > 0:
        options["empty"] = "a value of its own"  # it was hash 0 once
    if history:
        options["history"] = history
    return options


def manifest_of(data_set: str, options: dict[str, Any], log_format: LogFormat) -> dict[str, Any]:
    """What a processed file depends on, besides its log; what it does not is None."""
    described = None
    if data_set == "custom":
        described = describe_format(log_format)
    options = {**options, "columns": described}
    return {"version": VERSION, "data_set": data_set, "options": options}


def target_of(
    data_set: str,
    raw_data_file: str | Path,
    processed_data_file: str | Path | None,
    extend: str | Path | None = None,
) -> Path:
    """The file to write, of a link where it leads.

    `ValueError`: it is of another kind, or the one to `extend`.
    """
    processed = Path(processed_data_file or sources.default_processed_file(data_set, raw_data_file))
    if processed.suffix != ".npz" or (kind := kind_of_place(processed)):
        what = f", {kind}" if processed.suffix == ".npz" else ""
        raise ValueError(
            f"--processed-data-file: got {processed}{what}; expected a file name in .npz"
        )
    if extend is not None and os.path.realpath(extend) == os.path.realpath(processed):
        raise ValueError(f"--extend {extend} is the file to write; choose another to write")
    return resolved(processed)


@contextmanager
def writable(processed: Path) -> Iterator[None]:
    """Say what to do where no file can be written beside `processed`, or its folder not made."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or "")
        is_ours = name.startswith(str(processed)) or Path(name) in processed.parents
        is_refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        if not (name and is_ours and is_refused):
            raise
        raise OSError(
            f"{processed.parent} cannot be written to ({error.strerror}); choose a place that can "
            "by --processed-data-file"
        ) from error


def choose_format(data_set: str, columns: str | Path | None) -> LogFormat:
    """The format of a data set's lines; `ValueError` where --columns is missing or unused."""
    if (columns is not None) != (data_set == "custom"):
        raise ValueError("--columns goes with --data-set custom, and custom needs it")
    if columns is not None:
        return read_column_file(columns)
    if data_set == "taobao":
        return taobao.FORMAT
    if data_set not in FORMATS:
        raise ValueError(f"--data-set: got {data_set!r}; expected one of {sources.DATA_SETS}")
    return FORMATS[data_set]


def build(
    processed: Path,
    raws: Sequence[RawFile],
    manifest: dict[str, Any],
    reading: Reading,
    max_memory: int | None,
    jobs: int,
    known: Known | None = None,
) -> tuple[dict[str, Any], float]:
    """Go through the stages of `slipstream.logs.stages`, as far as they are not done already.

    Returns what the manifest says, and the seconds.
    """
    started = time.perf_counter()
    log_format, schema, choice = reading.log_format, reading.schema, reading.choice
    num_jobs = 1 if manifest["data_set"] == "taobao" else min(jobs, len(raws))
    num_jobs, stage_bytes = check_memory(max_memory, reading.block_bytes, num_jobs)
    paths = [raw.path for raw in raws]
    identity = {**manifest, "files": [raw.size_and_time for raw in raws]}
    work = Work(processed, identity, schema, choice, stage_bytes, known)
    done = work.files_done()
    if done or work.is_encoded:
        finished = "all" if work.is_encoded else f"{len(done)} of {len(paths)}"
        print(f"going on with {work.folder}: {finished} raw files are encoded")
    try:
        if not work.is_encoded:
            if log_format.separator is None:
                check_types([(raw.path, raw.folder_values) for raw in raws], log_format)
            rate = 0.0 if choice.is_late(schema) else choice.rate
            check_disk(paths, log_format, rate, schema, work)
            reading = dataclasses.replace(reading, max_bytes=stage_bytes)
            num_bad = encode_files(reading, raws, work.files_done(), num_jobs)
            try:
                check_bad_lines(num_bad, reading.bad_lines)
                work.plan(manifest)
            except ValueError as error:  # of the whole log: no later run could go on
                work.remove()
                raise ValueError(f"{paths[0]}: {error}") from None
        numbers = work.write()
    except BaseException:
        if not work.files_done() and not work.is_encoded:
            work.remove()
        elif work.folder.exists():
            print(f"what is finished is kept in {work.folder}: run again to go on")
        raise
    return numbers, time.perf_counter() - started


def is_up_to_date(
    processed: Path, manifest: dict[str, Any], raws: Sequence[RawFile], verbose: bool = False
) -> bool:
    """Whether `processed` is whole and was built from the same files with the same options.

    Then what a killed run left beside it is deleted.
    """
    if not processed.exists():
        return False
    try:
        arrays = open_npz(processed)
    except (ValueError, OSError) as error:
        print(f"{error}: rebuilding")
        return False
    built = manifest_of_log(arrays, processed)
    if not built:
        raise ValueError(
            f"{processed} was not made by data_utils.py and is not replaced; choose another "
            "--processed-data-file (the trainers read it as it is)"
        )
    # JSON, as the manifest was: lists for tuples.
    if any(built.get(key) != value for key, value in json.loads(json.dumps(manifest)).items()):
        print(f"{processed} was built with other options: rebuilding")
        return False
    built_from = built.get("sources", [])
    if len(built_from) == len(raws) and all(map(is_same_file, built_from, raws)):
        remove_work(processed)
        say_current(processed)
        if verbose:
            print(*report_lines({**built, "days": arrays["days"].tolist()}), sep="\n")
        return True
    print(f"{processed} was built from another log: rebuilding")
    return False


def source_notes(raw_data_file: str | Path, paths: Sequence[Path]) -> dict[str, Any]:
    """`source_notes` of a whole log: the JSON object in `<raw file>.json`, where there is one."""
    for path in (Path(raw_data_file), *paths):
        notes_path = path.with_name(path.name + ".json")
        try:
            notes = read_json(notes_path) if notes_path.stat().st_size <= MAX_NOTES_BYTES else {}
        except (OSError, ValueError):  # whoever left it
            continue
        if notes:
            return {"source_notes": notes}
    return {}


def check_memory(max_memory: int | None, block_bytes: int, num_jobs: int) -> tuple[int, int]:
    """How many files may be read at once, and the memory for the stages' vocabularies.

    `max_memory` (None: half of what is free) is the bound of all together, `num_jobs` what is
    wished for.
    """
    available, cores = available_memory_bytes(), num_threads()

    def needed(num: int) -> int:
        num_blocks = num * (max(1, cores // num) + 2)
        return num * PROCESS_BYTES + BLOCK_COPIES * num_blocks * block_bytes + MIN_STAGE_BYTES

    if max_memory is None:
        max_memory = max(available // 2, needed(1))
    if max_memory < needed(1) or available < needed(1):
        raise ValueError(
            f"--max-memory: {max_memory / 1e6:,.0f} MB, and {available / 1e6:,.0f} MB are free;"
            f" expected at least {needed(1) / 1e6:,.0f} MB of both on {cores} cores"
        )
    if max_memory > available:
        raise ValueError(
            f"--max-memory: {max_memory / 1e9:.2f} GB, but {available / 1e9:.2f} GB are free"
        )
    while needed(num_jobs) > max_memory:
        num_jobs -= 1
    if num_jobs > 1:
        memory = f"{max_memory / 1e9:.2f} GB of memory (--max-memory)"
        print(f"reading {num_jobs} files at once (--jobs), in at most {memory}")
    return num_jobs, max_memory - needed(num_jobs) + MIN_STAGE_BYTES


def check_disk(
    paths: Sequence[Path],
    log_format: LogFormat,
    data_sub_sample_rate: float,
    schema: Schema,
    work: Work,
) -> None:
    """Estimate the rows from the log's first lines and raise `OSError` when they do not fit."""
    num_lines, positive_share = sources.estimate_rows(paths, log_format)
    num_rows = round(num_lines * (1 - data_sub_sample_rate * (1 - positive_share)))
    needed_bytes = 0
    if log_format is taobao.FORMAT:
        needed_bytes = num_lines * taobao.DISK_BYTES
        num_rows = 2 * num_lines
    is_unsorted = log_format.key_kind in ("order", "time") or schema.split.rule == "random"
    needed_bytes += work.disk_bytes(num_rows, is_unsorted)
    final_bytes = num_rows * schema.row_bytes
    print(
        f"preprocessing {paths[0]}: about {num_rows:,} rows; needs {needed_bytes / 1e9:,.2f} GB of"
        f" disk, keeps {final_bytes / 1e9:,.2f} GB"
    )
    check_free_disk(work.processed.parent, needed_bytes - work.num_bytes(), "preprocessing")
