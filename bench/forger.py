"""A forger: changes one field of a file to nonsense, mends the checksums, and runs the script.

Used by `bench.faults --forgeries N`. Right is one line and status 2, or status 0 with the result
that the files as they were give. A value that is as valid as the old one cannot be found out, as
another label: such fields are left alone, see `VALID` and `array_forgeries`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from slipstream.tools.npz import (
    fingerprint,
    open_npz,
    pack_manifest,
    unpack_manifest,
    write_npz,
)
from slipstream.training.saved import DESCRIPTION, STATE, checksum_of
from slipstream.training.set_files import ROWS_FILE, SEGREGATED_SETS

DEPTH = 600
# Fields (a file's name and the place in it) whose new values may be as valid as the old, and why.
VALID = {
    r"checkpoint.json values.trainer.window$": "mini-batches shuffled otherwise, from an epoch on",
    r"checkpoint.json .*(auc|best|validations)": "another validation: another model is the best",
    r"checkpoint.json values.step.loss_sum$": "reported",
    r"checkpoint.json values.trainer.progress.(best|reached)$": "no best yet; nothing reached yet",
    r"(train_processed|ranking).npz source_notes": "handed on as they are",
    r"ranking.npz figures.(budgets|min_counts|hot_access_share|hot_input_share)": "printed",
    r"columns.json ": "the user's own: another column file, another log",
    r"part.json (are_numbers|day_rows|is_sorted|first_key|last_key|num_held_out)": "of the rows",
    r"plan.json (means|days)": "of the rows",
}
WHOLE = ("X_int",)  # arrays that may hold any whole number
FREE = ("random.", "rule.touched", "manifest")  # and any bytes
POSITIVE = ("weights", "row_sums", "optimizer.step.", "optimizer.exp_avg_sq.", "optimizer.sum.")


class Runs(Protocol):
    """A job of `bench.faults`: its script in a forked process, and the bytes that come of it."""

    output: Path

    def run(self, *more: str) -> tuple[int, str]:
        """Exit status, and what it said."""

    def result(self) -> dict[str, bytes]:
        """What must not depend on the way."""

    def clear(self) -> None:
        """Delete what was written."""


class Forgery(NamedTuple):
    """A change to a file: where, and what does it."""

    place: str
    write: Callable[[], None]


def nested(depth: int) -> list[Any]:
    """Lists in each other."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def values_for(old: Any) -> list[Any]:
    """Nonsense in place of a JSON value: of other types, out of range, NaN, nested."""
    numbers = [-1, 0.5, -0.5, float("nan"), float("inf"), 2**31, 2**63, 10**400]
    others = [None, True, "", "nonsense", [], {}, [None], {"nonsense": 1}, nested(DEPTH)]
    return [value for value in (*numbers, *others) if value != old or type(value) is not type(old)]


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every field; of a list the first and the last item."""
    if place:
        yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places_in(item, (*place, key))
    elif isinstance(value, list) and value:
        for number in sorted({0, len(value) - 1}):
            yield from places_in(value[number], (*place, number))


def with_value(value: Any, place: Sequence[Any], new: Any) -> Any:
    """A copy in which the field at `place` is `new`."""
    copied = json.loads(json.dumps(value))
    inside = copied
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = new
    return copied


def json_forgeries(path: Path, value: Any, write: Callable[[Any], None]) -> Iterator[Forgery]:
    """Of each field of a JSON value that `write` puts in its place, its checksums mended."""
    for place in places_in(value):
        name = f"{path.name} {'.'.join(map(str, place))}"
        if any(re.search(pattern, name) for pattern in VALID):
            continue
        inside = value
        for key in place:
            inside = inside[key]
        for new in values_for(inside):
            is_nested = isinstance(new, list) and new[:1] and isinstance(new[0], list)
            shown = "nested" if is_nested else str(new)[:20]

            def change(place: Any = place, new: Any = new) -> None:
                write(with_value(value, place, new))

            yield Forgery(f"{name}: {inside!s:.30} -> {shown or repr(new)}", change)


def arrays_for(name: str, array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Nonsense in place of an array: other types, shapes, and values."""
    is_free = name.startswith(FREE)
    yield "of float64", array.astype(np.float64)
    yield "big-endian", array.astype(array.dtype.newbyteorder(">"))
    yield "0 dimensions", np.zeros((), array.dtype)
    yield "one more dimension", array[None]
    yield "empty", array[:0] if array.ndim else np.zeros(0, array.dtype)
    if array.dtype != bool:
        yield "booleans", np.zeros(array.shape, bool)
    yield "complex", array.astype(np.complex64)
    yield "texts", np.zeros(array.shape, "U3")
    if array.ndim:
        yield "one short", array[:-1]
        yield "one more", np.concatenate([array, array[-1:]])
    if array.ndim == 2:
        yield "narrower", array[:, :-1]
        yield "Fortran order", np.asfortranarray(array)
    if not array.size or is_free:
        return

    def first(dtype: Any, value: Any) -> np.ndarray:
        changed = array.astype(dtype)
        changed.reshape(-1)[0] = value
        return changed

    if array.dtype.kind == "f":
        values = [np.nan, np.inf] + [-1.0] * any(part in name for part in POSITIVE)
        yield from ((f"{value}", first(array.dtype, value)) for value in values)
        return
    yield "a fraction", first(np.float64, 0.5)
    yield "NaN", first(np.float64, np.nan)
    yield "2^63 + 5", first(np.uint64, 2**63 + 5)
    if not name.startswith(WHOLE):
        if array.dtype.kind == "i":
            yield "-5", first(array.dtype, -5)
        yield "the largest", first(array.dtype, np.iinfo(array.dtype).max)


def array_forgeries(
    path: Path, write: Callable[[dict[str, np.ndarray]], None]
) -> Iterator[Forgery]:
    """Of each array of an .npz file."""
    arrays = {name: np.array(array) for name, array in open_npz(path).items()}
    for name, array in arrays.items():
        for what, new in arrays_for(name, array):

            def change(name: str = name, new: np.ndarray = new) -> None:
                write({**arrays, name: new})

            yield Forgery(f"{path.name} {name}: {what}", change)


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write any arrays, whatever their order."""
    path.unlink()
    np.savez(path, **arrays)  # type: ignore[arg-type]


def manifest_forgeries(path: Path, mend: Callable[[], None]) -> Iterator[Forgery]:
    """Of each field of an .npz file's manifest."""
    arrays = {name: np.array(array) for name, array in open_npz(path).items()}

    def write(manifest: dict[str, Any]) -> None:
        write_npz(path, {**arrays, "manifest": pack_manifest(manifest)})
        mend()

    yield from json_forgeries(path, unpack_manifest(arrays), write)


def of_npz(path: Path, mend: Callable[[], None] = lambda: None) -> list[Forgery]:
    """All forgeries of an .npz file; `mend` mends the checksums of it elsewhere."""

    def write(arrays: dict[str, np.ndarray]) -> None:
        write_arrays(path, arrays)
        mend()

    found = list(array_forgeries(path, write))
    if "manifest" in open_npz(path):
        found += manifest_forgeries(path, mend)
    return found


def of_json(path: Path) -> list[Forgery]:
    """All forgeries of a JSON file that no checksum covers."""
    value = json.loads(path.read_bytes())
    return list(json_forgeries(path, value, lambda new: _dump(path, new)))


def of_segregated(folder: Path) -> list[Forgery]:
    """All forgeries of a segregated folder's files."""

    def mend() -> None:
        mend_sets(folder)

    found = [one for name in SEGREGATED_SETS for one in of_npz(folder / f"{name}.npz", mend)]
    return found + of_npz(folder / ROWS_FILE) + of_json(folder / "times.json")


def mend_sets(folder: Path) -> None:
    """Let a segregated folder's rows' file say that its sets are as they are."""
    rows = folder / ROWS_FILE
    arrays = {name: np.array(array) for name, array in open_npz(rows).items()}
    files = {name: fingerprint(folder / f"{name}.npz") for name in SEGREGATED_SETS}
    manifest = unpack_manifest(arrays) | {"files": files}
    write_npz(rows, {**arrays, "manifest": pack_manifest(manifest)})


def of_checkpoint(folder: Path) -> list[Forgery]:
    """All forgeries of a checkpoint's two files."""
    path, state = folder / DESCRIPTION, folder / STATE
    described = json.loads(path.read_bytes())
    described.pop("checksum")

    def write_state(arrays: dict[str, np.ndarray]) -> None:
        write_arrays(state, arrays)
        mend_checkpoint(folder, described)

    def write(new: dict[str, Any]) -> None:
        mend_checkpoint(folder, new, of_state=False)

    return [*json_forgeries(path, described, write), *array_forgeries(state, write_state)]


def mend_checkpoint(folder: Path, described: dict[str, Any], of_state: bool = True) -> None:
    """Write a checkpoint's description with checksums that are right."""
    new = {name: value for name, value in described.items() if name != "checksum"}
    if of_state:
        new["state"] = fingerprint(folder / STATE)
    _dump(folder / DESCRIPTION, {**new, "checksum": checksum_of(new)})


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def forge(
    job: Runs,
    places: Sequence[Path],
    forgeries: Sequence[Forgery],
    expected: dict[str, bytes],
    bar: tqdm,
) -> dict[str, Any]:
    """Make each forgery and run; counts, and what was wrong. `places` are put back before each."""
    kept = [place.with_name(place.name + ".whole") for place in places]
    for place, copy in zip(places, kept, strict=True):
        _copy(place, copy)
    counts: Counter[str] = Counter()
    faults = []
    for forgery in forgeries:
        job.clear()
        for place, copy in zip(places, kept, strict=True):
            _copy(copy, place)
        forgery.write()
        status, said = job.run()
        counts["forged"] += 1
        if (kind := judged(status, said, status == 0 and job.result() == expected)) is None:
            faults.append(f"{forgery.place}: status {status}: {said[-400:]}")
        else:
            counts[kind] += 1
        bar.update()
    job.clear()
    for place, copy in zip(places, kept, strict=True):
        _copy(copy, place)
    return {**counts, "faults": faults}


def _copy(source: Path, target: Path) -> None:
    """Put a copy of a file or folder in another's place."""
    if target.is_dir():
        shutil.rmtree(target)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def judged(status: int, said: str, is_same: bool) -> str | None:
    """What a run on forged files came to; None: what it must not."""
    lines = [line for line in said.splitlines() if ": error: " in line]
    if status == 2 and len(lines) == 1 and "Traceback" not in said:
        return "refused"
    return "harmless" if is_same and "Traceback" not in said else None
