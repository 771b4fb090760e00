"""One method of `bench.throughput` in a process of its own: alone first, then block by block."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import slipstream_train  # noqa: E402
from bench import plain_dlrm  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.cpu import tune_cpu  # noqa: E402
from slipstream.tools.device import (  # noqa: E402
    choose_device,
    peak_device_bytes,
    set_precision,  # noqa: E402
    tune_process,
)
from slipstream.tools.runlog import Clocks, NoLog  # noqa: E402
from slipstream.tools.runtime import peak_rss_bytes  # noqa: E402
from slipstream.training import flags as flags_of  # noqa: E402
from slipstream.training.build import build_model, build_trainer, network_of  # noqa: E402
from slipstream.training.dropping import DropRule, DropSettings  # noqa: E402
from slipstream.training.progress import Progress  # noqa: E402
from slipstream.training.rows import bytes_per_row  # noqa: E402
from slipstream.training.sets import baseline_data, load_segregated  # noqa: E402
from slipstream.training.trainer import Trainer  # noqa: E402

ENGINE_OPTIONS = {"bf16", "tf32", "compile", "eager", "serial", "resident", "budget", "adaptive"}
OPTIONS = {
    "plain": {"bf16", "tf32", "tuned", "fbgemm", "hybrid", "gpu"},
    "baseline": ENGINE_OPTIONS - {"budget"},
    "fae": ENGINE_OPTIONS | {"hot"},
    "slipstream": ENGINE_OPTIONS,
}
EXCLUSIVE = ({"bf16", "tf32"}, {"hybrid", "gpu"})
NUM_PHASE_STEPS = 30
END = "end"  # in place of a turn
MIN_BATCHES = 20  # more than the workers of a DataLoader have ready


class Enough(Exception):
    """A method has consumed as much of the log as there are whole blocks, or is told to end."""


def parse_method(text: str) -> tuple[str, set[str], int | None]:
    """Split `name+option+budget=BYTES`; raises `ValueError` for what does not go together."""
    name, *words = text.split("+")
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if name not in OPTIONS:
        raise ValueError(f"method {text!r}: {name} is not known; --help lists names and options")
    unknown = sorted(given.keys() - OPTIONS[name])
    clash = [sorted(group) for group in EXCLUSIVE if len(group & given.keys()) > 1]
    if unknown or clash:
        reason = f"takes no {unknown[0]}" if unknown else f"takes one of {' and '.join(clash[0])}"
        raise ValueError(f"method {text!r}: {name} {reason}; --help lists names and options")
    budget = cli.positive_int(given.pop("budget")) if "budget" in given else None
    return name, set(given), budget


class Pace:
    """Takes turns with the other methods; `report` is a training loop's block boundary.

    It ends before a block that would not be whole: one that runs into the next epoch.
    """

    def __init__(self, connection: Connection, num_inputs: int, job: dict[str, Any]) -> None:
        self._connection = connection
        self._num_inputs = job["num_epochs"] * num_inputs
        self._block_inputs = job["block_steps"] * job["batch_size"]
        self._trained = self._consumed = 0

    def begin(self) -> None:
        """Wait for the first turn."""
        self._wait()

    def report(self, trained: int, consumed: int) -> None:
        """Say what the block did, in totals since the start, and wait for the next turn."""
        seconds = time.perf_counter() - self._start
        block = {"trained": trained - self._trained, "consumed": consumed - self._consumed}
        self._trained, self._consumed = trained, consumed
        done = self._num_inputs - consumed < self._block_inputs
        self._connection.send({**block, "seconds": seconds, "done": done})
        if done:
            raise Enough
        self._wait()

    def _wait(self) -> None:
        if self._connection.recv() == END:
            raise Enough
        self._start = time.perf_counter()


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def repeat_for(seconds: float, task: Callable[[], Any]) -> list[float]:
    """Seconds of each of as many runs of `task` as fit, after two to warm up."""
    task()
    task()
    times: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 5:
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return times


def rates(batch_size: int, times: list[float]) -> dict[str, float]:
    """p10, p50 and p90 of samples a second."""
    return percentiles([batch_size / seconds for seconds in times])


def percentiles(values: list[float]) -> dict[str, float]:
    """p10, p50 and p90."""
    return {f"p{q}": float(np.percentile(values, q)) for q in (10, 50, 90)}


def work(connection: Connection, method: str, job: dict[str, Any]) -> None:
    """A method's process: measures alone what can be, then trains block by block."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the conductor says when to end
        signal.signal(number, signal.SIG_IGN)
    try:
        if parse_method(method)[0] == "plain":
            _work_plain(connection, method, job)
        else:
            _work_engine(connection, method, job)
    except Enough:
        connection.recv()  # stay until all are through: ending takes time that the others need
        connection.send(
            {"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": peak_device_bytes()}
        )
    except Exception as error:  # whatever it is, the conductor names the method and leaves it out
        send_error(connection, error)


def send_error(connection: Connection, error: Exception) -> None:
    """Tell the conductor what a process failed of."""
    if os.environ.get(cli.TRACEBACK_VARIABLE):
        traceback.print_exc()
    connection.send({"error": f"{type(error).__name__}: {error}"})


def _work_plain(connection: Connection, method: str, job: dict[str, Any]) -> None:
    _, options, _ = parse_method(method)
    if job["num_threads"]:
        torch.set_num_threads(job["num_threads"])
    if "tuned" in options:
        tune_cpu(job["num_threads"])
    log = load_processed(job["processed"])
    train = plain_dlrm.ClickDataset(log.splits()[0])
    table_sizes = log.table_sizes.tolist()
    del log  # the dataset holds copies
    check_batch(len(train), job["batch_size"])
    placement = next(iter(options & {"hybrid", "gpu"}), "cpu")
    model = plain_dlrm.PlainDLRM(
        cli.layer_sizes(job["bot"]),
        cli.layer_sizes(job["top"]),
        table_sizes,
        job["seed"],
        placement,
        job["learning_rate"] if "fbgemm" in options else None,
    )
    batch_size = job["batch_size"]
    precision = next(iter(options & {"bf16", "tf32"}), "fp32")
    set_precision(model.mlp_device, precision)
    training = plain_dlrm.PlainTraining(model, job["learning_rate"], batch_size, precision)

    def loader() -> Any:
        pin = placement != "cpu"
        return plain_dlrm.batches(train, batch_size, job["seed"], job["num_workers"], pin)

    def step() -> None:
        training.step(batch)
        synchronize(model.mlp_device)

    be_ready(connection)
    alone: dict[str, Any] = {"loader": rates(batch_size, _times_of(loader(), job["seconds_alone"]))}
    batch = next(iter(loader()))
    training.set_rates(0.0)  # (FBGEMM's tables keep their own rate)
    alone["step"] = rates(batch_size, repeat_for(job["seconds_alone"], step))
    training.set_rates(1.0)
    connection.send(alone)
    pace, trained, num_steps = Pace(connection, len(train), job), 0, 0
    pace.begin()
    while True:
        for batch in loader():
            training.step(batch)
            trained, num_steps = trained + len(batch[2]), num_steps + 1
            if num_steps % job["block_steps"] == 0:
                synchronize(model.mlp_device)
                pace.report(trained, trained)


def check_batch(num_inputs: int, batch_size: int) -> None:
    """Raise `ValueError` for fewer inputs than two mini-batches."""
    if num_inputs < 2 * batch_size:
        raise ValueError(f"{num_inputs} inputs are too few for mini-batches of {batch_size}")


def be_ready(connection: Connection) -> None:
    """Say so, forget the memory that starting took, and wait for the first turn."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    connection.send({"ready": True})
    connection.recv()


def _times_of(stream: Any, seconds: float) -> list[float]:
    """Seconds that each full mini-batch of a DataLoader took, for a while, once it has started."""
    times: list[float] = []
    stream = iter(stream)
    next(stream)
    begin = start = time.perf_counter()
    for _ in stream:
        now = time.perf_counter()
        times.append(now - start)
        start = now
        if now - begin > seconds and len(times) > MIN_BATCHES:
            break
    return times[:-1] or times  # the last one may be smaller


def _work_engine(connection: Connection, method: str, job: dict[str, Any]) -> None:
    trainer, pace, settings = _build_engine(connection, method, job)
    be_ready(connection)
    alone = _alone(trainer, job["batch_size"], job["seconds_alone"])
    connection.send({**alone, "settings": settings})
    pace.begin()
    try:
        trainer.run()
    finally:
        trainer.loader.close()


def _build_engine(
    connection: Connection, method: str, job: dict[str, Any]
) -> tuple[Trainer, Pace, dict[str, Any]]:
    name, options, budget = parse_method(method)
    precision = next(iter(options & {"bf16", "tf32"}), "fp32")
    # SGD unless asked for otherwise: what the plain model beside it is trained by.
    optimizer = "rwsadagrad" if "adaptive" in options else "sgd"
    flags = (
        f"--segregated-data-dir - --mini-batch-size {job['batch_size']} --nepochs 1000 "
        f"--arch-sparse-feature-size {job['dim']} --arch-mlp-bot {job['bot']} "
        f"--arch-mlp-top {job['top']} --learning-rate {job['learning_rate']} "
        f"--seed {job['seed']} --print-freq {job['block_steps']} --device {job['device']} "
        f"--precision {precision} --num-threads {job['num_threads']} "
        f"--compile {'compile' in options} --cuda-graph {'eager' not in options} "
        f"--overlap {'false' if 'serial' in options else 'auto'} "
        f"--drop-percentage {job['drop_percentage']} --lr-decay-share 0 "
        f"--optimizer {optimizer}"
    )
    args = slipstream_train.parse_args(flags.split())
    if name == "baseline":
        prepared = baseline_data(load_processed(job["processed"]))
    else:
        folder = job["folders"][str(budget or job["budget"])]
        prepared = load_segregated(folder, job["processed"], bytes_per_row(job["dim"], optimizer))
    if "hot" in options:
        nothing = prepared.data.cold.rows(0, 0)
        prepared = replace(prepared, data=replace(prepared.data, cold=nothing))
    check_batch(prepared.data.num_train, job["batch_size"])
    if "resident" in options:
        args.num_resident = int(prepared.table_sizes.sum())
    settings = flags_of.settings_of(args, prepared.data.num_train)
    device = choose_device(job["device"])
    tuned = tune_process(device, job["num_threads"], precision, False)
    model, table = build_model(settings, network_of(settings.model), prepared, device)
    clocks = Clocks(torch.cuda.synchronize if device.type == "cuda" else None)
    rule = None
    if name == "slipstream":
        drop = DropSettings(drop_fraction=job["drop_percentage"] / 100)
        rule = DropRule(drop, prepared.num_hot, job["seed"], lambda record: None)
    pace = Pace(connection, prepared.data.num_train, job)

    def report(progress: Progress) -> None:
        pace.report(progress.samples, progress.samples + progress.dropped)

    trainer = build_trainer(
        settings, prepared, "interleaved", model, table, rule, NoLog(), clocks, report
    )
    hot_inputs = len(prepared.data.hot) / prepared.data.num_train
    tuned |= {"num_resident": table.num_resident, "hot_inputs": hot_inputs}
    if prepared.num_hot:
        tuned["segregation_s"] = prepared.manifest.get("seconds")
    return trainer, pace, tuned


def _alone(trainer: Trainer, batch_size: int, seconds: float) -> dict[str, Any]:
    """The loader, the step with its staging on a batch at hand, and the phases of steps."""
    step, data = trainer.step, trainer.data
    inputs = data.cold if len(data.cold) >= batch_size else data.hot
    if len(inputs) < batch_size:
        raise ValueError(f"{len(inputs)} inputs are no mini-batch of {batch_size}; more --rows")
    order = np.random.default_rng(0).permutation(len(inputs))
    starts = iter(range(0, 1 << 60, batch_size))

    def chosen() -> np.ndarray:
        start = next(starts) % max(len(order) - batch_size, 1)
        return order[start : start + batch_size]

    def load() -> None:
        inputs.batch(chosen())
        synchronize(table.device)

    table = step.table
    alone: dict[str, Any] = {"loader": rates(batch_size, repeat_for(seconds, load))}
    dense, slots, labels = inputs.batch(chosen())

    def run_step() -> None:
        staged = table.enter(table.stage(slots))
        # At learning rate 0 no weight moves.
        step(dense.to(table.device), staged, labels.to(table.device), None, 0.0)
        table.write_back(staged, table.lane.mark())
        synchronize(table.device)

    alone["step"] = rates(batch_size, repeat_for(seconds, run_step))
    host_rows = table.stage(slots).host_rows
    if host_rows is not None:
        alone["staged_bytes"] = len(host_rows) * 4 * table.dim
    alone["phases_ms"] = phases_of(trainer, inputs.batch, chosen)
    step.take_loss_sum()
    return alone


def phases_of(
    trainer: Trainer,
    cut: Callable[..., Any],
    chosen: Callable[[], np.ndarray],
) -> dict[str, float]:
    """Median milliseconds of each phase of a step, the device waited for between them.

    On CUDA without a graph, and so slower in sum than the steps that are trained.
    """
    step, table = trainer.step, trainer.table
    times: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        synchronize(table.device)
        start = time.perf_counter()
        yield
        synchronize(table.device)
        times.setdefault(phase, []).append(time.perf_counter() - start)

    def wrapped(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            with timed(phase):
                return function(*values)

        return call

    plain = {
        (table, "lookup"): "gather",
        (table, "update"): "row update",
        (step.model.network, "forward"): "forward",
        (step.optimizer, "step"): "optimizer",
    }
    use_graph, step._use_graph = step._use_graph, False
    originals = {key: getattr(*key) for key in plain}
    for (owner, name), phase in plain.items():
        setattr(owner, name, wrapped(phase, originals[owner, name]))
    try:
        for _ in range(NUM_PHASE_STEPS):
            with timed("loader"):
                dense, slots, labels = cut(chosen())
            with timed("staging"):
                staged = table.enter(table.stage(slots))
            with timed("inputs to device"):
                dense, labels = dense.to(table.device), labels.to(table.device)
            with timed("step"):
                step(dense, staged, labels, None, 0.0)
            with timed("write back"):
                table.write_back(staged)
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
        step._use_graph = use_graph
    medians = {phase: 1e3 * float(np.median(values[3:])) for phase, values in times.items()}
    inside = sum(medians[phase] for phase in plain.values())
    medians["loss and backward"] = medians["step"] - inside
    return medians
