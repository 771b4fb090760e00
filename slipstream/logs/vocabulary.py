"""Which values a processed file's ids stand for, so that rows of another log get the same ids.

A processed file holds `codes` (N,) uint64: for each table the 64-bit codes of its values
(`slipstream.logs.rows.Rows`) in id order, one table after another. The row that rare values share
has the code `RARE`. The manifest says under the key `vocabulary` how a raw log's values become
codes, so that the two together read a new log:

    {"checksum": sha256 of codes and counts, "lineage": checksums of the files that this one
     extends, oldest first, "numbers": of each table whether all its texts were numbers (17.0 is 17
     then), null where it holds hashes or nothing, "data_set": its name, "max_ind_range": or -1,
     "columns": what a column file says, null for the data sets that are known}

Price: 8 bytes a row of the tables on disk; 8 in memory, 12 where a file was extended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.encoding import sorted_with_places
from slipstream.logs.manifests import Described, manifest_of_log
from slipstream.logs.rows import RARE
from slipstream.logs.transforms import Transforms, transforms_of
from slipstream.tools.npz import open_npz
from slipstream.tools.schema import conform

VOCABULARY = "vocabulary"  # the manifest's key


class TableCodes:
    """The codes of a table, found by value. `codes` (n,) uint64 are in id order.

    Raises `ValueError` for a code that is there twice.
    """

    def __init__(self, codes: np.ndarray, name: str) -> None:
        self.codes, self._order = codes, None
        in_order = codes
        if not (codes[1:] > codes[:-1]).all():  # of a file that extends another
            self._order = np.argsort(codes, kind="stable").astype(np.int32)
            in_order = codes[self._order]
            if (in_order[1:] == in_order[:-1]).any():
                raise ValueError(f"the vocabulary of {name} holds a value twice")
        self._sorted = in_order
        # RARE is the largest that a table may hold.
        has_rare = len(codes) > 0 and in_order[-1] == RARE
        self.rare_id: int | None = int(self._ids(len(codes) - 1)) if has_rare else None

    def __len__(self) -> int:
        return len(self.codes)

    def _ids(self, places: Any) -> Any:
        return places if self._order is None else self._order[places]

    def find(self, codes: np.ndarray) -> np.ndarray:
        """Ids (n,) int32 of codes (n,), best sorted; -1 of those that the table does not hold."""
        if not len(self._sorted):
            return np.full(len(codes), -1, np.int32)
        places = np.minimum(np.searchsorted(self._sorted, codes), len(self._sorted) - 1)
        is_known = (self._sorted[places] == codes) & (codes != RARE)
        return np.where(is_known, self._ids(places), -1).astype(np.int32)

    def ids_of(self, codes: np.ndarray) -> np.ndarray:
        """As `find`, several times as fast for codes in any order, many of them equal."""
        if not len(codes):
            return np.empty(0, np.int32)
        keys, places = sorted_with_places(codes)
        first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
        ids = np.empty(len(codes), np.int32)
        ids[places] = np.repeat(self.find(keys[first]), np.diff(first, append=len(codes)))
        return ids


@dataclass(frozen=True)
class Vocabulary:
    """All tables' values, and how a raw log's become codes.

    Attributes:
        tables: of each table its codes.
        described: what the manifest says, see the module.
    """

    tables: tuple[TableCodes, ...]
    described: dict[str, Any]

    @property
    def checksum(self) -> str:
        """Of the codes and where each table's end."""
        return self.described["checksum"]

    @property
    def lineage(self) -> list[str]:
        """Checksums of the files that this one extends, and its own, oldest first."""
        return lineage_of(self.described)

    def number_tables(self, names: Sequence[str]) -> set[str]:
        """Of the tables, by name, those in which 17.0 is 17."""
        are = zip(names, self.described["numbers"], strict=True)
        return {name for name, numbers in are if numbers}


@dataclass(frozen=True)
class Known:
    """What a file that extends another takes over: its ids, and what its dense values become."""

    vocabulary: Vocabulary
    transforms: Transforms

    def describe(self) -> dict[str, Any]:
        """What a file that extends it depends on."""
        return {"checksum": self.vocabulary.checksum, "transforms": self.transforms.describe()}


def known_of(path: str | Path) -> Known:
    """What the processed file that --extend names hands on.

    Raises `ValueError` where it has no vocabulary, or is not whole; `FileNotFoundError`.
    """
    arrays = open_npz(path, ("X_int", "counts"))
    manifest = manifest_of_log(arrays, path)
    found = vocabulary_of(arrays, manifest, str(path))
    if found is None:
        raise ValueError(
            f"--extend: {path} keeps no vocabulary; preprocess its log again with this version"
        )
    return Known(found, transforms_of(manifest, arrays["X_int"].shape[1], str(path)))


def lineage_of(described: Mapping[str, Any]) -> list[str]:
    """Of what a manifest says: checksums of the files that its own extends, and its own."""
    return [*described["lineage"], described["checksum"]]


def checksum_of(codes: Iterable[np.ndarray], table_sizes: np.ndarray) -> str:
    """sha256 of codes, in pieces of any length, and of the rows of each table."""
    digest = hashlib.sha256(np.ascontiguousarray(table_sizes, "<i8").data)
    for piece in codes:
        digest.update(np.ascontiguousarray(piece, "<u8").data)
    return digest.hexdigest()


def vocabulary_of(
    arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any], source: str
) -> Vocabulary | None:
    """The vocabulary of an opened file with `codes` and `counts`; None: it has none.

    Raises `ValueError` where it is not whole. Reads the codes: one pass, and their checksum.
    """
    described, codes = manifest.get(VOCABULARY), arrays.get("codes")
    if described is None or codes is None:
        return None
    conform(described, Described, f"{source}: vocabulary")
    sizes = np.asarray(arrays["counts"]).astype(np.int64)
    is_whole = codes.dtype == np.uint64 and codes.ndim == 1 and (sizes >= 0).all()
    if not is_whole or int(sizes.sum()) != len(codes) or len(described["numbers"]) != len(sizes):
        raise ValueError(
            f"{source}: its vocabulary has {codes.dtype} of shape {codes.shape}; expected uint64, "
            f"a code for each of {int(sizes.sum()):,} rows"
        )
    if checksum_of([codes], sizes) != described["checksum"]:
        raise ValueError(f"{source}: its vocabulary is not what was written; make the file again")
    ends = np.cumsum(sizes)
    tables = [codes[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    try:
        found = tuple(TableCodes(one, f"table {at + 1}") for at, one in enumerate(tables))
    except ValueError as error:
        raise ValueError(f"{source}: {error}; make the file again") from None
    return Vocabulary(found, dict(described))
