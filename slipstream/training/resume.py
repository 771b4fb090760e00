"""What a checkpoint belongs to, and how a run goes on from one."""

from __future__ import annotations

import dataclasses
import signal
import sys
from pathlib import Path
from typing import Any

from slipstream.tools.runlog import RunLog
from slipstream.training.checkpoint import Saved, differences, find_checkpoint
from slipstream.training.dropping import DropSettings
from slipstream.training.flags import RunSettings, Settings
from slipstream.training.policies import Policy
from slipstream.training.sets import PreparedData
from slipstream.training.trainer import Trainer

MODEL = ("arch_sparse_feature_size", "arch_mlp_bot", "arch_mlp_top", "arch_interaction_op")
RATE = ("learning_rate", "lr_num_warmup_steps", "lr_decay_start_step", "lr_num_decay_steps")


def identity_of(
    settings: Settings,
    method: str,
    prepared: PreparedData,
    schedule: str,
    drop_settings: DropSettings | None,
    policy: Policy | None = None,
) -> dict[str, dict[str, Any]]:
    """What a checkpoint of this run belongs to.

    Another `model` or `data` refuses its weights; another `run` its place in the order of batches.
    Another `rate` is said: the run goes on with the new one.
    """

    def flags(values: object, *names: str) -> dict[str, Any]:
        return {f"--{name.replace('_', '-')}": getattr(values, name) for name in names}

    training = settings.training
    data: dict[str, Any] = {"table sizes": prepared.table_sizes.tolist()}
    data["the log"] = prepared.log_identity
    if not prepared.layout.is_plain:
        data["features"] = prepared.layout.describe()
    rule = drop_settings and dataclasses.asdict(drop_settings)
    if rule and policy is not None and policy.plugin.text is not None:
        rule |= {"policy": policy.name, "policy's file": policy.plugin.sha256}
    return {
        "model": flags(settings.model, *MODEL, "arch_interaction_itself"),
        "data": data,
        "run": {
            "the method": method,
            **flags(training, "seed", "mini_batch_size", "optimizer", "data_randomize"),
            "--schedule": schedule,
            "the sets": prepared.sets_identity,
            "the drop rule": rule,
        },
        "rate": flags(training, *RATE, "lr_decay_share", "nepochs", "num_batches"),
    }


def is_same_folder(run: RunSettings) -> bool:
    """Whether --load-model lies in --save-model, whose checkpoints the run then goes on with."""
    if run.load_model == "auto":
        return True
    if run.load_model is None or run.save_model is None:
        return False
    loaded = Path(run.load_model).resolve()
    return Path(run.save_model).resolve() in (loaded, loaded.parent)


def find_saved(run: RunSettings, identity: dict[str, dict[str, Any]]) -> tuple[Saved | None, bool]:
    """The checkpoint that --load-model names, and whether the run takes up its place, too.

    Raises `ValueError` with what differs for one of another model or other data, and where it lies
    in --save-model also for one of another run; `FileNotFoundError` where there is none.
    """
    if run.load_model is None:
        return None, False
    is_auto = run.load_model == "auto"
    folder = run.save_model if is_auto else run.load_model
    assert folder is not None
    saved = find_checkpoint(folder)
    if saved is None:
        if is_auto:
            return None, False
        raise FileNotFoundError(f"--load-model: no checkpoint in {folder}")
    with saved.reading():
        for kind in ("model", "data"):
            if found := differences(identity[kind], saved.identity[kind]):
                raise ValueError(f"made for other {kind}: {found[0]}")
        found = differences(identity["run"], saved.identity["run"])
        if found and is_same_folder(run):
            raise ValueError(f"of another run: {found[0]}; choose another --save-model")
        step = saved.step
        rates = differences(identity["rate"], saved.identity.get("rate", identity["rate"]))
    if found:
        print(f"{saved.folder}: the weights of step {step}, but not its place: {'; '.join(found)}")
    elif not run.inference_only:
        print(f"going on with {saved.folder}, step {step}")
        if rates:
            print(f"note: from there on otherwise than before: {'; '.join(rates)}")
    return saved, not found and not run.inference_only


def go_on(trainer: Trainer, saved: Saved, resumes: bool, log: RunLog) -> None:
    """Take up a checkpoint's place, or of the rest only the state of the same optimizer."""
    if not resumes:
        step, kept = trainer.step, saved.identity["run"].get("--optimizer")
        if step.table.optimizer == kept:
            with saved.reading():
                step.restore_optimizer(saved.part("step")[1])
        return
    trainer.restore(saved)
    progress = trainer.progress
    for kind, records in (
        ("evaluation", progress.evaluations),
        ("validation", progress.validations),
        ("drop", progress.drops),
        ("training", progress.losses),
    ):
        for record in records:
            log.write(kind, **record)


def stop_program(number: int, trainer: Trainer, log: RunLog) -> None:
    """Log and say where a run that a signal ended stands, and exit as the signal would."""
    progress, checkpoints = trainer.progress, trainer.checkpoints
    name = signal.Signals(number).name
    log.write("stopped", reason=name, **progress.shares(), **trainer.clocks.seconds())
    where = "nothing is kept: no --save-model"
    if checkpoints is not None:
        where = f"{checkpoints.last_path} is kept; --load-model auto goes on from there"
    print(f"stopped by {name} at step {progress.step}; {where}")
    sys.exit(128 + number)
