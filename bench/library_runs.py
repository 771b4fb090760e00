"""One run of `bench.other_libraries`: an epoch of one method, in this process, as it is used."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import nn

from bench import plain_dlrm
from bench.baseline_run import predict, train_baseline
from bench.turns import Enough, send_error
from slipstream.logs.processed import ClickLog, load_processed
from slipstream.model import flags
from slipstream.model.dlrm import bottom_sizes
from slipstream.model.features import plain_features
from slipstream.model.networks import build_network, find_network
from slipstream.tools import cli
from slipstream.tools.runtime import git_commit, peak_rss_bytes
from slipstream.training.sets import baseline_data

DIM, BOT, TOP = 16, "auto-512-256-64-16", "512-256-1"
HIDDEN, NUM_CROSS = (512, 256), 3  # of the libraries' DCN: our top MLP, our cross network's depth
WARM_UP, EVERY = 10, 5  # steps that do not count; steps between reports of our engine


class Watch:
    """Times the steps of a run after `WARM_UP` of them, and ends it after `seconds` (0: never)."""

    def __init__(self, batch_size: int, num_inputs: int, seconds: float) -> None:
        self.warm_up = WARM_UP * batch_size
        self.batch_size, self.num_inputs, self.seconds = batch_size, num_inputs, seconds
        self.samples, self.first, self.last = 0, (0, 0.0), (0, 0.0)

    def reach(self, samples: int) -> None:
        """So many inputs are trained by now; raises `Enough` when it is time."""
        self.samples = min(samples, self.num_inputs)
        self.last = (self.samples, time.perf_counter())
        if not self.first[0]:
            if self.samples >= self.warm_up:
                self.first = self.last
        elif self.seconds and self.last[1] - self.first[1] >= self.seconds:
            raise Enough

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Take each of its steps for one of a mini-batch."""
        optimizer.register_step_post_hook(
            lambda *_: self.reach(self.samples + self.batch_size)  # the last one may be smaller
        )

    def rate(self) -> float:
        """Samples a second."""
        return (self.last[0] - self.first[0]) / (self.last[1] - self.first[1])


class Data:
    """A log as every method gets it: the newest `most` training inputs (0: all) and the test set.

    Raises `ValueError` where they are too few to time mini-batches of `batch_size`, where the test
    set has no AUC, and for what the libraries' models here do not take.
    """

    def __init__(self, log: ClickLog, batch_size: int, most: int) -> None:
        self.log, self.tables = log, log.table_sizes.tolist()
        train, self.test, _ = log.splits()
        self.train = train.rows(max(len(train) - most, 0) if most else 0, len(train))
        if not log.layout.is_plain or train.weights is not None:
            raise ValueError(
                "the log has weights, or features of several columns, which the libraries' models "
                "here do not take: preprocess it without them"
            )
        if len(self.train) < 2 * WARM_UP * batch_size:
            raise ValueError(
                f"{len(self.train):,} training inputs are too few for {2 * WARM_UP} mini-batches "
                f"of {batch_size}: more --rows, or a smaller --mini-batch-size"
            )
        if len(np.unique(self.test.labels)) < 2:
            raise ValueError("the test set holds one kind of label alone, or none: take more rows")

    def names(self) -> tuple[list[str], list[str]]:
        """Of dense and categorical columns."""
        dense = [f"I{number}" for number in range(1, self.train.num_dense + 1)]
        return dense, [f"C{number}" for number in range(1, len(self.tables) + 1)]

    def columns(self, part: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Inputs as the libraries take them: an array a column, by name, and the labels."""
        dataset = plain_dlrm.ClickDataset(part)
        dense, ids = self.names()
        columns = dict(zip(dense, dataset.dense.numpy().T.copy(), strict=True))
        columns |= zip(ids, dataset.ids.numpy().T.copy(), strict=True)
        return columns, dataset.labels.numpy()


def auc_of(scores: Any, labels: np.ndarray) -> float:
    """The area under the ROC curve of scores (n,) or (n, 1)."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, np.asarray(scores).reshape(-1)))


def weights_of(model: nn.Module, table_sizes: list[int]) -> int:
    """How many weights a model has outside its tables."""
    sizes = set(table_sizes)
    tables = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    inside = sum(m.weight.numel() for m in tables if m.num_embeddings in sizes)
    return sum(weights.numel() for weights in model.parameters()) - inside


def run_deepctr(data: Data, job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """DeepCTR-Torch's DCN by `compile` and `fit`."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DCN

    dense, ids = data.names()
    columns = [
        SparseFeat(name, vocabulary_size=size, embedding_dim=DIM)
        for name, size in zip(ids, data.tables, strict=True)
    ]
    columns += [DenseFeat(name, 1) for name in dense]
    model = DCN(
        columns, columns, cross_num=NUM_CROSS, dnn_hidden_units=HIDDEN, seed=job["seed"]
    )  # on the CPU unless told otherwise
    model.compile("adam", "binary_crossentropy")
    watch.follow(model.optim)

    def train() -> float:
        inputs, labels = data.columns(data.train)
        model.fit(inputs, labels, batch_size=job["batch_size"], epochs=1, verbose=0)
        inputs, labels = data.columns(data.test)
        return auc_of(model.predict(inputs, batch_size=job["batch_size"]), labels)

    return finish(train, model, data)


def run_rechub(data: Data, job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """torch-rechub's DCN by its `DataGenerator` and `CTRTrainer`."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.ranking import DCN
    from torch_rechub.trainers import CTRTrainer
    from torch_rechub.utils.data import DataGenerator

    torch.manual_seed(job["seed"])
    dense, ids = data.names()
    features = [DenseFeature(name) for name in dense]
    features += [
        SparseFeature(name, vocab_size=size, embed_dim=DIM)
        for name, size in zip(ids, data.tables, strict=True)
    ]
    model = DCN(features, n_cross_layers=NUM_CROSS, mlp_params={"dims": list(HIDDEN)})

    def train() -> float:
        generator, test = DataGenerator(*data.columns(data.train)), data.columns(data.test)
        loaders = generator.generate_dataloader(*test, *test, batch_size=job["batch_size"])
        with tempfile.TemporaryDirectory() as folder:
            trainer = CTRTrainer(model, n_epoch=1, device="cpu", model_path=folder)
            watch.follow(trainer.optimizer)
            trainer.fit(loaders[0])
        return float(trainer.evaluate(trainer.model, loaders[2]))

    return finish(train, model, data)


def sizes_for(data: Data) -> tuple[Any, dict[str, Any]]:
    """What a network of ours sees, and its MLPs."""
    features = plain_features(data.train.num_dense, len(data.tables), DIM)
    bottom = bottom_sizes(flags.bottom_sizes(BOT), features)
    return features, {"arch_mlp_bot": bottom, "arch_mlp_top": cli.layer_sizes(TOP)}


def run_plain(data: Data, job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """`bench.plain_dlrm` by its own defaults: SGD, fp32."""
    args = plain_dlrm.parse_args(["--processed-data-file", "-"])
    _, sizes = sizes_for(data)
    model = plain_dlrm.PlainDLRM(**sizes, table_sizes=data.tables, seed=job["seed"])
    training = plain_dlrm.PlainTraining(model, args.learning_rate, job["batch_size"])
    watch.follow(training.optimizers[-1])

    def train() -> float:
        dataset = plain_dlrm.ClickDataset(data.train)
        for batch in plain_dlrm.batches(dataset, job["batch_size"], job["seed"], 0, False):
            training.step(batch)
        test = plain_dlrm.ClickDataset(data.test)
        return plain_dlrm.evaluate(model, test, args.test_mini_batch_size)["auc"]

    return finish(train, model, data)


def run_ours(data: Data, job: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Our baseline by its own defaults; the method names network and precision."""
    _, name, precision = job["method"].split()
    words = (
        f"--model {name} --precision {precision} --mini-batch-size {job['batch_size']} "
        f"--arch-sparse-feature-size {DIM} --arch-mlp-bot {BOT} --arch-mlp-top {TOP} "
        f"--device cpu --num-threads {job['num_threads']} --seed {job['seed']} "
        f"--print-freq {EVERY}"
    )
    prepared = baseline_data(data.log)
    parts: Any = prepared.data
    prepared = replace(prepared, data=replace(parts, cold=data.train))

    def train() -> float:
        trainer, _ = train_baseline(prepared, words.split(), lambda p: watch.reach(p.samples))
        test = prepared.data.test
        return auc_of(predict(trainer, test), np.asarray(test.labels))

    features, sizes = sizes_for(data)
    return finish(train, build_network(find_network(name, sizes), features, job["seed"]), data)


def finish(train: Callable[[], float], model: nn.Module, data: Data) -> dict[str, Any]:
    """A run's test AUC, None where the watch ended it, and its weights outside tables."""
    auc = None
    with contextlib.suppress(Enough):
        auc = train()
    return {"auc": auc, "weights": weights_of(model, data.tables)}


RUNS = {"ours": run_ours, "plain": run_plain, "deepctr": run_deepctr, "rechub": run_rechub}
PACKAGES = {"deepctr": "deepctr-torch", "rechub": "torch-rechub"}


def version_of(method: str) -> str:
    """What a method is, and of which version."""
    package = PACKAGES.get(method.split()[0])
    if package:
        return f"{package} {importlib.metadata.version(package)}"
    if method == "plain":
        return f"torch {torch.__version__}"
    return f"commit {(git_commit() or 'unknown')[:7]}"


def measure(method: str, job: dict[str, Any]) -> dict[str, Any]:
    """Train a method's epoch, or `seconds` of it; rate, AUC and sizes."""
    if job["num_threads"]:
        torch.set_num_threads(job["num_threads"])
    data = Data(load_processed(job["processed"]), job["batch_size"], job["most"])
    watch = Watch(job["batch_size"], len(data.train), job["seconds"])
    with (
        contextlib.redirect_stdout(io.StringIO()),  # the libraries' own lines and bars
        contextlib.redirect_stderr(io.StringIO()),
    ):
        found = RUNS[method.split()[0]](data, {**job, "method": method}, watch)
    found |= {"samples_per_s": watch.rate(), "version": version_of(method)}
    return found | {"peak_rss_bytes": peak_rss_bytes()}


def work(connection: Connection, method: str, job: dict[str, Any]) -> None:
    """A method's process: sends what `measure` found, or its error."""
    try:
        connection.send(measure(method, job))
    except Exception as error:  # whatever it is, the conductor names the method and leaves it out
        send_error(connection, error)
