"""Networks by name, or of a reader's own file, and the one way in which they are called.

A network is an `nn.Module` made by `Class(features, **options)`, whose `forward(dense, vectors)`
returns logits (B,); where it has a parameter named `sequences`, it gets those too; a method
`extra_loss`, where it has one, is asked after each pass in training (`ClickModel.extra_loss`):

    features    num_dense, names of the vectors, dim, sequences (name -> L); see `Features`
    dense       (B, num_dense) float32, transformed: of counts usually ln(x + 1)
    vectors     (B, F, dim) float32, the looked-up rows; multi-hot features are pooled before
    sequences   name -> (rows (B, L, dim), mask (B, L) bool)

Its parameters, buffers and random numbers are the trainer's to seed, step, switch between `train()`
and `eval()`, and save. A network in float64 is given float64.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from slipstream.logs.features import FeatureLayout
from slipstream.model.dcnv2 import DCNv2
from slipstream.model.dlrm import DLRM_Net
from slipstream.model.features import Features, Pooling, features_of
from slipstream.model.tbsm import TBSM
from slipstream.tools.device import seeded
from slipstream.tools.plugins import Plugin, find_plugin
from slipstream.tools.streams import torch_seed

NETWORKS: dict[str, type[nn.Module]] = {"dlrm": DLRM_Net, "dcnv2": DCNv2, "tbsm": TBSM}
PROBE_INPUTS = (2, 4)  # a network is tried on so many before anything large is allocated
# Of logits, relative: what an input's may change by as others of its batch change. Batches of one
# size are computed alike, also in bf16, so that of a network that keeps inputs apart does not.
MOST_MIXED = 1e-4


@dataclass(frozen=True)
class NetworkSpec:
    """Which network, and how it was asked for.

    Attributes:
        plugin: the class, its name, and the text of its file.
        options: keyword arguments of its constructor.
    """

    plugin: Plugin
    options: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        """For a checkpoint: all that is needed to ask for the same network again."""
        return {**self.plugin.describe(), "options": self.options}


def find_network(name: str, options: Mapping[str, Any]) -> NetworkSpec:
    """The network that `--model` names; `ValueError` where there is none."""
    plugin = find_plugin(name, NETWORKS, "--model")
    if not (inspect.isclass(plugin.found) and issubclass(plugin.found, nn.Module)):
        raise ValueError(f"--model {name} is no class of torch.nn.Module")
    if name in NETWORKS:
        _check_options(name, options)
    return NetworkSpec(plugin, dict(options))


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for an option that a network of ours has not, or of another type."""
    taken = inspect.signature(NETWORKS[name]).parameters
    for option, value in options.items():
        if option not in taken or option == "features":
            known = [n for n in taken if n != "features" and not n.startswith("arch_")]
            raise ValueError(f"--model-args: {name} has no {option}; it has {', '.join(known)}")
        usual = taken[option].default
        if isinstance(usual, (int, str)) and type(value) is not type(usual):
            raise ValueError(
                f"--model-args: {option} of {name}: got {value!r}; expected one like {usual!r}"
            )


def build_network(spec: NetworkSpec, features: Features, seed: int) -> nn.Module:
    """A new network in training mode; the same seed gives the same weights.

    Raises `ValueError` where its class does not take the features or the options, and for what
    `check_state` refuses.
    """
    with torch.random.fork_rng(devices=[]), spec.plugin.running():
        torch.manual_seed(torch_seed(seed, "network"))
        network = spec.plugin.found(features, **spec.options)
        check_state(network)
        return network.train()


def values_kept(
    model: ClickModel, features: Features, spec: NetworkSpec, seed: int, checks: bool = True
) -> int:
    """fp32 values an input that a training step keeps for the backward pass.

    Runs the network on the CPU on a few inputs, before anything large is allocated, and so finds
    one that cannot be used: raises `ValueError` with what is wrong with it, or its output.
    `checks`: also one whose scores depend on the batch; not of a model that was trained so.
    """
    network, kept = model.network, []
    with spec.plugin.running():
        buffers = kept_buffers(network)
    for num in PROBE_INPUTS:
        dense, rows, present = _probe(model, features, num)
        rows.requires_grad_()
        saved: dict[int, int] = {}

        def note(value: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = value.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return value

        with torch.random.fork_rng(devices=[]), spec.plugin.running():
            torch.manual_seed(torch_seed(seed, "lazy layers"))  # which draw their weights now
            with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
                logits = model(dense, rows, present)
                extra = model.extra_loss()
            _check_finite(logits, extra)
            (logits.sum() if extra is None else logits.sum() + extra).backward()
            _check_gradients(network, rows)
        kept.append(sum(saved.values()))
    network.zero_grad(set_to_none=True)
    with spec.plugin.running():
        if checks:
            _check_apart(model, features, seed)
        restore_buffers(buffers)
    return (kept[1] - kept[0]) // (PROBE_INPUTS[1] - PROBE_INPUTS[0]) // 4


def _probe(model: ClickModel, features: Features, num: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Dense features, rows and what is present of some inputs, no two alike."""
    generator = torch.Generator().manual_seed(0)
    shape = (num, model.layout.num_columns)
    dense = torch.rand(num, features.num_dense, generator=generator)
    rows = torch.empty(*shape, features.dim).normal_(0.0, 0.1, generator=generator)
    present = torch.ones(shape, dtype=torch.bool) if model.layout.has_absent else None
    return dense, rows, present


def _check_apart(model: ClickModel, features: Features, seed: int) -> None:
    """Raise `ValueError` where an input's score depends on the others of its batch."""
    dense, rows, present = _probe(model, features, 6)
    found = []
    for chosen in ([0, 1, 2, 3], [0, 1, 4, 5]):
        given = None if present is None else present[chosen]
        # One that draws, also in evaluation, draws alike.
        with seeded(seed), model.evaluating():
            found.append(model(dense[chosen], rows[chosen], given))
    first, other = found
    _check_finite(first)
    if not bool((first - other)[:2].abs().max() <= MOST_MIXED * first.abs().max()):
        raise ValueError(
            "an input's score depends on the other inputs of its batch, also in evaluation; "
            "normalise by nn.BatchNorm1d, which keeps running statistics, or by nn.LayerNorm"
        )


KeptBuffers = list[tuple[nn.Module, str, Tensor, Tensor]]


def kept_buffers(network: nn.Module) -> KeptBuffers:
    """A network's buffers, and copies of them, for `restore_buffers`."""
    return [
        (part, name, buffer, buffer.clone())
        for part in network.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]


def restore_buffers(kept: KeptBuffers) -> None:
    """Put buffers back, the tensors and their values, also where one was assigned anew."""
    for part, name, buffer, before in kept:
        setattr(part, name, buffer)
        buffer.copy_(before)


def _check_gradients(network: nn.Module, rows: Tensor) -> None:
    if rows.grad is None:
        raise ValueError("forward uses none of the vectors: there are no rows to train")
    for name, parameter in network.named_parameters():
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ValueError(f"{name} has a sparse gradient; build its layer with sparse=False")
    if not bool(rows.grad.isfinite().all()):
        raise ValueError("the gradient of forward's vectors is not finite, from the first step on")


def _check_finite(logits: Tensor, extra: Tensor | None = None) -> None:
    if not bool(logits.isfinite().all()):
        raise ValueError("forward returned logits that are not finite, before any training")
    if extra is not None and not bool(extra.isfinite()):
        raise ValueError(f"extra_loss returned {float(extra)}, before any training")


def _check_logits(logits: Any, num_inputs: int) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"forward returned {type(logits).__name__}; expected logits, a tensor")
    if not logits.is_floating_point():
        raise ValueError(f"forward returned {logits.dtype}; expected logits, floating point")
    if tuple(logits.shape) != (num_inputs,):
        raise ValueError(
            f"forward returned shape {tuple(logits.shape)} for {num_inputs} inputs; expected "
            f"({num_inputs},)"
        )


def check_state(network: nn.Module) -> None:
    """Raise `ValueError` for a state that cannot be saved, and for one that judges by batch."""
    for name, part in network.named_modules():
        if isinstance(part, _BatchNorm) and part.running_mean is None:
            raise ValueError(
                f"{name} keeps no running statistics, so an input's score would depend on its "
                "batch; leave track_running_stats on"
            )
    for name, value in network.state_dict().items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is no tensor; its extra state cannot be saved")
        if value.dtype == torch.bfloat16:
            raise ValueError(f"{name} is bfloat16, which cannot be saved; keep it in float32")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context in which a network computes at a precision."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


class ClickModel:
    """A network, and what turns the rows that a batch looked up into its input.

    Args:
        network: on the device, see the module.
        layout: of the id columns.
        precision: one of `PRECISIONS`.
        compiled: compile it with `torch.compile`.
        least_probability: outputs are cut to it, and to one minus it; 0: as they are.
        plugin: where the network is from, which its errors then name.

    Raises `ValueError` where the data have sequences and the network takes none.
    """

    def __init__(
        self,
        network: nn.Module,
        layout: FeatureLayout,
        precision: str = "fp32",
        compiled: bool = False,
        least_probability: float = 0.0,
        plugin: Plugin | None = None,
    ) -> None:
        self.network, self.layout, self.precision = network, layout, precision
        self._call: Callable[..., Tensor] = torch.compile(network) if compiled else network
        self._pool, self._plugin = Pooling(layout), plugin
        self._extra = getattr(type(network), "extra_loss", None)
        least = least_probability
        self._most = math.log((1 - least) / least) if least else math.inf
        self._takes_sequences = "sequences" in inspect.signature(network.forward).parameters
        self._norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
        parameters = [p for p in network.parameters() if p.is_floating_point()]
        self._dtype = parameters[0].dtype if parameters else torch.float32
        sequences = features_of(layout, 0, 0).sequences
        if sequences and not self._takes_sequences:
            raise ValueError(
                f"the log has sequences ({', '.join(sequences)}), and {type(network).__name__} has "
                "no parameter `sequences`: choose another --model"
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float64 if self._dtype == torch.float64 else torch.float32

    def __call__(self, dense: Tensor, rows: Tensor, present: Tensor | None = None) -> Tensor:
        """Logits (B,) of dense features and rows (B, C, dim), all on the device.

        `present` (B, C) bool says which elements are; None: all.
        """
        vectors, sequences = self._pool(rows, present)
        if self._dtype == torch.float64:
            dense, vectors = dense.double(), vectors.double()
            sequences = {name: (part.double(), mask) for name, (part, mask) in sequences.items()}
        more = {"sequences": sequences} if self._takes_sequences else {}
        num_inputs = dense.shape[0]
        with autocast(rows.device, self.precision), self._one_input(num_inputs), self.running():
            logits = self._call(dense, vectors, **more)
            _check_logits(logits, num_inputs)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        return logits if math.isinf(self._most) else logits.clamp(-self._most, self._most)

    def extra_loss(self) -> Tensor | None:
        """What the network's own method adds to the mean loss of the last pass, (); None: nothing.

        Of a part of a batch it counts as much as the part's inputs do, whatever their weights.
        """
        if self._extra is None:
            return None
        with self.running():
            extra = self._extra(self.network)
            if not isinstance(extra, Tensor) or extra.shape or not extra.is_floating_point():
                what = tuple(extra.shape) if isinstance(extra, Tensor) else extra
                raise ValueError(f"extra_loss returned {what!r}; expected a tensor of one number")
        return extra

    def running(self) -> AbstractContextManager[None]:
        """Around what runs the network: errors of one's own name its file."""
        return nullcontext() if self._plugin is None else self._plugin.running()

    @contextmanager
    def _one_input(self, num_inputs: int) -> Iterator[None]:
        """Batch normalisation of a single input, as of a last batch: by the running statistics.

        It has no variance of its own, so PyTorch refuses it.
        """
        norms = [norm for norm in self._norms if norm.training]
        # In this order: an exported graph is evaluated, and of any number of inputs.
        norms = norms if norms and num_inputs == 1 else []
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for norm in norms:
                norm.train()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without dropout, by running statistics, and without autograd, while the body runs."""
        was_training = self.network.training
        self.network.eval()
        try:
            # Not `inference_mode`: what a network keeps of it could not be trained with.
            with torch.no_grad():
                yield
        finally:
            self.network.train(was_training)
