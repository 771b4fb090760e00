"""A multi-hot log out of a plain one: each value with the same others wherever it stands."""

import numpy as np
import pytest
from helpers import MODEL_FLAGS, TABLE_SIZES

import dlrm_s_pytorch
from bench import multi_hot
from slipstream.logs.processed import load_processed

VALUES = ["2", "1", "4", "1", "3"]


def make(processed, *flags):
    target = processed.parent / f"multi{len(flags)}.npz"
    words = ["--processed-data-file", processed, "--output", target, "--values", *VALUES, *flags]
    multi_hot.main([str(word) for word in words])
    return target


def test_each_value_brings_its_own_others(processed, monkeypatch):
    monkeypatch.setattr(multi_hot, "CHUNK", 700)
    plain, several = load_processed(processed), load_processed(make(processed))
    ids, many = (np.asarray(log.inputs.categories) for log in (plain, several))
    assert many.shape == (len(ids), 11) and (several.table_sizes == TABLE_SIZES).all()
    start = 0
    for column, (num, size) in enumerate(zip(map(int, VALUES), TABLE_SIZES, strict=True)):
        part = many[:, start : start + num]
        assert (part[:, 0] == ids[:, column]).all() and part.max() < size
        assert len({tuple(row) for row in part.tolist()}) == len(set(ids[:, column].tolist()))
        pooling = "sum" if num > 1 else "none"
        assert several.layout.features[column].pooling == pooling
        start += num
    # The last table's others are spread over all of it.
    others = np.array([*{tuple(row) for row in many[:, -3:].tolist()}])[:, 1:]
    assert len(others) > 50 and abs(others.mean() / TABLE_SIZES[-1] - 0.5) < 0.15
    assert (np.asarray(several.inputs.labels) == np.asarray(plain.inputs.labels)).all()
    again, other = (load_processed(make(processed, *seed)) for seed in ((), ("--seed", "5")))
    assert (np.asarray(again.inputs.categories) == many).all()
    assert (np.asarray(other.inputs.categories) != many).any()


def test_it_trains_dcnv2(processed, tmp_path):
    words = ["--processed-data-file", make(processed), *MODEL_FLAGS, "--model", "dcnv2"]
    words += ["--runs-dir", tmp_path, "--model-args", "rank=4"]
    assert dlrm_s_pytorch.main([str(word) for word in words])["auc"] > 0.55


def test_what_does_not_fit_is_refused(processed):
    with pytest.raises(ValueError, match="5 tables and 5 columns; expected one column for each"):
        multi_hot.main(["--processed-data-file", str(processed), "--output", f"{processed}.x"])
    with pytest.raises(ValueError, match="is read here"):
        multi_hot.main(["--processed-data-file", str(processed), "--output", str(processed)])
