import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import click_model, dlrm
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, log_loss, roc_auc_score

from dlrm_data_pytorch import load_processed
from slipstream.tools import runlog
from slipstream.tools.metrics import click_metrics
from slipstream.tools.runlog import Clocks, RunLog
from slipstream.training.embedding import EmbeddingTable
from slipstream.training.evaluation import evaluate, logits_of
from slipstream.training.progress import Progress, drop_report
from slipstream.training.rows import initial_rows
from slipstream.training.schedule import LearningRate


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=50))
def test_auc_is_the_share_of_ordered_pairs(pairs):
    """The definition, ties counted half; and scikit-learn's functions."""
    logits = np.array([logit for logit, _ in pairs], np.float32)
    labels = np.array([label for _, label in pairs], np.int8)
    metrics = click_metrics(logits, labels)
    probability = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert metrics["log_loss"] == pytest.approx(log_loss(labels, probability, labels=[0, 1]))
    assert metrics["accuracy"] == accuracy_score(labels, probability > 0.5)
    positive, negative = logits[labels == 1], logits[labels == 0]
    if len(positive) and len(negative):
        ordered = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
        assert metrics["auc"] == pytest.approx(np.mean(ordered))
        assert metrics["auc"] == roc_auc_score(labels, logits)
    else:
        assert math.isnan(metrics["auc"])


def test_no_inputs_give_nan():
    assert all(math.isnan(v) for v in click_metrics(np.empty(0), np.empty(0)).values())


@pytest.mark.parametrize("batch_size", [1, 100, 5000])
@pytest.mark.parametrize("num_resident", [0, 200])
def test_evaluation_in_batches_equals_scikit_learn_at_once(processed, batch_size, num_resident):
    import torch

    log = load_processed(processed)
    test = log.splits()[1]
    model = dlrm([3, 16, 8], [16, 1], 5, seed=1)
    rows = initial_rows(log.table_sizes.tolist(), 8, None, 1)
    dense, slots, labels = test.batch(slice(0, len(test)))
    with torch.no_grad():
        logits = model(dense, rows[slots]).double()
    table = EmbeddingTable(rows, num_resident, 5000 * 5, torch.device("cpu"))
    metrics = evaluate(partial(logits_of, click_model(model, 5), table), test, batch_size)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-6)
    assert metrics["log_loss"] == pytest.approx(log_loss(labels, torch.sigmoid(logits)), abs=1e-6)


@pytest.mark.parametrize(
    ("warmup", "start", "decay", "expected"),
    [  # the rates of DLRM's first mini-batches: its counter is 1 at the first
        (4, 6, 4, [1 / 4, 2 / 4, 3 / 4, 3 / 4, 3 / 4, 1, 9 / 16, 4 / 16, 1 / 16, 1 / 16, 1 / 16]),
        (4, 4, 2, [1 / 4, 2 / 4, 3 / 4, 1, 1 / 4, 1 / 4, 1 / 4]),
        (3, 0, 0, [1 / 3, 2 / 3, 1, 1, 1]),
        (0, 1, 2, [1, 1 / 4, 1 / 4, 1 / 4]),
        (0, 0, 4, [9 / 16, 4 / 16, 1 / 16, 1 / 16]),
        (0, 3, 2, [1, 1, 1, 1 / 4, 1 / 4]),
        (1, 2, 1, [1, 1, 1]),
        (0, 0, 0, [1, 1, 1]),
    ],
)
def test_learning_rates_are_dlrms_step_for_step(warmup, start, decay, expected):
    rate = LearningRate(0.5, warmup, start, decay)
    rates = [rate.at(step) / 0.5 for step in range(len(expected))]
    assert rates == pytest.approx(expected)


def test_learning_rates_stay_above_dlrms_least():
    assert LearningRate(1e-3, 0, 0, 1000).at(5000) == 1e-7


def test_learning_rates_fall_with_the_inputs_left():
    falling = LearningRate(0.3, decay_share=0.5)
    shares = [1, 0.5, 0.25, 0.05]
    assert [falling.at(9, share) for share in shares] == pytest.approx([0.3, 0.3, 0.15, 0.03])


def test_clocks_count_each_second_once(monkeypatch):
    """By a clock of our own: on a busy machine any sleep is longer."""
    now = [5.0]
    monkeypatch.setattr(runlog, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    clocks = Clocks()
    now[0] += 1  # of no activity
    with clocks.count("training"):
        now[0] += 2
        with clocks.count("snapshot"):
            now[0] += 4
        now[0] += 8
    with clocks.count("paused"):
        now[0] += 16
    now[0] += 32
    seconds = {"training_s": 10, "paused_s": 16, "snapshot_s": 4, "program_s": 63}
    assert clocks.seconds() == seconds
    # A run that goes on counts on; the program's clock is that of both.
    going_on = Clocks()
    now[0] += 64
    going_on.add(seconds)
    assert going_on.seconds() == {**seconds, "program_s": 63 + 64}


def test_log_is_strict_json_and_never_shared(tmp_path):
    log = RunLog(tmp_path, "name", "fae")
    log.write("evaluation", auc=math.nan, nested={"t": [math.inf, 1.5]}, path=tmp_path)
    [line] = log.path.read_text().splitlines()  # flushed before it is closed
    record = json.loads(line, parse_constant=pytest.fail)
    assert record["auc"] is None and record["nested"] == {"t": [None, 1.5]}
    log.close()
    with pytest.raises(ValueError, match="choose another --run-name"):
        RunLog(tmp_path, "name", "fae")
    assert RunLog(tmp_path, None, "fae").path != RunLog(tmp_path, None, "fae").path


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (
            {"policy": "stale", "pool": "hot", "alpha": 0.8, "threshold": 0.00395247}
            | {"why": "a longer --snapshot-window touches more rows"},
            "dropped 5 of 100 hot inputs left to train or dropped before (3) (stale, alpha 0.8, "
            "T 0.00395); 5 chosen, target 30: a longer --snapshot-window touches",
        ),
        (
            {"policy": "stale", "pool": "hot", "alpha": 1.0, "threshold": [0.1, math.inf]},
            "(stale, alpha 1, T 0.1, inf)",
        ),
        (
            {"policy": "mine.py:score", "pool": "all", "target": 5},
            "dropped 5 inputs; 100 hot inputs left to train or dropped before (3) "
            "(mine.py:score)\n",
        ),
    ],
)
def test_a_choice_is_said_in_one_line(tmp_path, capsys, record, said):
    log, progress = RunLog(tmp_path, "name", "slipstream"), Progress(step=7, samples=224)
    common = {"epoch": 0, "alpha": None, "threshold": None, "dropped": 5, "achieved": 5}
    common |= {"hot_remaining": 100, "target": 30, "why": None, "dropped_before": 3}
    record = common | record
    drop_report(log, progress)(record)
    assert said in capsys.readouterr().out
    assert progress.drops == [{**record, "step": 7, "samples": 224}]
