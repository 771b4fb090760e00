# shellcheck shell=bash
# Sourced by the run scripts: finds a Python, a raw log, and preprocesses it. Sets and exports
#   PYTHON           an interpreter that can import what is needed; made in .venv where there is none
#   RAW_DATA         the raw log. Not set: input/kaggle/train.txt where it exists, else a synthetic log
#   PROCESSED_DATA   the processed .npz. Set without RAW_DATA: used as it is, nothing is preprocessed
#   HOT_COLD         the segregated folder; of OPTIMIZER=sgd, whose rows are smaller, one of its own
#   more             an array: the trainers' flags that follow from LEARNING_RATE and DATA_SET
# and reads, where set: DATA_SET (kaggle, terabyte, avazu, taobao, custom), COLUMNS_FILE (custom's
# column file), TEST_DATA (a log of held-out rows), SPLIT (last-day, random:SEED, none), MAX_IND_RANGE,
# MIN_COUNT, DATA_SUB_SAMPLE_RATE, NUM_DAYS, BAD_LINES (stop, skip:N), MAX_MEMORY (of preprocessing, as
# 2G), JOBS (files read at once), SYNTHETIC_ROWS (rows of the synthetic log), EMB_DIM (values of an embedding
# row), OPTIMIZER (rwsadagrad, sgd), LEARNING_RATE (of the rows). Relative paths in these variables
# start where the script was called; those of SYNTHETIC_DIR and of flags at the repository, which it
# goes to.

if [ -z "${SLIPSTREAM_PREPARED:-}" ]; then
  for name in RAW_DATA TEST_DATA COLUMNS_FILE PROCESSED_DATA HOT_COLD; do
    if [ -n "${!name:-}" ]; then declare "$name=$(realpath -m -- "${!name}")"; fi
  done
  # Links stay: a virtual environment's interpreter is one. A bare name is looked up.
  if [[ "${PYTHON:-}" == */* ]]; then PYTHON="$(realpath -ms -- "$PYTHON")"; fi
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

DATA_SET="${DATA_SET:-kaggle}"
SYNTHETIC_ROWS="${SYNTHETIC_ROWS:-1000000}"
SYNTHETIC_DIR="${SYNTHETIC_DIR:-input/synthetic}"
export EMB_DIM="${EMB_DIM:-16}" OPTIMIZER="${OPTIMIZER:-rwsadagrad}"
# The trainers decide on mini-batch, rates and decay by the number of inputs (--help).
more=()
if [ -n "${LEARNING_RATE:-}" ]; then more+=(--learning-rate "$LEARNING_RATE"); fi
# Of Taobao's few columns each vector meets itself, too: AUC 0.85 for 0.83 (bench/README.md).
if [ "$DATA_SET" = taobao ]; then more+=(--arch-interaction-itself true); fi
hot_cold=hot_cold
if [ "$OPTIMIZER" != rwsadagrad ]; then hot_cold="hot_cold_$OPTIMIZER"; fi

can_import() { # interpreter, modules
  "$1" - "${@:2}" >/dev/null 2>&1 <<'PYTHON_END'
import importlib.util, sys
sys.exit(sys.version_info < (3, 11) or any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
PYTHON_END
}

find_python() { # modules
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    if can_import "$PYTHON" "$@"; then return; fi
    echo "$0: PYTHON=$PYTHON cannot import all of: $*; install requirements.txt there" >&2
    exit 2
  fi
  for candidate in python3 python .venv/bin/python; do
    if can_import "$candidate" "$@"; then
      PYTHON="$candidate"
      return
    fi
  done
  echo "No Python with $* here: installing requirements.txt into .venv (about 1.5 GB; minutes)"
  python3 -m venv .venv
  .venv/bin/python -m pip install --quiet -r requirements.txt
  PYTHON=.venv/bin/python
}

# The trainer would preprocess a log that a flag names into the file of the one that is named here.
if [ -z "${preprocess_flags+set}" ]; then
  for name in "$@"; do
    name="${name%%=*}"
    if [ "${name//_/-}" = --raw-data-file ] || [ "${name//_/-}" = --processed-data-file ]; then
      echo "$0: error: $name: name the log by RAW_DATA, or a processed file by PROCESSED_DATA" >&2
      exit 2
    fi
  done
fi

# Before minutes of installation: what the scripts would refuse after it.
check_path() { # name of a variable
  if [ -e "${!1}" ] || { [ "$DATA_SET" = terabyte ] && compgen -G "${!1}*" >/dev/null; }; then
    return
  fi
  echo "$0: error: $1=${!1} does not exist; check the path" >&2
  exit 2
}

prepare() {
  local modules=(torch numpy sklearn tqdm msgspec) synthetic="" name
  # shellcheck disable=SC2154 # recipe.sh sets it
  local options=(${preprocess_flags[@]+"${preprocess_flags[@]}"})
  for name in RAW_DATA TEST_DATA COLUMNS_FILE; do
    if [ -n "${!name:-}" ]; then check_path "$name"; fi
  done
  if [ -z "${RAW_DATA:-}" ] && [ -n "${PROCESSED_DATA:-}" ]; then
    check_path PROCESSED_DATA
    HOT_COLD="${HOT_COLD:-$(dirname "$PROCESSED_DATA")/$hot_cold}"
    find_python "${modules[@]}"
    echo "No RAW_DATA given: using $PROCESSED_DATA as it is"
    return
  fi
  if [ -z "${RAW_DATA:-}" ]; then
    if [ "$DATA_SET" = kaggle ] && [ -f input/kaggle/train.txt ]; then
      RAW_DATA=input/kaggle/train.txt
    elif [ "$DATA_SET" = kaggle ]; then
      synthetic=yes
      RAW_DATA="$SYNTHETIC_DIR/train.txt"
      # 256 MB would make every row of a small log hot; this leaves hot and cold inputs.
      export HOT_EMB_GPU_MEM="${HOT_EMB_GPU_MEM:-4194304}"
    else
      echo "$0: set RAW_DATA to the log of DATA_SET=$DATA_SET (see README.md, Data)" >&2
      exit 2
    fi
  fi
  if [ -z "${PROCESSED_DATA:-}" ]; then
    local folder end
    folder="$(basename "$(dirname "$RAW_DATA")")"
    name="$(basename "$RAW_DATA" .gz)"
    # Of clicks.2024-03-01 the date stays: one log, one file.
    for end in .txt .csv .tsv .parquet; do name="${name%"$end"}"; done
    case "$(realpath -ms -- "$RAW_DATA")" in
      "$PWD"/input/*) ;;
      # Of two logs elsewhere, in folders of the same name, neither replaces the other's file.
      *) folder="$folder-$(printf %s "$RAW_DATA" | cksum | cut -d ' ' -f 1)" ;;
    esac
    PROCESSED_DATA="input/$folder/${name}_processed.npz"
    if [ -n "$synthetic" ]; then PROCESSED_DATA="$SYNTHETIC_DIR/train_processed.npz"; fi
  fi
  if [ ! -f "$PROCESSED_DATA" ]; then modules+=(polars); fi # it reads raw logs
  find_python "${modules[@]}"
  if [ -n "$synthetic" ]; then
    echo "No RAW_DATA given: using a SYNTHETIC log of $SYNTHETIC_ROWS rows, $RAW_DATA"
    "$PYTHON" bench/synthetic_log.py --rows "$SYNTHETIC_ROWS" --output "$RAW_DATA"
  fi
  HOT_COLD="${HOT_COLD:-$(dirname "$PROCESSED_DATA")/$hot_cold}"
  mkdir -p "$(dirname "$PROCESSED_DATA")"
  local pair
  for pair in MAX_IND_RANGE:--max-ind-range MIN_COUNT:--min-count NUM_DAYS:--num-days SPLIT:--split \
    DATA_SUB_SAMPLE_RATE:--data-sub-sample-rate COLUMNS_FILE:--columns TEST_DATA:--test-data-file \
    BAD_LINES:--bad-lines MAX_MEMORY:--max-memory JOBS:--jobs; do
    name="${pair%%:*}"
    if [ -n "${!name:-}" ]; then options+=("${pair#*:}" "${!name}"); fi
  done
  "$PYTHON" data_utils.py --data-set "$DATA_SET" --raw-data-file "$RAW_DATA" \
    --processed-data-file "$PROCESSED_DATA" "${options[@]}"
}

# A run script that calls another has prepared for both.
if [ -z "${SLIPSTREAM_PREPARED:-}" ]; then
  prepare
  export PYTHON RAW_DATA PROCESSED_DATA HOT_COLD SLIPSTREAM_PREPARED=yes
fi
