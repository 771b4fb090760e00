"""What a checkpoint belongs to, and how a run goes on from one."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from slipstream.logs.sub_sampling import SUB_SAMPLING
from slipstream.logs.transforms import TRANSFORMS, log_of_all
from slipstream.logs.vocabulary import VOCABULARY
from slipstream.model.dlrm import bottom_sizes
from slipstream.model.features import features_of
from slipstream.model.networks import NETWORKS, NetworkSpec
from slipstream.tools.device import PRECISIONS, has_bf16
from slipstream.tools.output import lost
from slipstream.tools.ranks import Ranks
from slipstream.tools.runlog import Log
from slipstream.training.dropping import DropSettings
from slipstream.training.flags import RunSettings, Settings
from slipstream.training.growth import is_extended
from slipstream.training.policies import Policy
from slipstream.training.progress import choices_of
from slipstream.training.saved import (
    NETWORK_OPTIMIZER,
    Saved,
    differences,
    find_checkpoint,
    found_checkpoint,
    open_checkpoint,
    text_command,
)
from slipstream.training.sets import PreparedData
from slipstream.training.trainer import Trainer

OF_A_DAY = ("table sizes", "the log", VOCABULARY)  # another, of a file that extends
POLICY_FILE, POLICY_ARGS = "policy's file", "--drop-policy-args"  # of a drop rule
OF_A_POLICY = ("policy", POLICY_FILE, POLICY_ARGS)  # of a reader's own: all of it
BOTTOM, PRECISION, TEXT = "--arch-mlp-bot", "--precision", "the text of its file"
RATE = ("learning_rate", "lr_num_warmup_steps", "lr_decay_start_step", "lr_num_decay_steps")


def identity_of(
    settings: Settings,
    spec: NetworkSpec,
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
    thinned = prepared.sub_sampling
    data[SUB_SAMPLING] = None if thinned is None else thinned.describe()
    data[VOCABULARY] = prepared.manifest.get(VOCABULARY, {}).get("checksum")
    if not prepared.layout.is_plain:
        data["features"] = prepared.layout.describe()
    loss = {}
    if training.loss_function == "wbce" or training.loss_threshold:
        loss = flags(training, "loss_function", "loss_weights", "loss_threshold")
    rule = drop_settings and dataclasses.asdict(drop_settings)
    if rule:
        options = rule.pop("options")
        rule |= {POLICY_ARGS: json.dumps(options, sort_keys=True)} if options else {}
    if rule and policy is not None and policy.plugin.text is not None:
        rule |= {"policy": policy.name, POLICY_FILE: policy.plugin.sha256}
    return {
        "model": _model_identity(settings, spec, prepared),
        "data": data,
        "run": {
            "the method": method,
            **flags(training, "seed", "mini_batch_size", "optimizer", "data_randomize"),
            NETWORK_OPTIMIZER: training.dense_optimizer,
            **loss,
            "--schedule": schedule,
            "the sets": prepared.sets_identity,
            "the drop rule": rule,
        },
        "rate": {
            **flags(training, *RATE, "lr_decay_share", "nepochs", "num_batches"),
            "--dense-learning-rate": training.dense_learning_rate,
        },
    }


def _model_identity(
    settings: Settings, spec: NetworkSpec, prepared: PreparedData
) -> dict[str, Any]:
    dim = settings.model.arch_sparse_feature_size
    found = {"--model": spec.plugin.name, "--arch-sparse-feature-size": dim}
    found[TRANSFORMS] = prepared.transforms.describe()
    if spec.plugin.text is not None:
        return {**found, TEXT: spec.plugin.sha256, "--model-args": spec.options}
    options = {f"--{name.replace('_', '-')}": value for name, value in spec.options.items()}
    features = features_of(prepared.layout, prepared.data.test.num_dense, dim)
    return {**found, **options, BOTTOM: bottom_sizes(spec.options["arch_mlp_bot"], features)}


def is_same_folder(run: RunSettings) -> bool:
    """Whether --load-model lies in --save-model, whose checkpoints the run then goes on with."""
    if run.load_model == "auto":
        return True
    if run.load_model is None or run.save_model is None:
        return False
    loaded = Path(run.load_model)
    # A checkpoint there may be a link to elsewhere.
    places = (loaded.resolve(), loaded.resolve().parent, loaded.absolute().parent.resolve())
    return Path(run.save_model).resolve() in places


def find_saved(
    run: RunSettings,
    identity: dict[str, dict[str, Any]],
    manifest: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> tuple[Saved | None, bool]:
    """The checkpoint that --load-model names, and whether the run takes up its place, too.

    `manifest`: of the data, whose file may extend that of the checkpoint. Of `ranks` all take the
    one that rank 0 finds.

    Raises `ValueError` with what differs for one of another model or other data, and where it lies
    in --save-model also for one of another run; `FileNotFoundError` where there is none.
    """
    saved = None if run.load_model is None else _named(run, ranks)
    if saved is None:
        return None, False
    with saved.reading():
        _check_network(saved, identity["model"]["--model"])
        grows = is_extended(saved, manifest)
        _check_model_and_data(saved, identity, grows)
        found = differences(identity["run"], saved.identity["run"])
        if grows:
            found = ["the data are of a later log, which extends its own"]
        elif found and _is_other_policy_alone(saved, identity["run"]):
            print(f"note: {found[0]}; nothing has been chosen by it yet")
            found, saved = [], _without_policy_state(saved)
        if found and is_same_folder(run):
            raise ValueError(f"of another run: {found[0]}; choose another --save-model")
        step = saved.step
        rate = saved.identity.get("rate", identity["rate"])
        rate = {name: value for name, value in rate.items() if name != PRECISION}
        rates = differences(identity["rate"], rate)
    if run.inference_only:
        print(f"evaluating {saved.folder}, step {step}")
    elif found:
        print(f"{saved.folder}: the weights of step {step}, but not its place: {'; '.join(found)}")
    else:
        print(f"going on with {saved.folder}, step {step}")
        if rates:
            print(f"note: from there on otherwise than before: {'; '.join(rates)}")
    return saved, not found and not run.inference_only


def _named(run: RunSettings, ranks: Ranks | None) -> Saved | None:
    """The checkpoint that --load-model names; None: `auto`, and there is none."""
    saved = None
    if ranks is None or ranks.is_first:
        is_auto = run.load_model == "auto"
        folder = run.save_model if is_auto else run.load_model
        assert folder is not None
        saved = find_checkpoint(folder) if is_auto else found_checkpoint(folder)
    if ranks is not None:
        place, _ = ranks.share(None if saved is None else str(saved.folder.absolute()))
        saved = None if place is None else saved or open_checkpoint(place)
    return saved


def _without_policy_state(saved: Saved) -> Saved:
    drops = saved.values.get("drops")
    values = {**saved.values, "drops": drops and {**drops, "state": None}}
    arrays = {name: a for name, a in saved.arrays.items() if not name.startswith("drops.state.")}
    return dataclasses.replace(saved, values=values, arrays=arrays)


def _is_other_policy_alone(saved: Saved, here: Mapping[str, Any]) -> bool:
    """Whether a run differs by a policy of the reader's own, which has chosen nothing by then."""
    runs = (here, saved.identity["run"])
    rules = [run["the drop rule"] or {} for run in runs]
    if not all(POLICY_FILE in rule for rule in rules):
        return False
    mine, other = (
        {**run, "the drop rule": _without(rule, OF_A_POLICY)}
        for run, rule in zip(runs, rules, strict=True)
    )
    has_chosen = choices_of(saved.values["trainer"]["progress"]["drops"])
    return not has_chosen and not differences(mine, other)


def _check_model_and_data(saved: Saved, identity: dict[str, dict[str, Any]], grows: bool) -> None:
    """Raise `ValueError` for a checkpoint of another model, or of data that are no later ones."""
    for kind in ("model", "data"):
        here, there = identity[kind], _unsaid(identity[kind]) | saved.identity[kind]
        if grows and kind == "data":
            here, there = (_without(values, OF_A_DAY) for values in (here, there))
        if found := differences(here, there):
            command = f"; {text_command(saved)}" if found[0].startswith(TEXT) else ""
            raise ValueError(f"made for other {kind}: {found[0]}{command}")


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _unsaid(here: dict[str, Any]) -> dict[str, Any]:
    """What an older checkpoint does not say: it took logarithms, and may have been of thinned rows.

    Its log is this one, and so are the rows that were left out of it, and its values.
    """
    found = {name: here[name] for name in (SUB_SAMPLING, VOCABULARY) if name in here}
    if TRANSFORMS in here:
        found[TRANSFORMS] = log_of_all(len(here[TRANSFORMS])).describe()
    return found


def settle_precision(
    settings: Settings, device: torch.device, saved: Saved | None, resumes: bool = False
) -> Settings:
    """The settings with a precision in place of `auto`: that of a run that goes on, or of the model
    that is evaluated, if it can.

    Else by what the device can, which two machines agree about, never by how fast it is. A network
    of one's own may need all of fp32.
    """
    asked = settings.machine.precision
    kept = None
    if saved is not None and (resumes or settings.run.inference_only):
        # Before it was kept it was fp32, unless told otherwise.
        kept = saved.identity.get("rate", {}).get(PRECISION, "fp32")
    if asked == "auto":
        is_own = settings.model.model not in NETWORKS
        asked = "bf16" if has_bf16(device) and not is_own else "fp32"
        if kept in PRECISIONS and (kept != "tf32" or device.type == "cuda"):
            asked = kept
    if kept not in (None, asked):
        print(f"note: from there on {PRECISION} {asked}, {kept} before")
    machine = dataclasses.replace(settings.machine, precision=asked)
    return dataclasses.replace(settings, machine=machine)


def _check_network(saved: Saved, asked: str) -> None:
    """Raise `ValueError` where a network of a file is needed, and another is asked for."""
    kept = saved.network["name"]
    if kept != asked and saved.network["text"] is not None:
        raise ValueError(
            f"trained with --model {kept}: give that file again; {text_command(saved)}"
        )


def go_on(trainer: Trainer, saved: Saved, resumes: bool, log: Log) -> None:
    """Take up a checkpoint's place, or of the rest only the state of the same optimizer."""
    if not resumes:
        step, kept = trainer.step, saved.identity["run"]
        name = type(step.optimizer).__name__.lower()
        if (step.table.optimizer, name) == (kept["--optimizer"], kept[NETWORK_OPTIMIZER]):
            with saved.reading():
                step.restore_optimizer(*saved.part("step"))
        return
    trainer.restore(saved)
    progress, rule = trainer.progress, trainer.drop_rule
    if rule is not None and not trainer.team.rank:  # which alone chooses
        with saved.reading():
            found = (*saved.part("drops"), progress, trainer.data.num_train, trainer.table.device)
            rule.lasting.restore(*found)
    for kind, records in (
        ("evaluation", progress.evaluations),
        ("validation", progress.validations),
        ("drop", progress.drops),
        ("training", progress.losses),
    ):
        for record in records:
            log.write(kind, **record)


def stop_program(number: int, trainer: Trainer, log: Log) -> None:
    """Log and say where a run that a signal ended stands, and exit as the signal would."""
    progress, checkpoints = trainer.progress, trainer.checkpoints
    name = signal.Signals(number).name
    shares, seconds = progress.shares(), trainer.clocks.seconds()
    log.write("stopped", reason=name, **shares, **seconds, lost_output=lost())
    where = "nothing is kept: no --save-model"
    if checkpoints is not None:
        where = f"{checkpoints.last_path} is kept; --load-model auto goes on from there"
    print(f"stopped by {name} at step {progress.step}; {where}")
    sys.exit(128 + number)
