"""Settings of this process that make PyTorch fast on a CPU; they change no result beyond rounding.

- **Matrix products by oneDNN.** PyTorch sends fp32 products to MKL, which on CPUs that are not
  Intel's uses half of the vector width: 200 against 440 GFLOP/s on 2 cores of an EPYC 9005. oneDNN
  takes them when reduced precision is allowed; where its kernel computes in full fp32 all the same
  (every x86 CPU without AMX), allowing it changes the speed alone. A probe checks that.
- **Freed memory is kept.** glibc gives back each large array and asks for it zeroed in the next
  step: about 15 % of a step's time at mini-batch 2048, more above. Price: the peak stays resident.
- **Threads** are PyTorch's own choice, one a physical core. Another busy process on the same cores
  halves the speed. Waiting without spinning (OMP_WAIT_POLICY=passive) makes a step 1.25 (2048) to
  2.7 (128) times as long on idle cores, and 0.85 as long on shared ones: it is left to the user.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT_BYTES = 1 << 30


def tune_cpu(num_threads: int = 0, products: bool = True) -> dict[str, Any]:
    """Apply the module's settings; returns what took effect, for the log.

    `num_threads` 0 leaves PyTorch's choice; `products` false leaves matrix products alone.
    """
    if num_threads:
        torch.set_num_threads(num_threads)
    return {
        "threads": torch.get_num_threads(),
        "memory_kept": keep_freed_memory(),
        "matrix_products": "onednn" if products and use_onednn(True) else "default",
    }


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep freed memory; False where there is another malloc."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) and mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))


def use_onednn(wanted: bool) -> bool:
    """Send fp32 matrix products to oneDNN, or back to MKL; whether oneDNN takes them now.

    Never where that would round the factors to bf16: off x86, and on CPUs with AMX.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        return False
    able = torch.cpu.get_capabilities()
    suited = able.get("avx512_f") and able.get("architecture") == "x86_64"
    wanted = wanted and torch.backends.mkldnn.is_available()
    wanted = wanted and bool(suited) and not able.get("amx_tile", True)
    matmul.fp32_precision = "bf16" if wanted else "ieee"
    if wanted and not _is_full_precision():
        matmul.fp32_precision = "ieee"
    return matmul.fp32_precision == "bf16"


def _is_full_precision() -> bool:
    """Whether fp32 products keep more than bf16's 8 bits, for each of the forms that a step uses.

    The factors are 1 + k / 4096, which bf16 rounds to 1 for small k.
    """
    generator = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> torch.Tensor:
        return 1 + torch.randint(0, 8, shape, generator=generator) / 4096

    x, weight, gradient = factor(64, 96), factor(80, 96), factor(64, 80)
    products = [
        (torch.nn.functional.linear(x, weight), x.double() @ weight.double().t()),
        (gradient @ weight, gradient.double() @ weight.double()),
        (gradient.t() @ x, gradient.double().t() @ x.double()),
    ]
    return all(
        torch.allclose(got.double(), expected, rtol=1e-6, atol=0.0) for got, expected in products
    )
