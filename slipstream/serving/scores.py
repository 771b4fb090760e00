"""A raw log's rows to click probabilities, one a line in the file's order, in bounded memory.

With labels: AUC, log loss, normalised entropy and calibration, of all rows and by the values of a
column. That takes 9 bytes of memory a row, and 4 more where rows are grouped. Of Taobao's log each
user's last click is kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from slipstream.logs import sources
from slipstream.logs.containers import PACKED
from slipstream.logs.folders import log_files, root_of
from slipstream.logs.rawfile import BLOCK_BYTES, RawFile, Tally
from slipstream.logs.rows import import_polars
from slipstream.logs.scoring import Block, Encoded, joined
from slipstream.serving.model import TrainedModel
from slipstream.tools.metrics import (
    calibration,
    click_metrics,
    mean_calibration,
    probabilities,
)
from slipstream.tools.places import output_file, regular_file, room_for
from slipstream.training.vocabulary_file import VOCABULARY_FILE

COLUMN = "probability"
MAX_GROUPS, MOST_SHOWN = 10_000, 50
STANDARD_OUTPUT = "-"
NO_ROW = "nan"  # until it is Parquet, whose reader takes an empty line for none


@dataclass
class Judged:
    """What is needed to judge the scores of rows with labels.

    Attributes:
        logits, labels, weights, groups: of all rows so far, in pieces.
        numbers: of the groups' values.
        is_weighted: any file has weights; else they are all 1.
    """

    logits: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)
    groups: list[np.ndarray] = field(default_factory=list)
    numbers: dict[str | None, int] = field(default_factory=dict)
    is_weighted: bool = False

    def add(self, block: Block) -> None:
        """Take a block's labels; its logits come when they are computed."""
        if block.labels is None:
            return
        self.labels.append(block.labels)
        # Of a file without weights all rows count alike.
        has_weights = block.weights is not None
        weights = block.weights if has_weights else np.ones(len(block.labels), np.float32)
        self.weights.append(weights)  # type: ignore[arg-type]
        self.is_weighted = self.is_weighted or has_weights
        if block.groups is not None:
            values = block.groups.to_list()
            for value in dict.fromkeys(values):
                self.numbers.setdefault(value, len(self.numbers))
            if len(self.numbers) > MAX_GROUPS:
                raise ValueError(f"--by: the column has over {MAX_GROUPS:,} values; take another")
            self.groups.append(np.array([self.numbers[value] for value in values], np.int32))

    def report(self, shift: float) -> dict[str, Any]:
        """Metrics of all rows and, where there are groups, of each."""
        logits = np.concatenate(self.logits)
        logits = logits.astype(np.float64) + shift if shift else logits
        labels = np.concatenate(self.labels)
        weights = np.concatenate(self.weights) if self.is_weighted else None
        report = _metrics(logits, labels, weights)
        report["reliability"] = calibration(probabilities(logits), labels, weights)
        if self.groups:
            groups = np.concatenate(self.groups)
            order = np.argsort(groups, kind="stable")
            ends = np.cumsum(np.bincount(groups, minlength=len(self.numbers)))[:-1]
            report["by"] = {
                "" if value is None else value: _metrics(
                    logits[at], labels[at], None if weights is None else weights[at]
                )
                for value, at in zip(self.numbers, np.split(order, ends), strict=True)
            }
        return report


def _metrics(logits: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> dict[str, Any]:
    return {
        "rows": len(labels),
        **click_metrics(logits, labels, weights),
        **mean_calibration(probabilities(logits), labels, weights),
    }


def score_log(
    model: TrainedModel,
    raw_data_file: str | Path,
    output: str,
    *,
    bad_lines: int = 0,
    by: str = "",
    corrects: bool = True,
    separator: str = "",
    decimal: str = "",
    block_bytes: int = BLOCK_BYTES,
) -> dict[str, Any]:
    """Write the probabilities of a log's lines to `output`: CSV, Parquet by its name, `-`.

    One line a line of the log; blank and bad ones have an empty score. The file is written beside
    itself and renamed. Returns `lines`, `rows`, `bad_lines`, `unseen` by feature, `by` and, where
    the log has labels, `metrics`. Raises `ValueError` and `OSError` as preprocessing does.
    """
    paths = files_of(model.reader.data_set, raw_data_file)
    raws = [RawFile(path, root=root_of(path, [raw_data_file])) for path in paths]
    if output != STANDARD_OUTPUT:
        check_output(model, "--output", output, raw_data_file)
    tally, judged, shift = Tally(bad_lines), Judged(), model.shift if corrects else 0.0
    before = model.unseen.copy()
    # As a log's first line names its columns, so does the first line here.
    reader = model.reader.written_otherwise(separator, decimal, paths)
    has_header = reader.has_header(paths[0])
    names = reader.log_format.names
    if by and not has_header and by not in names:
        raise ValueError(f"--by {by}: the log's columns are {', '.join(names)}")
    blocks = partial(reader.blocks, tally=tally, block_bytes=block_bytes, group=by)
    num_lines = num_rows = 0
    with _written(output, has_header) as write:
        for has_row, logits in _logits(model, raws, blocks, judged):
            num_lines, num_rows = num_lines + len(has_row), num_rows + len(logits)
            write(has_row, probabilities(logits, shift))
    found: dict[str, Any] = {"lines": num_lines, "rows": num_rows}
    found["bad_lines"] = tally.dropped.get("bad line", 0)
    found["examples"] = tally.examples
    found["unseen"] = model.by_feature(model.unseen - before)
    found |= {"labelled": sum(map(len, judged.labels)), "by": by}
    if num_rows and found["labelled"] == num_rows:
        found["metrics"] = judged.report(shift)
    return found


def check_output(model: TrainedModel, flag: str, path: str, raw_data_file: str | Path) -> None:
    """Raise `ValueError` for a file that is, or lies in, the log or the model."""
    suffix = Path(path).suffix
    if suffix in (*PACKED, ".zst"):
        raise ValueError(f"{flag} {path}: it is written plain; expected a name without {suffix}")
    saved = model.saved.folder
    folder = saved.parent if (saved.parent / VOCABULARY_FILE).exists() else saved
    output_file(flag, path, (raw_data_file, folder))


def files_of(data_set: str, raw_data_file: str | Path) -> list[Path]:
    """The files of a log to score, in order: one, or all of a folder."""
    path = Path(raw_data_file)
    if data_set == "custom" and path.is_dir():
        return log_files(path)
    if path.is_dir() and data_set == "terabyte":
        raise ValueError(f"{path} is a folder; name the file of one day, as {path / 'day_23.gz'}")
    if path.is_dir() or not path.exists():
        return sources.find_raw_files(data_set, path, 1)
    return [regular_file(path)]


def _logits(
    model: TrainedModel,
    raws: Sequence[RawFile],
    blocks: Callable[[RawFile], Iterator[Block]],
    judged: Judged,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each block of lines which have a row, and these rows' logits.

    Rows go through the network in mini-batches as evaluation cuts them, whatever the blocks are.
    """
    waiting: list[Block] = []
    encoded: list[Encoded] = []
    ready = np.empty(0, np.float32)
    total = sum(raw.size_and_time["bytes"] for raw in raws)
    with tqdm(total=total, unit="B", unit_scale=True, desc="scoring", disable=None) as bar:
        for raw in raws:
            shown = 0
            for block in blocks(raw):
                judged.add(block)
                model.unseen += block.encoded.unseen
                waiting.append(block)
                encoded.append(block.encoded)
                if sum(len(part.ids) for part in encoded) >= model.batch_size:
                    encoded, logits = _whole_batches(model, encoded)
                    judged.logits += [logits] if judged.labels else []
                    ready = np.concatenate([ready, logits])
                while waiting and len(waiting[0].encoded.ids) <= len(ready):
                    num = len(waiting[0].encoded.ids)
                    yield waiting.pop(0).has_row, ready[:num]
                    ready = ready[num:]
                bar.update(raw.num_read - shown)
                shown = raw.num_read
        logits = model.logits(joined(encoded)) if encoded else ready[:0]
        judged.logits += [logits] if judged.labels else []
        ready = np.concatenate([ready, logits])
        for block in waiting:
            num = len(block.encoded.ids)
            yield block.has_row, ready[:num]
            ready = ready[num:]


def _whole_batches(model: TrainedModel, encoded: list[Encoded]) -> tuple[list[Encoded], np.ndarray]:
    """The rows behind the last whole mini-batch, and the logits of those before."""
    rows = joined(encoded)
    num = len(rows.ids) // model.batch_size * model.batch_size
    logits = model.logits(rows._replace(dense=rows.dense[:num], ids=rows.ids[:num]))
    return [rows._replace(dense=rows.dense[num:], ids=rows.ids[num:])], logits


Write = Callable[[np.ndarray, np.ndarray], None]


@contextmanager
def _written(output: str, has_header: bool) -> Iterator[Write]:
    """What takes (has_row, probabilities) of lines in turn; the file is in its place at the end."""
    if output == STANDARD_OUTPUT:
        # Not `sys.stdout`: what is lost of it is a result here, not chatter.
        if (failure := getattr(sys.stdout, "failure", None)) is not None:
            raise OSError(f"--output -: standard output cannot be written to: {failure}")
        try:
            with open(os.dup(1), "wb") as file:
                yield _csv_writer(file, has_header)
        except BrokenPipeError:
            raise OSError("--output -: its reader took no more; scores are missing") from None
        return
    path = Path(os.path.realpath(output))
    is_parquet = path.suffix == ".parquet"
    partial = room_for(path.with_name(path.name + ".partial"))
    table = room_for(path.with_name(path.name + ".table.partial"))
    try:
        with open(partial, "wb") as file:
            yield _csv_writer(file, has_header and not is_parquet, NO_ROW if is_parquet else "")
            file.flush()
            os.fsync(file.fileno())
        if is_parquet:
            pl = import_polars()
            schema, lines = {COLUMN: pl.Float64}, pl.LazyFrame(schema={COLUMN: pl.Float64})
            if partial.stat().st_size:
                lines = pl.scan_csv(partial, has_header=False, schema=schema)
            lines.with_columns(pl.col(COLUMN).fill_nan(None)).sink_parquet(table)
            os.replace(table, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        table.unlink(missing_ok=True)


def _csv_writer(file: IO[bytes], has_header: bool, empty: str = "") -> Write:
    pl = import_polars()
    if has_header:
        file.write(f"{COLUMN}\n".encode())

    def write(has_row: np.ndarray, scores: np.ndarray) -> None:
        values = np.full(len(has_row), np.nan)
        values[has_row] = scores
        lines = pl.DataFrame({COLUMN: values}).with_columns(pl.col(COLUMN).fill_nan(None))
        # The shortest digits that read back as the same number; a line without a row is empty.
        text = "\n".join(lines[COLUMN].cast(pl.String).fill_null(empty).to_list())
        file.write(text.encode() + b"\n" if len(has_row) else b"")

    return write


def say(found: dict[str, Any], model: TrainedModel, file: IO[str] | None = None) -> None:
    """Print what `score_log` found."""
    file = file or sys.stdout
    lines, rows = found["lines"], found["rows"]
    print(f"scored {rows:,} rows of {lines:,} lines", file=file)
    if found["bad_lines"]:
        print(f"{found['bad_lines']:,} bad lines have an empty score", file=file)
        for example in found["examples"]:
            print(f"bad line: {example}", file=file)
    strange, usual = model.unseen_lines(found["unseen"], rows)
    for line in (*(f"warning: {line}" for line in strange), *usual):
        print(line, file=file)
    if found["labelled"] < rows and (found["labelled"] or found["by"]):
        print(f"no metrics: {found['labelled']:,} of {rows:,} rows have a label", file=file)
    if "metrics" in found:
        _say_metrics(found["metrics"], file)
        if found["by"]:
            _say_groups(found["by"], found["metrics"]["by"], file)


def _say_metrics(metrics: dict[str, Any], file: IO[str]) -> None:
    print(
        f"AUC {metrics['auc']:.4f}, log loss {metrics['log_loss']:.4f}, normalised entropy "
        f"{metrics['normalized_entropy']:.4f}, accuracy {metrics['accuracy']:.4f}\n"
        f"click rate {metrics['click_rate']:.4f}, mean probability "
        f"{metrics['mean_probability']:.4f}: calibration {metrics['calibration']:.4f}",
        file=file,
    )
    print("tenths by probability:      rows   mean probability   click rate", file=file)
    for rows, mean, rate in metrics["reliability"]:
        print(f"{rows:>32,} {mean:>18.4f} {rate:>12.4f}", file=file)


def _say_groups(name: str, groups: dict[str, Any], file: IO[str]) -> None:
    shown = list(groups.items())
    if len(shown) > MOST_SHOWN:
        shown = sorted(shown, key=lambda group: -group[1]["rows"])[:MOST_SHOWN]
    head = f"{_short(f'by {name}:')} {'rows':>9} {'AUC':>8} {'log loss':>10} {'calibration':>13}"
    print(head, file=file)
    for value, one in shown:
        print(
            f"{_short(value or '(empty)')} {one['rows']:>9,} {one['auc']:>8.4f} "
            f"{one['log_loss']:>10.4f} {one['calibration']:>13.4f}",
            file=file,
        )
    if len(groups) > len(shown):
        num_others = len(groups) - len(shown)
        print(f"and {num_others:,} more values, of fewer rows (--report has all)", file=file)


def _short(text: str) -> str:
    """Of 28 characters, the end of a longer text among them."""
    return f"{text if len(text) <= 28 else text[:12] + '...' + text[-13:]:<28}"
