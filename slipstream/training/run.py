"""The run that the three trainers' `main` share: from settings and data to a summary."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from slipstream.logs.processed import planted_limit
from slipstream.model.networks import NetworkSpec
from slipstream.tools import processes
from slipstream.tools.device import choose_device, peak_device_bytes, seeded, tune_process
from slipstream.tools.output import lost, say_next
from slipstream.tools.places import output_file
from slipstream.tools.plugins import Plugin
from slipstream.tools.runlog import OVERHEAD, Clocks, Log, NoLog, RunLog, was_busy
from slipstream.tools.runtime import (
    StopRequest,
    describe_machine,
    git_commit,
    peak_rss_bytes,
)
from slipstream.tools.streams import torch_seed
from slipstream.training.build import (
    build_model,
    build_trainer,
    describe_features,
    features_seen,
    network_of,
)
from slipstream.training.checkpoint import Checkpoints, Every, checkpoint_folder
from slipstream.training.curves import drawn
from slipstream.training.dropped import SAVE_DROPPED, save_dropped
from slipstream.training.dropping import DropRule, DropSettings
from slipstream.training.evaluation import click_rate
from slipstream.training.flags import Settings, TrainingSettings
from slipstream.training.held_out import check_held_out, say_weights, settle_correction
from slipstream.training.inspection import inspected
from slipstream.training.loader import Table
from slipstream.training.pictures import draw_network
from slipstream.training.policies import Policy, check_schedule, find_policy
from slipstream.training.policy_trial import try_policy
from slipstream.training.predictions import save_predictions
from slipstream.training.progress import Progress, drop_report, shown
from slipstream.training.recipe import Recipe, describe
from slipstream.training.resume import (
    PRECISION,
    find_saved,
    go_on,
    identity_of,
    is_same_folder,
    settle_precision,
    stop_program,
)
from slipstream.training.saved import Saved
from slipstream.training.sets import PreparedData
from slipstream.training.team import say_differences
from slipstream.training.trainer import Trainer
from slipstream.training.vocabulary_file import keep_vocabulary

NO_LOG: Log = NoLog()
LEAST_SAID_S = 0.05  # of the choice of inputs, beside training
METRICS = ("auc", "log_loss", "accuracy", "normalized_entropy")


def run_training(
    method: str,
    settings: Settings,
    prepared: PreparedData,
    schedule: str,
    drop_settings: DropSettings | None = None,
    dropped_file: str | None = None,
) -> dict[str, Any]:
    """Train, or evaluate, as asked; returns the log's summary record.

    `schedule` and `drop_settings` are what makes the method, with the data in `prepared`;
    `dropped_file`: where to write which inputs were dropped.
    """
    run, device = settings.run, choose_device(settings.machine.device)
    ranks, prepared = processes.current(), _begin(settings, prepared, dropped_file, drop_settings)
    spec = _network(settings, prepared)
    policy = _policy(settings, drop_settings, schedule, device)
    identity = identity_of(settings, spec, method, prepared, schedule, drop_settings, policy)
    with ExitStack() as stack:
        folder = None
        if run.save_model and processes.is_first():
            folder = stack.enter_context(checkpoint_folder(run.save_model, is_same_folder(run)))
        saved, resumes = find_saved(run, identity, prepared.manifest, ranks)
        settings = settle_precision(settings, device, saved, resumes)
        machine = settings.machine
        identity["rate"][PRECISION] = precision = machine.precision
        tuned = tune_process(device, machine.num_threads, precision, machine.deterministic)
        try_policy(policy, prepared, settings, device)
        model, table = build_model(settings, spec, prepared, device, saved, policy, ranks)
        say_differences(model.network, ranks)
        clocks = Clocks(torch.cuda.synchronize if device.type == "cuda" else None)
        progress, run_log, log = Progress(), None, NO_LOG
        if processes.is_first():
            run_log, log = _open_log(stack, method, settings, resumes, progress)
        own = {"network": spec.plugin, "policy": None if policy is None else policy.plugin}
        _log_start(log, method, settings, prepared, table, tuned, own, saved, resumes)
        rule = None
        if drop_settings is not None:
            known = (settings.training.seed, drop_report(log, progress), policy, bool(dropped_file))
            rule = DropRule(drop_settings, prepared.num_hot, *known)
        checkpoints = _checkpoints(settings, folder, identity, spec, table, prepared, saved)
        processes.opened()
        stop = stack.enter_context(StopRequest(processes.speaks_of_signals()))
        parts = (settings, prepared, schedule, model, table, rule, log, clocks, None, checkpoints)
        trainer = build_trainer(*parts, stop, ranks)
        trainer.progress = progress
        if saved is not None:
            go_on(trainer, saved, resumes, log)
            saved = None  # a file that is mapped takes room after its deletion
        with inspected(settings.machine, trainer, prepared, run_log):
            trainer.evaluate_only() if run.inference_only else trainer.run()
        if trainer.team.signal:
            stop_program(trainer.team.signal, trainer, log)
        summary = _end(method, trainer, prepared, log, run.save_predictions, dropped_file)
    if run_log is not None:
        _say_where(run_log, trainer)
        say_next()
        summary["log"] = str(run_log.path)
    return summary


def _begin(
    settings: Settings,
    prepared: PreparedData,
    dropped_file: str | None,
    drop_settings: DropSettings | None,
) -> PreparedData:
    """Refuse what these data cannot do, and say what will be done with them."""
    judged, is_training = settings.evaluation, not settings.run.inference_only
    names = ("test_freq", "val_freq", "patience", "mlperf_auc_threshold", "mlperf_acc_threshold")
    asked = {f"--{name.replace('_', '-')}": getattr(judged, name) for name in names}
    asked["--save-predictions"] = settings.run.save_predictions
    check_held_out(prepared, asked, not is_training)
    run, found = settings.run, {}
    named = (settings.model.model, drop_settings.policy if drop_settings else "")
    own_files = [name.rpartition(":")[0] for name in named if ".py:" in name]
    files = {"--save-predictions": run.save_predictions, SAVE_DROPPED: dropped_file}
    read = [*prepared.files.values(), run.save_model, run.load_model, *own_files]
    for flag, file in files.items():
        if file:
            found[flag] = output_file(flag, file, (one for one in read if one))
    if onnx := settings.outputs.save_onnx:
        found["--save-onnx"] = Path(os.path.realpath(onnx))
    for flag, other in itertools.combinations(found, 2):
        if found[flag] == found[other]:
            raise ValueError(f"{flag} and {other} name one file; choose another for one of them")
    if is_training:
        _say_recipe(settings.training, prepared.data.num_train)
        say_weights(prepared)
    return settle_correction(prepared, judged.correct_sub_sampling)


def _say_where(run_log: RunLog, trainer: Trainer) -> None:
    """Say where log and model are. `OSError`: what could not be kept, after the results."""
    print(f"log: {run_log.path}")
    if trainer.checkpoints is not None and trainer.save_failure is None:
        print(f"model: {trainer.checkpoints.last_path}")
    failures = (trainer.save_failure, run_log.failure)
    if found := [str(failure) for failure in failures if failure is not None]:
        raise OSError("; ".join(found))


def _network(settings: Settings, prepared: PreparedData) -> NetworkSpec:
    """The network that the flags name, drawn where a picture is asked for."""
    spec = network_of(settings.model)
    if (file := settings.outputs.plot_compute_graph) and processes.is_first():
        features = features_seen(prepared, settings.model.arch_sparse_feature_size)
        draw_network(spec, prepared.layout, features, settings.training.seed, file)
    return spec


def _policy(
    settings: Settings, drop_settings: DropSettings | None, schedule: str, device: torch.device
) -> Policy | None:
    """What chooses the inputs to drop; None: all are trained."""
    if drop_settings is None:
        return None
    with seeded(torch_seed(settings.training.seed, "policy"), device):
        policy = find_policy(drop_settings.policy, drop_settings.alpha, drop_settings.options)
    check_schedule(policy, schedule)
    return policy


def _open_log(
    stack: ExitStack, method: str, settings: Settings, resumes: bool, progress: Progress
) -> tuple[RunLog, Log]:
    """The run's log, closed with `stack`, and what also draws curves where that is asked for."""
    run = settings.run
    # The same command begins and goes on, so its name may be taken.
    run_log = RunLog(run.runs_dir, run.run_name, method, resumes or run.load_model == "auto")
    stack.enter_context(run_log.until_the_end(lambda: progress.step))
    return run_log, stack.enter_context(_with_curves(run_log, settings, resumes))


def _with_curves(log: RunLog, settings: Settings, resumes: bool) -> AbstractContextManager[Log]:
    """The log, and the curves that are asked for."""
    training, folder = settings.training, settings.outputs.tensor_board_filename
    ratio = training.dense_learning_rate / training.learning_rate
    return drawn(log, folder, resumes or settings.run.load_model == "auto", ratio)


def _say_recipe(training: TrainingSettings, num_train: int) -> None:
    names = [field.name for field in dataclasses.fields(Recipe)]
    recipe = Recipe(**{name: getattr(training, name) for name in names})
    num_steps = training.nepochs * -(-num_train // recipe.mini_batch_size)
    if training.num_batches:
        num_steps = min(num_steps, training.num_batches)
    print(describe(recipe, num_train, num_steps))


def _checkpoints(
    settings: Settings,
    folder: Path | None,
    identity: dict[str, dict[str, Any]],
    spec: NetworkSpec,
    table: Table,
    prepared: PreparedData,
    saved: Saved | None,
) -> Checkpoints | None:
    """What writes the run's checkpoints, those that it goes on from being there; None: nothing."""
    if folder is None:
        return None
    run, network = settings.run, spec.describe()
    network["features"] = describe_features(prepared, settings.model)
    start = saved if is_same_folder(run) else None
    every, slots = Every(*run.checkpoint_every), prepared.slot_of_row
    about = {"vocabulary": keep_vocabulary(folder, prepared), "files": prepared.files}
    return Checkpoints(folder, identity, network, table, slots, every, run.keep, start, about)


def _log_start(
    log: Log,
    method: str,
    settings: Settings,
    prepared: PreparedData,
    table: Table,
    tuned: dict[str, Any],
    plugins: dict[str, Plugin | None],
    saved: Saved | None,
    resumes: bool,
) -> None:
    log.write(
        "start",
        method=method,
        argv=sys.argv,
        flags=settings.flags,
        training=dataclasses.asdict(settings.training),
        commit=git_commit(),
        seed=settings.training.seed,
        machine=describe_machine(table.device),
        settings=tuned,
        data=prepared.manifest,
        log_identity=prepared.log_identity,
        **{
            kind: None if one is None else {"name": one.name, "sha256": one.sha256}
            for kind, one in plugins.items()
        },
        table_sizes=prepared.table_sizes.tolist(),
        num_hot=prepared.num_hot,
        num_resident=table.num_resident,
        table_device_bytes=table.device_bytes,
        num_train=prepared.data.num_train,
        num_hot_inputs=len(prepared.data.hot),
        num_held_out=prepared.data.num_held_out,
        mean_weight=prepared.mean_weight,
        held_out_shift=prepared.data.held_out_shift,
        loaded=str(saved.folder) if saved is not None else None,
        resumed=resumes,
    )


def _end(
    method: str,
    trainer: Trainer,
    prepared: PreparedData,
    log: Log,
    predictions: str | None,
    dropped_file: str | None,
) -> dict[str, Any]:
    """Log and print the summary; save predictions, and what was dropped, where asked for."""
    summary: dict[str, Any] = {}

    def end() -> None:
        summary.update(_summary(method, trainer, prepared))
        log.write("summary", **summary)
        _print_summary(summary)
        if predictions is not None:
            save_predictions(predictions, trainer)
        if dropped_file is not None:
            save_dropped(dropped_file, trainer.dropped, trainer.progress.epoch, prepared.data)

    trainer.team.led(end)
    return summary


def _summary(method: str, trainer: Trainer, prepared: PreparedData) -> dict[str, Any]:
    progress, seconds = trainer.progress, trainer.clocks.seconds()
    final = progress.evaluations[-1] if prepared.data.num_held_out else {}
    loss = progress.loss if math.isfinite(progress.loss) else None
    return {
        "method": method,
        **progress.shares(),
        "loss": final.get("loss", loss),
        **{name: final.get(name) for name in METRICS},
        "test_click_rate": click_rate(prepared.data.test),
        "val": final.get("val"),
        "planted_auc": planted_limit(prepared.manifest),
        "best_val": progress.best,
        "weights_of_step": final.get("weights_of_step", progress.step),
        "reached": progress.reached,
        "drops": progress.drops,
        **seconds,
        "segregation_s": prepared.manifest.get("seconds") if prepared.num_hot else None,
        "samples_per_s": progress.samples / max(seconds["training_s"], 1e-9),
        **trainer.team.communication(),
        "involuntary_switches_per_s": trainer.clocks.switches_per_s(),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "cuda_graph": trainer.step.has_graph,
        "num_train": prepared.data.num_train,
        "save_failure": str(trainer.save_failure) if trainer.save_failure is not None else None,
        "lost_output": lost(),
    }


def _worse_than_none(summary: dict[str, Any]) -> str | None:
    """A line where the share of clicks alone does as well as the model; None: it does not."""
    rate = summary["test_click_rate"]
    if summary["auc"] is None:
        return None
    if summary["normalized_entropy"] > 1:
        return (
            "note: the log loss is above that of always answering the share of clicks: more data, "
            "or another --learning-rate?"
        )
    if rate is not None and abs(summary["accuracy"] - max(rate, 1 - rate)) < 1e-9:
        return (
            "note: the accuracy is that of always giving one answer, as it is where clicks are "
            "rare, or little is learned: judge by AUC and log loss"
        )
    return None


def _judged(summary: dict[str, Any]) -> str:
    """What the held-out inputs said, or that there are none."""
    if summary["auc"] is None:
        return f"nothing was held out, so nothing is judged; loss {shown(summary['loss'])}"
    limit = summary["planted_auc"]
    beside = f" (limit {limit:.4f})" if limit is not None else ""
    return (
        f"test AUC {summary['auc']:.4f}{beside}, log loss {summary['log_loss']:.4f}, accuracy "
        f"{summary['accuracy']:.4f}; validation AUC {summary['val']['auc']:.4f}"
    )


def _print_summary(summary: dict[str, Any]) -> None:
    """The final lines for people."""
    if (note := _worse_than_none(summary)) is not None:
        print(note)
    print(f"{summary['method']}: {_judged(summary)}")
    samples, dropped = summary["samples"], summary["dropped"]
    hot = f", {summary['hot_share']:.1%} of them hot" if summary["hot_share"] else ""
    gone = f"; dropped {dropped:,} of {samples + dropped:,} ({summary['dropped_share']:.1%})"
    print(f"trained {samples:,} inputs{hot}{gone if dropped else ''}")
    device_bytes = summary["peak_device_bytes"]
    choosing = sum(summary.get(name, 0.0) for name in OVERHEAD)
    beside = f", {choosing:.1f} s of choosing what to drop" if choosing >= LEAST_SAID_S else ""
    print(
        f"{summary['training_s']:.1f} s of training ({summary['samples_per_s']:,.0f} inputs a "
        f"second){beside}, {summary['program_s']:.1f} s in all; at most "
        f"{summary['peak_rss_bytes'] / 1e6:,.0f} MB of memory"
        + (f" and {device_bytes / 1e6:,.0f} MB on the device" if device_bytes is not None else "")
    )
    switches = summary["involuntary_switches_per_s"]
    if was_busy(switches, summary["program_s"]):
        print(
            f"note: other work took a core from this run {switches:,.0f} times a second: do not "
            "compare its times"
        )
