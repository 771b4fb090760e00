"""The yardstick: DLRM as one would write it in plain PyTorch today, and no engine.

26 `nn.EmbeddingBag(sparse=True)`, `nn.Sequential` MLPs, `torch.optim.SGD`, a `Dataset` and a
`DataLoader` that index whole mini-batches. It starts from the same weights as our trainers, trains
the same inputs and is evaluated the same way, so both may be compared in speed and AUC. It is meant
to be good: inputs lie in memory ready to use, ids are turned once a batch, interaction takes the
faster of PyTorch's ways to pick entries.

    python -m bench.plain_dlrm --processed-data-file input/synthetic/train_processed.npz

With CUDA, `--placement hybrid` (tables and their update on the CPU, MLPs on the GPU, what users do
when the tables are too large) or `gpu` (all there). `--fbgemm true` takes FBGEMM's fused tables
instead of EmbeddingBags, where that package is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
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
from slipstream.tools.device import choose_device  # noqa: E402
from slipstream.tools.metrics import click_metrics  # noqa: E402
from slipstream.training.embedding import initial_rows  # noqa: E402

PLACEMENTS = ("cpu", "hybrid", "gpu")


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
    ) -> None:
        super().__init__()
        self.mlp_device = torch.device("cpu" if placement == "cpu" else "cuda")
        self.table_device = torch.device("cuda" if placement == "gpu" else "cpu")
        num_vectors = len(table_sizes) + 1
        features = plain_features(arch_mlp_bot[0], len(table_sizes), arch_mlp_bot[-1])
        sizes = {"arch_mlp_bot": arch_mlp_bot, "arch_mlp_top": arch_mlp_top}
        start: Any = build_network(find_network("dlrm", sizes), features, seed)
        rows = initial_rows(table_sizes, arch_mlp_bot[-1], None, seed).split(table_sizes)
        tables = [table.to(self.table_device) for table in rows]  # parts of one array on a CPU
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


class PlainTraining:
    """A model and its optimizer, one `step` a mini-batch."""

    def __init__(
        self, model: PlainDLRM, learning_rate: float, batch_size: int, precision: str = "fp32"
    ) -> None:
        self.model, self.batch_size, self.precision = model, batch_size, precision
        self.optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)

    def step(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        """Train on one mini-batch, its loss divided by the full size as in our trainers."""
        dense, ids, labels = batch
        with autocast(self.model.mlp_device, self.precision):
            logits = self.model(dense, ids)
        labels = labels.to(logits.device, non_blocking=True)
        loss = nn.functional.binary_cross_entropy_with_logits(
            logits.float(), labels, reduction="sum"
        )
        self.optimizer.zero_grad()
        (loss / self.batch_size).backward()
        self.optimizer.step()


@torch.no_grad()
def evaluate(model: PlainDLRM, dataset: ClickDataset, batch_size: int) -> dict[str, float]:
    """AUC, log loss and accuracy."""

    def outputs() -> Iterator[Tensor]:
        for start in range(0, len(dataset), batch_size):
            part = slice(start, start + batch_size)
            yield model(dataset.dense[part], dataset.ids[part].t().contiguous())

    logits = torch.cat(list(outputs())).cpu().numpy()
    return click_metrics(logits, dataset.labels.numpy())


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--processed-data-file", required=True, help="a processed .npz")
    parser.add_argument(
        "--arch-mlp-bot", type=cli.layer_sizes, default="13-512-256-64-16", help="bottom MLP"
    )
    parser.add_argument("--arch-mlp-top", type=cli.layer_sizes, default="512-256-1", help="top MLP")
    parser.add_argument(
        "--mini-batch-size", type=cli.positive_int, default=1024, help="inputs a mini-batch"
    )
    parser.add_argument(
        "--test-mini-batch-size", type=cli.positive_int, default=16384, help="in evaluation"
    )
    parser.add_argument(
        "--learning-rate", type=cli.positive_float, default=0.3, help="of all weights"
    )
    parser.add_argument(
        "--placement", choices=PLACEMENTS, default="cpu", help="where tables and MLPs lie"
    )
    parser.add_argument(
        "--num-workers", type=cli.nonnegative_int, default=0, help="processes of the DataLoader"
    )
    parser.add_argument(
        "--fbgemm",
        type=cli.boolean,
        default="false",
        metavar="true|false",
        help="FBGEMM's fused tables",
    )
    cli.add_flag(parser, cli.SEED)
    args = parser.parse_args(argv)
    model_flags.check_mlp_top(parser, args.arch_mlp_top)
    if args.fbgemm and importlib.util.find_spec("fbgemm_gpu") is None:
        parser.error("--fbgemm true: the package fbgemm-gpu is not installed")
    return args


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train one epoch and evaluate; prints and returns the result."""
    args = parse_args(argv)
    choose_device("cpu" if args.placement == "cpu" else "cuda")
    log = load_processed(args.processed_data_file)
    features = plain_features(log.inputs.num_dense, len(log.table_sizes), args.arch_mlp_bot[-1])
    args.arch_mlp_bot = bottom_sizes(args.arch_mlp_bot, features)
    train, test, _ = (ClickDataset(part) for part in log.splits())
    model = PlainDLRM(
        args.arch_mlp_bot,
        args.arch_mlp_top,
        log.table_sizes.tolist(),
        args.seed,
        args.placement,
        args.learning_rate if args.fbgemm else None,
    )
    training = PlainTraining(model, args.learning_rate, args.mini_batch_size)
    pin = args.placement != "cpu"
    loader = batches(train, args.mini_batch_size, args.seed, args.num_workers, pin)
    start = time.perf_counter()
    for batch in loader:
        training.step(batch)
    if model.mlp_device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    result = {
        "training_s": seconds,
        "samples_per_s": len(train) / seconds,
        **evaluate(model, test, args.test_mini_batch_size),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    cli.run_script(main)
