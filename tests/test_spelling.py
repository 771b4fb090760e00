"""Logs as programs of other countries export them: the same numbers as of the usual spelling."""

import datetime
import json
import random
import re
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from helpers import MODEL_FLAGS
from plain_logs import SPELT_DATES, Bad, spelt_date

import data_utils
import dlrm_s_pytorch
import predict
from slipstream.logs.columnfile import read_column_file
from slipstream.logs.faults import SAY_DECIMAL, find_faults
from slipstream.logs.formats import describe_format, format_of
from slipstream.logs.parsing import parse_block
from slipstream.logs.rows import BadBlock
from slipstream.logs.spelling import Spelling, pattern_of
from slipstream.serving.model import load_model
from slipstream.tools.npz import open_npz

USUAL = {
    "label": "bought",
    "dense": ["visits", {"name": "price", "type": "number", "transform": "standardize"}],
    "categorical": ["shop", {"name": "tags", "values": 2, "pool": "mean"}],
    "day": "date",
    "weight": "w",
    "nulls": ["-"],
}
GERMAN = USUAL | {
    "separator": ";",
    "decimal": ",",
    "day": {"name": "date", "format": "%d.%m.%Y"},
    "label": {"name": "bought", "positive": ["yes", "Y"], "negative": ["no"]},
}
ARRAYS = ("X_int", "X_cat", "y", "counts", "days", "weights")


def shop(num_rows=600, seed=0):
    """Rows in the usual spelling, as texts; their order is not that of their days."""
    rng = np.random.default_rng(seed)
    place = rng.zipf(1.4, num_rows) % 40
    days = [datetime.date(2024, 12, 29) + datetime.timedelta(d) for d in (0, 1, 2, 3, 3)]
    return pl.DataFrame(
        {
            "date": [days[d].isoformat() for d in rng.integers(0, 5, num_rows)],
            "bought": [str(int(x)) for x in rng.random(num_rows) < 0.2 + (place % 3 == 0) * 0.5],
            "visits": [None if v == 9 else f"{v}.0" for v in rng.integers(0, 10, num_rows)],
            "price": ["-" if v > 40 else f"{v:.2f}" for v in rng.gamma(2, 9, num_rows)],
            "shop": [f"s{s}.5" for s in place],
            "tags": ["|".join(f"t{t}" for t in rng.integers(0, 5, 3)) for _ in range(num_rows)],
            "w": rng.choice(["0.5", "1", "2.25"], num_rows).tolist(),
        }
    )


def in_german(frame):
    """The same rows as GERMAN has them."""
    numbers = pl.col("visits", "price", "w").str.replace(".", ",", literal=True)
    dates = pl.col("date").str.replace(r"(....)-(..)-(..)", "$3.$2.$1")
    odd = pl.when(pl.int_range(pl.len()) % 5 == 0).then(pl.lit("Y")).otherwise(pl.lit("yes"))
    labels = pl.when(pl.col("bought") == "1").then(odd).otherwise(pl.lit("no")).alias("bought")
    return frame.with_columns(numbers, dates, labels)


def columns(folder, described):
    path = folder / "columns.json"
    path.write_text(json.dumps(described))
    return path


def build(folder, log, described, **options):
    """The processed file's arrays."""
    target = folder / "out.npz"
    target.unlink(missing_ok=True)
    paths = {"columns": columns(folder, described)}
    data_utils.preprocess("custom", log, target, **paths, **options)
    found = open_npz(target)
    return {name: np.array(found[name]) for name in ARRAYS}


def assert_same(one, other):
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of either spelling the arrays, and the scores of later rows, all by the scripts."""
    built, scores = {}, {}
    for name, described in (("usual", USUAL), ("german", GERMAN)):
        folder = tmp_path_factory.mktemp(name)
        separator = described.get("separator", ",")
        for file, frame in (("log", shop()), ("new", shop(90, seed=1))):
            frame = in_german(frame) if name == "german" else frame
            frame.write_csv(folder / f"{file}.csv", separator=separator)
        given = ["--data-set", "custom", "--columns", columns(folder, described)]
        given += ["--raw-data-file", folder / "log.csv", "--processed-data-file", folder / "p.npz"]
        data_utils.main([str(word) for word in given])
        given = ["--processed-data-file", folder / "p.npz", "--save-model", folder / "model"]
        given += [*MODEL_FLAGS, "--arch-mlp-bot", "auto-16-8", "--runs-dir", folder / "runs"]
        dlrm_s_pytorch.main([str(word) for word in given])
        scores[name] = scored(folder, folder / "new.csv")
        built[name] = {array: np.array(open_npz(folder / "p.npz")[array]) for array in ARRAYS}
    return folder, built, scores


def scored(folder, log, *flags):
    """The scores of a log's lines, and the metrics."""
    given = ["--load-model", folder / "model", "--raw-data-file", log, *flags]
    found = predict.main([str(word) for word in [*given, "--output", folder / "scores.csv"]])
    return (folder / "scores.csv").read_text(), found.get("metrics")


def test_a_german_log_is_the_usual_one(trained):
    _, built, scores = trained
    assert_same(built["usual"], built["german"])
    assert len(set(built["usual"]["y"])) == 2 and len(built["usual"]["days"]) == 5
    assert scores["usual"] == scores["german"] and scores["usual"][1]["rows"] == 90


def test_scores_of_a_log_with_another_separator(trained, tmp_path):
    """Also without labels, of Parquet whose columns have types, and of frames."""
    folder, _, scores = trained
    usual, later = shop(90, seed=1), in_german(shop(90, seed=1))
    for separator, flag in ((",", ","), ("\t", "tab"), ("\t", "tsv"), ("|", "|")):
        log = later.drop("tags") if separator == "|" else later
        log.write_csv(tmp_path / "new.csv", separator=separator)
        if separator == "|":
            with pytest.raises(ValueError, match=r"tags: separator is '\|', as between columns"):
                scored(folder, tmp_path / "new.csv", "--separator", flag)
            continue
        assert scored(folder, tmp_path / "new.csv", "--separator", flag) == scores["german"]
        with pytest.raises(ValueError, match="or --separator of predict.py"):
            scored(folder, tmp_path / "new.csv")
    # The same numbers with points: of a log that is nearly the usual one.
    points = later.with_columns(usual["visits"], usual["price"], usual["w"])
    points.write_csv(tmp_path / "new.csv")
    flags = ["--separator", ",", "--decimal", "."]
    assert scored(folder, tmp_path / "new.csv", *flags) == scores["german"]
    with pytest.raises(ValueError, match=r"'[0-9.]+' is not .*--decimal of predict\.py"):
        scored(folder, tmp_path / "new.csv", *flags[:2])
    with pytest.raises(ValueError, match="visits: decimal is ',', as between columns"):
        model = load_model(folder / "model").reader.written_otherwise("", ".", [])
        model.log_format = replace(model.log_format, quote=False, separator=",")
        model.written_otherwise("", ",", [])
    later.drop("bought", "date", "w").write_csv(tmp_path / "new.csv", separator=";")
    assert scored(folder, tmp_path / "new.csv") == (scores["german"][0], None)
    typed = usual.with_columns(pl.col("w", "visits").cast(pl.Float64, strict=False))
    typed = typed.with_columns(pl.col("bought") == "1", pl.col("date").str.to_date())
    for frame in (later, typed.with_columns(later["price"])):
        frame.write_parquet(tmp_path / "new.parquet")
        assert scored(folder, tmp_path / "new.parquet") == scores["german"]
    model = load_model(folder / "model")
    found = "".join(f"{score}\n" for score in model.predict(typed.with_columns(later["price"])))
    assert "probability\n" + found == scores["german"][0]
    with pytest.raises(ValueError, match=r"--separator: .*new\.parquet is Parquet"):
        scored(folder, tmp_path / "new.parquet", "--separator", ";")
    with pytest.raises(SystemExit):
        predict.parse_args("--load-model m --raw-data-file x --output y --separator ab".split())


def test_german_logs_of_other_kinds(trained, tmp_path):
    """Parquet of texts and of types, Hive's folders, bad lines, a log that extends another."""
    _, built, _ = trained
    frame = in_german(shop())
    usual = {name: array for name, array in built["usual"].items()}
    frame.write_parquet(tmp_path / "log.parquet")
    assert_same(usual, build(tmp_path, tmp_path / "log.parquet", GERMAN))
    numbers = pl.col("visits", "w").str.replace(",", ".").cast(pl.Float64, strict=False)
    dates = pl.col("date").str.to_date("%d.%m.%Y")
    frame.with_columns(numbers, dates).write_parquet(tmp_path / "log.parquet")
    assert_same(usual, build(tmp_path, tmp_path / "log.parquet", GERMAN))
    hive = tmp_path / "hive"
    for (day,), rows in shop().with_row_index().group_by(["date"]):
        folder = hive / f"date={'.'.join(day.split('-')[::-1])}"
        folder.mkdir(parents=True)
        rows = in_german(rows.drop("index")).drop("date")
        rows.write_csv(folder / "part.csv", separator=";")
    for name, array in build(tmp_path, hive, GERMAN).items():
        if name in ("y", "days", "weights"):  # ids go by the rows' order
            assert sorted(array) == sorted(usual[name])
    lines = frame.write_csv(separator=";").splitlines()
    bad = ["30.02.2025;yes;1;1,0;s;t;1", "30.12.2024;ja;1;1,0;s;t;1", "30.12.2024;no;1;1.0;s;t;1"]
    lines[3:3] = bad
    (tmp_path / "log.csv").write_text("\n".join(lines))
    assert_same(usual, build(tmp_path, tmp_path / "log.csv", GERMAN, bad_lines=3))
    with pytest.raises(ValueError, match=r"log\.csv, line 4, column 1 .date.: '30.02.2025' is not"):
        build(tmp_path, tmp_path / "log.csv", GERMAN)
    shop().write_csv(tmp_path / "log.csv")
    build(tmp_path, tmp_path / "log.csv", USUAL)
    (tmp_path / "out.npz").rename(tmp_path / "before.npz")
    frame.write_csv(tmp_path / "log.csv", separator=";")
    extended = build(tmp_path, tmp_path / "log.csv", GERMAN, extend=tmp_path / "before.npz")
    assert_same(usual, extended)


DATE = {"name": "d", "format": "%d.%m.%Y"}
HEX = {"name": "c", "type": "hex"}
WORDS = {"name": "y", "positive": ["yes", "Y"], "negative": ["no"]}
IN_COLUMN_FILE = " in the column file"


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        ({}, "1;1;s;31.12.2024;1", f'ISO date; for others say "format"{IN_COLUMN_FILE}'),
        ({}, "1;1;s;2024-02-30;1", "is not a whole number or an ISO date"),
        ({}, "1;1;s;today;1", "is not a whole number or an ISO date"),
        ({}, "1;12,5;s;1;1", f"commas are decimal, {SAY_DECIMAL}"),
        ({}, "1;1;s;1;0,5", f"commas are decimal, {SAY_DECIMAL}"),
        ({}, "1;1.234,5;s;1;1", "; separators of thousands are not taken"),
        ({}, "yes;1;s;1;1", f'0 or 1; for words say "positive" and "negative"{IN_COLUMN_FILE}'),
        ({}, ";1;s;1;1", "label ''; expected 0 or 1"),
        ({}, "1,1,s,1,1", "1 columns; expected 5; is its separator ','? Say so: "),
        (
            {"categorical": [HEX]},
            "1;1;1,5;1;1",
            "'1,5' is not a hexadecimal value of 1 to 8 digits",
        ),
        ({"day": DATE}, "1;1;s;2024-12-31;1", "is not a date of the format '%d.%m.%Y'"),
        ({"day": DATE}, "1;1;s;31.12.2024 ;1", "is not a date of the format '%d.%m.%Y'"),
        ({"day": DATE}, "1;1;s;30.02.2024;1", "is not a date of the format '%d.%m.%Y'"),
        ({"day": DATE}, "1;1;s;;1", "'' is not a date of the format '%d.%m.%Y'"),
        ({"dense": ["x"], "decimal": ","}, "1;1,5;s;1;1", '; other numbers need "type": "number"'),
        (
            {"dense": ["x"], "decimal": ","},
            "1;1.5;s;1;1",
            f"comma; where points are decimal, {SAY_DECIMAL}",
        ),
        ({"label": WORDS}, '"no";1;s;1;1', f'are quoted, say "quote": true{IN_COLUMN_FILE}'),
        ({"decimal": ","}, "1;12.5;s;1;1", f"where points are decimal, {SAY_DECIMAL}"),
        ({"decimal": ","}, "1;1.234,5;s;1;1", "; separators of thousands are not taken"),
        ({"decimal": ","}, "1;1;s;1;1.5", f"comma; where points are decimal, {SAY_DECIMAL}"),
        ({"label": WORDS}, "1;1;s;1;1", "label '1'; expected 'yes', 'Y' or 'no'"),
        ({"label": WORDS}, "YES;1;s;1;1", "label 'YES'; expected 'yes', 'Y' or 'no'"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path, change, line, said):
    described = {"label": "y", "dense": [{"name": "x", "type": "number"}], "categorical": ["c"]}
    described |= {"day": "d", "weight": "w", "separator": ";", "header": False}
    described |= {"columns": ["y", "x", "c", "d", "w"], **change}
    log_format = read_column_file(columns(tmp_path, described))
    with pytest.raises(BadBlock):
        parse_block(line.encode() + b"\n", log_format)
    ((_, reason),) = find_faults([line.encode()], log_format)
    assert said in reason and (reason.endswith(said) or "Say so" in said)


@pytest.mark.parametrize("date_format", SPELT_DATES)
@pytest.mark.parametrize("kind", ["day", "order"])
def test_fast_and_slow_checks_agree_on_dates(tmp_path, date_format, kind):
    """And with strptime, of texts that are nearly dates."""
    described = {"label": "y", "categorical": ["c"], kind: {"name": "d", "format": date_format}}
    described |= {"header": False, "columns": ["y", "c", "d"], "separator": "|"}
    log_format = read_column_file(columns(tmp_path, described))
    r, outcomes = random.Random(3), set()

    def some(found):
        good, bad = TEXTS[found[0]]
        return r.choice((bad if r.random() < 0.1 else good).split())

    for _ in range(60):
        field = (re.sub("%.", some, date_format) + r.choice(["", "", "", " "])).encode()
        try:
            wanted = spelt_date(field, kind, date_format)
        except Bad:
            wanted = None
        line = b"1|c|" + field
        try:
            found = parse_block(line + b"\n", log_format).keys[0]
        except BadBlock:
            found = None
        assert found == wanted, field
        assert (not list(find_faults([line], log_format))) == (wanted is not None), field
        outcomes.add(wanted is not None)
    assert outcomes == {True, False}, "both are tried"


TEXTS = {  # of each directive good ones, and others
    "%Y": ("2024 1999 0001 9999", "204 0000"),
    "%y": ("00 68 69 99", "4"),
    "%m": ("02 2 12 11", "13 0"),
    "%d": ("09 9 29 30 31", "32 0"),
    "%b": ("Feb feb DEC", "Dez"),
    "%B": ("February may DECEMBER", "Feb"),
    "%H": ("00 0 23 7", "24"),
    "%I": ("12 1 01", "0 13"),
    "%p": ("AM pm", "m"),
    "%M": ("59 5 00", "60"),
    "%S": ("59 5 00", "60"),
    "%f": ("1 123456 123456789", "1234567890 x"),
    "%z": ("Z +0000 -01:30 +23:59", "z +24:00 +01"),
}


def test_what_older_files_say_of_a_log_is_unchanged(tmp_path):
    """A log in the usual spelling is described as before there were others, and so it is read."""
    log_format = read_column_file(columns(tmp_path, USUAL))
    described = json.loads(json.dumps(describe_format(log_format)))
    details = {"transform": "log", "values": 0, "separator": "|", "pool": "none", "table": None}
    details["element"] = "string"
    assert described["details"] == [
        ["price", {**details, "transform": "standardize"}],
        ["tags", {**details, "values": 2, "pool": "mean"}],
    ]
    assert (
        sorted(described)
        == (
            "day_per_file details header kinds lax names nulls num_days order quote separator split"
        ).split()
    )
    assert format_of(described) == log_format
    spelled = read_column_file(columns(tmp_path, GERMAN))
    described = json.loads(json.dumps(describe_format(spelled)))
    assert format_of(described) == spelled != log_format
    for wrong in ({"format": 7}, {"format": "%d"}, {"decimal": "x"}, {"positive": "yes"}, 3):
        described["details"][0][1]["spelling"] = wrong
        with pytest.raises(ValueError, match="its columns are not whole"):
            format_of(described)


def test_words_that_look_like_labels(tmp_path):
    """Of a log that is read as fast as Criteo's where its labels are 0 and 1."""
    described = {"label": "y", "dense": ["x"], "categorical": [{"name": "c", "type": "hex"}]}
    described |= {"label": {"name": "y", "positive": ["0"], "negative": ["1", "-1"]}}
    log_format = read_column_file(columns(tmp_path, described | {"separator": "tsv"}))
    assert parse_block(b"0\t3\ta\n1\t\ta\n", log_format).labels.tolist() == [1, 0]
    assert parse_block(b"-1\t3\ta\n", log_format).labels.tolist() == [0]


def test_formats_that_none_can_be():
    for text, said in (
        ("%d.%m.", "it has no year"),
        ("%H:%M", "it has no year"),
        ("%d.%m.%Y %Q", "%Q is none of %Y"),
        ("%d.%m.%Y %", "% is none of %Y"),
        ("%d.%m.%y %Y", "it has the year twice"),
        ("%d.%m.%Y %I", "%I, 1 to 12, and %p, AM or PM, need each other"),
        ("%d.%m.%Y" + "x" * 100, "at most 100 characters"),
        ("%d.%m.%Y\ud800", "surrogates"),
    ):
        with pytest.raises(ValueError, match="format is ") as raised:
            pattern_of(text)
        assert said in str(raised.value)
    assert Spelling("%d.%m.%Y 100%%").usual(b"1.2.2024 100%") == b"2024-02-01"
