#!/usr/bin/env bash
# Number the embedding rows by popularity and split the training inputs into hot and cold.
# Preprocesses the log first; skips what is up to date. Without RAW_DATA: a synthetic log.
#
#   RAW_DATA=path/to/train.txt ./run_input_segregation.sh
#
# Criteo Kaggle (45.8 M rows, 2.2 GB of embedding rows at dim 16): minutes, about 2 GB of memory.
set -euo pipefail
source "$(dirname "$0")/bench/prepare.sh"

say_current

# The paper profiles 5 % of the inputs; here all are counted, which takes seconds.
exec "$PYTHON" input_segregation.py \
  --processed-data-file "$PROCESSED_DATA" \
  --segregated-data-dir "$HOT_COLD" \
  --hot-emb-gpu-mem "${HOT_EMB_GPU_MEM:-268435456}" \
  --ip-sampling-rate "${IP_SAMPLING_RATE:-100}" \
  --arch-sparse-feature-size "$EMB_DIM" \
  --optimizer "$OPTIMIZER" \
  ${VERBOSE:+--verbose "$VERBOSE"} \
  "$@"
