"""A trained model, out of the folder that a trainer saved, without the data it was trained on.

    from slipstream.serving.model import load_model

    model = load_model("runs/model")
    probabilities = model.predict(frame)  # pandas, polars, or a dict of arrays

The embedding rows stay in their file, which is mapped: memory grows with the rows that are used.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slipstream.logs.features import FeatureLayout, layout_of
from slipstream.logs.rows import import_polars
from slipstream.logs.scoring import Encoded, Reader
from slipstream.logs.sub_sampling import SUB_SAMPLING, sub_sampling_of
from slipstream.logs.transforms import Transforms, transforms_of
from slipstream.model.features import features_of
from slipstream.model.networks import ClickModel, build_network, find_network
from slipstream.tools import cli
from slipstream.tools.cli import Flag
from slipstream.tools.device import choose_device, tune_process
from slipstream.tools.metrics import probabilities
from slipstream.training.resume import PRECISION
from slipstream.training.saved import (
    BEST,
    DESCRIPTION,
    Saved,
    found_checkpoint,
    open_checkpoint,
    text_command,
)
from slipstream.training.vocabulary_file import kept_vocabulary

LOAD_MODEL = Flag(
    "--load-model",
    str,
    cli.REQUIRED,
    "the folder of --save-model: its best checkpoint where validation chose one, else the newest; "
    "or one checkpoint in it",
    "DIR",
)
CORRECTION = Flag(
    "--correct-sub-sampling",
    cli.boolean,
    True,
    "of a model whose training rows without a click were thinned: probabilities of whole rows",
)
NETWORK = Flag(
    "--model", str, None, "a network of your own, which the model was trained with", "FILE:CLASS"
)
BATCH_SIZE = 16384  # as the trainers' --test-mini-batch-size
MANY_ROWS, MOST = 100, 0.99  # of which, a share of a column's values that is as good as all
SAME_COLUMN = "is it the same column, of the same type (000050 read as a number is 50)?"


class TrainedModel:
    """What `load_model` returns.

    Attributes:
        saved: the checkpoint.
        reader: reads logs as the model's own was read.
        model: the network, as it is called.
        rows: (rows, dim) of all tables, mapped.
        offsets: (C,) int64, the first row of each id column's table.
        shift: added to logits, as rows without a click were left out in training; 0: none were.
        batch_size: rows that go through the network at once.
        unseen: (C,) how many values of each id column the model's log did not have, over all calls
            so far.
    """

    def __init__(
        self, saved: Saved, model: ClickModel, reader: Reader, device: torch.device, batch_size: int
    ) -> None:
        self.saved, self.reader, self.device, self.batch_size = saved, reader, device, batch_size
        self.model, self.precision = model, model.precision
        vocabulary, layout = reader.vocabulary, reader.layout
        sizes = [len(table) for table in vocabulary.tables]
        self.rows = _mapped(saved.arrays["rows"])
        dim = saved.network["features"]["dim"]
        if self.rows.shape != (sum(sizes), dim):
            raise ValueError(
                f"{saved.folder} has rows of shape {tuple(self.rows.shape)}; its vocabulary is of "
                f"{sum(sizes)} rows of {dim} values"
            )
        first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.offsets = torch.from_numpy(first[layout.table_of_column])
        thinned = sub_sampling_of({SUB_SAMPLING: saved.identity["data"].get(SUB_SAMPLING)}, "it")
        self.shift = 0.0 if thinned is None else thinned.logit_shift
        self.unseen = np.zeros(layout.num_columns, np.int64)

    def predict(self, frame: Any, corrects: bool = True) -> np.ndarray:
        """Click probabilities (n,) float64 of rows with the columns of the model's log.

        `frame`: pandas or a dict of arrays, where NaN is a missing value, or polars. Labels,
        weights and other columns may be there. With `corrects`, of a model whose training rows were
        thinned, probabilities are those of whole rows. Raises `ValueError` for a missing column, or
        a value that is none of its kind; warns of a column with hardly a value that is known.
        """
        encoded = self.reader.of_frame(_polars_frame(frame))
        self.unseen += encoded.unseen
        found = self.by_feature(encoded.unseen)
        for line in self.unseen_lines(found, len(encoded.ids))[0]:
            warnings.warn(line, stacklevel=2)
        return probabilities(self.logits(encoded), self.shift if corrects else 0.0)

    def by_feature(self, unseen: np.ndarray) -> dict[str, int]:
        """Of counts (C,) by id column those of each feature that are not 0."""
        found: dict[str, int] = {}
        for name, number in zip(self.reader.column_names, unseen.tolist(), strict=True):
            found[name] = found.get(name, 0) + number
        return {name: number for name, number in found.items() if number}

    def unseen_lines(self, unseen: Mapping[str, int], num_rows: int) -> tuple[list[str], list[str]]:
        """Lines on features with values that the vocabulary does not have.

        First those on features that, in many rows, have hardly another value, then the others.
        """
        strange, usual = [], []
        for name, number in unseen.items():
            num_columns = self.reader.column_names.count(name)
            share, where = number / max(num_rows * num_columns, 1), f"{num_rows:,} rows"
            if num_columns == 1:
                line = f"{name}: {number:,} of {where} ({share:.2%}) have a value"
            else:  # how many values their lists hold is not known here
                line = f"{name}: the lists of {where} have {number:,} values"
            line += " that the vocabulary does not have"
            if num_rows >= MANY_ROWS and share >= MOST:
                strange.append(f"{line}; {SAME_COLUMN}")
            else:
                usual.append(line)
        return strange, usual

    def logits(self, encoded: Encoded) -> np.ndarray:
        """Logits (n,) float32, as evaluation computes them; `ValueError`: one is not finite."""
        parts = [np.empty(0, np.float32)]
        for start in range(0, len(encoded.ids), self.batch_size):
            part = slice(start, start + self.batch_size)
            parts.append(self._logits(encoded.dense[part], encoded.ids[part]))
        outputs = np.concatenate(parts)
        if not np.isfinite(outputs).all():
            raise ValueError(f"{self.saved.folder}: the model's outputs are not finite")
        return outputs

    def _logits(self, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
        dense = torch.from_numpy(self.reader.transforms.apply(values))
        numbers = torch.from_numpy(ids).long()
        is_absent = numbers < 0
        places = (numbers + self.offsets).masked_fill_(is_absent, 0)
        rows = self.rows.index_select(0, places.view(-1)).view(*ids.shape, -1)
        if bool(is_absent.any()):
            rows.masked_fill_(is_absent.unsqueeze(2), 0.0)
        present = None
        if self.reader.layout.has_absent:
            present = (~is_absent).to(self.device)
        with self.model.evaluating():
            logits = self.model(dense.to(self.device), rows.to(self.device), present)
        return logits.float().cpu().numpy()


def load_model(
    folder: str | Path,
    *,
    network: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    num_threads: int = 0,
    batch_size: int = BATCH_SIZE,
) -> TrainedModel:
    """A trained model, from a checkpoint or a folder of them: `best` where there is one, else the
    newest.

    `network`: `file.py:Class`, needed where the model is of a reader's own file, which is never run
    unasked. `device` and `num_threads` as the trainers' flags, `precision` auto: as in training.

    Raises `ValueError` for a folder that is damaged or lacks what scoring needs, and
    `FileNotFoundError` where there is no model.
    """
    saved = chosen_checkpoint(Path(folder))
    vocabulary = kept_vocabulary(saved)
    with saved.reading():
        layout, transforms = _features_of(saved, len(vocabulary.tables))
    try:
        reader = Reader(vocabulary, layout, transforms)
    except ValueError as error:
        raise ValueError(f"{saved.folder}: {error}") from None
    chosen = choose_device(device)
    precision = _precision_of(saved, precision, chosen)
    tune_process(chosen, num_threads, precision, deterministic=False)
    model = _click_model(saved, network, layout, len(transforms.columns), chosen, precision)
    return TrainedModel(saved, model, reader, chosen, batch_size)


def chosen_checkpoint(folder: Path) -> Saved:
    """`folder` itself, or in it `best`, or the newest."""
    best = folder / BEST
    if not (folder / DESCRIPTION).exists() and (best / DESCRIPTION).exists():
        return open_checkpoint(best)
    return found_checkpoint(folder)


def _features_of(saved: Saved, num_tables: int) -> tuple[FeatureLayout, Transforms]:
    described = saved.network["features"]
    sparse, num_dense = described["sparse"], described["num_dense"]
    num_columns = sum(len(feature["columns"]) for feature in sparse)
    layout = layout_of({"features": sparse}, num_columns, num_tables, str(saved.folder))
    return layout, transforms_of(described, num_dense, str(saved.folder))


def _precision_of(saved: Saved, asked: str, device: torch.device) -> str:
    if asked != "auto":
        return asked
    kept = saved.identity.get("rate", {}).get(PRECISION, "fp32")
    return "fp32" if kept == "tf32" and device.type == "cpu" else kept


def _click_model(
    saved: Saved,
    asked: str | None,
    layout: FeatureLayout,
    num_dense: int,
    device: torch.device,
    precision: str,
) -> ClickModel:
    kept = saved.network
    if kept["text"] is not None and asked is None:
        raise ValueError(
            f"{saved.folder} is of --model {kept['name']}: give that file again; "
            + text_command(saved)
        )
    spec = find_network(asked or kept["name"], kept["options"])
    if spec.plugin.sha256 != kept["sha256"]:
        raise ValueError(
            f"--model {asked} is not the file that {saved.folder} was trained with; "
            + text_command(saved)
        )
    features = features_of(layout, num_dense, kept["features"]["dim"])
    network = build_network(spec, features, seed=0)
    model = ClickModel(network, layout)
    with spec.plugin.running(), torch.no_grad():  # a lazy layer takes its shape
        shape = (2, layout.num_columns)
        present = torch.ones(shape, dtype=torch.bool) if layout.has_absent else None
        model(torch.zeros(2, num_dense), torch.zeros(*shape, features.dim), present)
    saved.load_network(network)
    least = saved.identity["run"].get("--loss-threshold", 0.0)
    network.to(device)
    return ClickModel(network, layout, precision, least_probability=least, plugin=spec.plugin)


def _mapped(array: np.ndarray) -> torch.Tensor:
    """A read-only array as a tensor, which nobody writes to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _polars_frame(frame: Any) -> Any:
    """A polars frame of a pandas one or of a dict of arrays; `ValueError` for anything else."""
    pl = import_polars()
    if isinstance(frame, pl.DataFrame):
        return frame
    try:
        columns = {str(name): frame[name] for name in frame}
        return pl.DataFrame({name: _series(pl, values) for name, values in columns.items()})
    except (TypeError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"the frame cannot be read as columns: {error}") from error


def _series(pl: Any, values: Any) -> Any:
    if hasattr(values, "isna") and values.dtype.kind not in "iufbM":
        values = values.astype(object).where(values.notna(), None)  # of any kind of missing one
    values = values.to_numpy() if hasattr(values, "to_numpy") else values
    if isinstance(values, (list, tuple)):
        values = np.fromiter(values, object, len(values))
    # To pandas, and so here, NaN is a missing value; a polars frame has null for that.
    if isinstance(values, np.ndarray) and values.dtype == object:
        values = [None if isinstance(v, float) and v != v else v for v in values.tolist()]
    series = pl.Series(values, strict=False) if isinstance(values, list) else pl.Series(values)
    return series.fill_nan(None) if series.dtype.is_float() else series
