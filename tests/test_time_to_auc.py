"""Time to an AUC, and the front of AUC against cost: by hand-made curves, and a short run."""

import argparse
import math
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import run_script

from bench import front, time_to_auc
from bench.throughput import make_log
from slipstream.logs.processed import load_processed


def records(aucs, samples=100, hot=1.0, overhead=0.0):
    """An evaluation every `samples` inputs, each second of training."""
    curve = [
        {"kind": "evaluation", "auc": auc, "samples": samples * n, "training_s": float(n)}
        | {"snapshot_s": overhead, "hot_share": hot}
        for n, auc in enumerate(aucs, start=1)
    ]
    return [*curve, {**curve[-1], "kind": "summary"}]


def test_the_first_evaluation_at_the_target_counts():
    run = records([0.6, 0.7, 0.69, 0.75], overhead=0.5)
    assert time_to_auc.reached(run, 0.7) == {"samples": 200, "training_s": 2.5}
    assert math.isnan(time_to_auc.reached(run, 0.76)["training_s"])


def test_the_table_and_the_shortest_schedule():
    """A run's final AUC is its share of an epoch here; the first method is there at its end."""
    asked = []

    def run(method, seed, share):
        asked.append(share)
        return records([share + 0.001 * seed])

    plan = SimpleNamespace(args=argparse.Namespace(shorten=True, target=None))
    plan.num_train, plan.mini_batch, plan.run = 500, lambda method: 10, run
    runs = {
        "plain": [records([0.5, 0.6]), records([0.62, 0.61])],
        "engine": [records([0.7, 0.8], samples=50), records([0.5, 0.8], samples=50)],
        "random": [records([0.5]), records([0.7])],
    }
    plain, engine, random = time_to_auc.tabulate(plan, runs, 0.605, range(1, 3))
    assert (plain["samples"], plain["training_s"], plain["share_of_first"]) == (500, 2.0, 1.0)
    assert engine["num_there"] == 2 and engine["training_s"] == 1.5
    assert engine["share_of_first"] == 0.75 and engine["final_auc"] == pytest.approx(0.8)
    # Means of 0.6015 and 0.6515 at 12 and 13 twentieths.
    assert engine["short_share"] == 0.65 and engine["short_auc"] == pytest.approx(0.6515)
    assert set(asked) < {n / 20 for n in range(1, 21)} and 0.6 in asked
    assert random["num_there"] == 1 and math.isnan(random["training_s"])
    assert "short_share" not in random


def test_rare_values_share_a_row(tmp_path):
    make_log(tmp_path / "log.npz", 3000, False, 1)
    time_to_auc.merge_rare(tmp_path / "log.npz", 4, tmp_path / "rare.npz")
    before, after = (load_processed(tmp_path / name) for name in ("log.npz", "rare.npz"))
    num_train = len(before.splits()[0])
    for column in (0, 2, 25):
        old, new = (log.inputs.categories[:, column] for log in (before, after))
        counts = np.bincount(old[:num_train], minlength=old.max() + 1)
        assert ((new == 0) == (counts[old] < 4)).all()
        assert after.table_sizes[column] == 1 + (counts >= 4).sum()
        kept = new > 0  # one to one
        pairs = {*zip(old[kept].tolist(), new[kept].tolist(), strict=True)}
        assert len(pairs) == len(set(old[kept].tolist())) == len(set(new[kept].tolist()))


def test_the_front_holds_dropping_against_training_less():
    def seeds(*runs):
        return {str(seed): run for seed, run in enumerate(runs)}

    runs = {
        "fae": seeds(records([0.80], hot=0.5), records([0.82], hot=0.5)),
        "fae-less50": seeds(
            records([0.70], samples=50, hot=0.5), records([0.72], samples=50, hot=0.5)
        ),
        # Half of the inputs, all of them cold.
        "slipstream-stale-d30": seeds(
            records([0.76], samples=50, hot=0.0), records([0.78], samples=50, hot=0.0)
        ),
        "slipstream-random-d30": seeds(
            records([0.75], samples=50, hot=0.0), records([0.72], samples=50, hot=0.0)
        ),
    }
    for cold_cost, cost, alone in ((1.0, 0.5, 0.71), (3.0, 0.75, 0.76)):
        lines = {line["kind"]: line for line in front.tabulate(runs, cold_cost)}
        line = lines["slipstream-stale-d30"]
        assert line["cost"] == pytest.approx(cost) and line["auc"] == pytest.approx(0.77)
        assert line["less_shorter"] == pytest.approx(0.77 - alone) and not line["tie"]
        assert lines["slipstream-random-d30"]["tie"] and lines["fae"]["cost"] == 1
        assert "tie" not in lines["fae-less50"]
    # Cheaper than the shortest: nothing to hold it against.
    cheap = {**runs, "slipstream-cold-d60": seeds(records([0.7], samples=10, hot=1.0))}
    lines = {line["kind"]: line for line in front.tabulate(cheap, 1.0)}
    assert math.isnan(lines["slipstream-cold-d60"]["less_shorter"])


def test_smoke(runs_here, capsys):
    assert run_script("bench/plain_dlrm.py", "--help")[0] == 0, "no other test starts it"
    methods = ["plain-tuned", "min-count", "random@128"]
    lines = time_to_auc.main(["--smoke", "true", "--methods", *methods])
    assert [line["method"] for line in lines] == methods
    assert all(line["final_auc"] > 0.65 for line in lines)
    assert lines[2]["mini_batch"] == 128 and "target: test AUC 0." in capsys.readouterr().out


@pytest.mark.parametrize("method", ["engine@x", "engine@0", "plain@64", "nothing"])
def test_unknown_methods_are_refused(method, capsys):
    with pytest.raises(SystemExit) as stopped:
        time_to_auc.main(["--methods", method])
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
