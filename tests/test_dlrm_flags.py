"""Command lines of DLRM, FAE and Slipstream's original code, as people paste them."""

import json
import os
import shlex

import numpy as np
import pytest
import torch
from helpers import MODEL_FLAGS, TABLE_SIZES, saved_rows, segregate_small, write_processed
from test_data_utils import write_log

import data_utils
import dlrm_s_pytorch
import fae_train
import input_segregation
import slipstream_train
from bench import convert_dlrm
from slipstream.logs.processed import Lookups, generated_log
from slipstream.tools import cli
from slipstream.tools.foreign import Foreign, Refused, translate
from slipstream.training import dlrm_flags
from slipstream.training.staleness import num_stale_rows_needed

# Every flag of DLRM's trainer, with a value that its lines give it; None: it stands alone.
DLRM = {
    "--arch-sparse-feature-size": "16",
    "--arch-embedding-size": "4-3-2",
    "--arch-mlp-bot": "13-512-256-64-16",
    "--arch-mlp-top": "512-256-1",
    "--arch-interaction-op": "dot",
    "--arch-interaction-itself": None,
    "--weighted-pooling": "fixed",
    "--md-flag": None,
    "--md-threshold": "200",
    "--md-temperature": "0.3",
    "--md-round-dims": None,
    "--qr-flag": None,
    "--qr-threshold": "200",
    "--qr-operation": "mult",
    "--qr-collisions": "4",
    "--activation-function": "relu",
    "--loss-function": "bce",
    "--loss-weights": "1.0-1.0",
    "--loss-threshold": "0.0",
    "--round-targets": "True",
    "--data-size": "1000",
    "--num-batches": "10",
    "--data-generation": "dataset",
    "--rand-data-dist": "uniform",
    "--rand-data-min": "0",
    "--rand-data-max": "1",
    "--rand-data-mu": "-1",
    "--rand-data-sigma": "1",
    "--data-trace-file": "./input/dist_emb_j.log",
    "--data-set": "kaggle",
    "--raw-data-file": "train.txt",
    "--processed-data-file": "p.npz",
    "--data-randomize": "total",
    "--data-trace-enable-padding": "False",
    "--max-ind-range": "-1",
    "--data-sub-sample-rate": "0.0",
    "--num-indices-per-lookup": "1",
    "--num-indices-per-lookup-fixed": "False",
    "--num-workers": "0",
    "--memory-map": None,
    "--mini-batch-size": "128",
    "--nepochs": "1",
    "--learning-rate": "0.1",
    "--print-precision": "5",
    "--numpy-rand-seed": "123",
    "--sync-dense-params": "True",
    "--optimizer": "sgd",
    "--dataset-multiprocessing": None,
    "--inference-only": None,
    "--quantize-mlp-with-bit": "32",
    "--quantize-emb-with-bit": "32",
    "--save-onnx": None,
    "--use-gpu": None,
    "--local_rank": "-1",
    "--dist-backend": "",
    "--print-freq": "1024",
    "--test-freq": "-1",
    "--test-mini-batch-size": "-1",
    "--test-num-workers": "-1",
    "--print-time": None,
    "--print-wall-time": None,
    "--debug-mode": None,
    "--enable-profiling": None,
    "--plot-compute-graph": None,
    "--tensor-board-filename": "run_kaggle_pt",
    "--save-model": "",
    "--load-model": "",
    "--mlperf-logging": None,
    "--mlperf-acc-threshold": "0.0",
    "--mlperf-auc-threshold": "0.0",
    "--mlperf-bin-loader": None,
    "--mlperf-bin-shuffle": None,
    "--mlperf-coalesce-sparse-grads": None,
    "--mlperf-grad-accum-iter": "1",
    "--lr-num-warmup-steps": "0",
    "--lr-decay-start-step": "0",
    "--lr-num-decay-steps": "0",
}
REFUSED = {
    *("--weighted-pooling", "--md-flag", "--qr-flag", "--data-trace-file"),
}
NAMES_A_FILE = {"--save-onnx", "--plot-compute-graph"}  # here
ORIGINAL = {
    "--train-hot-file": "input/train_hot.npz",
    "--train-normal-file": "input/train_normal.npz",
    "--hot-emb-dict-file": "input/hot_emb_dict.npz",
    "--avazu-db-path": "x",
    "--avazu-train-file": "x",
    "--avazu-test-file": "x",
    "--cluster_forming_threshold": "1e-7",
    "--sample_rate": "0.001",
    "--confidence_rate": "0.8",
    "--minibatch_percentage": "0.03",
    "--starting_minibatch": "100",
    "--non_changing_index": "13",
    "--target_drop_percentage": "0.3",
}


@pytest.mark.parametrize("spelling", ["=", " "])
@pytest.mark.parametrize("name", DLRM)
def test_every_flag_of_dlrm_is_taken_noted_or_refused(name, spelling, capsys):
    value = DLRM[name]
    if value == "" and spelling == " ":
        pytest.skip("an empty value stands behind =")
    words = ["--processed-data-file", "p.npz"]
    words += [name] if value is None else f"{name}{spelling}{value}".split(" ", 1)
    if name == "--inference-only":
        words += ["--load-model", "m"]
    if name == "--tensor-board-filename":
        pytest.importorskip("tensorboard")
    if name in NAMES_A_FILE:
        with pytest.raises(SystemExit) as stopped:
            dlrm_s_pytorch.parse_args(words)
        assert stopped.value.code == 2
        assert f"{name}: expected one argument" in capsys.readouterr().err
        return
    if name in REFUSED:
        with pytest.raises(SystemExit) as stopped:
            dlrm_s_pytorch.parse_args(words)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and "is not here: " in said
        return
    dlrm_s_pytorch.parse_args(words)
    said = capsys.readouterr().out
    hyphened = name.replace("_", "-")
    with pytest.raises(SystemExit):
        dlrm_s_pytorch.parse_args(["--help"])
    own = f"  {hyphened}" in capsys.readouterr().out  # foreign ones are not in it
    noted = not own and value not in dlrm_flags.TRAINERS[hyphened].harmless
    assert said.count("note: ") == noted, said


@pytest.mark.parametrize("word", ["--dist-backend=nccl", "--local_rank=1"])
def test_what_asks_for_several_processes_is_told_how(word, capsys):
    with pytest.raises(SystemExit):
        dlrm_s_pytorch.parse_args(["--processed-data-file", "p.npz", word])
    assert "--processes N, or under torchrun" in capsys.readouterr().err


def test_the_originals_flags_become_ours(capsys):
    words = [f"{name}={value}" for name, value in ORIGINAL.items()]
    args = slipstream_train.parse_args(["--segregated-data-dir", "x", *words])
    assert (args.snapshot_window, args.snapshot_start) == (0.03, (0.0, 100))
    assert (args.alpha, args.drop_percentage, args.sample_rate) == (0.5, 30, 0.001)
    said = capsys.readouterr().out
    assert said.count("note: ") == len(ORIGINAL) - 1  # --sample-rate is ours
    assert "note: --target-drop-percentage=0.3: --drop-percentage=30" in said


@pytest.mark.parametrize("needed", range(1, 27))
def test_alpha_is_the_originals_count(needed):
    words = ["--segregated-data-dir", "x", "--non_changing_index", str(needed)]
    assert num_stale_rows_needed(slipstream_train.parse_args(words).alpha, 26) == needed


def test_a_start_in_mini_batches(processed, tmp_path):
    """100 hot mini-batches, as the original counts, are a share of the epoch's hot inputs."""
    folder = segregate_small(processed)
    words = ["--segregated-data-dir", folder, "--runs-dir", tmp_path, *MODEL_FLAGS]
    words += ["--drop-min-steps", 0, "--snapshot-window", 0.05]

    def hot_left(*flags):
        summary = slipstream_train.main([str(word) for word in (*words, *flags)])
        return summary["drops"][0]["hot_remaining"], summary["drops"][0]["hot_inputs"]

    left, hot = hot_left("--starting_minibatch", 10)
    assert left == pytest.approx(hot - 10 * 32 - 0.05 * hot, abs=2 * 32)
    with pytest.raises(ValueError, match="nothing would be left to drop"):
        hot_left("--starting_minibatch", 100_000)


KAGGLE = (
    "--arch-sparse-feature-size=16 --arch-mlp-bot=13-512-256-64-16 --arch-mlp-top=512-256-1 "
    "--data-generation=dataset --data-set=kaggle --raw-data-file=RAW --processed-data-file=NPZ "
    "--loss-function=bce --round-targets=True --learning-rate=0.1 --mini-batch-size=128 "
    "--print-freq=1024 --print-time --test-mini-batch-size=16384 --test-num-workers=16"
)
RANDOM = (
    "--num-batches=20 --data-generation=random --arch-mlp-bot=12-8-4 --arch-mlp-top=16-1 "
    "--arch-sparse-feature-size=4 --arch-embedding-size=100-50-10 --num-indices-per-lookup=7 "
    "--arch-interaction-op=dot --numpy-rand-seed=727 --print-freq=100 --print-time "
    "--mini-batch-size=64 --test-mini-batch-size=16384 --test-num-workers=0 --enable-profiling"
)


def test_the_published_lines_run(tmp_path, capsys):
    """Preprocessed first, then trained as DLRM does; FAE's and Slipstream's from the same log."""
    raw, npz = tmp_path / "train.txt", tmp_path / "kaggle_processed.npz"
    write_log(raw, 1400, seed=1)
    line = KAGGLE.replace("RAW", str(raw)).replace("NPZ", str(npz))
    runs = ["--runs-dir", str(tmp_path / "runs")]
    dlrm_s_pytorch.main([*shlex.split(line), *runs, "--run-name", "a"])
    said = capsys.readouterr().out
    assert "learning rates: rows 0.1 (sgd), network 0.1 (sgd)\n" in said  # and no decay
    assert npz.exists()
    raw.unlink()  # it is not needed any more
    kept = ["--save-model", str(tmp_path / "m"), "--use-gpu", "--memory-map"]
    first = dlrm_s_pytorch.main([*shlex.split(line), *runs, *kept])
    assert "train.txt is not there; using" in capsys.readouterr().out
    # The checkpoint has the architecture.
    again = ["--inference-only", "--load-model", str(tmp_path / "m")]
    alone = dlrm_s_pytorch.main(["--processed-data-file", str(npz), *again, *runs])
    assert alone["auc"] == first["auc"]
    # Rows of FAE's profiler, and its trainer's: segregated first.
    profiler = line.replace("--print-time", "") + " --hot-emb-gpu-mem=20000 --ip-sampling-rate=50"
    folder = ["--segregated-data-dir", str(tmp_path / "hc"), "--optimizer", "sgd"]
    input_segregation.main([*shlex.split(profiler), *folder])
    trainer = line + " --train-hot-file=hot.npz --train-normal-file=n.npz --hot-emb-dict-file=d.npz"
    fae_train.main([*shlex.split(trainer), *runs, *folder[:2]])
    made = slipstream_train.main([*shlex.split(trainer), "--target_drop_percentage=0.3", *runs])
    assert (tmp_path / "hot_cold_sgd/train_hot.npz").exists()  # it was named nowhere
    assert made["method"] == "slipstream"
    data_utils.parse_args(shlex.split(line))


def test_random_data_of_several_rows_a_lookup(tmp_path, capsys):
    runs = tmp_path / os.fsdecode(b"\xff")  # not UTF-8
    flags = [*shlex.split(RANDOM), "--runs-dir", str(runs), "--run-name", "r", "--debug-mode"]
    summary = {}
    cli.run_script(lambda: summary.update(dlrm_s_pytorch.main(flags)))
    said = capsys.readouterr().out
    assert summary["step"] == 20 and summary["samples"] == 20 * 64
    assert "100 rows, sum of its columns" in said and "DLRM_Net(" in said
    trace = json.loads((runs / "r/trace.json").read_text())
    assert any("addmm" in str(event.get("name")) for event in trace["traceEvents"])
    assert "aten::addmm" in said
    log = generated_log("random", [100, 3], 2000, 2, 1, Lookups(5))
    ids = log.inputs.categories
    assert ids.shape == (2000, 10) and log.layout.features[1].pooling == "sum"
    for table, size in enumerate((100, 3)):
        part = ids[:, 5 * table : 5 * table + 5]
        counts = (part >= 0).sum(1)
        assert counts.min() == 1 and part.max() == size - 1
        assert counts.max() == (5 if size > 5 else size)
        for row in part[:200]:
            present = row[row >= 0]
            assert len(set(present)) == len(present)
    fixed = generated_log("random", [10_000], 500, 2, 1, Lookups(3, True)).inputs.categories
    assert (fixed >= 0).mean() > 0.99
    normal = Lookups(1, False, "gaussian", 10, 30, -1, 3)
    drawn = generated_log("random", [1000], 5000, 2, 1, normal).inputs.categories
    assert drawn.min() >= 10 and drawn.max() <= 30 and abs(drawn.mean() - 19.5) < 0.5
    with pytest.raises(SystemExit):
        dlrm_s_pytorch.parse_args(["--processed-data-file", "x", "--rand-data-mu", "3"])
    assert "goes with --data-generation random" in capsys.readouterr().err


def test_weights_of_labels_and_least_probability(processed, tmp_path):
    """Against the loss by hand: of one step from the same weights."""
    words = ["--processed-data-file", str(processed), "--runs-dir", str(tmp_path), *MODEL_FLAGS]
    words += ["--num-batches", "1", "--test-freq", "1", "--learning-rate", "1e-30"]

    def loss(*flags):
        return dlrm_s_pytorch.main([*words, *flags])["loss"]

    plain = loss()
    wbce, tiny = ["--loss-function", "wbce", "--loss-weights"], "0.000000001"
    halves = [loss(*wbce, pair) for pair in (f"1-{tiny}", f"{tiny}-1")]
    assert sum(halves) == pytest.approx(plain, rel=1e-5) and min(halves) > 0.01
    doubled = loss(*wbce, "2-2")
    assert doubled == pytest.approx(2 * plain, rel=1e-5)
    # All outputs are cut to 1/2 nearly.
    assert loss("--loss-threshold", "0.4999999") == pytest.approx(np.log(2), rel=1e-5)
    summary = dlrm_s_pytorch.main([*words, "--loss-threshold", "0.3"])
    assert -np.log(0.7) <= summary["log_loss"] <= -np.log(0.3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--loss-function mse", "invalid choice: 'mse'"),
        ("--loss-weights 1-2", "goes with --loss-function wbce"),
        ("--loss-function wbce --loss-weights 1", "expected two weights, as 1.0-2.5"),
        ("--mlperf-grad-accum-iter=4", "take a larger --mini-batch-size"),
        ("--quantize-emb-with-bit=8", "is not here: rows are fp32"),
        ("--activation-function=tanh", "is not here: it is relu"),
        ("--num-workers", "--num-workers: expected a value"),
        ("--rand-data-max nan --data-generation random", "expected a number"),
        ("--mlperf-auc-threshold=0.8", "need --val-freq"),
        ("--test-mini-batch-size=0", "expected inputs, or -1"),
        ("--no-such-flag", "unrecognized arguments"),
    ],
)
def test_what_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        dlrm_s_pytorch.parse_args(["--processed-data-file", "x", *words.split()])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and said in err


def test_thresholds_are_judged_on_validation(capsys):
    words = "--processed-data-file x --mlperf-auc-threshold=0.8 --test-freq=512 --mlperf-logging"
    args = dlrm_s_pytorch.parse_args(words.split())
    assert (args.val_freq, args.test_freq) == (512, 512)
    assert "judged on the validation set: --val-freq 512" in capsys.readouterr().out


def test_a_file_of_pytorch_is_named_for_what_it_is(tmp_path):
    processed = write_processed(tmp_path / "p.npz", 700)
    path = tmp_path / "model.pt"
    torch.save({"state_dict": {}}, path)
    words = ["--processed-data-file", str(processed), "--load-model", str(path), *MODEL_FLAGS]
    for more in ([], ["--inference-only"]):
        with pytest.raises(ValueError, match=r"model.pt is a file, as DLRM's own script writes"):
            dlrm_s_pytorch.main([*words, *more])


def test_a_model_of_dlrms_script_is_converted(processed, tmp_path, capsys):
    """One made of our own weights, as DLRM writes them, gives the same AUC."""
    words = ["--processed-data-file", str(processed), "--runs-dir", str(tmp_path), *MODEL_FLAGS]
    words += ["--arch-interaction-itself", "true"]
    first = dlrm_s_pytorch.main([*words, "--save-model", str(tmp_path / "m")])
    saved = saved_rows(tmp_path / "m")
    state = {
        name.removeprefix("network."): torch.from_numpy(value)
        for name, value in saved.items()
        if name.startswith("network.")
    }
    ends = np.cumsum(TABLE_SIZES)
    for table, (end, size) in enumerate(zip(ends, TABLE_SIZES, strict=True)):
        state[f"emb_l.{table}.weight"] = torch.from_numpy(saved["rows"][end - size : end])
    whole = {"state_dict": state, "iter": 3, "train_acc": np.float64(0.5), "opt_state_dict": {}}
    torch.save(whole, tmp_path / "dlrm.pt")
    files = ["--pt", str(tmp_path / "dlrm.pt"), "--processed-data-file", str(processed)]
    convert_dlrm.main([*files, "--save-model", str(tmp_path / "converted")])
    words = ["--processed-data-file", str(processed), "--inference-only", "--precision", "fp32"]
    words += ["--load-model", str(tmp_path / "converted"), "--runs-dir", str(tmp_path)]
    again = dlrm_s_pytorch.main(words)
    for name in ("auc", "log_loss"):
        assert again[name] == pytest.approx(first[name], rel=1e-6)
    other = write_processed(tmp_path / "q.npz", table_sizes=TABLE_SIZES + 1)
    files[3] = str(other)
    with pytest.raises(ValueError, match="it was trained on another file"):
        convert_dlrm.main([*files, "--save-model", str(tmp_path / "none")])
    (tmp_path / "dlrm.pt").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        convert_dlrm.main([*files, "--save-model", str(tmp_path / "none")])


def test_how_vectors_meet_is_not_guessed():
    """3 tables of dim 2: 6 pairs and 2 values, or 4 vectors side by side."""
    flags = convert_dlrm.interaction_flags
    assert flags(27 * 26 // 2 + 16, 26, 16, None) == []
    assert flags(27 * 28 // 2 + 16, 26, 16, None) == ["--arch-interaction-itself"]
    with pytest.raises(ValueError, match="fits dot and cat; name it by --interaction"):
        flags(8, 3, 2, None)
    assert flags(8, 3, 2, "dot") == [] and flags(8, 3, 2, "cat")[1] == "cat"
    with pytest.raises(ValueError, match="fits no interaction"):
        flags(8, 3, 2, "itself")


def test_a_folder_of_another_data_set_is_not_that_of_its_processed_file(tmp_path):
    write_log(tmp_path / "train.txt", 400, seed=1)
    data_utils.main(["--raw-data-file", str(tmp_path / "train.txt")])
    words = ["--raw-data-file", str(tmp_path), "--data-set", "avazu", "--runs-dir", str(tmp_path)]
    with pytest.raises(FileNotFoundError, match=r"train\.csv does not exist"):
        dlrm_s_pytorch.main(words)


def test_another_log_in_the_same_folder(tmp_path, capsys):
    """Neither an older folder of hot rows is used, nor a seed's own data made."""
    runs = ["--runs-dir", str(tmp_path / "runs"), "--arch-sparse-feature-size", "4"]
    small = ["--arch-mlp-bot", "auto-8-4", "--arch-mlp-top", "8-1", "--num-batches", "3"]
    for name, seed in (("a.txt", 1), ("b.txt", 2)):
        write_log(tmp_path / name, 400, seed=seed)
        raw = ["--raw-data-file", str(tmp_path / name), "--data-sub-sample-rate", "0.5"]
        fae_train.main([*raw, *runs, *small])
        before = (tmp_path / name).with_suffix("").with_name(f"{name[0]}_processed.npz")
        content = before.read_bytes()
        fae_train.main([*raw, *runs, *small, "--seed", "7"])
        assert before.read_bytes() == content


def test_translation():
    table = {
        "--gone": Foreign("--gone", "not needed", -1),
        "--old": Foreign("--old", "", becomes=lambda value: (f"--new={value}",)),
        "--no": Foreign("--no", "use --yes", refuses=True, harmless=("0",)),
    }
    kept, notes = translate(
        ["--a", "1", "--gone", "x", "--gone", "--old", "-3", "--no=0"], ["--a"], table
    )
    assert kept == ["--a", "1", "--new=-3"]
    assert notes == ["--gone=x: not needed", "--gone: not needed", "--old=-3: --new=-3"]
    assert translate(["--no", "1"], ["--no"], table) == (["--no", "1"], [])  # ours by that name
    with pytest.raises(Refused, match="--no=1 is not here: use --yes"):
        translate(["--no", "1"], [], table)
