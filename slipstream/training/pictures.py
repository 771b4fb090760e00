"""The network as a picture: what `torchviz` sees of a forward pass, drawn by Graphviz."""

from __future__ import annotations

import torch

from slipstream.logs.features import FeatureLayout
from slipstream.model.features import Features
from slipstream.model.networks import PROBE_INPUTS, ClickModel, NetworkSpec, build_network
from slipstream.tools.pictures import draw


def draw_network(
    spec: NetworkSpec, layout: FeatureLayout, features: Features, seed: int, file: str
) -> None:
    """Draw a network of its own, made for it, from rows and parameters to logits.

    Raises `ValueError` for one that cannot be run.
    """
    from torchviz import make_dot

    network = build_network(spec, features, seed)
    num = PROBE_INPUTS[0]
    shape = (num, layout.num_columns)
    rows = torch.zeros(*shape, features.dim, requires_grad=True)
    present = torch.ones(shape, dtype=torch.bool) if layout.has_absent else None
    with torch.random.fork_rng(devices=[]), spec.plugin.running():
        logits = ClickModel(network, layout)(torch.zeros(num, features.num_dense), rows, present)
    draw(make_dot(logits, {**dict(network.named_parameters()), "rows": rows}).source, file)
    print(f"wrote {file}")
