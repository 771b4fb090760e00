"""What the scripts are made of: docs/design.md lists the chapters."""

import os
import sys

try:
    import fcntl  # noqa: F401 - locks; with it go mmap.madvise, os.pwrite and resource
except ImportError:
    print("Slipstream runs on Linux and macOS (on Windows: in WSL), not here", file=sys.stderr)
    sys.exit(2)

# How long OpenMP's threads spin before they sleep; read once, when torch loads, and every script
# comes by here before. `slipstream/tools/cpu.py` says what it gains and costs.
if "OMP_WAIT_POLICY" not in os.environ:  # which it would override
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
