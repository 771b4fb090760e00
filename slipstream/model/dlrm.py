"""DLRM (arXiv 1906.00091): a bottom MLP over the dense features, the interaction of its output with
the sparse features' vectors (inner products of all pairs), and a top MLP to one logit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slipstream.model.features import Features
from slipstream.model.interaction import DotInteraction, interaction_pairs

HIDDEN_BOT = (512, 256, 64)  # the papers' network for Criteo Kaggle
TOP = (512, 256, 1)


def mlp(sizes: Sequence[int], generator: torch.Generator, relu_last: bool) -> nn.Sequential:
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
    """Dense features (B, num_dense) and vectors (B, F, dim) to logits (B,).

    Args:
        features: what there is to see.
        arch_mlp_bot: sizes from num_dense to dim; None: 512-256-64 between them.
        arch_mlp_top: sizes after the interaction, ending in 1; the input size is derived.
        arch_interaction_op: `dot` or `cat`.
        arch_interaction_itself: with `dot`, also each vector with itself.

    Raises `ValueError` for sizes that do not fit the features.
    """

    def __init__(
        self,
        features: Features,
        arch_mlp_bot: Sequence[int] | None = None,
        arch_mlp_top: Sequence[int] = TOP,
        arch_interaction_op: str = "dot",
        arch_interaction_itself: bool = False,
    ) -> None:
        super().__init__()
        bot = bottom_sizes(arch_mlp_bot, features)
        # Beside the weights that the layers draw and that are overwritten.
        generator = torch.Generator().manual_seed(torch.initial_seed())
        num_vectors, dim = len(features.names) + 1, features.dim
        self.interaction_op, self.itself = arch_interaction_op, arch_interaction_itself
        pairs, pair_of = interaction_pairs(num_vectors, arch_interaction_itself)
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("pair_of", pair_of, persistent=False)
        width = dim + len(pairs) if arch_interaction_op == "dot" else num_vectors * dim
        self.bot_l = mlp(bot, generator, relu_last=True)
        self.top_l = mlp([width, *arch_mlp_top], generator, relu_last=False)

    def interact_features(self, dense_vector: Tensor, vectors: Tensor) -> Tensor:
        """(B, dim) and (B, F, dim) to (B, width): the dense vector beside products or vectors."""
        # Under autocast the MLP's output is bf16; without `to` fp32 vectors would widen it again.
        vectors = vectors.to(dense_vector.dtype)
        vectors = torch.cat([dense_vector.unsqueeze(1), vectors], dim=1)  # (B, F + 1, dim)
        if self.interaction_op == "cat":
            return vectors.flatten(1)
        products = DotInteraction.apply(vectors, self.pairs, self.pair_of, self.itself)
        return torch.cat([dense_vector, products], dim=1)

    def forward(self, dense: Tensor, vectors: Tensor) -> Tensor:
        """Logits (B,) of a click."""
        return self.top_l(self.interact_features(self.bot_l(dense), vectors)).squeeze(1)


def bottom_sizes(given: Sequence[int] | None, features: Features) -> list[int]:
    """The bottom MLP's sizes; a first one of 0 stands for the data's dense features.

    Raises `ValueError` where what is given does not fit the features.
    """
    if given is None:
        return [features.num_dense, *HIDDEN_BOT, features.dim]
    sizes = [given[0] or features.num_dense, *given[1:]]
    if sizes[0] != features.num_dense:
        raise ValueError(
            f"--arch-mlp-bot starts with {sizes[0]}; the data have {features.num_dense} dense "
            "features: give auto as the first size, or leave the flag out"
        )
    if sizes[-1] != features.dim:
        raise ValueError(
            f"--arch-mlp-bot ends in {sizes[-1]}; expected {features.dim}, the value of "
            "--arch-sparse-feature-size"
        )
    return sizes
