"""What a trainer does with the other ranks of its run; `Alone`, of one process, does it itself.

Every rank trains its part of each batch, by the same plan. Whatever is said, judged, chosen and
kept is rank 0's (`led`), with the others' help; what it decides all follow.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from slipstream.tools.device import random_state
from slipstream.tools.ranks import Ranks
from slipstream.tools.runlog import Clocks
from slipstream.tools.runtime import StopRequest
from slipstream.training import agreement
from slipstream.training.batching import EpochPlan
from slipstream.training.checkpoint import Checkpoints
from slipstream.training.dropping import DropRule
from slipstream.training.evaluation import Interrupted, logits_of
from slipstream.training.progress import Progress
from slipstream.training.saved import state_arrays
from slipstream.training.sets import Inputs, TrainingData
from slipstream.training.sharded import ShardedTable
from slipstream.training.step import TrainStep

UNEQUAL = (_DropoutNd, _BatchNorm)  # what they do depends on the rest of a batch, or is drawn
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Chosen = np.ndarray | slice


class Alone:
    """One process, which has no one to ask."""

    rank = 0

    def __init__(self, step: TrainStep, stop: StopRequest, checkpoints: Checkpoints | None) -> None:
        self._step, self._stop, self._checkpoints = step, stop, checkpoints

    @property
    def signal(self) -> int | None:
        """The signal that ends the run."""
        return self._stop.signal

    def before_step(self, number: int, is_audited: bool) -> None:
        """A step begins, the `number`th of the run, from 1."""

    def after_step(self) -> None:
        """The step has been given to the device."""

    def is_checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after `step` steps."""
        return self._checkpoints is not None and self._checkpoints.is_due(step)

    def check(self, plan: EpochPlan | None, order_check: list[int], step: int) -> None:
        """Compare what all ranks have of their own."""

    def led(self, act: Callable[[], None]) -> None:
        """Do what is rank 0's alone."""
        act()

    def choose(self, rule: DropRule, plan: EpochPlan, act: Callable[[], None]) -> None:
        """Have `act` replace inputs of the plan by the rule's choice."""
        act()

    def join(self, touched: Tensor) -> None:
        """Set a flag where any rank has, (n,) bool."""

    def joined(self, touched: Tensor) -> Tensor:
        """As `join`, of a copy, from within `led`."""
        return touched

    def logits(self, inputs: Inputs, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """As `logits_of`, from within `led`."""
        return logits_of(self._step.model, self._step.table, inputs, chosen)

    def spread_network(self) -> None:
        """Give all ranks rank 0's network, from within `led`."""

    def random_states(self) -> dict[str, np.ndarray]:
        """PyTorch's generators, from within `led`."""
        return random_state(self._step.table.device)

    def communication(self) -> dict[str, Any]:
        """For the log: ranks, and what this one's collectives took: nothing."""
        return {"processes": 1}


def team_of(
    ranks: Ranks | None,
    step: TrainStep,
    stop: StopRequest,
    checkpoints: Checkpoints | None,
    data: TrainingData,
    progress: Callable[[], Progress],
    rule: DropRule | None,
    clocks: Clocks,
) -> Alone | Team:
    """The ranks of a run, or its one process; see `Team`."""
    if ranks is None:
        return Alone(step, stop, checkpoints)
    return Team(ranks, step, stop, checkpoints, data, progress, rule, clocks)


def say_differences(network: nn.Module, ranks: Ranks | None) -> None:
    """Say how many ranks train, and what they do not do as one process would."""
    if ranks is None:
        return
    print(f"{ranks.size} processes, each trains its part of every mini-batch")
    layers = [type(part).__name__ for part in network.modules() if isinstance(part, UNEQUAL)]
    if layers:
        print(
            f"note: with {' and '.join(sorted(set(layers)))} the result differs from that of one "
            "process: each looks at its part of a mini-batch, or draws for it"
        )


class Team(Alone):
    """The ranks of a run, as one of them sees them.

    Args:
        ranks: of the run.
        step: whose table is a `ShardedTable`.
        stop, checkpoints: this rank's; only rank 0 writes checkpoints.
        data: of the run.
        progress: of the run so far.
        rule: the drop rule; None: all inputs are trained.
        clocks: of the run; while they count training, collectives are counted, too.
    """

    def __init__(
        self,
        ranks: Ranks,
        step: TrainStep,
        stop: StopRequest,
        checkpoints: Checkpoints | None,
        data: TrainingData,
        progress: Callable[[], Progress],
        rule: DropRule | None,
        clocks: Clocks,
    ) -> None:
        super().__init__(step, stop, checkpoints)
        assert isinstance(step.table, ShardedTable) and step.joined is not None
        self.rank, self._ranks = ranks.rank, ranks
        self._table, self._joined = step.table, step.joined
        self._sets = {"hot": data.hot, "cold": data.cold, "test": data.test, "val": data.val}
        self._progress, self._rule = progress, rule
        self._signal: int | None = None
        ranks.count_while(lambda: clocks.activity == "training")
        # A network's first weights may be drawn by what no seed decides.
        self._spread(state_arrays(step.model.network))
        ranks.handlers |= {
            "logits": self._answer_logits,
            "random": self._answer_random,
            "network": self._answer_network,
            "touched": self._answer_touched,
        }

    @property
    def signal(self) -> int | None:
        """The signal that ends the run, which all ranks have heard of."""
        return self._signal

    def before_step(self, number: int, is_audited: bool) -> None:
        """What all are to know after the step travels with it."""
        is_due = super().is_checkpoint_due(number)
        self._joined.flags = [*(float(self._stop.signal == one) for one in SIGNALS), float(is_due)]
        self._table.audits = is_audited

    def after_step(self) -> None:
        """Hear what the others said with the step."""
        told = self._joined.told
        heard = [number for number, times in zip(SIGNALS, told, strict=False) if times]
        self._signal = self._signal or (int(heard[0]) if heard else None)

    def is_checkpoint_due(self, step: int) -> bool:
        """As rank 0 said with the last step."""
        return bool(self._joined.told[-1])

    def check(self, plan: EpochPlan | None, order_check: list[int], step: int) -> None:
        """Raise `ValueError` on all ranks where they do not agree, see `agreement`."""
        network = self._step.model.network
        known = {
            "order of its batches (--seed)": agreement.plan_hash(plan, order_check, step),
            "network": sum(map(agreement.hash_of, network.parameters())) % (1 << 62),
            "copy of the hot rows": agreement.hash_of(self._table.copies),
        }
        agreement.compare(self._ranks, known, step)
        agreement.check_messages(self._ranks, *self._table.messages(), step)
        self._joined.check(step)
        # Running statistics: each rank has those of its parts.
        state = state_arrays(network)
        self._spread({name: state[name] for name in state if name.startswith("buffer.")})

    def communication(self) -> dict[str, Any]:
        """Seconds of training in which this rank waited for collectives, and bytes it received."""
        ranks = self._ranks
        by_kind = {
            kind: {"seconds": round(seconds, 6), "bytes": ranks.num_bytes[kind]}
            for kind, seconds in sorted(ranks.seconds.items())
        }
        return {
            "processes": ranks.size,
            "communication_s": round(sum(ranks.seconds.values()), 6),
            "received_bytes": sum(ranks.num_bytes.values()),
            "communication": by_kind,
        }

    def led(self, act: Callable[[], None]) -> None:
        """Do it on rank 0; what it has decided by then ends all ranks' runs."""
        progress = self._progress()

        def run() -> dict[str, Any]:
            try:
                act()
            except Interrupted:
                self._signal = self._stop.signal
            return {"signal": self._signal, "reached": progress.reached}

        said = self._ranks.led(run)
        self._signal, progress.reached = said["signal"], said["reached"]

    def choose(self, rule: DropRule, plan: EpochPlan, act: Callable[[], None]) -> None:
        """Rank 0 chooses, the others take over what is left of the epoch."""
        self.led(act)
        parts = {}
        if not self.rank:
            parts = {"plan": plan.state(), "rule": rule.state()}
        values, arrays = self._ranks.share(
            {name: values for name, (values, _) in parts.items()},
            {f"{name}.{key}": a for name, (_, found) in parts.items() for key, a in found.items()},
        )
        if not self.rank:
            return

        def part(name: str) -> tuple[Any, dict[str, np.ndarray]]:
            start = name + "."
            found = {k.removeprefix(start): a for k, a in arrays.items() if k.startswith(start)}
            return values[name], found

        plan.restore(*part("plan"))
        rule.restore(self._progress().epoch, *part("rule"), self._table.dim, self._table.device)

    def join(self, touched: Tensor) -> None:
        """Every rank has touched the rows of its parts of batches."""
        self._ranks.any_of(touched.view(torch.uint8))

    def joined(self, touched: Tensor) -> Tensor:
        """All ranks' flags, for a checkpoint."""
        found: Tensor = self._ranks.ask("touched")
        return found

    def _answer_touched(self) -> Tensor:
        assert self._rule is not None and self._rule.window.touched is not None
        touched = self._rule.window.touched.clone()
        self.join(touched)
        return touched

    def logits(self, inputs: Inputs, chosen: Chosen) -> tuple[Tensor, Tensor]:
        """Each rank has a part of the inputs go through the model."""
        name = next(name for name, one in self._sets.items() if one is inputs)
        if isinstance(chosen, slice):
            start, stop, _ = chosen.indices(len(inputs))
            logits = self._ranks.ask("logits", of=name, start=start, stop=stop)
        else:
            logits = self._ranks.ask("logits", {"numbers": chosen}, of=name)
        labels = torch.from_numpy(np.array(inputs.labels[chosen], np.float32))
        return logits, labels.to(logits.device)

    def _answer_logits(
        self, of: str, start: int = 0, stop: int = 0, numbers: np.ndarray | None = None
    ) -> Tensor:
        count = stop - start if numbers is None else len(numbers)
        mine = self._ranks.part(count)
        chosen: Chosen = slice(start + mine.start, start + mine.stop)
        if numbers is not None:
            chosen = numbers[mine]
        found, _ = logits_of(self._step.model, self._table, self._sets[of], chosen)
        return torch.cat(self._ranks.gather_rows(found, "evaluation", self._ranks.parts(count)))

    def random_states(self) -> dict[str, np.ndarray]:
        """Those of all ranks, by `<device>_<rank>`; of rank 0 by device alone."""
        found: dict[str, np.ndarray] = self._ranks.ask("random")
        return found

    def _answer_random(self) -> dict[str, np.ndarray]:
        found = {}
        for name, state in random_state(self._table.device).items():
            for rank, one in enumerate(self._ranks.gather(torch.from_numpy(state.copy()))):
                found[f"{name}_{rank}" if rank else name] = one.numpy()
        return found

    def spread_network(self) -> None:
        """After rank 0 has loaded another."""
        self._ranks.ask("network")

    def _answer_network(self) -> None:
        self._spread(state_arrays(self._step.model.network))

    def _spread(self, state: Mapping[str, Tensor]) -> None:
        if not state:
            return
        arrays = {name: value.detach().cpu().numpy() for name, value in state.items()}
        _, found = self._ranks.share(None, arrays)
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(torch.from_numpy(np.array(found[name])))
