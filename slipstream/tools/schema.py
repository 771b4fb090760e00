"""Files are untrusted: bytes to JSON values, and values and arrays against what they must be.

Whatever a file holds, what is wrong becomes one `ValueError` that names the file and the field. A
checksum shows that bytes are those that were written, not who wrote them: both are looked at.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

MAX_JSON_BYTES = 1 << 28
MAX_DEPTH = 64  # of objects and lists in each other: ours are a handful; beyond 1000 Python fails
MAX_FLOAT = sys.float_info.max
MAX_INT64 = 2**63 - 1
AGAIN = "delete it and make it again"

Count = Annotated[int, Meta(ge=0, le=MAX_INT64)]
Positive = Annotated[int, Meta(ge=1, le=MAX_INT64)]
Finite = Annotated[float, Meta(ge=-MAX_FLOAT, le=MAX_FLOAT)]
Amount = Annotated[float, Meta(ge=0.0, le=MAX_FLOAT)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


def decode_json(data: bytes, allows_nan: bool = False) -> Any:
    """The value of strict JSON in UTF-8; NaN and Infinity, as Python writes them, where allowed.

    Raises `ValueError` for anything else, also for what is nested beyond `MAX_DEPTH`, a key twice,
    and a number that 64 bits cannot hold.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"{len(data):,} bytes of JSON; expected at most {MAX_JSON_BYTES:,}")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=float if allows_nan else _refuse_constant,
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_DEPTH} deep") from None
    check_nesting(value)
    return value


def check_nesting(value: Any, max_items: int = MAX_JSON_BYTES) -> None:
    """Raise `ValueError` for values too deep in each other, or too many: YAML's may be shared."""
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        if len(level) > max_items:
            raise ValueError(f"more than {max_items:,} values")
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                inner += item.values() if isinstance(item, dict) else item
        level, depth = inner, depth + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"has the key {twice[:80]!r} twice")
    return found


def _integer(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"the number {text[:20]}... takes more than 64 bits")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is beyond 64 bits")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number; expected finite ones")


def conform(value: Any, kind: Any, source: str | Path, remedy: str = AGAIN) -> Any:
    """The value; a `ValueError` that names the field where it is not of a type, strictly.

    `kind` is what `msgspec.convert` takes: with it 1.0 and true are no `int`, and bounds are those
    of `msgspec.Meta`.
    """
    try:
        msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        what, _, place = str(error).replace("`", "").partition(" - at ")
        place = place.removeprefix("$").removeprefix(".")
        text = f"{place}: {what[0].lower()}{what[1:]}" if place else what[0].lower() + what[1:]
        raise ValueError(f"{source}: {text}; {remedy}") from None
    return value


def check_fields(
    source: str | Path,
    arrays: Mapping[str, np.ndarray],
    fields: Mapping[str, tuple[str, int]],
    remedy: str = AGAIN,
) -> None:
    """Raise `ValueError` for arrays of other types or dimensions, of those that there are.

    `fields`: types, as `int32` or `int32 float32`, or kinds, as `iuf`; and how many dimensions.
    """
    for name, (types, num_dims) in fields.items():
        array = arrays.get(name)
        if array is None:
            continue
        is_kind = types in ("iu", "iuf")
        known = [] if is_kind else [np.dtype(one) for one in types.split()]
        is_type = array.dtype.kind in types if is_kind else array.dtype in known
        if array.ndim != num_dims or not is_type:
            wanted = "numbers" if types == "iuf" else "integers" if is_kind else types
            raise ValueError(
                f"{source}: {name} has {array.ndim} dimensions of {array.dtype.str}; expected "
                f"{num_dims} of {wanted.replace(' ', ' or ')}; {remedy}"
            )


def whole_numbers(
    source: str | Path, name: str, array: np.ndarray, low: int, high: int
) -> np.ndarray:
    """An array's numbers as int64. `ValueError`: one is NaN, a fraction, or not in low to high.

    One pass. They are compared before they are converted, so none wraps.
    """
    with np.errstate(invalid="ignore"):
        is_good = (array >= low) & (array <= high)
        if array.dtype.kind == "f":
            is_good &= np.floor(array) == array
    if not is_good.all():
        bad = array[~is_good].reshape(-1)[0] if array.ndim else array[()]
        raise ValueError(
            f"{source}: {name} has {bad}; expected whole numbers from {low} to {high}; {AGAIN}"
        )
    return array.astype(np.int64, copy=False)
