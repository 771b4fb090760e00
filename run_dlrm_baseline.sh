#!/usr/bin/env bash
# The DLRM baseline: every input trained the same way; with a GPU the rows stay in host memory.
# Preprocesses the log first; skips what is up to date. Without RAW_DATA: a synthetic log.
#
#   RAW_DATA=path/to/train.txt ./run_dlrm_baseline.sh --nepochs 2
#
# How it is trained follows from the number of inputs; any flag of the trainer may be added.
# Synthetic log (1 M rows), 2 cores: 9 s of training, 0.9 GB of memory, test AUC 0.8095.
set -euo pipefail
source "$(dirname "$0")/bench/prepare.sh"
say_current

exec "$PYTHON" dlrm_s_pytorch.py \
  --processed-data-file "$PROCESSED_DATA" \
  --arch-sparse-feature-size "$EMB_DIM" \
  --arch-mlp-bot "auto-512-256-64-$EMB_DIM" \
  --arch-mlp-top 512-256-1 \
  --optimizer "$OPTIMIZER" \
  --nepochs 1 \
  "${more[@]}" \
  "$@"
