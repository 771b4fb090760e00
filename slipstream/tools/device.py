"""The device that training runs on, and what this process sets for it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from slipstream.tools.cpu import tune_cpu

PRECISIONS = ("fp32", "tf32", "bf16")
BF16_CAPABILITY = 8  # of CUDA devices that compute in bf16 themselves: from Ampere on


def choose_device(name: str) -> torch.device:
    """The device for `--device auto|cpu|cuda`; `ValueError` when CUDA is asked for and absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda: this PyTorch finds no CUDA device; use --device cpu or auto"
        )
    return torch.device(name)


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """The same global random numbers for the body each time, and no trace of it thereafter: of
    PyTorch, on `device`, too, of numpy and of Python.
    """
    of_numpy, of_python = np.random.get_state(), random.getstate()
    on_cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng([torch.cuda.current_device()] if on_cuda else []):
        torch.manual_seed(seed)
        np.random.seed(seed % (1 << 32))
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(of_numpy)
            random.setstate(of_python)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies in bf16 itself: CUDA from Ampere on, AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= BF16_CAPABILITY
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def set_precision(device: torch.device, precision: str) -> None:
    """Check a precision against the device and make the process's settings for it.

    Raises `ValueError` for tf32 without CUDA.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ValueError("--precision tf32 is CUDA's; take fp32 or bf16 on a CPU")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def tune_process(
    device: torch.device, num_threads: int, precision: str, deterministic: bool
) -> dict[str, Any]:
    """Make this process's settings for training on `device`; returns them for the log.

    With `deterministic` PyTorch refuses operations that differ from run to run. On a CPU none does;
    on CUDA adding up row gradients then sorts them first, which is slower.
    """
    set_precision(device, precision)
    if device.type == "cuda":
        # What determinism needs is read once, when cuBLAS starts: so for every run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Also where it changes nothing: it loads PyTorch's compiler, 0.1 GB that the optimizer would
    # load after free memory was compared with what the run needs.
    torch.use_deterministic_algorithms(deterministic and device.type == "cuda")
    chosen = {"precision": precision, "deterministic": deterministic}
    return chosen | tune_cpu(num_threads, products=device.type == "cpu")


def random_state(device: torch.device) -> dict[str, np.ndarray]:
    """PyTorch's generators, on the CPU and on a CUDA device, for `restore_random`."""
    state = {"cpu": torch.get_rng_state().numpy()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy()
    return state


def restore_random(state: Mapping[str, np.ndarray], device: torch.device, rank: int = 0) -> None:
    """Go on with the random numbers where `random_state` was taken; what is not there stays.

    Of a rank other than 0 the state's names end in `_<rank>`.
    """
    end = f"_{rank}" if rank else ""
    if (cpu := state.get("cpu" + end)) is not None:
        torch.set_rng_state(torch.from_numpy(np.array(cpu)))
    if (cuda := state.get("cuda" + end)) is not None and device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(np.array(cuda)), device)


def free_device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that is free now, in bytes."""
    return torch.cuda.mem_get_info(device)[0]


def peak_device_bytes() -> int | None:
    """Peak memory of tensors on the CUDA device so far, in bytes; None where none is in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    return torch.cuda.max_memory_allocated()
