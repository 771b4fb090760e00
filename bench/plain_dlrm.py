"""The yardstick: DLRM as one would write it in plain PyTorch today, and no engine.

26 `nn.EmbeddingBag(sparse=True)`, `nn.Sequential` MLPs, `torch.optim.SGD`, a `Dataset` and a
`DataLoader` that index whole mini-batches. It starts from the same weights as our trainers, trains
the same inputs and is evaluated the same way, so both may be compared in speed and AUC. It is meant
to be good: inputs lie in memory ready to use, ids are turned once a batch, interaction takes the
faster of PyTorch's ways to pick entries.

    python -m bench.plain_dlrm --processed-data-file input/synthetic/train_processed.npz

`--optimizer rwsadagrad` takes our recipe's optimizers in place of SGD: row-wise Adagrad for the
tables, written for PyTorch's sparse gradients as DLRM has it, and PyTorch's fused Adam for the
MLPs; `--tuned true` our settings of a CPU. The run is logged as those of our trainers are.

With CUDA, `--placement hybrid` (tables and their update on the CPU, MLPs on the GPU, what users do
when the tables are too large) or `gpu` (all there). `--fbgemm true` takes FBGEMM's fused tables
instead of EmbeddingBags, where that package is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))  # for `python bench/plain_dlrm.py`

from slipstream.logs.inputs import ClickInputs  # noqa: E402
from slipstream.logs.processed import load_processed  # noqa: E402
from slipstream.model import flags as model_flags  # noqa: E402
from slipstream.model.dlrm import bottom_sizes  # noqa: E402
from slipstream.model.features import plain_features  # noqa: E402
from slipstream.model.interaction import interaction_pairs  # noqa: E402
from slipstream.model.networks import autocast, build_network, find_network  # noqa: E402
from slipstream.tools import cli  # noqa: E402
from slipstream.tools.cpu import tune_cpu  # noqa: E402
from slipstream.tools.device import choose_device, peak_device_bytes  # noqa: E402
from slipstream.tools.metrics import click_metrics  # noqa: E402
from slipstream.tools.runlog import Clocks, RunLog  # noqa: E402
from slipstream.tools.runtime import describe_machine, git_commit, peak_rss_bytes  # noqa: E402
from slipstream.training.rows import ADAGRAD_EPS, initial_rows  # noqa: E402
from slipstream.training.schedule import LearningRate  # noqa: E402

PLACEMENTS = ("cpu", "hybrid", "gpu")
JUDGED = (
    "step",
    "samples",
    "dropped",
    "dropped_share",
    "training_s",
    "auc",
    "log_loss",
    "accuracy",
)


class ClickDataset(Dataset):
    """Inputs in memory: dense (n, num_dense) float32, ids (n, F) int32, labels (n,) float32."""

    def __init__(self, inputs: ClickInputs) -> None:
        if inputs.weights is not None:
            raise ValueError("the log has weights, and the plain DLRM takes every input alike")
        self.dense = torch.from_numpy(inputs.transforms.apply(inputs.dense))
        self.ids = torch.from_numpy(np.array(inputs.categories))
        self.labels = torch.from_numpy(np.array(inputs.labels, np.float32))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A whole mini-batch; ids as (F, B), each row what one table looks up."""
        ids = self.ids.index_select(0, chosen).t().contiguous()
        return self.dense.index_select(0, chosen), ids, self.labels.index_select(0, chosen)


def batches(dataset: ClickDataset, batch_size: int, seed: int, num_workers: int, pin: bool) -> Any:
    """A DataLoader of shuffled mini-batches."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return DataLoader(
        dataset,
        sampler=order.split(batch_size),
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin,
    )


class EmbeddingBags(nn.Module):
    """One `nn.EmbeddingBag` a table: ids (F, B) -> rows (B, F, dim)."""

    def __init__(self, tables: list[Tensor]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(rows, freeze=False, mode="sum", sparse=True)
            for rows in tables
        )

    def forward(self, ids: Tensor) -> Tensor:
        """One lookup a table."""
        looked_up = [table(column.unsqueeze(1)) for table, column in zip(self.tables, ids)]  # noqa: B905
        return torch.stack(looked_up, dim=1)


class FbgemmBags(nn.Module):
    """FBGEMM's fused tables, which update their rows in the backward pass: same in and out."""

    def __init__(self, tables: list[Tensor], learning_rate: float, device: torch.device) -> None:
        super().__init__()
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )

        on_cpu = device.type == "cpu"
        location = EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE
        compute = ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA
        self.num_features, self.dim = len(tables), tables[0].shape[1]
        self.bags = SplitTableBatchedEmbeddingBagsCodegen(
            [(len(rows), self.dim, location, compute) for rows in tables],
            optimizer=EmbOptimType.EXACT_SGD,
            learning_rate=learning_rate,
        )
        for own, rows in zip(self.bags.split_embedding_weights(), tables, strict=True):
            own.copy_(rows)

    def forward(self, ids: Tensor) -> Tensor:
        """All lookups at once."""
        offsets = torch.arange(ids.numel() + 1, device=ids.device)
        rows = self.bags(ids.reshape(-1).long(), offsets)  # (B, F * dim)
        return rows.view(ids.shape[1], self.num_features, self.dim)


class PlainDLRM(nn.Module):
    """DLRM with the weights that our trainers start from.

    `arch_mlp_bot` and `arch_mlp_top` are as for `DLRM_Net`; `table_sizes` (F,) rows per table.
    """

    def __init__(
        self,
        arch_mlp_bot: list[int],
        arch_mlp_top: list[int],
        table_sizes: list[int],
        seed: int,
        placement: str = "cpu",
        fbgemm_learning_rate: float | None = None,
        optimizer: str = "sgd",
    ) -> None:
        super().__init__()
        self.mlp_device = torch.device("cpu" if placement == "cpu" else "cuda")
        self.table_device = torch.device("cuda" if placement == "gpu" else "cpu")
        num_vectors = len(table_sizes) + 1
        features = plain_features(arch_mlp_bot[0], len(table_sizes), arch_mlp_bot[-1])
        sizes = {"arch_mlp_bot": arch_mlp_bot, "arch_mlp_top": arch_mlp_top}
        start: Any = build_network(find_network("dlrm", sizes), features, seed)
        rows = initial_rows(table_sizes, arch_mlp_bot[-1], None, seed, optimizer=optimizer)
        tables = [
            table.to(self.table_device) for table in rows.split(table_sizes)
        ]  # parts of one array on a CPU
        self.rows: nn.Module
        if fbgemm_learning_rate is None:
            self.rows = EmbeddingBags(tables)
        else:
            self.rows = FbgemmBags(tables, fbgemm_learning_rate, self.table_device)
        # Plain layers with the start's weights.
        self.bot_l = nn.Sequential(*start.bot_l).to(self.mlp_device)
        self.top_l = nn.Sequential(*start.top_l).to(self.mlp_device)
        self.pairs = interaction_pairs(num_vectors, False)[0].to(self.mlp_device)

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Dense (B, num_dense) and ids (F, B) to logits (B,)."""
        rows = self.rows(ids.to(self.table_device, non_blocking=True))
        vector = self.bot_l(dense.to(self.mlp_device, non_blocking=True))
        rows = rows.to(self.mlp_device, non_blocking=True)
        vectors = torch.cat([vector.unsqueeze(1), rows], dim=1)  # (B, F + 1, dim)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        kept = torch.cat([vector, products.index_select(1, self.pairs)], dim=1)
        return self.top_l(kept).squeeze(1)


class RowWiseAdagrad(torch.optim.Optimizer):
    """DLRM's RWSAdagrad for the sparse gradients of `nn.EmbeddingBag`: one sum a row."""

    def __init__(self, parameters: Iterable[Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the rows that have a gradient."""
        for group in self.param_groups:
            for rows in group["params"]:
                gradient = rows.grad.coalesce()
                [index], values = gradient.indices(), gradient.values()
                if not self.state[rows]:
                    self.state[rows]["sums"] = rows.new_zeros(len(rows))
                sums = self.state[rows]["sums"]
                sums.index_add_(0, index, values.pow(2).mean(1))
                deviation = sums.index_select(0, index).sqrt_().add_(ADAGRAD_EPS)
                rows.index_add_(0, index, values.div_(deviation.unsqueeze(1)).mul_(-group["lr"]))


class PlainTraining:
    """A model and its optimizers, one `step` a mini-batch.

    SGD at `learning_rate`, or the tables by row-wise Adagrad at it and the MLPs by Adam at
    `adam_rate`.
    """

    def __init__(
        self,
        model: PlainDLRM,
        learning_rate: float,
        batch_size: int,
        precision: str = "fp32",
        adam_rate: float | None = None,
    ) -> None:
        self.model, self.batch_size, self.precision = model, batch_size, precision
        self.rates = [learning_rate]
        self.optimizers: list[torch.optim.Optimizer]
        if adam_rate is None:
            self.optimizers = [torch.optim.SGD(model.parameters(), lr=learning_rate)]
            return
        self.rates.append(adam_rate)
        mlps = [*model.bot_l.parameters(), *model.top_l.parameters()]
        self.optimizers = [
            RowWiseAdagrad(model.rows.parameters(), learning_rate),
            torch.optim.Adam(mlps, lr=adam_rate, fused=True),
        ]

    def set_rates(self, share: float) -> None:
        """Take so much of each learning rate from now on."""
        for optimizer, rate in zip(self.optimizers, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = share * rate

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Train on one mini-batch, its loss divided by the full size as in our trainers."""
        dense, ids, labels = batch
        with autocast(self.model.mlp_device, self.precision):
            logits = self.model(dense, ids)
        labels = labels.to(logits.device, non_blocking=True)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), labels, reduction="sum"
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        (loss / self.batch_size).backward()
        for optimizer in self.optimizers:
            optimizer.step()


@torch.no_grad()
def evaluate(model: PlainDLRM, dataset: ClickDataset, batch_size: int) -> dict[str, float]:
    """AUC, log loss and accuracy."""

    def outputs() -> Iterator[Tensor]:
        for start in range(0, len(dataset), batch_size):
            part = slice(start, start + batch_size)
            yield model(dataset.dense[part], dataset.ids[part].t().contiguous())

    logits = torch.cat(list(outputs())).cpu().numpy()
    return click_metrics(logits, dataset.labels.numpy())


FLAGS = (
    cli.Flag("--processed-data-file", str, cli.REQUIRED, "a processed .npz"),
    cli.Flag("--arch-mlp-bot", model_flags.bottom_sizes, "auto-512-256-64-16", "bottom MLP"),
    cli.Flag("--arch-mlp-top", cli.layer_sizes, "512-256-1", "top MLP"),
    cli.Flag("--mini-batch-size", cli.positive_int, 1024, "inputs a mini-batch"),
    cli.Flag("--test-mini-batch-size", cli.positive_int, 16384, "in evaluation"),
    cli.Flag("--optimizer", ("sgd", "rwsadagrad"), "sgd", "of the tables; see above"),
    cli.Flag("--learning-rate", cli.positive_float, 0.3, "of the tables; sgd: of all weights"),
    cli.Flag("--dense-learning-rate", cli.positive_float, 0.002, "of the MLPs by Adam"),
    cli.Flag(
        "--lr-decay-share",
        cli.share,
        0.0,
        "share of the run, at its end, over which rates fall to 0",
    ),
    cli.Flag(
        "--num-batches", cli.nonnegative_int, 0, "stop after so many mini-batches; 0: an epoch"
    ),
    cli.Flag(
        "--test-freq", cli.nonnegative_int, 0, "mini-batches between evaluations; 0: at the end"
    ),
    cli.Flag("--placement", PLACEMENTS, "cpu", "where tables and MLPs lie"),
    cli.Flag("--num-workers", cli.nonnegative_int, 0, "processes of the DataLoader"),
    cli.Flag("--tuned", cli.boolean, False, "our settings of a CPU"),
    cli.Flag("--fbgemm", cli.boolean, False, "FBGEMM's fused tables"),
    cli.Flag("--runs-dir", str, "runs", "folder of all runs' logs"),
    cli.Flag("--run-name", str, None, "folder of the log there; not given: plain, date and time"),
    cli.SEED,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, "training", FLAGS)
    args = parser.parse_args(argv)
    model_flags.check_mlp_top(parser, args.arch_mlp_top)
    if args.fbgemm and importlib.util.find_spec("fbgemm_gpu") is None:
        parser.error("--fbgemm true: the package fbgemm-gpu is not installed")
    if args.fbgemm and (args.optimizer != "sgd" or args.lr_decay_share):
        parser.error("--fbgemm true keeps one rate of sgd: leave --optimizer and --lr-decay-share")
    return args


def train(args: argparse.Namespace, log: RunLog, clocks: Clocks) -> dict[str, Any]:
    """Train one epoch, evaluating on the way; the last evaluation's record."""
    data = load_processed(args.processed_data_file)
    features = plain_features(data.inputs.num_dense, len(data.table_sizes), args.arch_mlp_bot[-1])
    sizes = (bottom_sizes(args.arch_mlp_bot, features), args.arch_mlp_top)
    train, test, _ = (ClickDataset(part) for part in data.splits())
    fbgemm_rate = args.learning_rate if args.fbgemm else None
    tables = data.table_sizes.tolist()
    model = PlainDLRM(*sizes, tables, args.seed, args.placement, fbgemm_rate, args.optimizer)
    adam_rate = None if args.optimizer == "sgd" else args.dense_learning_rate
    size = args.mini_batch_size
    training = PlainTraining(model, args.learning_rate, size, adam_rate=adam_rate)
    rates = LearningRate(1.0, decay_share=args.lr_decay_share)
    pin = args.placement != "cpu"
    num_inputs = min(len(train), args.num_batches * size or len(train))
    record: dict[str, Any] = {"step": 0, "samples": 0, "dropped": 0, "dropped_share": 0.0}
    stream = iter(batches(train, size, args.seed, args.num_workers, pin))
    while record["samples"] < num_inputs:
        # Of steps up to an evaluation, for a clock waits for the device.
        with clocks.count("training"):
            for batch in stream:
                training.set_rates(rates.at(record["step"], 1 - record["samples"] / num_inputs))
                training.step(batch)
                record["step"] += 1
                record["samples"] += len(batch[2])
                is_due = args.test_freq and record["step"] % args.test_freq == 0
                if is_due or record["samples"] >= num_inputs:
                    break
        if record["samples"] < num_inputs:
            measured = evaluate(model, test, args.test_mini_batch_size)
            log.write("evaluation", **record, **measured, training_s=clocks.seconds()["training_s"])
    return record | evaluate(model, test, args.test_mini_batch_size)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train one epoch and evaluate; prints and returns the summary."""
    args = parse_args(argv)
    device = choose_device("cpu" if args.placement == "cpu" else "cuda")
    if args.tuned:
        tune_cpu()
    log = RunLog(args.runs_dir, args.run_name, "plain")
    clocks = Clocks(torch.cuda.synchronize if device.type == "cuda" else None)
    machine, commit = describe_machine(device), git_commit()
    log.write("start", method="plain", flags=vars(args), commit=commit, machine=machine)
    with log.until_the_end(lambda: 0):
        summary = train(args, log, clocks) | clocks.seconds()
        summary |= {"method": "plain", "peak_rss_bytes": peak_rss_bytes()}
        summary |= {"peak_device_bytes": peak_device_bytes()}
        summary["samples_per_s"] = summary["samples"] / summary["training_s"]
        log.write("evaluation", **{key: summary[key] for key in JUDGED})
        log.write("summary", **summary)
    print(
        f"plain: test AUC {summary['auc']:.4f}, log loss {summary['log_loss']:.4f}; training "
        f"{summary['training_s']:.1f} s ({summary['samples_per_s']:,.0f} samples/s)"
    )
    print(f"log: {log.path}")
    return summary


if __name__ == "__main__":
    cli.run_script(main)
