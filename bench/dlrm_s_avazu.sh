#!/usr/bin/env bash
# Avazu (train.csv or train.gz: 40,428,967 rows, 6 GB of text), by one of the methods.
#
#   RAW_DATA=input/avazu/train.gz bench/dlrm_s_avazu.sh slipstream [flags of the trainer]
#
# 23 tables (21 columns, hour of day, weekday) and one dense feature, the hour; the ten days by date,
# the last one held out. Disk: 4 GB processed (5 GB while preprocessing), as much again segregated.
# Memory: 9.4 M embedding rows, 0.6 GB. On the first 23,299 rows the held-out day's AUC is 0.718 after an
# epoch (mean of 10 seeds; a logistic regression has 0.717, a tie). Expected on all: not yet measured;
# the best of others' models reach 0.767 on a random split (SPLIT=random:1), which is easier than a day
# held out. MIN_COUNT=2 lets values seen once share a row a table.
set -euo pipefail
# shellcheck source=bench/recipe.sh
source "$(dirname "$0")/recipe.sh"
# shellcheck disable=SC2034 # recipe.sh reads it
source_of="https://www.kaggle.com/c/avazu-ctr-prediction/data"

export DATA_SET=avazu
export RAW_DATA="${RAW_DATA:-$here/input/avazu/train.csv}"
export EMB_DIM=16
export HOT_EMB_GPU_MEM="${HOT_EMB_GPU_MEM:-268435456}"

recipe \
  --arch-mlp-bot 1-512-256-64-16 \
  --arch-mlp-top 512-256-1 \
  --test-freq 2048 \
  "$@"
