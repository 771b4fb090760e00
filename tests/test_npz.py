import io
import json
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from slipstream.tools import npz
from slipstream.tools.npz import (
    ArrayStream,
    NpzWriter,
    Spec,
    check_sums,
    fingerprint,
    open_npz,
    pack_manifest,
    unpack_manifest,
    write_npz,
)


def test_arrays_come_back_mapped_and_aligned(tmp_path):
    path = tmp_path / "a.npz"
    members = {
        "X": np.arange(70, dtype=np.int32).reshape(7, 10),
        "y": np.array([1, 0, 1], np.int8),
        "scalar": np.array(5),
        "empty": np.empty((0, 13), np.int32),
    }
    write_npz(path, members)
    opened, plain = open_npz(path), np.load(path, allow_pickle=False)
    for name, value in members.items():
        assert np.array_equal(opened[name], value) and opened[name].dtype == value.dtype
        assert np.array_equal(plain[name], value)
    assert opened["X"].ctypes.data % 64 == 0 and opened["y"].ctypes.data % 64 == 0
    assert not opened["X"].flags.writeable
    assert not list(tmp_path.glob("*.partial"))


def test_a_stream_equals_the_whole_array(tmp_path):
    whole = np.arange(30, dtype=np.int32).reshape(10, 3)
    chunks = (whole[start : start + 4] for start in range(0, 10, 4))
    write_npz(tmp_path / "s.npz", {"a": ArrayStream((10, 3), np.dtype(np.int32), chunks)})
    write_npz(tmp_path / "w.npz", {"a": whole})
    assert (tmp_path / "s.npz").read_bytes() == (tmp_path / "w.npz").read_bytes()


def test_a_short_stream_leaves_nothing(tmp_path):
    stream = ArrayStream((10,), np.dtype(np.int8), [np.zeros(9, np.int8)])
    with pytest.raises(ValueError, match="expected shape"):
        write_npz(tmp_path / "s.npz", {"a": stream})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path, {"a": np.arange(3)})

    def failing():
        yield np.zeros(5, np.int8)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_npz(path, {"a": ArrayStream((10,), np.dtype(np.int8), failing())})
    assert np.array_equal(open_npz(path)["a"], np.arange(3))
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "a.npz"
    write_npz(path, {"X": np.arange(5000)})
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match="truncated"):
        open_npz(path)


def test_missing_keys_are_named(tmp_path):
    write_npz(tmp_path / "a.npz", {"X": np.arange(3)})
    with pytest.raises(ValueError, match="expected also y"):
        open_npz(tmp_path / "a.npz", ("X", "y"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_objects_are_never_loaded(tmp_path, save):
    save(tmp_path / "a.npz", a=np.array([{}], object))
    with pytest.raises(ValueError, match="rebuild"):
        open_npz(tmp_path / "a.npz")


def test_a_header_larger_than_its_member_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_npz(path, {"X": np.arange(5000)})
    data = path.read_bytes()
    assert data.count(b"(5000,)") == 1
    path.write_bytes(data.replace(b"(5000,)", b"(9000,)"))
    with pytest.raises(ValueError, match="size does not match"):
        open_npz(path)


def test_fingerprint_follows_content_not_manifest(tmp_path):
    def written(value, manifest):
        path = tmp_path / "f.npz"
        write_npz(path, {"a": np.array([value]), "manifest": pack_manifest(manifest)})
        return fingerprint(path)

    assert written(1, {"seconds": 1}) == written(1, {"seconds": 2}) != written(2, {"seconds": 1})


def test_manifest_round_trip(tmp_path):
    write_npz(tmp_path / "m.npz", {"manifest": pack_manifest({"a": [1, "x"]})})
    assert unpack_manifest(open_npz(tmp_path / "m.npz")) == {"a": [1, "x"]}
    with pytest.raises(ValueError, match="m.npz: manifest: "):
        unpack_manifest({"manifest": np.array([255], np.uint8)}, "m.npz")
    assert zipfile.ZipFile(tmp_path / "m.npz").testzip() is None


def test_headers_are_read_by_one_thread_at_a_time(tmp_path, monkeypatch):
    """numpy reads them with `ast`, which fails at random in Python 3.11 when threads share it."""
    write_npz(tmp_path / "a.npz", {f"member_{i}": np.arange(i) for i in range(5)})
    read, inside, most = np.lib.format.read_array_header_1_0, [], []

    def slow(file):
        inside.append(file)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return read(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slow)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(open_npz, [tmp_path / "a.npz"] * 8))
    assert len(most) == 40 and max(most) == 1


def test_a_writer_goes_on_where_another_stopped(tmp_path):
    """Interleaved members, a stop after each chunk, the same bytes as in one go."""
    specs = {"a": Spec((10, 3), np.dtype(np.int32)), "b": Spec((10,), np.dtype(np.int8))}
    arrays = {"a": np.arange(30, dtype=np.int32).reshape(10, 3), "b": np.arange(10, dtype=np.int8)}
    write_npz(tmp_path / "whole.npz", arrays)
    progress = None
    for start in range(0, 10, 3):
        writer = NpzWriter(tmp_path / "parts.npz", specs, progress)
        for name in ("b", "a"):
            writer.append(name, arrays[name][start : start + 3])
        progress = json.loads(json.dumps(writer.progress()))
        writer.append("b", arrays["b"][start + 3 : start + 4])  # not noted: written again
        writer.close()
    with pytest.raises(ValueError, match="more values than its shape"):
        NpzWriter(tmp_path / "parts.npz", specs, progress).append("b", arrays["b"][:1])
    NpzWriter(tmp_path / "parts.npz", specs, progress).finish()
    assert (tmp_path / "parts.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


class Malicious:
    """Unpickling one makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_pickles_are_never_opened(tmp_path, save):
    trap = np.array([Malicious(tmp_path / "opened")], object)
    save(tmp_path / "a.npz", rows=np.arange(3), trap=trap)
    with pytest.raises(ValueError, match="Python objects, which are never loaded"):
        open_npz(tmp_path / "a.npz")
    assert not (tmp_path / "opened").exists()
    np.load(tmp_path / "a.npz", allow_pickle=True)["trap"]
    assert (tmp_path / "opened").exists(), "the trap works"


def npy(shape, dtype="<i4", data=b""):
    """Bytes of an .npy whose header says what it likes."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "data",
    [
        npy((1 << 60,)),
        npy((1 << 40, 1 << 40)),
        npy((-5,), data=bytes(20)),
        npy((1 << 50,), "|V0"),
        npy((5,), data=bytes(19)),
        npy((5,), data=bytes(21)),
        b"no array",
        b"",
    ],
)
def test_headers_that_lie_are_refused_before_anything_is_allocated(tmp_path, data, compression):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("a.npy", data)
    with pytest.raises(ValueError, match="truncated, corrupt or not an .npz"):
        open_npz(tmp_path / "a.npz")


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", npy((1 << 25,), "|u1", bytes(1 << 25)))
    assert len(open_npz(tmp_path / "a.npz")["a"]) == 1 << 25
    monkeypatch.setattr(npz, "BOMB_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="would expand to 33,554"):
        open_npz(tmp_path / "a.npz")
    monkeypatch.setattr(npz, "MAX_RATIO", 10**9)
    monkeypatch.setattr(npz, "available_memory_bytes", lambda: 1 << 24)
    with pytest.raises(ValueError, match="would expand to 33,554"):
        open_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["../a.npy", "/a.npy", "a", "a.npy/", "b/a.npy", "a .npy", ".npy"])
def test_odd_names_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr(name, npy((1,), data=bytes(4)))
    with pytest.raises(ValueError, match="it has a member named"):
        open_npz(tmp_path / "a.npz")


def test_a_name_twice_is_refused(tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("a.npy", npy((1,), data=bytes(4)))
    with pytest.raises(ValueError, match="each once"):
        open_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [write_npz, lambda path, a: np.savez_compressed(path, **a)])
def test_no_changed_byte_goes_unseen(tmp_path, save):
    """Each byte changed in turn: refused, or the arrays are what they were."""
    path = tmp_path / "a.npz"
    arrays = {"a": np.arange(20), "b": np.ones((3, 2), np.float32)}
    save(path, arrays)
    content = path.read_bytes()
    num_seen = 0
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        spoiled = bytearray(content)
        spoiled[place] ^= int(rng.integers(1, 256))
        path.write_bytes(spoiled)
        try:
            opened = open_npz(path)
            check_sums(path)
        except ValueError as error:
            assert str(path) in str(error)
            num_seen += 1
        else:
            assert opened.keys() == arrays.keys(), place  # a name counts: a manifest may be missing
            for name, array in arrays.items():
                assert np.array_equal(opened[name], array), place
    assert num_seen > len(content) // 2
    path.write_bytes(content)
    check_sums(path)
