"""Tomorrow's log: old values keep their ids, new ones follow, and yesterday's model goes on."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
from helpers import MODEL_FLAGS
from sklearn.metrics import roc_auc_score
from test_predict import COLUMNS, clicks

import bench.days
import data_utils
import dlrm_s_pytorch
import fae_train
from slipstream.logs.features import layout_of
from slipstream.logs.vocabulary import RARE, vocabulary_of
from slipstream.serving.model import load_model
from slipstream.tools.npz import open_npz, unpack_manifest
from slipstream.training.saved import find_checkpoint

FLAGS = [*MODEL_FLAGS, "--arch-mlp-bot", "auto-16-8", "--optimizer", "rwsadagrad"]


def day(number):
    """Each day has items of its own beside those of all days; one that was rare becomes common."""
    frame = clicks(500, seed=number)
    at = np.arange(500)
    item = pl.when(pl.Series(at % 5 == 0)).then(pl.lit(f"new {number}")).otherwise(pl.col("item"))
    rare = pl.when(pl.Series(at == 7) if number == 0 else pl.Series(at % 50 == 7))
    return frame.with_columns(item=rare.then(pl.lit("late")).otherwise(item))


def preprocess(folder, number, *flags):
    data_utils.main(
        ["--data-set", "custom", "--columns", str(folder / "columns.json"), "--split", "none"]
        + ["--raw-data-file", str(folder / f"day_{number}.csv"), "--min-count", "3"]
        + ["--processed-data-file", str(folder / f"day_{number}.npz"), *flags]
    )
    path = folder / f"day_{number}.npz"
    arrays = {name: np.array(array) for name, array in open_npz(path).items()}
    return arrays, unpack_manifest(arrays)


def train(script, folder, number, *flags):
    given = ["--processed-data-file", folder / f"day_{number}.npz", *FLAGS]
    given += ["--runs-dir", folder / "runs", "--save-model", folder / f"model_{number}"]
    flags = [*given, *flags]  # of one that is given twice the last holds
    return script.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Three days, each extending the one before; a model of the first, and one that went on."""
    folder = tmp_path_factory.mktemp("days")
    (folder / "columns.json").write_text(json.dumps(COLUMNS))
    for number in range(3):
        day(number).write_csv(folder / f"day_{number}.csv")
    built = [preprocess(folder, 0)]
    built.append(preprocess(folder, 1, "--extend", str(folder / "day_0.npz")))
    built.append(preprocess(folder, 2, "--extend", str(folder / "day_1.npz")))
    train(dlrm_s_pytorch, folder, 0)
    train(fae_train, folder, 1, "--load-model", folder / "model_0")
    return folder, built


def values_of(arrays, manifest):
    """Of each table the codes, and of each row the codes behind its ids."""
    found = vocabulary_of(arrays, manifest, "p")
    tables = [np.array(table.codes) for table in found.tables]
    layout = layout_of(manifest, arrays["X_cat"].shape[1], len(tables), "p")
    ids = arrays["X_cat"]
    rows = [
        np.where(ids[:, c] >= 0, tables[t][ids[:, c]], 0)
        for c, t in enumerate(layout.table_of_column)
    ]
    return tables, np.stack(rows, axis=1)


def test_old_values_keep_their_ids_and_rows_their_values(days, tmp_path):
    folder, built = days
    tables = [values_of(*one)[0] for one in built]
    for before, after in zip(tables, tables[1:], strict=False):
        for old, new in zip(before, after, strict=True):
            assert np.array_equal(new[: len(old)], old), "old values keep their ids"
            added = new[len(old) :]
            assert (np.sort(added[added != RARE]) == added[added != RARE]).all()
            assert len(np.unique(new)) == len(new)
    assert len(tables[2][0]) > len(tables[1][0]) > len(tables[0][0])
    # The same log by itself has the same values in each row, but for what is rare in it alone.
    shutil.copy(folder / "day_1.csv", tmp_path / "day_1.csv")
    shutil.copy(folder / "columns.json", tmp_path / "columns.json")
    arrays, manifest = preprocess(tmp_path, 1)
    alone, extended = values_of(arrays, manifest)[1], values_of(*built[1])[1]
    is_rare = alone == RARE
    assert (alone[~is_rare] == extended[~is_rare]).all() and is_rare.any()
    assert np.isin(extended[is_rare], [*tables[0][0], *tables[0][2], RARE]).all()
    for name in ("y", "days", "weights"):
        np.testing.assert_array_equal(arrays[name], built[1][0][name])
    assert built[1][1]["transforms"] == built[0][1]["transforms"], "a model is good for these alone"
    lineage = [one[1]["vocabulary"]["lineage"] for one in built]
    checks = [one[1]["vocabulary"]["checksum"] for one in built]
    assert lineage == [[], checks[:1], checks[:2]] and len(set(checks)) == 3


def test_a_model_goes_on(days, capsys):
    """Rows it has keep weights and sums; a new one starts from the rare row, or as ever."""
    folder, built = days
    first, second = (find_checkpoint(folder / f"model_{n}") for n in (0, 1))
    old, new = (vocabulary_of(*one, "p").tables for one in built[:2])
    train(
        fae_train,
        folder,
        1,
        "--load-model",
        folder / "model_0",
        "--num-batches",
        "1",
        "--learning-rate",
        "1e-30",
        "--save-model",
        folder / "still",
    )
    assert "new rows:" in capsys.readouterr().out
    still, at, from_ = find_checkpoint(folder / "still"), 0, 0
    for before, after in zip(old, new, strict=True):
        rows, sums = (np.array(still.arrays[n][at : at + len(after)]) for n in ("rows", "row_sums"))
        kept = np.array(first.arrays["rows"][from_ : from_ + len(before)])
        assert np.array_equal(rows[: len(before)], kept)
        kept_sums = np.array(first.arrays["row_sums"][from_ : from_ + len(before)])
        assert (sums[: len(before)] >= kept_sums).all() and kept_sums.any()
        if len(after) > len(before):
            added = rows[len(before) :]
            if before.rare_id is not None:
                assert (added == kept[before.rare_id]).all()
            else:
                assert (np.abs(added) <= len(after) ** -0.5).all() and added.any()
        at, from_ = at + len(after), from_ + len(before)
    kept = {n: a for n, a in first.part("step")[1].items() if "optimizer" in n}
    assert kept and second.step > 0


def test_testing_on_another_day_is_scoring_it(days, tmp_path):
    """`--test-data-file` gives what `predict.py` gives.

    (Of an earlier day but for values that were rare in it, which its file does not tell apart.)
    """
    folder, _ = days
    for model, trained_on, tested in ((0, 0, 1), (0, 0, 2), (1, 1, 0), (1, 1, 2)):
        summary = dlrm_s_pytorch.main(
            ["--inference-only", "--load-model", str(folder / f"model_{model}"), "--device", "cpu"]
            + ["--processed-data-file", str(folder / f"day_{trained_on}.npz")]
            + ["--test-data-file", str(folder / f"day_{tested}.npz"), "--runs-dir", str(tmp_path)]
            + ["--save-predictions", str(tmp_path / "s.csv")]
        )
        scores = pl.read_csv(tmp_path / "s.csv")["probability"]
        found = load_model(folder / f"model_{model}").predict(day(tested))
        is_same = np.isclose(found, scores.to_numpy(), rtol=2e-6, atol=0)
        assert is_same.all() if tested > trained_on else 0.9 < is_same.mean() < 1
        assert summary["auc"] is not None
    train(fae_train, folder, 2, "--test-data-file", folder / "day_1.npz", "--num-batches", "3")


def test_a_thinned_model_is_tested_on_whole_rows(days, tmp_path):
    folder, _ = days
    for name in ("columns.json", "day_0.csv", "day_1.csv"):
        shutil.copy(folder / name, tmp_path / name)
    thinned = ["--data-sub-sample-rate", "0.5"]
    preprocess(tmp_path, 0, *thinned, "--sub-sample-held-out")
    extends = ["--extend", str(tmp_path / "day_0.npz")]
    preprocess(tmp_path, 1, *extends)
    scores = ["--save-predictions", tmp_path / "s.csv"]
    train(dlrm_s_pytorch, tmp_path, 0, "--test-data-file", tmp_path / "day_1.npz", *scores)
    found = load_model(tmp_path / "model_0").predict(day(1))
    saved = pl.read_csv(tmp_path / "s.csv")["probability"].to_numpy()
    np.testing.assert_allclose(found, saved, rtol=2e-6)
    preprocess(tmp_path, 1, *extends, *thinned)
    with pytest.raises(ValueError, match="rows without a click were left out of"):
        train(dlrm_s_pytorch, tmp_path, 0, "--test-data-file", tmp_path / "day_1.npz", *scores)


def test_a_file_follows_the_one_it_extends(days, tmp_path):
    """Of yesterday's log built otherwise, with other transforms, today's file is another."""
    folder, built = days
    for name in ("columns.json", "day_0.csv", "day_1.csv"):
        shutil.copy(folder / name, tmp_path / name)
    extends = ["--extend", str(tmp_path / "day_0.npz")]
    preprocess(tmp_path, 0)
    _, first = preprocess(tmp_path, 1, *extends)
    preprocess(tmp_path, 0, "--split", "random:1")
    _, second = preprocess(tmp_path, 1, *extends)
    means = [one["transforms"][1]["mean"] for one in (first, second)]
    assert means[0] == built[0][1]["transforms"][1]["mean"] != means[1]


def test_what_does_not_extend_is_refused(days, tmp_path):
    folder, _ = days
    shutil.copy(folder / "columns.json", tmp_path / "columns.json")
    day(5).write_csv(tmp_path / "day_1.csv")
    described = {**COLUMNS, "categorical": COLUMNS["categorical"][:2]}
    (tmp_path / "columns.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="--extend: .* there, and .* here"):
        preprocess(tmp_path, 1, "--extend", str(folder / "day_0.npz"))
    (tmp_path / "columns.json").write_text(json.dumps(COLUMNS))
    with pytest.raises(ValueError, match="--extend: max_ind_range is -1 there, and 9 here"):
        preprocess(tmp_path, 1, "--extend", str(folder / "day_0.npz"), "--max-ind-range", "9")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        preprocess(tmp_path, 1, "--extend", str(folder / "none.npz"))
    preprocess(tmp_path, 1)  # of itself
    with pytest.raises(ValueError, match="is the file to write"):
        preprocess(tmp_path, 1, "--extend", str(tmp_path / "day_1.npz"))
    shutil.copytree(folder / "model_0", tmp_path / "model_0")
    with pytest.raises(ValueError, match="made for other (model|data)"):
        train(dlrm_s_pytorch, tmp_path, 1, "--load-model", tmp_path / "model_0")
    with pytest.raises(ValueError, match="neither extends the file of the data nor is extended"):
        train(dlrm_s_pytorch, tmp_path, 1, "--test-data-file", folder / "day_0.npz")
    # Yesterday's data do not take today's model.
    shutil.copytree(folder / "model_1", tmp_path / "model_9")
    with pytest.raises(ValueError, match="made for other data"):
        train(
            dlrm_s_pytorch,
            folder,
            0,
            "--load-model",
            tmp_path / "model_9",
            "--save-model",
            tmp_path / "other",
        )


def test_days_are_tested_before_they_are_trained_on(days, tmp_path, capsys):
    """Each as by hand; again nothing is made anew, and with other flags it is refused."""
    folder, _ = days
    logs = [folder / f"day_{number}.csv" for number in range(3)]
    given = ["--logs", *logs, "--data-set", "custom", "--columns", folder / "columns.json"]
    given += ["--min-count", "3", "--work-dir", tmp_path / "w", "--compare", "--no-last", *FLAGS]
    given = [str(word) for word in given]
    found = bench.days.main(given)
    assert [list(one["tested"]) for one in found] == [["going on", "as it is", "anew"]] * 2
    first = found[0]["tested"]
    assert first["going on"] == first["as it is"] == pytest.approx(first["anew"], rel=1e-6)
    second = found[1]["tested"]
    assert second["going on"] != second["as it is"] and second["anew"]["rows"] == 500
    model = load_model(tmp_path / "w/going/day_1")
    wanted = roc_auc_score(day(2)["clicked"].to_numpy(), model.predict(day(2)))
    assert second["going on"]["auc"] == pytest.approx(wanted, abs=1e-6)
    written = sorted((tmp_path / "w/going").rglob("state.npz"))
    assert bench.days.main(given) == found
    assert sorted((tmp_path / "w/going").rglob("state.npz")) == written
    said = capsys.readouterr().out
    assert "day_2.csv (500 rows)" in said
    trainings = ["going on, day_0.csv", "anew, 1 day", "going on, day_1.csv", "anew, 2 days"]
    trainings = [f"training {at} of 4: {what}" for at, what in enumerate(trainings, 1)]
    told = [line for line in said.splitlines() if line.startswith("training")]
    assert told == [*trainings, *(f"{line}, done before" for line in trainings)]
    with pytest.raises(ValueError, match="is of other logs or flags"):
        bench.days.main([*given, "--learning-rate", "2"])
