#!/usr/bin/env bash
# The DLRM baseline: every input trained the same way; with a GPU the rows stay in host memory.
# Preprocesses the log first; skips what is up to date. Without RAW_DATA: a synthetic log.
#
#   RAW_DATA=path/to/train.txt ./run_dlrm_baseline.sh --nepochs 2
#
# Synthetic log (1 M rows), 2 cores: 10 s of training, 0.9 GB of memory, test AUC 0.789.
# Criteo Kaggle, 1 epoch: AUC about 0.80 with Meta's script and mini-batch 128.
set -euo pipefail
source "$(dirname "$0")/bench/prepare.sh"

exec "$PYTHON" dlrm_s_pytorch.py \
  --processed-data-file "$PROCESSED_DATA" \
  --arch-sparse-feature-size "$EMB_DIM" \
  --arch-mlp-bot "auto-512-256-64-$EMB_DIM" \
  --arch-mlp-top 512-256-1 \
  --optimizer "$OPTIMIZER" \
  --nepochs 1 \
  "${rate[@]}" \
  "$@"
