"""Logs as people have them: packed, in other encodings, or no logs at all. What a file is, its
content says, not its name; the rows are those of the plain file, and damage is told of in a line.
"""

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest

import data_utils
from slipstream.logs import containers
from slipstream.logs.formats import FORMATS
from slipstream.logs.rawfile import RawFile
from slipstream.logs.sources import default_processed_file, estimate_rows, find_raw_files
from slipstream.tools.npz import open_npz, unpack_manifest

pl = pytest.importorskip("polars")
COLUMNS = {"label": "clicked", "dense": ["place"], "categorical": ["shop"]}


def text(number=60):
    lines = [f"{row % 2},Café {row % 7},{row}\n" for row in range(number)]
    return "".join(["clicked,shop,place\n", *lines]).encode()


def zipped(members, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def tarred(members, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


MAC = {"__MACOSX/._log.csv": b"\0\5\26\7", "days/.DS_Store": b"\0\0"}
PACKED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zip": lambda data: zipped({**MAC, "days/log.csv": data}),
    "tar": lambda data: tarred({"./._log.csv": b"\0", "./log.csv": data}),
    "tar.gz": lambda data: gzip.compress(tarred({"log.csv": data})),
    "tar.xz": lambda data: tarred({"log.csv": data}, "w:xz"),
    "gz twice": lambda data: gzip.compress(gzip.compress(data)),
    "UTF-16 LE": lambda data: data.decode().encode("utf-16"),
    "UTF-16 BE": lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"),
    "UTF-32": lambda data: data.decode().encode("utf-32"),
    "UTF-16 in zip": lambda data: zipped({"log.csv": data.decode().encode("utf-16")}),
    "BOM in gz": lambda data: gzip.compress(b"\xef\xbb\xbf" + data),
    "CRLF in UTF-16": lambda data: data.replace(b"\n", b"\r\n").decode().encode("utf-16"),
}


@pytest.fixture
def columns(tmp_path):
    def write(**more):
        path = tmp_path / "columns.json"
        path.write_text(json.dumps({**COLUMNS, **more}), encoding="utf-8")
        return path

    return write


def build(raw, columns, target, **options):
    data_utils.preprocess("custom", raw, target, columns=columns, **options)
    return open_npz(target)


def refused(raw, columns, match):
    before = sorted(path.name for path in raw.parent.iterdir())
    with pytest.raises(ValueError, match=match) as raised:
        build(raw, columns, raw.parent / "x.npz")
    assert sorted(path.name for path in raw.parent.iterdir()) == before
    assert str(raw) in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("block_bytes", [3, 1 << 20])
def test_a_packed_log_is_the_plain_one(tmp_path, columns, kind, block_bytes):
    """Whatever its name is; and its manifest holds the hash of the file itself."""
    plain, packed = tmp_path / "plain.csv", tmp_path / "packed.csv"
    plain.write_bytes(text())
    packed.write_bytes(PACKED[kind](text()))
    first = build(plain, columns(), tmp_path / "p.npz")
    second = build(packed, columns(), tmp_path / "q.npz", block_bytes=block_bytes)
    for name in ("X_int", "X_cat", "y", "counts", "days"):
        np.testing.assert_array_equal(first[name], second[name])
    (source,) = unpack_manifest(second)["sources"]
    assert source["sha256"] == hashlib.sha256(packed.read_bytes()).hexdigest()
    assert source["rows"] == 60
    assert source["bytes"] == packed.stat().st_size
    assert not data_utils.preprocess("custom", packed, tmp_path / "q.npz", columns=columns())


@pytest.mark.parametrize("kind", PACKED)
def test_a_packed_twin_is_found(tmp_path, columns, kind):
    folder = tmp_path / "log"
    folder.mkdir()
    (folder / "a.csv").write_bytes(text())
    (folder / "b.csv").write_bytes(PACKED[kind](text()))
    if kind.startswith("CRLF"):
        (folder / "a.csv").write_bytes(text().replace(b"\n", b"\r\n"))
    with pytest.raises(ValueError, match=r"a\.csv and b\.csv hold the same rows"):
        build(folder, columns(), tmp_path / "p.npz")


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zip", "tar", "tar.gz", "UTF-16 LE"])
def test_damage_is_told_in_a_line(tmp_path, columns, kind):
    # (Of the members that are left out, bytes may be anything.)
    pack = PACKED[kind] if kind != "zip" else lambda data: zipped({"log.csv": data})
    whole = pack(text(3000))
    raw = tmp_path / "log.csv"
    raw.write_bytes(whole[: len(whole) * 2 // 3 | 1])
    refused(raw, columns(), "log.csv is truncated, corrupt or not")
    if kind not in ("tar", "UTF-16 LE"):  # which have no checksums
        raw.write_bytes(whole[:-9])
        refused(raw, columns(), "log.csv is truncated, corrupt or not")
        for place in range(100, len(whole) - 200, len(whole) // 5):
            raw.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            refused(raw, columns(), "log.csv")


@pytest.mark.parametrize("kind", PACKED)
def test_the_estimate_and_the_progress_are_right(tmp_path, kind):
    raw = tmp_path / "log.csv"
    raw.write_bytes(PACKED[kind](text(5000)))
    rows, positive = estimate_rows([raw, raw], replace(FORMATS["avazu"], separator=","))
    assert rows == pytest.approx(10_000, rel=0.05) and positive == 1
    file = RawFile(raw)
    seen = [file.num_read for _ in file.blocks(1000)]
    assert seen == sorted(seen) and file.num_read == raw.stat().st_size


def test_what_is_no_log_is_said(tmp_path, columns):
    raw = tmp_path / "log.csv"
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    for data, match in (
        (
            zipped({"a.csv": text(), "b.csv": text()}),
            r"zip that holds more .*a\.csv, b\.csv.*unzip",
        ),
        (zipped({"folder/": b""}), "zip that holds no file"),
        (tarred({"readme.txt": b"hello", "log.csv": text()}), r"tar that .*readme.txt, log.csv"),
        (gzip.compress(tarred({"a": text(), "b": b""})), "tar that holds more .*tar -xf"),
        (zipped({"[Content_Types].xml": b"", "xl/workbook.xml": b""}), "is an Excel workbook"),
        (gzip.compress(zipped({"log.csv": text()})), "is zip in gzip; unpack it"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page.*fetch"),
        (b"<HTML>Not found</HTML>", "is an HTML page"),
        (lfs, "git-lfs pointer.*git lfs pull"),
        (b"\x80\x04\x95" + bytes(50), "a Python pickle"),
        (b"\x28\xb5\x2f\xfd" + bytes(50), "Zstandard: unpack it with zstd -d"),
        (gzip.compress(b"\x93NUMPY" + bytes(50)), "a NumPy file in gzip"),
    ):
        raw.write_bytes(data)
        refused(raw, columns(), match)


def test_a_large_first_file_of_a_tar_is_not_read_ahead(tmp_path, columns, monkeypatch):
    monkeypatch.setattr(containers, "SMALL_BYTES", 100)
    raw = tmp_path / "log.tar"
    raw.write_bytes(tarred({"log.csv": text()}))
    assert len(build(raw, columns(), tmp_path / "p.npz")["y"]) == 60
    raw.write_bytes(tarred({"log.csv": text(), "b.csv": text()}))
    with pytest.raises(ValueError, match=r"log\.csv, b\.csv"):
        build(raw, columns(), tmp_path / "q.npz")
    assert not (tmp_path / "q.npz").exists()


def test_a_zip_that_python_cannot_open(tmp_path, columns):
    raw = tmp_path / "log.zip"
    data = bytearray(zipped({"log.csv": text()}))
    directory = data.rindex(b"PK\1\2")
    data[directory + 8] |= 1  # encrypted
    raw.write_bytes(data)
    refused(raw, columns(), "is an encrypted zip; unpack it with unzip")
    data[directory + 8] &= 254
    data[directory + 10] = 9  # Deflate64, as Windows packs large files
    data[8] = 9
    raw.write_bytes(data)
    refused(raw, columns(), "compression .*unpack it")


def frame(number=60):
    rows = range(number)
    return pl.DataFrame(
        {
            "place": [*rows],
            "clicked": [row % 2 for row in rows],
            "shop": [f"Café {row % 7}" for row in rows],
        }
    )


@pytest.mark.parametrize("layout", [{}, {"header": False, "columns": ["shop", "clicked", "place"]}])
def test_parquet_is_seen_by_its_content(tmp_path, columns, layout):
    raw = tmp_path / "log.csv"
    frame().write_parquet(raw)
    arrays = build(raw, columns(**layout), tmp_path / "p.npz")
    assert arrays["X_int"][:, 0].tolist() == [*range(60)]
    raw.write_bytes(text())
    refused(raw, columns(separator="parquet"), "is text, not Parquet.* set separator")
    raw.write_bytes(gzip.compress(text()))
    refused(raw, columns(separator="parquet"), "is gzip, not Parquet")
    folder = tmp_path / "log"
    folder.mkdir()
    frame().write_parquet(folder / "a.parquet")
    (folder / "b.csv").write_bytes(text())
    with pytest.raises(ValueError, match=r"a\.parquet is Parquet, and .*b\.csv is text"):
        build(folder, columns(), tmp_path / "q.npz")
    frame().write_parquet(tmp_path / "train.txt")
    with pytest.raises(ValueError, match=r"train\.txt is Parquet; this data set's log is text"):
        data_utils.preprocess("kaggle", tmp_path / "train.txt")
    raw.write_bytes(gzip.compress((tmp_path / "train.txt").read_bytes()))
    refused(raw, columns(), "is Parquet in gzip; unpack it")


@pytest.mark.parametrize("end", ["gz", "GZ", "bz2", "xz", "zip", "tar.gz"])
def test_a_named_log_is_found_packed(tmp_path, end):
    for data_set, name in (("kaggle", "train.txt"), ("taobao", "UserBehavior.csv")):
        (tmp_path / f"{name}.{end}").write_bytes(b"1")
        assert find_raw_files(data_set, tmp_path, 0) == [tmp_path / f"{name}.{end}"]
        assert find_raw_files(data_set, tmp_path / name, 0) == [tmp_path / f"{name}.{end}"]
        assert default_processed_file(data_set, tmp_path / f"{name}.{end}") == (
            default_processed_file(data_set, tmp_path / name)
        )
        (tmp_path / name).write_bytes(b"1")
        assert find_raw_files(data_set, tmp_path, 0) == [tmp_path / name]
