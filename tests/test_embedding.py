import numpy as np
import pytest
import torch
from helpers import dlrm

from slipstream.training.embedding import EVALUATION, EmbeddingTable
from slipstream.training.rows import bytes_per_row, initial_rows, step_rows, sum_by_row

CPU = torch.device("cpu")


def train(num_resident, optimizer, device=CPU, steps=30, num_rows=50, dim=4):
    """Random steps on few rows, so that consecutive batches share host rows; final state."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(num_rows, dim, generator=generator)
    table = EmbeddingTable(weight, num_resident, 6 * 3, device, optimizer)
    for _ in range(steps):
        slots = torch.randint(0, num_rows, (6, 3), generator=generator)
        staged = table.enter(table.stage(slots))
        rows = table.lookup(staged)
        gradient = rows * torch.rand(6, 3, dim, generator=generator).to(device)
        table.update(staged, gradient, 0.1)
        table.write_back(staged, table.lane.mark())
    return table.read(slice(None))


def reference(optimizer, steps=30, num_rows=50, dim=4):
    """The same steps in plain numpy float64, row by row."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.rand(num_rows, dim, generator=generator).double().numpy()
    sums = np.zeros(num_rows)
    for _ in range(steps):
        slots = torch.randint(0, num_rows, (6, 3), generator=generator).numpy()
        gradient = weight[slots] * torch.rand(6, 3, dim, generator=generator).double().numpy()
        for row in np.unique(slots):
            total = gradient[slots == row].sum(0)
            if optimizer == "rwsadagrad":
                sums[row] += (total**2).mean()
                total = total / (np.sqrt(sums[row]) + 1e-10)
            weight[row] -= 0.1 * total
    return weight


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
def test_steps_match_a_row_by_row_reference(optimizer):
    rows = train(50, optimizer)["rows"].numpy()
    np.testing.assert_allclose(rows, reference(optimizer), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("num_resident", [0, 1, 20, 49])
def test_any_number_of_resident_rows_gives_the_same_bits(optimizer, num_resident):
    expected, state = train(50, optimizer), train(num_resident, optimizer)
    assert state.keys() == expected.keys()
    for name in expected:
        assert torch.equal(state[name], expected[name]), name


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("num_resident", [0, 9])
def test_many_small_gradients_move_a_row(optimizer, num_resident):
    """Each alone is less than float32 tells apart from nothing; together they are not."""
    table = EmbeddingTable(torch.full((9, 2), 0.05), num_resident, 2048, CPU, optimizer)
    staged = table.enter(table.stage(torch.full((1024, 2), 7)))
    table.update(staged, torch.full((1024, 2, 2), 1e-5), 1e-4)
    table.write_back(staged)
    total = 2048 * 1e-5
    expected = 1e-4 * (total if optimizer == "sgd" else 1)  # Adagrad's first step is the rate
    moved = 0.05 - table.read(np.array([7]))["rows"].double().numpy()
    np.testing.assert_allclose(moved, expected, rtol=0.015)


def test_hot_batches_touch_no_host_row():
    table = EmbeddingTable(torch.rand(10, 2), 4, 8, CPU)
    assert table.stage(torch.tensor([[0, 3], [1, 2]])).host_rows is None
    assert sorted(table.stage(torch.tensor([[0, 9], [9, 5]])).host_rows) == [1, 5]


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
def test_a_batch_staged_before_the_last_one_is_home(optimizer):
    """Rows that both need reach the second one updated; evaluation in between disturbs neither."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.rand(12, 2, generator=generator)
    tables = [EmbeddingTable(weight.clone(), 3, 8, CPU, optimizer) for _ in range(2)]
    batches = [torch.randint(0, 12, (4, 2), generator=generator) for _ in range(20)]
    gradients = [torch.rand(4, 2, 2, generator=generator) for _ in batches]
    in_turn, ahead = tables
    for slots, gradient in zip(batches, gradients, strict=True):
        staged = in_turn.enter(in_turn.stage(slots))
        in_turn.update(staged, gradient.clone(), 0.1)
        in_turn.write_back(staged)
    num_shared, staged = 0, ahead.stage(batches[0], 0)
    for number, gradient in enumerate(gradients):
        staged = ahead.enter(staged)
        later = None
        if number + 1 < len(batches):
            later = ahead.stage(batches[number + 1], (number + 1) % 2, staged)
            num_shared += later.shared is not None
        ahead.update(staged, gradient.clone(), 0.1)
        ahead.write_back(staged)
        rows = ahead.lookup(ahead.enter(ahead.stage(torch.arange(8).view(4, 2), EVALUATION)))
        assert torch.equal(rows.view(8, 2), ahead.read(slice(None))["rows"][:8])
        staged = later
    assert num_shared > 10
    for name, value in in_turn.read(slice(None)).items():
        assert torch.equal(value, ahead.read(slice(None))[name]), name


def test_evaluation_leaves_the_rows_alone():
    weight = torch.rand(10, 2)
    table = EmbeddingTable(weight.clone(), 3, 8, CPU)
    slots = torch.tensor([[0, 9], [4, 4]])
    assert torch.equal(table.lookup(table.stage(slots)), weight[slots])
    assert torch.equal(table.read(slice(None))["rows"], weight)
    assert torch.equal(table.leading_rows(7), weight[:7])


def test_a_batch_larger_than_the_staging_area_is_refused():
    table = EmbeddingTable(torch.rand(10, 2), 0, 2, CPU)
    with pytest.raises(ValueError, match="staging area holds 2"):
        table.stage(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(("optimizer", "more"), [("sgd", 0), ("rwsadagrad", 8)])
def test_rows_start_the_same_whatever_their_slot(optimizer, more):
    """SGD's as DLRM's; of few rows these are noise, so Adagrad's are smaller."""
    sizes = [5, 1, 30]
    slots = torch.randperm(36)

    def start(slots, seed):
        return initial_rows(sizes, 4, slots, seed, optimizer=optimizer)

    plain = start(None, 1)
    assert torch.equal(start(slots, 1)[slots], plain)
    assert not torch.equal(start(None, 2), plain)
    for part, size in zip(plain.split(sizes), sizes, strict=True):
        assert part.abs().max() <= (size + more) ** -0.5
    assert plain[6:].std().item() == pytest.approx((1 / (30 + more) / 3) ** 0.5, rel=0.08)


def test_gradients_of_equal_rows_are_added_by_place_as_by_sorting():
    """The same bits, whatever the places hold: on a CPU, on a GPU, and there by sorting."""
    generator = torch.Generator().manual_seed(1)
    place = torch.randint(-9, 99, (40,), generator=generator, dtype=torch.int32)
    for _ in range(3):
        index = torch.randint(0, 40, (300,), generator=generator)
        gradient = torch.randn(300, 8, generator=generator)
        sums = [torch.zeros(40, 8) for _ in range(3)]
        for total, by in zip(sums, (None, place.numpy(), place.clone()), strict=True):
            rows, found = sum_by_row(index, gradient, by)
            assert all(len(found[rows == row].any(1).nonzero()) == 1 for row in index.unique())
            total.index_add_(0, rows, found)
        assert torch.equal(sums[0], sums[1]) and torch.equal(sums[1], sums[2]) and sums[0].any()


def test_rows_are_stepped_by_the_optimizers_name():
    """Not by what is kept: one that has sums takes no step of SGD for want of them."""
    arrays = (torch.zeros(3, 2), None, torch.arange(3), torch.ones(3, 2), 0.1)
    with pytest.raises(ValueError, match="got optimizer 'momentum'; expected one of"):
        step_rows("momentum", *arrays)
    with pytest.raises(ValueError, match="rwsadagrad keeps a sum of each row"):
        step_rows("rwsadagrad", *arrays)
    assert not arrays[0].any()
    step_rows("sgd", arrays[0], torch.zeros(3), *arrays[2:])
    assert torch.equal(arrays[0], torch.full((3, 2), -0.1))


def test_bytes_per_row():
    assert bytes_per_row(16, "sgd") == 64
    assert bytes_per_row(16, "rwsadagrad") == 68


def test_network_and_rows_start_from_streams_of_their_own(monkeypatch):
    """One seed for both, and the first weights of either were the same draws."""
    seeds, plain = [], torch.initial_seed
    monkeypatch.setattr(torch, "initial_seed", lambda: seeds.append(plain()) or seeds[-1])
    dlrm([3, 16, 8], [16, 1], 5, seed=1)
    rows = initial_rows([1], 16, None, 1)  # from -1 to 1
    for seed in (1, *seeds):
        drawn = torch.rand(16, generator=torch.Generator().manual_seed(seed))
        assert not torch.allclose(rows[0], 2 * drawn - 1, atol=1e-3)
    assert seeds and seeds != [1]
