"""One training step on the device: lookup, forward, backward, update of MLPs and rows.

The table takes no part in autograd: its gradient is that of the rows a batch looked up. Weights and
rows are fp32; `precision` says in what the MLPs and the interaction compute:

    fp32   the same bits in every run on a CPU
    tf32   CUDA: matrix products with 10 bits of mantissa
    bf16   autocast; 1.1 (mini-batch 128) to 1.5 times fp32's speed on a CPU with AVX512-BF16

On CUDA a step of full size is captured once as a graph and replayed: dozens of kernels of a few
microseconds each would otherwise wait for Python. Where capture fails, for another size, an
optimizer that cannot be captured (Adagrad), or a network whose steps may differ (it draws on the
host, or leaves parameters out), the step runs as written.

Memory on the device beside the table, in bytes, for P MLP parameters and A activations an input:
16 P for weights, gradients and what Adam keeps (Adagrad 12 P, SGD 8 P), and about 8 A B for
activations and their gradients (half in bf16); a graph holds its own copy of the latter. Kaggle's
model: P = 476 k, A = 3.9 k: 7.6 MB, and 64 MB at B = 2048.
"""

from __future__ import annotations

import gc
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nn_functional
from torch import Tensor

from slipstream.model.networks import ClickModel, kept_buffers, restore_buffers
from slipstream.tools.plugins import PluginError
from slipstream.tools.ranks import Ranks
from slipstream.training.agreement import Joined
from slipstream.training.described import check_finite
from slipstream.training.embedding import EmbeddingTable, StagedBatch
from slipstream.training.loader import Table
from slipstream.training.optimizers import can_capture, is_adaptive
from slipstream.training.saved import saved_name, state_arrays

# What each optimizer keeps of a parameter, and which of it is never negative.
KEPT = {"SGD": set(), "Adagrad": {"step", "sum"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}
NOT_NEGATIVE = ("step", "sum", "exp_avg_sq")
NUM_FLAGS = 4  # that ranks tell each other with a step: three signals, and a checkpoint is due
NUM_WARMUP_STEPS = 3  # before a capture, as PyTorch's documentation asks


class TrainStep:
    """Steps a model and a table on one batch after another.

    Args:
        model: maps dense features (B, num_dense) and rows (B, C, dim) to logits (B,).
        optimizer: of the network's own parameters; the table updates its rows itself.
        batch_size: the full size, by which every batch's loss is divided, whatever its inputs'
            weights add up to: weights of mean 1 keep what a learning rate means.
        use_graph: replay full batches as a CUDA graph, where the device and optimizer allow it.
        rate_ratio: the network's learning rate over the rows'.
        label_weights: of the loss of an input without and with a click; None: 1.
        ranks: of each of which a batch is a part; None: this process trains it whole.
    """

    def __init__(
        self,
        model: ClickModel,
        table: Table,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        use_graph: bool = True,
        rate_ratio: float = 1.0,
        label_weights: Sequence[float] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.table, self.optimizer = model, table, optimizer
        self.batch_size = batch_size
        state_arrays(model.network)  # refuses names that would be one in a checkpoint, now
        self._parameters = {
            saved_name(name): value for name, value in model.network.named_parameters()
        }
        self._loss_sum = torch.zeros((), device=table.device)
        self.rate_ratio, self.label_weights = rate_ratio, label_weights
        # SGD's step follows from the gradient, so a short batch, whose loss is divided by the full
        # size, steps in proportion. Others step by the rate: theirs is scaled, and not the loss.
        self._scales_rate = is_adaptive(optimizer) or table.optimizer != "sgd"
        # A step of several ranks waits for the others in between.
        use_graph = use_graph and ranks is None
        self._use_graph = use_graph and table.device.type == "cuda" and can_capture(optimizer)
        self.joined: Joined | None = None
        if ranks is not None:
            trained = [one for one in self._parameters.values() if one.requires_grad]
            self.joined = Joined(ranks, trained, NUM_FLAGS)
        self._graph: _StepGraph | None = None

    def __call__(
        self,
        dense: Tensor,
        staged: StagedBatch,
        labels: Tensor,
        weights: Tensor | None,
        learning_rate: float,
        num_inputs: int | None = None,
    ) -> None:
        """Train on a batch whose rows have been entered; all tensors are on the device.

        `num_inputs`: of the whole batch, where this is a rank's part of it.
        """
        if self._use_graph and len(labels) == self.batch_size:
            if self._graph is None:
                self._graph = self._capture(dense, staged, labels)
            if self._graph is not None:
                self._graph.replay(dense, staged.index, labels, weights, learning_rate)
                return
        self._run(dense, staged, labels, weights, learning_rate, num_inputs)

    @property
    def has_graph(self) -> bool:
        """Whether steps of full size are replayed as a CUDA graph."""
        return self._graph is not None

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Network, optimizer and loss for `restore`: plain JSON, and arrays by name."""
        arrays = {
            name: value.detach().cpu().numpy()
            for name, value in state_arrays(self.model.network).items()
        }
        for name, parameter in self._parameters.items():
            for kind, value in sorted(self.optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor):
                    arrays[f"optimizer.{kind}.{name}"] = value.detach().cpu().numpy()
                elif value is not None:
                    raise ValueError(f"the optimizer keeps {kind} of {name}, which is no tensor")
        kept = sorted(name for name in arrays if name.startswith("optimizer."))
        return {"loss_sum": self.peek_loss_sum(), "optimizer": kept}, arrays

    def restore(self, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was taken; weights and buffers were loaded with `load_network`."""
        self._loss_sum.fill_(float(values["loss_sum"]))
        self.restore_optimizer(values, arrays)

    def restore_optimizer(
        self, values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
    ) -> None:
        """The optimizer's part of `state`, also where this one has none before its first step.

        Raises `ValueError` where an array is missing or left over, or of another shape.
        """
        stored = {name for name in arrays if name.startswith("optimizer.")}
        # Version 1 did not list them, and knew optimizers alone that have their state at once.
        expected = set(values.get("optimizer", self.state()[0]["optimizer"]))
        parameters = self._parameters
        if stored != expected:
            name = min(stored ^ expected)
            raise ValueError(f"{name} is {'left over' if name in stored else 'missing'}")
        state: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(parameters)}
        for key in sorted(stored):
            _, kind, name = key.split(".", 2)
            if name not in parameters:
                raise ValueError(f"{key} is of no parameter here")
            check_finite(key, arrays[key], 0.0 if kind in NOT_NEGATIVE else -np.inf)
            value = torch.from_numpy(np.array(arrays[key], order="C"))  # fused steps need it so
            if tuple(value.shape) not in ((), tuple(parameters[name].shape)):
                raise ValueError(f"{key} has shape {tuple(value.shape)}")
            state.setdefault(numbers[name], {})[kind] = value
        self._check_optimizer(state)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _check_optimizer(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Raise `ValueError` unless each parameter has what this optimizer keeps, and a count.

        Counts are of the steps that used a parameter, which a network need not in each; and they
        go on where another run's weights are taken up, so they have no bound here.
        """
        kinds, shapes = KEPT[type(self.optimizer).__name__], list(self._parameters.values())
        if any(set(one) != kinds for one in state.values()):
            raise ValueError(f"step.optimizer: expected {sorted(kinds)} of each parameter")
        for number, one in state.items():
            for kind, value in one.items():
                if value.shape != (() if kind == "step" else shapes[number].shape):
                    raise ValueError(f"step.optimizer.{kind} has shape {tuple(value.shape)}")
        counts = {float(one["step"]) for one in state.values() if "step" in one}
        if any(count != int(count) for count in counts):
            raise ValueError(f"step.optimizer.step: {sorted(counts)}; expected whole numbers")

    def peek_loss_sum(self) -> float:
        """The sum of all inputs' losses since `take_loss_sum`; waits for the device."""
        return float(self._loss_sum)

    def take_loss_sum(self) -> float:
        """The sum of all inputs' losses since the last call; waits for the device."""
        loss_sum = float(self._loss_sum)
        self._loss_sum.zero_()
        return loss_sum

    def _run(
        self,
        dense: Tensor,
        staged: StagedBatch,
        labels: Tensor,
        weights: Tensor | None,
        learning_rate: float | Tensor,
        num_joined: int | None = None,
    ) -> None:
        rows = self.table.lookup(staged).requires_grad_()
        num_joined = len(labels) if num_joined is None else num_joined
        # Each input counts alike: with SGD and a mean, a last batch of 55 inputs would step as far
        # as one of 1024, which costs up to 0.05 of AUC.
        num_inputs = self.batch_size
        if self._scales_rate and num_joined < self.batch_size:
            learning_rate, num_inputs = learning_rate * num_joined / num_inputs, num_joined
        for group in self.optimizer.param_groups:
            group["lr"] = self._network_rate(learning_rate)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = self._loss_of(dense, rows, staged, labels, weights)
        if len(labels):  # a rank's part may be none
            extra = self.model.extra_loss()
            whole = loss_sum if extra is None else loss_sum + len(labels) * extra
            with self.model.running():
                (whole / num_inputs).backward()
        gradient = torch.zeros_like(rows) if rows.grad is None else rows.grad
        loss_sum = loss_sum.detach()
        if self.joined is None:
            self.optimizer.step()
            self.table.update(staged, gradient, learning_rate)
        else:
            finish = self.joined.begin(loss_sum, len(labels))
            self.table.update(staged, gradient, learning_rate)
            loss_sum = finish(num_joined)
            self.optimizer.step()
        self._loss_sum += loss_sum

    def _loss_of(
        self,
        dense: Tensor,
        rows: Tensor,
        staged: StagedBatch,
        labels: Tensor,
        weights: Tensor | None,
    ) -> Tensor:
        """The sum of the inputs' losses."""
        if not len(labels):
            return self._loss_sum.new_zeros(())
        logits = self.model(dense, rows, self.table.present(staged))
        if self.label_weights is not None:
            without, with_click = self.label_weights
            by_label = without + (with_click - without) * labels
            weights = by_label if weights is None else weights * by_label
        return nn_functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), weight=weights, reduction="sum"
        )

    def _network_rate(self, learning_rate: float | Tensor) -> float | Tensor:
        if isinstance(learning_rate, Tensor):
            return learning_rate if self.rate_ratio == 1 else learning_rate * self.rate_ratio
        if not self._scales_rate:
            return learning_rate * self.rate_ratio
        # As a graph has it, in fp32: Adam's arithmetic shows the difference.
        return float(np.float32(learning_rate) * np.float32(self.rate_ratio))

    def _optimizer_state(self) -> dict[tuple[Tensor, str], Tensor]:
        """The tensors that the network's optimizer keeps, by parameter and kind."""
        return {
            (parameter, kind): value
            for parameter, state in self.optimizer.state.items()
            for kind, value in state.items()
            if isinstance(value, Tensor)
        }

    @contextmanager
    def _unmoved(self, staged: StagedBatch) -> Iterator[None]:
        """Leave nothing of the body's steps at rate 0 behind, which move no weights.

        Not in the loss, running statistics, the optimizers' sums, nor the random numbers.
        """
        loss_sum, buffers = self._loss_sum.clone(), kept_buffers(self.model.network)
        known = {key: value.clone() for key, value in self._optimizer_state().items()}
        assert isinstance(self.table, EmbeddingTable)
        row_sums = self.table.row_sums(staged)
        on_cuda = self.table.device.type == "cuda"
        on_device = torch.cuda.get_rng_state(self.table.device) if on_cuda else None
        on_host = torch.get_rng_state()
        try:
            yield
        finally:
            self._loss_sum.copy_(loss_sum)
            restore_buffers(buffers)
            for key, value in self._optimizer_state().items():
                # What was made meanwhile is where the graph finds it: begun with zeros.
                value.copy_(known[key]) if key in known else value.zero_()
            self.table.set_row_sums(staged, row_sums)
            torch.set_rng_state(on_host)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self.table.device)

    def _capture(self, dense: Tensor, staged: StagedBatch, labels: Tensor) -> _StepGraph | None:
        stream = torch.cuda.current_stream()
        with self._unmoved(staged):
            try:
                return _StepGraph(self, dense, staged.index, labels)
            except (RuntimeError, PluginError) as error:
                torch.cuda.set_stream(stream)  # a capture that fails leaves its own one current
                torch.cuda.synchronize()
                # Another kind of network or optimizer, or a driver that cannot: slower, not wrong.
                warnings.warn(
                    f"no CUDA graph, steps run one kernel at a time: {error}", stacklevel=2
                )
                self._use_graph = False
                return None


class _StepGraph:
    """A step on fixed memory: inputs are copied into it, then the kernels are replayed."""

    def __init__(self, step: TrainStep, dense: Tensor, index: Tensor, labels: Tensor) -> None:
        self.dense, self.index = dense.clone(), index.clone()
        self.labels, self.weights = labels.clone(), torch.ones_like(labels)
        self._is_weighted = False
        # Warming up and capturing must not train: at learning rate 0 nothing moves.
        self.learning_rate = torch.zeros((), device=dense.device)
        staged = StagedBatch(self.index)
        arguments = (self.dense, staged, self.labels, self.weights, self.learning_rate)
        side = torch.cuda.Stream(dense.device)
        side.wait_stream(torch.cuda.current_stream())
        buffers, drawn = list(step.model.network.buffers()), _host_random()
        with torch.cuda.stream(side):
            for _ in range(NUM_WARMUP_STEPS):
                step._run(*arguments)
        torch.cuda.current_stream().wait_stream(side)
        # A replay would go on with the buffer, and the branch, that were captured.
        now = step.model.network.buffers()
        if any(one is not other for one, other in zip(now, buffers, strict=True)):
            raise RuntimeError("the network assigns a buffer anew, in place of updating it")
        if _host_random() != drawn:
            raise RuntimeError("the network draws on the host, and may do otherwise each step")
        for name, parameter in step._parameters.items():
            if parameter.requires_grad and parameter.grad is None:
                raise RuntimeError(
                    f"a step does not use {name}, and another one may; of a layer that is never "
                    "used requires_grad_(False) says so"
                )
        # Gradients are then made within the capture, in the graph's own memory.
        step.optimizer.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()  # freeing an older graph while this one is captured would spoil it
        # The loader's threads go on copying meanwhile: only this thread's calls are captured.
        with torch.cuda.graph(self.graph, stream=side, capture_error_mode="thread_local"):
            step._run(*arguments)

    def replay(
        self,
        dense: Tensor,
        index: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        learning_rate: float,
    ) -> None:
        self.dense.copy_(dense, non_blocking=True)
        self.index.copy_(index, non_blocking=True)
        self.labels.copy_(labels, non_blocking=True)
        if weights is not None:
            self.weights.copy_(weights, non_blocking=True)
        elif self._is_weighted:
            self.weights.fill_(1.0)
        self._is_weighted = weights is not None
        self.learning_rate.fill_(learning_rate)
        self.graph.replay()


def _host_random() -> tuple[Any, ...]:
    """Where the host's random numbers stand that a network may draw."""
    numpys: Any = np.random.get_state()
    state = (torch.get_rng_state().numpy().tobytes(), random.getstate())
    return *state, numpys[1].tobytes(), *numpys[2:]
