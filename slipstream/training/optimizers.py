"""The network's optimizer, beside that of the rows, which `slipstream.training.embedding` steps."""

from __future__ import annotations

import torch
from torch import nn

DENSE_OPTIMIZERS = ("sgd", "adagrad", "adam")


def usual_optimizer(rows: str) -> str:
    """What goes with the rows' optimizer: sgd beside sgd, as in the papers, else adam."""
    return "sgd" if rows == "sgd" else "adam"


def make_optimizer(network: nn.Module, name: str) -> torch.optim.Optimizer:
    """A network's optimizer, whose rate the trainer sets; PyTorch's own, fused where that is so.

    One that CUDA can capture, but for Adagrad.
    """
    # PyTorch refuses an optimizer of nothing, but a network may be all rows.
    parameters = list(network.parameters())
    if not parameters:
        parameters, name = [nn.Parameter(torch.zeros(()))], "sgd"
    device = parameters[0].device.type
    if name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=0.0)
    fused = device in ("cpu", "cuda")
    if name == "adam":
        adam = torch.optim.Adam(parameters, lr=0.0, fused=fused, capturable=device == "cuda")
        # Its short batches run uncaptured, on purpose.
        adam._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]
        return adam
    return torch.optim.SGD(parameters, lr=0.0, fused=fused)


def can_capture(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of it can be a part of a CUDA graph."""
    return isinstance(optimizer, (torch.optim.SGD, torch.optim.Adam))


def is_adaptive(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the length of a step does not follow from that of the gradient."""
    return not isinstance(optimizer, torch.optim.SGD)
