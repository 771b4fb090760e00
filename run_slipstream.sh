#!/usr/bin/env bash
# Slipstream: FAE, and hot inputs whose embedding rows have gone stale are dropped.
# Preprocesses and segregates first; skips what is up to date. Without RAW_DATA: a synthetic log.
#
#   RAW_DATA=path/to/train.txt ./run_slipstream.sh --drop-percentage 20
#
# Synthetic log (1 M rows), 2 cores: 9 s of training, 0.9 GB of memory, test AUC 0.772.
set -euo pipefail
RAW_DATA="${RAW_DATA:+$(realpath -m -- "$RAW_DATA")}"
COLUMNS_FILE="${COLUMNS_FILE:+$(realpath -m -- "$COLUMNS_FILE")}"
cd "$(dirname "$0")"
source bench/prepare.sh
./run_input_segregation.sh

exec "$PYTHON" slipstream_train.py \
  --processed-data-file "$PROCESSED_DATA" \
  --segregated-data-dir "$HOT_COLD" \
  --drop-policy stale \
  --drop-percentage 30 \
  --alpha 1.0 \
  --snapshot-start 0.25 \
  --snapshot-window 0.05 \
  --sample-rate 1.0 \
  --schedule interleaved \
  --arch-sparse-feature-size "$EMB_DIM" \
  --arch-mlp-bot "$NUM_DENSE-512-256-64-$EMB_DIM" \
  --arch-mlp-top 512-256-1 \
  --mini-batch-size 1024 \
  --learning-rate "$LEARNING_RATE" \
  --optimizer "${OPTIMIZER:-sgd}" \
  --nepochs 1 \
  "$@"
