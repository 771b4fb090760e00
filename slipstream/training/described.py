"""What a checkpoint's description must be: types and ranges of its fields, and what fits what.

Fields that older checkpoints lack may be missing; what version 1 lacks is filled in before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType, field

from slipstream.logs.manifests import Described, FeatureEntry, TransformEntry
from slipstream.logs.sub_sampling import SubSampling
from slipstream.tools.schema import Amount, Count, Finite, Positive, Sha256, Share, conform

MAX_FLOAT32 = 3.4028234e38
Float32 = Annotated[float, Meta(ge=-MAX_FLOAT32, le=MAX_FLOAT32)]
Pair = tuple[Count, Count]  # of hot and cold
Plain = str | float | int | bool | None
# Of a drop policy's state.
STATE_TYPES = tuple(
    np.dtype(name).str
    for name in "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 "
    "float16 float32 float64".split()
)
# Of state.npz: names begin so, and their types and dimensions (None: any).
ARRAYS: dict[str, tuple[tuple[str, ...], int | None]] = {
    "rows": (("float32",), 2),
    "row_sums": (("float32",), 1),
    "random.": (("uint8",), 1),
    "step.optimizer.": (("float32", "float64"), None),  # as the network is
    "rule.pool": (("int64",), 1),
    "rule.before": (("float32",), 2),
    "rule.touched": (("bool",), 1),
    "rule.change": (("float32",), 1),
    "drops.state.": (STATE_TYPES, None),
    "drops.dropped.": (("int64",), 1),
    "plan.hot_inputs": (("int32", "int64"), 1),
    "plan.cold_inputs": (("int32", "int64"), 1),
    "plan.hot_weights": (("float32",), 1),
    "plan.cold_weights": (("float32",), 1),
}


class Model(Struct):
    """What the model is; another network has other options."""

    name: str = field(name="--model")
    dim: Positive = field(name="--arch-sparse-feature-size")
    transforms: list[TransformEntry] | UnsetType = UNSET
    text: Sha256 | UnsetType = field(name="the text of its file", default=UNSET)
    options: dict[str, Any] | UnsetType = field(name="--model-args", default=UNSET)
    bottom: list[Positive] | UnsetType = field(name="--arch-mlp-bot", default=UNSET)
    top: list[Positive] | UnsetType = field(name="--arch-mlp-top", default=UNSET)
    interaction: Literal["dot", "cat"] | UnsetType = field(
        name="--arch-interaction-op", default=UNSET
    )
    itself: bool | UnsetType = field(name="--arch-interaction-itself", default=UNSET)


class Data(Struct):
    """What it was trained on."""

    sizes: list[Positive] = field(name="table sizes")
    log: str = field(name="the log")
    sub_sampling: SubSampling | None = None
    features: list[FeatureEntry] | UnsetType = UNSET
    vocabulary: Sha256 | None = None


class Run(Struct):
    """How it was trained."""

    method: str = field(name="the method")
    seed: int = field(name="--seed")
    batch_size: Positive = field(name="--mini-batch-size")
    optimizer: Literal["sgd", "rwsadagrad"] = field(name="--optimizer")
    randomize: str = field(name="--data-randomize")
    network_optimizer: str = field(name="the network's optimizer")
    schedule: str = field(name="--schedule")
    sets: str | dict[str, str] = field(name="the sets")
    drop_rule: dict[str, Plain] | None = field(name="the drop rule")
    loss_threshold: Share | UnsetType = field(name="--loss-threshold", default=UNSET)


class Identity(Struct, forbid_unknown_fields=True):
    """What a checkpoint belongs to."""

    model: Model
    data: Data
    run: Run
    rate: dict[str, Plain | list[Any]] | UnsetType = UNSET


class NetworkFeatures(Struct):
    """What a network must be given."""

    num_dense: Count
    dim: Positive
    sparse: list[FeatureEntry]
    transforms: list[TransformEntry] | UnsetType = UNSET


class Network(Struct, forbid_unknown_fields=True):
    """What the network is."""

    name: str
    sha256: Sha256 | None
    text: str | None
    options: dict[str, Any]
    features: NetworkFeatures | None


class Metrics(Struct):
    """Of an evaluation; NaN where nothing of one class is held out."""

    auc: float
    log_loss: float
    accuracy: float


class Evaluation(Metrics, kw_only=True):
    """A record of one."""

    step: Count
    epoch: Count | UnsetType = UNSET
    samples: Count | UnsetType = UNSET
    hot_share: Share | UnsetType = UNSET
    dropped: Count | UnsetType = UNSET
    dropped_share: Share | UnsetType = UNSET
    loss: Finite | None = None
    normalized_entropy: float | UnsetType = UNSET
    final: bool | UnsetType = UNSET
    val: Metrics | UnsetType = UNSET
    weights_of_step: Count | UnsetType = UNSET
    training_s: Amount | UnsetType = UNSET
    paused_s: Amount | UnsetType = UNSET
    program_s: Amount | UnsetType = UNSET


class Loss(Struct):
    """A report of the training loss; none was seen: NaN."""

    epoch: Count
    step: Count
    samples: Count
    loss: float | None
    learning_rate: Amount
    training_s: Amount


class Drop(Struct):
    """A choice of inputs, or why there was none."""

    epoch: Count
    policy: str
    dropped: Count
    reason: str | UnsetType = UNSET
    pool: str | UnsetType = UNSET
    alpha: Finite | None | UnsetType = UNSET
    threshold: float | list[float] | None | UnsetType = UNSET
    target: Count | None | UnsetType = UNSET
    chosen: Count | UnsetType = UNSET  # as it was called before `achieved`
    achieved: Count | UnsetType = UNSET
    why: str | None | UnsetType = UNSET
    step: Count | UnsetType = UNSET
    samples: Count | UnsetType = UNSET
    candidates: Count | UnsetType = UNSET
    hot_remaining: Count | UnsetType = UNSET
    hot_inputs: Count | UnsetType = UNSET
    dropped_before: Count | UnsetType = UNSET
    kept_reweighted: Count | UnsetType = UNSET
    rows_touched_share: Share | UnsetType = UNSET
    row_change: list[tuple[Amount, Count]] | UnsetType = UNSET


class ProgressValues(Struct, forbid_unknown_fields=True):
    """How far the run has come, see `slipstream.training.progress`."""

    step: Count
    samples: Count
    epoch: Count
    hot_samples: Count
    dropped: Count
    loss: Finite | None
    drops: list[Drop]
    evaluations: list[Evaluation] = []
    validations: list[Evaluation] = []
    losses: list[Loss] = []
    best: Evaluation | None = None
    reached: str | None = None


class TrainerValues(Struct, forbid_unknown_fields=True):
    """Of the loop."""

    progress: ProgressValues
    settled_step: Count
    loss_weight: Amount
    window: Count
    clocks: dict[str, Amount]
    order_check: list[Count] | UnsetType = UNSET


class PlanValues(Struct):
    """Of the epoch, see `slipstream.training.batching`."""

    num_inputs: Pair
    next: Pair
    mixed: Pair
    position: Count
    num_trained: Pair
    num_replaced: Pair


class RuleValues(Struct):
    """Of the drop rule, see `slipstream.training.dropping`."""

    choices: Count
    targets: list[Count]
    next_start: Amount | None
    snapshot_at: Count | UnsetType = UNSET


class DropsValues(Struct, forbid_unknown_fields=True):
    """What of the drop rule outlives an epoch; None: its policy has no state."""

    state: list[tuple[str, Literal["array", "tensor", "tensor on the device"]]] | None
    epochs: list[Count]


class StepValues(Struct):
    """Of the loss and the network's optimizer."""

    loss_sum: Float32
    optimizer: list[str] | UnsetType = UNSET


class Values(Struct):
    """Where the run stood, by part."""

    trainer: TrainerValues
    step: StepValues
    plan: PlanValues | None = None
    rule: RuleValues | None = None
    drops: DropsValues | None = None
    random: dict[str, Any] | UnsetType = UNSET


class Description(Struct, forbid_unknown_fields=True):
    """A checkpoint.json, of version 2 or brought up to it."""

    version: Literal[1, 2]
    identity: Identity
    values: Values
    network: Network
    vocabulary: Described | None
    state: Sha256
    files: dict[str, str] | UnsetType = UNSET


def check_described(described: Mapping[str, Any], path: Path) -> None:
    """Raise `ValueError` with the field that is not what it must be, or does not fit others."""
    conform(described, Description, path)
    identity, network = described["identity"], described["network"]
    values = described["values"]
    trainer, text = values["trainer"], network["text"]
    progress = trainer["progress"]
    step, batch_size = progress["step"], identity["run"]["--mini-batch-size"]
    name = path.parent.name.removeprefix("step-")
    sha256 = None if text is None else hashlib.sha256(text.encode()).hexdigest()
    is_here = values.get("plan") is not None
    fits = {
        "progress.step: not of this folder": not name.isdecimal() or int(name) == step,
        "progress.samples: more than its steps": progress["samples"] <= step * batch_size,
        "progress.hot_samples: more than all": progress["hot_samples"] <= progress["samples"],
        "settled_step: beyond its step": trainer["settled_step"] <= step,
        "order_check: without a plan, or a plan without it": ("order_check" in trainer) == is_here,
        "network.name: not that of the identity": network["name"] == identity["model"]["--model"],
        "network.sha256: not of its text": network["sha256"] == sha256,
    }
    for what, is_so in fits.items():
        if not is_so:
            raise ValueError(f"{path}: {what}")
    _check_records(path, progress)


def _check_records(path: Path, progress: Mapping[str, Any]) -> None:
    best = [] if progress.get("best") is None else [progress["best"]]
    for name in ("evaluations", "validations", "losses"):
        _check_order(path, name, progress.get(name, []), progress["step"])
    if path.parent.name == "best":  # it was made when its best was validated
        newest = progress.get("validations", [])[-1:]
        if (
            not best
            or json.dumps(best) != json.dumps(newest)
            or best[0]["step"] != progress["step"]
        ):
            raise ValueError(
                f"{path}: progress.best: not the validation at step {progress['step']}"
            )
    for name in ("evaluations", "validations", "best"):
        for record in best if name == "best" else progress.get(name, []):
            for inner in (record, record.get("val", record)):
                _check_metrics(f"{path}: progress.{name}", inner)
    for name in ("evaluations", "validations", "losses", "drops"):
        if any("kind" in record for record in progress.get(name, [])):
            raise ValueError(f"{path}: progress.{name}: unknown field kind")


def _check_order(path: Path, name: str, records: Sequence[Mapping[str, Any]], last: int) -> None:
    steps = [record["step"] for record in records]
    if steps != sorted(steps) or (steps and steps[-1] > last):
        raise ValueError(f"{path}: progress.{name}: of steps {steps[-9:]}; the run is at {last}")


def _check_metrics(source: str, record: Mapping[str, Any]) -> None:
    for name, most in (("auc", 1.0), ("accuracy", 1.0), ("log_loss", math.inf)):
        if record[name] < 0 or record[name] > most:  # not of NaN
            raise ValueError(f"{source}: {name} is {record[name]}; expected 0 to {most:g}")


def check_state(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise `ValueError` for an array of another type or number of dimensions than is written."""
    for name, array in arrays.items():
        starts = [
            start
            for start in ARRAYS
            if name == start or start.endswith(".") and name.startswith(start)
        ]
        for types, num_dims in (ARRAYS[start] for start in starts):
            is_type = array.dtype in map(np.dtype, types)
            if not is_type or num_dims not in (None, array.ndim):
                raise ValueError(
                    f"{path}: {name} has {array.ndim} dimensions of {array.dtype.str}; expected "
                    f"{'some' if num_dims is None else num_dims} of {' or '.join(types)}"
                )


def check_finite(name: str, array: np.ndarray, least: float = -math.inf) -> None:
    """Raise `ValueError` for values of a checkpoint that are not finite, or below `least`."""
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds NaN or infinite values")
    if least > -math.inf and array.size and array.min() < least:
        raise ValueError(f"{name} holds values below {least:g}")
