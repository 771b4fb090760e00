"""The vocabulary that a model folder holds, once for all its checkpoints, so that it needs no data.

`vocabulary.npz` has the `codes` and `counts` of the processed file that the model is trained on;
each checkpoint says how they are read, and their checksum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.vocabulary import VOCABULARY, Vocabulary, checksum_of, vocabulary_of
from slipstream.tools.npz import open_npz, pack_manifest, unpack_manifest, write_npz
from slipstream.tools.runtime import check_free_disk
from slipstream.tools.schema import check_fields
from slipstream.training.saved import Saved
from slipstream.training.sets import PreparedData

VOCABULARY_FILE = "vocabulary.npz"
NO_SCORES = "the model can be evaluated and trained on, but cannot score new rows"


def keep_vocabulary(folder: Path, prepared: PreparedData) -> dict[str, Any] | None:
    """Write the data's vocabulary into a model folder, unless it is there; what describes it.

    None, and a line that says why, where the data have none. Raises `OSError` (full disk), and
    `ValueError` for one that is not what its file says.
    """
    described = prepared.manifest.get(VOCABULARY)
    if not prepared.files:
        return None  # generated: there are no rows to come
    if described is None:
        print(f"note: these data keep no vocabulary (preprocess the log again): {NO_SCORES}")
        return None
    target = folder / VOCABULARY_FILE
    if _kept(target) == described:
        return described
    source = Path(prepared.files.get("processed", ""))
    if not source.is_file():
        print(f"note: the vocabulary was in {source}, which is gone: {NO_SCORES}")
        return None
    arrays = open_npz(source, ("codes", "counts"), others=False)
    check_fields(source, arrays, {"codes": ("uint64", 1), "counts": ("int64", 1)})
    codes, counts = arrays["codes"], arrays["counts"]
    sizes = prepared.table_sizes
    is_same = np.array_equal(counts, sizes)
    if not is_same or checksum_of([codes], sizes) != described["checksum"]:
        raise ValueError(f"{source} holds another vocabulary than these data; segregate it again")
    check_free_disk(folder, codes.nbytes, "the vocabulary")
    manifest = pack_manifest({VOCABULARY: described})
    write_npz(target, {"codes": codes, "counts": counts, "manifest": manifest})
    return described


def _kept(path: Path) -> Any:
    try:
        return unpack_manifest(open_npz(path, others=False)).get(VOCABULARY)
    except (OSError, ValueError):
        return None


def kept_vocabulary(saved: Saved) -> Vocabulary:
    """The vocabulary of a checkpoint; `ValueError` where it has none, or another."""
    if saved.vocabulary is None:
        raise ValueError(
            f"{saved.folder} has no vocabulary: it was trained on data of an older version, or "
            f"generated: {NO_SCORES}; preprocess the log and train again"
        )
    places = [saved.folder / VOCABULARY_FILE, saved.folder.parent / VOCABULARY_FILE]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"{saved.folder} needs {VOCABULARY_FILE}, which the model folder holds; copy it beside"
        )
    arrays = open_npz(path, ("codes", "counts"))
    found = vocabulary_of(arrays, {VOCABULARY: saved.vocabulary}, str(path))
    assert found is not None
    return found
