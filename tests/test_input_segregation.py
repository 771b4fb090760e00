import numpy as np
import pytest
from helpers import TABLE_SIZES, segregate_small, small_arrays, write_processed

from dlrm_data_pytorch import load_segregated
from slipstream.tools.npz import open_npz
from slipstream.training.popularity import rank_rows, rows_above

HELD_OUT = 4000 - 4000 // 7  # the last day of 4000 rows has 571
OFFSETS = np.concatenate([[0], np.cumsum(TABLE_SIZES)[:-1]])


def brute_force(ids, num_train):
    """Row by row: accesses, slots and, for each input, its largest slot."""
    accesses = {(table, row): 0 for table, size in enumerate(TABLE_SIZES) for row in range(size)}
    for line in ids[:num_train].tolist():
        for table, row in enumerate(line):
            accesses[table, row] += 1
    order = sorted(accesses, key=lambda key: (-accesses[key], key))
    slot = {key: number for number, key in enumerate(order)}
    largest = [max(slot[table, row] for table, row in enumerate(line)) for line in ids.tolist()]
    return slot, [accesses[key] for key in order], np.array(largest)


def test_slots_hot_rows_and_hot_inputs_equal_brute_force(processed):
    folder = segregate_small(processed, "--hot-emb-gpu-mem", str(120 * 32 + 31))
    dense, ids, y = small_arrays()
    slot, counts, largest = brute_force(ids, HELD_OUT)
    rows = open_npz(folder / "embedding_rows.npz")
    assert rows["num_hot"] == 120
    assert rows["slot_of_row"].dtype == np.int32
    for (table, row), number in slot.items():
        assert rows["slot_of_row"][OFFSETS[table] + row] == number
    assert rows["access_counts"].tolist() == counts
    assert rows["lambda"] == counts[119] / sum(counts)
    hot = largest < 120
    train = np.arange(4000) < HELD_OUT
    half = HELD_OUT + (4000 - HELD_OUT) // 2
    chosen = {
        "train_hot": hot & train,
        "train_cold": ~hot & train,
        "test": ~train & (np.arange(4000) < half),
        "val": np.arange(4000) >= half,
    }
    assert chosen["train_hot"].any() and chosen["train_cold"].any()
    for name, mask in chosen.items():
        arrays = open_npz(folder / f"{name}.npz")
        assert np.array_equal(arrays["X_int"], dense[mask])
        assert np.array_equal(arrays["y"], y[mask])
        expected = [[slot[t, row] for t, row in enumerate(line)] for line in ids[mask].tolist()]
        assert arrays["slots"].tolist() == expected and arrays["slots"].dtype == np.int32


def test_days_of_hot_and_cold_inputs(processed):
    folder = segregate_small(processed)
    _, ids, _ = small_arrays()
    hot = brute_force(ids, HELD_OUT)[2] < 120
    starts = [0, 572, 1144, 1716, 2287, 2858, HELD_OUT]
    for name, mask in (("train_hot", hot), ("train_cold", ~hot)):
        expected = [int(mask[:start].sum()) for start in starts]
        assert open_npz(folder / f"{name}.npz")["days"].tolist() == expected


@pytest.mark.parametrize("share", [1e-4, 1e-3, 0.02, 0.2, 1.0])
def test_threshold_picks_rows_by_their_share_of_accesses(processed, share):
    folder = segregate_small(processed, "--hot-threshold", str(share))
    _, ids, _ = small_arrays()
    _, counts, largest = brute_force(ids, HELD_OUT)
    num_hot = sum(count / sum(counts) >= share for count in counts)
    prepared = load_segregated(folder)
    assert prepared.num_hot == num_hot
    assert len(prepared.data.hot) == (largest[:HELD_OUT] < num_hot).sum()


def test_all_hot_none_hot_and_one_row_tables(tmp_path):
    sizes = np.array([1, 1, 1], np.int64)
    processed = write_processed(tmp_path / "p.npz", 70, sizes)
    everything = load_segregated(segregate_small(processed, "--hot-emb-gpu-mem", "96"))
    assert everything.num_hot == 3 and len(everything.data.hot) == 60
    assert len(everything.data.cold) == 0
    nothing = load_segregated(segregate_small(processed, "--hot-emb-gpu-mem", "5"))
    assert nothing.num_hot == 0 and len(nothing.data.hot) == 0 and len(nothing.data.cold) == 60


def test_a_sample_of_inputs_is_seeded(processed):
    def slots(*flags):
        folder = segregate_small(processed, "--hot-emb-gpu-mem", "3840", *flags)
        rows = open_npz(folder / "embedding_rows.npz")
        return rows["slot_of_row"].tolist(), int(rows["access_counts"].sum())

    first, again, other, whole = (
        slots(*flags.split())
        for flags in (
            "--ip-sampling-rate 5 --seed 1",
            "--ip-sampling-rate 5.0 --seed 1",
            "--ip-sampling-rate 5 --seed 2",
            "",
        )
    )
    assert first == again and first[0] != other[0] != whole[0]
    assert first[1] == other[1] == round(0.05 * HELD_OUT) * len(TABLE_SIZES)
    assert whole[1] == HELD_OUT * len(TABLE_SIZES)


def test_up_to_date_and_rebuilt(processed, capsys):
    folder = segregate_small(processed)
    before = (folder / "embedding_rows.npz").stat().st_mtime_ns
    segregate_small(processed)
    assert "up to date" in capsys.readouterr().out
    assert (folder / "embedding_rows.npz").stat().st_mtime_ns == before
    segregate_small(processed, "--hot-emb-gpu-mem", "64")  # other options
    assert load_segregated(folder).num_hot == 2
    (folder / "test.npz").unlink()  # a damaged folder is rebuilt, not trusted
    segregate_small(processed, "--hot-emb-gpu-mem", "64")
    assert (folder / "test.npz").exists()
    write_processed(processed, seed=1)  # another log under the same name
    segregate_small(processed, "--hot-emb-gpu-mem", "64")
    load_segregated(folder, processed)
    assert [path.name for path in folder.parent.iterdir() if "partial" in path.name] == []


def test_budget_table_equals_counting(processed, capsys):
    segregate_small(processed, "--hot-emb-gpu-mem", "3840", "--verbose")
    _, ids, _ = small_arrays()
    _, counts, largest = brute_force(ids, HELD_OUT)
    lines = capsys.readouterr().out.split("inputs hot\n")[-1].splitlines()[:10]
    assert len(lines) == 10
    for halvings, line in enumerate(lines):
        num_hot = sum(TABLE_SIZES) >> halvings
        _, rows, accesses, inputs = line.split()
        assert int(rows.replace(",", "")) == num_hot
        assert float(accesses[:-1]) == pytest.approx(
            100 * sum(counts[:num_hot]) / sum(counts), abs=0.01
        )
        assert float(inputs[:-1]) == pytest.approx(
            100 * (largest[:HELD_OUT] < num_hot).mean(), abs=0.01
        )


def test_ranks_equal_sorting():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 200_000, 5000) * (rng.random(5000) < 0.5)
    counts[:6] = [65535, 65536, 65534, 65536, 65535, 2**40]
    ranking = rank_rows(counts)
    order = sorted(range(5000), key=lambda row: (-counts[row], row))
    assert ranking.slot_of_row[order].tolist() == list(range(5000))
    assert ranking.access_counts.tolist() == counts[order].tolist()


def test_a_printed_threshold_gives_its_rows_back():
    for num_rows in (49, 98, 103):
        ranking = rank_rows(np.ones(num_rows, np.int64))
        assert rows_above(ranking, ranking.hot_threshold(num_rows)) == num_rows


def test_a_folder_that_holds_other_files_is_never_replaced(processed):
    """Not the target, nor what lies under the names used on the way."""
    folder = processed.parent / "hot_cold"
    for name in ("hot_cold", "hot_cold.partial", "hot_cold.old"):
        other = processed.parent / name
        other.mkdir()
        (other / "thesis.txt").write_text("five years")
        with pytest.raises(ValueError, match="holds thesis.txt; choose another folder"):
            segregate_small(processed)
        (other / "thesis.txt").unlink()
        other.rmdir()
    with pytest.raises(ValueError, match="not ours to replace"):
        segregate_small(processed, "--segregated-data-dir", str(processed.parent))
    assert processed.exists() and not folder.exists()
    folder.mkdir()
    (folder / "test.npz.partial").touch()  # a killed run's leftovers are
    segregate_small(processed)
    assert not (folder / "test.npz.partial").exists()
