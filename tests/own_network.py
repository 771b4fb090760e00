"""Networks of a reader's own, as the tests give them to --model."""

import numpy as np
import torch
from torch import nn


class Norms(nn.Module):
    """All that has a state, or draws: dropout, batch and layer norms, a buffer, a mask of -inf."""

    def __init__(self, features, width=12, dropout=0.3):
        super().__init__()
        inputs = features.num_dense + len(features.names) * features.dim
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, dense, vectors):
        if self.training:
            self.steps += 1
        hidden = self.body(torch.cat([dense, vectors.flatten(1)], dim=1))
        return self.head(self.norm(hidden)).squeeze(1)


class Odd(nn.Module):
    """Names that no file's member has, a lazy layer, a buffer assigned anew, and one expanded."""

    def __init__(self, features):
        super().__init__()
        self.parts = nn.ModuleDict({"city name/1": nn.LazyLinear(4), "städte": nn.Linear(4, 1)})
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("ones", torch.ones(1).expand(4).clone())
        self.seen = None

    def forward(self, dense, vectors):
        hidden = self.parts["city name/1"](torch.cat([dense, vectors.flatten(1)], dim=1))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * hidden.mean().detach()
            # What was kept while evaluating can be trained with.
            hidden = hidden if self.seen is None else hidden + 0 * self.seen
        self.seen = vectors.mean().detach() if not self.training else None
        return self.parts["städte"](hidden * self.ones - self.mean).squeeze(1)


class Unlike(nn.Module):
    """One of the things that cannot be trained or saved."""

    def __init__(self, features, what):
        super().__init__()
        self.what, self.head = what, nn.Linear(features.dim, 1)
        self.norm = nn.BatchNorm1d(features.dim, track_running_stats=what != "norm")
        if what == "half":
            self.register_buffer("short", torch.zeros(3, dtype=torch.bfloat16))
        if what == "expanded":
            self.register_buffer("ones", torch.ones(1).expand(4))
        if what == "exit":
            raise SystemExit("no licence")
        self.bag = nn.Embedding(3, 1, sparse=what == "sparse")

    def forward(self, dense, vectors):
        if self.what == "expanded":
            self.ones += 1
        bag = self.bag(torch.zeros(len(dense), dtype=torch.long)).squeeze(1)
        if self.what == "rows":
            return bag
        return self.head(self.norm(vectors.sum(1))).squeeze(1) + bag


class Doubles(nn.Module):
    """In float64 throughout."""

    def __init__(self, features):
        super().__init__()
        self.head = nn.Linear(features.num_dense + features.dim, 1).double()

    def forward(self, dense, vectors):
        assert dense.dtype == vectors.dtype == torch.float64
        return self.head(torch.cat([dense, vectors.sum(1)], dim=1)).squeeze(1)


class RowsAlone(nn.Module):
    """No parameter: a factorisation machine of rows."""

    def __init__(self, features):
        super().__init__()

    def forward(self, dense, vectors, half=0.5):
        return half * (vectors.sum(1).square() - vectors.square().sum(1)).sum(1)


class Attends(nn.Module):
    """Reads sequences, and lets absent elements in on purpose."""

    def __init__(self, features):
        super().__init__()
        self.names = list(features.sequences)
        size = features.num_dense + (len(features.names) + len(self.names)) * features.dim
        self.head = nn.Linear(size, 1)

    def forward(self, dense, vectors, *, sequences):
        pooled = [sequences[name][0].mean(1) for name in self.names]
        return self.head(torch.cat([dense, vectors.flatten(1), *pooled], dim=1)).squeeze(1)


class Wide(nn.Module):
    """One value too many an input."""

    def __init__(self, features):
        super().__init__()
        self.head = nn.Linear(features.num_dense, 1)

    def forward(self, dense, vectors):
        return self.head(dense)


class Broken(nn.Module):
    """Fails when it is called."""

    def __init__(self, features):
        super().__init__()
        self.head = nn.Linear(features.num_dense + 1, 1)

    def forward(self, dense, vectors):
        return self.head(dense).squeeze(1)


class Late(nn.Module):
    """Has parts that some steps do not use: at random, or before a step; and a loss of its own."""

    def __init__(self, features, since=40, drop=0.0, strength=0.0):
        super().__init__()
        self.since, self.drop, self.strength = since, drop, strength
        self.first = nn.Linear(features.num_dense + len(features.names) * features.dim, 8)
        self.later, self.dropped, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, dense, vectors):
        if self.training:
            self.steps += 1
        hidden = torch.relu(self.first(torch.cat([dense, vectors.flatten(1)], dim=1)))
        if self.steps >= self.since:
            hidden = hidden + torch.relu(self.later(hidden))
        if not (self.training and torch.rand(()) < self.drop):
            hidden = hidden + torch.relu(self.dropped(hidden))
        self.size = hidden.square().mean()
        return self.head(hidden).squeeze(1)

    def extra_loss(self):
        return self.strength * (self.size + self.head.weight.square().sum())


class FailsBackward(torch.autograd.Function):
    """Of a large batch."""

    @staticmethod
    def forward(context, values):
        return values.clone()

    @staticmethod
    def backward(context, gradient):
        return [gradient][len(gradient) > 10]


class Fails(nn.Module):
    """In one of the ways that a network may: `in training` or `in evaluation` of large batches."""

    def __init__(self, features, what, above=10):
        super().__init__()
        self.what, self.above, self.head = what, above, nn.Linear(features.dim, 1)
        self.extra = nn.MSELoss() if what == "extra loss" else None

    def forward(self, dense, vectors):
        logits = self.head(vectors.sum(1)).squeeze(1)
        if self.what == ("in training" if self.training else "in evaluation"):
            logits = logits + [0.0][len(dense) > self.above]
        if self.what == "backward" and self.training:
            return FailsBackward.apply(logits)
        return {
            "tuple": (logits, logits),
            "whole": (logits > 0).long(),
            "nan": logits / 0,
            "nan scores": logits if self.training else logits * torch.nan,
            "gradient": logits + torch.sqrt(vectors[:, 0, 0] * 0),
            "batch": (logits - logits.mean()) / (logits.square().mean().sqrt() + 1e-3),
            "softmax": torch.softmax(logits, dim=0),
            "numpy": logits + 1e-2 * float(np.random.rand()),
            "one": logits if len(dense) > 1 else logits.squeeze(),
        }.get(self.what, logits)

    def extra_loss(self):
        return 0.0 if self.what == "extra loss" else torch.zeros(())


def no_network():
    """Not a class."""
