import importlib.machinery
import multiprocessing
import os
import sys
import types

import numpy as np
import pandas
import pytest
import torch
from helpers import TABLE_SIZES
from torch import nn

from bench import library_runs, other_libraries, throughput
from bench.turns import Enough
from slipstream.logs.processed import load_processed
from slipstream.tools import cli

SMALL = ["--mini-batch-size", "64", "--num-threads", "1"]


class FakeDCN(nn.Module):
    """A logistic regression by the calls that DeepCTR-Torch's models take."""

    def __init__(self, linear, deep, cross_num, dnn_hidden_units, seed):
        super().__init__()
        assert linear == deep
        self.sizes = {name: size for name, size, _ in linear if size > 1}
        self.tables = nn.ModuleDict({name: nn.Embedding(n, 1) for name, n in self.sizes.items()})
        self.bias = nn.Parameter(torch.zeros(1))

    def compile(self, optimizer, loss):
        assert (optimizer, loss) == ("adam", "binary_crossentropy")
        self.optim = torch.optim.Adam(self.parameters(), lr=0.05)

    def forward(self, x):
        ids = [table(torch.from_numpy(x[name]).long()) for name, table in self.tables.items()]
        return (sum(ids) + self.bias).squeeze(1)

    def fit(self, x, y, batch_size, epochs, verbose):
        print("training noise")
        FakeDCN.fitted = (x, y)
        for start in range(0, len(y), batch_size):
            part = {name: column[start : start + batch_size] for name, column in x.items()}
            self.optim.zero_grad()
            labels = torch.from_numpy(y[start : start + batch_size])
            nn.functional.binary_cross_entropy_with_logits(self(part), labels).backward()
            self.optim.step()

    @torch.no_grad()
    def predict(self, x, batch_size):
        return self(x).sigmoid().unsqueeze(1).numpy()


@pytest.fixture
def fake_deepctr(monkeypatch):
    """DeepCTR-Torch as its documentation has it, in a few lines."""
    inputs, models = types.ModuleType("deepctr_torch.inputs"), types.ModuleType("models")
    inputs.SparseFeat = lambda name, vocabulary_size, embedding_dim: (name, vocabulary_size, 16)
    inputs.DenseFeat = lambda name, size: (name, size, 0)
    models.DCN = FakeDCN
    for name, module in {
        "deepctr_torch": types.ModuleType("deepctr_torch"),
        "deepctr_torch.inputs": inputs,
        "deepctr_torch.models": models,
        "requests": types.ModuleType("requests"),
    }.items():
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.2.3")
    monkeypatch.setattr(other_libraries, "has_bf16", lambda device: False)


def test_all_methods_train_the_same_inputs_in_turn(
    fake_deepctr, processed, tmp_path, capsys, monkeypatch
):
    """An epoch of ours, of plain PyTorch and of a library: table, CSV, and what each was given."""
    trained, ours_trained, train = [], [], library_runs.train_baseline

    def train_ours(prepared, *rest):
        ours_trained.append(prepared.data.num_train)
        return train(prepared, *rest)

    monkeypatch.setattr(library_runs, "train_baseline", train_ours)

    def run(method, job):
        trained.append(method)
        return library_runs.measure(method, job)

    flags = ["--processed-data-file", str(processed), "--output-dir", str(tmp_path), *SMALL]
    flags += ["--methods", "plain", "deepctr", "ours", "--rows", "3000"]
    report = other_libraries.main([*flags, "--rounds", "1"], run)
    assert trained == ["plain", "deepctr", "ours dcnv2 fp32", "ours dlrm fp32"]
    assert other_libraries.runs_of(["ours"], True)[1:3] == ["ours dcnv2 bf16", "ours dlrm fp32"]
    [path] = tmp_path.glob("other_libraries_*.csv")
    table = pandas.read_csv(path).set_index("method")
    assert list(table.index) == trained and (table.samples_per_s > 0).all()
    assert (table.auc > 0.55).all() and table.ratio["plain"] == 1
    assert table.weights_outside_tables["plain"] == table.weights_outside_tables["ours dlrm fp32"]
    assert table.weights_outside_tables["deepctr"] == 1
    assert table.version["deepctr"] == "deepctr-torch 1.2.3"
    columns, labels = FakeDCN.fitted
    train = load_processed(processed).splits()[0]
    newest = train.rows(len(train) - 3000, len(train))
    assert report["num_train"] == len(labels) == 3000 and ours_trained == [3000, 3000]
    assert np.array_equal(labels, newest.labels)
    ids = np.stack([columns[f"C{number + 1}"] for number in range(len(TABLE_SIZES))], axis=1)
    assert np.array_equal(ids, newest.categories)
    dense = np.stack([columns[f"I{number + 1}"] for number in range(newest.num_dense)], axis=1)
    assert np.array_equal(dense, newest.transforms.apply(newest.dense))
    said = capsys.readouterr().out
    assert "training noise" not in said and "deepctr-torch 1.2.3" in said


def test_what_ends_early_has_no_auc_and_what_fails_is_left_out(capsys):
    def run(method, job):
        calls.append(method)
        if method == "rechub":
            raise ValueError("rechub: OSError: no space")
        rates = {"plain": [30.0, 10.0, 20.0], "deepctr": [5.0, 4.0, 6.0]}[method]
        found = {"samples_per_s": 1e3 * rates[calls.count(method) - 1], "version": "v"}
        return found | {"auc": None, "weights": 7, "peak_rss_bytes": 1e6}

    calls = []
    methods = ["plain", "rechub", "deepctr"]
    results, failed = other_libraries.in_turn(methods, {"batch_size": 8}, 3, run)
    assert calls == [*methods, *["plain", "deepctr"] * 2] and list(failed) == ["rechub"]
    plain, deepctr = other_libraries.rows_of(8, results)
    assert (plain["samples_per_s"], plain["lowest"], plain["highest"]) == (20e3, 10e3, 30e3)
    assert deepctr["ratio"] == 0.25 and deepctr["auc"] is None
    other_libraries.print_table([plain, deepctr])
    last = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert last == ["deepctr", "v", "0k", "5.0", "4.0", "6.0", "0.25x", "-", "1"]


def test_libraries_are_started_without_our_wait(monkeypatch):
    class Context:
        Pipe = staticmethod(multiprocessing.Pipe)

        def Process(self, target, args):
            def start():
                args[0].send({"wait": os.environ.get(throughput.WAIT)})

            return types.SimpleNamespace(start=start, join=lambda: None)

    monkeypatch.setattr(other_libraries.multiprocessing, "get_context", lambda way: Context())
    monkeypatch.setenv(throughput.WAIT, "1000")
    monkeypatch.setattr(throughput, "WAIT_OF_USER", None)
    waits = [other_libraries.run_apart(name, {})["wait"] for name in ("ours dlrm fp32", "rechub")]
    assert waits == ["1000", None]


def test_the_first_steps_do_not_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(library_runs.time, "perf_counter", lambda: now[0])
    watch = library_runs.Watch(10, 195, 0)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1)
    watch.follow(optimizer)
    for step in range(20):
        now[0] += 100 if step < library_runs.WARM_UP else 0.5
        optimizer.step()
    assert watch.samples == 195 and watch.rate() == pytest.approx(95 / 5)
    watch = library_runs.Watch(10, 1000, 2.0)
    with pytest.raises(Enough):
        for samples in range(10, 1000, 10):
            now[0] += 0.5
            watch.reach(samples)
    assert samples == 140 and watch.rate() == pytest.approx(20)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "deepctr"], "--methods deepctr needs deepctr_torch and requests"),
        (["--methods", "plain", "rechub"], "--methods rechub needs torch_rechub"),
        (["--methods", "plain", "--mini-batch-size", "4096"], "too few for 20 mini-batches"),
        (["--methods", "plain", "--processed-data-file", "no.npz"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(processed, tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    flags = ["--processed-data-file", str(processed), "--output-dir", str(tmp_path / "o"), *flags]
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: other_libraries.main(flags))
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and message in errors[0], errors
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("method", "module"), [("deepctr", "deepctr_torch"), ("rechub", "torch_rechub")]
)
def test_the_libraries_themselves(processed, method, module):
    pytest.importorskip(module, reason="requirements-optional.txt is not installed")
    job = {"processed": str(processed), "most": 0, "seconds": 0.0, "num_threads": 1, "seed": 1}
    found = library_runs.measure(method, {**job, "batch_size": 64})
    assert found["samples_per_s"] > 0 and 0.4 < found["auc"] < 1 and found["weights"] > 1e5
