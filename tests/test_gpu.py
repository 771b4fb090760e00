"""What only a GPU can show; each has a twin on the CPU in another module."""

import re
import shutil

import numpy as np
import pytest
import torch
from helpers import MODEL_FLAGS, run_script, saved_rows, segregate_small
from test_embedding import train as train_table
from test_equivalence import STEPS, train

import dlrm_s_pytorch
import fae_train
import slipstream_train
from dlrm_data_pytorch import load_segregated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA = ["--device", "cuda"]
# Sums in another order, over 200 steps; a row missed or updated twice is far outside.
CLOSE = {"rtol": 1e-2, "atol": 1e-4}


def assert_close(first, second):
    first, second = saved_rows(first), saved_rows(second)
    for name, value in first.items():
        np.testing.assert_allclose(value, second[name], **CLOSE, err_msg=name)


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("num_resident", [0, 20, 50])
def test_the_table_agrees_with_the_cpu(num_resident, optimizer):
    state = train_table(num_resident, optimizer, torch.device("cuda"))
    expected = train_table(50, optimizer)
    torch.testing.assert_close(state["rows"], expected["rows"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("graph", ["true", "false"])
@pytest.mark.parametrize("overlap", ["true", "false"])
def test_any_number_of_resident_rows(processed, tmp_path, overlap, graph, optimizer):
    """Consecutive cold batches share rows, so a row that staging loses or doubles shows."""
    segregated = segregate_small(processed, "--hot-threshold", "0.0005", "--optimizer", optimizer)
    prepared = load_segregated(segregated)
    flags = ["--segregated-data-dir", segregated, "--optimizer", optimizer]
    if optimizer == "rwsadagrad":
        flags += ["--learning-rate", "0.01"]
    train(fae_train, tmp_path, "cpu", *flags)
    for num_resident in (0, prepared.num_hot, len(prepared.slot_of_row)):
        where = ["--num-resident", num_resident, "--overlap", overlap, "--cuda-graph", graph]
        summary = train(fae_train, tmp_path, str(num_resident), *flags, *CUDA, *where)
        assert summary["cuda_graph"] == (graph == "true")
        assert_close(tmp_path / "cpu", tmp_path / str(num_resident))


@pytest.mark.parametrize("device_data", ["true", "false"])
def test_baseline_stages_every_batch_ahead(processed, tmp_path, device_data):
    flags = ["--processed-data-file", processed, "--device-data", device_data]
    train(dlrm_s_pytorch, tmp_path, "cpu", *flags)
    train(dlrm_s_pytorch, tmp_path, "cuda", *flags, *CUDA, "--test-freq", "7")
    assert_close(tmp_path / "cpu", tmp_path / "cuda")


def test_deterministic_runs_have_the_same_bits(segregated, tmp_path):
    flags = ["--segregated-data-dir", segregated, *CUDA, "--deterministic", "true"]
    try:
        for name in ("first", "second"):
            assert train(fae_train, tmp_path, name, *flags)["cuda_graph"]
    finally:
        torch.use_deterministic_algorithms(False)
    first, second = saved_rows(tmp_path / "first"), saved_rows(tmp_path / "second")
    assert all(np.array_equal(value, second[name]) for name, value in first.items())


def test_a_run_that_goes_on_has_the_same_bits(segregated, tmp_path):
    """Deterministic; and it goes on from there on a CPU, too."""
    flags = ["--segregated-data-dir", segregated, "--alpha", "0.5", "--snapshot-window", "0.3"]
    same = [*CUDA, "--deterministic", "true"]
    try:
        train(slipstream_train, tmp_path, "whole", *flags, *same)
        train(slipstream_train, tmp_path, "parts", *flags, *same, "--num-batches", "60")
        shutil.copytree(tmp_path / "parts", tmp_path / "cpu")
        again = ["--load-model", "auto"]
        train(slipstream_train, tmp_path, "parts", *flags, *same, *again)
    finally:
        torch.use_deterministic_algorithms(False)
    whole, parts = saved_rows(tmp_path / "whole"), saved_rows(tmp_path / "parts")
    assert all(np.array_equal(value, parts[name]) for name, value in whole.items())
    train(slipstream_train, tmp_path, "cpu", *flags, *again)
    assert_close(tmp_path / "whole", tmp_path / "cpu")


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_learn_alike(segregated, tmp_path, precision):
    """At a rate at which 200 steps do not make another model of rounding."""
    flags = ["--segregated-data-dir", segregated, *CUDA, "--alpha", "0.5"]
    flags += ["--learning-rate", "0.07"]
    found = {}
    for name in ("fp32", precision):
        summary = train(slipstream_train, tmp_path, name, *flags, "--precision", name)
        assert summary["cuda_graph"]
        found[name] = [summary["auc"], summary["log_loss"]]
    assert found["fp32"] == pytest.approx(found[precision], abs=0.01)
    assert found["fp32"] != found[precision]


def test_peak_memory_is_as_foretold(segregated, tmp_path):
    """At a size at which activations, of which there are most, count; in a process of its own."""
    flags = ["--segregated-data-dir", segregated, *MODEL_FLAGS, *CUDA]
    flags += ["--mini-batch-size", "1000", "--arch-mlp-bot", "3-512-256-8", "--alpha", "0.5"]
    flags += ["--arch-mlp-top", "512-256-1", "--runs-dir", tmp_path]
    _, said, _ = run_script("slipstream_train.py", *flags)
    foretold = re.findall(r"([\d.]+) MB of device memory", said)
    [peak] = re.findall(r"([\d,]+) MB on the device", said)
    assert len(foretold) == 2  # and of the inputs there
    assert 0.5 < float(peak.replace(",", "")) / sum(map(float, foretold)) < 1.1


@pytest.mark.parametrize("where", [[], ["--num-resident", "60"]])
def test_two_ranks_share_a_gpu(segregated, tmp_path, where):
    """By gloo, as NCCL has one rank a device; hot rows alone there, or fewer than a batch's."""
    flags = ["--segregated-data-dir", segregated, *where]
    train(fae_train, tmp_path, "cpu", *flags)
    command = [*MODEL_FLAGS, *STEPS, *flags, *CUDA, "--processes", 2]
    names = ["--runs-dir", tmp_path, "--run-name", "run", "--save-model", tmp_path / "two"]
    status, _, said = run_script("fae_train.py", *command, *names)
    assert status == 0, said
    assert_close(tmp_path / "cpu", tmp_path / "two")
