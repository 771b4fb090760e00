"""Arrays that lie in mapped files: which do, and telling the kernel how they will be read."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

READ_AHEAD_BYTES = 1 << 17


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array's values lie in a mapped file (or there are none, or one that all share)."""
    return not array.size or not any(array.strides) or _map_of(array) is not None


def _map_of(array: np.ndarray) -> mmap.mmap | None:
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.base if isinstance(base, np.ndarray) else getattr(base, "obj", None)
    return base


def advise(array: np.ndarray, advice: int) -> None:
    """Tell the kernel (mmap.MADV_*) how an array's pages will be used; nothing where not mapped.

    MADV_WILLNEED reads ahead without waiting; MADV_DONTNEED takes them out of this process's memory
    (they stay in the page cache while there is room).
    """
    base = _map_of(array)
    if base is None or not array.size or not array.flags.c_contiguous:
        return
    start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    end = start + array.nbytes
    # Linux cuts a WILLNEED down to what it reads ahead at once: of 64 MB asked for whole, 8 came.
    step = READ_AHEAD_BYTES if advice == mmap.MADV_WILLNEED else array.nbytes + mmap.PAGESIZE
    for piece in range(start // mmap.PAGESIZE * mmap.PAGESIZE, end, step):
        base.madvise(advice, piece, min(step, end - piece))
