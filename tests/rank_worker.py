"""Trains several small runs, one after the other, as one process or as ranks of one group.

    python rank_worker.py W cases.json

Each case: `name`, `script`, `words` (flags), and where given `dtype` and `plant`, a fault of one
rank. Rank 0 writes what came out, `<name>.npz` beside the cases: rows, sums, network, and what is
said of the run, or the error that all ranks raised.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import dlrm_s_pytorch
import fae_train
import slipstream_train
from slipstream.tools import processes
from slipstream.tools.ranks import Ranks
from slipstream.training import run
from slipstream.training.saved import state_arrays
from slipstream.training.sharded import ShardedTable

SCRIPTS = {"baseline": dlrm_s_pytorch, "fae": fae_train, "slipstream": slipstream_train}


def raise_error():
    raise ValueError("planted")


FAILURES = {
    "raises": raise_error,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
PLAIN = (Ranks.exchange, ShardedTable._sum_by_row, run.build_trainer)


def plant(fault, ranks, words):
    """Have one rank do something else than the others."""
    Ranks.exchange, ShardedTable._sum_by_row, run.build_trainer = PLAIN
    if fault is None or ranks is None:
        return words
    rank = ranks.rank
    if fault == "seed" and rank == 1:
        return [*words, "--seed", "5"]
    if fault == "lost row gradient" and rank == 1:
        count = 0

        def lossy(self, values, sent, received, kind):
            nonlocal count
            count += kind == "hot_rows"
            if kind == "hot_rows" and count == 3:
                values = values.clone()
                values[0, 0] = 0
            return PLAIN[0](self, values, sent, received, kind)

        Ranks.exchange = lossy
    if fault == "order" and rank == 2:

        def backwards(self, index, gradient):
            return PLAIN[1](self, index.flip(0), gradient.flip(0))

        ShardedTable._sum_by_row = backwards
    return words


def network_fault(fault, trainer, rank):
    if fault == "lost network gradient" and rank == 1:
        begin, steps = trainer.step.joined.begin, 0

        def lossy(loss_sum, num_inputs):
            nonlocal steps
            steps += 1
            sum_up = trainer.step.joined.ranks.start_sum

            def without(values, kind):
                if steps == 7:
                    values[: len(values) // 2] = 0
                return sum_up(values, kind)

            trainer.step.joined.ranks.start_sum = without
            finish = begin(loss_sum, num_inputs)
            trainer.step.joined.ranks.start_sum = sum_up
            return finish

        trainer.step.joined.begin = lossy
    if fault == "drifted copy" and rank == 1:

        def drift():
            trainer.table.copies[3, 0] += 1e-6

        trainer.after_step = drift
    if fault in FAILURES and rank == 1:

        def fail():
            if trainer.progress.step == 12:
                FAILURES[fault]()

        trainer.after_step = fail


def run_case(case, folder, ranks):
    torch.set_default_dtype(getattr(torch, case.get("dtype", "float32")))
    fault, found = case.get("plant"), {}
    words = plant(fault, ranks, case["words"])

    def caught(*arguments):
        trainer = found["trainer"] = PLAIN[2](*arguments)
        if ranks is not None:
            network_fault(fault, trainer, ranks.rank)
        return trainer

    run.build_trainer = caught
    arrays, said = {}, {}
    try:
        summary = SCRIPTS[case["script"]].main([*words, "--runs-dir", str(folder / "runs")])
    except ValueError as error:
        if fault in FAILURES:
            raise
        said["error"] = str(error)
    else:
        trainer = found["trainer"]

        def collect():
            arrays.update(trainer.table.read(slice(None)))
            names = ("auc", "loss", "dropped", "step", "reached", "processes")
            names += ("training_s", "communication_s", "communication")
            said.update({name: summary.get(name) for name in names})

        trainer.team.led(collect)
        arrays |= state_arrays(trainer.step.model.network)
        if ranks is not None:
            copies = ranks.gather(trainer.table.copies)
            said["copies_equal"] = all(torch.equal(copies[0], other) for other in copies)
            said["cold_rows_here"] = len(trainer.table._home)
    if ranks is None or ranks.is_first:
        arrays = {name: np.asarray(value.detach()) for name, value in arrays.items()}
        np.savez(folder / f"{case['name']}.npz", said=json.dumps(said), **arrays)


def main():
    number, cases = int(sys.argv[1]), Path(sys.argv[2])
    processes.start(number, __file__, None)
    torch.set_num_threads(1)
    pids = cases.parent / "pids"
    pids.mkdir(exist_ok=True)
    (pids / str(os.getpid())).write_text(os.environ.get("RANK", "0"))
    for case in json.loads(cases.read_text()):
        run_case(case, cases.parent, processes.current())


if __name__ == "__main__":
    processes.run_script(main)
