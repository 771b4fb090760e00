"""Killed at any moment, or stopped by a full disk, a script's next run gives the same bytes."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import REPOSITORY, write_processed
from test_data_utils import write_days, write_log

import data_utils
from slipstream.logs import encoding, merging, stages, taobao

SMALL = {
    "slipstream.logs.encoding.PART_ROWS": 110,
    "slipstream.logs.stages.CHUNK_ROWS": 50,
    "slipstream.logs.stages.SORT_BYTES": 1 << 50,
    "slipstream.logs.stages.MAX_BUCKETS": 3,
    "slipstream.logs.taobao.USERS_CLICKS": 70,
    "slipstream.logs.taobao.CHUNK": 64,
}


def write_behaviours(path, rows=400, seed=0):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["pv", "pv", "pv", "buy", "cart", "fav"], rows)
    items = rng.integers(1, 40, rows)
    times = rng.integers(taobao.START - 3600, taobao.END + 3600, rows)
    users = np.sort(rng.integers(1, 30, rows))
    lines = zip(users, items, items % 7 + 1, kinds, times, strict=True)
    path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))


def make_job(folder, what):
    """A log of a data set in `folder`, and how to preprocess or segregate it."""
    raw = folder / {"kaggle": "train.txt", "taobao": "UserBehavior.csv", "terabyte": "day"}.get(
        what, "small_processed.npz"
    )
    options = ["--max-memory", "4G", "--bad-lines", "skip:2"]
    if what == "kaggle":  # rows are chosen, and values counted by them
        write_log(raw, 300, seed=3)
        options += ["--data-sub-sample-rate", "0.3", "--min-count", "3"]
    elif what == "terabyte":
        write_days(folder)
        options += ["--num-days", "3", "--jobs", "1"]
    elif what == "taobao":
        write_behaviours(raw)
    else:
        write_processed(raw, 4000)
    job = {"folder": str(folder), "inputs": os.listdir(folder), "patches": SMALL}
    if what == "segregation":
        sets = ("train_hot", "train_cold", "test", "val", "embedding_rows")
        flags = ["--processed-data-file", str(raw), "--segregated-data-dir", str(folder / "hot")]
        flags += ["--hot-emb-gpu-mem", "8000", "--ip-sampling-rate", "50"]
        names = [f"hot/{name}.npz" for name in sets]
        job["patches"] = {"slipstream.training.popularity.CHUNK": 500}
        return {**job, "script": "input_segregation", "argv": flags, "outputs": names}
    flags = ["--data-set", what, "--raw-data-file", str(raw), *options]
    flags += ["--processed-data-file", str(folder / "out.npz")]
    return {**job, "script": "data_utils", "argv": flags, "outputs": ["out.npz"]}


def run_job(job, *prefix):
    """`interrupt.py`'s answer."""
    command = [*prefix, sys.executable, str(REPOSITORY / "tests/interrupt.py"), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("what", "num_kills"), [("kaggle", 7), ("terabyte", 7), ("taobao", 6), ("segregation", 10)]
)
def test_kill_9_and_again(tmp_path, what, num_kills):
    rng = np.random.default_rng(len(what))
    # One in each of as many equal spans of the run.
    moments = ((np.arange(num_kills) + rng.random(num_kills)) / (num_kills + 0.5)).tolist()
    answer = run_job({**make_job(tmp_path, what), "moments": moments})
    assert answer["faults"] == []
    assert answer["num_calls"] > 20
    assert answer["resumed"] >= num_kills // 4, "finished stages are not made again"


def test_files_at_once(tmp_path):
    """As many processes as asked for give the same bytes, and end with the one that began them."""
    texts = write_days(tmp_path, 4)
    for day, text in enumerate(texts):
        (tmp_path / f"day_{day}").write_text(text * 40)
    (tmp_path / "day_1").write_text(texts[1] * 40 + "bad\n")
    (tmp_path / "day_3").write_text("bad\n" + texts[3] * 40)
    flags = ["--data-set", "terabyte", "--raw-data-file", str(tmp_path / "day"), "--num-days", "4"]
    targets = [tmp_path / f"{name}.npz" for name in ("one", "three", "killed", "refused")]

    def run(target, jobs, limit=2, **how):
        flags_of = ["--processed-data-file", str(target), "--jobs", str(jobs)]
        flags_of += ["--bad-lines", f"skip:{limit}"]
        command = [sys.executable, str(REPOSITORY / "data_utils.py"), *flags, *flags_of]
        return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, **how)

    assert [
        run(target, jobs).wait(120) for target, jobs in zip(targets[:2], (1, 3), strict=True)
    ] == [0, 0]
    killed = run(targets[2], 2)
    work = tmp_path / "killed.npz.work"
    while killed.poll() is None and not list(work.glob("part_*")):
        time.sleep(0.005)
    killed.kill()
    killed.communicate(timeout=120)  # its processes hold the pipe's other end
    assert run(targets[2], 2).wait(120) == 0
    whole = targets[0].read_bytes()
    assert whole == targets[1].read_bytes() == targets[2].read_bytes()
    refused = run(targets[3], 2, limit=1)
    assert "the files have 2 bad lines in all" in refused.communicate(timeout=120)[1]
    assert refused.returncode == 2 and not list(tmp_path.glob("refused*"))


@pytest.mark.parametrize("what", ["kaggle", "terabyte", "taobao", "segregation"])
def test_a_full_disk(tmp_path, what):
    """At several fills: the stages fail at different places."""
    unshare = shutil.which("unshare")
    if os.geteuid() or not unshare or subprocess.run([unshare, "-m", "true"]).returncode:
        pytest.skip("needs root, to mount a small file system")
    job = make_job(tmp_path, what)
    module = "training.segregation" if what == "segregation" else "logs.preprocess"
    patches = {f"slipstream.{module}.check_free_disk": "nothing"}
    used = sum(os.path.getsize(tmp_path / name) for name in job["inputs"]) // 1024
    sizes = [used + more for more in ((24, 60, 100) if what != "segregation" else (40, 120, 180))]
    answers = run_job(
        {**job, "patches": {**job["patches"], **patches}, "sizes_kb": sizes}, unshare, "-m"
    )
    assert any(answer["status"] for answer in answers)
    for answer in answers:
        assert answer["same"], answer
        if answer["status"]:
            assert answer["status"] == 2 and "No space left on device" in answer["said"], answer
            assert answer["left"] == []


@pytest.mark.parametrize("what", ["kaggle", "taobao"])
@pytest.mark.parametrize("part_rows", [17, 100, 10**6])
def test_parts_and_memory_change_no_byte(tmp_path, monkeypatch, what, part_rows):
    job = make_job(tmp_path, what)
    data_utils.main(job["argv"])
    expected = (tmp_path / "out.npz").read_bytes()
    (tmp_path / "out.npz").unlink()
    monkeypatch.setattr(encoding, "PART_ROWS", part_rows)
    monkeypatch.setattr(stages, "SORT_BYTES", 1 << 40)
    monkeypatch.setattr(merging, "MERGE_BYTES", 1 << 26)  # a few values a range
    data_utils.preprocess(**vars(data_utils.parse_args(job["argv"])), block_bytes=3000)
    assert (tmp_path / "out.npz").read_bytes() == expected


def test_changed_files_and_options_start_anew(tmp_path, capsys):
    """What was finished of another log, or with other options, is not gone on with."""
    job = make_job(tmp_path, "terabyte")
    (tmp_path / "day_1").write_bytes((tmp_path / "day_1").read_bytes() + b"spoiled\n")
    argv = [*job["argv"], "--bad-lines", "stop"]

    def fails():
        with pytest.raises(ValueError, match="day_1, line 191: 1 columns"):
            data_utils.main(argv)
        return capsys.readouterr().out

    assert "going on" not in fails()
    assert "1 of 3 raw files are encoded" in fails()
    argv += ["--max-ind-range", "100"]
    assert "going on" not in fails()
    lines = (tmp_path / "day_0").read_text().splitlines(keepends=True)
    (tmp_path / "day_0").write_text("".join(lines[1:]))
    assert "going on" not in fails()
    data = (tmp_path / "day_1").read_bytes().removesuffix(b"spoiled\n")
    (tmp_path / "day_1").write_bytes(data)
    data_utils.main(argv)
    assert not (tmp_path / "out.npz.work").exists()
