"""Which files a log is read from: none by a pattern, none twice, in the order of their numbers."""

import gzip
import json

import numpy as np
import pytest

import data_utils
from slipstream.logs.sources import find_raw_files
from slipstream.tools.npz import open_npz, unpack_manifest

pl = pytest.importorskip("polars")
HEADER = b"clicked,shop,place\n"
COLUMNS = {"label": "clicked", "dense": ["place"], "categorical": ["shop"]}


def lines(first, number=20):
    """Rows whose `place` counts on from `first`."""
    return b"".join(b"%d,s%d,%d\n" % (row % 2, row % 3, first + row) for row in range(number))


@pytest.fixture
def columns(tmp_path):
    def write(**more):
        path = tmp_path / "columns.json"
        path.write_text(json.dumps({**COLUMNS, **more}))
        return path

    return write


def build(raw, columns, target, **options):
    data_utils.preprocess("custom", raw, target, columns=columns, **options)
    return open_npz(target)


def test_no_path_and_no_column_is_a_pattern(tmp_path, columns):
    names = {"label": "^c.*$", "dense": ["place"], "categorical": ["*"]}
    for name, first in (("log1.parquet", 0), ("log[1].parquet", 500)):
        pl.DataFrame(
            {
                "clicked": [5] * 28,
                "^c.*$": [row % 2 for row in range(28)],
                "*": [f"s{row % 3}" for row in range(28)],
                "place": [first + row for row in range(28)],
            }
        ).write_parquet(tmp_path / name)
    described = columns(**names, separator="parquet")
    arrays = build(tmp_path / "log[1].parquet", described, tmp_path / "p.npz")
    assert arrays["X_int"][:, 0].tolist() == list(range(500, 528))
    assert arrays["y"].tolist() == [0, 1] * 14 and arrays["counts"].tolist() == [3]
    (tmp_path / "log1.csv").write_bytes(HEADER + lines(0))
    (tmp_path / "log[1].csv").write_bytes(HEADER + lines(700, 28))
    arrays = build(tmp_path / "log[1].csv", columns(), tmp_path / "q.npz")
    assert arrays["X_int"][0, 0] == 700


def test_numbers_in_names_and_what_is_no_part_of_a_log(tmp_path, columns, capsys):
    folder = tmp_path / "log"
    folder.mkdir()
    for number in (1, 2, 9, 10, 11):
        (folder / f"log_{number}.csv").write_bytes(HEADER + lines(100 * number))
    for name in ("_SUCCESS", ".log_1.csv.crc", ".DS_Store", "._log_1.csv", "log_1.csv~"):
        (folder / name).write_bytes(b"\0\1\2")
    found = find_raw_files("custom", folder, 0)
    assert [path.name for path in found] == [f"log_{n}.csv" for n in (1, 2, 9, 10, 11)]
    arrays = build(folder, columns(), tmp_path / "p.npz")
    assert arrays["X_int"][:, 0].tolist() == [
        100 * number + row for number in (1, 2, 9, 10, 11) for row in range(20)
    ]
    said = capsys.readouterr().out
    assert "left out, as no part of a log: .DS_Store, ._log_1.csv, .log_1.csv.crc" in said
    assert "read log_10.csv: 20 rows" in said
    held_out = int(np.diff(arrays["days"])[-1])
    assert f"{100 - held_out} training rows, {held_out} of the last day held out" in said
    assert [source["rows"] for source in unpack_manifest(arrays)["sources"]] == [20] * 5


@pytest.mark.parametrize("ends", [("", ".gz"), (".gz", ".2.gz"), ("", ".2")])
def test_the_same_rows_are_not_read_twice(tmp_path, columns, ends):
    folder = tmp_path / "log"
    folder.mkdir()
    for level, end in enumerate(ends):
        text = HEADER + lines(0)
        packed = gzip.compress(text, level + 1) if end.endswith("gz") else text
        (folder / f"a.csv{end}").write_bytes(packed)
    with pytest.raises(ValueError, match=r"a\.csv.* and a\.csv.* hold the same rows"):
        build(folder, columns(), tmp_path / "p.npz")
    assert not (tmp_path / "p.npz").exists()


def test_a_last_day_of_one_row_holds_nothing_out(tmp_path, columns):
    text = b"clicked,shop,place,time\n"
    text += b"".join(b"%d,s%d,1,%d\n" % (row % 2, row % 3, 1e9 + row) for row in range(50))
    (tmp_path / "log.csv").write_bytes(text)
    with pytest.raises(ValueError, match="the last of 50 days has 1 row: .* name it by order"):
        build(tmp_path / "log.csv", columns(day="time"), tmp_path / "p.npz")
    assert list(tmp_path.glob("*p.npz*")) == []
    assert len(build(tmp_path / "log.csv", columns(order="time"), tmp_path / "p.npz")["y"]) == 50
