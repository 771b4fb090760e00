"""bench.scaling: distinct rows by brute force, formulas by hand, tables of forged runs."""

import csv
import json
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from helpers import MODEL_FLAGS, REPOSITORY

from bench import methods, run_records, scaling, scaling_runs
from bench.scaling_figure import apart
from bench.scaling_model import (
    H100_INPUTS,
    H100_STEP_MS,
    SCHEMES,
    Compute,
    Distinct,
    Kind,
    Links,
    Sampler,
    Sizes,
    expected,
    memory_bytes,
    received_bytes,
)
from bench.scaling_runs import Job
from slipstream.training.batching import EpochPlan, epoch_order
from slipstream.training.sets import load_segregated

MODES = ("strong", "weak")
SMALL = Sizes(num_rows=1000, num_hot=100, num_columns=3, dim=2, num_parameters=50, row_bytes=12)


def batches_of(prepared, size):
    """Slots and kind of each mini-batch of the first epoch, by the trainers' own plan."""
    sets = {True: prepared.data.hot, False: prepared.data.cold}
    orders = [epoch_order(sets[hot].day_offsets, "total", 7, 0) for hot in (True, False)]
    plan = EpochPlan(*orders, size, "interleaved")
    while (batch := plan.next_batch()) is not None:
        yield batch.hot, sets[batch.hot].slots_of(batch.inputs).numpy()


@pytest.mark.parametrize(("part", "processes"), [(50, 3), (64, 1), (700, 5)])
def test_distinct_rows_are_those_of_the_batches(segregated, part, processes):
    """The last case asks for more inputs than there are: all of a kind."""
    prepared = load_segregated(segregated)
    joined, num_hot = part * processes, prepared.num_hot
    batches = list(batches_of(prepared, joined))
    found = Sampler(prepared, "total", 7, num_batches=1000).measure(part, processes)
    assert found.hot_share == np.mean([hot for hot, _ in batches])
    sizes = {True: len(prepared.data.hot), False: len(prepared.data.cold)}
    assert found.is_whole == (min(sizes.values()) >= joined)
    for hot, kind in ((True, found.hot), (False, found.cold)):
        whole = [slots for is_hot, slots in batches if is_hot == hot]
        whole = [slots for slots in whole if len(slots) == min(joined, sizes[hot])]
        parts = []
        for slots in whole:
            bounds = [len(slots) * rank // processes for rank in range(processes + 1)]
            ranks = range(processes) if processes < 5 else (0, 1, 2, 4)  # spread over all
            parts += [slots[bounds[rank] : bounds[rank + 1]] for rank in ranks]
        rows = [set(slots.reshape(-1).tolist()) for slots in parts]
        together = [set(slots.reshape(-1).tolist()) for slots in whole]
        below = [len([row for row in one if row < num_hot]) for one in rows]
        assert kind.part_hot == pytest.approx(np.mean(below))
        assert kind.part_cold == pytest.approx(np.mean([len(one) for one in rows]) - np.mean(below))
        assert kind.joined_hot == pytest.approx(
            np.mean([len([row for row in one if row < num_hot]) for one in together])
        )
        assert kind.lookups == pytest.approx(np.mean([slots.size for slots in parts]))
    assert found.hot.part_cold == 0 and found.cold.part_cold > 0


def test_absent_elements_are_no_rows():
    slots = np.array([[0, -1], [0, 5], [1, -1], [-1, -1]])

    def inputs(rows):
        return SimpleNamespace(
            day_offsets=np.array([0, len(rows)]),
            window=0,
            slots_of=lambda chosen: torch.from_numpy(rows[chosen]),
        )

    data = SimpleNamespace(hot=inputs(slots[:0]), cold=inputs(slots))
    prepared = SimpleNamespace(data=data, num_hot=2, table_sizes=np.array([6]))
    found = Sampler(prepared, "none", 0, 3).measure(2, 2)
    assert found.hot_share == 0 and found.hot == Kind()
    assert found.cold == Kind(part_hot=1, joined_hot=2, part_cold=0.5, lookups=2)


def test_formulas_by_hand():
    hot, cold = Kind(10, 20, 0, 30), Kind(8, 12, 6, 30)
    parts = received_bytes(SMALL, Distinct(10, 4, 0.75, hot, cold))
    assert parts == {
        "network": 2 * 4 * 50 * 0.75,
        "hot_gradients": 9.5 * 0.75 * (8 + 4),
        "hot_new_rows": 18 * 0.75 * (8 + 4),
        "hot_pairs": 3 * 9.5 * (8 + 4),
        "hot_dense": 2 * 8 * 100 * 0.75,
        "cold": 1.5 * 0.75 * (8 + 16),
        "all_sharded": 30 * 0.75 * (8 + 16),
        "dense_replicated": 2 * 8 * 1000 * 0.75,
    }
    assert not any(received_bytes(SMALL, Distinct(10, 1, 0.75, hot, cold)).values())


def test_memory_by_hand():
    """Hot copies and staging on the device, a share of the cold rows in host memory."""
    memory = memory_bytes(SMALL, 10, 4)
    assert memory["ours_device"] == 100 * 8 + 100 * 4 / 4 + 2 * 30 * 12
    assert memory["ours_host"] == 900 * 12 / 4
    assert memory["ours"] == memory["ours_device"] + memory["ours_host"]
    assert memory["all-sharded"] == 1000 * 12 / 4
    assert memory["dense-replicated"] == 1000 * (12 + 8)
    # Never more staged than there is.
    assert memory_bytes(SMALL, 10_000, 4)["ours_device"] == 900 + 2 * 900 * 12


@pytest.mark.parametrize(
    ("processes", "dim", "megabytes"),
    [
        (8, 16, (3.3, 1.7, 448, 0.44, 6.3)),
        (8, 128, (17, 13, 448, 3.3, 48)),
        (32, 16, (3.7, 2.7, 496, 0.49, 7.0)),
        (32, 128, (19, 20, 496, 3.7, 53)),
    ],
)
def test_the_table_worked_out_beforehand_comes_out(processes, dim, megabytes):
    """Network, hot rows by owners and dense, cold ones, all sharded, as they were estimated.

    Of a synthetic log of 2 M rows, 2048 inputs a rank. The joined batches of cold inputs, which it
    leaves out, as they were measured later.
    """
    joined = {8: (14_287, 32_445), 32: (22_827, 47_271)}[processes]
    hot = Kind(5942, joined[0], 0, 2048 * 26)
    cold = Kind(10_447, joined[1], 10_463, 2048 * 26)
    num_parameters = {16: 480_000, 128: 2_400_000}[dim]
    sizes = Sizes(2_060_657, 256_000_000 // (4 * dim), 26, dim, num_parameters, 4 * dim + 4)
    parts = received_bytes(sizes, Distinct(2048, processes, 0.647, hot, cold))
    by_owners = parts["hot_gradients"] + parts["hot_new_rows"]
    found = (parts["network"], by_owners, *(parts[n] for n in ("hot_dense", "cold", "all_sharded")))
    assert [value / 1e6 for value in found] == pytest.approx(megabytes, rel=0.05)


def test_time_by_hand():
    links = Links(nvlink=100, nic=10, gpus_per_machine=4, latency_us=20)
    assert links.ring_ms(5e6, 4) == pytest.approx(0.05)
    assert links.ring_ms(5e6, 8) == pytest.approx(0.5)  # through the NIC once
    assert links.exchange_ms(5e6, 4) == pytest.approx(0.05)
    # Of 7 others 4 are elsewhere; their pieces for 4 GPUs share a NIC.
    assert links.exchange_ms(7e6, 8) == pytest.approx(4 * 4e6 / 10 / 1e6)
    assert links.exchange_ms(7e6, 1) == 0
    # GPUs of several machines that a wide NIC joins wait for NVLink.
    assert Links(100, 1000, 4).exchange_ms(7e6, 8) == pytest.approx(3e6 / 100 / 1e6)
    assert Links(100, 10, 1).exchange_ms(5e6, 2) == pytest.approx(0.5)


def test_speedup_and_efficiency():
    links, compute = Links(100, 10, 8, latency_us=50), Compute(1.0, 100, 0.2)
    hot, cold = Kind(10, 20, 0, 30), Kind(8, 12, 6, 30)
    for line in expected(SMALL, Distinct(100, 1, 0.5, hot, cold), compute, links, 100):
        assert line["speedup"] == pytest.approx(1) and line["communication_ms"] == 0
    weak = expected(SMALL, Distinct(100, 4, 0.5, hot, cold), compute, links, 100)
    assert [line["scheme"] for line in weak] == list(SCHEMES)
    # Four collectives, and four more in a cold batch; the bytes are a few.
    assert weak[0]["latency_ms"] == pytest.approx(0.3)
    assert weak[0]["efficiency"] == pytest.approx(1 / weak[0]["step_ms"])
    strong = expected(SMALL, Distinct(25, 4, 0.5, hot, cold), compute, links, 100)[0]
    assert strong["compute_ms"] == pytest.approx(0.4)
    assert strong["speedup"] == pytest.approx(1 / strong["step_ms"])
    assert strong["efficiency"] == pytest.approx(strong["speedup"] / 4)


def test_the_usual_step_is_the_one_measured():
    path = REPOSITORY / "bench/results/overlap_nvidia_h100_80gb_hbm3.csv"
    with path.open(newline="", encoding="utf-8") as file:
        [line] = [
            line
            for line in csv.DictReader(file)
            if (line["method"], line["mini_batch"]) == ("fae+adaptive+bf16", str(H100_INPUTS))
        ]
    rate = float(line["median_thousand_per_s"])
    assert pytest.approx(H100_INPUTS / rate, rel=0.001) == H100_STEP_MS


def forged(folder, command):
    """In place of a training: its log; two processes are 1.5 times as fast."""
    if (records := run_records.finished_records(folder)) is not None:
        return records
    ranks = int(command[command.index("--processes") + 1]) if "--processes" in command else 1
    size = int(command[command.index("--mini-batch-size") + 1])
    steps = 1 if "--num-batches" in command else 10
    seconds = steps * size / (1000 if ranks == 1 else 1500)
    summary = {"kind": "summary", "step": steps, "samples": steps * size, "training_s": seconds}
    if ranks > 1:
        parts = {"network": 4_000_000, "hot_rows": 2_000_000, "cold_rows": 1_000_000, "control": 0}
        summary |= {"processes": ranks, "communication_s": 0.25 * seconds}
        summary["received_bytes"] = steps * sum(parts.values())
        summary["communication"] = {
            kind: {"seconds": 0.1 * seconds, "bytes": steps * size} for kind, size in parts.items()
        }
    folder.mkdir(parents=True)
    lines = [{"kind": "start", "method": "fae"}, summary]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_records.finished_records(folder)


def test_runs_are_made_in_turn(monkeypatch):
    jobs = scaling_runs.jobs_of([2], 2)
    one_round = [("start", 1), ("both", 1), ("start", 2), ("strong", 2), ("weak", 2)]
    assert [(job.scaling, job.processes) for job in jobs] == 2 * one_round
    monkeypatch.setattr(scaling_runs.os, "sched_getaffinity", lambda _: set(range(8)))
    weak = scaling_runs.command_of(Job("weak", 2), "fae", "d", 64, ["--mini-batch-size", "9"])
    assert weak[:2] == ["env", "OMP_NUM_THREADS=4"] and weak[3].endswith("fae_train.py")
    assert weak[-6:] == ["--mini-batch-size", "128", "--print-freq", "0", "--processes", "2"]
    alone = scaling_runs.command_of(Job("both", 1), "slipstream", "d", 64, [])
    assert "OMP_NUM_THREADS=8" in alone and "--processes" not in alone
    assert scaling_runs.threads_of(16) == 1


def test_measured_beside_expected(segregated, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling_runs, "run_once", forged)
    out, runs = tmp_path / "results" / "scaling.csv", tmp_path / "runs"
    words = ["--segregated-data-dir", str(segregated), "--runs-dir", str(runs)]
    words += ["--repetitions", "2", "--gpus", "2", "32", *MODEL_FLAGS]
    scaling.main(words)
    assert "distinct rows" in capsys.readouterr().out
    for folder in runs.glob("w*"):  # what a start and a training took of all cores
        cpu_s = 3.0 if "start" in folder.name else 3.9
        (folder / "cpu.json").write_text(json.dumps({"cpu_s": cpu_s}))
    figure = tmp_path / "figures" / "w.png"
    with monkeypatch.context() as patch:  # of other code they are other runs
        patch.setattr(methods, "code_texts", lambda *_: {"step.py": "other"})
        with pytest.raises(ValueError, match="another comparison: code"):
            scaling.main(words)
    scaling.main([*words, "--out", str(out), "--figure", str(figure)])
    printed = capsys.readouterr().out
    assert "1.50 (1.50, 1.50)" in printed and "strong scaling" in printed
    table = pandas.read_csv(out)
    measured = table[table.kind == "measured"].set_index(["scaling", "processes"])
    assert len(measured) == 4
    strong, weak = measured.loc[("strong", 2)], measured.loc[("weak", 2)]
    assert strong.inputs_a_rank == 16 and weak.inputs_a_rank == 32
    assert (strong.efficiency, weak.samples_per_s) == (0.75, 1500)
    assert strong.step_ms == pytest.approx(1e3 * 32 / 1500, rel=1e-4)
    assert strong.compute_ms == pytest.approx(0.75 * strong.step_ms, rel=1e-4)
    assert weak.cpu_ms == pytest.approx(100) and weak.received_mb == 7 and weak.hot_rows_mb == 2
    assert measured.loc[("weak", 1)].communication_ms == 0
    # The formulas' volume stands beside it, and is that of the expected lines.
    ours = table[(table.kind == "expected") & (table.scheme == "ours")]
    ours = ours.set_index(["scaling", "processes"]).received_mb
    assert strong.formula_mb == pytest.approx(ours[("strong", 2)], rel=1e-4) and strong.formula_mb
    assert weak.formula_mb == pytest.approx(ours[("weak", 2)], rel=1e-4)
    report = json.loads(out.with_suffix(".json").read_text())
    assert report["sizes"]["dim"] == 8 and len(report["lines"]) == len(table)
    picture = figure.read_bytes()
    assert picture[:4] == b"\x89PNG" and int.from_bytes(picture[16:20], "big") == 880


def test_a_log_that_does_not_say_what_is_needed_is_refused(tmp_path):
    summary = {"processes": 2, "communication_s": 0.0, "received_bytes": 0, "communication": {}}
    job = Job("weak", 2)
    scaling_runs.check_summary(summary, job, tmp_path)
    scaling_runs.check_summary({}, Job("both", 1), tmp_path)
    for changes in ({"processes": 1}, {"processes": 3}):
        with pytest.raises(ValueError, match="processes; expected 2"):
            scaling_runs.check_summary({**summary, **changes}, job, tmp_path)
    del summary["communication"]
    with pytest.raises(ValueError, match="no communication$"):
        scaling_runs.check_summary(summary, job, tmp_path)
    bad = [{"kind": "summary", "communication": {"network": {"seconds": -1, "bytes": 0}}}]
    with pytest.raises(ValueError, match="communication.*seconds"):
        run_records.check_records(bad, tmp_path / "log.jsonl")


def test_the_model_alone_runs_nothing(segregated, monkeypatch, capsys):
    def no_run(*_):
        raise AssertionError

    monkeypatch.setattr(scaling_runs, "run_once", no_run)
    words = ["--segregated-data-dir", str(segregated), "--model-only", "true", *MODEL_FLAGS]
    # So slow a network that a second machine only delays.
    lines = scaling.main([*words, "--gpus", "8", "16", "--nic", "0.001", "--step-ms", "1"])
    assert {line["kind"] for line in lines} == {"expected"}
    printed = capsys.readouterr().out
    assert "their memory would be the reason" in printed and "give --step-ms" not in printed
    scaling.main(words)
    assert "give --step-ms" in capsys.readouterr().out  # an H100's is of another network
    most = {one: max(x["processes"] for x in lines if x["scaling"] == one) for one in MODES}
    # A step of 32 inputs has one for 32 ranks; the log has no hot or cold batch for 64 of 32.
    assert most == {"strong": 32, "weak": 32} and "no weak scaling for W = 64:" in printed
    for bad in (["--out", "x.png"], ["--step-ms", "0.1"], ["--gpus", "0"], ["--nonsense", "1"]):
        with pytest.raises(SystemExit) as stopped:
            scaling.main([*words, *bad])
        assert stopped.value.code == 2


def test_names_at_the_lines_ends_do_not_overlap():
    found = apart({"a": 0.5, "b": 0.51, "c": 0.9}, 0.05)
    assert found["b"] - found["a"] == pytest.approx(0.1) and found["c"] == 0.9
