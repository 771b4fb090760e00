"""Inputs that do not fit into memory: read by blocks, shuffled within windows, checked as they are
cut; and numbers of inputs beyond 32 bits."""

import json
import mmap
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import (
    MODEL_FLAGS,
    REPOSITORY,
    TABLE_SIZES,
    segregate_small,
    small_arrays,
    write_processed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import dlrm_s_pytorch
import fae_train
import slipstream.logs.inputs as logs_inputs
import slipstream_train
from dlrm_data_pytorch import load_processed, load_segregated
from slipstream.logs.inputs import BLOCK_INPUTS
from slipstream.tools.mapped import advise
from slipstream.tools.npz import ArrayStream, NpzWriter, Spec, open_npz, write_npz
from slipstream.training.batching import epoch_order


@settings(max_examples=60, deadline=None)
@given(
    days=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    window=st.integers(1, 900),
    randomize=st.sampled_from(["total", "day"]),
)
def test_windows_hold_every_input_once_and_few_blocks(days, window, randomize):
    offsets = np.cumsum([0, *days])
    order = epoch_order(offsets, randomize, 3, 0, window)
    assert sorted(order.tolist()) == list(range(offsets[-1]))
    ranges = [(0, offsets[-1])] if randomize == "total" else zip(offsets[:-1], offsets[1:])  # noqa: B905
    for start, stop in ranges:
        part = order[start:stop]
        assert part.min() == start and part.max() == stop - 1  # days stay in order
        if window >= stop - start:
            continue
        block = max(1, min(BLOCK_INPUTS, window // 16))
        size = window // block * block
        for first in range(0, len(part), size):
            # A short last block moves the windows behind it by less than a block.
            touched = np.unique((part[first : first + size] - start) // block)
            assert len(touched) <= size // block + min(block, size // block) + 1


def test_windows_differ_by_epoch_and_shuffle():
    orders = [epoch_order(np.array([0, 5000]), "total", 1, epoch, 800) for epoch in (0, 0, 1)]
    assert np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[0], orders[2])
    assert np.mean(np.diff(orders[0]) == 1) < 0.05
    whole = epoch_order(np.array([0, 5000]), "total", 1, 0)
    assert np.array_equal(whole, epoch_order(np.array([0, 5000]), "total", 1, 0, 5000))


SCRIPTS = {"baseline": dlrm_s_pytorch, "fae": fae_train, "slipstream": slipstream_train}


@pytest.mark.parametrize("method", SCRIPTS)
def test_methods_train_on_streamed_inputs(processed, tmp_path, capsys, method):
    folder = segregate_small(processed)
    data = ["--segregated-data-dir", str(folder)]
    if method == "baseline":
        data = ["--processed-data-file", str(processed)]

    def train(*flags):
        flags = [*data, *MODEL_FLAGS, "--runs-dir", str(tmp_path), *flags]
        return SCRIPTS[method].main([*flags, "--nepochs", "3"])

    plenty, streamed = train(), train("--max-memory", "40K")
    assert "the inputs of" in capsys.readouterr().out
    assert streamed["samples"] + streamed["dropped"] == plenty["samples"] + plenty["dropped"]
    assert abs(streamed["auc"] - plenty["auc"]) < 0.03 < plenty["auc"] - 0.5
    again = train("--max-memory", "40K", "--overlap", "true")
    assert again["loss"] == streamed["loss"]


@pytest.mark.parametrize("max_memory", [None, "40K"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_file_without_dense_columns_has_one_of_zeros(tmp_path, capsys, max_memory, is_packed):
    """Older files may have none; in memory and streamed, segregated and not, it trains alike."""
    dense, ids, y = small_arrays(2000)
    members = {"X_cat": ids, "y": y, "counts": TABLE_SIZES}
    losses, folders = [], []
    for name, columns in (("zeros", np.zeros((2000, 1), np.int32)), ("none", dense[:, :0])):
        folder = tmp_path / name
        folder.mkdir()
        write = np.savez_compressed if is_packed else (lambda path, **all: write_npz(path, all))
        write(folder / "log.npz", X_int=columns, **members)
        model = [word.replace("3-16-8", "1-16-8") for word in MODEL_FLAGS]
        model += ["--nepochs", "1", "--runs-dir", str(tmp_path)]
        model += ["--max-memory", max_memory] if max_memory else []
        data = ["--processed-data-file", str(folder / "log.npz")]
        losses.append(dlrm_s_pytorch.main([*data, *model])["loss"])
        folders.append(segregate_small(folder / "log.npz"))
        data = ["--segregated-data-dir", str(folders[-1])]
        losses += [SCRIPTS[name].main([*data, *model])["loss"] for name in ("fae", "slipstream")]
    assert losses[:3] == losses[3:] and np.isfinite(losses).all()
    assert ("the inputs of" in capsys.readouterr().out) == (max_memory is not None)
    first, second = (open_npz(folder / "train_hot.npz") for folder in folders)
    assert len(first["y"]) > 100 and all(np.array_equal(first[n], second[n]) for n in first)


def test_streamed_batches_are_those_of_memory(processed):
    whole = load_processed(processed, 1 << 40).splits()[0]
    streamed = load_processed(processed, 10_000).splits()[0]
    assert whole.window == 0 and 0 < streamed.window < 100
    for chosen in (slice(5, 90), np.array([3000, 2, 2, 77])):
        for first, second in zip(whole.batch(chosen), streamed.batch(chosen), strict=True):
            assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("X_cat", 10**6, "category 1 has ids from 0 to 1000000; expected 0 to 39"),
        ("X_cat", -1, "category 1 has ids from -1 to"),
        ("y", 2, "labels other than 0 and 1"),
        ("X_int", np.nan, "NaN or an infinite value"),
    ],
)
def test_streamed_inputs_are_checked_as_they_are_cut(processed, name, value, message):
    arrays = {key: np.array(array) for key, array in open_npz(processed).items()}
    arrays["X_int"] = arrays["X_int"].astype(np.float32)
    spoiled = arrays[name].reshape(4000, -1)
    spoiled[1234, 0] = value
    write_npz(processed, arrays)
    with pytest.raises(ValueError, match=message):
        load_processed(processed, 1 << 40)
    train = load_processed(processed, 10_000).splits()[0]
    train.batch(slice(0, 1234))
    with pytest.raises(ValueError, match=message) as raised:
        train.batch(np.array([5, 1234]))
    assert str(processed) in str(raised.value)


def test_windows_are_announced_ahead(tmp_path, monkeypatch):
    """Every block is announced before it is trained, and at most two windows ahead."""
    processed = write_processed(tmp_path / "p.npz", 30_000)
    data = load_processed(processed, 200 << 10).splits()[0]
    announced, trained = [], []
    batch = logs_inputs.ClickInputs.batch

    def noted(inputs, chosen):
        if isinstance(chosen, np.ndarray):
            trained.extend(chosen.tolist())
            assert set(chosen.tolist()) <= set(announced)
            assert len(announced) - len(trained) <= 2 * data.window
        return batch(inputs, chosen)

    def will_need(inputs, chosen):
        announced.extend(chosen.tolist())

    monkeypatch.setattr(logs_inputs.ClickInputs, "batch", noted)
    monkeypatch.setattr(logs_inputs.ClickInputs, "will_need", will_need)
    flags = ["--processed-data-file", str(processed), "--max-memory", "200K", *MODEL_FLAGS]
    dlrm_s_pytorch.main([*flags, "--runs-dir", str(tmp_path)])
    assert sorted(trained) == list(range(len(data)))


def test_reading_ahead_is_asked_for_in_small_pieces(tmp_path):
    """The kernel takes no more at once; pieces start on pages and cover the array."""

    class Map(mmap.mmap):
        asked = []

        def madvise(self, *words):
            self.asked.append(words)

    (tmp_path / "file").write_bytes(bytes(10**6))
    with open(tmp_path / "file", "rb") as file:
        mapped = Map(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = np.frombuffer(mapped, np.uint8)[5000:700_000]
    advise(array, mmap.MADV_WILLNEED)
    assert all(start % mmap.PAGESIZE == 0 for _, start, _ in Map.asked)
    assert all(length <= 1 << 17 for _, _, length in Map.asked)
    assert Map.asked[0][1] == 4096 and sum(Map.asked[-1][1:]) == 700_000
    assert [a[1] + a[2] for a in Map.asked[:-1]] == [a[1] for a in Map.asked[1:]]


def test_advice_covers_the_inputs_asked_for(processed, monkeypatch):
    inputs = load_processed(processed, 10_000).inputs
    asked = []
    inputs.will_need(np.array([5]))
    monkeypatch.setattr(logs_inputs, "BLOCK_INPUTS", 100)
    monkeypatch.setattr(logs_inputs, "advise", lambda *words: asked.append(words))
    inputs.will_need(np.array([205, 250, 399, 3950]))
    assert {advice for _, advice in asked} == {mmap.MADV_WILLNEED}
    starts = [(array.ctypes.data - inputs.labels.ctypes.data, len(array)) for array, _ in asked]
    assert [starts[2], starts[5]] == [(200, 200), (3900, 100)]  # labels: a byte each
    assert len(asked) == 6


LIMITED = """
import json, resource, sys
sys.path.insert(0, {repository!r})
import numpy as np
import sklearn.metrics
import dlrm_s_pytorch
from slipstream.tools.npz import open_npz
from slipstream.tools.runtime import peak_rss_bytes
folder, limit = sys.argv[1], int(sys.argv[2])
used = int([l for l in open("/proc/self/status") if l.startswith("VmData")][0].split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
try:
    np.array(open_npz(folder + "/large.npz")["X_cat"])
    copied = True
except MemoryError:
    copied = False
before = peak_rss_bytes()
flags = ["--processed-data-file", folder + "/large.npz", "--runs-dir", folder, "--print-freq", "0"]
flags += "--num-batches 300 --mini-batch-size 512 --test-mini-batch-size 1024".split()
flags += "--arch-mlp-bot 4-8-4 --arch-mlp-top 8-1".split()
flags += "--arch-sparse-feature-size 4 --max-memory 32M --num-threads 1 --device cpu".split()
summary = dlrm_s_pytorch.main(flags)
grown = peak_rss_bytes() - before
print(json.dumps({{"copied": copied, "samples": summary["samples"], "grown": grown}}))
"""


def test_a_process_with_less_memory_than_its_data_trains(disk_path):
    """480 MB of inputs, 250 MB of memory; a copy of the ids alone fails in the same process."""
    num_rows, chunk = 2_800_000, 200_000
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 500, (chunk, 38), dtype=np.int32)
    labels = rng.integers(0, 2, chunk, dtype=np.int8)
    repeat = range(num_rows // chunk)
    int32, int8 = np.dtype(np.int32), np.dtype(np.int8)
    members = {
        "X_int": ArrayStream((num_rows, 4), int32, (ids[:, :4] for _ in repeat)),
        "X_cat": ArrayStream((num_rows, 38), int32, (ids for _ in repeat)),
        "y": ArrayStream((num_rows,), int8, (labels for _ in repeat)),
        "counts": np.full(38, 500),
        "days": np.array([0, num_rows - 20_000, num_rows]),
    }
    write_npz(disk_path / "large.npz", members)
    assert os.path.getsize(disk_path / "large.npz") > 470e6
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(repository=str(REPOSITORY)), disk_path, "250000000"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert not answer["copied"]
    assert answer["samples"] == 300 * 512
    assert answer["grown"] < 250e6, "mapped pages are given back, too"


def test_more_inputs_than_32_bits_count(tmp_path):
    """A sparse file of 2^31 + 1000 inputs: holes read as zeros, and take no disk."""
    num_rows = 2**31 + 1000
    specs = {
        "X_int": Spec((num_rows, 1), np.dtype(np.int32)),
        "X_cat": Spec((num_rows, 1), np.dtype(np.int32)),
        "y": Spec((num_rows,), np.dtype(np.int8)),
        "counts": Spec((1,), np.dtype(np.int64)),
        "days": Spec((3,), np.dtype(np.int64)),
    }
    writer = NpzWriter(tmp_path / "huge.npz", specs)
    for name, member in writer._members.items():
        member.num_written = member.spec.num_bytes - (0 if name in ("counts", "days") else 4000)
        if name in ("counts", "days"):
            member.num_written = 0
    writer.append("X_int", np.arange(1000, dtype=np.int32))
    writer.append("X_cat", np.arange(1000, dtype=np.int32) % 7)
    writer.append("y", np.arange(4000, dtype=np.int8) % 2)
    writer.append("counts", np.array([7]))
    writer.append("days", np.array([0, 2**31 + 400, num_rows]))
    writer.finish()
    if os.stat(tmp_path / "huge.npz").st_blocks * 512 > 10**8:
        pytest.skip("this file system has no holes")
    log = load_processed(tmp_path / "huge.npz", 1 << 30)
    train, test, val = log.splits()
    assert (len(train), len(test), len(val)) == (2**31 + 400, 300, 300)
    assert train.window > 0
    last = np.arange(2**31 - 2, 2**31 + 400)
    dense, slots, labels = train.batch(last)
    assert slots[:, 0].tolist() == [0, 0, *(np.arange(400) % 7)]
    assert np.allclose(np.expm1(dense[2:, 0].numpy()), np.arange(400), rtol=1e-4)
    assert labels[2:].tolist() == [i % 2 for i in range(3000, 3400)]
    assert np.expm1(test.batch(slice(0, 1))[0].item()) == pytest.approx(400, rel=1e-4)
    assert np.expm1(val.batch(slice(299, 300))[0].item()) == pytest.approx(999, rel=1e-4)


@pytest.mark.parametrize("odd", ["misaligned", "Fortran"])
def test_odd_arrays_are_not_copied_whole_for_a_batch(odd):
    """`ndarray.take` would: older files have such arrays."""
    n, width = 300_000, 40
    values = np.arange(n * width, dtype=np.int32).reshape(n, width) % 1000
    if odd == "Fortran":
        ids = np.asfortranarray(values)
    else:
        raw = np.empty(values.nbytes + 1, np.uint8)
        ids = raw[1:].view(np.int32).reshape(n, width)
        ids[:] = values
    inputs = logs_inputs.ClickInputs(ids[:, :1], ids, np.zeros(n, np.int8), np.array([0, n]))
    tracemalloc.start()
    slots = inputs.slots_of(np.array([3, n - 1]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(slots, values[[3, n - 1]])
    assert peak < 1e6


def test_accesses_beyond_32_bits_are_counted():
    from slipstream.training.popularity import Ranking, rank_rows, rows_above

    counts = np.array([5, 2**33, 2**32, 0], np.int64)
    ranking = rank_rows(counts)
    assert ranking.slot_of_row.tolist() == [2, 0, 1, 3]
    assert ranking.num_accesses == 2**33 + 2**32 + 5
    assert ranking.share_of_accesses(1) == pytest.approx(2 / 3)
    assert rows_above(ranking, 0.3) == 2
    with pytest.raises(ValueError, match="expected at most 2147483647"):
        rank_rows(np.broadcast_to(np.int64(0), 2**31))
    assert isinstance(ranking, Ranking)


def test_segregated_sets_are_streamed_one_by_one(processed):
    folder = segregate_small(processed)
    sizes = [os.path.getsize(folder / f"{name}.npz") for name in ("train_hot", "train_cold")]
    data = load_segregated(folder, max_memory=sum(sizes)).data
    streamed = [bool(inputs.window) for inputs in (data.hot, data.cold)]
    assert streamed == [size - 1000 > sum(sizes) // 2 for size in sizes]
