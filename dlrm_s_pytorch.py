"""DLRM (arXiv 1906.00091) on one machine, and the entry point of the baseline trainer.

The model is a bottom MLP over the dense features, one embedding row per sparse feature, an
interaction (inner products of all pairs of vectors) and a top MLP to one logit. The rows live in
`slipstream.embedding`, outside autograd; `DLRM_Net` gets them looked up. The baseline trains every
input the same way: with a GPU the rows stay in host memory and the MLPs run on the device.

    python dlrm_s_pytorch.py --processed-data-file input/kaggle/train_processed.npz
"""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_data_pytorch import (
    PreparedData,
    baseline_data,
    generated_log,
    load_processed,
    move_resident_inputs,
    planted_limit,
)
from slipstream import cli
from slipstream.checkpoint import (
    Checkpoints,
    Every,
    Saved,
    checkpoint_folder,
    differences,
    find_checkpoint,
)
from slipstream.embedding import EmbeddingTable, initial_rows
from slipstream.formats import KAGGLE_DAYS
from slipstream.interaction import DotInteraction, interaction_pairs
from slipstream.memory import check_needs, training_needs
from slipstream.runlog import Clocks, RunLog
from slipstream.runtime import (
    StopRequest,
    available_memory_bytes,
    choose_device,
    describe_machine,
    free_device_bytes,
    git_commit,
    peak_device_bytes,
    peak_rss_bytes,
    tune_process,
)
from slipstream.staleness import DropRule, DropSettings
from slipstream.step import TrainStep
from slipstream.trainer import LearningRate, Progress, Trainer, drop_report


def mlp(sizes: list[int], generator: torch.Generator, relu_last: bool) -> nn.Sequential:
    """Linear layers with ReLU between; weights N(0, 2 / (in + out)), biases N(0, 1 / out) as in
    DLRM.
    """
    layers: list[nn.Module] = []
    for num_in, num_out in zip(sizes, sizes[1:], strict=False):
        linear = nn.Linear(num_in, num_out)
        with torch.no_grad():
            linear.weight.normal_(0.0, (2 / (num_in + num_out)) ** 0.5, generator=generator)
            linear.bias.normal_(0.0, (1 / num_out) ** 0.5, generator=generator)
        layers += [linear, nn.ReLU(inplace=True)]
    return nn.Sequential(*(layers if relu_last else layers[:-1]))


class DLRM_Net(nn.Module):  # noqa: N801 - the name the field knows
    """Dense features (B, num_dense) and embedding rows (B, F, dim) to logits (B,).

    Args:
        arch_mlp_bot: sizes from num_dense to dim.
        arch_mlp_top: sizes after the interaction, ending in 1; the input size is derived.
        num_features: F.
        arch_interaction_op: `dot` or `cat`.
        arch_interaction_itself: with `dot`, also each vector with itself.
        seed: of the initial weights.
    """

    def __init__(
        self,
        arch_mlp_bot: list[int],
        arch_mlp_top: list[int],
        num_features: int,
        arch_interaction_op: str = "dot",
        arch_interaction_itself: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        num_vectors, dim = num_features + 1, arch_mlp_bot[-1]
        self.interaction_op, self.itself = arch_interaction_op, arch_interaction_itself
        pairs, pair_of = interaction_pairs(num_vectors, arch_interaction_itself)
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("pair_of", pair_of, persistent=False)
        width = dim + len(pairs) if arch_interaction_op == "dot" else num_vectors * dim
        self.bot_l = mlp(arch_mlp_bot, generator, relu_last=True)
        self.top_l = mlp([width, *arch_mlp_top], generator, relu_last=False)

    def interact_features(self, dense_vector: Tensor, rows: Tensor) -> Tensor:
        """(B, dim) and (B, F, dim) to (B, width): the dense vector beside products or vectors."""
        # Under autocast the MLP's output is bf16; without `to` the fp32 rows would widen it again.
        rows = rows.to(dense_vector.dtype)
        vectors = torch.cat([dense_vector.unsqueeze(1), rows], dim=1)  # (B, F + 1, dim)
        if self.interaction_op == "cat":
            return vectors.flatten(1)
        products = DotInteraction.apply(vectors, self.pairs, self.pair_of, self.itself)
        return torch.cat([dense_vector, products], dim=1)

    def forward(self, dense: Tensor, rows: Tensor) -> Tensor:
        """Logits (B,) of a click."""
        return self.top_l(self.interact_features(self.bot_l(dense), rows)).squeeze(1)


def make_optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    """The MLPs' optimizer: SGD, or Adagrad beside row-wise Adagrad; the trainer sets its rate."""
    if name != "sgd":
        return torch.optim.Adagrad(model.parameters(), lr=0.0)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.SGD(model.parameters(), lr=0.0, fused=fused)


def run_training(
    args: argparse.Namespace,
    method: str,
    prepared: PreparedData,
    schedule: str,
    drop_settings: DropSettings | None,
) -> dict[str, Any]:
    """The body that the three trainers' `main` share; returns the log's summary record.

    `args` holds the flags of `cli.add_trainer_flags` and goes no further than this file; `schedule`
    and `drop_settings` are what makes the method, with the data in `prepared`.
    """
    device = choose_device(args.device)
    settings = tune_process(device, args.num_threads, args.precision, args.deterministic)
    identity = _identity(args, method, prepared, schedule, drop_settings)
    with ExitStack() as stack:
        folder = None
        if args.save_model:
            goes_on = args.load_model is not None and is_same_folder(args)
            folder = stack.enter_context(checkpoint_folder(args.save_model, goes_on))
        saved, resumes = find_saved(args, identity)
        model, table = build_model(args, prepared, device, saved)
        # The same command begins and goes on, so its name may be taken.
        may_go_on = resumes or args.load_model == "auto"
        log = RunLog(args.runs_dir, args.run_name, method, may_go_on)
        clocks = Clocks(torch.cuda.synchronize if device.type == "cuda" else None)
        _log_start(log, method, args, prepared, table, settings, saved, resumes)
        drops: list[dict[str, Any]] = []
        rule = None
        if drop_settings is not None:
            rule = DropRule(drop_settings, prepared.num_hot, args.seed, drop_report(log, drops))
        checkpoints = None
        if folder is not None:
            start = saved if args.load_model is not None and is_same_folder(args) else None
            slots, every = prepared.slot_of_row, Every(*args.checkpoint_every)
            checkpoints = Checkpoints(folder, identity, table, slots, every, args.keep, start)
            start = None
        stop = stack.enter_context(StopRequest())
        trainer = build_trainer(
            args, prepared, schedule, model, table, rule, log, clocks, None, checkpoints, stop
        )
        trainer.progress.drops = drops
        if saved is not None:
            _go_on(trainer, saved, resumes, log)
            saved = None  # a file that is mapped takes room after its deletion
        progress = trainer.evaluate_only() if args.inference_only else trainer.run()
        if stop.signal:
            log.write("stopped", signal=stop.signal, **progress.shares(), **clocks.seconds())
            log.close()
            _stop_program(stop.signal, progress, checkpoints)
    summary = _summary(method, trainer, prepared)
    log.write("summary", **summary)
    log.close()
    _print_summary(summary)
    print(f"log: {log.path}")
    if trainer.save_failure is not None:
        raise trainer.save_failure
    if checkpoints is not None:
        print(f"model: {checkpoints.last_path}")
    return {**summary, "log": str(log.path)}


def is_same_folder(args: argparse.Namespace) -> bool:
    """Whether --load-model lies in --save-model, whose checkpoints the run then goes on with."""
    if args.load_model == "auto":
        return True
    return Path(args.save_model).resolve() in (
        loaded := Path(args.load_model).resolve(),
        loaded.parent,
    )


def _identity(
    args: argparse.Namespace,
    method: str,
    prepared: PreparedData,
    schedule: str,
    drop_settings: DropSettings | None,
) -> dict[str, dict[str, Any]]:
    """What a checkpoint of this run belongs to.

    Another `model` or `data` refuses its weights; another `run` its place in the order of batches.
    Another `rate` is said: the run goes on with the new one.
    """
    model = ("arch_sparse_feature_size", "arch_mlp_bot", "arch_mlp_top", "arch_interaction_op")
    rate = ("learning_rate", "lr_num_warmup_steps", "lr_decay_start_step", "lr_num_decay_steps")

    def flags(*names: str) -> dict[str, Any]:
        return {f"--{name.replace('_', '-')}": getattr(args, name) for name in names}

    return {
        "model": flags(*model, "arch_interaction_itself"),
        "data": {"table sizes": prepared.table_sizes.tolist(), "the log": prepared.log_identity},
        "run": {
            "the method": method,
            **flags("seed", "mini_batch_size", "optimizer", "data_randomize"),
            "--schedule": schedule,
            "the sets": prepared.sets_identity,
            "the drop rule": drop_settings and dataclasses.asdict(drop_settings),
        },
        "rate": flags(*rate, "lr_decay_share", "nepochs", "num_batches"),
    }


def find_saved(
    args: argparse.Namespace, identity: dict[str, dict[str, Any]]
) -> tuple[Saved | None, bool]:
    """The checkpoint that --load-model names, and whether the run takes up its place, too.

    Raises `ValueError` with what differs for one of another model or other data, and where it lies
    in --save-model also for one of another run; `FileNotFoundError` where there is none.
    """
    if args.load_model is None:
        return None, False
    is_auto = args.load_model == "auto"
    saved = find_checkpoint(args.save_model if is_auto else args.load_model)
    if saved is None:
        if is_auto:
            return None, False
        raise FileNotFoundError(f"--load-model: no checkpoint in {args.load_model}")
    with saved.reading():
        for kind in ("model", "data"):
            if found := differences(identity[kind], saved.identity[kind]):
                raise ValueError(f"made for other {kind}: {found[0]}")
        found = differences(identity["run"], saved.identity["run"])
        if found and args.save_model and is_same_folder(args):
            raise ValueError(f"of another run: {found[0]}; choose another --save-model")
        step = saved.step
        rates = differences(identity["rate"], saved.identity.get("rate", identity["rate"]))
    if found:
        print(f"{saved.folder}: the weights of step {step}, but not its place: {'; '.join(found)}")
    elif not args.inference_only:
        print(f"going on with {saved.folder}, step {step}")
        if rates:
            print(f"note: from there on otherwise than before: {'; '.join(rates)}")
    return saved, not found and not args.inference_only


def _go_on(trainer: Trainer, saved: Saved, resumes: bool, log: RunLog) -> None:
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
    ):
        for record in records:
            log.write(kind, **record)


def _stop_program(number: int, progress: Progress, checkpoints: Checkpoints | None) -> None:
    """Say where a run that a signal ended stands, and exit as the signal would."""
    where = "nothing is kept: no --save-model"
    if checkpoints is not None:
        where = f"{checkpoints.last_path} is kept; --load-model auto goes on from there"
    print(f"stopped by {signal.Signals(number).name} at step {progress.step}; {where}")
    sys.exit(128 + number)


def build_model(
    args: argparse.Namespace,
    prepared: PreparedData,
    device: torch.device,
    saved: Saved | None = None,
) -> tuple[DLRM_Net, EmbeddingTable]:
    """The model on its device and the table, with new weights or those of a checkpoint.

    Raises `MemoryError`, before the rows are allocated, where the run will not fit into memory.
    """
    num_dense, num_features = prepared.data.test.dense.shape[1], len(prepared.table_sizes)
    cli.check_mlp_bot(args.arch_mlp_bot, num_dense)
    model = DLRM_Net(
        args.arch_mlp_bot,
        args.arch_mlp_top,
        num_features,
        args.arch_interaction_op,
        args.arch_interaction_itself,
        args.seed,
    )
    sizes, dim = prepared.table_sizes, args.arch_sparse_feature_size
    num_rows = int(sizes.sum())
    num_resident = args.num_resident
    if num_resident == -1:
        num_resident = num_rows if device.type == "cpu" else prepared.num_hot
    _check_memory(args, prepared, device, model, num_resident)
    slots, sums = prepared.slot_of_row, None
    if saved is not None:
        saved.load_model(model)
        with_sums = args.optimizer == saved.identity["run"].get("--optimizer") == "rwsadagrad"
        rows, sums = saved.load_rows(num_rows, dim, slots, with_sums)
    else:
        slots = None if slots is None else torch.from_numpy(np.array(slots))
        rows = initial_rows(sizes.tolist(), dim, slots, args.seed)
    table = EmbeddingTable(
        rows,
        num_resident,
        args.mini_batch_size * num_features,
        device,
        args.optimizer,
        args.test_mini_batch_size * num_features,
        sums,
    )
    return model.to(device), table


def _check_memory(
    args: argparse.Namespace,
    prepared: PreparedData,
    device: torch.device,
    model: DLRM_Net,
    num_resident: int,
) -> None:
    """Print what the run will take; `MemoryError` where it is not free."""
    num_features = len(prepared.table_sizes)
    vectors = (num_features + 1) * args.arch_sparse_feature_size
    on_device = device.type == "cuda"
    drops = getattr(args, "drop_policy", "none") != "none"
    needs = training_needs(
        num_rows=int(prepared.table_sizes.sum()),
        dim=args.arch_sparse_feature_size,
        optimizer=args.optimizer,
        num_resident=num_resident,
        num_features=num_features,
        batch_size=min(args.mini_batch_size, prepared.data.num_train),
        test_batch_size=min(args.test_mini_batch_size, len(prepared.data.test)),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        # The dense vector and the rows, as they are and side by side, and each layer's output
        # before and after its ReLU.
        num_activations=2 * (vectors + sum(args.arch_mlp_bot) + sum(args.arch_mlp_top)),
        num_snapshot_rows=prepared.num_hot if drops else 0,
        num_choice_inputs=len(prepared.data.hot) if drops else 0,
        num_train=prepared.data.num_train,
        on_device=on_device,
    )
    free_device = free_device_bytes(device) if on_device else None
    print(check_needs(needs, available_memory_bytes(), free_device))


def _log_start(
    log: RunLog,
    method: str,
    args: argparse.Namespace,
    prepared: PreparedData,
    table: EmbeddingTable,
    settings: dict[str, Any],
    saved: Saved | None,
    resumes: bool,
) -> None:
    log.write(
        "start",
        method=method,
        argv=sys.argv,
        flags=vars(args),
        commit=git_commit(),
        seed=args.seed,
        machine=describe_machine(table.device),
        settings=settings,
        data=prepared.manifest,
        table_sizes=prepared.table_sizes.tolist(),
        num_hot=prepared.num_hot,
        num_resident=table.num_resident,
        table_device_bytes=table.device_bytes,
        num_train=prepared.data.num_train,
        num_hot_inputs=len(prepared.data.hot),
        loaded=str(saved.folder) if saved is not None else None,
        resumed=resumes,
    )


def build_trainer(
    args: argparse.Namespace,
    prepared: PreparedData,
    schedule: str,
    model: DLRM_Net,
    table: EmbeddingTable,
    rule: DropRule | None,
    log: RunLog | None,
    clocks: Clocks,
    on_report: Callable[[Progress], None] | None = None,
    checkpoints: Checkpoints | None = None,
    stop: StopRequest | None = None,
) -> Trainer:
    """The training loop that `args` asks for; without `log`, `Trainer.run` must not be let end."""
    data = prepared.data
    if args.device_data != "false" and table.device.type == "cuda":
        data = move_resident_inputs(prepared, table, args.device_data == "true")
    window = min(
        (inputs.window for inputs in (prepared.data.hot, prepared.data.cold) if inputs.window),
        default=0,
    )
    if window and args.data_randomize != "none":
        print(
            f"the training inputs are larger than --max-memory: blocks are shuffled, and the inputs"
            f" of {window:,} at a time"
        )
    overlap = args.overlap == "true" or (args.overlap == "auto" and table.device.type == "cuda")
    return Trainer(
        step=TrainStep(
            torch.compile(model) if args.compile else model,
            table,
            make_optimizer(model, args.optimizer),
            args.mini_batch_size,
            args.precision,
            args.cuda_graph,
        ),
        overlap=overlap,
        hot_rows_resident=table.num_resident >= prepared.num_hot,
        learning_rate=LearningRate(
            args.learning_rate,
            args.lr_num_warmup_steps,
            args.lr_decay_start_step,
            args.lr_num_decay_steps,
            args.lr_decay_share,
        ),
        data=data,
        drop_rule=rule,
        log=log,
        clocks=clocks,
        test_batch_size=args.test_mini_batch_size,
        num_epochs=args.nepochs,
        schedule=schedule,
        randomize=args.data_randomize,
        seed=args.seed,
        window=window,
        test_freq=args.test_freq,
        val_freq=args.val_freq,
        print_freq=args.print_freq,
        max_steps=args.num_batches,
        auc_threshold=args.mlperf_auc_threshold,
        accuracy_threshold=args.mlperf_acc_threshold,
        checkpoints=checkpoints,
        stop=stop,
        on_report=on_report,
    )


def _summary(method: str, trainer: Trainer, prepared: PreparedData) -> dict[str, Any]:
    progress, seconds = trainer.progress, trainer.clocks.seconds()
    final = progress.evaluations[-1]
    return {
        "method": method,
        **progress.shares(),
        "loss": final["loss"],
        "auc": final["auc"],
        "log_loss": final["log_loss"],
        "accuracy": final["accuracy"],
        "val": final["val"],
        "planted_auc": planted_limit(prepared.manifest),
        "best_val": progress.best,
        "reached": progress.reached,
        "drops": progress.drops,
        **seconds,
        "segregation_s": prepared.manifest.get("seconds") if prepared.num_hot else None,
        "samples_per_s": progress.samples / max(seconds["training_s"], 1e-9),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
        "cuda_graph": trainer.step.has_graph,
        "num_train": prepared.data.num_train,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    """The final lines for people."""
    limit = summary["planted_auc"]
    beside = f" (the planted model's limit: {limit:.4f})" if limit is not None else ""
    print(
        f"{summary['method']}: test AUC {summary['auc']:.4f}{beside}, "
        f"log loss {summary['log_loss']:.4f}, accuracy {summary['accuracy']:.4f}; "
        f"validation AUC {summary['val']['auc']:.4f}"
    )
    print(
        f"trained {summary['samples']:,} samples ({summary['hot_share']:.1%} hot), dropped "
        f"{summary['dropped']:,} ({summary['dropped_share']:.1%} of both)"
    )
    device_bytes = summary["peak_device_bytes"]
    print(
        f"peak memory {summary['peak_rss_bytes'] / 1e6:,.0f} MB"
        + (f", on the device {device_bytes / 1e6:,.0f} MB" if device_bytes is not None else "")
    )
    print(
        f"training {summary['training_s']:.1f} s ({summary['samples_per_s']:,.0f} samples/s), "
        f"paused {summary['paused_s']:.1f} s, program {summary['program_s']:.1f} s"
        + "".join(
            f"; {name} {summary[f'{name}_s']:.3f} s"
            for name in ("snapshot", "threshold", "classification")
            if f"{name}_s" in summary
        )
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-generation",
        choices=("dataset", "random", "synthetic"),
        default="dataset",
        help="dataset: --processed-data-file; random: uniform, nothing to learn; synthetic: "
        "power-law ids and labels of a planted model",
    )
    group.add_argument(
        "--processed-data-file",
        default=None,
        help="a processed .npz of data_utils.py, or of the older DLRM scripts",
    )
    group.add_argument(
        "--data-size",
        type=cli.positive_int,
        default=100_000,
        help="inputs that random and synthetic make, held-out ones included",
    )
    group.add_argument(
        "--arch-embedding-size",
        type=cli.layer_sizes,
        default="1000-500-100-100-50-50-20-10",
        help="rows per table, for random and synthetic; a data set brings its own",
    )
    cli.add_trainer_flags(parser)
    args = parser.parse_args(argv)
    cli.check_trainer_flags(parser, args)
    if args.data_generation == "dataset" and args.processed_data_file is None:
        parser.error("--processed-data-file is needed with --data-generation=dataset")
    if args.data_generation != "dataset" and args.processed_data_file is not None:
        parser.error("--processed-data-file goes with --data-generation=dataset")
    if args.data_size < KAGGLE_DAYS:
        parser.error(f"--data-size {args.data_size}: expected at least {KAGGLE_DAYS}")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train the baseline; returns the summary."""
    args = parse_args(argv)
    if args.data_generation == "dataset":
        log = load_processed(args.processed_data_file, args.max_memory)
    else:
        log = generated_log(
            args.data_generation,
            args.arch_embedding_size,
            args.data_size,
            args.arch_mlp_bot[0],
            args.seed,
        )
    return run_training(args, "baseline", baseline_data(log), "interleaved", None)


if __name__ == "__main__":
    cli.run_script(main)
