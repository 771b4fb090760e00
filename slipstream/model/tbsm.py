"""TBSM, the time-based sequence model of DLRM's authors (Ishkhanov et al., arXiv 2011.12902): the
papers' model for Taobao.

A *step* is what a user clicked once: a row of each sequence of the log (item and category). The
*candidate* is the same of the input itself: the features that share the sequences' tables. One
small DLRM, the same for all, turns a step into a vector z_t and the candidate into z; attention of
z over the z_t that are there gives a context; the top MLP sees the vectors

    z, the context, the bottom MLP's of the dense features, and all other features'

side by side, and the inner products of all pairs of them, each with itself, too.

Price for S sequences of L elements and z of dim values: (L + 1) passes of the step's MLP an input,
whose activations, about (L + 1) (S dim + hidden + dim) values, are kept for the backward pass.

Differences from the original, each for AUC on 84 k lines of Taobao (bench/README.md has them):

- its dense features and user are part of every step; here they are at the top, so that a step is of
  what was clicked alone;
- a step's vector is its rows' sum beside what its MLP makes of them, so that from the beginning
  what is alike has vectors that are alike;
- attention knows a step's age: a learned value for the newest, the one before it, and so on;
- the top MLP is given inner products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slipstream.model.dlrm import TOP, bottom_sizes, mlp
from slipstream.model.features import Features
from slipstream.model.interaction import DotInteraction, interaction_pairs

STEP = 32
BOT = (16,)
ATTENTIONS = ("dot", "mlp")


class TBSM(nn.Module):
    """Dense features (B, num_dense), vectors (B, F, dim) and sequences to logits (B,).

    Args:
        features: what there is to see; its sequences are equally long.
        arch_mlp_bot: sizes from num_dense to dim; None: 16 between them.
        arch_mlp_top: sizes of the top MLP, ending in 1.
        step_width: hidden values of the step's MLP.
        attention: `dot`: inner products z . z_t / sqrt(dim); `mlp`: an MLP of z, z_t, z * z_t.

    Raises `ValueError` for a log without sequences, or with one that shares its table with no
    feature, and for sizes that do not fit.
    """

    candidate: Tensor
    others: Tensor
    pairs: Tensor

    def __init__(
        self,
        features: Features,
        arch_mlp_bot: Sequence[int] | None = None,
        arch_mlp_top: Sequence[int] = TOP,
        step_width: int = STEP,
        attention: str = "dot",
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"got attention {attention!r}; expected one of {ATTENTIONS}")
        if step_width < 1:
            raise ValueError(f"got step_width {step_width}; expected at least 1")
        self.sequence_names = tuple(features.sequences)
        candidate = [_candidate_of(name, features) for name in self.sequence_names]
        if not candidate or len(set(features.sequences.values())) > 1:
            raise ValueError(
                "tbsm reads what came before, as sequences of one length: preprocess Taobao's log "
                "with --history 20, or give a log of your own columns with pool: sequence"
            )
        dim, num_steps = features.dim, len(candidate)
        others = [number for number in range(len(features.names)) if number not in candidate]
        self.register_buffer("candidate", torch.tensor(candidate), persistent=False)
        self.register_buffer("others", torch.tensor(others, dtype=torch.long), persistent=False)
        pairs, _ = interaction_pairs(num_steps, False)
        self.register_buffer("pairs", pairs, persistent=False)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        bot = bottom_sizes(arch_mlp_bot or [features.num_dense, *BOT, dim], features)
        self.bot_l = mlp(bot, generator, relu_last=True)
        self.step_l = mlp([num_steps * dim + len(pairs), step_width, dim], generator, False)
        self.of_age = nn.Parameter(torch.zeros(next(iter(features.sequences.values()))))
        self.attention_l = None
        if attention == "mlp":
            self.attention_l = mlp([3 * dim, step_width, 1], generator, relu_last=False)
        num_vectors = 3 + len(others)
        top_pairs, top_pair_of = interaction_pairs(num_vectors, True)
        self.register_buffer("top_pairs", top_pairs, persistent=False)
        self.register_buffer("top_pair_of", top_pair_of, persistent=False)
        width = num_vectors * dim + len(top_pairs)
        self.top_l = mlp([width, *arch_mlp_top], generator, relu_last=False)

    def step(self, rows: Tensor) -> Tensor:
        """One small DLRM: rows (N, S, dim) of a step to z (N, dim)."""
        products = torch.bmm(rows, rows.transpose(1, 2)).flatten(1).index_select(1, self.pairs)
        made = self.step_l(torch.cat([rows.flatten(1).to(products.dtype), products], dim=1))
        return made + rows.sum(1).to(made.dtype)

    def attend(self, z: Tensor, history: Tensor, mask: Tensor) -> Tensor:
        """The context (B, dim) of z (B, dim) over history (B, L, dim), as far as mask (B, L) goes.

        Zeros where nothing is there.
        """
        if self.attention_l is None:
            scores = (history * z.unsqueeze(1)).sum(2) * history.shape[2] ** -0.5
        else:
            repeated = z.unsqueeze(1).expand_as(history)
            both = torch.cat([repeated, history, repeated * history], dim=2)
            scores = self.attention_l(both).squeeze(2)
        # Steps are in order, the newest last, with nothing behind it.
        age = mask.flip(1).cumsum(1).flip(1) - 1
        scores = scores + self.of_age[age.clamp(min=0)]
        # Of a finite number, not of -inf: a softmax over none would be NaN.
        scores = scores.masked_fill(~mask, -1e9)
        share = torch.softmax(scores, dim=1) * mask
        return (share.unsqueeze(2).to(history.dtype) * history).sum(1)

    def forward(
        self, dense: Tensor, vectors: Tensor, sequences: Mapping[str, tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Logits (B,) of a click."""
        parts = [sequences[name] for name in self.sequence_names]
        rows = torch.stack([part for part, _ in parts], dim=2)  # (B, L, S, dim)
        mask = torch.stack([present for _, present in parts]).all(0)  # (B, L): all of a step's rows
        num_inputs, length, num_steps, dim = rows.shape
        z = self.step(vectors.index_select(1, self.candidate))
        history = self.step(rows.reshape(num_inputs * length, num_steps, dim))
        context = self.attend(z, history.view(num_inputs, length, dim), mask)
        others = vectors.index_select(1, self.others).to(z.dtype)
        alone = [z, context, self.bot_l(dense).to(z.dtype)]
        seen = torch.cat([torch.stack(alone, dim=1), others], dim=1)
        products = DotInteraction.apply(seen, self.top_pairs, self.top_pair_of, True)
        return self.top_l(torch.cat([seen.flatten(1), products], dim=1)).squeeze(1)


def _candidate_of(sequence: str, features: Features) -> int:
    """Which vector is the candidate of a sequence: the first that shares its table."""
    table = features.tables.get(sequence)
    for number, name in enumerate(features.names):
        if table is not None and features.tables.get(name) == table:
            return number
    raise ValueError(
        f"sequence {sequence} shares its table with no feature: tbsm holds the candidate against it"
    )
