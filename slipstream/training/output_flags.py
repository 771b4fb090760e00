"""The flags for what a run leaves beside its log and its model: a graph, a picture, curves."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from slipstream.tools.cli import Flag
from slipstream.tools.optional import need
from slipstream.tools.pictures import check_picture

OUTPUTS = (
    Flag(
        "--save-onnx",
        str,
        None,
        "write the trained model (of --save-model, or with --inference-only of --load-model) as an "
        "ONNX graph with its tables: raw dense values and ids to probabilities",
        "FILE",
    ),
    Flag(
        "--plot-compute-graph",
        str,
        None,
        "draw the network before training, SVG or PDF by the file's end; needs Graphviz's dot",
        "FILE",
    ),
    Flag(
        "--tensor-board-filename",
        str,
        None,
        "folder for TensorBoard: the curves of the run's log, and how far rows moved at each "
        "choice of inputs; a run that goes on there goes on in the same curves",
        "DIR",
    ),
)


@dataclass(frozen=True)
class OutputSettings:
    """The values of `OUTPUTS`."""

    save_onnx: str | None
    plot_compute_graph: str | None
    tensor_board_filename: str | None


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be written, before anything is done for it, by `parser.error`."""
    try:
        if args.save_onnx:
            need("--save-onnx", "onnx", "onnxscript")
            if not (args.save_model or args.inference_only):
                raise ValueError("--save-onnx writes the model of --save-model, which is not given")
        if args.plot_compute_graph:
            need("--plot-compute-graph", "torchviz")
            check_picture("--plot-compute-graph", args.plot_compute_graph)
        if args.tensor_board_filename:
            need("--tensor-board-filename", "tensorboard")
    except ValueError as error:
        parser.error(str(error))
