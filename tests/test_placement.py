"""Host and device tensors never meet in a step, and no step waits for the device: without a GPU.

Under `FakeTensorMode` tensors have a device and no values, `meta` stands for the GPU, and PyTorch's
own rules refuse an operation on tensors of two devices, or one whose result the host must know.
"""

from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from dlrm_data_pytorch import ClickInputs, DeviceInputs
from dlrm_s_pytorch import DLRM_Net, make_optimizer
from slipstream.embedding import EmbeddingTable
from slipstream.runlog import Clocks
from slipstream.step import TrainStep
from slipstream.trainer import LearningRate, Trainer, TrainingData

GPU = torch.device("meta")
NUM_ROWS, NUM_HOT, BATCH_SIZE, NUM_FEATURES, DIM = 200, 40, 8, 5, 4


@pytest.fixture(autouse=True)
def host_values(monkeypatch):
    """What was cut on the host has values there: numpy finds the rows to stage by them."""

    def real(function):
        def call(*values):
            with unset_fake_temporarily():
                return function(*values)

        return call

    monkeypatch.setattr(ClickInputs, "batch", real(ClickInputs.batch))
    monkeypatch.setattr(torch.Tensor, "numpy", real(torch.Tensor.numpy))


def inputs(num_inputs, high, seed):
    rng = np.random.default_rng(seed)
    slots = rng.integers(0, high, (num_inputs, NUM_FEATURES)).astype(np.int32)
    dense = rng.integers(0, 9, (num_inputs, 3)).astype(np.int32)
    labels = rng.integers(0, 2, num_inputs).astype(np.int8)
    return ClickInputs(dense, slots, labels, np.array([0, num_inputs]))


class Inline(Executor):
    """Runs a task at once: modes of tensors belong to one thread."""

    def submit(self, task):
        done = Future()
        done.set_result(task())
        return done


def moved(model):
    """What `model.to(GPU)` does, which tensors without values cannot."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to(GPU))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(GPU)
    return model


def train(num_resident, optimizer="sgd", overlap=False, device_data=False, spoil=None):
    """One epoch of hot and cold batches, the last ones smaller; the trainer."""
    weight = torch.rand(NUM_ROWS, DIM)
    hot, cold = inputs(30, NUM_HOT, 1), inputs(30, NUM_ROWS, 2)
    empty = inputs(0, 1, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = moved(DLRM_Net([3, 8, DIM], [8, 1], NUM_FEATURES, seed=1))
        table = EmbeddingTable(weight, num_resident, BATCH_SIZE * NUM_FEATURES, GPU, optimizer)
        if device_data:
            hot = DeviceInputs(hot, GPU)
        step = TrainStep(model, table, make_optimizer(model, optimizer), BATCH_SIZE)
        trainer = Trainer(
            step=step,
            learning_rate=LearningRate(0.1),
            data=TrainingData(hot, cold, empty, empty),
            overlap=overlap,
            hot_rows_resident=num_resident >= NUM_HOT,
            drop_rule=None,
            log=None,
            clocks=Clocks(),
            test_batch_size=BATCH_SIZE,
            num_epochs=1,
            schedule="interleaved",
            randomize="total",
            seed=0,
        )
        if overlap:
            trainer.loader.close()
            trainer.loader._worker = trainer.loader._cutter = Inline()
        if spoil is not None:
            spoil(trainer)
        try:
            trainer._run_epoch()
            trainer.loader.settle()
        finally:
            trainer.loader.close()
    return trainer


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("device_data", [False, True])
@pytest.mark.parametrize("num_resident", [0, NUM_HOT, NUM_ROWS])
def test_a_step_never_mixes_devices_nor_waits(num_resident, device_data, overlap, optimizer):
    if device_data and num_resident == 0:
        return  # only inputs whose rows are resident lie on the device
    trainer = train(num_resident, optimizer, overlap, device_data)
    assert trainer.progress.samples == 60
    for parameter in trainer.step.model.parameters():
        assert parameter.device == GPU
    assert trainer.table._device_arrays[0].device == GPU


def on_host(trainer):
    """The labels stay where they were cut."""
    step = trainer.step

    def spoiled(dense, staged, labels, weights, rate):
        TrainStep.__call__(step, dense, staged, torch.ones(len(labels)), weights, rate)

    trainer.step = type("Spoiled", (), {"__call__": lambda self, *a: spoiled(*a)})()
    trainer.step.batch_size = BATCH_SIZE


def host_index(trainer):
    """The index is not brought to the device."""
    trainer.table.enter = lambda staged: staged


def waiting(trainer):
    """Each step reads its loss."""
    run = trainer.step._run

    def spoiled(*values):
        run(*values)
        trainer.step.take_loss_sum()

    trainer.step._run = spoiled


@pytest.mark.parametrize("spoil", [on_host, host_index, waiting])
def test_mistakes_are_caught(spoil):
    with pytest.raises(Exception, match=r"two devices|_local_scalar_dense|same device|DataDep"):
        train(NUM_HOT, spoil=spoil)
