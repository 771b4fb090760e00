"""Bad input gets one clear line, exit status 2, no traceback and no file left behind."""

import os
from pathlib import Path

import numpy as np
import pytest
from helpers import MODEL_FLAGS, run_script, segregate_small, write_processed

import data_utils
import dlrm_s_pytorch
import fae_train
import input_segregation
import slipstream_train
from slipstream.tools import cli
from slipstream.tools.npz import NpzWriter

GOOD_LINE = "\t".join(["0", *["1"] * 13, *["1a"] * 26])
LINES = {
    "39_columns": (GOOD_LINE.rpartition("\t")[0], "line 21: 39 columns; expected 40"),
    "41_columns": (GOOD_LINE + "\tff", "line 21: 41 columns; expected 40"),
    "zz": (GOOD_LINE[:-2] + "zz", "line 21, column 40 (category 26): 'zz' is not a hexadecimal"),
    "label_7": ("7" + GOOD_LINE[1:], "line 21: label '7'; expected 0 or 1"),
    "nan": ("0\tnan" + GOOD_LINE[3:], "line 21, column 2 (integer 1): 'nan' is not a whole number"),
    "huge": ("0\t9999999999" + GOOD_LINE[3:], "is more than 2147483647"),
}


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def refuse(tmp_path, capsys, monkeypatch):
    """Run a script's main as its command line does; return the one line it says."""

    def run(script, *flags):
        monkeypatch.chdir(tmp_path)
        before = files_below(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.run_script(lambda: script.main([str(flag) for flag in flags]))
        assert stopped.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and "error: " in lines[0], lines
        assert files_below(tmp_path) == before
        assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]
        return lines[0]

    return run


@pytest.mark.parametrize("name", LINES)
def test_bad_lines_of_a_raw_log(refuse, tmp_path, name):
    bad, message = LINES[name]
    (tmp_path / "train.txt").write_text(
        "\n".join([GOOD_LINE] * 20 + [bad] + [GOOD_LINE] * 5) + "\n"
    )
    said = refuse(data_utils, "--raw-data-file", tmp_path / "train.txt")
    assert "train.txt" in said and message in said


def test_missing_and_empty_raw_logs(refuse, tmp_path):
    assert "does not exist" in refuse(data_utils, "--raw-data-file", tmp_path / "none.txt")
    (tmp_path / "train.txt").touch()
    assert "is empty" in refuse(data_utils, "--raw-data-file", tmp_path / "train.txt")


def test_a_processed_file_of_another_script_is_not_replaced(refuse, tmp_path):
    (tmp_path / "train.txt").write_text((GOOD_LINE + "\n") * 20)
    np.savez_compressed(
        tmp_path / "old.npz",
        **dict.fromkeys(("X_int", "X_cat", "y", "counts", "days"), np.zeros(3)),
    )
    flags = [
        "--raw-data-file",
        tmp_path / "train.txt",
        "--processed-data-file",
        tmp_path / "old.npz",
    ]
    assert "was not made by data_utils.py" in refuse(data_utils, *flags)
    np.savez_compressed(tmp_path / "old.npz", X_int=np.zeros(3))
    assert "was not made by data_utils.py" in refuse(data_utils, *flags)


@pytest.mark.parametrize("rate", ["1e6", "1e30"])
def test_a_diverged_run_says_so(segregated, tmp_path, rate):
    flags = [*MODEL_FLAGS, "--segregated-data-dir", str(segregated), "--learning-rate", rate]
    with pytest.raises(ValueError, match="lower --learning-rate"):
        slipstream_train.main([*flags, "--runs-dir", str(tmp_path), "--run-name", "a"])
    assert (tmp_path / "a/log.jsonl").read_text().startswith('{"kind": "start"')


def scripts_and_flags(path):
    """Each script that reads an .npz or a folder of them, with the flag that names `path`."""
    return [
        (input_segregation, ["--processed-data-file", path]),
        (dlrm_s_pytorch, ["--processed-data-file", path, *MODEL_FLAGS]),
    ]


@pytest.mark.parametrize("index", [0, 1])
def test_processed_files(refuse, tmp_path, processed, index):
    script, flags = scripts_and_flags(processed)[index]
    whole = processed.read_bytes()
    processed.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refuse(script, *flags)
    processed.write_bytes(b"0\t1\t2\n" * 100)
    assert "not an .npz" in refuse(script, *flags)
    np.savez(processed, X=np.zeros(3), y=np.zeros(3))
    assert "has keys X, y; expected also X_int, X_cat, counts" in refuse(script, *flags)
    processed.unlink()
    assert "does not exist" in refuse(script, *flags)


@pytest.mark.parametrize("script", [fae_train, slipstream_train])
def test_segregated_folders(refuse, tmp_path, processed, script):
    folder = segregate_small(processed)
    flags = ["--segregated-data-dir", folder, *MODEL_FLAGS]
    assert "is not a folder" in refuse(script, "--segregated-data-dir", tmp_path / "none")
    other = write_processed(tmp_path / "other.npz", seed=5)
    said = refuse(script, *flags, "--processed-data-file", other)
    assert "was not made from" in said and "run input_segregation.py" in said
    said = refuse(script, *flags, "--optimizer", "rwsadagrad")
    assert "fills its budget of 3840 bytes" in said
    hot = folder / "train_hot.npz"
    hot.write_bytes(hot.read_bytes()[:-100])
    assert "train_hot.npz is truncated" in refuse(script, *flags)
    hot.unlink()
    assert "train_hot.npz does not exist" in refuse(script, *flags)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (slipstream_train, "--drop-percentage 130", "at least 0 and at most 100"),
        (slipstream_train, "--drop-percentage nan", "expected a number"),
        (slipstream_train, "--alpha 0", "more than 0 and at most 1"),
        (slipstream_train, "--alpha 1.5", "more than 0 and at most 1"),
        (slipstream_train, "--sample-rate 0", "more than 0"),
        (slipstream_train, "--threshold -1", "at least 0"),
        (slipstream_train, "--drop-policy best", "got 'best'; expected stale, random,"),
        (slipstream_train, "--stratify-drop maybe", "expected true or false"),
        (slipstream_train, "--snapshot-start 0.9 --snapshot-window 0.2", "must be below 1"),
        (slipstream_train, "--segregated", "unrecognized arguments"),
        (fae_train, "--mini-batch-size 0", "a whole number, at least 1"),
        (fae_train, "--mini-batch-size 1.5", "a whole number, at least 1"),
        (fae_train, "--learning-rate inf", "expected a number"),
        (fae_train, "--arch-mlp-bot 13-512-x", "expected sizes like"),
        (fae_train, "--arch-mlp-bot 13-32", "expected 16"),
        (fae_train, "--arch-mlp-top 512-2", "expected 1"),
        (
            fae_train,
            "--lr-decay-start-step 3 --lr-num-warmup-steps 5 --lr-num-decay-steps 9",
            "over",
        ),
        (slipstream_train, "--stale-keep-rate 0.5 --recalibrate-every 0.2", "exclude each other"),
    ],
)
def test_impossible_flags(refuse, tmp_path, script, flags, message):
    said = refuse(script, "--segregated-data-dir", tmp_path, *flags.split())
    assert message in said and flags.split()[0] in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hot-emb-gpu-mem 0", "expected bytes, more than 0"),
        ("--hot-threshold 0", "more than 0 and at most 1"),
        ("--ip-sampling-rate 0", "more than 0 and at most 100"),
        ("--ip-sampling-rate 101", "more than 0 and at most 100"),
    ],
)
def test_impossible_segregation(refuse, processed, flags, message):
    assert message in refuse(input_segregation, "--processed-data-file", processed, *flags.split())


def test_impossible_runs(refuse, processed, tmp_path):
    flags = ["--processed-data-file", processed, *MODEL_FLAGS]
    assert "is needed" in refuse(dlrm_s_pytorch)
    said = refuse(dlrm_s_pytorch, "--data-generation", "random", "--processed-data-file", processed)
    assert "goes with" in said
    said = refuse(dlrm_s_pytorch, *flags, "--arch-mlp-bot", "4-8")
    assert "the data have 3 dense features" in said
    assert "expected 0 to 1348" in refuse(dlrm_s_pytorch, *flags, "--num-resident", "2000")
    said = refuse(dlrm_s_pytorch, *flags, "--load-model", tmp_path / "model")
    assert "no checkpoint in" in said
    assert "--save-model" in refuse(dlrm_s_pytorch, *flags, "--load-model", "auto")
    assert "--val-freq" in refuse(dlrm_s_pytorch, *flags, "--mlperf-auc-threshold", "0.8")
    said = refuse(dlrm_s_pytorch, *flags, "--inference-only", "true")
    assert "needs --load-model" in said


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="has a GPU")
def test_cuda_without_a_device(refuse, processed):
    said = refuse(
        dlrm_s_pytorch, "--processed-data-file", processed, *MODEL_FLAGS, "--device", "cuda"
    )
    assert "use --device cpu or auto" in said


def test_a_full_disk_leaves_nothing(refuse, processed, monkeypatch):
    """The write fails with ENOSPC half-way; nothing that a later run would trust remains."""
    append = NpzWriter.append

    def failing(writer, name, array):
        if name == "slots":
            raise OSError(28, "No space left on device", "train_hot.npz")
        append(writer, name, array)

    monkeypatch.setattr(NpzWriter, "append", failing)
    said = refuse(input_segregation, "--processed-data-file", processed)
    assert "No space left on device" in said


def test_as_a_process(tmp_path):
    """The same through a real command line."""
    for script, flags in (
        ("dlrm_s_pytorch.py", ["--processed-data-file", tmp_path / "none.npz"]),
        ("input_segregation.py", ["--processed-data-file", "x.npz", "--hot-emb-gpu-mem", "0"]),
    ):
        status, out, err = run_script(script, *flags)
        assert (
            status == 2 and out == "" and len(err) == 1 and err[0].startswith(f"{script}: error: ")
        )
