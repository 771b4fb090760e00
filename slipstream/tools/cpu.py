"""Settings of this process that make PyTorch fast on a CPU; they change no result beyond rounding.

- **Matrix products by oneDNN.** PyTorch sends fp32 products to MKL, which on CPUs that are not
  Intel's uses half of the vector width: 200 against 440 GFLOP/s on 2 cores of an EPYC 9005. oneDNN
  takes them when reduced precision is allowed; where its kernel computes in full fp32 all the same
  (every x86 CPU without AMX), allowing it changes the speed alone. A probe checks that.
- **Freed memory is kept.** glibc gives back each large array and asks for it zeroed in the next
  step: about 15 % of a step's time at mini-batch 2048, more above. Price: the peak stays resident.
- **Threads** are PyTorch's own choice, one a physical core. They *wait* by spinning: libgomp's
  usual 300,000 turns are best on idle cores, and ruinous on shared ones, where a thread spins away
  the time that the one it waits for needs. `slipstream/__init__.py` sets GOMP_SPINCOUNT=1000,
  unless it is given: of what was tried, the one that is never far from the best. Milliseconds a
  step on 2 cores, 2026-11-25, median of two runs (a small network at mini-batch 128; Kaggle's at
  128, 1024):

      turns                     idle               1 busy process     4 busy processes
      300,000 (default)         0.9   2.3   11.5   3.7   9.1   39     22    36    314
      10,000                    0.9   2.3   12.0   11    26    59     11    47    77
      1,000                     1.2   2.7   12.6   4.0   8.1   26     6.4   14    51
      0 (OMP_WAIT_POLICY=passive)  3.3  6.1  15.2  1.5   4.7   22     4.7   10    58

  On a machine of one's own OMP_WAIT_POLICY=active gives the first line. How busy the cores were
  shows in a log's `involuntary_switches_per_s`: some tens where they are idle, thousands where a
  thread had to give way; the load average counts processes that wait for a disk, too.
"""

from __future__ import annotations

import ctypes
import os
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
        "thread_wait": os.environ.get("OMP_WAIT_POLICY", os.environ.get("GOMP_SPINCOUNT")),
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
