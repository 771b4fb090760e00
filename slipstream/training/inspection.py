"""Looking into a run: what it trains, printed first, and where the time of a mini-batch goes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from slipstream.tools.runlog import RunLog
from slipstream.training.flags import MachineSettings
from slipstream.training.sets import PreparedData
from slipstream.training.trainer import Trainer

SKIPPED, PROFILED = 10, 20  # mini-batches
SHOWN_INPUTS, SHOWN_OPERATIONS = 3, 20
TRACE = "trace.json"


@contextmanager
def inspected(
    machine: MachineSettings, trainer: Trainer, prepared: PreparedData, log: RunLog | None
) -> Iterator[None]:
    """Do what --debug-mode and --enable-profiling ask for around the body, which trains.

    The trace lies beside the `log`; of a CUDA graph it shows the replay, not its operations' names.
    Without one, on a rank that has none, nothing is done.
    """
    if log is None:
        yield
        return
    folder = log.path.parent
    if machine.debug_mode:
        print_model(trainer, prepared)
    if not machine.enable_profiling:
        yield
        return
    activities = [ProfilerActivity.CPU]
    on_cuda = trainer.table.device.type == "cuda"
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    written: list[str] = []

    def write(profiler: profile) -> None:
        try:
            # Not in its place at once: PyTorch takes no path that is not UTF-8.
            with tempfile.TemporaryDirectory() as own:
                profiler.export_chrome_trace(os.path.join(own, TRACE))
                shutil.move(os.path.join(own, TRACE), folder / TRACE)
        except OSError as error:  # a full disk; training goes on
            tqdm.write(f"{folder / TRACE} is not written: {error}")
        order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=SHOWN_OPERATIONS)
        written.append(table)

    plan = schedule(wait=0, warmup=SKIPPED, active=PROFILED, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as profiler:
        trainer.after_step = profiler.step
        yield
        trainer.after_step = None
    if not written:
        print(f"note: nothing was profiled: the first {SKIPPED} mini-batches are left out")
        return
    print(f"{written[0]}\ntrace of up to {PROFILED} mini-batches: {folder / TRACE}")


def print_model(trainer: Trainer, prepared: PreparedData) -> None:
    """The network, the tables, and some training inputs as they reach it."""
    network, data = trainer.step.model.network, prepared.data
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{network}\n{num_parameters:,} parameters")
    for feature in prepared.layout.features:
        pooled = "" if feature.pooling == "none" else f", {feature.pooling} of its columns"
        size = prepared.table_sizes[feature.table]
        print(f"{feature.name}: columns {feature.columns}, {size:,} rows{pooled}")
    print(f"{trainer.table.num_rows:,} rows of {trainer.table.dim} values")
    inputs = data.hot if len(data.hot) else data.cold
    dense, slots, labels = inputs.batch(slice(0, SHOWN_INPUTS))
    print(f"first inputs, dense:\n{dense}\nslots:\n{slots}\nlabels: {labels.tolist()}")
    if (weights := inputs.weights_of(slice(0, SHOWN_INPUTS))) is not None:
        print(f"weights: {weights.tolist()}")
