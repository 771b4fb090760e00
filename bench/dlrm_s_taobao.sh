#!/usr/bin/env bash
# Taobao UserBehavior (UserBehavior.csv: 100,150,807 lines, 3.6 GB), by one of the methods.
#
#   RAW_DATA=input/taobao/UserBehavior.csv bench/dlrm_s_taobao.sh slipstream [flags of the trainer]
#
# Clicks (pv) are label 1, each with one negative drawn from all clicks (slipstream/logs/taobao.py): about
# 179 M rows, 7 tables, one dense feature. Days by date, 2017-12-03 held out. Disk: 6 GB processed
# (20 GB while preprocessing), as much again segregated. Memory: 9.4 M embedding rows, 0.6 GB. Each
# vector's product with itself is given to the top MLP, too (bench/prepare.sh): on the first 84,475
# lines a test AUC of 0.847 with it, 0.827 without (mean of 3 seeds, 1 epoch). Expected on all: not yet
# measured; the papers train another model (TBSM, a history of 20), so their AUC is not comparable.
set -euo pipefail
# shellcheck source=bench/recipe.sh
source "$(dirname "$0")/recipe.sh"
# shellcheck disable=SC2034 # recipe.sh reads it
source_of="https://tianchi.aliyun.com/dataset/649"

export DATA_SET=taobao
export RAW_DATA="${RAW_DATA:-$here/input/taobao/UserBehavior.csv}"
export EMB_DIM=16
export HOT_EMB_GPU_MEM="${HOT_EMB_GPU_MEM:-268435456}"

recipe \
  --test-freq 2048 \
  "$@"
