"""DLRM (arXiv 1906.00091) on one machine, and the entry point of the baseline trainer.

The model is a bottom MLP over the dense features, one embedding row per sparse feature, an
interaction (inner products of all pairs of vectors) and a top MLP to one logit. The rows live in
`slipstream.embedding`, outside autograd; `DLRM_Net` gets them looked up. The baseline trains every
input the same way: with a GPU the rows stay in host memory and the MLPs run on the device.

    python dlrm_s_pytorch.py --processed-data-file input/kaggle/train_processed.npz
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
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
from slipstream.checkpoint import load_model, model_file, save_model
from slipstream.embedding import EmbeddingTable, initial_rows
from slipstream.formats import KAGGLE_DAYS
from slipstream.interaction import DotInteraction, interaction_pairs
from slipstream.runlog import Clocks, RunLog
from slipstream.runtime import (
    choose_device,
    describe_machine,
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
    if args.save_model:
        model_file(args.save_model, to_write=True).parent.mkdir(parents=True, exist_ok=True)
    model, table = build_model(args, prepared, device)
    log = RunLog(args.runs_dir, args.run_name, method)
    clocks = Clocks(torch.cuda.synchronize if device.type == "cuda" else None)
    _log_start(log, method, args, prepared, table, settings)
    drops: list[dict[str, Any]] = []
    rule = None
    if drop_settings is not None:
        rule = DropRule(drop_settings, prepared.num_hot, args.seed, drop_report(log, drops))
    trainer = build_trainer(args, prepared, schedule, model, table, rule, log, clocks)
    progress = trainer.run()
    summary = _summary(method, progress, drops, clocks, prepared)
    log.write("summary", **summary)
    log.close()
    _print_summary(summary)
    print(f"log: {log.path}")
    if args.save_model:
        sizes, slots = prepared.table_sizes, prepared.slot_of_row
        print(f"model: {save_model(args.save_model, model, table, sizes, slots)}")
    return {**summary, "log": str(log.path)}


def build_model(
    args: argparse.Namespace, prepared: PreparedData, device: torch.device
) -> tuple[DLRM_Net, EmbeddingTable]:
    """The model on its device and the table, with new or loaded weights.

    Raises `MemoryError` where the rows do not fit.
    """
    try:
        return _build(args, prepared, device)
    except RuntimeError as error:  # how PyTorch reports a failed allocation, on CPU and CUDA
        if "allocate" not in str(error) and "out of memory" not in str(error):
            raise
        raise MemoryError(
            f"no memory for {prepared.table_sizes.sum():,} embedding rows: smaller rows, tables or "
            "--hot-emb-gpu-mem"
        ) from error


def _build(
    args: argparse.Namespace, prepared: PreparedData, device: torch.device
) -> tuple[DLRM_Net, EmbeddingTable]:
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
    if args.load_model:
        rows = load_model(args.load_model, model, sizes, dim, prepared.slot_of_row)
    else:
        slots = prepared.slot_of_row
        slots = None if slots is None else torch.from_numpy(np.array(slots))
        rows = initial_rows(sizes.tolist(), dim, slots, args.seed)
    num_resident = args.num_resident
    if num_resident == -1:
        num_resident = len(rows) if device.type == "cpu" else prepared.num_hot
    table = EmbeddingTable(
        rows,
        num_resident,
        args.mini_batch_size * num_features,
        device,
        args.optimizer,
        args.test_mini_batch_size * num_features,
    )
    return model.to(device), table


def _log_start(
    log: RunLog,
    method: str,
    args: argparse.Namespace,
    prepared: PreparedData,
    table: EmbeddingTable,
    settings: dict[str, Any],
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
        print_freq=args.print_freq,
        max_steps=args.num_batches,
        on_report=on_report,
    )


def _summary(
    method: str,
    progress: Progress,
    drops: list[dict[str, Any]],
    clocks: Clocks,
    prepared: PreparedData,
) -> dict[str, Any]:
    final = progress.evaluations[-1]
    seconds = clocks.seconds()
    return {
        "method": method,
        **progress.shares(),
        "loss": progress.loss,
        "auc": final["auc"],
        "log_loss": final["log_loss"],
        "accuracy": final["accuracy"],
        "val": final["val"],
        "planted_auc": planted_limit(prepared.manifest),
        "drops": drops,
        **seconds,
        "segregation_s": prepared.manifest.get("seconds") if prepared.num_hot else None,
        "samples_per_s": progress.samples / max(seconds["training_s"], 1e-9),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_device_bytes": peak_device_bytes(),
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
