"""data_utils: every value against a plain-Python reference, and every bad input told apart."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_utils
from slipstream.logs import encoding, faults, formats, parsing, preprocess, rawfile
from slipstream.logs.rows import BadBlock
from slipstream.tools import npz
from slipstream.tools.npz import open_npz, unpack_manifest
from slipstream.tools.streams import stream

ROOT = Path(__file__).parent.parent
KAGGLE = formats.FORMATS["kaggle"]
KEYS = ("X_int", "X_cat", "y", "counts", "days")
CARDINALITIES = [1, 2, 3, 5, 30, 400, 10**6] * 4  # values per column, the last ones mostly distinct


def write_log(path, rows, seed, end="\n"):
    """Write a random log in Criteo's format: missing fields, negative integers, hashes >= 2^31."""
    rng = np.random.default_rng(seed)
    vocabularies = [rng.integers(0, 2**32, min(size, 3000)) for size in CARDINALITIES[:26]]
    vocabularies[3][0] = 0  # hash 00000000 is not the empty value
    vocabularies[4][0] = 2**32 - 1
    spellings = ("{:08x}", "{:08X}", "{:x}")
    lines = []
    for _ in range(rows):
        fields = [str(int(rng.random() < 0.3))]
        for _ in range(13):
            value = int(10 ** rng.uniform(0, 9.3)) - 3
            fields.append("" if rng.random() < 0.2 else str(value))
        for column, vocabulary in enumerate(vocabularies):
            is_empty = column != 0 and rng.random() < 0.1
            spelling = spellings[int(rng.integers(3))]
            fields.append("" if is_empty else spelling.format(int(rng.choice(vocabulary))))
        lines.append("\t".join(fields))
    write_text(path, end.join(lines) + end)


def write_text(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def reference(texts, max_ind_range=-1, keep=None):
    """The same preprocessing with Python lists and dictionaries. `keep` says which rows stay."""
    dense, hashes, labels, days = [], [], [], [0]
    keep = iter(keep) if keep is not None else None
    for text in texts:
        for line in text.split("\n"):
            fields = line.rstrip("\r").split("\t")
            if line == "" or (keep is not None and not next(keep)):
                continue
            labels.append(int(fields[0]))
            dense.append([max(0, int(field or 0)) for field in fields[1:14]])
            values = [int(field, 16) if field else -1 for field in fields[14:]]
            if max_ind_range > 0:
                values = [value % max_ind_range if value >= 0 else -1 for value in values]
            hashes.append(values)
        days.append(len(labels))
    if len(texts) == 1:
        days = np.cumsum([0] + [len(part) for part in np.array_split(labels, 7)])
    ranks = [
        {v: i for i, v in enumerate(sorted(set(column)))} for column in zip(*hashes, strict=True)
    ]
    ids = [[rank[value] for rank, value in zip(ranks, row, strict=True)] for row in hashes]
    return {
        "X_int": np.array(dense, np.int32),
        "X_cat": np.array(ids, np.int32),
        "y": np.array(labels, np.int8),
        "counts": np.array([len(rank) for rank in ranks], np.int64),
        "days": np.asarray(days, np.int64),
    }


def assert_same(path, expected):
    arrays = open_npz(path, required=(*KEYS, "manifest"))
    for key in KEYS:
        assert arrays[key].dtype == expected[key].dtype
        np.testing.assert_array_equal(arrays[key], expected[key], err_msg=key)
    manifest = unpack_manifest(arrays)
    assert manifest["num_rows"] == len(expected["y"])
    assert manifest["num_positive"] == expected["y"].sum()
    with np.load(path, allow_pickle=False) as plain:
        np.testing.assert_array_equal(plain["X_cat"], expected["X_cat"])


def members(path):
    """Bytes of every member but the manifest, which tells the time."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if "manifest" not in name}


def untested(expected):
    """With nothing held out."""
    return {**expected, "days": np.append(expected["days"], expected["days"][-1])}


def good_lines(rows=12, seed=5):
    """Lines of a valid log, each a list of fields, for a test to spoil."""
    rng = np.random.default_rng(seed)
    return [
        [str(row % 2), *map(str, range(13)), *(f"{h:08x}" for h in rng.integers(0, 2**32, 26))]
        for row in range(rows)
    ]


def joined(lines):
    return "".join("\t".join(fields) + "\n" for fields in lines)


BUILT = ["train_processed.npz", "train_processed.npz.columns.txt"]


@pytest.mark.parametrize("block_bytes", [100, 5000, 1 << 24])
@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_equals_the_reference(tmp_path, name, block_bytes):
    raw = tmp_path / name
    write_log(raw, 300, seed=1)
    text = gzip.decompress(raw.read_bytes()) if name.endswith(".gz") else raw.read_bytes()
    built = data_utils.preprocess("kaggle", raw, block_bytes=block_bytes)
    assert built
    assert_same(tmp_path / "train_processed.npz", reference([text.decode()]))
    assert sorted(os.listdir(tmp_path)) == sorted([name, *BUILT])


def test_block_size_and_compression_change_no_byte(tmp_path):
    raw, packed = tmp_path / "train.txt", tmp_path / "same.txt.gz"
    write_log(raw, 800, seed=2)
    packed.write_bytes(gzip.compress(raw.read_bytes()))
    results = []
    for path, block_bytes in [
        (raw, 211),
        (raw, 3001),
        (raw, 40_000),
        (raw, 1 << 24),
        (packed, 9999),
    ]:
        target = tmp_path / f"{len(results)}.npz"
        data_utils.preprocess(
            "kaggle", path, target, data_sub_sample_rate=0.3, block_bytes=block_bytes
        )
        results.append(members(target))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last_newline", [True, False])
def test_line_ends(tmp_path, end, last_newline):
    raw = tmp_path / "train.txt"
    lines = good_lines()
    lines[3][-1] = lines[-1][-1] = ""  # the last field empty, in the last line too
    text = joined(lines)
    raw.write_bytes((text if last_newline else text[:-1]).replace("\n", end).encode())
    data_utils.preprocess("kaggle", raw, block_bytes=700, split="none")
    assert_same(tmp_path / "train_processed.npz", untested(reference([text])))


def test_gzip_of_several_members(tmp_path):
    lines = good_lines()
    raw = tmp_path / "train.txt.gz"
    raw.write_bytes(b"".join(gzip.compress(joined([line]).encode()) for line in lines))
    data_utils.preprocess("kaggle", raw, split="none")
    assert_same(tmp_path / "train_processed.npz", untested(reference([joined(lines)])))


def test_extreme_values(tmp_path):
    lines = good_lines(8)
    lines[0][1:14] = ["-1", "-0", "0", "", "2147483647", "-99999999999", "0000000000000007"] + [
        *("00000000", "99999999", "100000000", "12345678", "-00000001", "1"),
    ]
    lines[0][14:22] = ["0", "00000000", "", "ffffffff", "FFFFFFFF", "80000000", "7fffffff", "a"]
    (tmp_path / "train.txt").write_text(joined(lines))
    data_utils.preprocess("kaggle", tmp_path / "train.txt", split="none")
    arrays = open_npz(tmp_path / "train_processed.npz")
    expected = [0, 0, 0, 0, 2147483647, 0, 7, 0, 99999999, 100000000, 12345678, 0, 1]
    assert arrays["X_int"][0].tolist() == expected
    assert_same(tmp_path / "train_processed.npz", untested(reference([joined(lines)])))


@pytest.mark.parametrize("max_ind_range", [1, 7, 1000, 2**31, 2**40])
def test_max_ind_range(tmp_path, max_ind_range):
    raw = tmp_path / "train.txt"
    write_log(raw, 300, seed=3)
    data_utils.preprocess("kaggle", raw, max_ind_range=max_ind_range, block_bytes=9000)
    expected = reference([raw.read_text()], max_ind_range)
    assert_same(tmp_path / "train_processed.npz", expected)
    assert expected["counts"].max() <= max_ind_range + 1  # and that of empty values


def test_ids_are_a_bijection_of_values_with_empty_first(tmp_path):
    lines = good_lines(10)
    for row, value in enumerate(["", "0", "00000000", "1", "ffffffff", "", "1", "2", "2", "0"]):
        lines[row][20] = value
    (tmp_path / "train.txt").write_text(joined(lines))
    data_utils.preprocess("kaggle", tmp_path / "train.txt", split="none")
    arrays = open_npz(tmp_path / "train_processed.npz")
    assert arrays["X_cat"][:, 6].tolist() == [0, 1, 1, 2, 4, 0, 2, 3, 3, 1]
    assert arrays["counts"][6] == 5


def write_days(folder, days=3, suffix=""):
    texts = []
    for day in range(days):
        write_log(folder / "plain", 150 + 40 * day, seed=10 + day)
        texts.append((folder / "plain").read_text())
        write_text(folder / f"day_{day}{suffix}", texts[-1])
    (folder / "plain").unlink()
    return texts


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_terabyte(tmp_path, suffix, as_folder):
    texts = write_days(tmp_path, suffix=suffix)
    raw = tmp_path if as_folder else tmp_path / "day"
    arguments = ["--data-set", "terabyte", "--raw-data-file", str(raw), "--num-days", "3"]
    data_utils.main(arguments)
    assert_same(tmp_path / "day_processed.npz", reference(texts))
    sources = unpack_manifest(open_npz(tmp_path / "day_processed.npz"))["sources"]
    assert [source["name"] for source in sources] == [f"day_{day}{suffix}" for day in range(3)]
    for source in sources:
        data = (tmp_path / source["name"]).read_bytes()
        assert source["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("thins_held_out", [False, True])
def test_terabyte_sub_sampling(tmp_path, thins_held_out):
    texts = write_days(tmp_path)
    labels = [[int(line[0]) for line in text.splitlines()] for text in texts]
    keep = []
    for day, of_day in enumerate(labels):
        draws = stream(9, "thinning", day).random(len(of_day))
        is_whole = day == 2 and not thins_held_out
        pairs = zip(of_day, draws, strict=True)
        keep += [label == 1 or draw >= 0.6 or is_whole for label, draw in pairs]
    options = {"num_days": 3, "data_sub_sample_rate": 0.6, "seed": 9}
    options["sub_sample_held_out"] = thins_held_out
    target = tmp_path / "out.npz"
    data_utils.preprocess("terabyte", tmp_path / "day", target, block_bytes=4000, **options)
    assert_same(target, reference(texts, keep=keep))
    assert open_npz(target)["y"].sum() == sum(map(sum, labels))
    manifest = unpack_manifest(open_npz(target))
    num_dropped = len(keep) - sum(keep)
    assert manifest["rows_dropped"] == {"sub-sampled negative": num_dropped}
    of_days = labels if thins_held_out else labels[:2]
    assert abs(num_dropped / sum(of_day.count(0) for of_day in of_days) - 0.6) < 0.1
    told = {"rate": 0.6, "held_out": "thinned" if thins_held_out else "whole"}
    assert manifest["sub_sampling"] == told


def test_sub_sampling_is_seeded(tmp_path):
    raw = tmp_path / "train.txt"
    write_log(raw, 300, seed=4)
    results = []
    for index, seed in enumerate([1, 1, 2]):
        target = tmp_path / f"{index}.npz"
        data_utils.preprocess("kaggle", raw, target, data_sub_sample_rate=0.5, seed=seed)
        results.append(members(target))
    assert results[0] == results[1] != results[2]


field = st.one_of(
    st.just(""), st.integers(0, 2**32 - 1).map("{:x}".format), st.sampled_from("abAB0")
)
number = st.one_of(st.just(""), st.integers(-(10**15), 2**31 - 1).map(str))
rows = st.lists(
    st.tuples(
        st.sampled_from("01"),
        st.lists(number, min_size=13, max_size=13),
        st.lists(field, min_size=26, max_size=26),
    ).map(lambda row: [row[0], *row[1], *row[2]]),
    min_size=7,
    max_size=10,
)


@settings(max_examples=40, deadline=None)
@given(lines=rows, block_bytes=st.integers(1, 3000), modulus=st.sampled_from([-1, 1, 5]))
def test_any_small_log(tmp_path_factory, lines, block_bytes, modulus):
    folder = tmp_path_factory.mktemp("log")
    (folder / "train.txt").write_text(joined(lines))
    data_utils.preprocess(
        *("kaggle", folder / "train.txt"),
        **{"max_ind_range": modulus, "block_bytes": block_bytes, "split": "none"},
    )
    expected = untested(reference([joined(lines)], modulus))
    assert_same(folder / "train_processed.npz", expected)


@settings(max_examples=300, deadline=None)
@given(
    column=st.integers(0, 39), text=st.binary(max_size=18).filter(lambda text: b"\n" not in text)
)
def test_fast_and_slow_checks_agree_on_any_bytes(column, text):
    """The fast path refuses exactly the lines that the plain-Python check can explain."""
    rows = [[field.encode() for field in fields] for fields in good_lines(3)]
    rows[1][column] = text
    block = b"".join(b"\t".join(fields) + b"\n" for fields in rows)
    assert (no_fault(block)) == fast_path_takes(block)


@settings(max_examples=300, deadline=None)
@given(column=st.integers(0, 39), text=st.text("0001789-aeF", max_size=19), end=st.booleans())
def test_fast_and_slow_checks_agree_on_digits(column, text, end):
    """Likewise where each byte is allowed, and only its place or the length can be wrong."""
    rows = good_lines(3)
    rows[1][column] = text
    block = joined(rows).replace("\n", "\r\n" if end else "\n").encode()
    assert (no_fault(block)) == fast_path_takes(block)


@pytest.mark.parametrize(
    ("column", "text"),
    [(3, b"1%c"), (3, b"%c1"), (3, b"%c23456789"), (17, b"a%c"), (17, b"%c0000000"), (0, b"%c")],
)
def test_no_other_byte_is_a_digit(column, text):
    for byte in range(256):
        rows = [[field.encode() for field in fields] for fields in good_lines(3)]
        rows[1][column] = text % byte
        block = b"".join(b"\t".join(fields) + b"\n" for fields in rows)
        assert (no_fault(block)) == fast_path_takes(block)


def no_fault(block):
    return not list(faults.find_faults(block.split(b"\n")[:-1], KAGGLE))


def fast_path_takes(block):
    try:
        parsing.parse_block(block, KAGGLE)
    except BadBlock:
        return False
    return True


def test_up_to_date_and_rebuilds(tmp_path, capsys):
    raw, target = tmp_path / "train.txt", tmp_path / "train_processed.npz"
    write_log(raw, 50, seed=6)

    def state():  # two files may have the same time: its clock ticks every few milliseconds
        return target.exists() and (target.stat().st_ino, target.stat().st_mtime_ns)

    def run(*flags):
        capsys.readouterr()
        before = state()
        data_utils.main(["--raw-data-file", str(raw), *flags])
        said = capsys.readouterr().out
        is_built = state() != before
        assert ("is up to date" in said) != is_built
        return is_built

    assert run()
    assert not run()
    assert not run("--seed", "7"), "the seed matters to sub-sampling alone"
    assert not run("--num-days", "3"), "Kaggle has 7 days"
    assert run("--max-ind-range", "10")
    assert not run("--max_ind_range", "10")
    assert run("--data-sub-sample-rate", "0.5")
    assert run("--data-sub-sample-rate", "0.5", "--seed", "7")
    assert run()
    os.utime(raw, (1, 1))
    assert not run(), "same bytes, another time"
    stat = raw.stat()
    raw.write_text(raw.read_text().replace("0\t", "1\t", 1))
    assert raw.stat().st_size == stat.st_size
    assert run(), "same size, other content"
    assert not run()
    target.write_bytes(target.read_bytes()[:-100])
    assert run(), "a truncated result"
    assert_same(target, reference([raw.read_text()]))


def test_manifest(tmp_path):
    raw, target = tmp_path / "train.txt", tmp_path / "out" / "new.npz"
    write_log(raw, 200, seed=7)
    (tmp_path / "train.txt.json").write_text('{"auc": 0.75}')
    data_utils.preprocess("kaggle", raw, target, max_ind_range=50)
    manifest = unpack_manifest(open_npz(target))
    assert "source_notes" not in manifest  # they hold for ids as they are
    assert manifest["options"]["max_ind_range"] == 50
    data_utils.preprocess("kaggle", raw, target)
    manifest = unpack_manifest(open_npz(target))
    assert manifest["version"] == preprocess.VERSION
    assert manifest["data_set"] == "kaggle"
    assert manifest["options"]["max_ind_range"] == -1
    assert manifest["options"]["seed"] is None
    assert manifest["source_notes"] == {"auc": 0.75}
    (source,) = manifest["sources"]
    assert source["name"] == "train.txt"
    assert source["bytes"] == raw.stat().st_size
    assert source["mtime_ns"] == raw.stat().st_mtime_ns
    assert source["sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()
    for notes in ("[1]", "{broken"):
        (tmp_path / "train.txt.json").write_text(notes)
        raw.write_text(raw.read_text() + raw.read_text())
        data_utils.preprocess("kaggle", raw, target)
        assert "source_notes" not in unpack_manifest(open_npz(target))
    json.dumps(manifest, allow_nan=False)


@pytest.mark.parametrize(
    ("column", "text", "message"),
    [
        (0, "7", "train.txt, line 5: label '7'; expected 0 or 1"),
        (0, "", "line 5: label ''; expected 0 or 1"),
        (0, "01", "line 5: label '01'"),
        (1, "nan", "line 5, column 2 (integer 1): 'nan' is not a whole number"),
        (2, "1.5", "line 5, column 3 (integer 2): '1.5' is not a whole number"),
        (13, "+5", "column 14 (integer 13): '+5' is not"),
        (13, "1_000", "'1_000' is not a whole number"),
        (13, " 5", "' 5' is not a whole number"),
        (13, "-", "'-' is not a whole number"),
        (5, "2147483648", "column 6 (integer 5): '2147483648' is more than 2147483647"),
        (5, "00000000000000007", "'00000000000000007' is not a whole number of 1 to 16 digits"),
        (5, "-00000000000000007", "'-00000000000000007' is not a whole number of 1 to 16 digits"),
        (5, "1\0", "is not a whole number"),
        (5, "1e3", "'1e3' is not a whole number"),
        (5, "99999999999999999999", "'99999999999999999999' is not a whole number of 1 to 16"),
        (14, "zz", "line 5, column 15 (category 1): 'zz' is not a hexadecimal value of 1 to 8 dig"),
        (39, "123456789", "column 40 (category 26): '123456789' is not a hexadecimal"),
        (39, "-1", "'-1' is not a hexadecimal"),
        (39, "-0", "'-0' is not a hexadecimal"),
        (39, "+1", "'+1' is not a hexadecimal"),
        (20, "0x1f", "'0x1f' is not a hexadecimal"),
        (20, "é", "is not a hexadecimal"),
        (20, "a\tb", "train.txt, line 5: 41 columns; expected 40"),
        (20, None, "train.txt, line 5: 39 columns; expected 40"),
        (39, "aa\n\t", "train.txt, line 6: 2 columns; expected 40"),
        (39, "aa\r\r", "line 5: a carriage return inside the line"),
    ],
)
@pytest.mark.parametrize("block_bytes", [300, 1 << 24])
def test_bad_lines(tmp_path, column, text, message, block_bytes):
    lines = good_lines()
    lines[4][column : column + 1] = [] if text is None else [text]
    (tmp_path / "train.txt").write_bytes(joined(lines).encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        data_utils.preprocess("kaggle", tmp_path / "train.txt", block_bytes=block_bytes)
    assert os.listdir(tmp_path) == ["train.txt"]


def test_a_dropped_row_is_checked_too(tmp_path):
    lines = good_lines(50)
    for line in lines:
        line[0] = "0"
    lines[40][30] = "zz"
    (tmp_path / "train.txt").write_text(joined(lines))
    with pytest.raises(ValueError, match="line 41, column 31"):
        data_utils.preprocess("kaggle", tmp_path / "train.txt", data_sub_sample_rate=0.999999)


def test_without_polars(tmp_path, monkeypatch):
    write_log(tmp_path / "train.txt", 20, seed=1)
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ValueError, match="pip install polars"):
        data_utils.preprocess("kaggle", tmp_path / "train.txt")
    assert os.listdir(tmp_path) == ["train.txt"]


def test_a_fault_that_only_polars_sees_is_told(tmp_path, monkeypatch):
    write_log(tmp_path / "train.txt", 20, seed=1)
    monkeypatch.setattr(rawfile, "find_faults", lambda *_: [])
    monkeypatch.setattr(parsing, "PLAIN_BYTES", b"")
    with pytest.raises(ValueError, match="train.txt, line 1, or one soon after"):
        data_utils.preprocess("kaggle", tmp_path / "train.txt")


def test_a_shifted_tab_is_not_hidden_by_the_total(tmp_path):
    lines = good_lines()
    fields = lines[2] + lines[3]
    lines[2:4] = [fields[:39], fields[39:]]
    (tmp_path / "train.txt").write_text(joined(lines))
    with pytest.raises(ValueError, match="line 3: 39 columns; expected 40"):
        data_utils.main(["--raw-data-file", str(tmp_path / "train.txt")])


def make_bad_file(folder, what):
    text = joined(good_lines())
    raw = folder / ("train.txt.gz" if "gz" in what else "train.txt")
    contents = {
        "empty": b"",
        "empty gz": gzip.compress(b""),
        "truncated gz": gzip.compress(text.encode())[:-20],
        "not gz": bytes(100) + text.encode(),
        "zeros gz": gzip.compress(text.encode())[:40] + bytes(100),
        "few rows": joined(good_lines(6)).encode(),
        "no newline": bytes(1 << 18).replace(b"\0", b"x"),
    }
    if what in contents:
        raw.write_bytes(contents[what])
    return raw


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "train.txt does not exist"),
        ("empty", "train.txt is empty"),
        ("empty gz", "train.txt.gz is empty"),
        ("truncated gz", "truncated, corrupt or not gzip"),
        ("not gz", "truncated, corrupt or not gzip"),
        ("zeros gz", "truncated, corrupt or not gzip"),
        ("few rows", "at least 7 rows"),
        ("no newline", "line"),
    ],
)
def test_bad_files(tmp_path, what, message):
    raw = make_bad_file(tmp_path, what)
    before = os.listdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        data_utils.main(["--raw-data-file", str(raw)])
    assert os.listdir(tmp_path) == before


def test_a_gz_that_breaks_after_some_blocks(tmp_path):
    raw = tmp_path / "train.txt.gz"
    write_log(raw, 1000, seed=8)
    raw.write_bytes(raw.read_bytes()[:-50])
    with pytest.raises(ValueError, match="truncated"):
        data_utils.preprocess("kaggle", raw, block_bytes=10_000)
    assert os.listdir(tmp_path) == ["train.txt.gz"]


def test_missing_day(tmp_path):
    write_days(tmp_path)
    with pytest.raises(FileNotFoundError, match="day_3.*--num-days 4"):
        data_utils.main(
            ["--data-set", "terabyte", "--raw-data-file", str(tmp_path / "day"), "--num-days", "4"]
        )
    assert sorted(os.listdir(tmp_path)) == ["day_0", "day_1", "day_2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_ind_range": 0}, "--max-ind-range: got 0"),
        ({"data_sub_sample_rate": 1.0}, "--data-sub-sample-rate: got 1"),
        ({"processed_data_file": "train.txt"}, "--processed-data-file: got train.txt"),
        ({"data_set": "movies"}, "--data-set: got 'movies'"),
        ({"data_set": "custom"}, "--columns goes with --data-set custom"),
        ({"columns": "columns.json"}, "--columns goes with --data-set custom"),
        ({"max_memory": 1000}, "--max-memory: 0 MB, .* expected at least"),
        ({"max_memory": 1 << 50}, "--max-memory: .* GB, but .* GB are free"),
    ],
)
def test_bad_options(tmp_path, options, message):
    write_log(tmp_path / "train.txt", 10, seed=1)
    with pytest.raises(ValueError, match=message):
        data_utils.preprocess(
            **{"data_set": "kaggle", "raw_data_file": tmp_path / "train.txt", **options}
        )


def test_sub_sampling_that_leaves_no_rows(tmp_path):
    lines = good_lines(20)
    for line in lines:
        line[0] = "0"
    for day in ("day_0", "day_1"):
        (tmp_path / day).write_text(joined(lines))
    with pytest.raises(ValueError, match="no rows to train on"):
        data_utils.preprocess(
            "terabyte", tmp_path / "day", num_days=2, data_sub_sample_rate=0.9999999
        )
    assert sorted(os.listdir(tmp_path)) == ["day_0", "day_1"]
    with pytest.raises(ValueError, match="expected at least 2, the last is held out"):
        data_utils.preprocess("terabyte", tmp_path / "day", num_days=1)


def test_too_little_disk_is_told_before_any_work(tmp_path, monkeypatch):
    write_log(tmp_path / "train.txt", 20, seed=1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="make room"):
        data_utils.preprocess("kaggle", tmp_path / "train.txt")
    assert os.listdir(tmp_path) == ["train.txt"]


def test_an_error_while_writing_keeps_the_old_result(tmp_path, monkeypatch):
    raw, target = tmp_path / "train.txt", tmp_path / "train_processed.npz"
    write_log(raw, 90, seed=1)
    data_utils.preprocess("kaggle", raw)
    before = target.read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(npz.NpzWriter, "append", full_disk)
        with pytest.raises(OSError, match="No space"):
            data_utils.preprocess("kaggle", raw, max_ind_range=5)
    assert target.read_bytes() == before
    data_utils.preprocess("kaggle", raw, max_ind_range=5)
    assert_same(target, reference([raw.read_text()], 5))
    assert sorted(os.listdir(tmp_path)) == ["train.txt", *BUILT]


def test_too_many_embedding_rows(tmp_path, monkeypatch):
    write_log(tmp_path / "train.txt", 20, seed=1)
    monkeypatch.setattr(encoding, "MAX_EMBEDDING_ROWS", 50)
    with pytest.raises(ValueError, match="expected at most 50.*--max-ind-range"):
        data_utils.preprocess("kaggle", tmp_path / "train.txt")
    assert os.listdir(tmp_path) == ["train.txt"]


def test_vocabulary_merges_many_blocks():
    rng = np.random.default_rng(0)
    vocabulary, id_of, count_of = encoding.Numbering(), {}, Counter()
    for block in range(60):
        largest = 2**64 - 1 if block % 2 else 2**32
        codes = rng.integers(0, largest, 200 if block % 3 else 7, dtype=np.uint64)
        codes[:4] = [0, 2**32, largest, codes[-1]]
        ids = vocabulary.encode(codes)
        for code, provisional in zip(codes.tolist(), ids.tolist(), strict=True):
            assert id_of.setdefault(code, provisional) == provisional
            count_of[provisional] += 1
    assert sorted(id_of.values()) == list(range(vocabulary.size))
    assert len(vocabulary._runs) <= 8, "runs are merged as they grow"
    arrays = vocabulary.arrays()
    assert arrays["codes"].tolist() == sorted(id_of)
    assert arrays["ids"].tolist() == [id_of[code] for code in sorted(id_of)]
    assert arrays["counts"].tolist() == [count_of[i] for i in range(len(id_of))]


def test_command_line(tmp_path):
    raw = tmp_path / "train.txt"
    write_log(raw, 100, seed=1)
    command = [sys.executable, str(ROOT / "data_utils.py"), "--raw-data-file", str(raw)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (0, "")
    assert "100 rows" in done.stdout
    assert "train_processed.npz" in done.stdout
    lines = good_lines()
    lines[2][14] = "zz"
    raw.write_text(joined(lines))
    (tmp_path / "train_processed.npz").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "line 3, column 15 (category 1): 'zz'" in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["train.txt", "train_processed.npz.columns.txt"]


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        data_utils.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for flag in ("data-set", "raw-data-file", "num-days", "processed-data-file", "max-ind-range"):
        assert f"--{flag}" in said


@pytest.mark.parametrize("kind", ["hex", "string"])
def test_an_empty_category_is_no_hash(tmp_path, kind):
    """With --max-ind-range too: an id of its own, the first, and counted as missing."""
    values = ["", "0", "5", "", "a", "", "0", "5"]
    lines = ["y,c", *(f"{row % 2},{value}" for row, value in enumerate(values))]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    about = {"label": "y", "dense": [], "categorical": [{"name": "c", "type": kind}]}
    (tmp_path / "log.json").write_text(json.dumps(about))
    for modulus in (1, 5):
        data_utils.preprocess(
            *("custom", tmp_path / "log.csv", tmp_path / "out.npz"),
            **{"columns": tmp_path / "log.json", "max_ind_range": modulus, "split": "none"},
        )
        arrays = open_npz(tmp_path / "out.npz")
        assert np.flatnonzero(arrays["X_cat"] == 0).tolist() == [0, 3, 5]
        assert unpack_manifest(arrays)["table_columns"][0]["missing_share"] == 3 / 8
        if modulus == 1 or kind == "hex":  # 0, 5 and 10 are one value
            assert arrays["counts"].tolist() == [2]


def test_what_is_said_of_the_columns(tmp_path, capsys):
    """Few lines and all warnings on the screen; the rest in a file, or with --verbose."""
    lines = ["y,n,zero,id,same,shop", *(f"{row % 2},7,0,u{row},x,{row % 9}" for row in range(1200))]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    about = {"label": "y", "dense": ["n", "zero"], "categorical": ["id", "same", "shop"]}
    (tmp_path / "log.json").write_text(json.dumps(about))
    flags = ["--data-set", "custom", "--columns", str(tmp_path / "log.json")]
    flags += ["--raw-data-file", str(tmp_path / "log.csv")]
    data_utils.main(flags)
    said, report = capsys.readouterr().out, tmp_path / "log_processed.npz.columns.txt"
    text = report.read_text()
    assert f"3 tables, 2 dense columns: {report} has what they hold\n" in said
    assert "one value alone, so nothing to learn, in same, zero\n" in said
    assert "nearly each row has a value of its own in id: is it an id" in said
    assert "171 held-out rows are few" in said and len(said.splitlines()) <= 8
    assert text.splitlines()[3].split() == ["id", "1,200", "0.00%", "1.00%"]
    data_utils.main([*flags, "--verbose"])
    again = capsys.readouterr().out
    assert again == f"{tmp_path / 'log_processed.npz'} is up to date\n{text}"
    report.unlink()
    report.mkdir()  # it is in the way, and no harm
    data_utils.main([*flags, "--split", "none", "--verbose", "true"])
    said = capsys.readouterr().out
    assert "no report (" in said and said.endswith("1,210 embedding rows in 3 tables: 1200-1-9\n")
