"""Synthetic click logs from a planted model, shaped like the Criteo Kaggle log.

Category ids follow a power law per table (id 0 is the most popular) and rare ids come together: a
row with a rare value in one large table likely has rare ones in the others, as in real logs.
Clicks are drawn from a known model, logit = intercept + dense + first-order + interactions, so the
best AUC that any model can reach on the log is known: about 0.82 with Kaggle's table sizes.
Measured on 800 thousand rows of seed 123 (planted 0.817): one epoch of DLRM gets 0.778, a linear
model of the logs and ids 0.746 in two (SGD, learning rate 1, batch 1024).

Rows come in blocks of `BLOCK_ROWS`, each a function of (seed, block number): a log's first rows do
not depend on its length, and memory does not grow with it. A category's effects come from a hash of
(seed, column, id), so no array has the size of a table. One core makes 0.5 million rows a second.
On another kind of CPU numpy may round a power or a cosine otherwise, so a few values may differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from slipstream.logs.drift import LATENT_DIM, Drift

KAGGLE_TABLE_SIZES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
BLOCK_ROWS = 16384  # a column of a block fits the L2 cache
CALIBRATION_BLOCKS = 4  # what the planted model is scaled on; they are no rows of the log
LEARNABLE = 2e-3  # share of the rows below which an id's effects fade out: SGD hardly learns them
SHARED_BINS = 32  # how finely the large tables agree about how rare a row is
LOGIT_STD = 1.5  # of the whole logit: sets the planted AUC
DENSE_SHARE = 1.0  # relative standard deviation of each part of the logit
FIRST_ORDER_SHARE = 0.82
INTERACTION_SHARE = 0.78


class CategoryShape(NamedTuple):
    """How one column's ids are spread: P(id) ~ (id + shift) ** -exponent, and `head` more for id 0.

    Values by hand, so that the shares of the top 1, 10, 100 and 1000 values look like Kaggle's.
    """

    exponent: float
    shift: float
    head: float = 0.0
    missing_rate: float = 0.0
    interacts: bool = False  # takes part in the pairwise terms


CATEGORY_SHAPES = (
    CategoryShape(2.02, 1.0),
    CategoryShape(1.75, 11.7, 0.07),
    CategoryShape(1.06, 1.7, missing_rate=0.03),
    CategoryShape(1.14, 4.1, 0.05, missing_rate=0.03),
    CategoryShape(2.50, 1.0),
    CategoryShape(4.00, 3.5, missing_rate=0.13, interacts=True),
    CategoryShape(1.44, 110.0, 0.01),
    CategoryShape(2.30, 1.0),
    CategoryShape(4.00, 1.0),
    CategoryShape(1.53, 117.0, 0.27),
    CategoryShape(1.93, 163.0, 0.02),
    CategoryShape(1.07, 1.8, missing_rate=0.03),
    CategoryShape(2.12, 168.0, 0.02),
    CategoryShape(4.00, 4.9, interacts=True),
    CategoryShape(2.04, 146.0, 0.02),
    CategoryShape(1.12, 5.4, 0.02, missing_rate=0.03),
    CategoryShape(0.77, 0.05, interacts=True),
    CategoryShape(2.16, 70.0, 0.04),
    CategoryShape(1.33, 5.3, 0.55, missing_rate=0.45),
    CategoryShape(4.00, 11.0, missing_rate=0.45, interacts=True),
    CategoryShape(1.10, 3.8, 0.02, missing_rate=0.03),
    CategoryShape(4.00, 2.8, missing_rate=0.8),
    CategoryShape(4.00, 4.8, interacts=True),
    CategoryShape(1.23, 1.9, missing_rate=0.03),
    CategoryShape(2.88, 4.2, missing_rate=0.45),
    CategoryShape(1.35, 16.0, 0.08, missing_rate=0.45),
)


class DenseShape(NamedTuple):
    """One dense column: ln(1 + x) is normal, cut at 0; the last three are effects on the logit."""

    log_mean: float
    log_std: float
    missing_rate: float
    negative_rate: float = 0.0
    linear: float = 0.0  # of the standardised ln(1 + x)
    wave: float = 0.0  # of cos(2 * that)
    interaction: float = 0.0  # of that times the categories' latent vectors


DENSE_SHAPES = (
    DenseShape(0.8, 1.0, 0.45, linear=0.5),
    DenseShape(2.1, 2.1, 0.0, negative_rate=0.1, wave=0.5, interaction=0.8),
    DenseShape(2.2, 1.3, 0.2, linear=-0.3, wave=0.3),
    DenseShape(1.7, 1.0, 0.2, wave=-0.3),
    DenseShape(7.3, 2.9, 0.05, linear=-0.4, interaction=1.0),
    DenseShape(3.6, 1.8, 0.25, linear=-0.2),
    DenseShape(1.5, 1.4, 0.05, linear=0.6, interaction=0.8),
    DenseShape(2.0, 1.2, 0.0, linear=-0.2, wave=0.4),
    DenseShape(3.6, 1.7, 0.05, wave=-0.5),
    DenseShape(0.4, 0.4, 0.45, linear=0.3),
    DenseShape(0.8, 0.8, 0.05, linear=0.5),
    DenseShape(0.3, 0.6, 0.78, linear=0.2),
    DenseShape(1.9, 1.1, 0.2, linear=-0.4),
)
DAY_BLOCKS = 1 << 32  # each day of a log has blocks of its own
LARGEST_LOG_DENSE = 15.0  # e**15 is about 3 million, and fits int32


@dataclass(frozen=True)
class PlantedClicks:
    """Rows of a synthetic log, n of them, with the planted model's own click probability.

    A missing category has the last id of its table, so `X_cat` alone tells a model all there is.
    """

    X_int: np.ndarray  # [n, num_dense] int32, 0 where missing; a few are -1 or -2
    int_missing: np.ndarray  # [n, num_dense] bool
    X_cat: np.ndarray  # [n, F] int32, in [0, table size)
    cat_missing: np.ndarray  # [n, F] bool
    y: np.ndarray  # [n] int8
    probability: np.ndarray  # [n] float32

    def __len__(self) -> int:  # noqa: D105
        return len(self.y)


def planted_clicks(
    num_rows: int,
    table_sizes: Sequence[int],
    seed: int,
    num_dense: int = 13,
    positive_rate: float = 0.25,
) -> PlantedClicks:
    """Draw `num_rows` rows at once; for a log larger than memory, use `planted_blocks`.

    The first m rows are the same for every `num_rows` >= m. Raises what `planted_blocks` raises.
    """
    blocks = planted_blocks(num_rows, table_sizes, seed, num_dense, positive_rate)
    clicks = concatenate_clicks(list(blocks))
    # Blocks are laid out by column, which `concatenate` keeps; batches are taken by row.
    rows = [np.ascontiguousarray(getattr(clicks, field.name)) for field in fields(PlantedClicks)]
    return PlantedClicks(*rows)


def concatenate_clicks(blocks: Sequence[PlantedClicks]) -> PlantedClicks:
    """Join blocks of rows, at least one, in their order."""
    return PlantedClicks(
        *(
            np.concatenate([getattr(block, field.name) for block in blocks])
            for field in fields(PlantedClicks)
        )
    )


def planted_blocks(
    num_rows: int,
    table_sizes: Sequence[int],
    seed: int,
    num_dense: int = 13,
    positive_rate: float = 0.25,
    drift: Drift | None = None,
) -> Iterator[PlantedClicks]:
    """Draw rows in blocks of `BLOCK_ROWS`, the last one shorter, one block in memory at a time.

    With `drift`, rows of one day of a log, whose ids may be beyond their tables' sizes: those of
    values that came later. Column c of a log with other or more tables is shaped like column c % 26
    of Kaggle's, over its own table size. Raises `ValueError` for sizes below 1, a seed below 0 or a
    rate outside (0, 1).
    """
    if num_rows < 1 or num_dense < 1 or len(table_sizes) < 1 or min(table_sizes) < 1:
        raise ValueError(
            f"got {num_rows} rows, {num_dense} dense columns, table sizes {list(table_sizes)};"
            " expected at least 1 of each"
        )
    if max(table_sizes) > np.iinfo(np.int32).max:
        raise ValueError(f"got a table of {max(table_sizes)} rows; expected less than 2^31")
    if seed < 0 or not 0 < positive_rate < 1:
        raise ValueError(
            f"got seed {seed} and positive rate {positive_rate}; expected a seed of at least 0 and"
            " a rate between 0 and 1"
        )
    model = _PlantedModel(tuple(table_sizes), seed, num_dense, positive_rate)
    first = 0
    if drift is not None:
        model.drift, first = drift, drift.day * DAY_BLOCKS
    # A nested generator, so that bad sizes are reported here and not at the first block.
    return (
        model.block(number, min(BLOCK_ROWS, num_rows - start))
        for number, start in enumerate(range(0, num_rows, BLOCK_ROWS), first)
    )


def category_hashes(column: int, ids: np.ndarray) -> np.ndarray:
    """Mix (column, id) to uint32, one to one within a column: how ids look in a log.

    MurmurHash3's 32-bit finaliser (public domain): distinct ids never collide, half are >= 2^31.
    """
    mixed = ids.astype(np.uint32)
    mixed += np.uint32((column + 1) * 0x9E3779B1 & 0xFFFFFFFF)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x85EBCA6B)
    mixed ^= mixed >> np.uint32(13)
    mixed *= np.uint32(0xC2B2AE35)
    mixed ^= mixed >> np.uint32(16)
    return mixed


class _Draw(NamedTuple):
    """One block before its clicks are drawn; [columns, n], so that a column is contiguous."""

    values: np.ndarray  # [num_dense, n] int32
    int_missing: np.ndarray  # [num_dense, n] bool
    ids: np.ndarray  # [F, n] int32
    cat_missing: np.ndarray  # [F, n] bool
    parts: np.ndarray  # [3, n] float32: dense, first-order, interactions, not scaled yet


class _PlantedModel:
    """Draws blocks; scales the logit's parts on extra blocks, so that every seed is as hard."""

    def __init__(
        self, table_sizes: tuple[int, ...], seed: int, num_dense: int, positive_rate: float
    ) -> None:
        self.table_sizes = table_sizes
        self.seed = seed
        self.drift = Drift()  # parts are scaled as on day 0
        self.dense = [DENSE_SHAPES[i % len(DENSE_SHAPES)] for i in range(num_dense)]
        self.columns = [
            _Column(CATEGORY_SHAPES[c % len(CATEGORY_SHAPES)], size)
            for c, size in enumerate(table_sizes)
        ]
        # Distinct streams from one seed: effects, calibration, rows.
        effects = self._generator(0)
        self.column_keys = effects.integers(0, 2**63, len(table_sizes), dtype=np.uint64)
        self.dense_latent = effects.uniform(-1.7, 1.7, (num_dense, LATENT_DIM)).astype(np.float32)
        parts = np.concatenate(
            [
                self._draw(self._generator(1, number), BLOCK_ROWS).parts
                for number in range(CALIBRATION_BLOCKS)
            ],
            axis=1,
        )
        spread = parts.std(axis=1)
        wanted = np.array([DENSE_SHARE, FIRST_ORDER_SHARE, INTERACTION_SHARE], np.float32)
        # A log of one-row tables has no categorical effects at all.
        self.scale = np.where(spread > 1e-6, wanted / np.maximum(spread, 1e-6), 0).astype(
            np.float32
        )
        # The parts may correlate, differently for each seed.
        self.scale *= np.float32(LOGIT_STD) / (self.scale @ parts).std()
        self.intercept = _intercept(self.scale @ parts, positive_rate)

    def _generator(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def block(self, number: int, num_rows: int) -> PlantedClicks:
        """Draw block `number` whole, and keep its first rows."""
        generator = self._generator(2, number)
        draw = self._draw(generator, BLOCK_ROWS)
        probability = _sigmoid(self.scale @ draw.parts + self.intercept)
        y = (generator.random(BLOCK_ROWS, dtype=np.float32) < probability).astype(np.int8)
        return PlantedClicks(
            X_int=draw.values.T[:num_rows],
            int_missing=draw.int_missing.T[:num_rows],
            X_cat=draw.ids.T[:num_rows],
            cat_missing=draw.cat_missing.T[:num_rows],
            y=y[:num_rows],
            probability=probability[:num_rows],
        )

    def _draw(self, generator: np.random.Generator, num_rows: int) -> _Draw:
        parts = np.zeros((3, num_rows), np.float32)
        latent = np.zeros((LATENT_DIM, num_rows), np.float32)  # sum of the vectors that interact
        self_products = np.zeros(num_rows, np.float32)
        values, int_missing = self._draw_dense(generator, parts, latent, self_products)
        ids, cat_missing = self._draw_categories(generator, parts, latent, self_products)
        # Factorisation machine: the sum over all pairs of inner products.
        np.einsum("dn,dn->n", latent, latent, out=parts[2])
        parts[2] -= self_products
        return _Draw(values, int_missing, ids, cat_missing, parts)

    def _draw_dense(
        self,
        generator: np.random.Generator,
        parts: np.ndarray,
        latent: np.ndarray,
        self_products: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        num_rows: int = parts.shape[1]
        values = np.empty((len(self.dense), num_rows), np.int32)
        missing = np.empty((len(self.dense), num_rows), bool)
        for i, shape in enumerate(self.dense):
            logs = generator.standard_normal(num_rows, dtype=np.float32)
            logs = np.clip(logs * shape.log_std + shape.log_mean, 0, LARGEST_LOG_DENSE)
            values[i] = np.exp(logs) - 0.5  # about the nearest whole number
            chance = generator.random(num_rows, dtype=np.float32)
            missing[i] = chance < shape.missing_rate
            values[i][missing[i]] = 0
            if shape.negative_rate:
                # The low end of what is left, so that no value is both negative and missing.
                rest = (chance - shape.missing_rate) / shape.negative_rate
                values[i][~missing[i] & (rest < 1)] = -1
                values[i][~missing[i] & (rest < 0.1)] = -2
            standard = np.log1p(np.maximum(values[i], 0).astype(np.float32))
            standard = (standard - np.float32(shape.log_mean)) / np.float32(shape.log_std)
            parts[0] += np.float32(shape.linear) * standard
            if shape.wave:
                parts[0] += np.float32(shape.wave) * np.cos(2 * standard)
            if shape.interaction:
                vectors = self.dense_latent[i][:, None] * standard * np.float32(shape.interaction)
                latent += vectors
                self_products += np.einsum("dn,dn->n", vectors, vectors)
        return values, missing

    def _draw_categories(
        self,
        generator: np.random.Generator,
        parts: np.ndarray,
        latent: np.ndarray,
        self_products: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        num_rows: int = parts.shape[1]
        # Of values that came later, ids are larger.
        kind = np.int64 if self.drift.turnover else np.int32
        ids = np.empty((len(self.columns), num_rows), kind)
        missing = np.empty((len(self.columns), num_rows), bool)
        shared_bin = generator.integers(0, SHARED_BINS, num_rows).astype(np.float64)
        # Columns of one missing rate are missing in the same rows, as in the Kaggle log.
        absent = {
            rate: generator.random(num_rows, dtype=np.float32) < rate
            for rate in sorted({column.missing_rate for column in self.columns})
        }
        for c, column in enumerate(self.columns):
            uniform = generator.random(num_rows)
            if column.long_tail:
                uniform = (shared_bin + uniform) / SHARED_BINS  # uniform still, and rare together
            missing[c] = absent[column.missing_rate]
            ids[c] = column.ids(uniform)
            ids[c][missing[c]] = column.size - 1
            values = self.drift.identities(ids[c], column.size, column.long_tail)
            effect, vectors = self.drift.effects(self.column_keys[c], values)
            weight = column.weights(ids[c], missing[c])
            parts[1] += weight * effect
            if column.interacts:
                vectors *= weight
                latent += vectors
                self_products += np.einsum("dn,dn->n", vectors, vectors)
            if self.drift.turnover:
                ids[c] = values
        return ids, missing


class _Column:
    """One categorical column: its power law over its table, and how much an id matters."""

    def __init__(self, shape: CategoryShape, size: int) -> None:
        self.size = size
        self.missing_rate = shape.missing_rate if size > 1 else 0.0
        self.interacts = shape.interacts
        self.num_present = size - (self.missing_rate > 0)  # the last id stands for missing
        self.long_tail = size > 1000
        self.head, self.shift = shape.head, shape.shift
        self.power = 1 - shape.exponent  # of the integral of the power law
        self.low = self.shift**self.power
        self.high = (self.num_present + self.shift) ** self.power
        # The id that a share `LEARNABLE` of all rows has; rarer ones fade out.
        constant = (1 - self.head) * abs(self.power) / abs(self.high - self.low)
        self.fade = max((constant / LEARNABLE) ** (1 / shape.exponent) - self.shift, 1.0)

    def ids(self, uniform: np.ndarray) -> np.ndarray:
        """Map uniform values in [0, 1) to ids by the inverse of the cumulative power law."""
        if self.head:
            uniform = np.maximum((uniform - self.head) / (1 - self.head), 0)
        drawn = (self.low + uniform * (self.high - self.low)) ** (1 / self.power) - self.shift
        return np.clip(drawn, 0, self.num_present - 1).astype(np.int32)

    def weights(self, ids: np.ndarray, missing: np.ndarray) -> np.ndarray:
        """How much each id's effects count: 1 for popular ids, near 0 for ids too rare to learn."""
        weights = 1 / (1 + np.square(ids * np.float32(1 / self.fade)))
        weights[missing] = 1
        return weights


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def _intercept(logits: np.ndarray, positive_rate: float) -> np.float32:
    """Find by bisection what to add to `logits` for a mean probability of `positive_rate`."""
    low, high = -40.0 - float(logits.max()), 40.0 - float(logits.min())
    for _ in range(60):
        middle = (low + high) / 2
        if _sigmoid(logits + np.float32(middle)).mean() < positive_rate:
            low = middle
        else:
            high = middle
    return np.float32((low + high) / 2)
