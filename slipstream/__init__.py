"""What the scripts are made of: see README.md for the chapters."""

import os

# How long OpenMP's threads spin before they sleep; read once, when torch loads, and every script
# comes by here before. `slipstream/tools/cpu.py` says what it gains and costs.
if "OMP_WAIT_POLICY" not in os.environ:  # which it would override
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
