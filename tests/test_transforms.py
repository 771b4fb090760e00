"""Transforms of dense values: against numpy, and that a model keeps to those of its training."""

import json

import numpy as np
import pytest
from helpers import segregate_small, small_arrays, train, write_processed
from hypothesis import given
from hypothesis import strategies as st

import dlrm_s_pytorch
import fae_train
from dlrm_data_pytorch import load_processed, load_segregated
from slipstream.logs.transforms import transforms_of
from slipstream.tools.npz import fingerprint
from slipstream.training.saved import checksum_of, open_checkpoint

NUM_ROWS = 1400
ALL = [{"kind": "signed_log"}, {"kind": "standardize", "mean": 20, "std": 7.5}, {"kind": "none"}]
REFERENCE = {
    "log": lambda x: np.log(np.maximum(x, 0) + 1),
    "signed_log": lambda x: np.sign(x) * np.log(np.abs(x) + 1),
    "standardize": lambda x: (x - 20) / 7.5,
    "none": lambda x: x,
}


def described(kind):
    return next((one for one in ALL if one["kind"] == kind), {"kind": kind})


@given(
    st.lists(st.sampled_from(list(REFERENCE)), max_size=6),
    st.sampled_from([np.int32, np.float32]),
)
def test_each_column_is_what_numpy_makes_of_it(kinds, dtype):
    rng = np.random.default_rng(len(kinds))
    values = rng.integers(-(10**6), 10**6, (50, len(kinds))).astype(dtype)
    transforms = transforms_of({"transforms": list(map(described, kinds))}, len(kinds), "p")
    got = transforms.apply(values)
    assert got.dtype == np.float32 and got.shape == values.shape
    for column, kind in enumerate(kinds):
        expected = REFERENCE[kind](values[:, column].astype(np.float64))
        np.testing.assert_allclose(got[:, column], expected, rtol=1e-6, atol=1e-6)
    again = transforms_of({"transforms": transforms.describe()}, len(kinds), "p")
    assert again == transforms


def test_logarithms_of_all_are_the_same_bits_as_before():
    dense = small_arrays(NUM_ROWS)[0]
    expected = dense.astype(np.float32)
    np.log1p(np.maximum(expected, 0, out=expected), out=expected)
    for manifest in ({}, {"transforms": None}, {"transforms": [{"kind": "log"}] * 3}):
        assert np.array_equal(transforms_of(manifest, 3, "p").apply(dense), expected)


def test_a_difference_of_large_values_keeps_its_digits():
    """As of times in seconds."""
    times = np.array([[1_700_000_001], [1_700_000_002]], np.int32)
    scale = {"kind": "standardize", "mean": 1_700_000_000, "std": 2}
    assert transforms_of({"transforms": [scale]}, 1, "p").apply(times).tolist() == [[0.5], [1.0]]


@pytest.mark.parametrize(
    "transforms",
    [
        "log",
        [{"kind": "log"}] * 2,
        [{"kind": "log"}, {"kind": "log"}, "log"],
        [{"kind": "log"}, {"kind": "log"}, {"kind": "exp"}],
        [{"kind": "log"}, {"kind": "log"}, {"kind": "standardize", "mean": 1}],
        [{"kind": "log"}, {"kind": "log"}, {"kind": "standardize", "mean": 1, "std": 0}],
        [{"kind": "log"}, {"kind": "log"}, {"kind": "standardize", "mean": True, "std": 1}],
        [{"kind": "log"}, {"kind": "log"}, {"kind": "standardize", "mean": float("nan"), "std": 1}],
    ],
)
def test_transforms_that_are_none_are_refused(tmp_path, transforms):
    path = write_processed(tmp_path / "p.npz", 70, manifest={"transforms": transforms})
    with pytest.raises(ValueError, match="p.npz.*manifest") as raised:
        load_processed(path)
    assert "expected" in str(raised.value)


def test_segregated_folders_hand_them_on_and_belong_to_them(tmp_path, capsys):
    path = write_processed(tmp_path / "p.npz", NUM_ROWS, manifest={"transforms": ALL})
    folder = segregate_small(path)
    train_inputs, hot = load_processed(path).splits()[0], load_segregated(folder, path).data.hot
    assert hot.transforms == train_inputs.transforms
    expected = transforms_of({"transforms": ALL}, 3, "p").apply(hot.dense[:9])
    assert np.array_equal(hot.batch(slice(0, 9))[0], expected)
    before = fingerprint(path)
    for manifest in ({}, {"transforms": ALL[::-1]}, {"sub_sampling": {"rate": 0.5}}):
        write_processed(path, NUM_ROWS, manifest=manifest)
        assert fingerprint(path) == before  # which leaves the manifest out
        with pytest.raises(ValueError, match="other transforms; run input_segregation.py again"):
            load_segregated(folder, path)
    write_processed(path, NUM_ROWS, manifest={"transforms": ALL[::-1]})
    capsys.readouterr()
    segregate_small(path)
    assert "rebuilding" in capsys.readouterr().out
    load_segregated(folder, path)
    segregate_small(path)
    assert "is up to date" in capsys.readouterr().out
    write_processed(path, NUM_ROWS)
    segregate_small(path)
    assert "rebuilding" in capsys.readouterr().out


def test_a_model_refuses_data_of_other_transforms(tmp_path):
    path = write_processed(tmp_path / "p.npz", NUM_ROWS, manifest={"transforms": ALL})
    segregate_small(path)
    summary = train(fae_train, tmp_path, "--save-model", tmp_path / "model")
    [kept] = (tmp_path / "model").glob("step-*")
    saved = open_checkpoint(kept)
    floats = [ALL[0], {**ALL[1], "mean": 20.0}, ALL[2]]
    assert (
        saved.network["features"]["transforms"] == floats == saved.identity["model"]["transforms"]
    )
    alone = ["--inference-only", "true", "--load-model", tmp_path / "model"]
    for script in (fae_train, dlrm_s_pytorch):
        assert train(script, tmp_path, *alone)["auc"] == pytest.approx(summary["auc"])
    write_processed(path, NUM_ROWS, manifest={"transforms": [*ALL[:2], {"kind": "log"}]})
    again = ["--load-model", "auto", "--save-model", tmp_path / "model"]
    for flags in (alone, again, ["--load-model", kept]):
        with pytest.raises(ValueError, match=r"transforms\[2\] is {'kind': 'none'} there, {'kind'"):
            train(dlrm_s_pytorch, tmp_path, *flags)


def test_an_older_model_took_logarithms(tmp_path):
    path = write_processed(tmp_path / "p.npz", NUM_ROWS)
    train(dlrm_s_pytorch, tmp_path, "--save-model", tmp_path / "model")
    [kept] = (tmp_path / "model").glob("step-*")
    described = json.loads((kept / "checkpoint.json").read_text())
    del described["checksum"], described["identity"]["model"]["transforms"]
    del described["identity"]["data"]["sub_sampling"]
    del described["network"]["features"]["transforms"]
    described["checksum"] = checksum_of(described)
    (kept / "checkpoint.json").write_text(json.dumps(described))
    alone = ["--inference-only", "true", "--load-model", kept]
    train(dlrm_s_pytorch, tmp_path, *alone)
    write_processed(path, NUM_ROWS, manifest={"transforms": ALL})
    with pytest.raises(ValueError, match=r"transforms\[0\] is {'kind': 'log'} there"):
        train(dlrm_s_pytorch, tmp_path, *alone)
