#!/usr/bin/env bash
# Everything that a machine with CUDA must show, in one command: about 9 minutes on one H100.
# Ended by a signal (`timeout`), it keeps what was measured until then.
#
#   bench/gpu_suite.sh [folder for the results, default bench/results]
#
# Needs python3 (or PYTHON) with torch, numpy, scikit-learn, tqdm and msgspec, and pytest for the
# tests; no network and no data: logs are made with numpy. Memory: 64 GB, on the GPU 24 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
results="${1:-bench/results}"
PYTHON="${PYTHON:-python3}"
ROWS="${ROWS:-2000000}"
WORK_DIR="${WORK_DIR:-input/bench}"
DEVICE="${DEVICE:-cuda}"
read -ra sizes <<<"${SIZES:-2048 16384}"
# Ratios are to the first: tables on the CPU, MLPs on the GPU, what one does when tables are large.
read -ra methods <<<"${METHODS:-plain+hybrid plain+gpu baseline baseline+serial baseline+resident \
  fae+hot fae fae+serial slipstream baseline+resident+adaptive fae+hot+adaptive fae+adaptive \
  slipstream+adaptive fae+adaptive+eager baseline+resident+tf32 baseline+resident+bf16 \
  slipstream+adaptive+bf16}"
status=0 is_asked_to_end=no
trap 'is_asked_to_end=yes' INT TERM # the command that runs has heard of it, too
stage() { # what it is; none is begun once the suite was told to end
  [ "$is_asked_to_end" = no ] || exit 143
  echo "== $1"
}
export SLIPSTREAM_TRACEBACK=1 # of whatever fails; the rest goes on

stage "tests marked gpu"
if "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
  "$PYTHON" -m pytest -p no:cacheprovider -q tests/test_gpu.py || status=$?
else
  echo "skipped: no pytest or hypothesis here"
fi

stage "the GPU against the CPU"
"$PYTHON" -m bench.gpu_check --device "$DEVICE" --output-dir "$results" || status=$?

# On a log of 2 M rows 256 MB hold every row that occurs: all inputs are hot. 16 MB leave about a
# quarter of them cold, which is more like 256 MB on the whole of Kaggle.
# `hot` trains hot inputs alone, to be held against all rows resident.
stage "throughput, Kaggle's model and table sizes"
"$PYTHON" -m bench.throughput --model kaggle --published-sizes true --rows "$ROWS" \
  --work-dir "$WORK_DIR" --output-dir "$results" --device "$DEVICE" --seconds-alone 0.5 \
  --mini-batch-size "${sizes[@]}" --hot-emb-gpu-mem 16777216 --block-samples 131072 --epochs 2 \
  --methods "${methods[@]}" || status=$?

# Two processes that share the GPUs there are: by gloo where it is one, by NCCL where there are two.
stage "two ranks"
"$PYTHON" -m bench.scaling --processes 2 --repetitions 1 \
  --segregated-data-dir "$WORK_DIR/synthetic_${ROWS}_published_seed123_processed_dim16_hot16777216" \
  --mini-batch-size "${sizes[0]}" --num-batches "${BATCHES:-300}" --device "$DEVICE" \
  --runs-dir "$WORK_DIR/two_ranks" --out "$results/scaling_two_ranks_$DEVICE.csv" || status=$?
exit "$status"
