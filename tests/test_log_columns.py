"""Columns of a user's own log beyond one value a cell, and files of held-out rows, end to end."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from helpers import assert_same_weights
from plain_logs import make_log

import data_utils
import fae_train
import input_segregation
import slipstream_train
from slipstream.tools.npz import open_npz, unpack_manifest

COLUMNS = {
    "label": "clicked",
    "dense": ["age", {"name": "score", "type": "number", "transform": "standardize"}],
    "categorical": [
        "item",
        {"name": "genres", "values": 3, "pool": "mean"},
        {"name": "last_items", "values": 20, "table": "item", "pool": "sequence"},
    ],
    "order": "time",
    "weight": "w",
    "split": "random:4",
}
MODEL = (
    f"--model {Path(__file__).with_name('own_network.py')}:Attends --arch-sparse-feature-size 4 "
    "--mini-batch-size 32 "
    "--learning-rate 0.1 --device cpu --print-freq 0"
).split()


def clicks(num_rows=1500, seed=0):
    """A frame of clicks; lists are Parquet's."""
    rng = np.random.default_rng(seed)
    item = rng.zipf(1.3, num_rows) % 300
    lists = [rng.integers(0, 300, rng.integers(0, 26)).tolist() for _ in range(num_rows)]
    genres = [[f"g{g}" for g in rng.integers(0, 9, rng.integers(0, 5))] for _ in range(num_rows)]
    odds = (item % 3 == 0) * 0.5 + 0.2
    return pl.DataFrame(
        {
            "clicked": (rng.random(num_rows) < odds).astype(np.int8),
            "age": rng.integers(0, 90, num_rows),
            "score": rng.normal(5, 3, num_rows),
            "item": item,
            "genres": genres,
            "last_items": lists,
            "time": np.arange(num_rows)[::-1] * 0.25 + 1.7e9,
            "w": rng.choice([0.5, 1.0, 2.0], num_rows),
        }
    )


def as_csv(frame, path):
    """The same rows with lists in cells."""
    joined = [pl.col(n).cast(pl.List(pl.String)).list.join("|") for n in ("genres", "last_items")]
    frame.with_columns(joined).write_csv(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The clicks from Parquet and from CSV, preprocessed; the folder."""
    folder = tmp_path_factory.mktemp("columns")
    frame = clicks()
    frame.write_parquet(folder / "log.parquet")
    as_csv(frame, folder / "log.csv")
    (folder / "columns.json").write_text(json.dumps(COLUMNS))
    for name in ("log.parquet", "log.csv"):
        data_utils.main(
            ["--data-set", "custom", "--raw-data-file", str(folder / name), "--min-count", "50"]
            + ["--columns", str(folder / "columns.json")]
            + ["--processed-data-file", str(folder / f"{name}.npz")]
        )
    return folder


def test_lists_of_parquet_and_in_cells_are_the_same(built):
    one, other = (open_npz(built / f"log.{end}.npz") for end in ("parquet", "csv"))
    for name in ("X_int", "X_cat", "y", "weights", "counts", "days"):
        np.testing.assert_array_equal(one[name], other[name])
    manifest = unpack_manifest(one)
    assert [f["pooling"] for f in manifest["features"]] == ["none", "mean", "sequence"]
    assert manifest["features"][2]["table"] == manifest["features"][0]["table"] == 0
    assert one["X_cat"].shape[1] == 24 and one["X_cat"].min() == -1
    lengths = clicks()["last_items"].list.len()
    assert manifest["seen"]["empty lists of last_items"] == (lengths == 0).sum()
    shares = [column["top_1_percent_share"] for column in manifest["table_columns"]]
    assert max(shares) <= 1, "of the table's accesses, several a row"
    assert manifest["seen"]["lists of last_items of over 20 values, cut"] == (lengths > 20).sum()
    assert ((one["X_cat"][:, 4:] >= 0).sum(axis=1) == 20).sum() == (lengths >= 20).sum()
    rare = manifest["table_columns"][0]
    assert rare["rare_id"] == one["counts"][0] - 1 and rare["rare_values"] > 0


def test_such_a_log_trains_goes_on_and_drops(built, tmp_path):
    """A pooled list, a sequence, weights and rare rows: resumed and uninterrupted are the same."""
    hot = tmp_path / "hot_cold"
    input_segregation.main(
        ["--processed-data-file", str(built / "log.parquet.npz"), "--hot-emb-gpu-mem", "2000"]
        + ["--segregated-data-dir", str(hot), "--arch-sparse-feature-size", "4"]
    )
    data = ["--segregated-data-dir", str(hot), *MODEL, "--runs-dir", str(tmp_path / "runs")]
    drop = [
        "--drop-min-steps",
        "1",
        "--drop-percentage",
        "40",
        "--alpha",
        "0.5",
        "--snapshot-start",
        "0.3",
    ]
    drop += ["--count-untouched-as-stale", "true"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    slipstream_train.main([*data, *drop, "--nepochs", "2", "--save-model", str(whole)])
    slipstream_train.main(
        [*data, *drop, "--nepochs", "2", "--num-batches", "20", "--save-model", str(cut)]
    )
    again = [*data, *drop, "--nepochs", "2", "--save-model", str(cut), "--load-model", "auto"]
    slipstream_train.main(again)
    assert_same_weights(whole, cut)
    log = sorted((tmp_path / "runs").glob("*/log.jsonl"))[0].read_text().splitlines()
    dropped = [json.loads(line) for line in log if '"drop' in line]
    assert any(record.get("num_dropped") or record.get("dropped") for record in dropped), dropped
    one, other = tmp_path / "resident", tmp_path / "host"
    for folder, resident in ((one, []), (other, ["--num-resident", "3"])):
        fae_train.main([*data, *resident, "--save-model", str(folder)])
    assert_same_weights(one, other)


@pytest.mark.parametrize("what", ["kaggle", "order", "day", "neither"])
def test_a_file_of_held_out_rows(tmp_path, what):
    """The rows of the log train, those of the other file are held out, in its order."""
    import random

    if what == "kaggle":
        texts = [make_log(random.Random(seed), what)[1] for seed in (1, 2)]
        options = {}
    else:
        head = b"bought;shop;time\n"
        lines = [b"%d;s%d;%d\n" % (row % 2, row % 5, (7 * row) % 20) for row in range(60)]
        texts = [head + b"".join(lines[:40]), head + b"".join(lines[40:])]
        described = {"label": "bought", "categorical": ["shop"], "separator": ";"}
        described |= {"days": 3} if what == "neither" else {what: "time"}
        (tmp_path / "columns.json").write_text(json.dumps(described))
        options = {"columns": tmp_path / "columns.json"}
    for name, text in zip(("train", "test"), texts, strict=True):
        (tmp_path / f"{name}.csv").write_bytes(text)
    name, target = ("kaggle" if what == "kaggle" else "custom"), tmp_path / "out.npz"
    test = tmp_path / "test.csv"
    data_utils.preprocess(name, tmp_path / "train.csv", target, test_data_file=test, **options)
    arrays = open_npz(target)
    num_lines = [text.count(b"\n") - (what != "kaggle") for text in texts]
    assert np.diff(arrays["days"])[-1] == num_lines[1] and len(arrays["y"]) == sum(num_lines)
    if what != "kaggle":
        order = sorted(range(40), key=lambda row: (7 * row % 20) * (what != "neither"))
        order += sorted(range(40, 60), key=lambda row: (7 * row % 20) * (what != "neither"))
        assert arrays["y"].tolist() == [row % 2 for row in order]
        num_days = {"order": 7, "day": 20, "neither": 3}[what]
        assert len(arrays["days"]) == num_days + 2
    assert not data_utils.preprocess(
        name, tmp_path / "train.csv", target, test_data_file=test, **options
    )
    with pytest.raises(ValueError, match="exclude each other"):
        data_utils.preprocess(
            name, tmp_path / "train.csv", target, test_data_file=test, split="none", **options
        )


def test_parts_of_other_types_are_refused(tmp_path):
    """Whole floats are the integers of the other part; a part of texts is refused."""
    folder = tmp_path / "log"
    folder.mkdir()
    (tmp_path / "columns.json").write_text(
        json.dumps({"label": "clicked", "categorical": ["user"], "separator": "parquet"})
    )
    frame = pl.DataFrame({"clicked": [0, 1] * 20, "user": [i % 10 for i in range(40)]})
    frame.write_parquet(folder / "a.parquet")
    floats = frame.with_columns(pl.col("user").cast(pl.Float64).replace(3.0, None))
    floats.with_columns(clicked=1 - pl.col("clicked")).write_parquet(folder / "b.parquet")

    def build():
        target = tmp_path / "p.npz"
        data_utils.preprocess("custom", folder, target, columns=tmp_path / "columns.json")
        return unpack_manifest(open_npz(target))

    manifest = build()
    assert manifest["table_columns"][0]["distinct"] == 11  # and the missing one
    assert manifest["seen"] == {"whole floats of user, taken as integers": 36}
    floats.with_columns(pl.col("user").cast(pl.String)).write_parquet(folder / "b.parquet")
    with pytest.raises(ValueError, match=r"column 'user' is int64 in .*a.parquet, and string in"):
        build()
    frame.with_columns(user=pl.struct(a=pl.col("user"))).write_parquet(folder / "b.parquet")
    with pytest.raises(ValueError, match="column 'user' is struct.*which no string is"):
        build()


@pytest.mark.parametrize("cell", ["", "|"])
def test_a_column_without_a_value_is_refused(tmp_path, cell):
    """A table has a row at least: no script could train with it."""
    (tmp_path / "columns.json").write_text(
        json.dumps({"label": "y", "categorical": ["c", {"name": "u", "values": 2}]})
    )
    lines = "".join(f"{row % 2},{row % 3},{cell}\n" for row in range(60))
    (tmp_path / "log.csv").write_text("y,c,u\n" + lines)
    with pytest.raises(ValueError, match="column 'u' holds no value at all"):
        data_utils.preprocess("custom", tmp_path / "log.csv", columns=tmp_path / "columns.json")
    assert not list(tmp_path.glob("*npz*"))


def test_an_empty_standardized_value_is_counted(tmp_path):
    """It is the mean in the file, and one of the empty ones in the report."""
    dense = [{"name": "z", "type": "number", "transform": "standardize"}]
    described = {"label": "y", "categorical": ["c"], "dense": dense, "split": "none"}
    (tmp_path / "columns.json").write_text(json.dumps(described))
    lines = "".join(f"{row % 2},{row % 3},{'' if row % 4 else row + 1}\n" for row in range(40))
    (tmp_path / "log.csv").write_text("y,c,z\n" + lines)
    data_utils.preprocess("custom", tmp_path / "log.csv", columns=tmp_path / "columns.json")
    arrays = open_npz(tmp_path / "log_processed.npz")
    assert unpack_manifest(arrays)["dense_columns"][0]["zero_share"] == 0.75
    assert set(arrays["X_int"][1::4, 0].tolist()) == {np.mean(np.arange(0, 40, 4) + 1)}
