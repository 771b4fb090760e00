"""The synthetic log: its format, that it is reproducible, and what its planted model claims."""

import json
import os
import re

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from bench import synthetic_log
from slipstream.logs.synthetic import (
    BLOCK_ROWS,
    KAGGLE_TABLE_SIZES,
    PlantedClicks,
    category_hashes,
    planted_blocks,
    planted_clicks,
)

FIELDS = PlantedClicks.__dataclass_fields__
SMALL_TABLES = (40, 7, 3, 1000, 2, 1)


@pytest.fixture(scope="module")
def clicks():
    return planted_clicks(60_000, KAGGLE_TABLE_SIZES, seed=5)


def assert_same(left, right):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def write(path, rows=300, seed=7, **options):
    assert synthetic_log.write_log(path, rows, seed, **options) is not None
    return path.read_bytes()


def top_share(ids, num_values):
    counts = np.sort(np.unique(ids, return_counts=True)[1])[::-1]
    return counts[:num_values].sum() / len(ids)


def test_shapes_types_and_ranges(clicks):
    assert clicks.X_int.shape == clicks.int_missing.shape == (60_000, 13)
    assert clicks.X_cat.shape == clicks.cat_missing.shape == (60_000, 26)
    assert (clicks.X_int.dtype, clicks.X_cat.dtype) == (np.int32, np.int32)
    assert (clicks.y.dtype, clicks.probability.dtype) == (np.int8, np.float32)
    assert (clicks.X_cat >= 0).all() and (clicks.X_cat < np.array(KAGGLE_TABLE_SIZES)).all()
    assert clicks.X_int[:, 1].min() == -2 and (np.delete(clicks.X_int, 1, 1) >= 0).all()
    assert set(np.unique(clicks.y)) == {0, 1}


def test_the_first_rows_do_not_depend_on_how_many_follow():
    num_rows = 2 * BLOCK_ROWS + 100
    whole = planted_clicks(num_rows, SMALL_TABLES, seed=1, num_dense=2)
    for cut in (1, BLOCK_ROWS, BLOCK_ROWS + 1):
        start = planted_clicks(cut, SMALL_TABLES, seed=1, num_dense=2)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(start, name), getattr(whole, name)[:cut])
    assert_same(whole, planted_clicks(num_rows, SMALL_TABLES, seed=1, num_dense=2))


def test_blocks_differ_and_seeds_differ():
    first, second = planted_blocks(2 * BLOCK_ROWS, SMALL_TABLES, seed=1)
    assert (first.X_cat != second.X_cat).any() and (first.X_int != second.X_int).any()
    other = planted_clicks(BLOCK_ROWS, SMALL_TABLES, seed=2)
    assert (first.X_cat != other.X_cat).any() and (first.probability != other.probability).any()


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 1), (2,) * 26, (5,) * 60])
def test_any_table_sizes_work(sizes):
    clicks = planted_clicks(2000, sizes, seed=3, num_dense=15)
    assert clicks.X_cat.shape == (2000, len(sizes)) and clicks.X_int.shape == (2000, 15)
    assert (clicks.X_cat < np.array(sizes)).all()
    assert np.isfinite(clicks.probability).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"num_rows": 0},
        {"table_sizes": ()},
        {"table_sizes": (3, 0)},
        {"table_sizes": (2**31,)},
        {"seed": -1},
        {"positive_rate": 0.0},
        {"positive_rate": 1.0},
        {"num_dense": 0},
    ],
)
def test_bad_arguments_are_value_errors(bad):
    arguments = {"num_rows": 10, "table_sizes": SMALL_TABLES, "seed": 1} | bad
    with pytest.raises(ValueError, match="got .*expected"):
        planted_blocks(**arguments)


def test_ids_follow_a_power_law_like_kaggles(clicks):
    largest = [2, 11, 15, 20]
    for c in largest:
        assert 0.03 < top_share(clicks.X_cat[:, c], 1) < 0.10
        assert 0.12 < top_share(clicks.X_cat[:, c], 10) < 0.30
        assert len(np.unique(clicks.X_cat[:, c])) > 8000
    assert 0.45 < top_share(clicks.X_cat[:, 0], 1) < 0.55
    assert top_share(clicks.X_cat[:, 6], 1) < 0.03
    assert 0.8 < top_share(clicks.X_cat[:, 8], 1) < 0.95
    for c in (0, 2, 6, 9, 25):
        present = clicks.X_cat[~clicks.cat_missing[:, c], c]
        counts = np.bincount(present[present < 1000], minlength=1000)
        assert counts[0] == counts.max(), "id 0 is the most popular"
        assert counts[:10].sum() > counts[10:20].sum() > counts[100:110].sum()


def test_rare_ids_come_together(clicks):
    """As in real logs: otherwise nearly every input would touch some cold row."""
    rare = np.stack(
        [clicks.X_cat[:, c] > np.quantile(clicks.X_cat[:, c], 0.8) for c in (2, 3, 11, 15)]
    )
    assert rare.all(axis=0).mean() > 0.1 > 50 * 0.2**4


def test_missing_values(clicks):
    dense_rates = np.array([0.45, 0, 0.2, 0.2, 0.05, 0.25, 0.05, 0, 0.05, 0.45, 0.05, 0.78, 0.2])
    np.testing.assert_allclose(clicks.int_missing.mean(0), dense_rates, atol=0.02)
    assert (clicks.X_int[clicks.int_missing] == 0).all()
    rates = clicks.cat_missing.mean(0)
    np.testing.assert_allclose(rates[[2, 3, 11, 15, 20, 23]], 0.03, atol=0.01)
    np.testing.assert_allclose(rates[[18, 19, 24, 25]], 0.45, atol=0.02)
    assert abs(rates[21] - 0.8) < 0.02 and rates[0] == 0
    missing_ids = np.array(KAGGLE_TABLE_SIZES) - 1
    for c in np.flatnonzero(rates):
        is_last = clicks.X_cat[:, c] == missing_ids[c]
        np.testing.assert_array_equal(clicks.cat_missing[:, c], is_last)


@pytest.mark.parametrize("rate", [0.05, 0.25, 0.6])
def test_share_of_positives(rate):
    clicks = planted_clicks(30_000, KAGGLE_TABLE_SIZES, seed=2, positive_rate=rate)
    assert abs(clicks.y.mean() - rate) < 0.03
    assert abs(clicks.probability.mean() - rate) < 0.02


def test_planted_probabilities_are_calibrated(clicks):
    edges = np.quantile(clicks.probability, np.linspace(0, 1, 11))
    bins = np.clip(np.searchsorted(edges, clicks.probability, side="right") - 1, 0, 9)
    for number in range(10):
        chosen = bins == number
        assert abs(clicks.y[chosen].mean() - clicks.probability[chosen].mean()) < 0.03


@pytest.mark.parametrize("seed", [1, 123])
def test_planted_auc_is_sane_on_several_seeds(seed):
    clicks = planted_clicks(30_000, KAGGLE_TABLE_SIZES, seed=seed)
    assert 0.80 < roc_auc_score(clicks.y, clicks.probability) < 0.84


def test_no_first_order_model_reaches_the_planted_auc(clicks):
    """A linear model on the logs and on the popular ids, fit to the planted logits' own labels."""
    columns = [np.log1p(np.maximum(clicks.X_int, 0))]
    for c in range(26):
        values, inverse, counts = np.unique(
            clicks.X_cat[:, c], return_inverse=True, return_counts=True
        )
        popular = np.argsort(-counts)[:15]
        rank = np.full(len(values), -1)
        rank[popular] = np.arange(len(popular))
        columns.append(rank[inverse][:, None] == np.arange(len(popular)))
    features = np.concatenate(columns, axis=1, dtype=np.float32)
    features -= features.mean(0)
    half = 30_000
    model = LogisticRegression(C=0.1, max_iter=60, tol=1e-3).fit(features[:half], clicks.y[:half])
    linear = roc_auc_score(clicks.y[half:], model.decision_function(features[half:]))
    planted = roc_auc_score(clicks.y[half:], clicks.probability[half:])
    assert 0.6 < linear < planted - 0.03


def test_hashes_are_one_to_one_within_a_column():
    ids = np.arange(1 << 20, dtype=np.int32)
    hashes = category_hashes(3, ids)
    assert hashes.dtype == np.uint32 and len(np.unique(hashes)) == len(ids)
    assert 0.45 < (hashes >= 1 << 31).mean() < 0.55
    assert (hashes != category_hashes(4, ids)).mean() > 0.999


def test_lines_have_criteos_format(tmp_path):
    text = write(tmp_path / "log.txt", rows=2000)
    assert text.endswith(b"\n") and b"\r" not in text and b'"' not in text
    lines = text.decode("ascii").split("\n")[:-1]
    assert len(lines) == 2000
    line_format = re.compile(r"[01](\t(-[12]|\d*)){13}(\t([0-9a-f]{8})?){26}")
    assert all(line_format.fullmatch(line) for line in lines)


def test_the_log_holds_the_planted_rows(tmp_path):
    text = write(tmp_path / "log.txt", rows=500, seed=9).decode()
    clicks = planted_clicks(500, KAGGLE_TABLE_SIZES, seed=9)
    for row, line in enumerate(text.splitlines()):
        label, *values = line.split("\t")
        assert int(label) == clicks.y[row]
        ints = ["" if m else str(x) for x, m in zip(clicks.X_int[row], clicks.int_missing[row])]  # noqa: B905
        assert values[:13] == ints
        for c in range(26):
            hashed = f"{int(category_hashes(c, clicks.X_cat[row, c : c + 1])[0]):08x}"
            assert values[13 + c] == ("" if clicks.cat_missing[row, c] else hashed)


def test_same_options_same_bytes(tmp_path):
    rows = 2 * BLOCK_ROWS + 10
    first = write(tmp_path / "a.txt", rows, blocks_per_chunk=1)
    assert first == write(tmp_path / "b.txt", rows, blocks_per_chunk=8)
    assert first[: len(write(tmp_path / "c.txt", 500))] == (tmp_path / "c.txt").read_bytes()
    assert write(tmp_path / "d.txt", 500, seed=8) != (tmp_path / "c.txt").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_the_sidecar_describes_the_log(tmp_path):
    path = tmp_path / "log.txt"
    write(path, rows=20_000, seed=4)
    sidecar = json.loads((tmp_path / "log.txt.json").read_text())
    clicks = planted_clicks(20_000, KAGGLE_TABLE_SIZES, seed=4)
    test = slice(20_000 - 2857, 20_000 - 2857 + 1428)
    assert sidecar["version"] == 1 and sidecar["synthetic"] is True
    assert (sidecar["rows"], sidecar["seed"], sidecar["positive_rate"]) == (20_000, 4, 0.25)
    assert sidecar["positives"] == pytest.approx(clicks.y.mean())
    assert sidecar["planted_auc"] == pytest.approx(roc_auc_score(clicks.y, clicks.probability))
    expected = roc_auc_score(clicks.y[test], clicks.probability[test])
    assert sidecar["planted_auc_test"] == pytest.approx(expected)


@pytest.mark.parametrize("rows", range(1, 40))
def test_the_test_part_is_the_first_half_of_the_last_seventh(rows):
    parts = np.array_split(np.arange(rows), 7)
    test = np.arange(rows)[synthetic_log.rows_of_test_part(rows)]
    np.testing.assert_array_equal(test, parts[-1][: len(parts[-1]) // 2])


def test_up_to_date_only_when_whole_and_of_the_same_options(tmp_path, capsys):
    path = tmp_path / "new" / "log.txt"
    arguments = ["--rows", "200", "--seed", "3", "--output", str(path)]
    synthetic_log.main(arguments)
    printed = capsys.readouterr().out
    assert f"wrote {path}" in printed and "of the rows positive; limit of a test AUC" in printed
    before = path.read_bytes(), path.stat().st_mtime_ns
    synthetic_log.main(arguments)
    assert "up to date" in capsys.readouterr().out
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before

    path.write_bytes(before[0][:-100])  # cut short behind our back
    synthetic_log.main(arguments)
    assert path.read_bytes() == before[0]

    path.with_name("log.txt.json").write_text('{"synthetic": true}')  # an unfinished one
    synthetic_log.main(arguments)
    assert "up to date" not in capsys.readouterr().out
    for other in (["--rows", "201"], ["--seed", "4"], ["--positive-rate", "0.3"]):
        synthetic_log.main(arguments + other)
        assert "up to date" not in capsys.readouterr().out


def test_an_interrupted_run_is_never_trusted(tmp_path, monkeypatch):
    path = tmp_path / "log.txt"
    old = write(path, rows=100, seed=1)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # while rows are written: the old log stays, whole
        patch.setattr(synthetic_log, "category_hashes", stop)
        with pytest.raises(KeyboardInterrupt):
            synthetic_log.write_log(path, 100, 2)
    assert path.read_bytes() == old
    assert synthetic_log.write_log(path, 100, 1) is None
    with monkeypatch.context() as patch:  # after the rename, before the sidecar
        patch.setattr(synthetic_log, "_auc", stop)
        with pytest.raises(KeyboardInterrupt):
            synthetic_log.write_log(path, 100, 2)
    assert "planted_auc" not in path.with_name("log.txt.json").read_text()
    assert synthetic_log.write_log(path, 100, 2) is not None
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_reported_before_writing(tmp_path):
    with pytest.raises(OSError, match="free"):
        synthetic_log.write_log(tmp_path / "log.txt", 10**12, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "bad", [["--rows", "0"], ["--rows", "x"], ["--positive-rate", "1"], ["--seed", "-1"], ["--no"]]
)
def test_bad_flags_exit_2(bad, capsys):
    with pytest.raises(SystemExit) as stopped:
        synthetic_log.main(bad)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]


def test_another_log_is_never_replaced(tmp_path):
    real = tmp_path / "train.txt"
    real.write_text("real log")
    with pytest.raises(ValueError, match="no synthetic log of ours"):
        synthetic_log.main(["--rows", "10", "--output", str(real)])
    assert real.read_text() == "real log" and os.listdir(tmp_path) == ["train.txt"]
