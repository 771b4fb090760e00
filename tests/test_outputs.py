"""What a run draws beside its log: the network, the exported graph, and curves."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import REPOSITORY, train

import dlrm_s_pytorch
import slipstream_train
from slipstream.serving import export
from slipstream.tools import pictures
from slipstream.training.staleness import change_histogram


def fake_dot(folder, monkeypatch, script="cat"):
    """A `dot` whose picture is the graph's text."""
    folder.mkdir()
    (folder / "dot").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_network_is_drawn(processed, tmp_path, monkeypatch):
    """With its parameters and rows, and nothing of it reaches the training."""
    pytest.importorskip("torchviz", reason="requirements-optional.txt is not installed")
    fake_dot(tmp_path / "bin", monkeypatch)
    flags = ["--processed-data-file", processed, "--runs-dir", tmp_path, "--num-batches", 3]
    flags += ["--arch-sparse-feature-size", 8, "--device", "cpu", "--print-freq", 1]
    flags += ["--model", f"{REPOSITORY / 'tests/own_network.py'}:Norms"]
    losses = []
    for more in ([], ["--plot-compute-graph", tmp_path / "deep/net.svg"]):
        summary = dlrm_s_pytorch.main([str(flag) for flag in (*flags, *more)])
        losses.append((summary["loss"], summary["auc"]))
    assert losses[0] == losses[1]
    drawn = (tmp_path / "deep/net.svg").read_text()
    for name in ("body.0.weight", "norm.bias", "rows", "NativeLayerNormBackward"):
        assert name in drawn, name
    assert os.listdir(tmp_path / "deep") == ["net.svg"]


def test_a_graph_is_drawn(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx", reason="requirements-optional.txt is not installed")
    pytest.importorskip("pydot", reason="requirements-optional.txt is not installed")
    fake_dot(tmp_path / "bin", monkeypatch)
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    one, other = (make.make_tensor_value_info(name, kind, ["batch"]) for name in ("in", "out"))
    node = make.make_node("Sigmoid", ["in"], ["out"])
    onnx.save(make.make_model(make.make_graph([node], "g", [one], [other])), tmp_path / "g.onnx")
    export.draw_graph(tmp_path / "g.onnx", tmp_path / "g.pdf")
    assert "Sigmoid" in (tmp_path / "g.pdf").read_text()


def test_pictures_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    """One line before training, and no file."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["--processed-data-file", "p.npz", "--plot-compute-graph"]
    for file, said in (("net.png", "ends in .svg or .pdf"), ("net.svg", "apt install graphviz")):
        with pytest.raises(SystemExit) as stopped:
            dlrm_s_pytorch.parse_args([*words, file])
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and line.count("\n") == 1 and said in line
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    fake_dot(tmp_path / "bin", monkeypatch, "echo out of memory >&2; exit 1")
    with pytest.raises(ValueError, match="net.svg: dot: out of memory"):
        pictures.draw("digraph {}", tmp_path / "net.svg")
    assert os.listdir(tmp_path) == ["bin"]


def curves_in(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    tags = found.Tags()
    scalars = {
        tag: [(e.step, pytest.approx(e.value, rel=1e-6)) for e in found.Scalars(tag)]
        for tag in tags["scalars"]
    }
    return scalars, {tag: found.Histograms(tag) for tag in tags["histograms"]}


def test_curves_are_the_logs_and_go_on(segregated, monkeypatch):
    """Of a run in two parts: each point once, at its step, as the last log has it."""
    pytest.importorskip("tensorboard", reason="requirements-optional.txt is not installed")
    folder = segregated.parent
    drop = "--drop-percentage 40 --alpha 0.5 --drop-min-steps 0 --snapshot-start 0.1".split()
    flags = [*drop, "--print-freq", 7, "--test-freq", 20, "--val-freq", 20]
    flags += ["--save-model", folder / "m", "--tensor-board-filename", folder / "curves"]
    train(slipstream_train, folder, *flags, "--load-model", "auto", "--num-batches", 75)
    whole = train(slipstream_train, folder, *flags, "--load-model", "auto")
    records = [json.loads(line) for line in open(whole["log"], encoding="utf-8")]
    scalars, histograms = curves_in(folder / "curves")

    def of(kind, field):
        return [(r["step"], r[field]) for r in records if r["kind"] == kind]

    assert scalars["loss/training"] == of("training", "loss") and len(of("training", "loss")) > 8
    assert scalars["auc/test"] == of("evaluation", "auc")
    assert scalars["log loss/validation"] == of("validation", "log_loss")
    assert scalars["learning rate/network"] == of("training", "learning_rate")
    shares = of("training", "dropped_share") + of("summary", "dropped_share")
    assert scalars["share/dropped"] == shares and shares[-1][1] > 0
    assert len(scalars["samples a second"]) == len(of("training", "loss"))
    (drop,), (shown,) = (r for r in records if r["kind"] == "drop"), histograms["row change"]
    assert 0 < drop["step"] < 75 and scalars["choice/dropped"] == [(drop["step"], drop["dropped"])]
    value = shown.histogram_value
    limits, counts = zip(*drop["row_change"], strict=True)
    assert (shown.step, value.num) == (drop["step"], sum(counts)) and value.max == limits[-1]
    assert sum(counts) == round(drop["rows_touched_share"] * 120) and min(counts) > 0
    whole = [(a, b) for a, b in zip(value.bucket_limit, value.bucket, strict=True) if b]
    assert whole == list(zip(limits, counts, strict=True))
    with pytest.raises(ValueError, match="has the curves of another run"):
        train(slipstream_train, folder, *flags, "--save-model", folder / "n")


def test_a_histogram_of_changes():
    change = torch.tensor([0.0, 0.3, 0.7, 0.7, 0.8, 99.0, 7.0, 0.5])
    touched = torch.tensor([True, True, True, True, True, True, False, True])
    bins = change_histogram(change, touched)
    assert bins[1:] == [[0.375, 1], [0.75, 3], [1.0, 1], [128.0, 1]]
    assert bins[0][0] < 1e-38 and bins[0][1] == 1
    assert change_histogram(change[1:2], touched[1:2]) == [[0.375, 1]]
    assert change_histogram(change, torch.zeros(8, dtype=torch.bool)) == []
