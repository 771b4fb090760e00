#!/usr/bin/env bash
# Run the tests (CPU, four to five minutes; those marked gpu need CUDA). Flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
source bench/python.sh
# shellcheck disable=SC2034 # python.sh reads it
requirements+=(requirements-dev.txt requirements-optional.txt)
find_python torch numpy sklearn pandas tqdm msgspec polars matplotlib pytest xdist hypothesis ruff mypy
if [ "$PYTHON" = .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
exec "$PYTHON" -m pytest -p no:cacheprovider -n 2 --dist worksteal "$@"
