"""What a training run will need of memory, said and checked before anything of it is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from slipstream.training.dropping import CHOICE_BYTES
from slipstream.training.rows import bytes_per_row

AREAS = 2  # of the table, for training batches; a third one serves evaluation
# cuBLAS and cuBLASLt take 8 of 4 MB each (CUBLAS_WORKSPACE_CONFIG; Hopper's usual) for each stream:
# the main one, the graph's.
WORKSPACE_BYTES = 2 * 2 * (8 << 22)


@dataclass(frozen=True)
class Need:
    """Bytes that one thing takes, on the host and on the device, and the flag that changes them."""

    what: str
    flag: str
    host: int = 0
    device: int = 0


def training_needs(
    *,
    num_rows: int,
    dim: int,
    optimizer: str,
    dense_optimizer: str,
    num_resident: int,
    num_ranks: int,
    num_features: int,
    batch_size: int,
    test_batch_size: int,
    num_parameters: int,
    num_buffers: int,
    num_activations: int,
    num_snapshot_rows: int,
    num_choice_inputs: int,
    num_train: int,
    on_device: bool,
) -> list[Need]:
    """The needs of a run beside the interpreter and its libraries; inputs are mapped, not counted.

    `num_activations` are the values an input has in the network; `num_snapshot_rows` the hot rows
    where a drop rule copies them, twice; `num_choice_inputs` the inputs it chooses among.
    Formulas: `embedding`, `step`, `staleness` beside this module. On a CPU, `on_device` false, the
    host holds both parts. Of `num_ranks`, those of one.
    """
    row_bytes = bytes_per_row(dim, optimizer)
    batch_size, test_batch_size = (-(-n // num_ranks) for n in (batch_size, test_batch_size))
    num_host = -(-(num_rows - num_resident) // num_ranks)
    area = min(batch_size * num_features, num_host)
    areas = AREAS * area + min(test_batch_size * num_features, num_host)
    sum_places = 4 * (num_resident + areas)  # by which the gradients of equal rows are added up
    resident = num_resident * row_bytes if on_device or num_host else 0  # else one memory
    # Evaluation keeps no gradients, and only two layers at once.
    per_input = max(8 * batch_size, 2 * test_batch_size) * num_activations
    optimizer_bytes = {"sgd": 8, "adagrad": 12, "adam": 16}[dense_optimizer]
    network = optimizer_bytes * num_parameters + 4 * num_buffers
    return [
        Need(
            "embedding rows",
            "--max-ind-range or --arch-sparse-feature-size",
            (num_resident + num_host) * row_bytes,
        ),
        Need("resident rows", "--hot-emb-gpu-mem or --num-resident", device=resident),
        Need("places of rows", "--num-resident", host=16 * num_host, device=sum_places),
        Need(
            "staging areas",
            "--mini-batch-size and --test-mini-batch-size",
            # Page-locked twins, and one for the way home.
            host=(areas + area) * row_bytes if on_device else 0,
            device=areas * row_bytes,
        ),
        Need("the network", "--model or --arch-mlp-bot and --arch-mlp-top", device=network),
        Need("activations", "--mini-batch-size and --test-mini-batch-size", device=per_input),
        Need("matrix products", "--device", device=WORKSPACE_BYTES if on_device else 0),
        Need("snapshots", "--hot-emb-gpu-mem", device=num_snapshot_rows * (8 * dim + 5)),
        Need("choice of inputs", "--drop-policy", host=CHOICE_BYTES * num_choice_inputs),
        Need("order of the inputs", "--data-sub-sample-rate", host=8 * num_train),
    ]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.0f} MB"


def check_needs(
    needs: list[Need],
    free_host: float,
    free_device: int | None,
    num_processes: int = 1,
) -> str:
    """A line that says what is needed; `MemoryError` where that is not free.

    `free_device` None: the host holds what is meant for the device. Of `num_processes` on this
    machine these are the needs of one, and what it may have.
    """
    host = {
        need.what: need.host + (0 if free_device is not None else need.device) for need in needs
    }
    memories = [("host", host, free_host)]
    if free_device is not None:
        on_device = {need.what: need.device for need in needs}
        memories.append(("device", on_device, free_device))
    said = []
    of_each = f" for each of {num_processes} processes" if num_processes > 1 else ""
    for name, taken, free in memories:
        total, largest = sum(taken.values()), max(needs, key=lambda need: taken[need.what])
        if total > free:
            raise MemoryError(
                f"the run needs about {_size(total)} of {name} memory{of_each},"
                f" {_size(taken[largest.what])} of them for {largest.what};"
                f" {_size(free)} are free: choose another {largest.flag}"
            )
        said.append(
            f"{_size(total)} of {name} memory{of_each} ({_size(free)} are free),"
            f" {_size(taken[largest.what])} of them for {largest.what}"
        )
    return "memory: about " + "; ".join(said)
