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
    arrays = build(folder, columns(), folder / "p.npz")
    assert find_raw_files("custom", folder, 0) == found  # nor is what preprocessing has left there
    assert arrays["X_int"][:, 0].tolist() == [
        100 * number + row for number in (1, 2, 9, 10, 11) for row in range(20)
    ]
    said = capsys.readouterr().out
    assert "left out, as no part of a log: .DS_Store, ._log_1.csv, .log_1.csv.crc" in said
    assert "read log_10.csv: 20 rows\n" in (folder / "p.npz.columns.txt").read_text()
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


def parquet(path, first, number=20, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = range(number)
    pl.DataFrame(
        {
            "clicked": pl.Series([row % 2 for row in rows], dtype=pl.Int64),
            "shop": pl.Series([f"s{row % 3}" for row in rows], dtype=pl.String),
            "place": pl.Series([first + row for row in rows], dtype=pl.Int64),
            **more,
        }
    ).write_parquet(path)


def test_the_column_file_is_no_part_of_the_log(tmp_path, columns, capsys):
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "log.csv").write_bytes(HEADER + lines(0, 30))
    described = columns().rename(folder / "columns.json")
    assert len(build(folder, described, tmp_path / "p.npz")["y"]) == 30
    assert "left out, as no part of a log: columns.json" in capsys.readouterr().out
    assert not data_utils.preprocess("custom", folder, tmp_path / "p.npz", columns=described)
    copied = tmp_path / "copied.json"
    copied.write_bytes(described.read_bytes())
    assert not data_utils.preprocess("custom", folder, tmp_path / "p.npz", columns=copied)


def test_an_empty_parquet_part(tmp_path, columns, capsys):
    parquet(tmp_path / "log" / "a.parquet", 0, 0)
    parquet(tmp_path / "log" / "b.parquet", 100, 28)
    parquet(tmp_path / "log" / "c.parquet", 0, 0)
    described = columns(separator="parquet")
    assert len(build(tmp_path / "log", described, tmp_path / "p.npz")["y"]) == 28
    assert "warning: no rows in a.parquet, c.parquet\n" in capsys.readouterr().out
    (tmp_path / "log" / "b.parquet").unlink()
    with pytest.raises(ValueError, match="no rows are left of the log"):
        build(tmp_path / "log", described, tmp_path / "q.npz")
    assert not list(tmp_path.glob("q.npz*"))


DAYS = ("2024-02-29", "2024-03-01", "2024-03-10")


@pytest.mark.parametrize("kind", ["csv", "tsv.gz", "bare csv", "parquet"])
def test_folders_by_day(tmp_path, columns, kind, capsys):
    """The folders' names are columns: the file is that of a plain log which has them."""
    folder, whole = tmp_path / "log", tmp_path / "plain.csv"
    text = b"country,clicked,shop,place,date\n"
    for number, (country, day) in enumerate([(c, d) for c in ("B%C3%89", "") for d in DAYS]):
        place = folder / f"country={country or '__HIVE_DEFAULT_PARTITION__'}" / f"date={day}"
        place.mkdir(parents=True)
        (place / ".part-0.crc").write_bytes(b"\0")
        rows = lines(100 * number)
        name = "BÉ".encode() if country else b""
        text += b"".join(b"%b,%b,%b\n" % (name, row, day.encode()) for row in rows.splitlines())
        if kind == "parquet":
            parquet(place / "part-0.parquet", 100 * number)
        elif kind == "tsv.gz":
            (place / "part-0").write_bytes(gzip.compress((HEADER + rows).replace(b",", b"\t")))
        else:
            (place / "part-0.csv").write_bytes(HEADER * (kind == "csv") + rows)
    whole.write_bytes(text)
    named = {"day": "date", "categorical": ["shop", "country"]}
    plain = build(whole, columns(**named), tmp_path / "p.npz")
    bare = ["country", "clicked", "shop", "place", "date"]
    layout = {
        "parquet": {"separator": "parquet"},
        "tsv.gz": {"separator": "tsv"},
        "bare csv": {"header": False, "columns": bare},
    }.get(kind, {})
    arrays = build(folder, columns(**named, **layout), tmp_path / "q.npz")
    assert sorted(arrays["X_int"][:, 0]) == sorted(plain["X_int"][:, 0])
    by_place = np.argsort(plain["X_int"][:, 0]), np.argsort(arrays["X_int"][:, 0])
    for name in ("X_cat", "y"):
        np.testing.assert_array_equal(plain[name][by_place[0]], arrays[name][by_place[1]])
    np.testing.assert_array_equal(plain["days"], arrays["days"])
    np.testing.assert_array_equal(plain["counts"], arrays["counts"])
    assert arrays["counts"].tolist() == [3, 2]
    (first, *_) = unpack_manifest(arrays)["sources"]
    assert first["name"].startswith("country=B%C3%89/date=2024-02-29/part-0")
    said = capsys.readouterr().out
    report = (tmp_path / "q.npz.columns.txt").read_text()
    assert f"read {first['name']}: 20 rows\n" in report and "/.part-0.crc" in said
    described = columns(**named, **layout)
    assert not data_utils.preprocess("custom", folder, tmp_path / "q.npz", columns=described)


def test_folders_that_are_no_log(tmp_path, columns):
    folder = tmp_path / "log"

    def refused(match, **more):
        with pytest.raises(ValueError, match=match):
            build(folder, columns(**more), tmp_path / "p.npz")
        assert not (tmp_path / "p.npz").exists()

    for number, day in enumerate(DAYS):
        (folder / f"date={day}").mkdir(parents=True)
        (folder / f"date={day}" / "part-0.csv").write_bytes(HEADER + lines(100 * number))
    build(folder, columns(), tmp_path / "unused.npz")  # a key that nothing names
    refused(
        "column 4 .date.: '2024-02-29' is not a decimal number",
        dense=[{"name": "date", "type": "number"}],
    )
    extra = folder / "date=2024-03-02" / "part-0.csv"
    extra.parent.mkdir()
    extra.write_bytes(b"clicked,shop,place,date\n1,s,1,2\n")
    refused("part-0.csv has a column 'date', and so has the name of its folder", day="date")
    extra.unlink()
    parquet(extra.parent / "part-0.csv", 0, date=pl.Series(["2024-03-02"] * 20))
    for other in DAYS:
        parquet(folder / f"date={other}" / "part-0.csv", 0)
    refused("part-0.csv has a column 'date', and so has", day="date")
    extra.unlink()
    for name in ("a.csv", "other=1/a.csv", "date=2024-03-02/hour=1/a.csv", "date=1/date=2/a.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(HEADER + lines(5))
        refused(f"{name}.* differ in their keys|of {name.split('/')[0]}")
        (folder / name).unlink()
    (folder / "archive").mkdir()
    refused("log holds the folder archive; expected files, or else folders named key=value")
    (folder / "archive").rename(folder / "_delta_log")
    refused("log is a Delta Lake table")
    (folder / "_delta_log").rename(folder / "_temporary")
    (folder / "date=%FF").mkdir()
    (folder / "date=%FF" / "a.csv").write_bytes(HEADER + lines(5))
    refused("the folder 'date=%FF' is not UTF-8")
