"""A network of one's own: seeded, switched, saved with all it has, and refused in one line."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, assert_same_weights, saved_rows

import dlrm_s_pytorch
import slipstream_train
from slipstream.logs.features import plain_layout
from slipstream.model.features import plain_features
from slipstream.model.networks import ClickModel, build_network, find_network
from slipstream.tools import cli
from slipstream.training import saved as saved_module
from slipstream.training import step as step_module
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.optimizers import make_optimizer
from slipstream.training.saved import find_checkpoint

OWN = REPOSITORY / "tests/own_network.py"
# Without the flags that shape DLRM; the last batch of the 3,429 inputs is one input alone.
FLAGS = "--arch-sparse-feature-size 8 --mini-batch-size 4 --test-mini-batch-size 200 ".split()
FLAGS += "--learning-rate 0.05 --lr-decay-share 0 --optimizer sgd --device cpu".split()
FLAGS += ["--print-freq", "0"]


def train(processed, *flags, model=f"{OWN}:Norms", batch=28):
    data = ["--processed-data-file", str(processed), "--runs-dir", str(processed.parent / "runs")]
    words = [*data, *FLAGS, "--mini-batch-size", batch, "--model", model, *flags]
    return dlrm_s_pytorch.main([str(word) for word in words])


def test_a_network_of_ones_own_is_exact(processed, tmp_path):
    """Seeded, evaluated without dropout, saved whole, gone on with bit for bit."""
    a, b, c, parts = (tmp_path / name for name in "abcd")
    whole = train(processed, "--save-model", a)  # 3,429 inputs: 122 batches of 28, one of 13
    train(processed, "--save-model", b)
    assert_same_weights(a, b)
    train(processed, "--save-model", c, "--seed", "5")
    assert not np.array_equal(saved_rows(a)["rows"], saved_rows(c)["rows"])
    # The same AUC each time, that of training's end; the checkpoint has dim and options.
    aucs = [
        train(processed, "--load-model", a, "--inference-only", "true")["auc"] for _ in range(3)
    ]
    assert aucs == [whole["auc"]] * 3 and whole["auc"] > 0.6
    for steps in (31, 77, 0):
        going_on = ["--save-model", parts, "--load-model", "auto", "--num-batches", steps]
        train(processed, *going_on)
    assert_same_weights(a, parts)
    saved = find_checkpoint(parts)
    assert saved.arrays["step.buffer.steps"] == 123
    assert saved.arrays["step.buffer.body.1.num_batches_tracked"] == 123
    start = json.loads(open(whole["log"]).readline())
    assert start["network"] == {"name": "own_network.py:Norms", "sha256": saved.network["sha256"]}
    assert start["policy"] is None and start["log_identity"] == saved.identity["data"]["the log"]
    assert saved.network["text"] == OWN.read_text() and saved.network["name"] == OWN.name + ":Norms"
    assert saved.network["features"]["num_dense"] == 3 and saved.vocabulary is None


def test_a_last_batch_of_one_input(processed, tmp_path):
    """Batch normalisation has no variance there; the running statistics serve."""
    assert 3429 % 4 == 1
    train(processed, "--save-model", tmp_path / "m", batch=4)
    saved = saved_rows(tmp_path / "m")
    assert saved["buffer.steps"] == 858 and saved["buffer.body.1.num_batches_tracked"] == 857


def test_what_is_no_mixing_of_inputs(processed, tmp_path, monkeypatch):
    """Drawing by numpy; and a model that was trained when that was not looked at still loads."""
    train(processed, "--model-args", "what=numpy", "--num-batches", 2, model=f"{OWN}:Fails")
    flags, saved = ["--model-args", "what=batch"], ["--save-model", tmp_path / "m"]
    with monkeypatch.context() as patch:
        patch.setattr("slipstream.model.networks.MOST_MIXED", math.inf)
        train(processed, *flags, *saved, "--num-batches", 2, model=f"{OWN}:Fails")
    flags += ["--load-model", tmp_path / "m", "--inference-only", "true"]
    train(processed, *flags, model=f"{OWN}:Fails")


def test_resume_in_the_middle_of_slipstream(segregated, tmp_path):
    """Dropout, a drop rule, and the optimizer's state, through a checkpoint in the window."""
    flags = ["--segregated-data-dir", segregated, "--runs-dir", tmp_path, *FLAGS]
    flags += ["--mini-batch-size", 32, "--model", f"{OWN}:Norms", "--model-args", "width=9"]
    flags += ["--stale-keep-rate", 0.5]

    def run(*more):
        slipstream_train.main([str(word) for word in (*flags, *more)])

    run("--save-model", tmp_path / "a")
    for steps in (30, 60, 0):
        auto = ["--save-model", tmp_path / "b", "--load-model", "auto"]
        run(*auto, "--num-batches", steps)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="--model-args"):
        run("--load-model", tmp_path / "a", "--model-args", "width=10")


@pytest.mark.parametrize("name", ["Doubles", "RowsAlone", "Odd"])
def test_other_kinds_of_networks(processed, tmp_path, name):
    flags = ["--optimizer", "rwsadagrad", "--test-freq", 50]
    first = train(processed, *flags, "--save-model", tmp_path / "m", model=f"{OWN}:{name}")
    if name == "Odd":  # a lazy layer's weights are of the seed, and all gone on with
        for steps in (40, 0):
            on = ["--save-model", tmp_path / "n", "--load-model", "auto", "--num-batches", steps]
            train(processed, *flags, *on, model=f"{OWN}:{name}")
        assert_same_weights(tmp_path / "m", tmp_path / "n")
    saved = saved_rows(tmp_path / "m")
    kinds = {saved[key].dtype for key in saved if key.startswith("network.")}
    assert kinds == {"Doubles": {np.dtype("f8")}, "Odd": {np.dtype("f4")}}.get(name, set())
    again = train(
        *(processed, "--load-model", tmp_path / "m", "--inference-only", "true"),
        model=f"{OWN}:{name}",
    )
    assert again["auc"] == first["auc"] > 0.5


@pytest.mark.parametrize(
    ("model", "flags", "said"),
    [
        ("OWN:Wide", [], "returned shape (2, 1) for 2 inputs; expected (2,)"),
        ("OWN:Broken", [], "own_network.py, line "),
        ("OWN:Unlike", ["--model-args", "what=norm"], "norm keeps no running statistics"),
        ("OWN:Unlike", ["--model-args", "what=half"], "short is bfloat16, which cannot be saved"),
        ("OWN:Unlike", ["--model-args", "what=expanded"], "RuntimeError: unsupported operation"),
        ("OWN:Unlike", ["--model-args", "what=exit"], "SystemExit: no licence"),
        ("OWN:Unlike", ["--model-args", "what=sparse"], "bag.weight has a sparse gradient"),
        ("OWN:Unlike", ["--model-args", "what=rows"], "forward uses none of the vectors"),
        ("OWN:Fails", ["--model-args", "what=tuple"], "forward returned tuple; expected logits"),
        ("OWN:Fails", ["--model-args", "what=whole"], "forward returned torch.int64; expected"),
        ("OWN:Fails", ["--model-args", "what=nan"], "logits that are not finite, before any"),
        ("OWN:Fails", ["--model-args", "what=nan scores"], "logits that are not finite, before"),
        ("OWN:Fails", ["--model-args", "what=gradient"], "vectors is not finite, from the first"),
        ("OWN:Fails", ["--model-args", "what=batch"], "score depends on the other inputs of its"),
        ("OWN:Fails", ["--model-args", "what=softmax"], "score depends on the other inputs of"),
        ("OWN:Fails", ["--model-args", "what=extra loss"], "extra_loss returned 0.0; expected a"),
        ("OWN:Norms", ["--model-args", "wide=3"], "unexpected keyword argument 'wide'"),
        ("OWN:no_network", [], "is no class of torch.nn.Module"),
        ("OWN:Nothing", [], "has no Nothing"),
        ("OWN:Attends", ["--model-args", "width=3", "width=4"], "names an option twice"),
        ("nowhere.py:Net", [], "nowhere.py does not exist"),
        ("dcn", [], "expected dlrm, dcnv2, tbsm, or path/to/file.py:Class"),
        ("dcnv2", ["--model-args", "width=3"], "dcnv2 has no width; it has layers, rank"),
        ("dcnv2", ["--model-args", "rank=wide"], "rank of dcnv2: got 'wide'; expected one like 0"),
        ("dcnv2", ["--model-args", "layers=0"], "got 0 layers"),
        ("tbsm", ["--model-args", "arch_mlp_top=5"], "give --arch-mlp-top"),
        ("tbsm", [], "tbsm reads what came before, as sequences"),
        ("dlrm", ["--model-args", "width=3"], "the --arch flags shape dlrm"),
        ("TEXT:Net", [], "line 2: SyntaxError"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(processed, tmp_path, capsys, model, flags, said):
    (tmp_path / "text.py").write_text("import torch\nclass Net(:\n")
    model = model.replace("OWN", str(OWN)).replace("TEXT", str(tmp_path / "text.py"))
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(lambda: train(processed, *flags, model=model))
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and said in errors[0], errors


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("in training", r"Fails_file, line \d+: IndexError: list index out of range"),
        ("in evaluation", r"Fails_file, line \d+: IndexError: list index out of range"),
        ("backward", r"Fails_file, line \d+: IndexError: list index out of range"),
        ("one", r"Fails_file, when it was called: ValueError: .* shape \(\) for 1 inputs"),
    ],
)
def test_a_network_that_fails_later_is_named(processed, capsys, monkeypatch, what, said):
    """In steps and evaluations, whose batches are others than those it is tried on."""
    flags = ["--model-args", f"what={what}", "--num-batches", "2"]
    flags += ["--mini-batch-size", "1"] * (what == "one")
    run = lambda: train(processed, *flags, model=f"{OWN}:Fails")  # noqa: E731
    with pytest.raises(SystemExit) as stopped:
        cli.run_script(run)
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(errors) == 1 and "learning-rate" not in errors[0]
    assert re.search(said.replace("Fails_file", f"--model {re.escape(str(OWN))}"), errors[0])
    monkeypatch.setenv(cli.TRACEBACK_VARIABLE, "1")
    with pytest.raises(ValueError if what == "one" else IndexError):
        cli.run_script(run)


def test_parts_that_some_steps_do_not_use(processed, tmp_path):
    """Adam counts the steps of each parameter, and goes on with each count."""
    flags = ["--optimizer", "rwsadagrad", "--model-args", "since=30", "drop=0.5"]

    def run(folder, steps):
        on = ["--save-model", tmp_path / folder, "--load-model", "auto", "--num-batches", steps]
        train(processed, *flags, *on, model=f"{OWN}:Late")

    run("whole", 60)
    for steps in (20, 45, 60):
        run("parts", steps)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    arrays = find_checkpoint(tmp_path / "parts").arrays
    first, later, dropped = (
        int(arrays[f"step.optimizer.step.{name}.weight"]) for name in ("first", "later", "dropped")
    )
    assert (first, later) == (60, 31) and 15 < dropped < 45


def test_a_loss_of_its_own_is_added_to_the_mean_loss():
    """Also of a short batch; the loss that is reported is that of the labels alone."""
    features, size, number = plain_features(3, 2, 4), 6, 4
    spec = find_network(f"{OWN}:Late", {"strength": 0.3})
    network, other = (build_network(spec, features, seed=1) for _ in range(2))
    weight = torch.randn(9, 4)
    table = EmbeddingTable(weight.clone(), 9, size * 2, torch.device("cpu"))
    model, optimizer = ClickModel(network, plain_layout(2)), make_optimizer(network, "sgd")
    step = step_module.TrainStep(model, table, optimizer, size)
    dense, index = torch.rand(number, 3), torch.arange(8).view(number, 2)
    labels, weights = torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 1.0])
    step(dense, table.enter(table.stage(index)), labels, weights, 0.5)

    rows = weight.requires_grad_()
    logits = other(dense, rows[index])
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, labels, weights, reduction="sum"
    )
    ((losses + number * other.extra_loss()) / size).backward()
    assert step.peek_loss_sum() == pytest.approx(float(losses.detach()))
    torch.testing.assert_close(table.leading_rows(9), (weight - 0.5 * rows.grad).detach())
    expected = other.head.weight - 0.5 * other.head.weight.grad
    torch.testing.assert_close(network.head.weight, expected)


def test_a_saved_file_is_compared_and_never_run(processed, tmp_path, capsysbinary):
    own = tmp_path / "net.py"
    shutil.copy(OWN, own)
    run = ["--num-batches", 3]
    train(processed, *run, "--save-model", tmp_path / "m", model=f"{own}:Norms")
    load = ["--load-model", tmp_path / "m", "--inference-only", "true"]
    with pytest.raises(ValueError, match="trained with --model net.py:Norms: give that file again"):
        train(processed, *load, model="dlrm")
    with own.open("a") as file:
        file.write("\n# another text\n")
    with pytest.raises(ValueError, match="other model: the text of its file is") as refused:
        train(processed, *load, model=f"{own}:Norms")
    # The line says how to have the text, which fits again.
    [folder] = re.findall(
        r"`python -m slipstream.training.saved (\S+) > \S+/net.py`", str(refused.value)
    )
    for place in (folder, tmp_path / "m"):
        capsysbinary.readouterr()
        saved_module.main([str(place)])
        assert capsysbinary.readouterr().out == OWN.read_bytes()
    own.write_bytes(OWN.read_bytes())
    train(processed, *load, model=f"{own}:Norms")
    train(processed, *run, "--save-model", tmp_path / "n", model="dcnv2")
    with pytest.raises(ValueError, match="dcnv2, which has no file of its own"):
        saved_module.main([str(tmp_path / "n")])
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        saved_module.main([str(tmp_path)])


def test_flags_that_a_network_does_not_read_are_said(processed, capsys):
    flags = ["--num-batches", "1", "--arch-mlp-top", "7-1", "--arch-mlp-bot", "auto-512-256-64-8"]
    train(processed, *flags)
    assert "does not read --arch-mlp-top" in capsys.readouterr().out


def test_optimizer_arrays_are_all_consumed(processed, tmp_path, monkeypatch):
    """Adam has no state before its first step: today's is restored, and what is missing is said."""
    monkeypatch.setattr(
        "slipstream.training.build.make_optimizer",
        lambda network, name: torch.optim.Adam(network.parameters(), lr=0.0),
    )
    train(processed, "--save-model", tmp_path / "a", "--num-batches", 60)
    train(processed, "--save-model", tmp_path / "b", "--num-batches", 25)
    train(processed, "--save-model", tmp_path / "b", "--load-model", "auto", "--num-batches", 60)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    saved = find_checkpoint(tmp_path / "a")
    values, arrays = saved.part("step")
    [step] = _steps(processed, monkeypatch)
    step.restore_optimizer(values, arrays)
    some = next(name for name in arrays if name.startswith("optimizer.exp_avg."))
    fewer = {name: array for name, array in arrays.items() if name != some}
    with pytest.raises(ValueError, match="exp_avg.* is missing"):
        step.restore_optimizer(values, fewer)
    with pytest.raises(ValueError, match="optimizer.sum.x is left over"):
        step.restore_optimizer(values, {**arrays, "optimizer.sum.x": np.zeros(3)})


def _steps(processed, monkeypatch):
    """The `TrainStep` of a short run."""
    found, plain = [], step_module.TrainStep.__init__

    def noted(step, *values, **more):
        found.append(step)
        plain(step, *values, **more)

    monkeypatch.setattr(step_module.TrainStep, "__init__", noted)
    train(processed, "--num-batches", 1)
    return found


def test_the_memory_estimate_counts_the_network(processed, capsys):
    def needed(width):
        flags = ["--num-batches", "1", "--model-args", f"width={width}"]
        train(processed, *flags, batch=2)
        said = capsys.readouterr().out
        return int(re.search(r"memory: about ([\d,]+) MB", said)[1].replace(",", ""))

    # 51 parameters a unit of the width, their gradients, and activations.
    assert needed(200_000) - needed(8) > 8 * 51 * 200_000 / 1e6
