"""Between two stages of a run nobody replaces what the next one is to open."""

import fcntl
import json
import os
import sys

import pytest
from helpers import MODEL_FLAGS, segregate_small, train, write_processed

import data_utils
import dlrm_s_pytorch
import fae_train
import input_segregation
from bench.faults import wait
from slipstream.tools.locks import VARIABLE, exclusive
from slipstream.training import data_flags


def is_free(folder):
    """Whether another process could lock a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@pytest.fixture
def handed_on(tmp_path, monkeypatch):
    """The folder's descriptor, twice, as a run script has it where both files lie in one folder."""
    descriptors = [os.open(tmp_path, os.O_RDONLY) for _ in range(2)]
    os.set_inheritable(descriptors[0], True)
    monkeypatch.setenv(VARIABLE, " ".join(map(str, descriptors)))
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


def other_call(folder, descriptors):
    """Segregate with another budget, in a process of its own, as another script's stage does.

    Returns its number and what it says, when it waits or has ended.
    """
    said, says = os.pipe()
    process = os.fork()
    if process:
        os.close(says)
        lines = open(said)
        while (line := lines.readline()) and not line.startswith("waiting for another"):
            pass
        return process, lines
    status = 1
    try:
        os.environ.pop(VARIABLE)
        for descriptor in descriptors:
            os.close(descriptor)
        sys.stdout = open(says, "w")
        segregate_small(folder / "p.npz", "--hot-emb-gpu-mem", str(30 * 8 * 4))
        status = 0
    finally:
        os._exit(status)


def test_another_budget_waits_until_the_trainer_has_its_files_open(tmp_path, handed_on):
    """Each stage of the one, and the other between its stages."""
    write_processed(tmp_path / "p.npz", num_rows=600)
    segregate_small(tmp_path / "p.npz")
    other, said = other_call(tmp_path, handed_on)
    with said:
        summary = train(fae_train, tmp_path, "--num-batches", "2")
        assert wait(other, 30) == 0
    with open(summary["log"]) as file:
        data = json.loads(file.readline())["data"]
    assert data["options"]["hot_emb_gpu_mem"] == 120 * 8 * 4
    again = data_flags.load_segregated(tmp_path / "hot_cold")  # the other had its turn
    assert again.manifest["options"]["hot_emb_gpu_mem"] == 30 * 8 * 4


def test_a_lock_lasts_from_stage_to_stage(tmp_path, handed_on):
    log = tmp_path / "train.txt"
    row = "\t".join(["{}", *["1"] * 13, *["05db9164"] * 26])
    log.write_text("".join(row.format(number % 2) + "\n" for number in range(70)))
    files = ["--processed-data-file", str(tmp_path / "p.npz")]
    assert is_free(tmp_path)
    data_utils.main(["--raw-data-file", str(log), *files])
    assert not is_free(tmp_path)
    flags = ["--arch-sparse-feature-size", "8", "--optimizer", "sgd"]
    input_segregation.main([*files, *flags])
    assert not is_free(tmp_path)
    train(dlrm_s_pytorch, tmp_path, "--num-batches", "1", "--arch-mlp-bot", "13-8")
    assert is_free(tmp_path)


def test_a_folder_of_its_own_and_those_of_the_script(tmp_path, handed_on):
    """One that the script did not name is locked with those that it did, and given back alone."""
    other = tmp_path / "other"
    with exclusive(other), exclusive(other, tmp_path):
        assert not is_free(other) and not is_free(tmp_path)
    assert is_free(other) and not is_free(tmp_path)


@pytest.mark.parametrize("value", ["yes", "0 1 2", "-1", "99999 x", "9" * 30])
def test_what_else_the_variable_holds_is_nothing(tmp_path, monkeypatch, value):
    monkeypatch.setenv(VARIABLE, value)
    with exclusive(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_two_in_any_order_do_not_wait_for_each_other(tmp_path, monkeypatch):
    """Each wants both folders: the same one first."""
    one, two = tmp_path / "one", tmp_path / "two"
    locked = []
    monkeypatch.setattr(
        fcntl, "flock", lambda descriptor, _: locked.append(os.fstat(descriptor).st_ino)
    )
    for folders in ((one, two), (two, one)):
        with exclusive(*folders):
            pass
    assert len(set(locked)) == 2 and locked[:2] == locked[2:]


@pytest.mark.parametrize("script", [dlrm_s_pytorch, fae_train, input_segregation])
def test_a_raw_logs_file_is_not_replaced_before_it_is_open(tmp_path, monkeypatch, script):
    """Of a script that preprocesses and opens in one process."""
    log, held = tmp_path / "train.txt", []
    row = "\t".join(["{}", *["1"] * 13, *["05db9164"] * 26])
    log.write_text("".join(row.format(number % 2) + "\n" for number in range(70)))
    name = "load_processed" if script is dlrm_s_pytorch else "segregate"
    module = input_segregation if script is input_segregation else data_flags
    opens = getattr(module, name)

    def watched(*args, **options):
        held.append(not is_free(tmp_path))
        return opens(*args, **options)

    def between(args, make=data_flags.processed_file):
        made = make(args)
        held.append(not is_free(tmp_path))
        return made

    monkeypatch.setattr(module, name, watched)
    monkeypatch.setattr(module, "processed_file", between)
    flags = ["--raw-data-file", str(log)]
    if script is not input_segregation:
        flags += [*MODEL_FLAGS, "--arch-mlp-bot", "13-8", "--num-batches", "1"]
        flags += ["--runs-dir", str(tmp_path / "runs")]
    else:
        flags += ["--arch-sparse-feature-size", "8"]
    script.main(flags)
    assert held == [True, True] and is_free(tmp_path)
