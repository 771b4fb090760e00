"""What training with W processes costs, by formulas, from the distinct rows of a log's batches.

The scheme: every rank trains 1/W of each joined mini-batch. *Hot* rows: a copy on each rank; the
gradients of a row go to its owner, which steps it once, and the new rows are gathered by all.
*Cold* rows: each in the host memory of one rank, which lends it for a batch. Beside it two others:
`all-sharded` (each row on one rank, every lookup travels, as `all_to_all` of vectors does) and
`dense-replicated` (all rows on each rank, their gradient added up by one dense all-reduce).

Letters of the formulas: W ranks, f = (W - 1) / W; d values a row of s = 4 bytes; t = 4 bytes of
Adagrad's sum a row, or 0; b inputs of a rank's part; for a batch of one kind, hot or cold, u
distinct hot rows of a part and U of the joined batch, c distinct cold rows of a part, n lookups of
a part (b x columns, less absent elements); h the share of hot batches; P parameters of the network.
Numbers of cold rows travel in 8 bytes, those of hot ones in 4, with gradients and new rows.

What a mean step *receives* a rank, in bytes. Every collective is counted as what it must at least
bring, which NCCL's rings and gloo's do bring:

    network          2 s P f             all-reduce: reduce-scatter, then all-gather
    hot, by owners   u f (s d + 4)       gradients and row numbers, as owner of 1/W of the rows
                     + U f (s d + 4)     the new rows of the other owners
    hot, pairs       (W - 1) u (s d + 4) all ranks' gradients gathered by all (not used: compare)
    hot, dense       2 s H d f           all-reduce over all H hot rows (to compare; ours sends all
                                         where a part touches nearly all of them)
    cold             c f (8 + 2 s d)     numbers as owner, rows as borrower, gradients as owner
    all-sharded      n f (8 + 2 s d)     in place of hot and cold; nothing is sent once for several
    dense-replicated 2 s N d f           all-reduce over all N rows, in place of hot and cold

u, U, c are means over the kinds of batches, weighted by h and 1 - h; c is 0 in hot batches.

*Memory* a rank, of rows, their sums and what is staged (network, activations: the same in all):

    ours             H s d + H t / W + (N - H) (s d + t) / W + 2 min(b x columns, N - H) (s d + t)
    all-sharded      N (s d + t) / W
    dense-replicated N (s d + t) + N s d   (the dense gradient)

*Time*: a step is compute + communication, one after the other (nothing is hidden: with cold batches
fetched behind hot ones it is less). Compute is fixed + b x (a rate), the same in all schemes.
Communication is latency x collectives + bytes / bandwidth. Ranks r and r' of one machine of G GPUs
are joined by NVLink, machines by one NIC that their GPUs share:

    all-reduce, all-gather   the larger of bytes / nvlink and bytes / nic: a ring enters and leaves
                             each machine once
    all-to-all               the larger of bytes (G - 1) / (W - 1) / nvlink and
                             G bytes (W - G) / (W - 1) / nic: each GPU's own pieces pass the NIC

Host memory and PCIe, which cold rows pass, are taken to be no bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from slipstream.training.batching import epoch_order
from slipstream.training.memory import AREAS
from slipstream.training.rows import bytes_per_row
from slipstream.training.sets import Inputs, PreparedData

SCHEMES = ("ours", "all-sharded", "dense-replicated")
VALUE_BYTES = 4
NUMBER_BYTES, SLOT_BYTES = 8, 4  # of a cold row's number, and of a hot one's
CHUNK = 1 << 16  # inputs looked at together
RARE = 0.05  # of the inputs: a kind that decides nothing
MAX_PARTS = 4  # of a joined batch, looked at
# A step of FAE at Kaggle's network by default (bf16), mini-batch 2048 on an H100: 2048 over the
# median of `fae+adaptive+bf16` in bench/results/overlap_nvidia_h100_80gb_hbm3.csv.
H100_STEP_MS, H100_INPUTS = 0.589, 2048
H100_DIM, H100_PARAMETERS = 16, 475_985
# Of it what stays at any size: a hot one takes 0.567 ms, of 16384 inputs 1.692 (bench/README.md).
H100_FIXED_MS = 0.41
# A small collective of NCCL within a machine. An assumption: no two GPUs have been at hand.
LATENCY_US = 30.0
# Collectives of a step, each waited for. Those of rows begin with one of how many they are.
NETWORK_CALLS = 1
HOT_CALLS = 3  # counts, gradients to owners, new rows
COLD_CALLS = 4  # counts, numbers, rows, gradients; in a cold batch
SHARDED_CALLS = 4  # the same, in every batch
DENSE_CALLS = 1


@dataclass(frozen=True)
class Sizes:
    """What of the data and the network the formulas need.

    Attributes:
        num_rows, num_hot: N and H.
        num_columns: lookups of an input, absent ones counted.
        dim: d.
        num_parameters: P.
        row_bytes: of a row with its sums, s d + t.
    """

    num_rows: int
    num_hot: int
    num_columns: int
    dim: int
    num_parameters: int
    row_bytes: int


def sizes_of(prepared: PreparedData, dim: int, optimizer: str, num_parameters: int) -> Sizes:
    """The sizes of a segregated folder, for rows of `dim` trained by `optimizer`."""
    return Sizes(
        int(prepared.table_sizes.sum()),
        prepared.num_hot,
        prepared.layout.num_columns,
        dim,
        num_parameters,
        bytes_per_row(dim, optimizer),
    )


@dataclass(frozen=True)
class Kind:
    """Means over the looked-at batches of a kind: u, U, c, and lookups n of a part."""

    part_hot: float = 0.0
    joined_hot: float = 0.0
    part_cold: float = 0.0
    lookups: float = 0.0


@dataclass(frozen=True)
class Distinct:
    """Distinct rows of the batches of `processes` ranks with `part` inputs each.

    Attributes:
        hot_share: h, of the batches.
        hot, cold: batches of hot inputs, of cold ones; all 0 where there are none.
        is_whole: the log has as many inputs as a joined batch, of each kind that is not rare;
            False: batches of all there are of a kind were looked at, which is not what was asked.
    """

    part: int
    processes: int
    hot_share: float
    hot: Kind
    cold: Kind
    is_whole: bool = True

    def mean(self, name: str) -> float:
        """A number of `Kind`, in the mean step."""
        hot, cold = getattr(self.hot, name), getattr(self.cold, name)
        return float(self.hot_share * hot + (1 - self.hot_share) * cold)


class Sampler:
    """Looks at some of the joined batches of an epoch, as a trainer's first epoch has them.

    Args:
        prepared: a segregated folder.
        randomize, seed: of the order, the trainers' flags.
        num_batches: joined batches of each kind to look at, evenly spread over the epoch.

    Memory: 5 bytes a training input, and one a row.
    """

    def __init__(self, prepared: PreparedData, randomize: str, seed: int, num_batches: int) -> None:
        data = prepared.data
        self._sets: dict[bool, Inputs] = {True: data.hot, False: data.cold}
        window = min((one.window for one in self._sets.values() if one.window), default=0)
        self._orders = {
            hot: epoch_order(inputs.day_offsets, randomize, seed, 0, window)
            for hot, inputs in self._sets.items()
        }
        self._num_hot, self._num_batches = prepared.num_hot, num_batches
        self._seen = np.zeros(int(prepared.table_sizes.sum()), bool)
        self._known: dict[tuple[int, int], Distinct] = {}

    def measure(self, part: int, processes: int) -> Distinct:
        """Look at batches of `part * processes` inputs, or all of a kind where they are fewer."""
        if (part, processes) not in self._known:
            joined = part * processes
            sizes = {hot: len(order) for hot, order in self._orders.items()}
            counts = {hot: -(-size // joined) for hot, size in sizes.items()}
            found = {hot: self._kind(hot, joined, processes) for hot in sizes}
            share = counts[True] / max(sum(counts.values()), 1)
            much = RARE * sum(sizes.values())
            is_whole = all(size >= joined for size in sizes.values() if size > much)
            self._known[part, processes] = Distinct(
                part, processes, share, found[True], found[False], is_whole
            )
        return self._known[part, processes]

    def _kind(self, hot: bool, joined: int, processes: int) -> Kind:
        order = self._orders[hot]
        joined = min(joined, len(order))
        if not joined:
            return Kind()
        num_whole = len(order) // joined
        starts = np.unique(
            np.linspace(0, num_whole - 1, min(num_whole, self._num_batches)).astype(int)
        )
        ranks = np.unique(np.linspace(0, processes - 1, min(processes, MAX_PARTS)).astype(int))
        parts, wholes = [], []
        for start in (starts * joined).tolist():
            batch = order[start : start + joined]
            for rank in ranks.tolist():
                own = batch[joined * rank // processes : joined * (rank + 1) // processes]
                parts.append(self._count(hot, own))
            wholes.append(parts[-1] if processes == 1 else self._count(hot, batch))
        part_hot, part_cold, lookups = np.mean(parts, axis=0).tolist()
        return Kind(part_hot, float(np.mean([whole[0] for whole in wholes])), part_cold, lookups)

    def _count(self, hot: bool, inputs: np.ndarray) -> tuple[int, int, int]:
        """Distinct hot and cold rows of inputs, and their lookups."""
        lookups = 0
        for start in range(0, len(inputs), CHUNK):
            slots = self._sets[hot].slots_of(inputs[start : start + CHUNK]).numpy().reshape(-1)
            present = slots[slots >= 0]
            self._seen[present] = True
            lookups += len(present)
        hot_rows = np.count_nonzero(self._seen[: self._num_hot])
        cold_rows = np.count_nonzero(self._seen[self._num_hot :])
        self._seen[:] = False
        return hot_rows, cold_rows, lookups


def received_bytes(sizes: Sizes, found: Distinct) -> dict[str, float]:
    """Bytes a rank receives in a mean step, by part: the module's first table."""
    ranks, dim = found.processes, sizes.dim
    others = (ranks - 1) / ranks
    row = VALUE_BYTES * dim
    exchanged = NUMBER_BYTES + 2 * row
    return {
        "network": 2 * VALUE_BYTES * sizes.num_parameters * others,
        "hot_gradients": found.mean("part_hot") * others * (row + SLOT_BYTES),
        "hot_new_rows": found.mean("joined_hot") * others * (row + SLOT_BYTES),
        "hot_pairs": (ranks - 1) * found.mean("part_hot") * (row + SLOT_BYTES),
        "hot_dense": 2 * row * sizes.num_hot * others,
        "cold": found.mean("part_cold") * others * exchanged,
        "all_sharded": found.mean("lookups") * others * exchanged,
        "dense_replicated": 2 * row * sizes.num_rows * others,
    }


def memory_bytes(sizes: Sizes, part: int, processes: int) -> dict[str, float]:
    """Bytes a rank holds by scheme, the module's second table; of ours also the two memories."""
    num_cold, row = sizes.num_rows - sizes.num_hot, VALUE_BYTES * sizes.dim
    sums = sizes.row_bytes - row
    staged = AREAS * min(part * sizes.num_columns, num_cold) * sizes.row_bytes
    device = sizes.num_hot * (row + sums / processes) + staged
    host = num_cold * sizes.row_bytes / processes
    return {
        "ours": device + host,
        "ours_device": device,
        "ours_host": host,
        "all-sharded": sizes.num_rows * sizes.row_bytes / processes,
        "dense-replicated": sizes.num_rows * (sizes.row_bytes + row),
    }


@dataclass(frozen=True)
class Links:
    """What joins the GPUs.

    Attributes:
        nvlink: GB/s that a GPU receives from those of its machine.
        nic: GB/s that a machine receives from the others.
        gpus_per_machine: G.
        latency_us: of a collective.
    """

    nvlink: float
    nic: float
    gpus_per_machine: int
    latency_us: float = LATENCY_US

    def ring_ms(self, received: float, processes: int) -> float:
        """An all-reduce or all-gather by which each rank receives so many bytes."""
        slowest = self.nvlink
        if processes > self.gpus_per_machine:
            slowest = min(self.nvlink, self.nic)
        return received / slowest / 1e6

    def exchange_ms(self, received: float, processes: int) -> float:
        """An all-to-all by which each rank receives so many bytes, from all others alike."""
        inside = min(self.gpus_per_machine, processes)
        if processes == 1:
            return 0.0
        share = (inside - 1) / (processes - 1)
        through_nic = inside * received * (1 - share) / self.nic
        return max(received * share / self.nvlink, through_nic) / 1e6


@dataclass(frozen=True)
class Compute:
    """A step's time on one GPU: `fixed_ms`, and the rest of `step_ms` in proportion to its inputs.

    `inputs` are those of the step that took `step_ms`.
    """

    step_ms: float = H100_STEP_MS
    inputs: int = H100_INPUTS
    fixed_ms: float = H100_FIXED_MS

    def ms(self, inputs: float) -> float:
        """Of a step with so many inputs."""
        return self.fixed_ms + (self.step_ms - self.fixed_ms) * inputs / self.inputs


def communication_ms(
    parts: dict[str, float], found: Distinct, links: Links
) -> dict[str, dict[str, float]]:
    """By scheme, milliseconds of a mean step in `latency` and `bandwidth`, and `received` bytes."""
    ranks = found.processes
    ring = partial(links.ring_ms, processes=ranks)
    exchange = partial(links.exchange_ms, processes=ranks)
    network = parts["network"]
    by_scheme = {
        "ours": (
            NETWORK_CALLS + HOT_CALLS + (1 - found.hot_share) * COLD_CALLS,
            network + parts["hot_gradients"] + parts["hot_new_rows"] + parts["cold"],
            ring(network)
            + exchange(parts["hot_gradients"])
            + ring(parts["hot_new_rows"])
            + exchange(parts["cold"]),
        ),
        "all-sharded": (
            NETWORK_CALLS + SHARDED_CALLS,
            network + parts["all_sharded"],
            ring(network) + exchange(parts["all_sharded"]),
        ),
        "dense-replicated": (
            NETWORK_CALLS + DENSE_CALLS,
            network + parts["dense_replicated"],
            ring(network) + ring(parts["dense_replicated"]),
        ),
    }
    alone = ranks == 1
    return {
        scheme: {
            "latency": 0.0 if alone else calls * links.latency_us / 1e3,
            "bandwidth": bandwidth,
            "received": received,
        }
        for scheme, (calls, received, bandwidth) in by_scheme.items()
    }


def expected(
    sizes: Sizes, found: Distinct, compute: Compute, links: Links, one_gpu_inputs: int
) -> list[dict[str, Any]]:
    """A line a scheme: volume, memory, time of a step, speed-up and efficiency.

    The speed-up is that of samples a second over one GPU with mini-batches of `one_gpu_inputs`: as
    many as a rank's part where the batch grows with the ranks (weak), as the joined batch where it
    does not (strong). Efficiency is the speed-up over the ranks.
    """
    parts = received_bytes(sizes, found)
    memory = memory_bytes(sizes, found.part, found.processes)
    alone_per_s = one_gpu_inputs / compute.ms(one_gpu_inputs)
    compute_ms = compute.ms(found.part)
    lines = []
    for scheme, took in communication_ms(parts, found, links).items():
        waiting_ms = took["latency"] + took["bandwidth"]
        step_ms = compute_ms + waiting_ms
        speedup = found.part * found.processes / step_ms / alone_per_s
        lines.append(
            {"scheme": scheme, "processes": found.processes, "inputs_a_rank": found.part}
            | {"received_mb": took["received"] / 1e6, "memory_mb": memory[scheme] / 1e6}
            | {"compute_ms": compute_ms, "communication_ms": waiting_ms}
            | {"latency_ms": took["latency"], "step_ms": step_ms}
            | {"speedup": speedup, "efficiency": speedup / found.processes}
        )
    return lines
