"""What a step cannot fall below: the matrix products of the MLPs alone, for `bench.throughput`."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from bench.turns import repeat_for, send_error, synchronize
from slipstream.tools import cli
from slipstream.tools.device import choose_device, tune_process

# In a row, so that launching them is not what is measured.
NUM_PRODUCTS = {"cpu": 5, "cuda": 100}


def floor_ms(
    bot: list[int],
    top: list[int],
    batch_size: int,
    device: torch.device,
    bf16: bool,
    seconds_each: float = 0.1,
):
    """Milliseconds of the MLPs' matrix products alone, and the rate (GFLOP/s) of a square one.

    For each layer the product forward, to its input's gradient (not the first) and to its weight's,
    timed alone for `seconds_each`, several in a row, and summed: about what a step takes if all
    else is free. The interaction's small products are not in it. On CUDA they are replayed as a
    graph, as a step is.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    in_a_row = NUM_PRODUCTS[device.type]

    def seconds(left: torch.Tensor, right: torch.Tensor, num_products: int = in_a_row) -> float:
        def products() -> None:
            for _ in range(num_products):
                left @ right

        run = _as_graph(products) if device.type == "cuda" else products

        def run_and_wait() -> None:
            run()
            synchronize(device)

        return float(np.median(repeat_for(seconds_each, run_and_wait))) / num_products

    total, num_flops = 0.0, 0
    for sizes in (bot, top):
        for number, (num_in, num_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
            x = torch.randn(batch_size, num_in, device=device, dtype=dtype)
            gradient = torch.randn(batch_size, num_out, device=device, dtype=dtype)
            weight = torch.randn(num_out, num_in, device=device, dtype=dtype)
            products = [(x, weight.t()), (gradient.t(), x)]
            if number or sizes is top:
                products.append((gradient, weight))
            total += sum(seconds(*pair) for pair in products)
            num_flops += 2 * len(products) * batch_size * num_in * num_out
    square = torch.randn(2048, 2048, device=device, dtype=dtype)
    # One takes 0.1 s of a CPU.
    peak_s = seconds(square, square, 1 if device.type == "cpu" else in_a_row)
    peak = 2 * 2048**3 / peak_s / 1e9
    return {"products_ms": 1e3 * total, "flops": num_flops, "peak_gflops": peak}


def _as_graph(task: Callable[[], None]) -> Callable[[], None]:
    """The task's kernels without Python between them."""
    task()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        task()
    return graph.replay


def measure_floor(connection: Connection, job: dict[str, Any]) -> None:
    """`floor_ms` for fp32 and bf16, with our settings, in a process of its own."""
    try:
        connection.send(_floors(job))
    except Exception as error:
        send_error(connection, error)


def _floors(job: dict[str, Any]) -> dict[str, Any]:
    device = choose_device(job["device"])
    tune_process(device, job["num_threads"], "fp32", False)
    bot, top = cli.layer_sizes(job["bot"]), cli.layer_sizes(job["top"])
    num_vectors = job["num_features"] + 1
    top = [job["dim"] + num_vectors * (num_vectors - 1) // 2, *top]
    return {
        precision: floor_ms(
            bot, top, job["batch_size"], device, precision == "bf16", job["seconds_alone"] / 10
        )
        for precision in ("fp32", "bf16")
    }
