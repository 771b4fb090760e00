"""The trainer on a simulated GPU (`simulated_device`): the same weights bit for bit as on the CPU.

So host and device tensors never meet in a step, no stream overtakes what it needs, a captured step
trains as one that runs, and nothing waits for the device on the way.
"""

import functools
import itertools
import re
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, dlrm
from simulated_device import GPU, SimulatedDevice

from slipstream.logs.features import Feature, FeatureLayout, plain_layout
from slipstream.logs.inputs import ClickInputs
from slipstream.model.features import features_of
from slipstream.model.networks import ClickModel, build_network, find_network
from slipstream.tools.plugins import Plugin
from slipstream.tools.runlog import Clocks, RunLog
from slipstream.training.dropping import DropRule, DropSettings
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.optimizers import make_optimizer, usual_optimizer
from slipstream.training.schedule import LearningRate
from slipstream.training.sets import DeviceInputs, TrainingData
from slipstream.training.step import NUM_WARMUP_STEPS, TrainStep
from slipstream.training.trainer import Trainer

CPU = torch.device("cpu")
OWN = REPOSITORY / "tests/own_network.py"
NUM_ROWS, NUM_HOT, BATCH_SIZE, NUM_FEATURES, DIM = 120, 40, 8, 5, 4
NUM_INPUTS = 60  # of each kind: the last batches are smaller
DROP = DropSettings(drop_fraction=0.5, alpha=0.4, start=0.3, window=0.3, keep_rate=0.5)


LAYOUT = FeatureLayout(
    (Feature("a", (0,), 0), Feature("b", (1, 2, 3), 1, "mean"), Feature("c", (4,), 2, "sum"))
)


def inputs(num_inputs, high, seed, has_absent=False):
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, high, (num_inputs, NUM_FEATURES)).astype(np.int32)
    if has_absent:
        slots[:, 1:][rng.random((num_inputs, NUM_FEATURES - 1)) < 0.4] = -1
    dense = rng.integers(0, 9, (num_inputs, 3)).astype(np.int32)
    labels = rng.integers(0, 2, num_inputs).astype(np.int8)
    weights = rng.integers(0, 4, num_inputs).astype(np.float32) if has_absent else None
    days = np.array([0, num_inputs])
    return ClickInputs(dense, slots, labels, days, has_absent=has_absent, weights=weights)


def make_trainer(
    device, num_resident, optimizer_name, overlap, device_data, evaluates, has_absent=False
):
    """With `has_absent` also weights, and another network: batch and layer norms, buffers."""
    hot = inputs(NUM_INPUTS, NUM_HOT, 1, has_absent)
    cold = inputs(NUM_INPUTS, NUM_ROWS, 2, has_absent)
    rows = torch.rand(NUM_ROWS, DIM, generator=torch.Generator().manual_seed(4))
    if has_absent:
        layout, spec = LAYOUT, find_network(f"{OWN}:Norms", {"dropout": 0.0})
        network = build_network(spec, features_of(LAYOUT, 3, DIM), 1)
        rows = torch.cat([rows, torch.zeros(1, DIM)])
    else:
        layout, network = (
            plain_layout(NUM_FEATURES),
            dlrm([3, 8, DIM], [8, 1], NUM_FEATURES, seed=1),
        )
    model = moved(network, device)
    table = EmbeddingTable(
        rows,
        num_resident,
        BATCH_SIZE * NUM_FEATURES,
        device,
        optimizer_name,
        null_row=has_absent,
    )
    dense_optimizer = usual_optimizer(optimizer_name)
    optimizer = make_optimizer(model, dense_optimizer)
    step = TrainStep(ClickModel(model, layout), table, optimizer, BATCH_SIZE)
    if device == GPU:
        # What a device of CUDA's type gets.
        table.lane._stream = torch.cuda.Stream(device)
        step._use_graph = True
        optimizer.param_groups[0]["fused"] = True
        optimizer._need_device_dtype_check_for_fused = False
    return Trainer(
        step=step,
        learning_rate=LearningRate(0.1, num_warmup_steps=5),
        data=TrainingData(
            DeviceInputs(hot, device) if device_data else hot,
            cold,
            inputs(30, NUM_ROWS, 5, has_absent),
            inputs(30, NUM_ROWS, 6, has_absent),
        ),
        overlap=overlap,
        hot_rows_resident=num_resident >= NUM_HOT,
        drop_rule=DropRule(DROP, NUM_HOT, 0, lambda record: None) if evaluates else None,
        log=mock.create_autospec(RunLog),
        clocks=Clocks(),
        test_batch_size=BATCH_SIZE,
        num_epochs=2 if evaluates else 1,  # in a second one graphs follow single steps
        schedule="interleaved",
        randomize="total",
        seed=0,
        test_freq=3 if evaluates else 0,
    )


def moved(model, device):
    """What `model.to` does, which cannot put another kind of tensor into a parameter."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to(device))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return model


def outcome(trainer):
    """All weights, and what was measured on the way."""
    state = trainer.table.read(slice(None)) | {
        name: value.detach().cpu()
        for name, value in [
            *trainer.step.model.network.named_parameters(),
            *trainer.step.model.network.named_buffers(),
        ]
    }
    state["auc"] = torch.tensor([record["auc"] for record in trainer.progress.evaluations])
    state["loss"] = torch.tensor(trainer.step.peek_loss_sum())
    return state


@functools.cache
def train_on_cpu(optimizer, evaluates, has_absent=False):
    trainer = make_trainer(CPU, NUM_ROWS, optimizer, False, False, evaluates, has_absent)
    trainer.run()
    return outcome(trainer)


def train_on_gpu(*arguments, eagerness=0.0, spoil=None):
    """The outcome, how often training waited for the device, and whether it replayed a graph."""
    with SimulatedDevice(eagerness) as device:
        trainer = make_trainer(GPU, *arguments)
        if spoil is not None:
            spoil(trainer)
        run, num_waits = trainer._run_until_due, []

        def counted(plan, bar):
            before = device.num_waits
            more = run(plan, bar)
            num_waits.append(device.num_waits - before)
            return more

        trainer._run_until_due = counted
        trainer.run()
        return outcome(trainer), sum(num_waits), trainer.step.has_graph


def differing(got, expected):
    assert got.keys() == expected.keys()
    return [name for name, value in got.items() if not torch.equal(value, expected[name])]


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("device_data", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_training_on_a_gpu_gives_the_same_bits(overlap, device_data, optimizer):
    expected = train_on_cpu(optimizer, False)
    # Only inputs whose rows are resident lie on the device.
    budgets = (NUM_HOT, NUM_ROWS) if device_data else (0, NUM_HOT, NUM_ROWS)
    for num_resident, eagerness in itertools.product(budgets, (0.0, 0.7)):
        got, num_waits, is_graph = train_on_gpu(
            num_resident, optimizer, overlap, device_data, False, eagerness=eagerness
        )
        assert differing(got, expected) == []
        assert is_graph
        # Without overlap the rows of a cold batch are waited for on their way home.
        assert num_waits == 0 or (not overlap and num_resident < NUM_ROWS)


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("overlap", [False, True])
def test_dropping_and_evaluating_on_a_gpu_gives_the_same_bits(overlap, optimizer):
    """Snapshots, weights of kept inputs, and evaluations between two cold batches."""
    got, _, _ = train_on_gpu(NUM_HOT, optimizer, overlap, True, True, eagerness=0.7)
    assert differing(got, train_on_cpu(optimizer, True)) == []


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("num_resident", [0, NUM_HOT])
def test_absent_elements_and_buffers_on_a_gpu_give_the_same_bits(num_resident, optimizer):
    """A null row, pooling, running statistics that warming up a graph must not move."""
    overlap, on_device = num_resident > 0, num_resident > 0
    arguments = (num_resident, optimizer, overlap, on_device, True, True)
    got, _, is_graph = train_on_gpu(*arguments, eagerness=0.7)
    expected = train_on_cpu(optimizer, True, True)
    assert differing(got, expected) == [] and is_graph
    assert got["steps"] > got["body.1.num_batches_tracked"] > 20  # some batches are of one input


def lane_runs_ahead_of_the_device(trainer):
    copies = trainer.table.lane.copies
    trainer.table.lane.copies = lambda after: copies(None)


def device_runs_ahead_of_the_lane(trainer):
    trainer.table.lane.hold = lambda mark: None


def host_runs_ahead_of_the_lane(trainer):
    lane, mark = trainer.table.lane, trainer.table.lane.mark

    def passed():
        event = mark()
        event.synchronize = lambda: None
        return event

    lane.mark = passed


def rows_of_two_batches_are_not_handed_on(trainer):
    trainer.table._shared = lambda before, host_rows, area: None


def one_staging_area(trainer):
    stage = trainer.table.stage
    trainer.table.stage = lambda slots, area=0, *rest, **named: stage(
        slots, area // 2 * 2, *rest, **named
    )


def labels_on_the_host(trainer):
    call = trainer.step._run
    trainer.step._run = lambda dense, staged, labels, weights, rate, *more: call(
        dense, staged, torch.ones(len(labels)), weights, rate, *more
    )


def index_on_the_host(trainer):
    trainer.table.enter = lambda staged: staged


def steps_read_their_loss(trainer):
    run = trainer.step._run

    def reading(*values):
        run(*values)
        trainer.step.peek_loss_sum()

    trainer.step._run = reading


def graph_loses(name):
    """Replays read what was there when the graph was captured."""

    def spoil(trainer):
        capture = trainer.step._capture

        def losing(*values):
            graph = capture(*values)
            setattr(graph, name, getattr(graph, name).clone())
            return graph

        trainer.step._capture = losing

    return spoil


DRAWN = []


def a_layer_is_dropped_on_the_host(trainer):
    network, forward = trainer.step.model.network, trainer.step.model.network.forward

    def drawing(dense, vectors):
        DRAWN.append(float(torch.rand(())))
        return forward(dense, vectors) + 0 * DRAWN[-1]

    network.forward = drawing


def a_part_is_used_later(trainer):
    trainer.step._parameters["later"] = torch.nn.Parameter(torch.zeros(()))


def a_branch_waits_for_the_device(trainer):
    """In a file of one's own, whose errors have another type."""
    network, forward = trainer.step.model.network, trainer.step.model.network.forward
    trainer.step.model._plugin = Plugin("--model", "net.py:Net", None, Path("net.py"))
    network.forward = lambda dense, vectors: forward(dense, vectors) + float(vectors.sum() > 1e9)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (a_branch_waits_for_the_device, "--model net.py, when it was called: RuntimeError: waits"),
        (a_layer_is_dropped_on_the_host, "the network draws on the host"),
        (a_part_is_used_later, "a step does not use later"),
    ],
)
def test_a_network_that_may_branch_is_no_part_of_a_graph(recwarn, spoil, said):
    """A replay would go on with the branch that was captured."""
    got, _, is_graph = train_on_gpu(NUM_HOT, "sgd", True, False, False, spoil=spoil)
    assert not is_graph and not differing(got, train_on_cpu("sgd", False))
    assert any(said in str(warning.message) for warning in recwarn)
    # What warming up drew, the steps draw again.
    assert DRAWN[:NUM_WARMUP_STEPS] == DRAWN[NUM_WARMUP_STEPS : 2 * NUM_WARMUP_STEPS]


def test_a_buffer_that_is_assigned_anew_is_no_part_of_a_graph(recwarn):
    """A replay would go on reading the one that was captured."""

    def spoil(trainer):
        network = trainer.step.model.network
        forward = network.forward
        network.register_buffer("seen", torch.zeros((), device=trainer.table.device))

        def counting(dense, vectors):
            network.seen = network.seen + 1
            return forward(dense, vectors)

        network.forward = counting

    got, _, is_graph = train_on_gpu(NUM_HOT, "sgd", True, False, True, spoil=spoil)
    assert got.pop("seen") > 0 and not is_graph
    assert not differing(got, train_on_cpu("sgd", True))
    assert any("assigns a buffer anew" in str(warning.message) for warning in recwarn)


@pytest.mark.filterwarnings("ignore:no CUDA graph")
@pytest.mark.parametrize(
    "spoil",
    [
        lane_runs_ahead_of_the_device,
        device_runs_ahead_of_the_lane,
        host_runs_ahead_of_the_lane,
        rows_of_two_batches_are_not_handed_on,
        one_staging_area,
        labels_on_the_host,
        index_on_the_host,
        steps_read_their_loss,
        *map(graph_loses, ("dense", "index", "labels", "weights", "learning_rate")),
    ],
)
def test_mistakes_are_caught(spoil):
    try:
        got, _, is_graph = train_on_gpu(NUM_HOT, "sgd", True, False, True, spoil=spoil)
    except (RuntimeError, ValueError) as error:
        assert re.search("tensors on two devices|not finite|is nan", str(error))  # noqa: PT017
    else:
        assert differing(got, train_on_cpu("sgd", True)) or not is_graph
