"""What preprocessing says of a log: in the manifest of its processed file, and on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.encoding import Part
from slipstream.logs.formats import Schema
from slipstream.logs.selection import SUB_SAMPLED, Selection, describe
from slipstream.logs.transforms import TRANSFORMS, Transform
from slipstream.tools.runtime import peak_rss_bytes

MAX_SHOWN_FILES, FEW_HELD_OUT = 50, 1000


def report_of(
    schema: Schema,
    parts: Sequence[Part],
    tables: Sequence[dict[str, Any]],
    selection: Selection,
    statistics: Sequence[tuple[float, float]],
) -> dict[str, Any]:
    """What the manifest says of the log's rows and columns.

    `tables`: what `merge_table` said; `statistics`: means and deviations of standardized features.
    """
    num_read = sum(part.num_rows for part in parts)
    infos = [part.info for part in parts]
    rows_of_file: dict[int, int] = {}
    for part in parts:
        file = part.info["file"]
        rows_of_file[file] = rows_of_file.get(file, 0) + part.num_rows
    read = {info["file"]: info["source"] for info in infos if "source" in info}
    check_twins([source for file, source in read.items() if rows_of_file[file]])
    dropped, seen = (_added(info.get(key, {}) for info in infos) for key in ("dropped", "seen"))
    if selection.num_thinned:
        dropped[SUB_SAMPLED] = dropped.get(SUB_SAMPLED, 0) + selection.num_thinned
    num_rows = int(selection.days[-1])
    zeros = np.sum([info["zeros"] for info in infos], axis=0) / num_read
    largest = np.max([info["largest"] for info in infos], axis=0)
    dense = zip(schema.dense_names, zeros.tolist(), largest.tolist(), strict=True)
    report = {
        "num_lines": sum(info.get("num_lines", 0) for info in infos),
        "num_rows": num_rows,
        "num_positive": sum(info["num_positive"] for info in infos),
        "rows_dropped": dropped,
        "seen": {what: number for what, number in seen.items() if number},
        "bad_lines": [line for info in infos for line in info.get("examples", [])][:5],
        "sources": [{**source, "rows": rows_of_file[file]} for file, source in read.items()],
        "dense_columns": [
            {"name": name, "zero_share": share, "largest": most} for name, share, most in dense
        ],
        "table_columns": [
            _table_column(name, table)
            for name, table in zip(schema.table_names, tables, strict=True)
        ],
        "held_out_files": selection.held_out_files() if len(read) > 1 else [],
        **describe(selection.choice, schema),
    }
    if schema.features:
        report["features"] = schema.layout.describe()
    if schema.transforms:
        report[TRANSFORMS] = _transforms(schema, statistics)
    return report


def _added(counts: Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for what, number in one.items():
            total[what] = total.get(what, 0) + number
    return total


def _table_column(name: str, table: dict[str, Any]) -> dict[str, Any]:
    """Shares are of the table's accesses: one a row and column of its features, but for absent."""
    num_accesses = table["accesses"]
    column = {
        "name": name,
        "distinct": table["distinct"],
        "missing_share": table["missing"] / num_accesses,
        "top_1_percent_share": table["top"] / num_accesses,
    }
    if table["whole_floats"]:
        column["whole_floats"] = table["whole_floats"]
    if rare := table.get("rare"):
        share = rare["accesses"] / num_accesses
        column |= {"rare_id": rare["id"], "rare_values": rare["values"], "rare_share": share}
    return column


def _transforms(schema: Schema, statistics: Sequence[tuple[float, float]]) -> list[dict[str, Any]]:
    found = iter(statistics)
    return [
        (Transform(kind, *next(found)) if kind == "standardize" else Transform(kind)).describe()
        for kind in schema.transforms
    ]


def check_twins(sources: Sequence[dict[str, Any]]) -> None:
    """Raise `ValueError` where two files hold the same: held-out rows would be trained on, too."""
    known: dict[str, str] = {}
    for source in sources:
        content = source.get("content_sha256", source["sha256"])
        if content in known:
            raise ValueError(
                f"{known[content]} and {source['name']} hold the same rows; take one of them away"
            )
        known[content] = source["name"]


def print_summary(processed: Path, numbers: dict[str, Any], seconds: float) -> None:
    """Print what was built and what it took."""
    num_rows, num_lines = numbers["num_rows"], numbers["num_lines"]
    print(
        f"read {num_lines:,} lines in {seconds:,.1f} s: {num_lines / seconds:,.0f} lines/s, peak"
        f" RSS {peak_rss_bytes() / 1e6:,.0f} MB"
    )
    for reason, num in numbers["rows_dropped"].items():
        print(f"left out: {num:,} ({reason})")
    for line in numbers["bad_lines"]:
        print(f"bad line: {line}")
    columns = numbers["table_columns"]
    print("table                    distinct values   missing   accesses to the top 1 % of values")
    for column in columns:
        rare = ""
        if "rare_id" in column:
            rare = f"   {column['rare_values']:,} rare values share a row"
        print(
            f"{column['name'][:24]:<24} {column['distinct']:>15,} {column['missing_share']:>9.2%}"
            f" {column['top_1_percent_share']:>9.2%}{rare}"
        )
        if "whole_floats" in column:
            print(f"  {column['whole_floats']:,} whole floats (as 17.0), taken as integers")
    print("dense                              largest         0")
    for column in numbers["dense_columns"]:
        name, largest = column["name"][:24], column["largest"]
        print(f"{name:<24} {largest:>17,.6g} {column['zero_share']:>9.2%}")
    for what, number in numbers["seen"].items():
        print(f"{number:,} {what}")
    if any(what.startswith("negative") for what in numbers["seen"]):
        print(
            'warning: a "transform" of signed_log, standardize or none, in the column file, keeps'
            " negative values"
        )
    _print_sets(numbers)
    counts = [column["distinct"] for column in columns]
    print(
        f"wrote {processed}: {num_rows:,} rows, {numbers['num_positive'] / num_rows:.2%} positive\n"
        f"{len(counts)} tables, {sum(counts):,} embedding rows: {'-'.join(map(str, counts))}"
    )


def _print_sets(numbers: dict[str, Any]) -> None:
    """Print the files, the days and which rows are held out."""
    sources, days = numbers["sources"], numbers["days"]
    if len(sources) > 1:
        for source in sources[:MAX_SHOWN_FILES]:
            print(f"read {source['name']}: {source['rows']:,} rows")
    held_out = days[-1] - days[-2]
    rule = numbers.get("split", {"rule": "last day"})["rule"]
    which = {
        "last day": "of the last day ",
        "random": "drawn at random ",
        "file": "of a test file ",
    }
    names = numbers["held_out_files"]
    of_files = f" ({names[0]}{f' to {names[-1]}' if len(names) > 1 else ''})" if names else ""
    print(
        f"{len(days) - (1 if rule == 'last day' else 2):,} days: {days[-2]:,} training rows,"
        f" {held_out:,} {which.get(rule, '')}held out{of_files}"
    )
    if rule != "none" and held_out < FEW_HELD_OUT:
        print(f"warning: {held_out:,} held-out rows are few to judge a model by")
    thinned = numbers.get("sub_sampling")
    if thinned and thinned["held_out"] == "whole":
        rate = thinned["rate"]
        print(
            f"negative training rows are thinned by {rate:g}, held-out rows are whole: trainers"
            f" correct outputs, p / (p + (1 - p) / {1 - rate:g})"
        )
