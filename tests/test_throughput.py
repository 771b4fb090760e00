import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, TABLE_SIZES, click_model, dlrm

from bench import plain_dlrm, throughput
from bench.turns import parse_method
from dlrm_data_pytorch import baseline_data, load_processed
from slipstream.tools import cli
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.evaluation import evaluate, logits_of
from slipstream.training.optimizers import make_optimizer
from slipstream.training.rows import initial_rows
from slipstream.training.step import TrainStep

BOT, TOP = [3, 16, 8], [16, 1]
WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def test_the_yardstick_is_the_same_model(processed):
    """Plain PyTorch and the engine, the same 40 mini-batches: equal weights, equal evaluation."""
    prepared = baseline_data(load_processed(processed))
    train, test = prepared.data.cold, prepared.data.test
    plain_model = plain_dlrm.PlainDLRM(BOT, TOP, TABLE_SIZES.tolist(), 1)
    plain = plain_dlrm.PlainTraining(plain_model, 0.2, 64)
    model = dlrm(BOT, TOP, len(TABLE_SIZES), seed=1)
    rows = initial_rows(TABLE_SIZES.tolist(), 8, None, 1)
    table = EmbeddingTable(rows, len(rows), 64 * 5, torch.device("cpu"))
    step = TrainStep(click_model(model, len(TABLE_SIZES)), table, make_optimizer(model, "sgd"), 64)
    dataset = plain_dlrm.ClickDataset(train)
    seen = 0
    for start in range(0, 40 * 64, 64):
        chosen = torch.arange(start, start + 64)
        plain.step(dataset[chosen])
        dense, slots, labels = train.batch(chosen.numpy())
        step(dense, table.enter(table.stage(slots)), labels, None, 0.2)
        seen += len(labels)
    learned = torch.cat([bag.weight for bag in plain_model.rows.tables]).detach()
    torch.testing.assert_close(learned, table.read(slice(None))["rows"], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(learned, initial_rows(TABLE_SIZES.tolist(), 8, None, 1), atol=1e-3)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(plain_model.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    expected = evaluate(partial(logits_of, click_model(model, len(TABLE_SIZES)), table), test, 100)
    got = plain_dlrm.evaluate(plain_model, plain_dlrm.ClickDataset(test), 100)
    assert got["auc"] == pytest.approx(expected["auc"], abs=1e-3)
    assert got["log_loss"] == pytest.approx(expected["log_loss"], abs=1e-4)


def test_an_epoch_of_the_yardstick_holds_every_input_once(processed):
    train = load_processed(processed).splits()[0]
    dataset = plain_dlrm.ClickDataset(train)
    dataset.dense[:, 0] = torch.arange(len(train))
    batches = list(plain_dlrm.batches(dataset, 100, 1, 0, False))
    seen = torch.cat([dense[:, 0] for dense, _, _ in batches]).long()
    assert sorted(seen.tolist()) == list(range(len(train))) != seen.tolist()
    dense, ids, labels = batches[3]
    chosen = dense[:, 0].long().numpy()
    assert np.array_equal(ids.t().numpy(), train.categories[chosen])
    assert np.array_equal(labels.numpy(), train.labels[chosen])


def test_methods_are_read():
    assert parse_method("fae+budget=500+bf16") == ("fae", {"bf16"}, 500)
    assert parse_method("plain+bf16+hybrid") == ("plain", {"bf16", "hybrid"}, None)
    wrong = ["other", "fae+fast", "plain+hot", "plain+budget=7", "baseline+tuned", "baseline+hot"]
    for method in [*wrong, "fae+bf16+tf32", "plain+hybrid+gpu", "fae+budget=0"]:
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            parse_method(method)


@pytest.mark.parametrize(
    ("method", "by_user", "expected"),
    [
        ("plain+bf16", None, None),
        ("plain+tuned", None, "1000"),
        ("fae", None, "1000"),
        ("plain", "1000", "1000"),
    ],
)
def test_only_plain_pytorch_is_started_without_our_wait(monkeypatch, method, by_user, expected):
    monkeypatch.setenv(throughput.WAIT, "1000")
    monkeypatch.setattr(throughput, "WAIT_OF_USER", by_user)
    with throughput.usual_thread_wait(method):
        assert os.environ.get(throughput.WAIT) == expected
    assert os.environ[throughput.WAIT] == "1000"


def test_what_the_user_set_is_read_and_torch_loaded_before_ours_is_set():
    """Else plain PyTorch's process, which imports the module again, would have ours after all."""
    code = "import os; from bench.throughput import WAIT, WAIT_OF_USER as user"
    clean = {name: value for name, value in os.environ.items() if name not in WAITS}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(user, os.environ[WAIT])"],
        cwd=REPOSITORY,
        env={**clean, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["None", "1000"]
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr) == ["300000"]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("throughput", ["--methods", "fae+quick"], "fae takes no quick"),
        ("throughput", ["--processed-data-file", "no.npz"], "does not exist"),
        ("throughput", ["--processed-data-file", "LOG", "--mini-batch-size", "9999"], "too few"),
        ("plain_dlrm", ["--processed-data-file", "LOG", "--arch-mlp-bot", "7-8"], "3 dense"),
        ("plain_dlrm", ["--processed-data-file", "LOG", "--arch-mlp-top", "7-8"], "expected 1"),
        ("gpu_check", ["--device", "cpu", "--rows", "100"], "at least 6,000"),
    ],
)
def test_bad_input_is_one_line(processed, capsys, script, flags, message):
    flags = [str(processed) if flag == "LOG" else flag for flag in flags]
    main = importlib.import_module(f"bench.{script}").main
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: main(flags))
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0], errors


def test_throughput_of_all_methods(tmp_path, capfd, monkeypatch):
    """Every method consumes the log once; the file holds what the table shows; one that fails costs
    no other. Plain PyTorch's threads wait as they would without us.
    """
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv(throughput.WAIT, "1000")
    monkeypatch.setattr(throughput, "WAIT_OF_USER", None)
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    methods = ["plain", "plain+bf16+tuned", "baseline", "fae", "slipstream"]
    flags = f"--rows 7000 --work-dir {tmp_path} --output-dir {tmp_path} --mini-batch-size 64"
    flags += " --hot-emb-gpu-mem 100000 --block-samples 640 --device cpu --num-threads 1"
    fails = [] if torch.cuda.is_available() else ["plain+gpu"]
    flags = [*flags.split(), "--seconds-alone", "0.05", "--methods", *fails, *methods]
    with (
        pytest.raises(ValueError, match=r"failed, see above: plain\+gpu")
        if fails
        else nullcontext()
    ):
        throughput.main(flags)
    [path] = tmp_path.glob("throughput_kaggle_*.json")
    results = json.loads(path.read_text())["sizes"]["64"]
    assert list(results["failed"]) == fails
    shown, errors = capfd.readouterr()
    # Those of plain, and of matrix products, plain+bf16+tuned and three engines.
    waits = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", errors)
    assert sorted(waits) == ["1000"] * 5 + ["300000"] * len([*fails, "plain"])
    for method in methods:
        row = results[method]
        assert row["trained_per_s"]["p10"] <= row["trained_per_s"]["p50"] and method in shown
        assert row["consumed_per_s"] > 0 and row["loader"]["p50"] > row["step"]["p50"]
    assert results["slipstream"]["num_blocks"] < results["fae"]["num_blocks"] == 12
    phases = results["fae"]["phases_ms"]
    assert phases["step"] > phases["forward"] > 0 and phases["gather"] > 0
    assert results["floor"]["fp32"]["products_ms"] > 0


def test_what_was_measured_before_a_signal_is_kept(tmp_path, capsys, monkeypatch):
    """The table and the file are of the blocks so far; no other size is begun."""
    plain, turns = throughput.ask, iter(range(1000))

    def ask(*values):
        if next(turns) == 3:  # alone, and two blocks, came before
            for _ in range(2):  # as `timeout` does
                os.kill(os.getpid(), signal.SIGTERM)
        return plain(*values)

    monkeypatch.setattr(throughput, "ask", ask)
    flags = f"--rows 7000 --work-dir {tmp_path} --output-dir {tmp_path} --mini-batch-size 64 32"
    flags += " --block-samples 640 --device cpu --num-threads 1 --seconds-alone 0.01"
    with pytest.raises(SystemExit) as stopped:
        throughput.main([*flags.split(), "--methods", "baseline"])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at mini-batch 64" in capsys.readouterr().out
    [path] = tmp_path.glob("throughput_kaggle_*.json")
    sizes = json.loads(path.read_text())["sizes"]
    assert list(sizes) == ["64"] and sizes["64"]["baseline"]["num_blocks"] == 2
