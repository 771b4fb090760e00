#!/usr/bin/env bash
# All figures of the papers, made anew, in one folder with a page: see --help, or the docstring of
# bench/paper_figures.py. Without DATA and --quick the variables of run_slipstream.sh say what the log is.
#
#   bench/paper_figures.sh --quick                       a small synthetic log: 2 minutes on 2 cores
#   bench/paper_figures.sh input/kaggle/train_processed.npz --seeds 3
#   RAW_DATA=input/kaggle/train.txt bench/paper_figures.sh
set -euo pipefail

modules=(torch numpy sklearn pandas tqdm msgspec matplotlib scipy)
words=("$@")
given=""
if [ $# -gt 0 ] && [[ "$1" != -* ]]; then
  given=yes
  # DATA starts where this is called; paths in flags at the repository.
  words[0]="$(realpath -ms -- "$1")"
fi
for word in "$@"; do
  case "$word" in --quick | --help | -h) given=yes ;; esac
done
if [ -n "$given" ]; then
  if [[ "${PYTHON:-}" == */* ]]; then PYTHON="$(realpath -ms -- "$PYTHON")"; fi
  cd "$(dirname "$0")/.."
  # shellcheck source=bench/python.sh
  source bench/python.sh
  find_python "${modules[@]}" polars
else
  # shellcheck source=bench/prepare.sh
  source "$(dirname "$0")/prepare.sh"
  find_python "${modules[@]}"
  # shellcheck disable=SC2154 # prepare.sh sets `more`
  words=("$PROCESSED_DATA" --arch-sparse-feature-size "$EMB_DIM" --optimizer "$OPTIMIZER" "${more[@]}" "${words[@]}")
  if [ -n "${HOT_EMB_GPU_MEM:-}" ]; then words+=(--hot-emb-gpu-mem "$HOT_EMB_GPU_MEM"); fi
fi
exec "$PYTHON" -m bench.paper_figures "${words[@]}"
