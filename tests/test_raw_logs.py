"""Raw logs of every data set, whole and spoiled: what is accepted equals a plain parser, and what
is not gets one line that names the file and the bad line.

`--fuzz N` tries N times as many spoiled files (1: 240).
"""

import contextlib
import datetime
import gzip
import io
import json
import os
import random
import re

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_logs import CUSTOM, Bad, make_log, plain_arrays, plain_rows

import data_utils
from slipstream.logs import encoding, taobao
from slipstream.logs.features import layout_of
from slipstream.logs.rawfile import RawFile, Tally
from slipstream.logs.scoring import Reader
from slipstream.logs.transforms import transforms_of
from slipstream.logs.vocabulary import vocabulary_of
from slipstream.tools.npz import open_npz, unpack_manifest

EXAMPLES = int(os.environ.get("SLIPSTREAM_FUZZ", "1"))


def spoil(r, data, log):
    """Change a log's bytes in one of many ways."""
    at = r.randrange(len(data) + 1)
    lines = data.split(b"\n")
    line = r.randrange(len(lines))
    separator = log["separator"].encode()
    fields = lines[line].split(separator)
    field = r.randrange(len(fields))
    junk = [b"\r", b"\n", b"\r\n", b"\n\n", b"\x00", b"\x1f", b"\xff", b"\xef\xbb\xbf", b'"', b'""']
    junk += [b" ", b"+", b"-", b".", b",", b"\t", b";", b"e5", b"0x", b"NaN", b"inf", b"1_0", b"'"]
    odd = [b"", b"nan", b"inf", b"-inf", b"1e400", b"1e39", b"99999999999999999", b"2147483648"]
    odd += [b"123456789", b"-0", b"+1", b" 1", b"1 ", b'"a"', b'"a', b'a"b', b'"a""b"', b"zz", b"2"]
    odd += [
        b"14103099",
        b"14023100",
        b"14102024",
        b"2024-13-45",
        b"2023-02-29",
        b"2024-02-03T25:00",
        b"\xc3",
        "٣".encode(),
        b"1e5",
        b"1,5",
        b"30.02.2024",
        b"2024123",
        b"Feb 30, 2024",
        b"2/9/2024 0:30 pm",
    ]
    way = r.randrange(12)
    if way == 0:
        return data[:at] + r.choice(junk) + data[at:]
    if way == 1:
        return data[:at] + data[at + r.randint(1, 5) :]
    if way == 2:
        return data[:at] + bytes([r.randrange(256)]) + data[at + 1 :]
    if way == 3:
        return data.replace(b"\n", b"\r\n")
    if way == 4:
        return b"\xef\xbb\xbf" + data
    if way == 5:
        return data.rstrip(b"\n")
    if way == 6:
        fields.insert(field, r.choice(odd))
    elif way == 7:
        del fields[field]
    elif way == 8:
        fields += [b""] * r.randint(1, 2)
    elif way == 9:
        lines.insert(line, r.choice([b"", b"\r", b" ", separator]))
    else:
        fields[field] = r.choice(odd)
    if way != 9:
        lines[line] = separator.join(fields)
    return b"\n".join(lines)


RAW_NAMES_OF = {"kaggle": "train.txt", "avazu": "train.csv", "taobao": "UserBehavior.csv"}
RAW_NAMES = {*RAW_NAMES_OF.values(), "log.csv"}


def build(folder, what, data, log, **options):
    """Preprocess `data`: the arrays and the manifest, or the error's text."""
    raw = folder / RAW_NAMES_OF.get(what, "log.csv")
    raw.write_bytes(data)
    if "described" in log:
        (folder / "columns.json").write_text(json.dumps(log["described"]))
        options["columns"] = folder / "columns.json"
    before = sorted(os.listdir(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data_utils.preprocess(what, raw, folder / "out.npz", **options)
    except (ValueError, OSError) as error:
        assert sorted(os.listdir(folder)) == before, "an error leaves nothing"
        return None, str(error)
    arrays = {name: np.array(array) for name, array in open_npz(folder / "out.npz").items()}
    assert sorted(os.listdir(folder)) == sorted([*before, "out.npz", "out.npz.columns.txt"])
    return arrays, unpack_manifest(arrays)


def check(folder, what, data, log, limit, block_bytes, **options):
    """One log, by both parsers."""
    given = {"bad_lines": limit, "block_bytes": block_bytes, "seed": 5}
    given |= {"max_ind_range": options["modulus"], "min_count": options["min_count"]}
    given |= {"data_sub_sample_rate": options["rate"], "split": options["split"]}
    if what == "taobao":
        history = options["min_count"] - 1  # 0, 1 or 2
        options |= {"split": "none", "rate": 0.0, "min_count": 1}
        given |= {"split": "none", "data_sub_sample_rate": 0.0, "min_count": 1}
        given["history"] = history
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "PART_ROWS", options.pop("part_rows"))
        arrays, said = build(folder, what, data, log, **given)
    try:
        rows, bad, blank = plain_rows(data, log, limit)
        if what == "taobao":
            expected = plain_clicks(rows, options["modulus"], history)
        else:
            expected = plain_arrays(rows, log, seed=5, **options)
    except Bad as fault:
        assert arrays is None, f"accepted, but {fault}"
        assert "\n" not in said
        if "line" in str(fault):
            where = str(fault).split(":")[0]
            assert re.search(rf"(train|UserBehavior|log)\.\w+, {where}\b", said), (said, fault)
        return
    assert arrays is not None, said
    assert said["rows_dropped"].get("bad line", 0) == len(bad)
    assert said["rows_dropped"].get("blank line", 0) == blank
    assert said["num_lines"] == len(rows) + len(bad) + blank
    if what == "taobao":
        check_clicks(arrays, *expected)
        return
    dense = expected.pop("X_int")
    np.testing.assert_allclose(arrays["X_int"], dense, rtol=1e-6, atol=0)  # means are rounded
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)
    # What was left out is not known; and a line that is bad by its date alone has a score.
    if not options["rate"] and not (bad and log["key"] in ("day", "order")):
        check_read_again(folder, arrays, said, limit)


def check_read_again(folder, arrays, manifest, limit):
    """By its own vocabulary a log has the same rows, whatever their order, and a place a line."""
    (raw,) = (path for path in folder.iterdir() if path.name in RAW_NAMES)
    layout = layout_of(manifest, arrays["X_cat"].shape[1], len(arrays["counts"]), "p")
    transforms = transforms_of(manifest, arrays["X_int"].shape[1], "p")
    reader = Reader(vocabulary_of(arrays, manifest, "p"), layout, transforms)
    blocks = list(reader.blocks(RawFile(raw), Tally(limit), 3000))
    assert sum(len(block.has_row) for block in blocks) == manifest["num_lines"]
    rare_ids = [column.get("rare_id", -2) for column in manifest["table_columns"]]
    is_rare = arrays["X_cat"] == np.array(rare_ids)[layout.table_of_column]
    assert sum(block.encoded.unseen for block in blocks).tolist() == is_rare.sum(axis=0).tolist()
    found = [
        np.concatenate([b.encoded.dense for b in blocks]),
        np.concatenate([b.encoded.ids for b in blocks]),
        np.concatenate([b.labels for b in blocks])[:, None],
    ]
    rows = np.column_stack(found).astype(np.float64)
    wanted = np.column_stack([arrays["X_int"], arrays["X_cat"], arrays["y"]]).astype(np.float64)
    in_order = [array[np.lexsort(array.T)] for array in (rows, wanted)]
    np.testing.assert_array_equal(*in_order)


ABSENT = "absent"


def plain_clicks(rows, modulus, history):
    """Positive rows of Taobao's log in order, (user, item, ...) each, and their times.

    Of a history of L the last L items, then their categories, oldest first, ABSENT behind them.
    """
    clicks = []
    for number, row in enumerate(rows):
        user, item, category, is_click, time = (value for _, _, value in row)
        if is_click and taobao.START <= time < taobao.END:
            clicks.append((user, time, number, item, category))
    if not clicks:
        raise Bad("rows")
    before, lines = {}, []
    for user, time, number, item, category in sorted(clicks):
        past = before.setdefault(user, [])
        moment = datetime.datetime.fromtimestamp(
            time, datetime.timezone(datetime.timedelta(0, 28800))
        )
        previous = past[-1] if past else (None, None)
        if history:
            last = past[-history:]
            gap = [ABSENT] * (history - len(last))
            previous = [*(one[0] for one in last), *gap, *(one[1] for one in last), *gap]
        values = (user, item, category, moment.hour, moment.weekday(), *previous)
        lines.append((time, user, number, values, len(past), moment.date()))
        past.append((item, category))
    lines.sort(key=lambda line: line[:3])
    return lines, modulus, history


def check_clicks(arrays, lines, modulus, history):
    def code(value):
        if value is None or value == ABSENT:
            return -1 if value is None else ABSENT
        return value % modulus if modulus > 0 else value

    codes = [[code(value) for value in line[3]] for line in lines]
    tables = [*range(5), *(history * [1] + history * [2] or [5, 6])]
    seen = [set() for _ in range(1 + max(tables))]
    for row in codes:
        for table, value in zip(tables, row, strict=True):
            seen[table] |= {value} - {ABSENT}
    ranks = [{c: i for i, c in enumerate(sorted(values))} | {ABSENT: -1} for values in seen]
    ids = [[ranks[t][c] for t, c in zip(tables, row, strict=True)] for row in codes]
    assert arrays["counts"].tolist() == [len(values) for values in seen]
    assert arrays["y"].tolist() == [1, 0] * len(lines)
    np.testing.assert_array_equal(arrays["X_cat"][::2], ids)
    assert arrays["X_int"][::2, 0].tolist() == [line[4] for line in lines]
    np.testing.assert_array_equal(arrays["X_int"][1::2], arrays["X_int"][::2])
    others = [0, *range(3, len(tables))]  # all but item and category
    np.testing.assert_array_equal(arrays["X_cat"][1::2][:, others], arrays["X_cat"][::2][:, others])
    pairs = {tuple(row) for row in arrays["X_cat"][::2, 1:3].tolist()}
    assert {tuple(row) for row in arrays["X_cat"][1::2, 1:3].tolist()} <= pairs
    if modulus < 1:
        counts = np.bincount(arrays["X_cat"][::2, 1])
        rare = counts[arrays["X_cat"][::2, 1]] < 0.7 * counts.sum()
        assert (arrays["X_cat"][1::2, 1] != arrays["X_cat"][::2, 1])[rare].all()
    dates = [line[-1] for line in lines]
    days = np.cumsum([0, *(2 * dates.count(day) for day in sorted(set(dates))), 0])
    assert arrays["days"].tolist() == days.tolist()


@pytest.mark.parametrize("what", ["kaggle", "avazu", "taobao", "custom"])
def test_spoiled_logs(tmp_path_factory, what):
    folder = tmp_path_factory.mktemp("logs")
    outcomes = []

    @settings(
        max_examples=60 * EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        seed=st.integers(0, 2**32 - 1),
        num_faults=st.integers(0, 3),
        modulus=st.sampled_from([-1, -1, 3]),
        block_bytes=st.sampled_from([1, 50, 211, 400, 1000, 3000]),
        limit=st.sampled_from([0, 0, 1, 5]),
        split=st.sampled_from(["none", "none", "last-day", "random:3"]),
        min_count=st.sampled_from([1, 1, 2, 3]),
        rate=st.sampled_from([0.0, 0.0, 0.5]),
        part_rows=st.sampled_from([1, 4, 1000]),
    )
    def spoiled(seed, num_faults, **options):
        r = random.Random(seed)
        log, data = make_log(r, what)
        for _ in range(num_faults):
            data = spoil(r, data, log)
        for path in folder.iterdir():
            path.unlink()
        check(folder, what, data, log, **options)
        outcomes.append((folder / "out.npz").exists())

    spoiled()
    assert 0.1 < np.mean(outcomes) < 0.9, "both outcomes are tried"


@pytest.mark.parametrize("seed", range(8))
def test_ties_at_the_first_held_out_row(tmp_path, seed):
    """Of rows with one time the first ones of the log train, wherever parts end."""
    r = random.Random(seed)
    spelt = {"format", "decimal", "words"}
    log = {"header": False}
    while not log["header"] or log["key"] != "order" or spelt & set(log):
        log = make_log(r, "custom")[0]
    log |= {"days": 3, "transforms": {}, "quote": False}
    log["described"] |= {"days": 3, "dense": CUSTOM["dense"], "quote": False}
    fields = {"bought": "01", "time": "345", "shop": "abcd"}
    names = log["names"]
    rows = [[r.choice(fields.get(name, "1")) for name in names] for _ in range(60)]
    text = "".join(log["separator"].join(row) + "\n" for row in [names, *rows])
    options = {"limit": 0, "block_bytes": 99, "split": "last-day", "min_count": 8, "rate": 0.4}
    check(tmp_path, "custom", text.encode(), log, modulus=-1, part_rows=7, **options)
    assert (tmp_path / "out.npz").exists()


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"\n", b"\n\n\r\n", b"\x00"])
def test_logs_of_nothing(tmp_path, data):
    for what, name in (("kaggle", "train.txt"), ("avazu", "train.csv")):
        (tmp_path / name).write_bytes(data)
        for block_bytes in (1, 1000):
            with pytest.raises(ValueError, match=f"{name}.*(empty|no rows|line 1)"):
                data_utils.preprocess(what, tmp_path / name, block_bytes=block_bytes)


@pytest.mark.parametrize("spoilt", ["truncated", "garbage", "not gzip", "one byte"])
def test_spoiled_gzip(tmp_path, spoilt):
    log, data = make_log(random.Random(1), "kaggle")
    packed = bytearray(gzip.compress(data))
    if spoilt == "one byte":
        packed[len(packed) // 2] ^= 255
    packed = {
        "truncated": packed[:-9],
        "garbage": packed + b"more",
        "not gzip": b"\0" + data,
    }.get(spoilt, packed)
    (tmp_path / "train.txt.gz").write_bytes(packed)
    with pytest.raises(ValueError, match="train.txt.gz is truncated, corrupt or not gzip|line"):
        data_utils.preprocess("kaggle", tmp_path / "train.txt.gz")
    assert os.listdir(tmp_path) == ["train.txt.gz"]


def test_parquet_equals_text(tmp_path):
    """The same rows from Parquet with real types, and from CSV."""
    described = {**CUSTOM, "separator": "parquet", "day": "date"}
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "bought": rng.integers(0, 2, 60) == 1,
            "visits": [None if i % 9 == 0 else i for i in range(60)],
            "price": rng.random(60).astype(np.float32),
            "shop": rng.integers(0, 5, 60),
            "code": [f"{i % 7:x}" for i in range(60)],
            "town": [None if i % 5 == 0 else f"t{i % 4}" for i in range(60)],
            "date": [datetime.date(2024, 2, 28 - i % 3) for i in range(60)],
        }
    )
    path = tmp_path / "log.parquet"
    frame.write_parquet(path, row_group_size=16)
    (tmp_path / "p.json").write_text(json.dumps(described))
    (tmp_path / "c.json").write_text(json.dumps({**described, "separator": "csv"}))
    frame.with_columns(pl.col("bought").cast(pl.Int8)).write_csv(tmp_path / "log.csv")
    built = []
    for name, columns in (("log.parquet", "p.json"), ("log.csv", "c.json")):
        target = tmp_path / f"{columns}.npz"
        data_utils.preprocess("custom", tmp_path / name, target, columns=tmp_path / columns)
        built.append(open_npz(target))
    assert built[0]["X_int"].dtype == np.float32
    for name in ("X_int", "X_cat", "y", "counts", "days"):
        np.testing.assert_array_equal(built[0][name], built[1][name])

    def fails(frame, message):
        if frame is not None:
            frame.write_parquet(path)
        with pytest.raises(ValueError, match=message):
            data_utils.preprocess("custom", path, tmp_path / "x.npz", columns=tmp_path / "p.json")

    fails(frame.drop("town"), "log.parquet has no column 'town'")
    fails(frame.with_columns(bought=pl.lit(2)), "log.parquet, row 1: label '2'")
    late = frame.with_columns(bought=pl.when(pl.int_range(60) == 40).then(None).otherwise(1))
    fails(late, "log.parquet, row 41: label ''")
    fails(frame.with_columns(price=pl.lit(float("nan"))), "row 1, column 3 .price.: 'NaN'")
    fails(frame.with_columns(town=pl.lit([1, 2])), "log.parquet")
    fails(frame.head(0), "log.parquet: no rows are left of the log")
    path.write_bytes(path.read_bytes()[:-20])
    fails(None, "log.parquet.*(corrupt|Parquet)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "columns.json: "),
        ("[1]", "expected an object with keys"),
        ({"label": None}, "got None for a column of kind label"),
        ({"labels": "x"}, "unknown key 'labels'"),
        ({"categorical": []}, "categorical is empty"),
        ({"categorical": "shop"}, "expected a list of columns"),
        ({"categorical": ["bought"]}, "column 'bought' is named twice, as label and as string"),
        ({"categorical": [{"name": "a", "type": "number"}]}, "expected string or hex"),
        (
            {"categorical": [{"name": "a", "kind": "hex"}]},
            "has 'kind'; expected some of name, type",
        ),
        ({"categorical": [{"name": "a", "values": 0}]}, "a: values is 0; expected 1 to 4096"),
        ({"categorical": [{"name": "a", "values": True}]}, "a: values is True"),
        ({"categorical": [{"name": "a", "pool": "mean"}]}, "a has a pool or separator; expected v"),
        ({"categorical": [{"name": "a", "values": 2, "pool": "max"}]}, "pool is 'max'; expected s"),
        ({"categorical": ["b", {"name": "a", "table": "c"}]}, "a: table is 'c'; expected a categ"),
        (
            {"categorical": [{"name": "a", "values": 2, "separator": ";"}]},
            "a: separator is ';', as",
        ),
        ({"dense": [{"name": "a", "transform": "sqrt"}]}, "transform is 'sqrt'; expected log or"),
        ({"nulls": [1]}, "nulls is [1]; expected texts"),
        ({"split": "first day"}, "split: got 'first day'; expected last-day"),
        ({"separator": ", "}, "separator is ', '; expected one character"),
        ({"separator": "a"}, "separator is 'a'"),
        ({"separator": []}, "separator is []"),
        ({"header": "yes"}, "header and quote are true or false"),
        ({"header": False}, "columns does not name 'bought' once"),
        ({"days": 1}, "days is 1; expected a whole number, at least 2"),
        ({"day": "a", "order": "b"}, "got both day and order"),
        (
            {"day": {"name": "a", "format": "%d.%m."}},
            "day: format is '%d.%m.': it has no year",
        ),
        ({"order": {"name": "a", "format": 3}}, "order: format is 3; expected a text, as"),
        ({"day": {"name": "a", "format": ""}}, "day: format is ''; expected it to say something"),
        ({"day": {"name": "a", "form": "%Y"}}, "has 'form'; expected some of name, format"),
        ({"day": {"format": "%d.%m.%Y"}}, "got None for a column of kind day"),
        ({"decimal": ";"}, 'decimal is \';\'; expected "." or ","'),
        (
            {"decimal": ",", "separator": ",", "quote": False},
            "visits: decimal is ',', as between columns; expected another separator, or \"quote\"",
        ),
        (
            {"label": {"name": "bought", "positive": ["yes"]}},
            "label: negative is missing; expected texts, as",
        ),
        (
            {"label": {"name": "a", "positive": [True], "negative": ["no"]}},
            "positive is [True]; ",
        ),
        (
            {"label": {"name": "a", "positive": "y", "negative": ["n"]}},
            "positive is 'y'; exp",
        ),
        (
            {"label": {"name": "a", "positive": ["n"], "negative": ["n"]}},
            "'n' is both positive",
        ),
        ({"label": {"name": "a", "positive": []}}, "positive is []; expected it to say something"),
    ],
)
def test_wrong_column_files(tmp_path, change, message):
    text = change if isinstance(change, str) else json.dumps({**CUSTOM, **change})
    (tmp_path / "columns.json").write_text(text)
    (tmp_path / "log.csv").write_text("x\n")
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        data_utils.preprocess("custom", tmp_path / "log.csv", columns=tmp_path / "columns.json")
    assert str(tmp_path / "columns.json") in str(raised.value)


def test_yaml_and_a_folder_of_files(tmp_path):
    log, data = make_log(random.Random(3), "custom")
    seed = 3
    while not log["header"] or log["key"] != "day" or log["quote"]:
        seed += 1
        log, data = make_log(random.Random(seed), "custom")
    yaml = pytest.importorskip("yaml")
    (tmp_path / "columns.yaml").write_text(yaml.safe_dump(log["described"]))
    (tmp_path / "days").mkdir()
    head, *lines = data.splitlines(keepends=True)
    for name, part in (("a.csv", lines[:4]), ("b.csv.gz", lines[4:])):
        text = head + b"".join(part)
        if name == "b.csv.gz" and not log["quote"]:  # the columns in another order
            separator = log["separator"].encode()
            rows = [line.rstrip(b"\n").split(separator) for line in text.splitlines(keepends=True)]
            text = b"".join(separator.join(row[::-1]) + b"\n" for row in rows)
        (tmp_path / "days" / name).write_bytes(gzip.compress(text) if "gz" in name else text)
    target = tmp_path / "out.npz"
    columns = tmp_path / "columns.yaml"
    data_utils.preprocess("custom", tmp_path / "days", target, columns=columns, split="none")
    expected = plain_arrays(plain_rows(data, log, 0)[0], log, -1, "none")
    for name, array in expected.items():
        np.testing.assert_array_equal(open_npz(target)[name], array)


@pytest.mark.parametrize(
    ("what", "name", "page"),
    [
        ("kaggle", "train.txt", "ailab.criteo.com"),
        ("avazu", "train.csv", "avazu-ctr-prediction"),
        ("taobao", "UserBehavior.csv", "tianchi"),
        ("terabyte", "day_0", "1tb-click-logs"),
    ],
)
def test_files_are_found_and_missing_ones_told_where_from(tmp_path, what, name, page):
    with pytest.raises(FileNotFoundError, match=rf"{name} does not exist.*{page}.*{name[:3]}"):
        data_utils.preprocess(what, tmp_path)
    if what == "avazu":
        log, data = make_log(random.Random(2), what)
        (tmp_path / "train.gz").write_bytes(gzip.compress(data))  # as Kaggle names it
        assert data_utils.preprocess(what, tmp_path, split="none")
        assert (tmp_path / "train_processed.npz").exists()


@pytest.mark.parametrize("modulus", [-1, 7])
def test_the_report_counts_what_is_there(tmp_path, modulus):
    """Distinct values, missing share and the top 1 %'s share, against counting."""
    log, data = make_log(random.Random(5), "kaggle")
    data = b"".join(make_log(random.Random(seed), "kaggle")[1] for seed in range(40))
    _, manifest = build(tmp_path, "kaggle", data, log, max_ind_range=modulus)
    rows, _, _ = plain_rows(data, log, 0)
    columns = [[v for _, k, v in row if k == "hex"] for row in rows]
    if modulus > 0:
        columns = [[None if v is None else v % modulus for v in row] for row in columns]
    assert any(None in row for row in columns)
    assert manifest["num_rows"] == len(rows)
    for told, column in zip(manifest["table_columns"], zip(*columns, strict=True), strict=True):
        counts = sorted(map(column.count, set(column)), reverse=True)
        num_top = -(-len(counts) // 100)
        assert told["distinct"] == len(counts)
        assert told["missing_share"] == column.count(None) / len(rows)
        assert told["top_1_percent_share"] == sum(counts[:num_top]) / len(rows)
    dense = np.array([[max(v or 0, 0) for _, k, v in row if k == "count"] for row in rows])
    for told, column in zip(manifest["dense_columns"], dense.T, strict=True):
        assert told["zero_share"] == pytest.approx((column == 0).mean())
        assert told["largest"] == column.max()
