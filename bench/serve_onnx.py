"""An exported model serves a raw log without PyTorch: rows to ids to probabilities, one a line.

    python -m bench.serve_onnx model.onnx runs/model/vocabulary.npz new.csv

`Served` is all that a service needs; the wheels are onnxruntime, numpy and polars.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from slipstream.logs.features import layout_of
from slipstream.logs.rawfile import RawFile, Tally
from slipstream.logs.scoring import Encoded, Reader
from slipstream.logs.transforms import transforms_of
from slipstream.logs.vocabulary import vocabulary_of
from slipstream.tools.cli import run_script
from slipstream.tools.npz import open_npz, unpack_manifest

BLOCK_BYTES = 1 << 23


class Served:
    """An exported model and its folder's `vocabulary.npz`; `ValueError`: they are not of one."""

    def __init__(self, model: str, vocabulary: str) -> None:
        self.session = onnxruntime.InferenceSession(model)
        about = json.loads(self.session.get_modelmeta().custom_metadata_map["slipstream"])
        arrays = open_npz(vocabulary, ("codes", "counts"))
        values = vocabulary_of(arrays, unpack_manifest(arrays), vocabulary)
        if values is None or values.checksum != about["vocabulary"]:
            raise ValueError(f"{vocabulary} is not the vocabulary that {model} was trained with")
        layout = layout_of(about, len(about["ids"]), len(values.tables), model)
        self.reader = Reader(values, layout, transforms_of(about, len(about["dense"]), model))

    def probabilities(self, rows: Encoded) -> np.ndarray:
        """(n,) float32 of rows that `reader` encoded, from a log or a frame."""
        dense, ids = rows.dense.astype(np.float32), rows.ids.astype(np.int64)
        return self.session.run(["probability"], {"dense": dense, "ids": ids})[0]


def main() -> None:
    """Print the probabilities of a raw log's lines."""
    if len(sys.argv) != 4:
        raise ValueError("usage: python -m bench.serve_onnx MODEL.onnx VOCABULARY.npz LOG")
    model, vocabulary, log = sys.argv[1:]
    served = Served(model, vocabulary)
    for block in served.reader.blocks(RawFile(Path(log)), Tally(0), BLOCK_BYTES):
        np.savetxt(sys.stdout, served.probabilities(block.encoded), "%.9g")


if __name__ == "__main__":
    run_script(main)
