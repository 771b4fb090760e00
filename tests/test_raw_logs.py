"""Raw logs of every data set, whole and spoiled: what is accepted equals a plain parser, and what
is not gets one line that names the file and the bad line.

`--fuzz N` tries N times as many spoiled files (1: 320).
"""

import contextlib
import csv
import datetime
import gzip
import hashlib
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

import data_utils
from slipstream.logs import taobao
from slipstream.tools.npz import open_npz, unpack_manifest

EXAMPLES = int(os.environ.get("SLIPSTREAM_FUZZ", "1"))
AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,"
    "device_id,device_ip,device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21"
).split(",")
CUSTOM = {
    "separator": ";",
    "label": "bought",
    "dense": ["visits", {"name": "price", "type": "number"}],
    "categorical": ["shop", {"name": "code", "type": "hex"}, "town"],
}
KIND_OF = {"bought": "label", "visits": "count", "price": "number", "shop": "string"}
KIND_OF |= {"code": "hex", "town": "string", "date": "day", "time": "order", "note": "skip"}
FORMS = {
    "count": r"-?[0-9]{1,16}",
    "number": r"-?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?",
    "hex": r"[0-9a-fA-F]{1,8}",
    "id": r"[0-9]{1,9}",
    "time": r"-?[0-9]{1,11}",
    "day": r"-?[0-9]{1,18}|\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d*)?)?Z?)?",
}
FORMS["order"] = FORMS["day"]


class Bad(Exception):
    """A line, or a log, that is to be refused."""


def value_of(kind, text):
    """A field as the plain parser reads it."""
    if kind == "label" and text in (b"0", b"1"):
        return int(text)
    if kind == "behaviour" and text in (b"pv", b"buy", b"cart", b"fav"):
        return int(text == b"pv")
    if kind in ("string", "skip"):
        with contextlib.suppress(UnicodeDecodeError):
            return text.decode() and text
    if kind == "hour" and re.fullmatch(rb"\d{8}", text):
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime("20" + text.decode(), "%Y%m%d%H")
    if text == b"" and kind in ("count", "number", "hex"):
        return None if kind == "hex" else 0
    form = FORMS.get(kind)
    if form is None or not re.fullmatch(form.encode(), text):
        raise Bad
    if kind == "hex":
        return int(text, 16)
    if kind == "number":
        number = float(text)
        if abs(number) > float(np.finfo(np.float32).max):
            raise Bad
        return np.float32(max(number, 0))
    if kind == "count":
        if int(text) > 2**31 - 1:
            raise Bad
        return max(int(text), 0)
    if kind in ("day", "order") and re.match(rb"\d{4}-\d\d-\d\d", text):
        try:
            datetime.datetime.fromisoformat(re.split(r"[.Z]", text.decode())[0])
        except ValueError as error:
            raise Bad from error
        digits = re.sub(rb"\D", b"", text[: 10 if kind == "day" else 24])
        return int(digits if kind == "day" else digits.ljust(18, b"0"))
    return int(text)


def fields_of(line, log):
    if b"\r" in line or (log["quote"] and b"\x1f" in line):
        raise Bad
    if log["quote"] and b'"' in line:
        try:
            (fields,) = csv.reader([line.decode()], delimiter=log["separator"], strict=True)
        except (csv.Error, ValueError) as error:
            raise Bad from error
        return [field.encode() for field in fields]
    return line.split(log["separator"].encode())


def plain_rows(data, log, limit):
    """Rows of kind -> values, the bad lines, and the number of blank ones."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    kinds, rows, bad, blank, first = log["kinds"], [], [], 0, 1
    names = log.get("names")
    if log["header"]:
        text = lines.pop(0).removesuffix(b"\r").decode("utf-8", "backslashreplace")
        names = text.split(log["separator"])
        try:
            if log["quote"] and '"' in text:
                (names,) = csv.reader([text], delimiter=log["separator"], strict=True)
        except (csv.Error, ValueError) as error:
            raise Bad("line 1: the header") from error
        if "\r" in text:
            raise Bad("line 1: the header")
        names = [name.strip() for name in names]
        wanted = dict(zip(log["names"], log["kinds"], strict=True))
        if any(names.count(name) != 1 for name, kind in wanted.items() if kind != "skip"):
            raise Bad("line 1: the header")
        kinds, first = [wanted.get(name, "skip") for name in names], 2
    for number, line in enumerate(lines, first):
        line = line.removesuffix(b"\r")
        if line == b"":
            blank += 1
            continue
        try:
            fields = fields_of(line, log)
            if len(fields) != len(kinds):
                raise Bad
            row = [(k, value_of(k, field)) for k, field in zip(kinds, fields, strict=True)]
            if "order" in log:  # of the column file, whatever the header's is
                row = [row[names.index(name)] for name in log["order"]]
            rows.append([pair for pair in row if pair[0] != "skip"])
        except Bad:
            bad.append(number)
            if len(bad) > limit:
                raise Bad(f"line {number}") from None
    return rows, bad, blank


def code_of(kind, value, modulus):
    """What a category is ranked by: its number, or its digest; the empty one first."""
    if kind == "string" and value:
        digest = hashlib.blake2b(value, digest_size=8).digest()
        value = int.from_bytes(digest, "little") or 1
    elif kind == "string":
        value = None
    if modulus > 0:
        return (value or 0) % modulus
    return -1 if value is None else value


def plain_arrays(rows, log, modulus):
    """The processed file's arrays, with lists and dictionaries."""
    label, dense, codes, keys = [], [], [], []
    for row in rows:
        hour = next((value for kind, value in row if kind == "hour"), None)
        label.append(next(value for kind, value in row if kind == "label"))
        dense.append([value for kind, value in row if kind in ("count", "number")])
        codes.append([code_of(k, v, modulus) for k, v in row if k in ("hex", "string")])
        keys += [value for kind, value in row if kind in ("day", "order")]
        if hour is not None:
            dense[-1].append(hour.hour)
            codes[-1] += [hour.hour % modulus, hour.weekday() % modulus] if modulus > 0 else []
            codes[-1] += [hour.hour, hour.weekday()] if modulus <= 0 else []
            keys.append(int(hour.strftime("%y%m%d")))
    num_days = log.get("days", 7)
    if keys:
        order = sorted(range(len(rows)), key=keys.__getitem__)
        label, dense, codes = ([part[i] for i in order] for part in (label, dense, codes))
    if not rows or (log["key"] in (None, "order") and len(rows) < num_days):
        raise Bad("rows")
    if log["key"] in ("hour", "day"):
        days = np.cumsum([0, *(keys.count(day) for day in sorted(set(keys)))])
        if len(days) < 3 or days[-1] - days[-2] < 2:
            raise Bad("all rows are of one day, or nothing is held out")
    else:
        days = np.cumsum([0, *map(len, np.array_split(label, num_days))])
    ranks = [
        {code: i for i, code in enumerate(sorted(set(column)))}
        for column in zip(*codes, strict=True)
    ]
    return {
        "X_int": np.array(dense, np.float32 if "number" in log["kinds"] else np.int64),
        "X_cat": np.array([[r[c] for r, c in zip(ranks, row, strict=True)] for row in codes]),
        "y": np.array(label),
        "counts": np.array([len(rank) for rank in ranks]),
        "days": days,
    }


def text(r, kind):
    """A field that is good, most of the time strange."""
    if kind == "label":
        return r.choice("01")
    if kind == "behaviour":
        return r.choice(["pv", "pv", "pv", "buy", "cart", "fav"])
    if kind in ("id", "time"):
        top = 99 if kind == "id" else 9 * 86400 + 7000
        return str(r.randint(1, top) + (taobao.START - 3500 if kind == "time" else 0))
    if kind == "hour":
        return f"1410{r.randint(20, 22)}{r.randint(0, 23):02}"
    if kind == "day":
        return r.choice(["2024-02-28", "2024-02-29", "2024-03-01 10:00", "2024-03-01T23:59:59Z"])
    if kind == "order":
        times = [f"2024-02-03 10:20:30.{r.randint(0, 99)}", "2024-02-03"]
        return r.choice([f"2024-02-0{r.randint(1, 9)}T10:{r.randint(10, 59)}", *times])
    choices = {
        "count": ["", "0", "-1", "7", "2147483647", "0000000000000009", str(r.randint(0, 999))],
        "number": ["", "0.5", "-1.5", "1e3", "3.25e-2", "340282346638528859811704183484516925440"],
        "hex": ["", "0", "ffffffff", "FFFFFFFF", "0a", "A", f"{r.randint(0, 2**32 - 1):08x}"],
        "string": ["", "a", "A", " a", "é", "85f751fd", "-1", "0", "00", "long " * 9, "#", "'"],
        "skip": ["", "x", "18446744073709551616"],
    }
    return r.choice(choices[kind])


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


def make_log(r, what):
    """A log's description, and the bytes of a good one."""
    log = {"separator": "\t", "header": False, "quote": False, "key": None}
    if what == "kaggle":
        log["kinds"] = ["label", *["count"] * 13, *["hex"] * 26]
    elif what == "taobao":
        log |= {"kinds": ["id"] * 3 + ["behaviour", "time"], "separator": ","}
    elif what == "avazu":
        kinds = ["skip", "label", "hour", *["string"] * 21]
        log |= {"kinds": kinds, "separator": ",", "header": True, "names": AVAZU, "key": "hour"}
        log["order"] = AVAZU
    else:
        log |= custom_log(r)
    width = len(log["kinds"])
    order = r.sample(range(width), width) if log["header"] else range(width)
    rows = [[text(r, log["kinds"][i]) for i in order] for _ in range(r.randint(8, 14))]
    if log["quote"]:
        rows = [[f'"{v}"' if r.random() < 0.1 else v for v in row] for row in rows]
    if log["header"]:
        rows.insert(0, [log["names"][i] for i in order])
    return log, "".join(log["separator"].join(row) + "\n" for row in rows).encode()


def custom_log(r):
    described = {**CUSTOM, "separator": r.choice(";|,\t"), "header": r.random() < 0.7}
    names = ["bought", "visits", "price", "shop", "code", "town", "note"]
    key = r.choice([None, "day", "order"])
    if key:
        described[key] = {"day": "date", "order": "time"}[key]
        names.append(described[key])
    if not described["header"]:
        described["columns"] = names
    if r.random() < 0.5:
        described["quote"] = True
    if key != "day":
        described["days"] = r.randint(2, 7)
    return {
        "described": described,
        "kinds": [KIND_OF[name] for name in names],
        "names": names,
        "order": ["bought", "visits", "price", "shop", "code", "town", *names[7:]],
        "separator": described["separator"],
        "header": described["header"],
        "quote": described.get("quote", described["separator"] == ","),
        "key": key,
        "days": described.get("days", 7),
    }


def build(folder, what, data, log, **options):
    """Preprocess `data`: the arrays and the manifest, or the error's text."""
    names = {"kaggle": "train.txt", "avazu": "train.csv", "taobao": "UserBehavior.csv"}
    raw = folder / names.get(what, "log.csv")
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
    assert sorted(os.listdir(folder)) == sorted([*before, "out.npz"])
    return arrays, unpack_manifest(arrays)


def check(folder, what, data, log, modulus, block_bytes, limit):
    """One log, by both parsers."""
    options = {"max_ind_range": modulus, "block_bytes": block_bytes, "bad_lines": limit}
    arrays, said = build(folder, what, data, log, **options)
    try:
        rows, bad, blank = plain_rows(data, log, limit)
        expected = plain_clicks(rows, modulus) if what == "taobao" else None
        expected = expected or plain_arrays(rows, log, modulus)
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
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def plain_clicks(rows, modulus):
    """Positive rows of Taobao's log in order, (user, item, ...) each, and their times."""
    clicks = []
    for number, row in enumerate(rows):
        user, item, category, is_click, time = (value for _, value in row)
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
        values = (user, item, category, moment.hour, moment.weekday(), *previous)
        lines.append((time, user, number, values, len(past), moment.date()))
        past.append((item, category))
    lines.sort(key=lambda line: line[:3])
    if len({line[-1] for line in lines}) < 2:
        raise Bad("one day")
    return lines, modulus


def check_clicks(arrays, lines, modulus):
    def code(value):
        if modulus > 0:
            return (value or 0) % modulus
        return -1 if value is None else value

    codes = np.array([[code(value) for value in line[3]] for line in lines])
    ranks = [{c: i for i, c in enumerate(sorted(set(column)))} for column in codes.T.tolist()]
    ids = [[r[c] for r, c in zip(ranks, row, strict=True)] for row in codes.tolist()]
    assert arrays["y"].tolist() == [1, 0] * len(lines)
    np.testing.assert_array_equal(arrays["X_cat"][::2], ids)
    assert arrays["X_int"][::2, 0].tolist() == [line[4] for line in lines]
    np.testing.assert_array_equal(arrays["X_int"][1::2], arrays["X_int"][::2])
    others = [0, 3, 4, 5, 6]  # all but item and category
    np.testing.assert_array_equal(arrays["X_cat"][1::2][:, others], arrays["X_cat"][::2][:, others])
    pairs = {tuple(row) for row in arrays["X_cat"][::2, 1:3].tolist()}
    assert {tuple(row) for row in arrays["X_cat"][1::2, 1:3].tolist()} <= pairs
    if modulus < 1:
        counts = np.bincount(arrays["X_cat"][::2, 1])
        rare = counts[arrays["X_cat"][::2, 1]] < 0.7 * counts.sum()
        assert (arrays["X_cat"][1::2, 1] != arrays["X_cat"][::2, 1])[rare].all()
    dates = [line[-1] for line in lines]
    days = np.cumsum([0, *(2 * dates.count(day) for day in sorted(set(dates)))])
    assert arrays["days"].tolist() == days.tolist()


@pytest.mark.parametrize("what", ["kaggle", "avazu", "taobao", "custom"])
def test_spoiled_logs(tmp_path_factory, what):
    folder = tmp_path_factory.mktemp("logs")
    outcomes = []

    @settings(
        max_examples=80 * EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        seed=st.integers(0, 2**32 - 1),
        num_faults=st.integers(1, 3),
        modulus=st.sampled_from([-1, -1, 3]),
        block_bytes=st.sampled_from([1, 50, 211, 400, 1000, 3000]),
        limit=st.sampled_from([0, 0, 1, 5]),
    )
    def spoiled(seed, num_faults, modulus, block_bytes, limit):
        r = random.Random(seed)
        log, data = make_log(r, what)
        for _ in range(num_faults):
            data = spoil(r, data, log)
        for path in folder.iterdir():
            path.unlink()
        check(folder, what, data, log, modulus, block_bytes, limit)
        outcomes.append((folder / "out.npz").exists())

    spoiled()
    assert 0.1 < np.mean(outcomes) < 0.9, "both outcomes are tried"


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
        ({"categorical": [{"name": "a", "type": "number"}]}, "type string or hex"),
        ({"categorical": [{"name": "a", "kind": "hex"}]}, "expected name, and type"),
        ({"separator": ", "}, "separator is ', '; expected one character"),
        ({"separator": "a"}, "separator is 'a'"),
        ({"separator": []}, "separator is []"),
        ({"header": "yes"}, "header and quote are true or false"),
        ({"header": False}, "columns does not name 'bought' once"),
        ({"days": 1}, "days is 1; expected a whole number, at least 2"),
        ({"day": "a", "order": "b"}, "got both day and order"),
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
    data_utils.preprocess("custom", tmp_path / "days", target, columns=tmp_path / "columns.yaml")
    expected = plain_arrays(plain_rows(data, log, 0)[0], log, -1)
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
        assert data_utils.preprocess(what, tmp_path)
        assert (tmp_path / "train_processed.npz").exists()


def test_the_report_counts_what_is_there(tmp_path):
    """Distinct values, missing share and the top 1 %'s share, against counting."""
    log, data = make_log(random.Random(5), "kaggle")
    data = b"".join(make_log(random.Random(seed), "kaggle")[1] for seed in range(40))
    _, manifest = build(tmp_path, "kaggle", data, log)
    rows, _, _ = plain_rows(data, log, 0)
    columns = [[v for k, v in row if k == "hex"] for row in rows]
    assert manifest["num_rows"] == len(rows)
    for told, column in zip(manifest["table_columns"], zip(*columns, strict=True), strict=True):
        counts = sorted(map(column.count, set(column)), reverse=True)
        num_top = -(-len(counts) // 100)
        assert told["distinct"] == len(counts)
        assert told["missing_share"] == column.count(None) / len(rows)
        assert told["top_1_percent_share"] == sum(counts[:num_top]) / len(rows)
    dense = np.array([[v for k, v in row if k == "count"] for row in rows])
    for told, column in zip(manifest["dense_columns"], dense.T, strict=True):
        assert told["zero_share"] == pytest.approx((column == 0).mean())
        assert told["largest"] == column.max()
