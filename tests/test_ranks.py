"""Several processes train as one: the same weights, the same choices, faults that are named.

Each launch trains many small runs (`rank_worker.py`): one process, two and three ranks.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rank_worker
import torch
from helpers import (
    MODEL_FLAGS,
    REPOSITORY,
    assert_same_weights,
    segregate_small,
    write_processed,
)
from test_models import write_clicks

import data_utils
import fae_train
import input_segregation
from bench import multi_hot
from dlrm_data_pytorch import load_segregated
from slipstream.tools import cli, processes
from slipstream.tools.ranks import RankLost, Ranks
from slipstream.training.saved import find_checkpoint

OWN = REPOSITORY / "tests/own_network.py"
BATCH = 15  # 2 hot inputs and 1 cold one are left for the last batches: fewer than 3 ranks
ADAM = "--optimizer rwsadagrad --dense-optimizer adam --learning-rate 0.1".split()
SHORT = ["--num-batches", 12]
EARLY = "--alpha 0.5 --snapshot-window 0.2 --drop-min-steps 0".split()
OFTEN = "--snapshot-start 0.05 --snapshot-window 0.1 --recalibrate-every 0.1".split()
POLICY = """
class Score:
    pool, mean = "all", None

    def __call__(self, chunk):
        losses = chunk.losses()
        if self.mean is None:
            self.mean = losses.new_zeros(chunk.num_inputs)
        known = losses + chunk.rows().abs().mean((1, 2)) + chunk.row_sums().sqrt().mean(1)
        self.mean[chunk.ids] = 0.5 * self.mean[chunk.ids] + known + 0.01 * chunk.dense.sum(1)
        return self.mean[chunk.ids]

    def state_dict(self):
        return {} if self.mean is None else {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state.get("mean")
"""


def words_of(folder, *flags):
    data = ["--segregated-data-dir", folder]
    return [str(word) for word in (*data, *MODEL_FLAGS, "--mini-batch-size", BATCH, *flags)]


def segregated_of(folder, name, processed, budget):
    words = ["--processed-data-file", processed, "--segregated-data-dir", folder / name]
    words += ["--hot-emb-gpu-mem", budget, "--arch-sparse-feature-size", 8]
    input_segregation.main([str(word) for word in words])
    return folder / name


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A plain log with sgd's and Adagrad's rows, one of multi-hot features, one of sequences."""
    folder = tmp_path_factory.mktemp("ranks")
    processed = write_processed(folder / "p.npz", 1000)
    plain = segregate_small(processed)
    prepared = load_segregated(plain)
    sizes = (len(prepared.data.hot), len(prepared.data.cold))
    assert [size % BATCH for size in sizes] == [2, 1] and min(sizes) > 5 * BATCH
    adagrad = segregated_of(folder, "adagrad", processed, 120 * 36)
    (folder / "policy.py").write_text(POLICY)
    several = folder / "several.npz"
    multi = ["--processed-data-file", processed, "--output", several, "--values", *"21413"]
    multi_hot.main([str(word) for word in multi])
    write_clicks(folder / "UserBehavior.csv", 600)
    data_utils.preprocess("taobao", folder / "UserBehavior.csv", folder / "clicks.npz", history=3)
    return {
        "folder": folder,
        "plain": plain,
        "adagrad": adagrad,
        "several": segregated_of(folder, "several", several, 400 * 36),
        "sequences": segregated_of(folder, "sequences", folder / "clicks.npz", 3000),
    }


def equal_cases(data):
    """Runs that come out the same whatever the number of ranks."""
    plain, adagrad, folder = data["plain"], data["adagrad"], data["folder"]
    policy = f"{folder / 'policy.py'}:Score"
    rows, tests = ["--num-resident"], ["--test-mini-batch-size"]
    found = {
        "sgd": ("fae", words_of(plain, "--learning-rate", 1)),
        "adam": ("fae", words_of(adagrad, *ADAM, "--schedule", "phased", "--lr-decay-share", 0.3)),
        "budget": ("fae", words_of(adagrad, *ADAM, *rows, 13)),  # below the rows of a batch
        # And evaluated by so few that a rank's part is none.
        "no-copies": ("fae", words_of(adagrad, *ADAM, *rows, 0, *SHORT, *tests, 2)),
        "all-copies": ("fae", words_of(adagrad, *ADAM, *rows, 1348, *SHORT)),
        "stale": ("slipstream", words_of(adagrad, *ADAM, *EARLY, "--recalibrate-every", 0.2)),
        "weights": ("slipstream", words_of(plain, *EARLY, "--stale-keep-rate", 0.3, *rows, 60)),
        "policy": (
            "slipstream",
            words_of(adagrad, *ADAM, *EARLY, "--drop-policy", policy, *rows, 60),
        ),
        "several": ("fae", words_of(data["several"], *ADAM, "--loss-function", "wbce")),
        "sequences": (
            "slipstream",
            words_of(
                data["sequences"], *ADAM, *EARLY, "--model", "tbsm", "--arch-mlp-bot", "auto-8"
            ),
        ),
    }
    found["several"][1].extend(["--loss-weights", "1.0-2.0"])
    own = ["--model", f"{OWN}:Late", "--model-args", "since=30", "strength=0.1"]
    # Not to the end: what a network counts itself is of the batches of which a rank has a part.
    found["own"] = ("fae", words_of(adagrad, *ADAM, *own, "--num-batches", 50))
    baseline = ["--processed-data-file", str(folder / "p.npz"), *MODEL_FLAGS, *ADAM]
    found["baseline"] = ("baseline", [*baseline, "--mini-batch-size", str(BATCH)])
    cases = [
        {"name": name, "script": script, "words": words, "dtype": "float64"}
        for name, (script, words) in found.items()
    ]
    script, words = found["stale"]
    return [*cases, {"name": "float32", "script": script, "words": [*words, "--val-freq", "20"]}]


def part_of(folder, name, steps, *flags):
    """One part of a run in parts, each with another number of ranks."""
    where = ["--save-model", str(folder), "--num-batches", str(steps), "--run-name", name, *flags]
    return {"name": name, "script": "slipstream", "words": where}


def launch(number, folder, cases, **environment):
    folder.mkdir()
    (folder / "cases.json").write_text(json.dumps(cases))
    worker = [
        sys.executable,
        REPOSITORY / "tests" / "rank_worker.py",
        number,
        folder / "cases.json",
    ]
    return subprocess.run(
        [str(word) for word in worker],
        capture_output=True,
        text=True,
        env={**os.environ, "SLIPSTREAM_RANK_TIMEOUT": "60", **environment},
        timeout=150,
    )


FAULTS = {
    "seed": "rank 1 has another order of its batches",
    "lost row gradient": "lost or changed on the way from rank 1 to rank 0",
    "lost network gradient": "gradients of the network were lost",
    "order": "rank 2: rows are not what the sum of all ranks' gradients, in the order",
    "drifted copy": "rank 1 has another copy of the hot rows",
}
STEPS = {1: 9, 2: 20, 3: 40}  # where the run in parts stops, the second time within the window
LAST = {2: "raises", 3: "killed"}  # how rank 1 of so many ends, after all cases


@dataclass
class End:
    """How a launch came to its end, and when; `number` ranks in `folder`."""

    run: subprocess.CompletedProcess
    at: float
    folder: Path
    number: int


def run_here(cases, folder):
    """By one process: this one."""
    folder.mkdir()
    dtype = torch.get_default_dtype()
    try:
        for case in cases:
            rank_worker.run_case(case, folder, None)
    finally:
        torch.set_default_dtype(dtype)
        rank_worker.plant(None, None, [])


@pytest.fixture(scope="module")
def ends():
    """By how one of its ranks failed: the end of a launch."""
    return {}


@pytest.fixture(scope="module")
def outcomes(data, ends):
    """By number of ranks: what came out of each case; and the run in parts, in `chain`."""
    folder = data["folder"]
    chain = [*words_of(data["adagrad"], *ADAM, *EARLY), "--checkpoint-every", "9", "--keep", "9"]
    found, cases = {}, equal_cases(data)
    for number in (1, 2, 3):
        more = [part_of(folder / "chain", f"chain-{number}", STEPS[number], *chain)]
        if number > 1:
            more[0]["words"] += ["--load-model", "auto"]
        if number == 2:
            whole, parts = folder / "whole", folder / "parts"
            own = [*chain, *OFTEN, "--drop-policy", f"{folder / 'policy.py'}:Score"]
            own += ["--model", f"{OWN}:Late", "--model-args", "since=15"]
            more += [part_of(whole, "whole", 40, *own), part_of(parts, "part", 20, *own)]
            more.append(part_of(parts, "rest", 40, *own, "--load-model", "auto"))
        if number == 3:
            words = words_of(data["adagrad"], *ADAM, "--print-freq", 10)
            faults = {fault: list(words) for fault in FAULTS}
            # Three gradients of a row on that rank round otherwise in few of the mini-batches.
            faults["order"] += ["--print-freq", "1"]
            # Found before the end where nothing is due on the way.
            faults["drifted copy"] += ["--print-freq", "0", "--num-batches", "20"]
            more += [
                {"name": fault, "script": "fae", "words": flags, "plant": fault}
                for fault, flags in faults.items()
            ]
        of_number = folder / f"of-{number}"
        if number == 1:
            run_here([*cases, *more], of_number)
        else:
            last = failing_case(data, of_number / "model", LAST[number])
            run = launch(number, of_number, [*cases, *more, last])
            ends[LAST[number]] = End(run, time.time(), of_number, number)
            assert "Traceback" not in run.stderr and "FutureWarning" not in run.stderr
        found[number] = {}
        for path in of_number.glob("*.npz"):
            with np.load(path) as file:
                values = {name: file[name] for name in file.files}
            found[number][path.stem] = (json.loads(str(values.pop("said"))), values)
    return found


@pytest.mark.parametrize("number", [2, 3])
def test_equals_one_process(data, outcomes, number):
    """In float64, after an epoch of over 50 steps: 1e-10."""
    for case in equal_cases(data):
        name = case["name"]
        said, values = outcomes[number][name]
        expected_said, expected = outcomes[1][name]
        tolerance = 1e-10 if name != "float32" else 2e-4
        assert said["step"] == expected_said["step"] > (40 if "copies" not in name else 10), name
        assert said["dropped"] == expected_said["dropped"], name
        assert (said["dropped"] > 0) == (case["script"] == "slipstream"), name
        assert said["auc"] == pytest.approx(expected_said["auc"], abs=tolerance), name
        assert values.keys() == expected.keys() and "rows" in values
        for key, value in values.items():
            assert value.dtype == expected[key].dtype
            assert np.abs(value - expected[key]).max() <= tolerance, (name, key)
        assert np.abs(values["rows"]).max() > 0.1
        assert said["copies_equal"] and said["processes"] == number
        # Of training alone: neither the start, in which one waits for the others, nor evaluation.
        assert 0 < said["communication_s"] < said["training_s"], name
        assert "network" in said["communication"] and "evaluation" not in said["communication"]


@pytest.mark.parametrize("number", [2, 3])
def test_other_rows_are_dealt_out(outcomes, number):
    said, values = outcomes[number]["baseline"]
    assert said["cold_rows_here"] == -(-len(values["rows"]) // number)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(outcomes, fault):
    """By the first report after it: no rank has trained to the end."""
    said, values = outcomes[3][fault]
    assert FAULTS[fault] in said["error"] and not values


def test_goes_on_with_another_number(data, outcomes, tmp_path):
    """One process, two, three and one again, stopped within the window, as one does at a stretch;
    and bit for bit as uninterrupted where the number stays.
    """
    folder = data["folder"]
    midway = find_checkpoint(folder / "parts" / "step-0000000020")
    assert "snapshot_at" in midway.values["rule"] and midway.values["rule"]["choices"] == 1
    assert_same_weights(folder / "whole", folder / "parts")
    ends = [find_checkpoint(folder / name) for name in ("whole", "parts")]
    assert np.array_equal(*(end.arrays["drops.state.mean"] for end in ends))
    assert ends[0].values["rule"]["choices"] > 1
    words = [*words_of(data["adagrad"], *ADAM, *EARLY), "--runs-dir", str(tmp_path)]
    import slipstream_train

    chain = ["--save-model", str(folder / "chain"), "--load-model", "auto"]
    got = slipstream_train.main([*words, *chain])
    expected = slipstream_train.main([*words, "--save-model", str(tmp_path / "at once")])
    assert got["dropped"] == expected["dropped"] > 0 and got["step"] == expected["step"]
    assert got["auc"] == pytest.approx(expected["auc"], abs=1e-4)
    assert len(got["drops"]) == 1


def failing_case(data, model, plant):
    """A run of which rank 1 fails at its 12th step."""
    words = words_of(data["adagrad"], *ADAM, "--checkpoint-every", 5, "--save-model", model)
    return {"name": "failing", "script": "fae", "words": words, "plant": plant}


@pytest.mark.parametrize(
    ("plant", "status", "line"),
    [
        ("raises", 2, "rank_worker.py: error: rank 1: planted"),
        ("killed", 1, "rank_worker.py: error: rank 1 (process {1}) was killed by SIGKILL"),
        ("stopped", 2, "rank_worker.py: error: rank 1 ("),
    ],
)
def test_a_rank_fails(data, outcomes, ends, tmp_path, plant, status, line):
    """All end, in a line that names it, and soon."""
    if plant in LAST.values():
        end = ends[plant]
    else:
        folder = tmp_path / "run"
        case = failing_case(data, folder / "model", plant)
        run = launch(2, folder, [case], SLIPSTREAM_RANK_TIMEOUT="4")
        end = End(run, time.time(), folder, 2)
    [said] = end.run.stderr.strip().splitlines()
    assert end.run.returncode == status, said
    pids = {path.read_text(): int(path.name) for path in (end.folder / "pids").iterdir()}
    assert len(pids) == end.number
    for pid in pids.values():
        assert not Path(f"/proc/{pid}").exists()
    assert said.startswith(line.replace("{1}", str(pids["1"])))
    assert f"process {pids['1']}" in said or plant == "raises"
    checkpoint = find_checkpoint(end.folder / "model")
    assert checkpoint.step == 10
    assert end.at - checkpoint.folder.stat().st_mtime < 30


def test_ctrl_c_ends_all_ranks_with_a_checkpoint(data, tmp_path):
    words = words_of(data["adagrad"], *ADAM, "--nepochs", 10_000, "--processes", 2)
    words += ["--runs-dir", tmp_path / "runs", "--save-model", tmp_path / "model"]
    command = [sys.executable, REPOSITORY / "fae_train.py", *words, "--checkpoint-every", 20]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SLIPSTREAM_RANK_TIMEOUT": "60"},
    )
    while not list((tmp_path / "model").glob("step-*")):
        time.sleep(0.1)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert error.split("\n") == ["", "stopping after this mini-batch; once more: at once", ""]
    step = find_checkpoint(tmp_path / "model").step
    assert out.splitlines()[-1].startswith(f"stopped by SIGINT at step {step}; ")
    # One process goes on from there.
    where = ["--load-model", "auto", "--num-batches", step + 3]
    more = [str(word) for word in (*words[: words.index("--processes")], *words[-4:], *where)]
    assert fae_train.main(more)["step"] == step + 3


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux'")
def test_a_table_too_large_for_one_process(tmp_path):
    """6 M rows take 408 MB, the run 432: with 410 free two processes train it, and one does not."""
    sizes = np.array([40, 1, 300, 7, 6_000_000])
    processed = write_processed(tmp_path / "p.npz", 1000, sizes)
    words = ["--processed-data-file", processed, "--runs-dir", tmp_path, *MODEL_FLAGS, *ADAM]
    words += ["--arch-sparse-feature-size", 16, "--arch-mlp-bot", "3-16", "--num-batches", 3]

    def run(number, kilobytes):
        command = [sys.executable, REPOSITORY / "dlrm_s_pytorch.py", *words, "--processes", number]
        line = " ".join(str(word) for word in command)
        limited = ["bash", "-c", f"ulimit -d {kilobytes}; {line}"]
        return subprocess.run(limited, capture_output=True, text=True, timeout=60)

    limit = 600_000
    alone = run(1, limit)
    found = re.search(r"about 432 MB .* 408 MB of them .*; (\d+) MB are free", alone.stderr)
    assert alone.returncode == 2 and found, alone.stderr
    together = run(2, limit + 1000 * (410 - int(found[1])))
    assert together.returncode == 0 and not together.stderr and "test AUC" in together.stdout
    assert cli.said_of(MemoryError()) == "out of memory"  # Python's own has no text


def test_another_number_than_the_launcher_started(monkeypatch, tmp_path):
    for name, value in zip(processes.VARIABLES, ("0", "3", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--processes 2: the launcher started 3; leave it out"):
        processes.start(2, "fae_train.py", [])
    processes.start(3, "fae_train.py", [])  # this is one of them


def test_a_launcher_that_is_gone_leaves_no_rank(monkeypatch):
    """Killed before its ranks could ask to be told: they do not wait for its store."""
    monkeypatch.setattr(sys, "platform", "none")  # pytest does not ask
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(processes.LAUNCHED, "0")  # nobody's parent
    with pytest.raises(SystemExit) as end:
        processes._run_rank(lambda: None)
    assert end.value.code == 128 + signal.SIGTERM


@pytest.mark.parametrize("is_gone", [True, False])
def test_who_is_lost_with_the_launcher(monkeypatch, is_gone):
    """What another rank does that heard of it earlier is no fault to be told."""

    def lose():
        if is_gone:
            monkeypatch.setenv(processes.LAUNCHED, "0")
        raise RankLost("control: closed")

    for name, value in zip(processes.VARIABLES, ("0", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(processes.LAUNCHED, str(os.getppid()))
    monkeypatch.setattr(sys, "platform", "none")
    monkeypatch.setattr(processes, "_join", lambda rank: (None, None))
    monkeypatch.setattr(processes, "_who_is_lost", lambda rank, reason: "lost")
    with pytest.raises(SystemExit if is_gone else ValueError) as end:
        processes._run_rank(lose)
    assert str(end.value) == (str(128 + signal.SIGTERM) if is_gone else "lost")


def test_nobody_listens(monkeypatch, capfd):
    """One line, within the time that is given."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        place = "127.0.0.1", str(held.getsockname()[1])
        for name, value in zip(processes.VARIABLES, ("1", "2", *place), strict=True):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(processes.TIMEOUT_VARIABLE, "0.4")
        monkeypatch.setattr(processes, "START_S", 0.4)
        start = time.monotonic()
        said = f"the 2 ranks did not find each other at {':'.join(place)} within 0.4 s: .*refused"
        with pytest.raises(ValueError, match=said):
            processes._join(1)
    assert time.monotonic() - start < 2 and capfd.readouterr().err == ""


@pytest.mark.parametrize(("is_lost", "status"), [(True, 3), (False, -signal.SIGTERM)])
def test_torchrun_waits_for_the_line(is_lost, status):
    """It asks all ranks to end as soon as one has; those that miss it say which first."""
    child = os.fork()
    if not child:
        ranks = Ranks.__new__(Ranks)
        ranks.is_lost, processes._ranks = False, ranks
        with contextlib.suppress(RankLost):
            with ranks._collective("control", 0):
                raise RuntimeError("closed") if is_lost else RankLost
        signal.signal(signal.SIGTERM, processes._end_unless_lost)
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status
