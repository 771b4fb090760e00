#!/usr/bin/env bash
# Slipstream: FAE, and hot inputs whose embedding rows have gone stale are dropped, with the settings
# that lose least (bench/README.md). Its control, as many at random: --drop-policy random.
# Preprocesses and segregates first; skips what is up to date. Without RAW_DATA: a synthetic log.
#
#   RAW_DATA=path/to/train.txt ./run_slipstream.sh --drop-percentage 20
#   RAW_DATA=path/to/train.txt ./run_slipstream.sh --paper
#
# --paper: the choice of inputs, the order and the training of the paper's code: all cold inputs, then
# all hot ones, SGD at DLRM's rate with mini-batch 1024 (docs/design.md: what differs).
# Synthetic log (1 M rows), 2 cores: 6 s of training, 0.9 GB of memory, test AUC 0.807 with 25 % fewer
# inputs.
set -euo pipefail

DROP=(
  --schedule interleaved
  --drop-policy stale
  --drop-of-all 25
  --drop-percentage 80
  --alpha 0.5
  --snapshot-start 0.4
  --snapshot-window 0.1
)
flags=()
for flag in "$@"; do
  if [ "$flag" != --paper ]; then
    flags+=("$flag")
    continue
  fi
  export OPTIMIZER=sgd # its rows are smaller, and segregated in a folder of their own
  DROP=(
    --schedule phased
    --drop-policy stale
    --drop-percentage 30
    --alpha 1.0
    --snapshot-start 0.25
    --snapshot-window 0.05
    --count-untouched-as-stale true
    --mini-batch-size 1024
    --learning-rate 0.1
    --lr-decay-share 0
  )
done
source "$(dirname "$0")/bench/prepare.sh"
./run_input_segregation.sh
say_current

exec "$PYTHON" slipstream_train.py \
  --processed-data-file "$PROCESSED_DATA" \
  --segregated-data-dir "$HOT_COLD" \
  --arch-sparse-feature-size "$EMB_DIM" \
  --arch-mlp-bot "auto-512-256-64-$EMB_DIM" \
  --arch-mlp-top 512-256-1 \
  --optimizer "$OPTIMIZER" \
  --nepochs 1 \
  "${DROP[@]}" \
  "${more[@]}" \
  "${flags[@]}"
