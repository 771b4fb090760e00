#!/usr/bin/env bash
# Run the tests (CPU, under 4 minutes; those marked gpu need CUDA). Flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
if ! python3 -c 'import torch, numpy, sklearn, pandas, tqdm, polars, matplotlib, pytest, xdist, hypothesis, ruff, mypy' \
  2>/dev/null; then
  if [ ! -x .venv/bin/python ]; then python3 -m venv .venv; fi
  .venv/bin/python -m pip install --quiet -r requirements.txt -r requirements-dev.txt \
    -r requirements-optional.txt
  export PATH="$PWD/.venv/bin:$PATH"
fi
exec python3 -m pytest -p no:cacheprovider -n 2 --dist worksteal "$@"
