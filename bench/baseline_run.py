"""One run of the baseline in this process, from its flags to a trained model."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import dlrm_s_pytorch
from slipstream.tools.device import choose_device, tune_process
from slipstream.tools.runlog import Clocks, NoLog
from slipstream.training.build import build_model, build_trainer, network_of
from slipstream.training.evaluation import outputs_of
from slipstream.training.flags import Settings, settings_of
from slipstream.training.progress import Progress
from slipstream.training.resume import settle_precision
from slipstream.training.sets import PreparedData
from slipstream.training.trainer import Trainer


def train_baseline(
    prepared: PreparedData,
    words: list[str],
    on_report: Callable[[Progress], None] | None = None,
) -> tuple[Trainer, Settings]:
    """Train on `prepared`, without a log, by the flags of dlrm_s_pytorch.py but for its data's.

    `on_report` is called every `--print-freq` mini-batches, which are 0, never, unless given.
    """
    args = dlrm_s_pytorch.parse_args(["--processed-data-file", "-", "--print-freq", "0", *words])
    device = choose_device(args.device)
    settings = settle_precision(settings_of(args, prepared.data.num_train), device, None)
    machine = settings.machine
    with contextlib.redirect_stdout(io.StringIO()):
        tune_process(device, machine.num_threads, machine.precision, machine.deterministic)
        model, table = build_model(settings, network_of(settings.model), prepared, device)
        clocks = Clocks(torch.cuda.synchronize if device.type == "cuda" else None)
        trainer = build_trainer(
            settings, prepared, "interleaved", model, table, None, NoLog(), clocks, on_report
        )
        trainer.run()
    return trainer, settings


def predict(trainer: Trainer, inputs: Any) -> np.ndarray:
    """A trained model's logits (n,) of some inputs."""
    return outputs_of(trainer.judge.logits_of, inputs, trainer.judge.batch_size)


def with_training(prepared: PreparedData, start: int, stop: int) -> PreparedData:
    """The same log with some of its training inputs alone, and without the test set."""
    data: Any = prepared.data
    cold, nothing = data.cold.rows(start, stop), data.test.rows(0, 0)
    return replace(prepared, data=replace(data, cold=cold, test=nothing))
