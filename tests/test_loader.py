import threading

import numpy as np
import pytest
import torch

from dlrm_data_pytorch import ClickInputs
from slipstream.training.batching import EpochPlan
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.loader import Loader
from slipstream.training.sets import DeviceInputs

CPU = torch.device("cpu")


def inputs(num_inputs, low, high, seed):
    rng = np.random.default_rng(seed)
    slots = rng.integers(low, high, (num_inputs, 3)).astype(np.int32)
    dense = np.arange(2 * num_inputs, dtype=np.int32).reshape(num_inputs, 2)
    labels = (np.arange(num_inputs) % 2).astype(np.int8)
    return ClickInputs(dense, slots, labels, np.array([0, num_inputs]))


def make(overlap, num_hot=40, num_cold=40, num_resident=10):
    hot, cold = inputs(num_hot, 0, 10, 1), inputs(num_cold, 0, 30, 2)
    table = EmbeddingTable(torch.rand(30, 2), num_resident, 4 * 3, CPU)
    loader = Loader(hot, cold, table, overlap, num_resident >= 10)
    plan = EpochPlan(np.arange(num_hot), np.arange(num_cold), 4, "interleaved")
    loader.start(plan)
    return loader, plan, hot, cold


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("num_resident", [0, 10, 30])
def test_batches_are_those_of_the_plan(overlap, num_resident):
    loader, _, hot, cold = make(overlap, num_resident=num_resident)
    seen = {True: [], False: []}
    while (batch := loader.next()) is not None:
        source = hot if batch.planned.hot else cold
        dense, slots, labels = source.batch(batch.planned.inputs)
        assert torch.equal(batch.dense, dense) and torch.equal(batch.labels, labels)
        assert torch.equal(batch.slots, slots)
        rows = loader.table.lookup(batch.staged)
        loader.done(batch)
        loader.settle()
        assert torch.equal(rows, loader.table.read(slice(None))["rows"][slots])
        seen[batch.planned.hot] += batch.planned.inputs.tolist()
    loader.close()
    assert seen == {True: list(range(40)), False: list(range(40))}


def test_a_hot_batch_cut_before_it_was_replaced_is_cut_again():
    loader, plan, *_ = make(True)
    batch = loader.next()
    while not batch.planned.hot:
        loader.done(batch)
        batch = loader.next()
    loader.done(batch)
    plan.replace(True, np.array([30, 31]), np.array([2.0, 3.0], np.float32))
    hot = []
    while (batch := loader.next()) is not None:
        if batch.planned.hot:
            hot.append((batch.planned.inputs.tolist(), batch.weights.tolist()))
        loader.done(batch)
    loader.close()
    assert hot == [([30, 31], [2.0, 3.0])]


def test_the_next_cold_batch_is_prepared_before_this_one_is_done():
    loader, _, _, cold = make(True)
    prepared, stage = threading.Event(), loader.table.stage

    def spied(*values, **more):
        staged = stage(*values, **more)
        if threading.current_thread().name.startswith("loader"):
            prepared.set()
        return staged

    loader.table.stage = spied
    while (batch := loader.next()).planned.hot:
        loader.done(batch)
    assert prepared.wait(10)
    loader.close()


@pytest.mark.parametrize("fails", ["stage", "write_back"])
def test_an_error_on_the_host_thread_ends_the_epoch(fails):
    loader, *_ = make(True)

    def broken(*values, **more):
        raise ValueError("broken")

    setattr(loader.table, fails, broken)
    with pytest.raises(ValueError, match="broken"):
        while (batch := loader.next()) is not None:
            loader.done(batch)
        loader.settle()
    loader.close()


def test_inputs_on_a_device_are_the_same_inputs():
    source = inputs(50, 0, 30, 3)
    source.dense[:5] = -1
    moved = DeviceInputs(source, CPU)
    assert len(moved) == 50 and DeviceInputs.bytes_needed(source) == 50 * 24
    cut = moved.batch(slice(20))
    twice = 2 * sum(array.nbytes for array in cut) + 4 * cut[1].numel()
    assert DeviceInputs.bytes_needed(source, 20) == 50 * 24 + twice
    for chosen in (np.array([3, 3, 49, 0]), slice(10, 20)):
        for got, expected in zip(moved.batch(chosen), source.batch(chosen), strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)
        assert torch.equal(moved.slots_of(chosen), source.slots_of(chosen))


def spoil_write_back(loader, which):
    """Let the `which`-th write-back fail."""
    plain, count = loader.table.write_back, iter(range(1000))

    def write_back(*values):
        if next(count) == which:
            raise ValueError("disk gone")
        plain(*values)

    loader.table.write_back = write_back


def test_a_failed_write_back_is_raised_by_a_later_batch():
    loader, *_ = make(True)
    spoil_write_back(loader, 1)
    with pytest.raises(ValueError, match="disk gone"):
        while (batch := loader.next()) is not None:
            loader.done(batch)
    loader.close()


def test_a_failed_last_write_back_is_raised_when_all_must_be_home():
    loader, *_ = make(True, num_hot=0)
    spoil_write_back(loader, 9)  # of 10 cold batches
    while (batch := loader.next()) is not None:
        loader.done(batch)
    with pytest.raises(ValueError, match="disk gone"):
        loader.settle()
    loader.close()
