"""A saved model as one ONNX graph: raw dense values and ids in, click probabilities out.

    dense        (B, D) float32, as a processed file stores them: the transforms are in the graph
    ids          (B, C) int64, of each id column's table; what is negative, or not in the table, is
                 absent, as an unseen value is
    probability  (B,) float32, of whole rows where the training rows were thinned

B is any number of inputs. The tables are in the graph, above `MOST_BYTES` in a file beside it. Its
metadata say how a raw log is read (`ABOUT`): with the model folder's `vocabulary.npz` that is all
that serving needs, and PyTorch is not; `bench/serve_onnx.py` is an example. It computes in fp32,
also where the network was trained in bf16.

    python -m slipstream.serving.export --load-model runs/model --save-onnx model.onnx
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from slipstream.logs.transforms import KINDS, TRANSFORMS, Transforms
from slipstream.logs.vocabulary import VOCABULARY
from slipstream.model.networks import NETWORKS
from slipstream.serving.model import CORRECTION, LOAD_MODEL, NETWORK, TrainedModel, load_model
from slipstream.tools import cli, processes
from slipstream.tools.optional import need
from slipstream.tools.pictures import check_picture, draw
from slipstream.tools.places import remove_ours
from slipstream.tools.runtime import check_free_disk, sync_file, sync_folder
from slipstream.training.sets import PreparedData
from slipstream.training.vocabulary_file import NO_SCORES

ABOUT, VERSION = "slipstream", 1  # the metadata's key, a JSON object, and what is in it
INPUTS, OUTPUT = ("dense", "ids"), "probability"
MOST_BYTES = 2_000_000_000  # of a graph in one file: protobuf reads no more than 2 GB
EXAMPLE_INPUTS = 3
FLAGS = (
    LOAD_MODEL,
    cli.Flag("--save-onnx", str, cli.REQUIRED, "the file to write", "FILE"),
    cli.Flag(
        "--plot-onnx-graph",
        str,
        None,
        "draw the exported graph, too: SVG or PDF by the file's end; needs Graphviz's dot",
        "FILE",
    ),
    CORRECTION,
    NETWORK,
)


class ServedModel(nn.Module):
    """What is exported: see the module. `corrects`: to probabilities of whole rows."""

    rows: Tensor
    offsets: Tensor
    sizes: Tensor
    kinds: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, model: TrainedModel, corrects: bool) -> None:
        super().__init__()
        self.network, self._model = model.model.network.eval(), model.model
        self._shift = model.shift if corrects else 0.0
        layout, tables = model.reader.layout, model.reader.vocabulary.tables
        self._has_absent = layout.has_absent
        sizes = [len(tables[table]) for table in layout.table_of_column]
        self.register_buffer("rows", model.rows)
        self.register_buffer("offsets", model.offsets)
        self.register_buffer("sizes", torch.tensor(sizes))
        self._set_transforms(model.reader.transforms)

    def _set_transforms(self, transforms: Transforms) -> None:
        kinds = [KINDS.index(column.kind) for column in transforms.columns]
        self._found = [KINDS[kind] for kind in sorted(set(kinds))]
        self.register_buffer("kinds", torch.tensor(kinds))
        for name in ("mean", "std"):
            values = [getattr(column, name) for column in transforms.columns]
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))

    def _transformed(self, dense: Tensor) -> Tensor:
        """As `Transforms.apply`."""
        found = dense
        for kind in self._found:
            if kind == "log":
                values = torch.log1p(dense.clamp(min=0))
            elif kind == "signed_log":
                values = torch.sign(dense) * torch.log1p(dense.abs())
            elif kind == "standardize":
                values = ((dense.double() - self.mean) / self.std).float()
            else:
                values = dense
            found = torch.where(self.kinds == KINDS.index(kind), values, found)
        return found

    def forward(self, dense: Tensor, ids: Tensor) -> Tensor:
        """Probabilities (B,)."""
        is_absent = (ids < 0) | (ids >= self.sizes)
        places = (ids + self.offsets).masked_fill(is_absent, 0)
        rows = embedding(places, self.rows).masked_fill(is_absent.unsqueeze(2), 0.0)
        present = ~is_absent if self._has_absent else None
        logits = self._model(self._transformed(dense), rows, present)
        return torch.sigmoid(logits + self._shift).float()


def export_model(
    model: TrainedModel, file: str | Path, corrects: bool = True, most_bytes: int = MOST_BYTES
) -> Path:
    """Write a model, loaded for the CPU in fp32, as an ONNX file; returns its path.

    Where it has more than `most_bytes`, they are in a file beside it, named anew each time; the two
    are moved together. `file` is the old graph or the new one, which was checked.
    Raises `ValueError` for a network that cannot be exported, and `OSError`.
    """
    need("--save-onnx", "onnx", "onnxscript")
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    about = _about(model, corrects)
    check_free_disk(file.parent, model.rows.nbytes, "the graph")
    program = _program(ServedModel(model, corrects), model)
    _replace(program.model, file, about, most_bytes)
    return file


def _about(model: TrainedModel, corrects: bool) -> dict[str, Any]:
    saved, reader = model.saved, model.reader
    return {
        "version": VERSION,
        "step": saved.step,
        "dense": list(reader.schema.dense_names),
        "ids": reader.column_names,
        "features": reader.layout.describe(),
        TRANSFORMS: reader.transforms.describe(),
        VOCABULARY: reader.vocabulary.checksum,
        "logit_shift": model.shift if corrects else 0.0,
        "network": saved.network["name"],
    }


def _program(served: ServedModel, model: TrainedModel) -> Any:
    """The exported graph; any failure, which is the network's, as a `ValueError`."""
    num_dense = len(model.reader.transforms.columns)
    shape = (EXAMPLE_INPUTS, model.reader.layout.num_columns)
    inputs = (torch.ones(EXAMPLE_INPUTS, num_dense), torch.zeros(shape, dtype=torch.long))
    batch = torch.export.Dim("batch")
    name = model.saved.network["name"]
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                served.eval(),
                inputs,
                dynamo=True,
                dynamic_shapes=({0: batch}, {0: batch}),
                input_names=list(INPUTS),
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:
        if os.environ.get(cli.TRACEBACK_VARIABLE):
            raise
        cause = error.__cause__ or error
        line = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise ValueError(f"--save-onnx: {name} cannot be exported: {line}") from error
    assert program is not None
    shapes = [value.shape for value in (*program.model.graph.inputs, *program.model.graph.outputs)]
    if any(shape is None or isinstance(shape[0], int) for shape in shapes):
        raise ValueError(
            f"--save-onnx: {name} fixes the number of inputs: in its forward, write x.shape[0] for "
            "len(x), and decide nothing by it"
        )
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch's exporter says of itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _replace(graph: Any, file: Path, about: dict[str, Any], most_bytes: int) -> None:
    """Write a graph into a folder beside `file`, check it, and put it in place."""
    import onnx
    import onnx_ir

    graph.metadata_props[ABOUT] = json.dumps(about)
    data = f"{file.name}.{os.urandom(6).hex()}.data"
    values = [value.const_value for value in graph.graph.initializers.values()]
    is_large = sum(value.nbytes for value in values if value is not None) > most_bytes
    data_name = re.compile(re.escape(file.name) + r"\.[0-9a-f]{12}\.data")
    own = re.compile(rf"{re.escape(file.name)}|{data_name.pattern}")
    partial = file.with_name(file.name + ".partial")
    remove_ours(partial, own)
    try:
        partial.mkdir()
        onnx_ir.save(graph, partial / file.name, external_data=data if is_large else None)
        onnx.checker.check_model(str(partial / file.name))
        # The data first: a graph in place has its own, whenever this is interrupted.
        for path in sorted(partial.iterdir(), key=lambda path: path.name == file.name):
            with open(path, "rb") as written:
                sync_file(written)
            os.replace(path, file.with_name(path.name))
        sync_folder(file.parent)
    finally:
        remove_ours(partial, own)
    for old in file.parent.iterdir():
        if data_name.fullmatch(old.name) and not (is_large and old.name == data):
            old.unlink()


def draw_graph(onnx_file: str | Path, file: str | Path) -> None:
    """Draw an exported graph: inputs, weights, operations; not the constants that these need.

    Raises as `slipstream.tools.pictures` does.
    """
    import onnx
    import pydot

    graph = onnx.load(str(onnx_file), load_external_data=False).graph
    picture = pydot.Dot("graph", graph_type="digraph")
    maker: dict[str, str] = {}

    def add(key: str, label: str, **style: Any) -> str:
        picture.add_node(pydot.Node(key, label=json.dumps(label), **style))
        return key

    weights = [value for value in graph.initializer if not value.name.startswith("val_")]
    for value in (*graph.input, *weights):
        shape = "ellipse" if value in graph.input else "note"
        maker[value.name] = add(f"value{len(maker)}", value.name, shape=shape)
    for number, node in enumerate(graph.node):
        key = add(f"node{number}", node.op_type, shape="box")
        for name in filter(maker.__contains__, node.input):
            picture.add_edge(pydot.Edge(maker[name], key))
        maker |= dict.fromkeys(node.output, key)
    for value in graph.output:
        picture.add_edge(pydot.Edge(maker[value.name], add(f"out{value.name}", value.name)))
    draw(picture.to_string(), file)


@contextmanager
def exported_after(args: argparse.Namespace, prepared: PreparedData) -> Iterator[None]:
    """Around a training script's run: what its --save-onnx asks for, checked first, written last.

    Raises `ValueError` for data without a vocabulary.
    """
    if not args.save_onnx:
        yield
        return
    if not prepared.manifest.get(VOCABULARY):
        raise ValueError(f"--save-onnx: these data keep no vocabulary: {NO_SCORES}")
    yield
    if not processes.is_first():
        return
    folder = args.load_model if args.inference_only else args.save_model
    network = None if args.model in NETWORKS else args.model
    write_onnx(folder, args.save_onnx, network, args.correct_sub_sampling)


def write_onnx(
    folder: str | Path, file: str | Path, network: str | None = None, corrects: bool = True
) -> None:
    """Export the model in a folder, and say so; as `load_model` and `export_model`."""
    model = load_model(folder, network=network, device="cpu", precision="fp32")
    export_model(model, file, corrects)
    print(f"wrote {file}, the graph of {model.saved.folder}, step {model.saved.step}")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = cli.Parser(__doc__)
    cli.add_flags(parser, "export", FLAGS)
    args = parser.parse_args(argv)
    try:
        need("--save-onnx", "onnx", "onnxscript")
        if args.plot_onnx_graph:
            need("--plot-onnx-graph", "pydot")
            check_picture("--plot-onnx-graph", args.plot_onnx_graph)
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Export a saved model."""
    args = parse_args(argv)
    write_onnx(args.load_model, args.save_onnx, args.model, args.correct_sub_sampling)
    if args.plot_onnx_graph:
        draw_graph(args.save_onnx, args.plot_onnx_graph)
        print(f"wrote {args.plot_onnx_graph}")


if __name__ == "__main__":
    cli.run_script(main)
