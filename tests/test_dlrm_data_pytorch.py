import numpy as np
import pytest
import torch
from helpers import TABLE_SIZES, segregate_small, small_arrays, write_processed

from dlrm_data_pytorch import load_processed, load_segregated
from slipstream.logs.formats import equal_days
from slipstream.logs.processed import planted_limit
from slipstream.tools.npz import write_npz


def test_batches_hold_the_logs_values(processed):
    dense, ids, y = small_arrays()
    log = load_processed(processed)
    chosen = np.array([5, 3999, 17])
    batch_dense, slots, labels = log.inputs.batch(chosen)
    expected = np.log(np.maximum(dense[chosen], 0).astype(np.float64) + 1)
    np.testing.assert_allclose(batch_dense.numpy(), expected, rtol=1e-6)
    offsets = np.concatenate([[0], np.cumsum(TABLE_SIZES)[:-1]])
    assert np.array_equal(slots.numpy(), ids[chosen] + offsets) and slots.dtype == torch.int64
    assert labels.tolist() == y[chosen].tolist() and labels.dtype == torch.float32
    sliced = log.inputs.batch(slice(10, 13))
    for whole, part in zip(log.inputs.batch(np.arange(10, 13)), sliced, strict=True):
        assert torch.equal(whole, part)


@pytest.mark.parametrize("num_rows", [7, 70, 100, 4000])
def test_splits_hold_out_the_last_day(tmp_path, num_rows):
    log = load_processed(write_processed(tmp_path / "p.npz", num_rows))
    train, test, val = log.splits()
    last = num_rows // 7
    assert len(train) == num_rows - last and len(test) == last // 2 and len(val) == last - last // 2
    _, _, y = small_arrays(num_rows)
    assert np.concatenate([train.labels, test.labels, val.labels]).tolist() == y.tolist()
    assert train.day_offsets.tolist() == equal_days(num_rows)[:-1].tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.float64])
def test_older_scripts_files_load(tmp_path, processed, dtype):
    dense, ids, y = small_arrays()
    path = tmp_path / "kaggleAdDisplayChallenge_processed.npz"
    np.savez_compressed(
        path,
        X_cat=ids.astype(dtype),
        X_int=np.maximum(dense, 0),
        y=y.astype(np.int32),
        counts=TABLE_SIZES,
    )
    old, new = load_processed(path), load_processed(processed)
    chosen = np.arange(0, 4000, 7)
    for first, second in zip(old.inputs.batch(chosen), new.inputs.batch(chosen), strict=True):
        assert torch.equal(first, second)
    assert np.array_equal(old.inputs.day_offsets, new.inputs.day_offsets)


def write(tmp_path, **changes):
    dense, ids, y = small_arrays(100)
    members = {"X_int": dense, "X_cat": ids, "y": y, "counts": TABLE_SIZES, **changes}
    write_npz(tmp_path / "p.npz", members)
    return tmp_path / "p.npz"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X_cat": np.full((100, 5), 2000, np.int32)}, "ids from 2000 to 2000; expected 0 to 39"),
        ({"X_cat": np.full((100, 5), -1, np.int32)}, "ids from -1"),
        ({"X_cat": np.full((100, 5), 0.5)}, "fractions"),
        ({"X_cat": np.full((100, 5), np.nan)}, "NaN or values beyond 32 bits"),
        ({"X_int": np.full((100, 3), np.nan)}, "NaN"),
        ({"y": np.full(100, 7, np.int8)}, "labels other than 0 and 1"),
        ({"y": np.zeros(99, np.int8)}, "different lengths"),
        ({"counts": np.array([1, 2])}, "2 table sizes for 5"),
        ({"X_int": np.full((100, 3), 0.7)}, "X_int holds fractions"),
        ({"X_int": np.full((100, 3), 2**32 + 5)}, "X_int holds NaN or values beyond 32 bits"),
        ({"X_cat": np.full((100, 5), "x")}, "X_cat has 2 dimensions of <U1"),
        ({"counts": np.array(5)}, "counts has 0 dimensions"),
        ({"days": np.array([0, 50])}, "days do not cover"),
        ({"days": np.array([0, 100])}, "no rows to train on"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_processed(write(tmp_path, **changes))


def test_a_segregated_folder_of_another_file_is_refused(tmp_path, processed):
    folder = segregate_small(processed)
    other = write_processed(tmp_path / "other.npz", seed=9)
    load_segregated(folder, processed)
    with pytest.raises(ValueError, match="was not made from"):
        load_segregated(folder, other)


def test_mixed_folders_are_refused(processed):
    folder = segregate_small(processed)
    (folder / "test.npz").write_bytes((folder / "val.npz").read_bytes())
    with pytest.raises(ValueError, match="does not belong"):
        load_segregated(folder)


def test_test_and_validation_are_not_swapped(processed):
    """The segregated sets hold the same inputs as the processed file's splits."""
    prepared, log = load_segregated(segregate_small(processed)), load_processed(processed)
    for inputs, expected in zip(
        (prepared.data.test, prepared.data.val), log.splits()[1:], strict=True
    ):
        assert np.array_equal(inputs.dense, expected.dense)
        assert np.array_equal(inputs.labels, expected.labels)
    assert not np.array_equal(
        prepared.data.test.dense, prepared.data.val.dense[: len(prepared.data.test)]
    )


def test_planted_limit():
    assert planted_limit({"source_notes": {"planted_auc_test": 0.8}}) == 0.8
    assert planted_limit({"source_notes": None}) is None and planted_limit({}) is None
