"""What preprocessing says of a log: in the manifest of its processed file, in a report beside that,
and on the screen.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slipstream.logs.encoding import Part
from slipstream.logs.folders import REPORT_END
from slipstream.logs.formats import Schema
from slipstream.logs.selection import SUB_SAMPLED, Selection, describe
from slipstream.logs.transforms import TRANSFORMS, Transform
from slipstream.tools.places import room_for
from slipstream.tools.runtime import peak_rss_bytes

FEW_HELD_OUT = 1000
# A table of so many values for a row, where there are enough rows to tell, is likely of row ids.
NEAR_ALL, MANY_ROWS = 0.95, 1000
MAX_NAMED = 5


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


def write_report(processed: Path, numbers: dict[str, Any]) -> str:
    """Write the report, and return where it is; where it cannot be written, why: the processed file
    is whole without it.
    """
    path = processed.with_name(processed.stem + REPORT_END)
    partial = path.with_name(path.name + ".partial")
    try:
        room_for(path)
        text = "\n".join(report_lines(numbers)) + "\n"
        room_for(partial).write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except (OSError, ValueError) as error:
        return f"no report ({error}); --verbose true prints it"
    return f"{path} has what they hold"


def report_lines(numbers: dict[str, Any]) -> list[str]:
    """What the files and columns of a log hold, by the manifest and `days`, for people."""
    tables, days = numbers["table_columns"], numbers["days"]
    lines = [f"read {one['name']}: {one['rows']:,} rows" for one in numbers["sources"]]
    lines += [
        f"{days[-1]:,} rows of {len(days) - 1:,} days; shares are of a table's values, of a dense"
        " column's rows",
        "table                    distinct values   missing   in the most frequent 1 % of values",
    ]
    for column in tables:
        rare = ""
        if "rare_id" in column:
            rare = f"   {column['rare_values']:,} rare values share a row"
        lines.append(
            f"{column['name'][:24]:<24} {column['distinct']:>15,} {column['missing_share']:>9.2%}"
            f" {column['top_1_percent_share']:>9.2%}{rare}"
        )
    lines.append("dense                              largest         0")
    for column in numbers["dense_columns"]:
        name, largest = column["name"][:24], column["largest"]
        lines.append(f"{name:<24} {largest:>17,.6g} {column['zero_share']:>9.2%}")
    counts = [column["distinct"] for column in tables]
    sizes = "-".join(map(str, counts))
    lines.append(f"{sum(counts):,} embedding rows in {len(counts)} tables: {sizes}")
    return lines


def print_summary(processed: Path, numbers: dict[str, Any], seconds: float, verbose: bool) -> None:
    """Print what was built and what it took, and write the report of the columns."""
    num_rows, num_lines = numbers["num_rows"], numbers["num_lines"]
    print(f"read {num_lines:,} lines in {seconds:,.1f} s: {_held_out(numbers)}")
    for reason, num in numbers["rows_dropped"].items():
        print(f"left out: {num:,} ({reason})")
    for line in numbers["bad_lines"]:
        print(f"bad line: {line}")
    for what, number in numbers["seen"].items():
        print(f"{number:,} {what}")
    for line in warnings(numbers):
        print(line)
    tables = numbers["table_columns"]
    print(
        f"wrote {processed}: {num_rows:,} rows, {numbers['num_positive'] / num_rows:.2%} of them"
        f" positive\n{len(tables)} tables, {len(numbers['dense_columns'])} dense columns:"
        f" {write_report(processed, numbers)}"
    )
    if verbose:
        rate, peak = num_lines / seconds, peak_rss_bytes() / 1e6
        print(f"{rate:,.0f} lines/s, peak RSS {peak:,.0f} MB", *report_lines(numbers), sep="\n")


def _held_out(numbers: dict[str, Any]) -> str:
    """How many rows are trained on, and which are held out."""
    days, names = numbers["days"], numbers["held_out_files"]
    rule = numbers.get("split", {"rule": "last day"})["rule"]
    which = {
        "last day": "of the last day ",
        "random": "drawn at random ",
        "file": "of a test file ",
    }
    of_files = f" ({names[0]}{f' to {names[-1]}' if len(names) > 1 else ''})" if names else ""
    return (
        f"{days[-2]:,} training rows, {days[-1] - days[-2]:,} {which.get(rule, '')}held out"
        f"{of_files}"
    )


def warnings(numbers: dict[str, Any]) -> list[str]:
    """What the user of a log has to know, or can do something about."""
    found, tables, num_rows = [], numbers["table_columns"], numbers["num_rows"]
    whole = {column["name"]: column.get("whole_floats") for column in tables}
    if total := sum(number or 0 for number in whole.values()):
        found.append(
            f"{total:,} whole floats (as 17.0) are taken as integers, in "
            + _named([name for name, number in whole.items() if number])
        )
    if any(what.startswith("negative") for what in numbers["seen"]):
        found.append(
            'warning: a "transform" of signed_log, standardize or none, in the column file, keeps'
            " negative values"
        )
    if empty := [one["name"] for one in numbers["sources"] if not one["rows"]]:
        found.append(f"warning: no rows in {_named(empty)}")
    same = [column["name"] for column in tables if column["distinct"] == 1]
    same += [column["name"] for column in numbers["dense_columns"] if column["zero_share"] == 1]
    if same:
        found.append(f"warning: one value alone, so nothing to learn, in {_named(same)}")
    if num_rows >= MANY_ROWS:
        own = [one["name"] for one in tables if one["distinct"] > NEAR_ALL * num_rows]
        if own:
            found.append(
                f"warning: nearly each row has a value of its own in {_named(own)}: is it an id of"
                " the row? Leave it out of the columns"
            )
    held_out = numbers["days"][-1] - numbers["days"][-2]
    if numbers.get("split", {"rule": ""})["rule"] != "none" and held_out < FEW_HELD_OUT:
        found.append(f"warning: {held_out:,} held-out rows are few to judge a model by")
    thinned = numbers.get("sub_sampling")
    if thinned and thinned["held_out"] == "whole":
        rate = thinned["rate"]
        found.append(
            f"{rate:g} of the negative training rows are left out, held-out rows are whole:"
            f" trainers correct outputs, p / (p + (1 - p) / {1 - rate:g})"
        )
    return found


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more
