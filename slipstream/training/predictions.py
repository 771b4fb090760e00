"""The probabilities that a run's model gives the inputs held out, in a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slipstream.tools.metrics import probabilities
from slipstream.tools.runtime import replaced_file
from slipstream.training.evaluation import outputs_of
from slipstream.training.trainer import Trainer

PIECE = 1 << 16


def save_predictions(path: str | Path, trainer: Trainer) -> None:
    """Score test and validation as they were evaluated; the file is whole or not there.

    Raises `OSError` (full disk). Probabilities are float64, and read back as the same numbers.
    """
    data, size = trainer.data, trainer.judge.batch_size
    trainer.loader.settle()
    with replaced_file(path) as file:
        file.write("set,label,probability\n")
        for name, inputs in (("test", data.test), ("val", data.val)):
            logits = outputs_of(trainer.judge.logits_of, inputs, size)
            scores = probabilities(logits, data.held_out_shift)
            for start in range(0, len(inputs), PIECE):
                part = slice(start, start + PIECE)
                labels = np.asarray(inputs.labels[part]).astype(int).tolist()
                rows = zip(labels, scores[part].tolist(), strict=True)
                file.writelines(f"{name},{label},{score!r}\n" for label, score in rows)
    print(f"predictions: {path}")
