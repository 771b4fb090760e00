"""Output that is lost, signals after it, and a disk that is full under the log: nothing else is."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import REPOSITORY, segregate_small, train, write_processed
from tqdm import tqdm

import fae_train
from bench.fault_scenes import FullDisk, broken_pipe
from bench.small_log import ROW_FLAGS
from slipstream.tools import cli, output, runlog, runtime
from slipstream.tools.runlog import RunLog
from slipstream.tools.runtime import StopRequest
from slipstream.training.saved import find_checkpoint


def say_all(text):
    """All ways in which our scripts say something."""
    print(text, flush=True)
    print(text, file=sys.stderr)
    tqdm.write(text)
    for _ in tqdm(range(3), mininterval=0):
        pass
    with pytest.raises(SystemExit):
        cli.Parser(text).parse_args(["--none"])


@pytest.mark.parametrize("kind", ["pipe", "full", "closed", "none"])
def test_no_line_raises(monkeypatch, kind):
    def stream():
        if kind == "none":
            return None
        if kind == "full":
            return open("/dev/full", "w", buffering=1)
        opened = os.fdopen(broken_pipe(), "w", buffering=1)
        if kind == "closed":
            opened.close()
        return opened

    lines = []
    monkeypatch.setattr(sys, "stdout", stream())
    monkeypatch.setattr(sys, "stderr", stream())
    cli.run_script(lambda: (say_all("said"), lines.append(output.lost())))
    [lost] = lines
    why = {"pipe": "Broken pipe", "full": "No space left"}.get(kind, "closed")
    assert "standard output: " in lost and "standard error: " in lost and lost.count(why) == 2


def test_a_name_that_the_locale_cannot_spell(monkeypatch):
    """Not UTF-8 as a path either: a surrogate, which no codec writes."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict"))
    streams = sys.stdout, sys.stderr
    path = os.fsdecode(b"n\xff\xe9/") + "ü"
    cli.run_script(lambda: say_all(path))
    for stream in streams:
        assert rb"n\udcff\udce9/\xfc" in stream.buffer.getvalue()
    assert output.lost() is None


@pytest.mark.parametrize("where", [">/dev/full", ">&-", "2>&-", ">&- 2>&- <&-"])
def test_the_interpreter_ends_well(tmp_path, where):
    """It flushes at its end; and no file takes a standard stream's number."""
    code = (
        "import sys; from slipstream.tools import cli\n"
        "def main():\n"
        "    print('x'), print('y', file=sys.stderr)\n"
        "    with open(sys.argv[1], 'w') as file: file.write(str(file.fileno()))\n"
        "cli.run_script(main)"
    )
    words = ["sh", "-c", f'"$@" {where}', "sh", sys.executable, "-c", code, tmp_path / "number"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0 and int((tmp_path / "number").read_text()) > 2
    note = "note: some of what was said is lost: standard output: [Errno 28] No space left on"
    assert (note in done.stderr) == (where == ">/dev/full")


@contextlib.contextmanager
def broken_stderr():
    """Descriptor 2 is a pipe that nobody reads."""
    kept = os.dup(2)
    os.dup2(broken_pipe(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_signals_after_output_is_lost(monkeypatch):
    """A lost terminal says so several times, and an impatient user never: see `StopRequest`."""
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)

    def caught(*numbers):
        ended.clear()
        with broken_stderr(), StopRequest() as stop:
            for number in numbers:
                os.kill(os.getpid(), number)
        return stop.signal, list(ended)

    up, term, interrupt = signal.SIGHUP, signal.SIGTERM, signal.SIGINT
    assert caught(term, term) == (term, [])  # at once
    monkeypatch.setattr(runtime, "AT_ONCE_S", -1.0)
    assert caught(interrupt) == (interrupt, [])
    assert caught(up, up) == caught(up, term) == (up, [])
    assert caught(term, up) == (term, [])
    assert caught(up, term, interrupt) == (up, [130]) and caught(term, term) == (term, [143])
    before = signal.signal(up, signal.SIG_IGN)  # as `nohup` leaves it
    try:
        assert caught(up) == (None, [])
        assert signal.getsignal(up) == signal.SIG_IGN
    finally:
        signal.signal(up, before)


def test_a_full_disk_under_the_log(tmp_path, monkeypatch, capsys):
    """What was refused comes later, in its order; at no moment is there a part of a line."""
    log = RunLog(tmp_path, "name", "fae")
    monkeypatch.setattr(runlog, "os", FullDisk(2, 9))
    written = []
    for number in range(7):
        log.write("training", step=number)
        text = log.path.read_text()
        assert text == "" or text.endswith("\n")
        written.append(len(text.splitlines()))
    assert written == [1, 1, 1, 1, 5, 6, 7]
    log.close()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [*range(7)]
    assert log.failure is None
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "No space left on device; its records are kept" in said


def test_a_disk_that_stays_full_under_the_log(segregated, monkeypatch, capsys):
    """The results stand; what the log lacks is said, and is the exit status."""
    folder = segregated.parent
    monkeypatch.setattr(runlog, "os", FullDisk(3))
    flags = ["--save-model", folder / "m", "--num-batches", "30"]
    missing = r"log.jsonl lacks records \(1 validation, 1 evaluation, 1 summary\): .*No space left"
    with pytest.raises(OSError, match=missing):
        train(fae_train, folder, *flags, "--run-name", "full")
    said = capsys.readouterr().out
    assert f"model: {find_checkpoint(folder / 'm').folder}" in said and "test AUC" in said
    kinds = [json.loads(line)["kind"] for line in open(folder / "runs/full/log.jsonl")]
    assert kinds == ["start", "checkpoint"]


SCENES = """
import importlib, sys
from pathlib import Path
import numpy as np, sklearn.metrics, torch._dynamo, fae_train
from bench.fault_scenes import SCENES
from bench.faults import Job
job = Job(Path(sys.argv[1]), "FAE")
for name, scene in SCENES.items():
    print(name, scene(job, np.random.default_rng(int(sys.argv[2]))), sep=": ")
"""


def test_scenes_of_lost_output(tmp_path):
    """A whole run each: closed and full streams, Ctrl-C after `tee` died, a terminal that went."""
    dense = np.random.default_rng(0).integers(0, 50, (4000, 13)).astype(np.int32)
    processed = write_processed(tmp_path / "train_processed.npz", X_int=dense)
    segregate_small(processed, *ROW_FLAGS, "--hot-emb-gpu-mem", "6000")
    words = [sys.executable, "-c", SCENES, str(tmp_path), "0"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and all(line.endswith(": None") for line in lines), (lines, done.stderr)
