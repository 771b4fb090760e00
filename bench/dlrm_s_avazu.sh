#!/usr/bin/env bash
# Avazu (train.csv or train.gz: 40,428,967 rows, 6 GB of text), by one of the methods.
#
#   RAW_DATA=input/avazu/train.gz bench/dlrm_s_avazu.sh slipstream [flags of the trainer]
#
# 23 tables (21 columns, hour of day, weekday) and one dense feature, the hour; the ten days by date,
# the last one held out. Disk: 4 GB processed (5 GB while preprocessing), as much again segregated.
# Memory: 9.4 M embedding rows, 0.6 GB. Expected: AUC about 0.75 after 1 epoch (random splits, which
# the papers use, give up to 0.764), about 10 minutes on 2 CPU cores. From others' runs and a sample
# of 23,299 rows, not yet measured.
set -euo pipefail
# shellcheck source=bench/recipe.sh
source "$(dirname "$0")/recipe.sh"

export DATA_SET=avazu
export RAW_DATA="${RAW_DATA:-$here/input/avazu/train.csv}"
export EMB_DIM=16
export HOT_EMB_GPU_MEM="${HOT_EMB_GPU_MEM:-268435456}"

recipe \
  --arch-mlp-bot 1-512-256-64-16 \
  --arch-mlp-top 512-256-1 \
  --mini-batch-size 1024 \
  --test-freq 10240 \
  "$@"
