import math

import numpy as np
import pytest
from helpers import TABLE_SIZES, segregate_small, small_arrays
from hypothesis import given, settings
from hypothesis import strategies as st

from slipstream.logs.processed import make_click_log
from slipstream.tools.npz import open_npz, pack_manifest, unpack_manifest, write_npz
from slipstream.training.min_counts import merge_rare, min_counts_after, rare_ids_of
from slipstream.training.popularity import count_hot_inputs, rank_inputs

MIN_COUNTS = (1, 2, 4, 10, 20, 50)
HELD_OUT = 4000 - 4000 // 7
FEATURES = [
    {"name": "user", "columns": [0], "table": 1, "pooling": "none"},
    {"name": "seen", "columns": [1, 2, 3], "table": 0, "pooling": "mean"},
    {"name": "item", "columns": [4], "table": 0, "pooling": "none"},
    {"name": "place", "columns": [5], "table": 2, "pooling": "none"},
]


def brute_force(lines, table_sizes, rare_ids, min_counts):
    """For each K the rows left, and the least number of hot rows that makes each input hot.

    lines are the (table, id) of inputs, an id of -1 is absent.
    """
    accesses = {(t, row): 0 for t, size in enumerate(table_sizes) for row in range(size)}
    for line in lines:
        for key in line:
            if key[1] >= 0:
                accesses[key] += 1
    found = []
    for number, min_count in enumerate(min_counts):
        merged_into, merged = {}, {}
        for (table, row), count in accesses.items():
            is_merged = number > 0 and (count < min_count or row == rare_ids[table])
            key = (table, math.inf) if is_merged else (table, row)
            merged_into[table, row] = key
            merged[key] = merged.get(key, 0) + count
        order = sorted(merged, key=lambda key: (-merged[key], key))
        place = {key: number for number, key in enumerate(order, start=1)}
        needed = [
            max([place[merged_into[key]] for key in line if key[1] >= 0], default=0)
            for line in lines
        ]
        found.append((len(merged), np.array(needed)))
    return found


@given(st.data())
@settings(max_examples=120, deadline=None)
def test_rows_and_hot_inputs_equal_brute_force(data):
    """Tables that features share, absent elements, tables with a shared row already."""
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    num_rows = data.draw(st.integers(2, 100))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=3))
    skew = data.draw(st.sampled_from([1.0, 2.0, 6.0]))
    tables = np.array([1, 0, 0, 0, 0, 2])
    ids = (rng.random((num_rows, 6)) ** skew * np.array(sizes)[tables]).astype(np.int32)
    ids[:, 1:4][rng.random((num_rows, 3)) < 0.4] = -1
    made_with = data.draw(st.sampled_from([1, 2, 3, 60]))
    rare = [data.draw(st.none() | st.integers(0, size - 1)) for size in sizes]
    if made_with == 1:
        rare = [None] * 3
    manifest = {
        "features": FEATURES,
        "options": {"min_count": made_with},
        "table_columns": [{} if one is None else {"rare_id": one} for one in rare],
    }
    zeros = np.zeros((num_rows, 1), np.int32)
    days = np.array([0, num_rows - 1, num_rows])
    y = np.zeros(num_rows, np.int8)
    log = make_click_log(zeros, ids, y, np.array(sizes), days, "log", manifest)
    train = log.splits()[0]
    ranking = rank_inputs(train, sum(sizes), 100.0, 0)
    min_counts = min_counts_after(log.manifest)
    assert min_counts == [made_with, *(count for count in MIN_COUNTS if count > made_with)]
    rare_ids = rare_ids_of(log.manifest, 3)
    assert rare_ids == rare
    lines = [list(zip(tables.tolist(), line, strict=True)) for line in ids[:-1].tolist()]
    expected = brute_force(lines, sizes, rare, min_counts)
    for num_hot in range(sum(sizes) + 1):
        merged = merge_rare(ranking, log.table_sizes, rare_ids, min_counts, num_hot)
        hot, _, by_bits = count_hot_inputs(train, ranking.slot_of_row, [num_hot], merged.hot_bits)
        assert merged.figures(by_bits, 32) == [
            (min_count, rows, 32 * rows, (needed <= num_hot).mean())
            for min_count, (rows, needed) in zip(min_counts, expected, strict=True)
        ]
        assert merged.figures(by_bits, 32)[0][3] == hot[0] / len(train)


def figures_of(folder):
    return unpack_manifest(open_npz(folder / "embedding_rows.npz"))["figures"]


@pytest.mark.parametrize("flags", ["--hot-emb-gpu-mem 3840", "--hot-threshold 0.001"])
def test_figures_of_a_folder_and_what_is_printed(processed, capsys, flags):
    flags += " --verbose"
    folder = segregate_small(processed, *flags.split())
    figures = figures_of(folder)
    ids = small_arrays()[1][:HELD_OUT]
    lines = [list(enumerate(line)) for line in ids.tolist()]
    expected = brute_force(lines, TABLE_SIZES, [None] * 5, MIN_COUNTS)
    shares = [
        [min_count, rows, 32 * rows, (needed <= figures["num_hot"]).mean()]
        for min_count, (rows, needed) in zip(MIN_COUNTS, expected, strict=True)
    ]
    assert figures["min_counts"] == shares
    first = figures["min_counts"][0]
    assert first == [1, figures["num_rows"], 32 * figures["num_rows"], figures["hot_input_share"]]
    assert 0 < first[3] < figures["min_counts"][-1][3]
    printed = capsys.readouterr().out
    shown = printed.split("--min-count")[1].splitlines()[1:7]
    for line, (min_count, rows, num_bytes, share) in zip(shown, shares, strict=True):
        words = [str(min_count), f"{rows:,}", f"{num_bytes / 2**20:,.3f}", f"{share:.2%}"]
        assert line.split() == words
    segregate_small(processed, *flags.split())  # up to date: printed from the manifest
    assert printed.partition("hot are")[2] == capsys.readouterr().out.partition("hot are")[2]


def test_no_table_unless_asked_of_all_inputs_and_where_a_larger_count_is_left(processed, capsys):
    shown = ("--hot-emb-gpu-mem", "3840", "--verbose")
    for flags in (["--min-count-report", "false"], ["--ip-sampling-rate", "50"]):
        figures = figures_of(segregate_small(processed, *shown, *flags))
        printed = capsys.readouterr().out
        assert "--min-count" not in printed and "budget MB" in printed
        assert [line[0] for line in figures["min_counts"]] == [1]
        assert figures["min_counts"][0][3] == figures["hot_input_share"]
    manifest = pack_manifest({"options": {"min_count": 50}})
    write_npz(processed, {**open_npz(processed), "manifest": manifest})
    folder = segregate_small(processed, "--hot-emb-gpu-mem", "3840", "--verbose")
    assert "--min-count" not in capsys.readouterr().out
    assert [line[0] for line in figures_of(folder)["min_counts"]] == [50]


def test_a_folder_of_before_stays_up_to_date(processed, capsys):
    folder = segregate_small(processed, "--hot-emb-gpu-mem", "3840", "--verbose")
    path = folder / "embedding_rows.npz"
    arrays = {name: np.array(array) for name, array in open_npz(path).items()}
    manifest = unpack_manifest(arrays)
    del manifest["figures"]["min_counts"]
    write_npz(path, {**arrays, "manifest": pack_manifest(manifest)})
    capsys.readouterr()
    segregate_small(processed, "--hot-emb-gpu-mem", "3840", "--verbose")
    printed = capsys.readouterr().out
    assert "is up to date" in printed and "--min-count" not in printed
