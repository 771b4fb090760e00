"""Turn raw Criteo click logs into one processed .npz file that the trainers map into memory.

    python data_utils.py --data-set kaggle --raw-data-file input/kaggle/train.txt

The log is streamed once, in blocks of whole lines, decoded column by column with numpy and checked
to the last byte. Price: about 2 seconds per million rows on 2 cores; 157 bytes of disk per row, and
as much again while it runs; memory for the distinct categories (8 to 24 bytes each), not for the
rows. A category's id is its rank among the sorted distinct values of its column, empty first, so
ids depend on the log alone. A second run finds the file up to date and does nothing.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from slipstream.cli import Parser, add_seed_flag, positive_int, run_script, share
from slipstream.npz import ArrayStream, open_npz, pack_manifest, unpack_manifest, write_npz
from slipstream.runtime import check_free_disk, peak_rss_bytes

VERSION = 1
NUM_DENSE = 13
NUM_TABLES = 26
NUM_FIELDS = 1 + NUM_DENSE + NUM_TABLES
KAGGLE_DAYS = 7
MAX_INT32 = 2**31 - 1
MAX_EMBEDDING_ROWS = MAX_INT32  # of all tables: slots are int32
ROW_BYTES = 1 + 4 * NUM_DENSE + 4 * NUM_TABLES
KEYS = ("X_int", "X_cat", "y", "counts", "days")
GZIP_RATIO = 3.5  # a Criteo log's size over its .gz's, for the estimate alone
BLOCK_BYTES = 1 << 24  # fastest of 2 to 64 MB
SAMPLE_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 16  # no valid line has more than 500
PAD = bytes(8)  # a field's 8 bytes can be read at once even at the end of a block
ID_BITS = 31
ID_MASK = (1 << ID_BITS) - 1


class RawFile:
    """One raw file, plain or gzip, read once in blocks of lines, hashed and counted on the way."""

    def __init__(self, path: Path) -> None:
        stat = path.stat()
        self.path = path
        self.num_bytes, self.mtime_ns = stat.st_size, stat.st_mtime_ns
        self.num_read = 0
        self._hash = hashlib.sha256()

    def describe(self) -> dict[str, Any]:
        """What the manifest keeps of a file that has been read to its end."""
        sha256 = self._hash.hexdigest()
        numbers = {"bytes": self.num_bytes, "mtime_ns": self.mtime_ns}
        return {"name": self.path.name, **numbers, "sha256": sha256}

    def read(self, size: int = -1) -> bytes:
        """Read raw bytes; this method makes the object a file to `gzip`."""
        data = self._file.read(size)
        self._hash.update(data)
        self.num_read += len(data)
        return data

    def blocks(self, block_bytes: int) -> Iterator[bytes]:
        """Yield blocks of about `block_bytes`: whole lines, each with its newline, then PAD.

        Raises `ValueError` for an empty file, a .gz that is truncated or not gzip, and a line
        longer than any log has.
        """
        with open(self.path, "rb") as self._file:
            stream: Any = self
            if self.path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=stream, mode="rb")
            rest, is_empty = b"", True
            while chunk := self._read_text(stream, block_bytes):
                is_empty = False
                cut = chunk.rfind(b"\n") + 1
                if cut:
                    yield b"".join((rest, memoryview(chunk)[:cut], PAD))
                    rest = chunk[cut:]
                else:
                    rest += chunk
                if len(rest) > max(block_bytes, MAX_LINE_BYTES):
                    raise ValueError(
                        f"{self.path} has a line of over {len(rest)} bytes; is it a log?"
                    )
            if is_empty:
                raise ValueError(f"{self.path} is empty; expected a Criteo log")
            if rest:
                yield rest + b"\n" + PAD

    def _read_text(self, stream: Any, size: int) -> bytes:
        try:
            return stream.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(
                f"{self.path} is truncated, corrupt or not gzip ({error}); fetch it again"
            ) from error


def read_ahead(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield from `blocks` while a thread fetches the next: reading and hashing release the GIL."""
    with ThreadPoolExecutor(1) as reader:
        pending = reader.submit(next, blocks, None)
        while (block := pending.result()) is not None:
            pending = reader.submit(next, blocks, None)
            yield block


class BadBlock(Exception):
    """The fast path met a line that it cannot take; `find_fault` says which, and why."""


def split_fields(block: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Find where the fields of a padded block start and end: two int64 arrays (40, rows)."""
    text = np.frombuffer(block, np.uint8)[: -len(PAD)]
    ends = np.flatnonzero(text <= ord("\n"))
    if len(ends) % NUM_FIELDS:
        raise BadBlock
    separators = np.full(NUM_FIELDS, ord("\t"), np.uint8)
    separators[-1] = ord("\n")
    if not (text[ends].reshape(-1, NUM_FIELDS) == separators).all():
        raise BadBlock
    starts = np.empty_like(ends)
    starts[0] = 0
    np.add(ends[:-1], 1, out=starts[1:])
    starts = np.ascontiguousarray(starts.reshape(-1, NUM_FIELDS).T)
    ends = np.ascontiguousarray(ends.reshape(-1, NUM_FIELDS).T)
    ends[-1] -= text[ends[-1] - 1] == ord("\r")
    return starts, ends


def words_at(block: bytes, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Fields of 0 to 8 bytes as uint64 words, first byte lowest, filled up with '0' on the left."""
    view: np.ndarray = np.ndarray((len(block) - 7,), "<u8", block, strides=(1,))
    bits = (lengths << 3).view(np.uint64)
    return view[starts] << (64 - bits) | np.uint64(0x3030303030303030) >> bits


def decode_hex(words: np.ndarray) -> tuple[np.ndarray, np.bool_]:
    """Words of 8 hex digits -> values below 2^32 (uint64), and whether all words are hex.

    SWAR: each step works on all 8 bytes of a word at once, no byte ever carrying into the next.
    """
    seven_bits = words & 0x7F7F7F7F7F7F7F7F
    lower = seven_bits | 0x2020202020202020
    digits = (seven_bits + 0x5050505050505050) & ~(seven_bits + 0x4646464646464646)
    letters = (lower + 0x1F1F1F1F1F1F1F1F) & ~(lower + 0x1919191919191919)
    is_hex = (digits | letters) & ~words & 0x8080808080808080 == 0x8080808080808080
    values = (words & 0x0F0F0F0F0F0F0F0F) + (words >> 6 & 0x0101010101010101) * 9
    values = (values << 4 | values >> 8) & 0x00FF00FF00FF00FF
    values = (values << 8 | values >> 16) & 0x0000FFFF0000FFFF
    return (values << 16 | values >> 32) & 0xFFFFFFFF, is_hex.all()


def decode_decimal(words: np.ndarray) -> tuple[np.ndarray, np.bool_]:
    """Words of 8 decimal digits -> values (uint64), and whether all words are decimal."""
    values = words ^ 0x3030303030303030
    is_decimal = (
        (values & 0x7F7F7F7F7F7F7F7F) + 0x7676767676767676 | values
    ) & 0x8080808080808080 == 0
    values = (values * 10 + (values >> 8)) & 0x00FF00FF00FF00FF
    values = (values * 100 + (values >> 16)) & 0x0000FFFF0000FFFF
    return (values * 10000 + (values >> 32)) & 0xFFFFFFFF, is_decimal.all()


def decode_labels(block: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Fields `0` or `1` -> uint8."""
    labels = np.frombuffer(block, np.uint8)[starts] - ord("0")
    if (ends - starts != 1).any() or (labels > 1).any():
        raise BadBlock
    return labels


def decode_ints(block: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Fields of `-?[0-9]{1,16}` or nothing -> int32; empty and negative give 0."""
    negative = np.frombuffer(block, np.uint8)[starts] == ord("-")
    starts = starts + negative
    lengths = ends - starts
    longest = lengths.max(initial=0)
    if (negative & (lengths == 0)).any() or longest > 16:
        raise BadBlock
    tails = np.minimum(lengths, 8)
    values, valid = decode_decimal(words_at(block, ends - tails, tails))
    if longest > 8:
        heads, heads_valid = decode_decimal(words_at(block, starts, lengths - tails))
        values += heads * 10**8
        valid &= heads_valid
    values[negative] = 0
    if not valid or (values > MAX_INT32).any():
        raise BadBlock
    return values.astype(np.int32)


def decode_categories(
    block: bytes, starts: np.ndarray, ends: np.ndarray, max_ind_range: int
) -> np.ndarray:
    """Fields of up to 8 hex digits -> codes (uint64): 0 for an empty one, else hash + 1."""
    lengths = ends - starts
    if lengths.max(initial=0) > 8:
        raise BadBlock
    values, valid = decode_hex(words_at(block, starts, lengths))
    if not valid:
        raise BadBlock
    if max_ind_range > 0:
        return values % min(max_ind_range, 2**32) + 1  # an empty one counts as hash 0
    return (values + 1) * (lengths > 0)


def find_fault(block: bytes) -> tuple[int, str] | None:
    """Find a block's first bad line, in plain Python: its index and what is wrong with it."""
    for index, line in enumerate(block[: -len(PAD)].split(b"\n")[:-1]):
        fields = line.removesuffix(b"\r").split(b"\t")
        if len(fields) != NUM_FIELDS:
            return index, f": {len(fields)} columns; expected {NUM_FIELDS}"
        for column, field in enumerate(fields):
            reason = fault_of(column, field)
            if reason:
                return index, reason
    return None


def fault_of(column: int, field: bytes) -> str | None:
    """Say what is wrong with one field, or None."""
    shown = "'" + field[:40].decode("ascii", "backslashreplace") + "'"
    if column == 0:
        return None if field in (b"0", b"1") else f": label {shown}; expected 0 or 1"
    if not field:
        return None
    if column > NUM_DENSE:
        where = f", column {column + 1} (category {column - NUM_DENSE}): {shown}"
        is_hex = re.fullmatch(rb"[0-9a-fA-F]{1,8}", field)
        return None if is_hex else f"{where} is not a hexadecimal value of 1 to 8 digits"
    where = f", column {column + 1} (integer {column}): {shown}"
    if not re.fullmatch(rb"-?[0-9]{1,16}", field):
        return f"{where} is not a whole number of 1 to 16 digits"
    return f"{where} is more than {MAX_INT32}" if int(field) > MAX_INT32 else None


class Vocabulary:
    """A column's distinct codes with provisional ids, numbered as they are met.

    Kept as sorted uint64 entries `code << 31 | id` in a few runs of growing size (a code is at most
    2^32), so a new block costs its own length and all merges together V log V: 8 bytes a value.
    """

    def __init__(self) -> None:
        self.size = 0
        self._runs: list[np.ndarray] = []

    def encode(self, codes: np.ndarray) -> np.ndarray:
        """Codes (rows,) uint64 -> provisional ids (rows,) int32; new codes are added."""
        # numpy sorts integers with SIMD: `code << 31 | row` takes a third of an argsort's time.
        keys = codes << ID_BITS | np.arange(len(codes), dtype=np.uint64)
        keys.sort()
        rows = (keys & ID_MASK).view(np.int64)
        keys >>= ID_BITS
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        ids = self._ids_of(keys[first])
        encoded = np.empty(len(codes), np.int32)
        encoded[rows] = np.repeat(ids, np.diff(first, append=len(codes)))
        return encoded

    def _ids_of(self, codes: np.ndarray) -> np.ndarray:
        """Ids of sorted distinct codes."""
        ids = np.empty(len(codes), np.int32)
        unknown = np.arange(len(codes))
        wanted = codes << ID_BITS
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, wanted), len(run) - 1)
            entries = run[at]
            known = entries >> ID_BITS == wanted >> ID_BITS
            ids[unknown[known]] = entries[known] & ID_MASK
            unknown, wanted = unknown[~known], wanted[~known]
        if len(unknown):
            ids[unknown] = np.arange(self.size, self.size + len(unknown))
            self.size += len(unknown)
            self._runs.append(wanted | ids[unknown].astype(np.uint64))
        while len(self._runs) > 1 and 4 * len(self._runs[-1]) > len(self._runs[-2]):
            self._merge(2)
        return ids

    def _merge(self, num_runs: int) -> None:
        merged = np.concatenate(self._runs[-num_runs:])
        del self._runs[-num_runs:]
        merged.sort()
        self._runs.append(merged)

    def ranks(self) -> np.ndarray:
        """Rank of each provisional id among the sorted codes (int32); the vocabulary is spent."""
        self._merge(len(self._runs))
        ids = (self._runs.pop() & ID_MASK).astype(np.int32)
        ranks = np.empty(self.size, np.int32)
        ranks[ids] = np.arange(self.size, dtype=np.int32)
        return ranks


class Encoder:
    """Encodes blocks into three spool files (labels, dense values, provisional ids) in `folder`."""

    def __init__(self, folder: Path, max_ind_range: int) -> None:
        self.num_rows = self.num_positive = self.num_dropped = 0
        self.paths = {name: folder / name for name in ("y", "X_int", "X_cat")}
        self._max_ind_range = max_ind_range
        self._vocabularies = [Vocabulary() for _ in range(NUM_TABLES)]
        self._stack = ExitStack()
        self._pool = self._stack.enter_context(ThreadPoolExecutor(num_threads()))
        self._files = {
            name: self._stack.enter_context(open(path, "wb")) for name, path in self.paths.items()
        }

    def close(self) -> None:
        """Close the files and end the threads."""
        self._stack.close()

    def add(self, block: bytes, drop: Callable[[np.ndarray], np.ndarray] | None) -> None:
        """Encode one block. `drop` says from the labels which rows to leave out, undecoded."""
        starts, ends = split_fields(block)
        labels = decode_labels(block, starts[0], ends[0])
        if drop is not None:
            kept = np.flatnonzero(~drop(labels))
            self.num_dropped += len(labels) - len(kept)
            starts, ends, labels = starts[:, kept], ends[:, kept], labels[kept]
        if not len(labels):
            return
        dense = np.empty((len(labels), NUM_DENSE), np.int32)
        ids = np.empty((len(labels), NUM_TABLES), np.int32)

        def encode(field: int) -> None:
            if field <= NUM_DENSE:
                dense[:, field - 1] = decode_ints(block, starts[field], ends[field])
                return
            table = field - 1 - NUM_DENSE
            codes = decode_categories(block, starts[field], ends[field], self._max_ind_range)
            ids[:, table] = self._vocabularies[table].encode(codes)

        list(self._pool.map(encode, range(1, NUM_FIELDS)))
        self._check_num_embedding_rows()
        for name, array in (("y", labels.view(np.int8)), ("X_int", dense), ("X_cat", ids)):
            self._files[name].write(array.data)
        self.num_rows += len(labels)
        self.num_positive += int(labels.sum())

    def _check_num_embedding_rows(self) -> None:
        num_embedding_rows = sum(vocabulary.size for vocabulary in self._vocabularies)
        if num_embedding_rows > MAX_EMBEDDING_ROWS:
            raise ValueError(
                f"the tables have {num_embedding_rows} rows together; expected at most"
                f" {MAX_EMBEDDING_ROWS}: bound them with --max-ind-range, or read fewer --num-days"
            )

    def finish(self) -> tuple[dict[str, np.ndarray | ArrayStream], np.ndarray]:
        """The three arrays as streams from the spools, ids as ranks, and the rows per table."""
        for file in self._files.values():
            file.flush()
        counts = np.array([vocabulary.size for vocabulary in self._vocabularies], np.int64)
        ranks = list(self._pool.map(Vocabulary.ranks, self._vocabularies))

        def ranked() -> Iterator[np.ndarray]:
            for chunk in read_spool(self.paths["X_cat"], np.dtype(np.int32), NUM_TABLES):
                columns = enumerate(ranks)
                yield np.stack([rank[chunk[:, table]] for table, rank in columns], axis=1)

        int32, int8 = np.dtype(np.int32), np.dtype(np.int8)
        dense = read_spool(self.paths["X_int"], int32, NUM_DENSE)
        labels = (chunk[:, 0] for chunk in read_spool(self.paths["y"], int8, 1))
        return {
            "X_int": ArrayStream((self.num_rows, NUM_DENSE), int32, dense),
            "X_cat": ArrayStream((self.num_rows, NUM_TABLES), int32, ranked()),
            "y": ArrayStream((self.num_rows,), int8, labels),
        }, counts


def read_spool(path: Path, dtype: np.dtype, width: int) -> Iterator[np.ndarray]:
    """Yield a spool file's rows in chunks (2^16, width)."""
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, dtype, width << 16)):
            yield chunk.reshape(-1, width)


def num_threads() -> int:
    """Cores this process may use; a thread has one column in hand, and more than 16 only wait."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 16)


def find_raw_files(data_set: str, raw_data_file: str | Path, num_days: int) -> list[Path]:
    """The log's files in order; each plain or `.gz`. `FileNotFoundError` names a missing one."""
    raw = Path(raw_data_file)
    if data_set == "kaggle":
        names = [raw / "train.txt" if raw.is_dir() else raw]
        advice = "--raw-data-file takes Criteo Kaggle's train.txt, its .gz, or their folder"
    else:
        prefix = raw / "day" if raw.is_dir() else raw
        names = [prefix.with_name(f"{prefix.name}_{day}") for day in range(num_days)]
        advice = f"--num-days {num_days} reads day_0 to day_{num_days - 1}, each plain or .gz"
    paths = []
    for name in names:
        candidates = [name, name.with_name(name.name + ".gz")]
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise FileNotFoundError(f"{name} does not exist, nor does its .gz; {advice}")
        paths.append(found[0])
    return paths


def default_processed_file(data_set: str, raw_data_file: str | Path) -> Path:
    """`<stem>_processed.npz` beside the raw file (in it, where the raw path is a folder)."""
    raw = Path(raw_data_file)
    if raw.is_dir():
        raw /= "train.txt" if data_set == "kaggle" else "day"
    return raw.with_name(raw.name.removesuffix(".gz").removesuffix(".txt") + "_processed.npz")


def preprocess(
    data_set: str,
    raw_data_file: str | Path,
    processed_data_file: str | Path | None = None,
    *,
    num_days: int = 24,
    max_ind_range: int = -1,
    data_sub_sample_rate: float = 0.0,
    seed: int = 123,
    block_bytes: int = BLOCK_BYTES,
) -> bool:
    """Build `processed_data_file` from a raw log; False when it was up to date already.

    Raises `ValueError` (bad options, a bad line, a corrupt file) and `OSError` (missing file, full
    disk); the output is then what it was before, and nothing else is left behind.
    """
    if data_set not in ("kaggle", "terabyte"):
        raise ValueError(f"--data-set: got {data_set!r}; expected kaggle or terabyte")
    if max_ind_range < 1 and max_ind_range != -1:
        raise ValueError(f"--max-ind-range: got {max_ind_range}; expected -1 (off) or at least 1")
    if not 0 <= data_sub_sample_rate < 1:
        got = f"--data-sub-sample-rate: got {data_sub_sample_rate}"
        raise ValueError(f"{got}; expected at least 0 and less than 1")
    processed = Path(processed_data_file or default_processed_file(data_set, raw_data_file))
    if processed.suffix != ".npz" or processed.is_dir():
        raise ValueError(f"--processed-data-file: got {processed}; expected a file name in .npz")
    paths = find_raw_files(data_set, raw_data_file, num_days)
    # Options that the result does not depend on are left out, so that they never force a rebuild.
    options = {
        "max_ind_range": max_ind_range,
        "data_sub_sample_rate": data_sub_sample_rate,
        "seed": seed if data_sub_sample_rate else None,
        "num_days": num_days if data_set == "terabyte" else None,
    }
    manifest = {"version": VERSION, "data_set": data_set, "options": options}
    if is_up_to_date(processed, manifest, paths):
        print(f"{processed} is up to date")
        return False
    processed.parent.mkdir(parents=True, exist_ok=True)
    check_disk(paths, data_sub_sample_rate, processed.parent)
    spool = processed.with_name(processed.name + ".spool.partial")
    try:
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir()
        manifest |= {"source_notes": notes} if (notes := source_notes(raw_data_file, paths)) else {}
        build(processed, spool, paths, manifest, block_bytes)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return True


def build(
    processed: Path, spool: Path, paths: Sequence[Path], manifest: dict[str, Any], block_bytes: int
) -> None:
    """Stream the raw files through an encoder and write the result, `manifest` completed in it."""
    started = time.perf_counter()
    encoder = Encoder(spool, manifest["options"]["max_ind_range"])
    try:
        sources, day_ends = encode_files(encoder, paths, manifest["options"], block_bytes)
        num_rows = encoder.num_rows
        if num_rows == 0:
            raise ValueError("--data-sub-sample-rate left no rows; expected at least one")
        days = np.array([0, *day_ends], np.int64)
        if manifest["data_set"] == "kaggle":
            days = equal_parts(num_rows)
        streams, counts = encoder.finish()
        numbers = {
            "num_rows": num_rows,
            "num_positive": encoder.num_positive,
            "rows_dropped": encoder.num_dropped,
            "seconds": round(time.perf_counter() - started, 3),
        }
        members = {"counts": counts, "days": days}
        members["manifest"] = pack_manifest({**manifest, "sources": sources, **numbers})
        write_npz(processed, {**streams, **members})
    finally:
        encoder.close()
    print_summary(processed, numbers, counts, time.perf_counter() - started)


def encode_files(
    encoder: Encoder, paths: Sequence[Path], options: dict[str, Any], block_bytes: int
) -> tuple[list[dict[str, Any]], list[int]]:
    """Encode every file; what the manifest keeps of each, and the number of rows after each."""
    sources, day_ends = [], []
    num_bytes = sum(path.stat().st_size for path in paths)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for day, path in enumerate(paths):
            drop = None
            if options["data_sub_sample_rate"]:
                drop = make_drop(options["data_sub_sample_rate"], options["seed"], day)
            raw = RawFile(path)
            num_lines = num_shown = 0
            for block in read_ahead(raw.blocks(block_bytes)):
                try:
                    encoder.add(block, drop)
                except BadBlock:
                    index, reason = find_fault(block) or (0, ": unreadable")
                    raise ValueError(f"{path}, line {num_lines + index + 1}{reason}") from None
                num_lines += block.count(b"\n")
                bar.update(raw.num_read - num_shown)
                num_shown = raw.num_read
            sources.append(raw.describe())
            day_ends.append(encoder.num_rows)
    return sources, day_ends


def make_drop(rate: float, seed: int, day: int) -> Callable[[np.ndarray], np.ndarray]:
    """A function labels -> rows to drop: each negative row with probability `rate`.

    It takes one draw per row, in order, so the choice does not depend on how rows are blocked.
    """
    rng = np.random.default_rng([seed, day])
    return lambda labels: (rng.random(len(labels)) < rate) & (labels == 0)


def equal_parts(num_rows: int) -> np.ndarray:
    """Offsets of Kaggle's days: 7 contiguous parts, the first `num_rows % 7` one row longer."""
    if num_rows < KAGGLE_DAYS:
        raise ValueError(f"got {num_rows} rows; expected at least {KAGGLE_DAYS} rows, one a day")
    size, longer = divmod(num_rows, KAGGLE_DAYS)
    part = np.arange(KAGGLE_DAYS + 1, dtype=np.int64)
    return part * size + np.minimum(part, longer)


def is_up_to_date(processed: Path, manifest: dict[str, Any], paths: Sequence[Path]) -> bool:
    """Whether `processed` is whole and was built from the same files with the same options."""
    if not processed.exists():
        return False
    try:
        built = unpack_manifest(open_npz(processed, KEYS))
    except (ValueError, OSError) as error:
        print(f"{error}: rebuilding")
        return False
    if any(built.get(key) != value for key, value in manifest.items()):
        print(f"{processed} was built with other options: rebuilding")
        return False
    sources = built.get("sources", [])
    if len(sources) == len(paths) and all(map(is_same_file, sources, paths)):
        return True
    print(f"{processed} was built from another log: rebuilding")
    return False


def is_same_file(source: dict[str, Any], path: Path) -> bool:
    """Whether `path` is what the manifest says; it is hashed only where its time differs."""
    stat = path.stat()
    if (source["name"], source["bytes"]) != (path.name, stat.st_size):
        return False
    if source["mtime_ns"] == stat.st_mtime_ns:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == source["sha256"]


def source_notes(raw_data_file: str | Path, paths: Sequence[Path]) -> dict[str, Any] | None:
    """The JSON object in `<raw file>.json`, where the log's maker left one."""
    for path in (Path(raw_data_file), *paths):
        try:
            notes = json.loads(path.with_name(path.name + ".json").read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(notes, dict):
            return notes
    return None


def check_disk(paths: Sequence[Path], data_sub_sample_rate: float, folder: Path) -> None:
    """Estimate the rows from the log's first lines and raise `OSError` when they do not fit."""
    sample = next(RawFile(paths[0]).blocks(SAMPLE_BYTES))
    num_lines = sample.count(b"\n")
    num_positive = sample.count(b"\n1\t") + sample.startswith(b"1\t")
    kept = 1 - data_sub_sample_rate * (1 - num_positive / num_lines)
    sizes = (path.stat().st_size * (GZIP_RATIO if path.suffix == ".gz" else 1) for path in paths)
    num_rows = round(sum(sizes) * num_lines / len(sample) * kept)
    needed_bytes = 2 * ROW_BYTES * num_rows
    print(f"{paths[0]}: about {num_rows} rows to write, {needed_bytes / 1e9:.2f} GB while it runs")
    check_free_disk(folder, needed_bytes, "preprocessing")


def print_summary(
    processed: Path, numbers: dict[str, Any], counts: np.ndarray, seconds: float
) -> None:
    """Print what was built and what it took."""
    num_rows, dropped = numbers["num_rows"], numbers["rows_dropped"]
    print(
        f"{num_rows} rows, {numbers['num_positive'] / num_rows:.2%} positive,"
        f" {dropped} dropped by sub-sampling;"
        f" {(num_rows + dropped) / seconds:.0f} rows/s, {seconds:.1f} s,"
        f" peak RSS {peak_rss_bytes() / 1e6:.0f} MB\n"
        f"{counts.sum()} embedding rows: {'-'.join(map(str, counts))}\n"
        f"wrote {processed}"
    )


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(__doc__)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data-set",
        choices=("kaggle", "terabyte"),
        default="kaggle",
        help="which Criteo log: one file of 7 days (kaggle), or one file per day (terabyte)",
    )
    files.add_argument(
        "--raw-data-file",
        required=True,
        default=argparse.SUPPRESS,
        help="the log, plain or .gz: kaggle's train.txt, terabyte's prefix .../day (for .../day_0,"
        " .../day_1, ...), or the folder that holds them",
    )
    files.add_argument(
        "--num-days",
        type=positive_int,
        default=24,
        help="files read, from day_0; terabyte only",
    )
    files.add_argument(
        "--processed-data-file",
        default=argparse.SUPPRESS,
        help="the .npz to write (default: <stem>_processed.npz beside the raw file)",
    )
    rows = parser.add_argument_group("rows and tables")
    rows.add_argument(
        "--max-ind-range",
        type=int,
        default=-1,
        help="take hashes modulo this number, so that no table has more rows; -1 = off",
    )
    rows.add_argument(
        "--data-sub-sample-rate",
        type=share,
        default=0.0,
        help="share of the negative rows to drop, from 0 (off) to less than 1",
    )
    add_seed_flag(rows)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Preprocess the log that the command line names."""
    preprocess(**vars(parse_args(argv)))


if __name__ == "__main__":
    run_script(main)
