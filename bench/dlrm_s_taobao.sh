#!/usr/bin/env bash
# Taobao UserBehavior (UserBehavior.csv: 100,150,807 lines, 3.6 GB), by one of the methods.
#
#   RAW_DATA=input/taobao/UserBehavior.csv bench/dlrm_s_taobao.sh slipstream [flags of the trainer]
#
# Clicks (pv) are label 1, each with one negative drawn from all clicks (slipstream/logs/taobao.py): about
# 179 M rows, one dense feature. Days by date, 2017-12-03 held out. The model is TBSM, as in the papers:
# 5 tables, and the user's last 20 items and categories as sequences. Disk: 34 GB processed (50 GB
# while preprocessing), as much again segregated. Memory: 5.2 M embedding rows, 0.4 GB. HISTORY=0 gives
# DLRM with the last item and category as features of their own: 7 tables, 6 GB, 9.4 M rows.
#
# Expected on all: not yet measured. On the first 84,475 lines, mean of 3 seeds, 1 epoch: test AUC 0.872,
# validation 0.888 (attention by inner products, which needs no --model-args: 0.848, 0.865); DLRM
# 0.847, 0.850. 13 thousand inputs a second on one core, DLRM 63. MIN_COUNT is not to be judged by AUC
# here (bench/README.md).
set -euo pipefail
# shellcheck source=bench/recipe.sh
source "$(dirname "$0")/recipe.sh"
# shellcheck disable=SC2034 # recipe.sh reads it
source_of="https://tianchi.aliyun.com/dataset/649"

export DATA_SET=taobao
export RAW_DATA="${RAW_DATA:-$here/input/taobao/UserBehavior.csv}"
export EMB_DIM=16
export HOT_EMB_GPU_MEM="${HOT_EMB_GPU_MEM:-268435456}"

export HISTORY="${HISTORY:-20}"
network=()
if [ "$HISTORY" != 0 ]; then network=(--model tbsm --model-args attention=mlp); fi

recipe \
  --test-freq 2048 \
  ${network[@]+"${network[@]}"} \
  "$@"
