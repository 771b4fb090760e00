#!/usr/bin/env bash
# Criteo Kaggle (train.txt: 45,840,617 rows, 11 GB) with the papers' model, by one of the methods.
# `slipstream --paper` drops and trains as the paper does.
#
#   RAW_DATA=input/kaggle/train.txt bench/dlrm_s_criteo_kaggle.sh slipstream [flags of the trainer]
#
# Disk: 7.2 GB processed (14 GB while preprocessing), as much again segregated. Memory: 2.2 GB of
# embedding rows. Expected: AUC about 0.80 after 1 epoch (Meta's script, SGD at mini-batch 128: 0.80),
# about 6 minutes on 2 CPU cores. MIN_COUNT=4 lets values seen fewer than 4 times share a row a table:
# more inputs are hot at the same AUC on smaller logs (docs/data.md); 1, DLRM's, is usual. AUC
# and minutes are from smaller logs and others' runs, not yet measured.
set -euo pipefail
# shellcheck source=bench/recipe.sh
source "$(dirname "$0")/recipe.sh"
# shellcheck disable=SC2034 # recipe.sh reads it
source_of="https://ailab.criteo.com/ressources/ (dac.tar.gz)"

export DATA_SET=kaggle
export RAW_DATA="${RAW_DATA:-$here/input/kaggle/train.txt}"
export EMB_DIM=16
export HOT_EMB_GPU_MEM="${HOT_EMB_GPU_MEM:-268435456}"

recipe \
  --arch-mlp-bot 13-512-256-64-16 \
  --arch-mlp-top 512-256-1 \
  --test-freq 2048 \
  "$@"
