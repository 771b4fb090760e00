"""DLRM-DCNv2: DLRM with a low-rank cross network in the place of the inner products (Wang et al.,
"DCN V2", WWW 2021, section 3 and equation (2) of the low-rank form; MLPerf's model since 2023).

    x_0 = the bottom MLP's output beside all vectors, (B, W), W = dim (F + 1)
    x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l,   V_l (rank, W), U_l (W, rank)

and a top MLP of the last x. MLPerf: dim 128, W = 3456, rank 512, 3 layers, bottom 512-256-128, top
1024-1024-512-256-1.

Price beside DLRM: 2 W rank + W parameters a layer, and twice as many multiplications an input;
kept for the backward pass are 2 W + rank values an input and layer. Kaggle's columns at dim 16: W =
432, rank 108, 94 k parameters a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slipstream.model.dlrm import TOP, bottom_sizes, mlp
from slipstream.model.features import Features

LAYERS, SHARE_OF_WIDTH = 3, 4  # rank: a quarter of the width


class LowRankCross(nn.Module):
    """The cross network: (B, width) -> (B, width)."""

    def __init__(self, width: int, rank: int, layers: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for _ in range(layers):
            self.down.append(nn.Linear(width, rank, bias=False))
            self.up.append(nn.Linear(rank, width))
        with torch.no_grad():
            for linear in (*self.down, *self.up):
                # Xavier's, as in MLPerf's reference; biases 0.
                deviation = (2 / (width + rank)) ** 0.5
                linear.weight.normal_(0.0, deviation, generator=generator)
                if linear.bias is not None:
                    linear.bias.zero_()

    def forward(self, first: Tensor) -> Tensor:
        """All layers."""
        x = first
        for down, up in zip(self.down, self.up, strict=True):
            x = first * up(down(x)) + x
        return x


class DCNv2(nn.Module):
    """Dense features (B, num_dense) and vectors (B, F, dim) to logits (B,).

    Args:
        features: what there is to see.
        arch_mlp_bot, arch_mlp_top: as of `DLRM_Net`.
        layers: of the cross network.
        rank: of its layers; 0: a quarter of its width.

    Raises `ValueError` for sizes that do not fit the features.
    """

    def __init__(
        self,
        features: Features,
        arch_mlp_bot: Sequence[int] | None = None,
        arch_mlp_top: Sequence[int] = TOP,
        layers: int = LAYERS,
        rank: int = 0,
    ) -> None:
        super().__init__()
        if layers < 1 or rank < 0:
            raise ValueError(
                f"got {layers} layers of rank {rank}; expected at least 1, and 0 or more"
            )
        generator = torch.Generator().manual_seed(torch.initial_seed())
        width = features.dim * (len(features.names) + 1)
        self.bot_l = mlp(bottom_sizes(arch_mlp_bot, features), generator, relu_last=True)
        rank = rank or max(1, width // SHARE_OF_WIDTH)
        self.cross = LowRankCross(width, rank, layers, generator)
        self.top_l = mlp([width, *arch_mlp_top], generator, relu_last=False)

    def forward(self, dense: Tensor, vectors: Tensor) -> Tensor:
        """Logits (B,) of a click."""
        dense_vector = self.bot_l(dense)
        first = torch.cat([dense_vector, vectors.flatten(1).to(dense_vector.dtype)], dim=1)
        return self.top_l(self.cross(first)).squeeze(1)
