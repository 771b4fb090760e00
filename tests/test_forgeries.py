"""Files whose checksums are right and whose contents are not: one line that says which field."""

import json
import shutil

import numpy as np
import pytest
from helpers import MODEL_FLAGS, segregate_small, write_processed

import slipstream_train
from bench import forger
from bench.run_records import check_records
from slipstream.logs.columnfile import read_column_file
from slipstream.logs.preprocess import source_notes
from slipstream.logs.processed import load_processed
from slipstream.tools.npz import open_npz, pack_manifest, write_npz
from slipstream.tools.runtime import read_json
from slipstream.tools.schema import decode_json
from slipstream.training.saved import find_checkpoint
from slipstream.training.sets import load_segregated

CUT = "--drop-min-steps 0 --alpha 0.5 --snapshot-window 0.2 --recalibrate-every 0.1".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A processed file, its segregated folder, and a checkpoint after a first choice."""
    folder = tmp_path_factory.mktemp("made")
    log = write_processed(folder / "p.npz", manifest={"num_rows": 4000, "options": {}})
    hot_cold = segregate_small(log)
    flags = ["--segregated-data-dir", hot_cold, *MODEL_FLAGS, *CUT, "--num-batches", "65"]
    flags += ["--dense-optimizer", "adam", "--save-model", folder / "m"]
    flags += ["--runs-dir", folder / "runs"]
    slipstream_train.main(list(map(str, flags)))
    return folder


@pytest.fixture
def files(made, tmp_path):
    """Copies of them, to be forged."""
    for name in ("p.npz", "hot_cold", "m"):
        copy = shutil.copytree if (made / name).is_dir() else shutil.copy2
        copy(made / name, tmp_path / name)
    return tmp_path


def go_on(folder, *flags):
    words = ["--segregated-data-dir", folder / "hot_cold", *MODEL_FLAGS, *CUT, *flags]
    words += ["--dense-optimizer", "adam", "--save-model", folder / "m", "--load-model", "auto"]
    words += ["--runs-dir", folder / "runs", "--num-batches", "70"]
    slipstream_train.main(list(map(str, words)))


def refused(named, function, *arguments):
    """It raises what becomes one line, which names the file and the field."""
    with pytest.raises((ValueError, OSError)) as raised:
        function(*arguments)
    assert "\n" not in str(raised.value)
    for word in named:
        assert word in str(raised.value), raised.value


def changed_array(path, name, change):
    arrays = {key: np.array(array) for key, array in open_npz(path).items()}
    arrays[name] = change(arrays[name])
    forger.write_arrays(path, arrays)


def first(value, dtype=None):
    def change(array):
        array = array.astype(dtype or array.dtype)
        array.reshape(-1)[0] = value
        return array

    return change


ARRAYS = [
    ("y", first(0.5, np.float64)),
    ("y", first(np.nan, np.float64)),
    ("counts", first(40.5, np.float64)),
    ("counts", first(-5)),
    ("counts", first(2**63 + 5, np.uint64)),
    ("days", first(-1)),
    ("days", lambda days: days + 0.5),
    ("days", lambda days: days.astype(np.uint64) - np.uint64(2**63)),
    ("weights", lambda _: np.full(4000, -1.0)),
    ("X_cat", lambda ids: ids.astype(np.complex64)),
]


@pytest.mark.parametrize("case", range(len(ARRAYS)))
def test_processed_arrays(files, case):
    name, change = ARRAYS[case]
    if name == "weights":
        arrays = dict(open_npz(files / "p.npz"))
        write_npz(files / "p.npz", {**arrays, "weights": np.ones(4000, np.float32)})
    changed_array(files / "p.npz", name, change)
    refused(["p.npz", name.removesuffix("s")], load_processed, files / "p.npz")


@pytest.mark.parametrize(
    ("manifest", "field"),
    [
        ({"table_columns": 5}, "table_columns"),
        ({"table_columns": [{"name": []}]}, "table_columns[0].name"),
        ({"num_rows": 3999}, "num_rows"),
        ({"options": {"min_count": 0.5}}, "options.min_count"),
        ({"sub_sampling": None}, "sub_sampling"),
        ({"sources": forger.nested(600)}, "nested"),
        ({"num_lines": 10**400}, "64 bits"),
    ],
)
def test_manifests(files, manifest, field):
    arrays = dict(open_npz(files / "p.npz"))
    write_npz(files / "p.npz", {**arrays, "manifest": pack_manifest(manifest)})
    refused(["p.npz: manifest: ", field], load_processed, files / "p.npz")


ROWS = [
    ("slot_of_row", lambda slots: slots.astype(np.float64)),
    ("slot_of_row", lambda slots: np.concatenate([slots[:1], slots[:-1]])),
    ("slot_of_row", lambda slots: slots.astype(np.uint64) + np.uint64(2**63)),
    ("access_counts", first(-5)),
    ("counts", lambda counts: counts.astype(np.float64)),
    ("num_hot", lambda num: num.astype(np.float64) + 0.5),
    ("num_hot", lambda num: num + 1),
    ("lambda", lambda share: share + 2),
]
SETS = [
    ("X_int", lambda dense: dense[:, :-1]),
    ("X_int", lambda dense: dense.astype(np.float32)),
    ("slots", lambda slots: slots.astype(np.float32)),
    ("slots", first(-5)),
    ("days", lambda days: np.append(days, days[-1])),
    ("days", lambda days: days.astype(np.float64)),
    ("y", lambda labels: labels.astype(np.float16)),
]


@pytest.mark.parametrize("case", range(len(ROWS) + len(SETS)))
def test_segregated_arrays(files, case):
    folder, name = files / "hot_cold", "embedding_rows.npz"
    array, change = (ROWS + SETS)[case]
    if case >= len(ROWS):
        name = "train_cold.npz"
    changed_array(folder / name, array, change)
    forger.mend_sets(folder)
    named = {"slots": "", "y": ""}.get(array, array)  # said of a category, of labels
    refused([name, named], load_segregated, folder)


def test_times(files):
    (files / "hot_cold/times.json").write_text('{"seconds": "x"}')
    refused(["times.json: seconds"], load_segregated, files / "hot_cold")


FIELDS = [
    ("identity.run.the drop rule", "x"),
    ("identity.model.--arch-mlp-bot", "13-32"),
    ("network.name", "other"),
    ("values.trainer.progress.step", 64),
    ("values.trainer.progress.samples", 10**6),
    ("values.trainer.progress.samples", 5),
    ("values.trainer.progress.dropped", 7),
    ("values.trainer.progress.epoch", 1),
    ("values.trainer.progress.drops.0.epoch", 5),
    ("values.trainer.settled_step", 10**6),
    ("values.trainer.window", 0.5),
    ("values.trainer.loss_weight", float("nan")),
    ("values.trainer.clocks", {"training_s": -1}),
    ("values.plan.next", [31, 64]),
    ("values.plan.position", 3),
    ("values.plan.mixed", [3, 3]),
    ("values.plan.num_replaced", [0, 0]),
    ("values.plan.num_trained", [64, 64]),
    ("values.rule.choices", 2),
    ("values.rule.targets", [10**6]),
    ("values.rule.next_start", None),
    ("values.rule.next_start", 0.123),
    ("values.rule.snapshot_at", 5),
    ("values.step.optimizer", []),
]
STATES = [
    ("rows", first(np.nan), "rows holds NaN"),
    ("step.network.top_l.0.bias", first(np.nan), "top_l.0.bias holds NaN"),
    ("step.optimizer.exp_avg_sq.top_l.0.bias", first(-1.0), "below 0"),
    ("step.optimizer.step.top_l.0.bias", first(0.5), "whole number"),
    ("step.network.top_l.0.bias", lambda bias: bias.astype(np.float64), "top_l.0.bias is of"),
    ("rule.pool", first(-5), "rule.pool"),
    ("rule.pool", lambda pool: pool[:-1], "plan"),
    ("rule.pool", lambda pool: pool.astype(np.float64), "rule.pool"),
    ("plan.hot_inputs", lambda inputs: np.append(inputs[:-1], inputs[:1]), "twice"),
    ("random.cpu", lambda state: state[:-1], "RNG state"),
]


@pytest.mark.parametrize("case", range(len(FIELDS) + len(STATES)))
def test_checkpoints(files, case):
    """What a checkpoint holds is compared as it is opened, or as it is gone on from."""
    path = find_checkpoint(files / "m").folder
    described = json.loads((path / "checkpoint.json").read_text())
    said = ""
    if case < len(FIELDS):
        place, value = FIELDS[case]
        keys = [int(key) if key.isdecimal() else key for key in place.split(".")]
        described = forger.with_value(described, keys, value)
    else:
        name, change, said = STATES[case - len(FIELDS)]
        changed_array(path / "state.npz", name, change)
    forger.mend_checkpoint(path, described)
    refused([str(path), said], go_on, files)


def test_json():
    for text, said in (
        (b"[" * 100_000, "nested"),
        (b"[" * 600 + b"]" * 600, "nested"),
        (b"1" * 400, "64 bits"),
        (b"[1e999]", "64 bits"),
        (b"[NaN]", "NaN"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'"\xff"', "utf-8"),
        (b"", "Expecting value"),
    ):
        with pytest.raises(ValueError, match=said):
            decode_json(text)


def test_other_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"[1]")
    refused(["x.json", "expected object"], read_json, path)
    deep = "[" * 3000 + "]" * 3000
    for name, text in (("c.json", deep), ("c.yaml", deep), ("c.yml", "label: &a [*a]")):
        (tmp_path / name).write_text(text)
        refused([name], read_column_file, tmp_path / name)
    bomb = "a0: &a0 [1, 1]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    (tmp_path / "bomb.yaml").write_text(bomb)
    refused(["bomb.yaml", "more than"], read_column_file, tmp_path / "bomb.yaml")
    (tmp_path / "log.txt.json").write_text(deep)
    assert source_notes(tmp_path / "log.txt", []) == {}  # whoever left it
    start, end = {"kind": "start", "method": "fae"}, {"kind": "summary", "auc": "0.7"}
    refused(["log.jsonl, line 2: auc"], check_records, [start, end], tmp_path / "log.jsonl")
