"""A run's parts, out of its settings: network, table, and the training loop around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from slipstream.logs.transforms import TRANSFORMS
from slipstream.model.dlrm import HIDDEN_BOT, TOP
from slipstream.model.features import Features, features_of
from slipstream.model.flags import SHAPED_BY, ModelSettings
from slipstream.model.networks import (
    ClickModel,
    NetworkSpec,
    build_network,
    find_network,
    values_kept,
)
from slipstream.tools.device import free_device_bytes
from slipstream.tools.ranks import Ranks
from slipstream.tools.runlog import Clocks, Log
from slipstream.tools.runtime import StopRequest, available_memory_bytes, process_limit_bytes
from slipstream.tools.streams import torch_seed
from slipstream.training.checkpoint import Checkpoints
from slipstream.training.dropping import DropRule
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.evaluation import Ends
from slipstream.training.flags import Settings
from slipstream.training.growth import grown_rows, is_extended
from slipstream.training.loader import Table
from slipstream.training.memory import check_needs, training_needs
from slipstream.training.optimizers import make_optimizer
from slipstream.training.policies import Policy
from slipstream.training.progress import Progress, report_freqs
from slipstream.training.rows import Shard, initial_rows
from slipstream.training.saved import Saved
from slipstream.training.schedule import LearningRate
from slipstream.training.sets import PreparedData, move_resident_inputs
from slipstream.training.sharded import ShardedTable
from slipstream.training.step import TrainStep
from slipstream.training.trainer import Trainer


def network_of(settings: ModelSettings) -> NetworkSpec:
    """The network that the flags name, with its options."""
    shape = {
        "arch_mlp_bot": settings.arch_mlp_bot,
        "arch_mlp_top": settings.arch_mlp_top,
        "arch_interaction_op": settings.arch_interaction_op,
        "arch_interaction_itself": settings.arch_interaction_itself,
    }
    usual: dict[str, Any] = {
        "arch_mlp_bot": [0, *HIDDEN_BOT, settings.arch_sparse_feature_size],
        "arch_mlp_top": list(TOP),
        "arch_interaction_op": "dot",
        "arch_interaction_itself": False,
    }
    taken = SHAPED_BY.get(settings.model, ())
    given = [name for name, value in shape.items() if value not in (None, usual[name])]
    if unread := [name for name in given if name not in taken]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
        print(f"note: --model {settings.model} does not read {flags}")
    mine = {name: shape[name] for name in taken}
    return find_network(settings.model, {**mine, **dict(settings.model_args)})


def features_seen(prepared: PreparedData, dim: int) -> Features:
    """What a network gets to see of these data."""
    return features_of(prepared.layout, prepared.data.test.num_dense, dim)


def describe_features(prepared: PreparedData, settings: ModelSettings) -> dict[str, Any]:
    """What a saved model must be given: plain JSON."""
    return {
        "num_dense": prepared.data.test.num_dense,
        "dim": settings.arch_sparse_feature_size,
        "sparse": prepared.layout.describe(),
        TRANSFORMS: prepared.transforms.describe(),
    }


def build_model(
    settings: Settings,
    spec: NetworkSpec,
    prepared: PreparedData,
    device: torch.device,
    saved: Saved | None = None,
    policy: Policy | None = None,
    ranks: Ranks | None = None,
) -> tuple[ClickModel, Table]:
    """The model on its device and the table, with new weights or those of a checkpoint.

    `policy` is that of a run that drops inputs, whose choice takes memory. Of `ranks` each has its
    part of the rows.

    Seeds PyTorch, for what the network draws from here on. Raises `MemoryError`, before the rows
    are allocated, where the run will not fit into memory.
    """
    dim, sizes, layout = (
        settings.model.arch_sparse_feature_size,
        prepared.table_sizes,
        prepared.layout,
    )
    training, machine = settings.training, settings.machine
    features = features_seen(prepared, dim)
    network = build_network(spec, features, training.seed)
    model = ClickModel(network, layout)
    kept = values_kept(model, features, spec, training.seed, saved is None)
    num_rows, num_resident = int(sizes.sum()), machine.num_resident
    if num_resident == -1:
        # Of several ranks each has a copy of those.
        is_one_memory = device.type == "cpu" and ranks is None
        num_resident = num_rows if is_one_memory else prepared.num_hot
    shard = Shard(num_rows, num_resident)
    if ranks is not None:
        shard = Shard(num_rows, num_resident, ranks.rank, ranks.size)
    _check_memory(settings, prepared, device, network, kept, shard, policy, ranks)
    slots, sums = prepared.slot_of_row, None
    if saved is not None:
        saved.load_network(network)
        optimizer = saved.identity["run"].get("--optimizer")
        with_sums = training.optimizer == optimizer == "rwsadagrad"
        if is_extended(saved, prepared.manifest):
            rows, sums = grown_rows(saved, prepared, dim, training.seed, with_sums, shard)
        else:
            absent = prepared.has_absent
            rows, sums = saved.load_rows(num_rows, dim, slots, with_sums, absent, shard)
    else:
        start = (training.seed, prepared.has_absent, shard, training.optimizer)
        rows = initial_rows(sizes.tolist(), dim, slots, *start)
    table = _table(settings, prepared, device, rows, sums, shard, ranks)
    # What each rank draws for its part of a batch is its own.
    rank = () if ranks is None or ranks.is_first else (ranks.rank,)
    torch.manual_seed(torch_seed(training.seed, "training", *rank))
    model = ClickModel(
        *(network.to(device), layout, machine.precision, machine.compile),
        *(training.loss_threshold, spec.plugin),
    )
    return model, table


def _table(
    settings: Settings,
    prepared: PreparedData,
    device: torch.device,
    rows: torch.Tensor,
    sums: torch.Tensor | None,
    shard: Shard,
    ranks: Ranks | None,
) -> Table:
    num_columns, optimizer = prepared.layout.num_columns, settings.training.optimizer
    sizes = (settings.training.mini_batch_size, settings.evaluation.test_mini_batch_size)
    batch, test = (-(-size // shard.size) * num_columns for size in sizes)
    kept = (sums, prepared.has_absent)
    if ranks is not None:
        return ShardedTable(rows, shard, ranks, batch, device, optimizer, test, *kept)
    return EmbeddingTable(rows, shard.num_resident, batch, device, optimizer, test, *kept)


def _check_memory(
    settings: Settings,
    prepared: PreparedData,
    device: torch.device,
    network: nn.Module,
    num_kept: int,
    shard: Shard,
    policy: Policy | None,
    ranks: Ranks | None,
) -> None:
    """Print what the run will take; `MemoryError` where it is not free."""
    model, on_device = settings.model, device.type == "cuda"
    drops = policy is not None and policy.score is not None
    hot, cold = len(prepared.data.hot), len(prepared.data.cold)
    num_candidates = {"hot": hot, "cold": cold, "all": hot + cold}[policy.pool if policy else "hot"]
    needs = training_needs(
        num_rows=int(prepared.table_sizes.sum()),
        dim=model.arch_sparse_feature_size,
        optimizer=settings.training.optimizer,
        dense_optimizer=settings.training.dense_optimizer,
        num_resident=shard.num_resident,
        num_ranks=shard.size,
        num_features=prepared.layout.num_columns,
        batch_size=min(settings.training.mini_batch_size, prepared.data.num_train),
        test_batch_size=min(settings.evaluation.test_mini_batch_size, len(prepared.data.test)),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        num_buffers=sum(buffer.numel() for buffer in network.buffers()),
        # And the rows as they are looked up, and their gradient.
        num_activations=num_kept + 2 * prepared.layout.num_columns * model.arch_sparse_feature_size,
        num_snapshot_rows=prepared.num_hot if drops else 0,
        num_choice_inputs=num_candidates if drops else 0,
        num_train=prepared.data.num_train,
        on_device=on_device,
    )
    free_device = free_device_bytes(device) if on_device else None
    num_local = 1 if ranks is None else ranks.local_size
    # Of one device each rank has its share.
    sharing = -(-num_local // max(torch.cuda.device_count(), 1)) if on_device else 1
    # Of several ranks none takes memory before all have looked.
    free = min(available_memory_bytes() // num_local, process_limit_bytes())
    free_device = None if free_device is None else free_device // sharing
    if ranks is not None:
        ranks.gather(torch.zeros(1))
    print(check_needs(needs, free, free_device, num_local))


def build_trainer(
    settings: Settings,
    prepared: PreparedData,
    schedule: str,
    model: ClickModel,
    table: Table,
    rule: DropRule | None,
    log: Log,
    clocks: Clocks,
    on_report: Callable[[Progress], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """The training loop that `settings` ask for."""
    training, machine, judged = settings.training, settings.machine, settings.evaluation
    on_cuda, data = table.device.type == "cuda", prepared.data
    batch_size = training.mini_batch_size
    if (always := machine.device_data) != "false" and on_cuda:
        data = move_resident_inputs(prepared, table, always == "true", batch_size, ranks)
    optimizer = make_optimizer(model.network, training.dense_optimizer)
    rate_ratio = training.dense_learning_rate / training.learning_rate
    num_steps = -(-prepared.data.num_train // batch_size)
    print_freq, said_freq = report_freqs(judged.print_freq, num_steps)
    return Trainer(
        step=TrainStep(
            *(model, table, optimizer, batch_size, machine.cuda_graph, rate_ratio),
            label_weights=training.loss_weights if training.loss_function == "wbce" else None,
            ranks=ranks,
        ),
        overlap=machine.overlap == "true" or (machine.overlap == "auto" and on_cuda),
        hot_rows_resident=table.num_resident >= prepared.num_hot,
        learning_rate=LearningRate(
            training.learning_rate,
            training.lr_num_warmup_steps,
            training.lr_decay_start_step,
            training.lr_num_decay_steps,
            training.lr_decay_share,
        ),
        data=data,
        drop_rule=rule,
        log=log,
        clocks=clocks,
        test_batch_size=judged.test_mini_batch_size,
        num_epochs=training.nepochs,
        schedule=schedule,
        randomize=training.data_randomize,
        seed=training.seed,
        window=_window(prepared, training.data_randomize, ranks),
        test_freq=judged.test_freq,
        val_freq=judged.val_freq,
        print_freq=print_freq,
        said_freq=said_freq,
        max_steps=training.num_batches,
        ends=Ends(judged.mlperf_auc_threshold, judged.mlperf_acc_threshold, judged.patience),
        checkpoints=checkpoints,
        stop=stop,
        on_report=on_report,
        ranks=ranks,
    )


def _window(prepared: PreparedData, randomize: str, ranks: Ranks | None = None) -> int:
    """Inputs to shuffle among each other, where they are larger than memory; 0: all of them."""
    sets = (prepared.data.hot, prepared.data.cold)
    window = min((inputs.window for inputs in sets if inputs.window), default=0)
    if ranks is not None:
        window = ranks.share(window)[0]  # it follows from the memory that is free just then
    if window and randomize != "none":
        print(
            f"the training inputs are larger than --max-memory: blocks are shuffled, and the inputs"
            f" of {window:,} at a time"
        )
    return window
