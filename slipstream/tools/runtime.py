"""The machine: which device, how much disk and memory, and a description of it for the logs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, TypeVar

from slipstream.tools.places import regular_file, room_for
from slipstream.tools.schema import AGAIN, conform, decode_json

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_free_disk(folder: str | Path, needed_bytes: int, purpose: str) -> None:
    """Raise `OSError` when `folder`'s file system has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OSError(
            f"{purpose} needs about {needed_bytes / 1e9:.2f} GB in {folder}, where "
            f"{free / 1e9:.2f} GB are free; make room, or choose another place"
        )


def available_memory_bytes() -> int:
    """Memory that this process may still take: what the machine, or its control group, has free.

    Page cache counts as free, for the kernel gives it back.
    """
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = 1024 * int(
            next(li for li in lines if li.startswith("MemAvailable:")).split()[1]
        )
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, StopIteration, ValueError):  # "max" where none is set
            group = Path("/sys/fs/cgroup")
            most, taken = (
                int((group / name).read_text(encoding="utf-8")) for name in (limit, used)
            )
            statistics = (
                (group / limit).with_name("memory.stat").read_text(encoding="utf-8").splitlines()
            )
            spare = next(li for li in statistics if li.startswith(cache + " ")).split()[1]
            available = min(available, most - taken + int(spare))
    return max(available, 0)


def process_limit_bytes() -> float:
    """Memory that this process may still take by its own limits (`ulimit -v`, `-d`); infinity."""
    left = math.inf
    for limit, name in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        most = resource.getrlimit(limit)[0]
        with contextlib.suppress(OSError, StopIteration, ValueError):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            taken = 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
            left = min(left, most - taken if most != resource.RLIM_INFINITY else math.inf)
    return max(left, 0)


THREADS_VARIABLE = "SLIPSTREAM_THREADS"


def num_threads() -> int:
    """Cores that this process may use, at most 16; of several processes each has its share.

    The environment variable of that name gives the share.
    """
    if os.environ.get(THREADS_VARIABLE, "").isdecimal():
        return max(1, int(os.environ[THREADS_VARIABLE]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, 16)


def ordered(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Apply `function` to items in threads; results come in order, a few items ahead."""
    num_workers = num_threads()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        # The accounting of getrusage starts at the size of the process that started this one.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def involuntary_switches() -> int:
    """How often a thread of this process had to give its core to other work so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def git_commit() -> str | None:
    """The commit of this code; with `+changes-` and a checksum of them where the working tree
    differs, or has modules of the package that git does not know. None outside git.
    """
    folder = Path(__file__).parents[1]
    plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-relative", "--binary")
    try:
        commit = _git(folder, "rev-parse", "HEAD").decode().strip()
        changes = hashlib.sha256(diff := _git(folder, "diff", *plain, "HEAD"))
        new = _git(folder, "ls-files", "-z", "--others", "--exclude-standard", "--", "*.py")
        for name in filter(None, new.split(b"\0")):
            changes.update(name + (folder / os.fsdecode(name)).read_bytes())
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + (f"+changes-{changes.hexdigest()[:12]}" if diff or new else "")


def _git(folder: Path, *words: str) -> bytes:
    run = subprocess.run(["git", *words], cwd=folder, capture_output=True, check=True, timeout=10)
    return run.stdout


def describe_machine(device: Any = None) -> dict[str, Any]:
    """Versions and hardware, as plain values for a log's first line."""
    import numpy
    import torch

    described = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "os": platform.platform(),
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device is not None and device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = properties.name
        described["gpu_memory_bytes"] = properties.total_memory
        described["cuda"] = torch.version.cuda
    return described


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


STOPPING = b"\nstopping after this mini-batch; once more: at once\n"


AT_ONCE_S = 0.3  # two signals so near each other are one request


class StopRequest:
    """Notes Ctrl-C, SIGTERM and a lost terminal while the body runs, so that it ends in good order.

    `signal` is the number of the first, or None. A second one ends the process at once, unless
    either is a hang-up: shell and kernel send one each; or it comes within `AT_ONCE_S`: `timeout`
    tells its child and then the group. What was ignored (`nohup`) stays so. It is said where it
    `speaks`.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.signal: int | None = None
        self._speaks = speaks
        self._asked_at = math.inf  # by Ctrl-C or SIGTERM
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if number != signal.SIGHUP:
            if time.monotonic() - self._asked_at > AT_ONCE_S:
                os._exit(128 + number)
            self._asked_at = min(self._asked_at, time.monotonic())
        if self.signal is not None:
            return
        self.signal = number
        # Not `print`: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):  # of a `tee` that had the same Ctrl-C
            if self._speaks:
                os.write(2, STOPPING)


def sync_file(file: IO[Any]) -> None:
    """Bring what was written to an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names of a folder's files to the disk, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file beside `path`, sync it and put it in its place."""
    partial = room_for(path.with_name(path.name + ".partial"))
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, sort_keys=True)
        sync_file(file)
    os.replace(partial, path)


@contextlib.contextmanager
def replaced_file(path: str | Path) -> Iterator[IO[str]]:
    """A text file for the body to write, put in place of `path`, of a link where it leads.

    It is whole or not there. Raises `OSError` (full disk).
    """
    target = Path(os.path.realpath(path))
    partial = room_for(target.with_name(target.name + ".partial"))
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
            sync_file(file)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path, kind: Any = dict[str, Any], allows_nan: bool = False) -> dict[str, Any]:
    """Read a JSON object, of a kind that `conform` takes.

    `ValueError`: the file is damaged, a pipe, or a field is not what it must be, which is named;
    `OSError`: it cannot be read.
    """
    regular_file(path)
    try:
        value = decode_json(path.read_bytes(), allows_nan)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {AGAIN}") from error
    return conform(value, kind, path)
