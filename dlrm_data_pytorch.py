"""Click data as mini-batches, for a program of one's own: what the trainers read their data with.

    log = load_processed("input/kaggle/train_processed.npz")
    train, test, val = log.splits()
    dense, rows, labels = train.batch(slice(0, 1024))

A processed file (data_utils.py) holds category ids per table, a segregated folder
(input_segregation.py) hot and cold training inputs with ids turned into slots. Both are mapped, not
read, and a batch is one `np.take` per array: `slipstream/logs` and `slipstream/training/sets.py`.

A batch is these three tensors whatever the file holds; how much each of its inputs counts, in files
that say so, is `train.weights_of(slice(0, 1024))`, an array, and None in others.
"""

from slipstream.logs.inputs import ClickInputs
from slipstream.logs.processed import ClickLog, generated_log, load_processed
from slipstream.training.sets import PreparedData, TrainingData, baseline_data, load_segregated

__all__ = [
    "ClickInputs",
    "ClickLog",
    "PreparedData",
    "TrainingData",
    "baseline_data",
    "generated_log",
    "load_processed",
    "load_segregated",
]
