"""Kills a script at chosen moments; `test_interrupted.py` runs it as a process of its own.

Each run is a forked child that ends itself with SIGKILL at its k-th call of a function that changes
the disk. The parent imports what its children need, once. It never uses polars or starts a thread
of ours, so its children may.

    python tests/interrupt.py '{"script": "data_utils", "argv": [...], "output": [...], ...}'

Prints JSON: the calls of an undisturbed run, the moments, and what was wrong after each.
"""

import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
WATCHED = [(os, name) for name in ("fsync", "replace", "rename", "pwrite", "unlink", "rmdir")]


def run(job, kill_at=None):
    """Run the script in a child: (exit status or -9, what it printed, calls made)."""
    read_end, write_end = os.pipe()
    said = os.memfd_create("said")  # in memory: the disk may be full
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = _child(job, kill_at, write_end, said)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        calls = len(pipe.read())
    _, status = os.waitpid(pid, 0)
    with os.fdopen(said) as file:
        file.seek(0)
        text = file.read()
    return os.waitstatus_to_exitcode(status), text, calls


fsync = os.fsync


def _child(job, kill_at, write_end, said):
    os.dup2(said, 1)
    os.dup2(said, 2)
    calls = itertools.count(1)  # threads call, too

    def watched(function):
        def call(*args, **options):
            os.write(write_end, b".")
            if next(calls) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            # A killed process leaves what it wrote to the kernel: no need to wait for the disk.
            return None if function is fsync else function(*args, **options)

        return call

    for module, name in WATCHED:
        setattr(module, name, watched(getattr(module, name)))
    for name, value in job.get("patches", {}).items():
        module, _, attribute = name.rpartition(".")
        value = (lambda *_: None) if value == "nothing" else value
        setattr(importlib.import_module(module), attribute, value)
    try:
        importlib.import_module(job["script"]).main(job["argv"])
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        return 2
    return 0


def outputs(job):
    """Bytes of every output, and the names of all files but the raw ones."""
    folder = Path(job["folder"])
    found = {name: (folder / name).read_bytes() for name in job["outputs"]}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return found, names


def clear(job):
    """Delete what the script wrote."""
    for path in Path(job["folder"]).iterdir():
        if path.name not in job["inputs"]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_kills(job):
    """Kill at each moment, run again to the end, and compare with an undisturbed run."""
    status, said, num_calls = run(job)
    assert status == 0, said
    expected = outputs(job)
    faults, resumed = [], 0
    for share in job["moments"]:
        clear(job)
        kill_at = 1 + int(share * num_calls)
        if run(job, kill_at)[0] != -signal.SIGKILL:
            faults.append(f"not killed at call {kill_at}")
        status, said, _ = run(job)
        resumed += "going on with" in said
        if status or outputs(job) != expected:
            faults.append(f"killed at call {kill_at} of {num_calls}: {status}, {said[-300:]}")
    return {"num_calls": num_calls, "faults": faults, "resumed": resumed}


def check_full_disk(job):
    """In a tmpfs that is too small: an error, nothing to trust; with room: the right bytes."""
    status, said, _ = run(job)
    assert status == 0, said
    expected = outputs(job)
    folder, small = Path(job["folder"]), Path(job["folder"]) / "small"
    results = []
    for kilobytes in job["sizes_kb"]:
        small.mkdir(exist_ok=True)
        assert not os.system(f"mount -t tmpfs -o size={kilobytes}k tmpfs {small}")
        for name in job["inputs"]:
            shutil.copy2(folder / name, small / name)
        there = json.loads(json.dumps(job).replace(str(folder), str(small)))
        status, said, _ = run(there)
        left = [name for name in job["outputs"] if (small / name).exists()]
        assert not os.system(f"mount -o remount,size=100m {small}")
        again, more, _ = run(there)
        same = again == 0 and outputs(there)[0] == expected[0]
        results.append({"status": status, "said": said, "left": left, "same": same, "more": more})
        assert not os.system(f"umount {small}")
        small.rmdir()
    return results


if __name__ == "__main__":
    described = json.loads(sys.argv[1])
    for needed in (described["script"], "polars"):
        importlib.import_module(needed)
    check = check_full_disk if "sizes_kb" in described else check_kills
    print(json.dumps(check(described)))
