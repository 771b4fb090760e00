"""A trained model scores new rows: the scores are evaluation's, whatever the log looks like."""

import gzip
import json
import os
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from helpers import MODEL_FLAGS, REPOSITORY
from sklearn.metrics import log_loss, roc_auc_score

import data_utils
import dlrm_s_pytorch
import fae_train
import predict
from bench.fault_scenes import broken_pipe
from slipstream.logs import taobao
from slipstream.logs.columnfile import read_column_file
from slipstream.logs.rows import ABSENT, Rows
from slipstream.logs.scoring import Reader, for_scoring
from slipstream.logs.transforms import log_of_all
from slipstream.logs.vocabulary import Described, TableCodes, Vocabulary, vocabulary_of
from slipstream.serving.model import load_model
from slipstream.serving.scores import say, score_log
from slipstream.tools.npz import open_npz, unpack_manifest, write_npz
from slipstream.tools.runtime import write_json
from slipstream.training.saved import checksum_of

COLUMNS = {
    "label": "clicked",
    "dense": ["age", {"name": "score", "type": "number", "transform": "standardize"}],
    "categorical": [
        "item",
        "site",
        {"name": "tags", "values": 3, "pool": "mean"},
        {"name": "viewed", "table": "item"},
    ],
    "day": "day",
    "weight": "w",
}
ROWS, HELD_OUT = 1500, 500
FLAGS = [*MODEL_FLAGS, "--arch-mlp-bot", "auto-16-8"]


def clicks(num_rows=ROWS, seed=0):
    """A log whose last day is its last rows; some fields are empty, some integers floats."""
    rng = np.random.default_rng(seed)
    item = rng.zipf(1.5, num_rows) % 200
    tags = [[f"t{t}" for t in rng.integers(0, 9, rng.integers(0, 5))] for _ in range(num_rows)]
    day = np.minimum(np.arange(num_rows) // 200, 5)
    return pl.DataFrame(
        {
            "extra": ["a, b"] * num_rows,
            "clicked": (rng.random(num_rows) < (item % 3 == 0) * 0.5 + 0.2).astype(np.int8),
            "age": rng.integers(0, 90, num_rows),
            "score": [None if x > 8 else x for x in rng.normal(5, 3, num_rows).tolist()],
            "item": [f"{i}.0" if i % 7 == 1 else str(i) for i in item.tolist()],
            "site": [None if s == 5 else f"s{s}" for s in rng.integers(0, 9, num_rows).tolist()],
            "tags": ["|".join(t) or None for t in tags],
            "viewed": [str(i) for i in (rng.zipf(1.5, num_rows) % 150).tolist()],
            "day": [f"2024-03-0{d + 1}" for d in day.tolist()],
            "w": rng.choice([0.5, 1.0, 2.0], num_rows),
        }
    )


def preprocess(folder, target, *flags):
    data_utils.main(
        ["--data-set", "custom", "--columns", str(folder / "columns.json"), *flags]
        + ["--raw-data-file", str(folder / "log.csv"), "--processed-data-file", str(target)]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of the clicks, trained by FAE: (folder, summary, the test rows, their scores)."""
    folder = tmp_path_factory.mktemp("predict")
    frame = clicks()
    frame.write_csv(folder / "log.csv")
    (folder / "columns.json").write_text(json.dumps(COLUMNS))
    preprocess(folder, folder / "p.npz", "--min-count", "3")
    flags = ["--processed-data-file", folder / "p.npz", "--save-model", folder / "model"]
    flags += [*FLAGS, "--runs-dir", folder / "runs", "--save-predictions", folder / "scores.csv"]
    summary = fae_train.main([str(flag) for flag in flags])
    scores = pl.read_csv(folder / "scores.csv").filter(pl.col("set") == "test")
    return folder, summary, frame[-HELD_OUT : -HELD_OUT // 2], scores["probability"].to_list()


def scored(folder, frame, name="new.csv", model="model", **options):
    """What `score_log` makes of a frame in a file: the scores, and what it says."""
    path = folder / name
    if name.endswith(".parquet"):
        frame.write_parquet(path)
    elif isinstance(frame, bytes):
        path.write_bytes(frame)
    else:
        frame.write_csv(path)
    found = load_model(folder / model, batch_size=200)
    said = score_log(found, path, str(folder / "out.csv"), block_bytes=700, **options)
    lines = (folder / "out.csv").read_text().split("\n")
    assert lines[0] == "probability" and lines[-1] == "" and not list(folder.glob("*.partial"))
    return [float(line) if line else None for line in lines[1:-1]], said


def test_scores_are_those_of_the_evaluation(trained, capsys):
    """Bit for bit, with the metrics of the summary, by `predict.py` as by the trainer."""
    folder, summary, test, expected = trained
    test.write_csv(folder / "test.csv")
    flags = f"--load-model {folder}/model --raw-data-file {folder}/test.csv --by site "
    flags += f"--output {folder}/out.csv --report {folder}/r.json --test-mini-batch-size 200"
    found = predict.main(flags.split())
    assert [float(x) for x in (folder / "out.csv").read_text().split()[1:]] == expected
    metrics = json.loads((folder / "r.json").read_text())["metrics"]
    for name in ("auc", "log_loss", "normalized_entropy", "accuracy"):
        assert metrics[name] == found["metrics"][name] == summary[name]
    said = capsys.readouterr().out
    assert "AUC" in said and "\nby site: " in said and "\n(empty) " in said
    labels, weights = test["clicked"].to_numpy(), test["w"].to_numpy()
    assert metrics["auc"] == roc_auc_score(labels, expected, sample_weight=weights)
    rate, mean = np.average(labels, weights=weights), np.average(expected, weights=weights)
    assert metrics["calibration"] == pytest.approx(mean / rate, rel=1e-12)
    assert sum(rows for rows, _, _ in metrics["reliability"]) == len(test)
    assert [mean for _, mean, _ in metrics["reliability"]] == sorted(
        mean for _, mean, _ in metrics["reliability"]
    )
    is_s3 = (test["site"] == "s3").fill_null(False).to_numpy()
    of_s3 = (labels[is_s3], np.array(expected)[is_s3])
    assert metrics["by"]["s3"]["log_loss"] == pytest.approx(
        log_loss(*of_s3, sample_weight=weights[is_s3]), rel=1e-9
    )
    assert sum(one["rows"] for one in metrics["by"].values()) == len(test)


def test_the_same_rows_in_other_clothes(trained, tmp_path):
    """No label, another order of columns, other line ends, packed, Parquet, frames: the same."""
    folder, _, test, expected = trained
    shutil.copytree(folder / "model", tmp_path / "model")  # elsewhere, and without any data
    features = test.drop("clicked", "w", "day", "extra")
    text = test.write_csv().encode()
    forms = {
        "nolabel.csv": features,
        "turned.csv": test.select(reversed(test.columns)),
        "crlf.csv": text.replace(b"\n", b"\r\n"),
        "packed.csv.gz": gzip.compress(text),
        "all.parquet": test,
        "some.parquet": features.with_columns(pl.col("tags").str.split("|")),
    }
    for name, frame in forms.items():
        assert scored(tmp_path, frame, name)[0] == expected, name
    model = load_model(tmp_path / "model", batch_size=200)
    columns = {name: test[name].to_list() for name in features.columns}
    arrays = {name: np.array(values, dtype=object) for name, values in columns.items()}
    for frame in (features, test, pd.DataFrame(columns), arrays, columns):
        assert model.predict(frame).tolist() == expected
    assert model.predict(test[:0]).shape == (0,)
    load_model(tmp_path / "model")
    flags = f"--load-model {tmp_path}/model --raw-data-file {tmp_path}/all.parquet "
    predict.main(f"{flags} --output {tmp_path}/o.parquet --test-mini-batch-size 200".split())
    assert pl.read_parquet(tmp_path / "o.parquet")["probability"].to_list() == expected


def test_frames_and_files_that_look_like_others(trained, tmp_path):
    """Columns by name, missing values of any kind, labels that are not there, Hive folders."""
    folder, _, test, expected = trained
    shutil.copytree(folder / "model", tmp_path / "model")
    model = load_model(tmp_path / "model", batch_size=200)
    frame = pd.DataFrame({name: test[name].to_list() for name in test.columns})
    assert model.predict(frame.convert_dtypes()).tolist() == expected, "pd.NA"
    assert model.predict(frame.to_dict("list")).tolist() == expected
    assert model.predict(frame.assign(clicked=None, w=None)).tolist() == expected
    hive = tmp_path / "log" / "day=2024-03-06"
    hive.mkdir(parents=True)
    for name, rows in (("labelled", test), ("plain", test.drop("clicked", "w"))):
        rows.drop("day").write_csv(hive / "part.csv")
        said = score_log(model, tmp_path / "log", str(tmp_path / f"{name}.csv"))
        assert ("metrics" in said) == (name == "labelled")
        scores = (tmp_path / f"{name}.csv").read_text().split()[1:]
        assert [float(score) for score in scores] == expected
    test.drop("w").write_csv(hive / "part.csv")
    test.write_csv(hive / "part2.csv")
    said = score_log(model, hive, str(tmp_path / "both.csv"))
    assert said["metrics"]["rows"] == 2 * len(test), "rows of a file without weights count as one"
    test.drop("clicked").write_csv(hive / "part.csv")
    said = score_log(model, hive, str(tmp_path / "both.csv"))
    assert "metrics" not in said and said["labelled"] == len(test)
    for output, match in (
        (hive / "x.csv", "lies in .*, which is read"),
        (tmp_path / "model" / "vocabulary.npz", "lies in .*, which is read"),
        (tmp_path / "none" / "x.csv", "does not exist; make it"),
        (tmp_path / "x.csv.gz", "written plain"),
    ):
        with pytest.raises((ValueError, OSError), match=match):
            score_log(model, hive, str(output))
    flags = (
        f"--load-model {tmp_path}/model --raw-data-file {hive}/part2.csv --output {tmp_path}/o.csv"
    )
    for report in (hive / "part2.csv", tmp_path / "o.csv", "-"):
        with pytest.raises(ValueError, match="is read here|name one file|expected the name of a"):
            predict.main([*flags.split(), "--report", str(report)])


def test_lines_without_a_header(trained, tmp_path):
    """A frame's columns count by name, or by place; of a file's the label may be missing."""
    folder, *_ = trained
    described = {"label": "clicked", "dense": ["age"], "categorical": ["item", "site"]}
    described |= {"header": False, "columns": ["item", "clicked", "age", "site"], "separator": "\t"}
    (tmp_path / "columns.json").write_text(json.dumps(described))
    rows = clicks().select("item", "clicked", "age", "site")
    rows.write_csv(tmp_path / "log.csv", separator="\t", include_header=False)
    preprocess(tmp_path, tmp_path / "p.npz")
    flags = ["--processed-data-file", tmp_path / "p.npz", "--save-model", tmp_path / "m", *FLAGS]
    dlrm_s_pytorch.main([str(flag) for flag in [*flags, "--runs-dir", tmp_path / "runs"]])
    model, features = load_model(tmp_path / "m"), rows.drop("clicked")
    expected = model.predict(features).tolist()
    for frame in (
        rows,
        rows.select("age", "site", "clicked", "item"),
        features.rename({"item": "a", "age": "b", "site": "c"}),
        rows.rename({name: f"column_{at}" for at, name in enumerate(rows.columns)}),
    ):
        assert model.predict(frame).tolist() == expected
    for name, frame, is_labelled in (("a", rows, True), ("b", features, False)):
        text = frame.write_csv(separator="\t", include_header=False).encode()
        (tmp_path / name).write_bytes(b"\n" + text)
        said = score_log(model, tmp_path / name, str(tmp_path / "o.csv"))
        assert ("metrics" in said) == is_labelled and said["lines"] == len(rows) + 1
        scores = (tmp_path / "o.csv").read_text().split("\n")[:-1]
        assert scores[0] == "" and [float(score) for score in scores[1:]] == expected
    with pytest.raises(ValueError, match="--by city: the log's columns are item, clicked, age, si"):
        score_log(model, tmp_path / "a", str(tmp_path / "o.csv"), by="city")
    weighted = {**described, "weight": "w", "columns": [*described["columns"], "w"]}
    (tmp_path / "columns.json").write_text(json.dumps(weighted))
    with pytest.raises(ValueError, match="cannot be told whether 'clicked' or 'w' is missing"):
        for_scoring("x", read_column_file(tmp_path / "columns.json"), ["1"] * 4, "")


def test_a_column_of_strangers_is_warned_of(trained, tmp_path, capsys):
    """In place of the line on unseen values, which other columns get: of rows, or of lists."""
    folder, _, test, _ = trained
    num, unknown = len(test), "the vocabulary does not have"
    is_first = pl.int_range(num) < 3
    renamed = test.with_columns(
        item=pl.lit("00") + pl.col("item"),
        site=pl.when(is_first).then(pl.lit("x")).otherwise(pl.col("site")),
        tags=pl.when(is_first).then(pl.lit("x|t1|y")).otherwise(pl.col("tags")),
    )
    model = load_model(folder / "model")
    line = f"item: {num} of {num} rows (100.00%) have a value that {unknown}; is it the same"
    with pytest.warns(UserWarning, match=re.escape(line)) as caught:
        model.predict(renamed)
    assert len(caught) == 1
    renamed.write_csv(tmp_path / "new.csv")
    say(score_log(model, tmp_path / "new.csv", str(tmp_path / "out.csv")), model)
    said = [one for one in capsys.readouterr().out.splitlines() if unknown in one]
    assert said[0].startswith(f"warning: {line}") and said[1:3] == [
        f"site: 3 of {num} rows ({3 / num:.2%}) have a value that {unknown}",
        f"tags: the lists of {num} rows have 6 values that {unknown}",
    ]
    assert not any(one.startswith("item:") for one in said)
    with warnings.catch_warnings(action="error"):
        model.predict(test)
        model.predict(renamed[:5])  # may well be new


def test_groups_that_are_shown(trained, tmp_path, capsys):
    """Of many those of most rows, long names by both ends; without labels it is said."""
    folder, _, test, _ = trained
    model, out = load_model(folder / "model"), str(tmp_path / "out.csv")
    names = [f"{'long ' * 9}{at}" for at in range(60)] + ["frequent"] * (len(test) - 60)
    frame = test.with_columns(extra=pl.Series(names))
    frame.write_csv(tmp_path / "new.csv")
    say(score_log(model, tmp_path / "new.csv", out, by="extra"), model)
    said = capsys.readouterr().out
    table = said[said.index("by extra:") :].splitlines()
    assert [line[:28].rstrip() for line in table[1:3]] == [
        "frequent",
        "long long lo...g long long 0",
    ]
    assert len(table) == 52 and table[-1].startswith("and 11 more values, of fewer rows")
    frame.drop("clicked").write_csv(tmp_path / "new.csv")
    say(score_log(model, tmp_path / "new.csv", out, by="extra"), model)
    assert f"no metrics: 0 of {len(frame)} rows have a label" in capsys.readouterr().out


def test_a_network_of_ones_own_that_fails_is_named(trained, tmp_path):
    """By its line; and how to have the text of its file is said where another one is given."""
    folder, _, frame, _ = trained
    own = tmp_path / "net.py"
    shutil.copy(REPOSITORY / "tests/own_network.py", own)
    flags = ["--processed-data-file", folder / "p.npz", "--save-model", tmp_path / "m"]
    flags += [
        *FLAGS,
        "--runs-dir",
        tmp_path / "runs",
        "--num-batches",
        2,
        "--model",
        f"{own}:Fails",
    ]
    flags += ["--model-args", "what=in evaluation", "above=200"]
    fae_train.main([str(flag) for flag in flags])
    model = load_model(tmp_path / "m", network=f"{own}:Fails")
    model.predict(frame[:200])
    with pytest.raises(ValueError, match=r"--model \S+net.py, line \d+: IndexError"):
        model.predict(frame[:201])
    own.write_text(own.read_text() + "\n")
    for network, said in ((f"{own}:Fails", "is not the file that"), (None, "give that file again")):
        with pytest.raises(
            ValueError, match=rf"{said}.*slipstream.training.saved \S+ > \S+/net.py"
        ):
            load_model(tmp_path / "m", network=network)


def test_values_never_seen_are_rare_ones_or_absent(trained):
    folder, _, test, _ = trained
    model = load_model(folder / "model")
    row = {"age": [3], "score": [1.0], "item": ["4"], "site": ["s1"], "tags": ["t1"]}
    row |= {"viewed": ["never"]}
    manifest = unpack_manifest(open_npz(folder / "p.npz"))
    rare = {one["name"]: one.get("rare_id") for one in manifest["table_columns"]}
    assert rare["item"] is not None and rare["site"] is rare["tags"] is None
    encoded = model.reader.of_frame(pl.DataFrame(row))
    assert encoded.ids[0, -1] == rare["item"] and encoded.unseen.tolist() == [0, 0, 0, 0, 0, 1]
    assert model.reader.column_names == ["item", "site", "tags", "tags", "tags", "viewed"]
    unknown = model.reader.of_frame(pl.DataFrame(row | {"site": ["x"], "tags": ["t1|y"]}))
    assert unknown.ids[0].tolist()[1:5] == [-1, encoded.ids[0, 2], -1, -1]
    assert unknown.unseen.tolist() == [0, 1, 0, 1, 0, 1]
    # An absent row is zeros, in a list and alone.
    offset = len(model.reader.vocabulary.tables[0])
    rows = torch.zeros(1, 6, 8)
    known = torch.from_numpy(np.array(model.saved.arrays["rows"]))
    places = [0, 0, offset + len(model.reader.vocabulary.tables[1]), 0, 0, 0]
    for column in (0, 2, 5):
        rows[0, column] = known[unknown.ids[0, column] + places[column]]
    dense = torch.from_numpy(model.reader.transforms.apply(unknown.dense))
    with model.model.evaluating():
        wanted = model.model(dense, rows, torch.from_numpy(unknown.ids >= 0))
    assert model.logits(unknown).tolist() == wanted.tolist()


def test_bad_lines_keep_their_place(trained, tmp_path):
    folder, _, test, expected = trained
    shutil.copytree(folder / "model", tmp_path / "model")
    lines = test[:5].write_csv().encode().split(b"\n")
    lines[2:2] = [b"1,2", b"\r"]
    lines[5] = lines[5].replace(b",s", b",s,", 1)
    scores, said = scored(tmp_path, b"\n".join(lines), bad_lines=2)
    assert [at for at, score in enumerate(scores) if score is None] == [1, 2, 4]
    assert np.allclose([scores[0], scores[3], *scores[5:]], np.delete(expected[:5], 2))
    assert said["bad_lines"] == 2 and said["lines"] == 7 and "line 3" in said["examples"][0]
    with pytest.raises(ValueError, match=r"new.csv, line 3: 2 columns"):
        scored(tmp_path, b"\n".join(lines))
    assert not list(tmp_path.glob("*.partial"))


def test_a_reader_that_takes_no_more(trained, tmp_path):
    """Scores are a result: losing some of them is an error, in words."""
    folder, _, test, _ = trained
    test.write_csv(tmp_path / "new.csv")
    kept, pipe = os.dup(1), broken_pipe()
    os.dup2(pipe, 1)
    try:
        with pytest.raises(OSError, match="^--output -: its reader took no more; scores are miss"):
            score_log(load_model(folder / "model"), tmp_path / "new.csv", "-")
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(pipe)


def test_what_cannot_be_scored_is_said(trained, tmp_path, monkeypatch):
    folder, _, test, _ = trained
    shutil.copytree(folder / "model", tmp_path / "model")
    model = load_model(tmp_path / "model")

    def refused(match, frame, name="new.csv", **options):
        with pytest.raises((ValueError, OSError), match=match):
            scored(tmp_path, frame, name, **options)

    refused("no columns? 'item'", test.drop("item"))
    refused(
        "is its separator ';'. Say so: .* or --separator of predict.py",
        test.write_csv(separator=";").encode(),
    )
    refused('29.7. is not .*; other numbers need "type"', test.with_columns(age=pl.lit("29.7")))
    refused("has no column 'item'", test.drop("item"), "new.parquet")
    refused("is empty", b"")
    refused("no column 'city' of single values", test, by="city")
    refused("column 3 .age.: 'x' is not", test.with_columns(age=pl.lit("x")))
    for frame, match in (
        (test.drop("site"), "has no column 'site'"),
        (test.with_columns(age=pl.lit("x")), r"row 1, column 1 .age."),
        ({"age": [1, 2], "item": [1]}, "cannot be read as columns"),
        (3, "cannot be read as columns"),
    ):
        with pytest.raises(ValueError, match=match):
            model.predict(frame)
    with pytest.raises(ValueError, match="is read here"):
        score_log(model, tmp_path / "new.csv", str(tmp_path / "." / "new.csv"))
    test[:0].write_parquet(tmp_path / "none.parquet")
    assert score_log(model, tmp_path / "none.parquet", str(tmp_path / "no.parquet"))["rows"] == 0
    assert pl.read_parquet(tmp_path / "no.parquet").schema == {"probability": pl.Float64}
    with pytest.raises(ValueError, match="is a folder"):
        score_log(model, tmp_path / "new.csv", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        load_model(tmp_path)
    kept = tmp_path / "model" / "vocabulary.npz"
    content = {name: np.array(array) for name, array in open_npz(kept).items()}
    codes = content["codes"]
    for changed in (codes[:-1], codes.astype(np.int64), codes[::-1], np.roll(codes, 1), codes[:0]):
        write_npz(kept, {**content, "codes": changed})
        with pytest.raises(ValueError, match=r"vocabulary(\.npz)?"):
            load_model(tmp_path / "model")
    kept.unlink()
    with pytest.raises(FileNotFoundError, match=r"needs vocabulary\.npz"):
        load_model(tmp_path / "model")
    (step,) = (tmp_path / "model").glob("step-*")
    described = json.loads((step / "checkpoint.json").read_text())
    described.pop("checksum")
    described["vocabulary"] = None
    write_json(step / "checkpoint.json", described | {"checksum": checksum_of(described)})
    with pytest.raises(ValueError, match="cannot score new rows"):
        load_model(tmp_path / "model")
    # Evaluating needs no vocabulary, and nothing but the folder is named.
    summary = fae_train.main(
        ["--inference-only", "--load-model", str(tmp_path / "model"), "--runs-dir", str(tmp_path)]
    )
    assert summary["auc"] == pytest.approx(trained[1]["auc"], abs=1e-6)


def test_probabilities_of_whole_rows(trained, tmp_path):
    """Of a model whose training rows were thinned, the logit moves by ln(1 - rate)."""
    folder, _, test, _ = trained
    preprocess(folder, tmp_path / "p.npz", "--data-sub-sample-rate", "0.5")
    flags = ["--processed-data-file", tmp_path / "p.npz", "--save-model", tmp_path / "model"]
    flags += [*FLAGS, "--runs-dir", tmp_path / "runs", "--save-predictions", tmp_path / "s.csv"]
    dlrm_s_pytorch.main([str(flag) for flag in flags])
    model = load_model(tmp_path / "model", batch_size=200)
    corrected, plain = model.predict(test), model.predict(test, corrects=False)
    scores = pl.read_csv(tmp_path / "s.csv").filter(pl.col("set") == "test")["probability"]
    assert corrected.tolist() == scores.to_list()
    odds = [p / (1 - p) for p in (corrected, plain)]
    np.testing.assert_allclose(odds[0], odds[1] / 2, rtol=1e-12)


def test_criteos_lines_without_a_label():
    from slipstream.logs.formats import FORMATS

    fields = ["1"] * 39
    log_format, has_label = for_scoring("x", FORMATS["kaggle"], fields, "")
    assert not has_label and log_format.num_in_file == 39
    assert for_scoring("x", FORMATS["kaggle"], [*fields, "1"], "")[1]
    assert not for_scoring("x", FORMATS["avazu"], ["hour", "C1"], "")[1]


def test_a_frame_of_taobaos_lines():
    described = {"checksum": "0" * 64, "lineage": [], "numbers": [None] * 7, "data_set": "taobao"}
    tables = tuple(TableCodes(np.arange(9, dtype=np.uint64), "t") for _ in range(7))
    vocabulary = Vocabulary(tables, described | {"max_ind_range": -1, "columns": None})
    reader = Reader(vocabulary, taobao.schema_of(0).layout, log_of_all(1))
    names = ["user", "item", "category", "behaviour", "time"]
    rows = [(1, 2, 3, "pv", taobao.START), (1, 4, 5, "buy", taobao.START + 3600)]
    found = reader.of_frame(pl.DataFrame(rows, schema=names, orient="row"))
    assert found.ids.tolist() == [[2, 3, 4, 1, 6, 0, 0], [2, 5, 6, 2, 6, 3, 4]]
    assert found.dense.tolist() == [[0], [1]]


@pytest.mark.parametrize("length", [0, 1, 3])
def test_a_candidates_history_is_the_clicks_before_it(length):
    rng = np.random.default_rng(length)
    history, known = taobao.History(length), {}
    for number in (7, 1, 60, 0, 40):
        user, item, category = rng.integers(1, 6, (3, number))
        clicked = rng.integers(0, 2, number)
        times = taobao.START + rng.integers(0, 9 * 86400, number)
        dense = np.stack([user, item, category], axis=1).astype(np.int32)
        lines = Rows(clicked.astype(np.int8), dense, np.empty((number, 0), np.uint64), times)
        found = history.candidates(lines, -1)
        for at in range(number):
            past = known.setdefault(user[at], [])
            hour = (times[at] - taobao.START) // 3600
            wanted = [user[at], item[at], category[at], hour % 24, (hour // 24 + 5) % 7]
            last = past[-length:] if length else past[-1:] or [(-1, -1)]
            absent = [int(ABSENT) - 1] * (length - len(last))
            wanted += [*(one[0] for one in last), *absent, *(one[1] for one in last), *absent]
            assert found.codes[at].tolist() == [int(value) + 1 for value in wanted]
            assert found.dense[at].tolist() == [len(past)]
            if clicked[at]:
                past.append((item[at], category[at]))


@pytest.mark.parametrize("key", Described.__struct_fields__)
@pytest.mark.parametrize("value", [7.5, [3], {"a": 1}, "x", -2])
def test_a_vocabulary_that_is_none_is_refused(trained, key, value):
    """Each part of what a manifest says of it is checked, by itself or by what reads by it."""
    folder, *_ = trained
    arrays, saved = open_npz(folder / "p.npz"), load_model(folder / "model")
    manifest = unpack_manifest(arrays)
    spoilt = {**manifest["vocabulary"], key: value}
    with pytest.raises(ValueError, match="vocabulary|its columns|data set 'x'"):
        found = vocabulary_of(arrays, {"vocabulary": spoilt}, "p")
        Reader(found, saved.reader.layout, saved.reader.transforms)
