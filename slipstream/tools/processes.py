"""Starting the ranks of a run, and how it ends when one of them does.

`--processes N` starts N of the same command on this machine by torch's launcher; `torchrun` does,
too, on several machines. Each process finds its place in the variables that both set. Rank 0 speaks
for all. Where one fails, the first to notice notes why in the launcher's store and prints one line,
which names the rank; the others see the note and end silently.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from slipstream.tools import cli
from slipstream.tools.locks import release
from slipstream.tools.ranks import RankLost, Ranks
from slipstream.tools.runtime import STOPPING, THREADS_VARIABLE, num_threads

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT_VARIABLE = "SLIPSTREAM_RANK_TIMEOUT"
TIMEOUT_S = 600.0  # after which a rank that does not answer is given up
LAUNCHED = "SLIPSTREAM_LAUNCHED"  # process that `_launch` runs in, which speaks of signals
START_S = 60.0  # at least, for all ranks to start
GRACE_S = 10.0  # at most, for ranks to end by themselves, once one has failed
SAME_S = 0.3  # for rank 0 to say what all have found, as a file that is missing
NOTE_S = 2.0  # for the rank that failed first to say so
FAULT, OPENED, LOST = "fault", "opened", "lost"  # in the store
PR_SET_PDEATHSIG = 1  # of Linux' prctl.h

PROCESSES = cli.Flag(
    "--processes",
    cli.positive_int,
    1,
    "processes of this machine that train parts of each mini-batch: with a GPU each, or the cores "
    f"shared out; torchrun starts them on several machines. One that does not answer for "
    f"{TIMEOUT_S:g} s ({TIMEOUT_VARIABLE}) ends the run",
)
_ranks: Ranks | None = None
_store: Any = None


def current() -> Ranks | None:
    """The ranks of the run that this process belongs to; None: it is alone."""
    return _ranks


def is_first() -> bool:
    """Whether this process speaks and writes for its run: it is alone, or rank 0."""
    return _ranks is None or _ranks.is_first


def is_rank() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def start(number: int, script: str, argv: list[str] | None) -> None:
    """Start `number` processes of a script, unless this is one of them, and exit as they do.

    Returns where this process is to do the work. Raises `ValueError` where a launcher started
    another number.
    """
    if is_rank():
        size = os.environ["WORLD_SIZE"]
        if number not in (1, int(size)):
            raise ValueError(f"--processes {number}: the launcher started {size}; leave it out")
    elif number > 1:
        sys.exit(_launch(number, [script, *(sys.argv[1:] if argv is None else argv)]))


def run_script(main: Callable[[], Any]) -> None:
    """As `cli.run_script`, for a script that may be one of several ranks."""
    if not is_rank():
        # What a launcher's parser notes, rank 0's says, too.
        quiet = _is_launcher(sys.argv[1:])
        with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
            cli.run_script(main)
        return
    status = 0
    try:
        cli.run_script(lambda: _run_rank(main))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)  # the group's threads may wait for a rank that has gone


def _is_launcher(words: list[str]) -> bool:
    flags = [word.replace("_", "-").partition("=") for word in words]
    names = [name for name, _, _ in flags]
    if "--processes" not in names or {"-h", "--help"} & set(names):
        return False
    place = names.index("--processes")
    return (flags[place][2] or "".join(words[place + 1 : place + 2])) != "1"


def speaks_of_signals() -> bool:
    """Whether this process says that it was asked to stop: rank 0, unless the launcher does."""
    return _ranks is None or (is_first() and LAUNCHED not in os.environ)


def opened() -> None:
    """Say that this process has its files open: what the run script locked is given up."""
    release()
    if _store is not None:
        _store.add(OPENED, 1)


def _run_rank(main: Callable[[], Any]) -> None:
    """Run `main` as one of the ranks; of those that fail, the first to note it raises."""
    global _ranks, _store
    rank = int(os.environ["RANK"])
    if LAUNCHED in os.environ:
        _end_with_launcher()
    if rank:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        _ranks, _store = _join(rank)
        main()
        dist.destroy_process_group()
        return
    except SystemExit:
        raise  # said, or a signal, of which all have heard
    except BaseException as error:
        failure = error
    if isinstance(failure, RankLost) and _has_lost_launcher():
        sys.exit(128 + signal.SIGTERM)  # the other one heard of it earlier, and has ended
    if rank:
        time.sleep(SAME_S)
    text = f"rank {rank}: {cli.said_of(failure)}"
    if isinstance(failure, RankLost):
        text = _who_is_lost(rank, str(failure))
    if not _note(text):
        sys.exit(2)
    sys.stderr = sys.__stderr__
    if isinstance(failure, RankLost) or cli.is_expected(failure):
        raise ValueError(text) from failure
    print(f"rank {rank}:", file=sys.stderr)
    raise failure


def _end_with_launcher() -> None:
    """A launcher that is killed takes its ranks with it, after a last checkpoint."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if _has_lost_launcher():  # it was killed while this one was starting
        sys.exit(128 + signal.SIGTERM)


def _has_lost_launcher() -> bool:
    """Whether `_launch`, which started this process, was killed."""
    return LAUNCHED in os.environ and os.getppid() != int(os.environ[LAUNCHED])


def _end_unless_lost(number: int, _: object) -> None:
    """`torchrun` ends all ranks when one has gone; which one, those that see it say first."""
    if _ranks is None or not _ranks.is_lost:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE) or str(TIMEOUT_S)
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 1e9:
            return float(text)
    raise ValueError(f"{TIMEOUT_VARIABLE}={text}: expected seconds, more than 0")


def _join(rank: int) -> tuple[Ranks, Any]:
    seconds = _timeout_s()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    num_devices = torch.cuda.device_count()
    backend = "gloo"
    if num_devices:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % num_devices)
        # NCCL has one rank a device.
        backend = f"cpu:gloo,cuda:{'nccl' if local_size <= num_devices else 'gloo'}"
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # so that a lost rank is an error
    timeout, starting = (timedelta(seconds=s) for s in (seconds, max(seconds, START_S)))
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not is_host:
            _wait_for_host(starting.total_seconds())
        store, _, size = next(iter(dist.rendezvous("env://", timeout=starting)))
        store.set_timeout(timeout)
        own = dist.PrefixStore("slipstream", store)
        own.set(f"place/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        # All are here before the group is made, whose timeout may be short.
        own.wait([f"place/{other}" for other in range(size)], starting)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ValueError(
            f"the {os.environ['WORLD_SIZE']} ranks did not find each other at {place} within "
            f"{starting.total_seconds():g} s: {' '.join(str(error).split())[:200]}"
        ) from error
    if LAUNCHED not in os.environ and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end_unless_lost)
    return Ranks(local_size), own


def _wait_for_host(seconds: float) -> None:
    """Until the store can be reached: torch would try twice as long, and print stacks."""
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(place, max(end - time.monotonic(), 0.1)).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
        time.sleep(0.2)


def _note(text: str) -> bool:
    """Note why this rank ends; False where another one has noted its reason before."""
    if _store is None:
        return True
    try:
        return bool(_store.compare_set(FAULT, "", text) == text.encode())
    except (RuntimeError, ValueError):
        return True  # the launcher, whose store it is, has gone


def _who_is_lost(rank: int, reason: str) -> str:
    """Who does not answer, where no rank notes a reason soon: those that see no loss themselves."""
    size, end = int(os.environ["WORLD_SIZE"]), time.monotonic() + NOTE_S
    lost, places = list(range(size)), ""
    try:
        _store.set(f"{LOST}/{rank}", "")
        while time.monotonic() < end and not _store.check([FAULT]):
            time.sleep(0.05)
        lost = [other for other in lost if not _store.check([f"{LOST}/{other}"])]
        places = "; ".join(
            f"rank {other} ({_store.get(f'place/{other}').decode()})" for other in lost
        )
    except (RuntimeError, ValueError):
        pass  # as in `_note`
    if not places:
        return f"the ranks lost each other ({' '.join(reason.split())[:200]})"
    return (
        f"{places} does not answer rank {rank}: it was killed or stopped, or is cut off "
        f"(at most {_timeout_s():g} s are waited, see {TIMEOUT_VARIABLE})"
    )


def _launch(number: int, command: list[str]) -> int:
    """Start a Python script as `number` ranks on this machine; returns what to exit with."""
    # Where several processes are asked for: a second to import.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHED: str(os.getpid()),
    }
    threads = max(1, num_threads() // number)
    usual = {"OMP_NUM_THREADS": threads, THREADS_VARIABLE: threads, "GLOO_SOCKET_IFNAME": "lo"}
    # torch warns of a launcher that was killed, in C++ frames; what of it, we say.
    usual["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    if sys.platform != "linux":
        del usual["GLOO_SOCKET_IFNAME"]
    shared |= {name: str(value) for name, value in usual.items() if name not in os.environ}
    names = ("SIGTERM", "SIGINT", "SIGHUP")  # but what is ignored (`nohup`) stays so, also there
    heard = [name for name in names if signal.getsignal(getattr(signal, name)) != signal.SIG_IGN]
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = ",".join(heard)
    with tempfile.TemporaryDirectory() as logs:
        context = start_processes(
            "rank",
            sys.executable,
            {n: tuple(command) for n in range(number)},
            {n: {**shared, "RANK": str(n), "LOCAL_RANK": str(n)} for n in range(number)},
            DefaultLogsSpecs(logs),
        )
        try:
            with _Forwarding(context.pids()) as forwarding:
                return _watch(forwarding, dist.PrefixStore("slipstream", store))
        finally:
            context.close()


class _Forwarding:
    """Hands Ctrl-C, SIGTERM and a lost terminal on to the ranks, while the body runs.

    torch's launcher has set handlers of its own before, which would end them at once.
    """

    def __init__(self, pids: dict[int, int]) -> None:
        self.pids, self.sent = pids, set[int]()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Forwarding:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _forward(self, number: int, _: object) -> None:
        for pid in self.pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not self.sent:
            with contextlib.suppress(OSError):
                os.write(2, STOPPING)
        self.sent.add(number)


def _ended(pid: int) -> int | None:
    """A child's status, negative for a signal; None: it runs. It stays to be waited for."""
    found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if found is None:
        return None
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def _watch(ranks: _Forwarding, store: Any) -> int:
    """Wait for all ranks; once one has failed, the others have `GRACE_S`. Returns the status."""
    first: int | None = None  # the status of the first to fail
    end, is_locked = math.inf, True
    grace, pids = min(GRACE_S, _timeout_s()), ranks.pids
    while True:
        statuses = {rank: _ended(pid) for rank, pid in pids.items()}
        # One that had no handler yet ended by the signal itself.
        statuses = {r: 128 - s if s and -s in ranks.sent else s for r, s in statuses.items()}
        failed = {rank: status for rank, status in statuses.items() if status}
        killed = [rank for rank, status in failed.items() if status < 0]
        if failed and first is None:
            rank = killed[0] if killed else min(failed)
            first = failed[rank]
            end = time.monotonic() + grace
            if killed:
                _say_killed(rank, pids[rank], -first, store)
        if None not in statuses.values():
            return 0 if first is None else 1 if first < 0 else first
        if time.monotonic() > end:
            for rank, pid in pids.items():
                if statuses[rank] is None:
                    os.kill(pid, signal.SIGKILL)
        if is_locked and store.add(OPENED, 0) >= len(pids):
            release()
            is_locked = False
        time.sleep(0.05)


def _say_killed(rank: int, pid: int, number: int, store: Any) -> None:
    """Note and say that a rank was killed, unless one has noted another reason."""
    name = signal.Signals(number).name
    why = " (by the kernel, for want of memory?)" if number == signal.SIGKILL else ""
    text = f"rank {rank} (process {pid}) was killed by {name}{why}"
    if store.compare_set(FAULT, "", text) == text.encode():
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
