"""Raw logs, and what is to become of them: a plain parser with lists and dictionaries.

It shares no code with the package but the constants of Taobao's log.
"""

import csv
import datetime
import hashlib
import math
import re

import numpy as np

from slipstream.logs import taobao
from slipstream.tools.streams import stream

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
KIND_OF |= {"tags": "list", "shops": "list", "codes": "list", "user": "string", "w": "weight"}
TIME = r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d([.,]\d*)?)? ?(Z|UTC|[+-]\d\d(:?\d\d)?)?)?"
FORMS = {
    "label": r"[01]",
    "count": r"-?[0-9]{1,16}",
    "number": r"-?[0-9]{1,40}(\.[0-9]{0,40})?([eE][+-]?[0-9]{1,3})?",
    "hex": r"[0-9a-fA-F]{1,8}",
    "id": r"[0-9]{1,9}",
    "time": r"-?[0-9]{1,11}",
    "day": rf"-?[0-9]{{1,18}}(\.0*)?|{TIME}",
    "order": rf"[+-]?[0-9]{{1,19}}(\.[0-9]*)?|{TIME}",
}
# Formats of dates, and what is strict about their texts besides what strptime takes.
SPELT_DATES = {
    "%d.%m.%Y": r"\d\d?\.\d\d?\.\d{4}",
    "%m/%d/%Y %I:%M %p": r"\d\d?/\d\d?/\d{4} \d\d?:\d\d? [AaPp][Mm]",
    "%Y%m%d": r"\d{8}",
    "%d-%b-%y %H:%M:%S.%f": r"\d\d?-[A-Za-z]{3}-\d\d \d\d?:\d\d?:\d\d?\.\d{1,9}",
    "%B %d, %Y": r"[A-Za-z]+ \d\d?, \d{4}",
    "%Y年%m月%d日T%H%M%S%z": r"\d{4}年\d\d?月\d\d?日T\d{6}([+-]\d\d:?\d\d|Z)",
}
SIZE = r"([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][+-]?[0-9]{1,3})?"
LAX_FORMS = {
    **FORMS,
    "label": r"\+?[01](\.0*)?|(?i:true|false)",
    "count": r"[+-]?[0-9]{1,16}(\.0{0,40})?",
    "number": f"[+-]?{SIZE}",
    "weight": rf"\+?{SIZE}",
}
FLOAT32 = float(np.finfo(np.float32).max)
DECIMAL = ("count", "number", "weight")
ZONES = [datetime.timezone(datetime.timedelta(hours=hours)) for hours in (0, 11, -9.5)]
SPAN = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Bad(Exception):
    """A line, or a log, that is to be refused."""


def value_of(kind, text, log):
    """A field as the plain parser reads it."""
    lax = "described" in log
    if kind == "label" and log.get("words"):
        if text.decode("latin-1") not in log["words"]:
            raise Bad
        return int(text.decode() in log["described"]["label"]["positive"])
    if kind in ("day", "order") and log.get("format"):
        return spelt_date(text, kind, log["format"])
    if kind == "behaviour" and text in (b"pv", b"buy", b"cart", b"fav"):
        return int(text == b"pv")
    if kind in ("string", "skip"):
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise Bad from error
        if kind == "string" and lax and re.search(rb"[^\n]\|[^\n]|^\[.*,.*\]$|[\x01\x02]", text):
            raise Bad
        return text
    if kind == "hour" and re.fullmatch(rb"\d{8}", text):
        try:
            return datetime.datetime.strptime("20" + text.decode(), "%Y%m%d%H")
        except ValueError as error:
            raise Bad from error
    if kind in ("count", "number") and (text == b"" or text.decode("latin-1") in log["nulls"]):
        return None
    if kind == "hex" and text == b"":
        return None
    if kind in ("count", "number", "weight") and log.get("decimal") == ",":
        if b"." in text:
            raise Bad
        text = text.replace(b",", b".")
    form = (LAX_FORMS if lax else FORMS).get(kind)
    if form is None or not re.fullmatch(form.encode(), text):
        raise Bad
    return number_of(kind, text.decode())


def number_of(kind, text):
    if kind == "label":
        return int(text.lower() in ("1", "true") or text.lstrip("+").startswith("1"))
    if kind == "hex":
        return int(text, 16)
    if kind in ("number", "weight"):
        if abs(float(text)) > FLOAT32:
            raise Bad
        return np.float32(float(text))
    if kind == "count":
        return int(text.partition(".")[0])
    if kind in ("day", "order") and re.match(r"\d{4}-", text):
        return moment_of(text, kind)
    if kind == "order":
        if abs(int(text.partition(".")[0])) > 9 * 10**18:
            raise Bad
        whole, _, rest = text.partition(".")
        size = abs(int(whole)) * 10**6 + int(rest[:6].ljust(6, "0"))
        size = size if abs(int(whole)) < 4 * 10**9 else size // 10**6 * 10**6
        return -size if text.startswith("-") else size
    return int(text.partition(".")[0])


def spelt_date(text, kind, date_format):
    """As `moment_of`, of a date in strptime's format."""
    try:
        text = text.decode()
        if not re.fullmatch(SPELT_DATES[date_format], text, re.ASCII):
            raise Bad
        cut = re.sub(r"(\.\d{6})\d+$", r"\1", text)  # strptime takes microseconds
        moment = datetime.datetime.strptime(cut, date_format)
    except ValueError as error:
        raise Bad from error
    moment = moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)
    since = moment - SPAN
    return since // datetime.timedelta(days=1 if kind == "day" else 0, microseconds=kind != "day")


def moment_of(text, kind):
    """Microseconds, or days, since 1970 in UTC."""
    found = re.fullmatch(
        r"(....-..-..)(?:.(\d\d:\d\d)(?::(\d\d)(?:[.,](\d*))?)? ?"
        r"(?:(Z|UTC)|([+-])(\d\d):?(\d\d)?)?)?",
        text,
    )
    date, clock, seconds, fraction, _, sign, hours, minutes = found.groups()
    try:
        moment = datetime.datetime.fromisoformat(f"{date}T{clock or '00:00'}:{seconds or '00'}")
    except ValueError as error:
        raise Bad from error
    past = datetime.timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
    if int(minutes or 0) > 59 or int(hours or 0) > 23:
        raise Bad
    since = moment.replace(tzinfo=datetime.UTC) - SPAN - past * (-1 if sign == "-" else 1)
    since += datetime.timedelta(microseconds=int((fraction or "")[:6].ljust(6, "0")))
    return since // datetime.timedelta(days=1 if kind == "day" else 0, microseconds=kind != "day")


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


def row_of(line, kinds, names, log):
    """A line as (name, kind, value) of each column."""
    fields = fields_of(line, log)
    if len(fields) != len(kinds):
        raise Bad
    row = []
    for name, kind, field in zip(names, kinds, fields, strict=True):
        if kind != "list":
            value = value_of(kind, field, log)
        else:
            about = log["lists"][name]
            if re.fullmatch(rb"[ \t]*\[.*\][ \t]*", field, re.DOTALL):
                raise Bad
            # What stands in a list is not asked whether it is one itself.
            inner = {**log, "described": None} if about["type"] == "hex" else {"nulls": ()}
            value = [
                value_of(about["type"], one, inner) for one in field.split(about["by"].encode())
            ]
            value = [one for one in value if one not in (b"", None)]
        row.append((name, kind, value))
    return row


def plain_rows(data, log, limit):
    """Rows of (name, kind, value), the bad lines, and the number of blank ones."""
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    kinds, rows, bad, blank, first = log["kinds"], [], [], 0, 1
    names = log.get("names") or list(range(len(kinds)))
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
            row = row_of(line, kinds, names, log)
            of_name = {
                name: value for name, kind, value in row if kind == "count" and value is not None
            }
            for name, value in of_name.items():
                signed = log["transforms"].get(name, "log") != "log"
                if value > 2**31 - 1 or (signed and value < -(2**31 - 1)):
                    raise Bad
            if "order" in log:  # of the column file, whatever the header's is
                row = [row[names.index(name)] for name in log["order"]]
            rows.append([one for one in row if one[1] != "skip"])
        except Bad:
            bad.append(number)
            if len(bad) > limit:
                raise Bad(f"line {number}") from None
    return rows, bad, blank


def code_of(kind, value):
    """What a category is ranked by: its number, or its digest; the empty one first."""
    if kind == "hex":
        return -1 if value is None else value
    if not value:
        return 0
    return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little") or 1


def columns_of(rows, log):
    """The id columns: (name of the table, kind, values by row); None is an absent element."""
    columns = []
    for place, (name, kind, _) in enumerate(rows[0]):
        values = [row[place][2] for row in rows]
        if kind in ("hex", "string"):
            table = log["shares"].get(name, name)
            columns.append((table, kind, [(v,) for v in values]))
        elif kind == "list":
            about = log["lists"][name]
            table, most = log["shares"].get(name, name), about["values"]
            kept = [value[-most:] for value in values]
            for at in range(most):
                column = [(value[at],) if at < len(value) else None for value in kept]
                columns.append((table, about["type"], column))
        elif kind == "hour":
            columns.append(("hour of day", "hex", [(v.hour,) for v in values]))
            columns.append(("weekday", "hex", [(v.weekday(),) for v in values]))
    # Derived columns come last.
    return sorted(columns, key=lambda column: column[0] in ("hour of day", "weekday"))


def plain_arrays(rows, log, modulus, split="last-day", min_count=1, rate=0.0, seed=0):
    """The processed file's arrays, with lists and dictionaries."""
    if not rows:
        raise Bad("rows")
    label = [next(v for _, kind, v in row if kind == "label") for row in rows]
    keys = [next((v for _, k, v in row if k in ("day", "order", "hour")), 0) for row in rows]
    if log["key"] == "hour":
        keys = [int(key.strftime("%y%m%d")) for key in keys]
    classes = [0] * len(rows)
    if split.startswith("random"):
        draws = stream(int(split[7:]), "split", 0).random(len(rows))
        classes = [1 if draw < 0.1 else 2 if draw < 0.2 else 0 for draw in draws]
    order = sorted(range(len(rows)), key=lambda i: (classes[i], keys[i], i))
    days = days_of(order, keys, classes, log, split)
    is_held_out = {i: at >= sum(days[:-1]) for at, i in enumerate(order)}
    thinned = stream(seed, "thinning", 0).random(len(rows)) < rate
    gone = {i for i in order if thinned[i] and not label[i] and not is_held_out[i]}
    order = [i for i in order if i not in gone]
    days = days_of(order, keys, classes, log, split, is_held_out)
    check_halves([label[i] for i in order if is_held_out[i]], split)
    training = [i for i in order if not is_held_out[i]]
    if not training:
        raise Bad("no rows to train on")
    ids, counts = ids_of(rows, log, modulus, order, training, min_count)
    dense = dense_of(rows, log, order, training)
    arrays = {
        "X_int": dense,
        "X_cat": ids,
        "y": np.array([label[i] for i in order]),
        "counts": counts,
        "days": np.cumsum([0, *days]),
    }
    if any(kind == "weight" for _, kind, _ in rows[0]):
        weights = [next(v for _, kind, v in rows[i] if kind == "weight") for i in order]
        arrays["weights"] = np.array(weights, np.float32)
    return arrays


def days_of(order, keys, classes, log, split, is_held_out=None):
    """The number of rows of each day, held-out ones last."""
    by_key = log["key"] in ("hour", "day")
    if is_held_out is None:
        held_out = [i for i in order if classes[i]]
        if split == "last-day":
            if by_key:
                last = max(keys)
                held_out = [i for i in order if keys[i] == last]
                if len(set(keys)) < 2 or len(held_out) < 2:
                    raise Bad("all rows are of one day, or nothing is held out")
            elif len(order) < log.get("days", 7):
                raise Bad("rows")
            else:
                held_out = order[len(order) - len(order) // log.get("days", 7) :]
        elif len(held_out) == len(order) or (split != "none" and len(held_out) < 2):
            raise Bad("nothing is held out, or nothing else")
        is_held_out = {i: i in set(held_out) for i in order}
    training = [i for i in order if not is_held_out[i]]
    if by_key:
        days = [
            sum(keys[i] == key for i in training) for key in sorted({keys[i] for i in training})
        ]
    else:
        num_days = log.get("days", 7) - (split == "last-day")
        parts = np.array_split(training, max(1, min(num_days, len(training))))
        days = [len(part) for part in parts]
    return [*days, len(order) - len(training)]


def check_halves(labels, split):
    half = len(labels) // 2
    if split != "none" and not len(set(labels[:half])) == len(set(labels[half:])) == 2:
        raise Bad("a half of one class")


def ids_of(rows, log, modulus, order, training, min_count):
    """Ids (n, C) and the tables' sizes."""
    columns = columns_of(rows, log)
    tables = list(dict.fromkeys(table for table, _, _ in columns))
    ids, counts = {}, []
    for table in tables:
        mine = [(at, kind, values) for at, (t, kind, values) in enumerate(columns) if t == table]
        texts = {v[0] for _, kind, vs in mine if kind == "string" for v in vs if v and v[0]}
        number = rb"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?"
        is_number = "described" in log and texts and all(re.fullmatch(number, t) for t in texts)

        def code(kind, value, is_number=is_number):
            if is_number and value and re.fullmatch(rb"-?[0-9]+\.0+", value):
                value = value.partition(b".")[0]
            code = code_of(kind, value)
            if value in (None, b""):
                return -1  # no hash, whatever the modulus
            return code % modulus if modulus > 0 else code

        of_row = {
            at: {i: None if values[i] is None else code(kind, values[i][0]) for i in order}
            for at, kind, values in mine
        }
        seen = [c[i] for c in of_row.values() for i in order if c[i] is not None]
        trained = [c[i] for c in of_row.values() for i in training if c[i] is not None]
        own = sorted(c for c in set(seen) if min_count == 1 or trained.count(c) >= min_count)
        rank = {c: place for place, c in enumerate(own)}
        if not seen:
            raise Bad("a table without values")
        counts.append(len(own) + (len(own) < len(set(seen))))
        for at, column in of_row.items():
            ids[at] = [-1 if column[i] is None else rank.get(column[i], len(own)) for i in order]
    return np.array([ids[at] for at in range(len(columns))]).T.reshape(len(order), -1), np.array(
        counts
    )


def dense_of(rows, log, order, training):
    columns, names = [], []
    for place, (name, kind, _) in enumerate(rows[0]):
        if kind not in ("count", "number"):
            continue
        transform = log["transforms"].get(name, "log")
        values = {i: rows[i][place][2] for i in order}
        empty = 0
        if transform == "standardize":
            there = [float(values[i]) for i in training if values[i] is not None]
            empty = np.float32(math.fsum(there) / len(there) if there else 0)
        least = 0 if transform == "log" else -math.inf
        columns.append([empty if v is None else max(v, least) for v in values.values()])
        names.append(transform)
    if log["key"] == "hour":
        columns.append([next(v for _, k, v in rows[i] if k == "hour").hour for i in order])
    is_float = "number" in log["kinds"] or "standardize" in names
    return np.array(columns, np.float32 if is_float else np.int64).T


def text(r, kind, log):
    """A field that is good, most of the time strange."""
    if kind == "behaviour":
        return r.choice(["pv", "pv", "pv", "buy", "cart", "fav"])
    if kind in ("id", "time"):
        top = 99 if kind == "id" else 9 * 86400 + 7000
        return str(r.randint(1, top) + (taobao.START - 3500 if kind == "time" else 0))
    if kind == "hour":
        return f"1410{r.randint(20, 22)}{r.randint(0, 23):02}"
    if kind in ("day", "order") and log.get("format"):
        moment = datetime.datetime(2024, 2, r.choice([8, 9, 28, 29]), r.randint(0, 23), 5, 9)
        moment = moment.replace(microsecond=r.choice([0, 900, 123456]), tzinfo=r.choice(ZONES))
        return re.sub(r"\b0(?=\d\b)", r.choice(["0", ""]), moment.strftime(log["format"]))
    if kind == "day":
        return r.choice(["2024-02-28", "2024-02-29", "2024-03-01 10:00", "2024-03-01T23:59:59Z"])
    if kind == "order":
        times = [f"2024-02-03 10:20:30.{r.randint(0, 99)}", "2024-02-03", "2024-02-03T10:20+01:00"]
        times += ["2024-02-03T09:20-0030", "2024-02-03 09:00:01 UTC", "2024-02-03T11:00-02"]
        times = times if r.random() < 0.7 else ["1706956800.25", "1706956800", "-3.5"]
        return r.choice([f"2024-02-0{r.randint(1, 9)}T10:{r.randint(10, 59)}", *times])
    if kind == "list":
        return ""
    lax = "described" in log
    if kind == "label" and log.get("words"):
        return r.choice(log["words"])
    choices = {
        "label": ["0", "1", *(["1.0", "true", "+0"] if lax else [])],
        "weight": ["1", "0.5", ".25", "2e0"],
        "count": ["", "0", "-1", "7", "2147483647", "0000000000000009", str(r.randint(0, 999))],
        "number": ["", "0.5", "-1.5", "1e3", "3.25e-2", "340282346638528859811704183484516925440"],
        "hex": ["", "0", "ffffffff", "FFFFFFFF", "0a", "A", f"{r.randint(0, 2**32 - 1):08x}"],
        "string": ["", "a", "A", " a", "é", "85f751fd", "-1", "0", "00", "long " * 9, "#", "'"],
        "skip": ["", "x", "18446744073709551616"],
    }
    if lax and r.random() < 0.2 and kind in ("count", "number"):
        choices[kind] = ["+3", "3.0", *log["nulls"]]
    chosen = r.choice(choices[kind])
    return chosen.replace(".", log.get("decimal", ".")) if kind in DECIMAL else chosen


def make_log(r, what):
    """A log's description, and the bytes of a good one."""
    log = {"separator": "\t", "header": False, "quote": False, "key": None, "nulls": ()}
    log |= {"lists": {}, "shares": {}, "transforms": {}}
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
    num_rows = r.randint(12, 36) if what == "custom" else r.randint(8, 14)
    rows = [[field(r, log, i) for i in order] for _ in range(num_rows)]
    if log["quote"]:
        rows = [[f'"{v}"' if r.random() < 0.1 else v for v in row] for row in rows]
    if log["header"]:
        rows.insert(0, [log["names"][i] for i in order])
    return log, "".join(log["separator"].join(row) + "\n" for row in rows).encode()


def field(r, log, place):
    kind = log["kinds"][place]
    name = log["names"][place] if "described" in log else None
    if kind == "list":
        about = log["lists"][name]
        number = r.randint(0, about["values"] + 2)
        if r.random() < 0.004:
            return r.choice(["[]", "[ 'a' ]", " [1]"])
        elements = ["", "0a", "ff", "7"] if about["type"] == "hex" else ["a", "b", "", "85f751fd"]
        return about["by"].join(r.choice(elements) for _ in range(number))
    if name == "user":
        return r.choice(["", "17", "17.0", "3", "3.00", "-1.0", "017", *log["users"]])
    return text(r, kind, log)


def spell(r, described, key):
    """Let a column file say how dates, numbers and labels are spelt, or some of them."""
    spelt = {}
    if key and r.random() < 0.5:
        spelt["format"] = r.choice(list(SPELT_DATES))
        described[key] = {"name": described[key], "format": spelt["format"]}
    if described["separator"] != "," and r.random() < 0.3:
        spelt["decimal"] = described["decimal"] = ","
    if r.random() < 0.3:
        spelt["words"] = ["yes", "1", "0", "ja!"]
        described["label"] = {"name": "bought", "positive": ["yes", "0"], "negative": ["1", "ja!"]}
    return spelt


def custom_log(r):
    separator = r.choice(";|,\t")
    described = {**CUSTOM, "separator": separator, "header": r.random() < 0.7}
    described["categorical"] = [*CUSTOM["categorical"], "user"]
    names = ["bought", "visits", "price", "shop", "code", "town", "user"]
    lists, shares, transforms = {}, {}, {}
    by = "^" if separator == "|" else "|"
    for name, about in (
        ("tags", {"values": 3, "pool": "mean"}),
        ("shops", {"values": 4, "pool": "sequence", "table": "shop"}),
        ("codes", {"values": 2, "type": "hex", "table": "code"}),
    ):
        if r.random() < 0.4:
            described["categorical"].append({"name": name, "separator": by, **about})
            lists[name] = {"by": by, "values": about["values"], "type": about.get("type", "string")}
            shares |= {name: about["table"]} if "table" in about else {}
            names.append(name)
    for at, name in enumerate(["visits", "price"]):
        if r.random() < 0.4:
            transforms[name] = r.choice(["signed_log", "standardize", "none", "log"])
            kind = KIND_OF[name]
            described["dense"] = list(described["dense"])
            about = {"name": name, "type": kind, "transform": transforms[name]}
            described["dense"][at] = about
    key = r.choice([None, "day", "order"])
    if key:
        described[key] = {"day": "date", "order": "time"}[key]
        names.append(described[key])
    if r.random() < 0.3:
        described["weight"] = "w"
        names.append("w")
    read = list(names)
    names.insert(r.randrange(len(names)), "note")
    if not described["header"]:
        described["columns"] = names
    if r.random() < 0.5:
        described["quote"] = True
    if key != "day":
        described["days"] = r.randint(2, 5)
    spelt = spell(r, described, key)
    nulls = r.choice([(), ("NULL", "nan")])
    if nulls:
        described["nulls"] = list(nulls)
    return {
        "described": described,
        **spelt,
        "kinds": [KIND_OF[name] for name in names],
        "names": names,
        "order": read,
        "separator": described["separator"],
        "header": described["header"],
        "quote": described.get("quote", described["separator"] == ","),
        "key": key,
        "days": described.get("days", 7),
        "nulls": nulls,
        "lists": lists,
        "shares": shares,
        "transforms": transforms,
        "users": r.choice([[], [], ["x"], ["1e3"]]),
    }
