#!/usr/bin/env bash
# All figures of the papers, made anew, in one folder with a page: see --help, or the docstring of
# bench/paper_figures.py. Without DATA and --quick the variables of run_slipstream.sh say what the log is.
#
#   bench/paper_figures.sh --quick                       a small synthetic log: 2 minutes on 2 cores
#   bench/paper_figures.sh input/kaggle/train_processed.npz --seeds 3
#   RAW_DATA=input/kaggle/train.txt bench/paper_figures.sh
set -euo pipefail

words=("$@")
# A path that is given starts where this is called, the others at the repository.
if [ $# -gt 0 ] && [ -e "$1" ]; then words[0]="$(realpath -s -- "$1")"; fi
given=""
for word in "$@"; do
  case "$word" in --quick | --help | -h) given=yes ;; esac
done
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then given=yes; fi
cd "$(dirname "$0")/.."
if [ -n "$given" ]; then
  # shellcheck source=bench/python.sh
  source bench/python.sh
  find_python torch numpy sklearn pandas tqdm msgspec matplotlib scipy polars
else
  # shellcheck source=bench/prepare.sh
  source bench/prepare.sh
  find_python torch numpy sklearn pandas tqdm msgspec matplotlib scipy
  words=("$PROCESSED_DATA" "${words[@]}")
  # shellcheck disable=SC2154 # prepare.sh sets it
  words+=(--arch-sparse-feature-size "$EMB_DIM" --optimizer "$OPTIMIZER" "${more[@]}")
  if [ -n "${HOT_EMB_GPU_MEM:-}" ]; then words+=(--hot-emb-gpu-mem "$HOT_EMB_GPU_MEM"); fi
fi
exec "$PYTHON" -m bench.paper_figures "${words[@]}"
