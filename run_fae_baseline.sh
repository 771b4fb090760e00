#!/usr/bin/env bash
# FAE: hot embedding rows on the device, hot and cold mini-batches interleaved.
# Preprocesses and segregates first; skips what is up to date. Without RAW_DATA: a synthetic log.
#
#   RAW_DATA=path/to/train.txt ./run_fae_baseline.sh --nepochs 2
#
# Synthetic log (1 M rows), 2 cores: 8 s of training, 0.9 GB of memory, test AUC 0.8095.
set -euo pipefail
source "$(dirname "$0")/bench/prepare.sh"
./run_input_segregation.sh
say_current

exec "$PYTHON" fae_train.py \
  --processed-data-file "$PROCESSED_DATA" \
  --segregated-data-dir "$HOT_COLD" \
  --schedule interleaved \
  --arch-sparse-feature-size "$EMB_DIM" \
  --arch-mlp-bot "auto-512-256-64-$EMB_DIM" \
  --arch-mlp-top 512-256-1 \
  --optimizer "$OPTIMIZER" \
  --nepochs 1 \
  "${more[@]}" \
  "$@"
