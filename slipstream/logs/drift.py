"""How a synthetic log changes from day to day: values come and go, and their effects move."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

LATENT_DIM = 3
OTHER_KEY = 0x5DEECE66D


class Drift(NamedTuple):
    """How a day of a log differs from day 0.

    Attributes:
        day: from 0.
        turnover: share of the values of each large table that others take the place of a day.
        rotation: how far effects move a day: 1 leaves nothing of them.
    """

    day: int = 0
    turnover: float = 0.0
    rotation: float = 0.0

    def identities(self, ids: np.ndarray, size: int, is_large: bool) -> np.ndarray:
        """Which value (n,) uint64 of a table has the popularity of each id on this day."""
        values = ids.astype(np.uint64)
        if not (self.turnover and is_large):
            return values
        # Each id's values come and go at a time of its own; that of missing ones stays.
        phase = (values * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) / 2.0**24
        version = np.floor(phase + self.day * self.turnover).astype(np.uint64)
        version[ids == size - 1] = 0
        return values + version * np.uint64(size)

    def effects(self, key: np.uint64, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First-order effects [n] and latent vectors [LATENT_DIM, n] of values on this day.

        They turn from one draw towards another.
        """
        effect, vectors = _effects(key, values)
        if not self.rotation or not self.day:
            return effect, vectors
        angle = self.rotation * self.day * math.pi / 2
        now, later = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        other, others = _effects(key ^ np.uint64(OTHER_KEY), values)
        return now * effect + later * other, now * vectors + later * others


def _effects(key: np.uint64, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each id's first-order effect [n] and latent vector [LATENT_DIM, n], uniform with variance 1.

    The 4 x 16 bits of MurmurHash3's 64-bit finaliser (public domain) over key + id.
    """
    mixed = ids.astype(np.uint64)
    mixed += key
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(33)
    mixed *= np.uint64(0xC4CEB9FE1A85EC53)
    mixed ^= mixed >> np.uint64(33)
    # Shifts and not a view: the same numbers on machines of either byte order.
    pieces = np.empty((1 + LATENT_DIM, len(ids)), np.float32)
    for piece in pieces:
        piece[:] = (mixed & np.uint64(0xFFFF)).astype(np.uint16)
        mixed >>= np.uint64(16)
    pieces *= np.float32(2 * math.sqrt(3) / 65535)
    pieces -= np.float32(math.sqrt(3))
    return pieces[0], pieces[1:]
