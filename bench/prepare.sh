# shellcheck shell=bash
# Sourced by the run scripts: finds a Python, a raw log, and preprocesses it. Sets and exports
#   PYTHON           an interpreter that can import what is needed; made in .venv where there is none
#   RAW_DATA         the raw log. Not set: input/kaggle/train.txt where it exists, else a synthetic log
#   PROCESSED_DATA   the processed .npz. Set without RAW_DATA: used as it is, nothing is preprocessed
#   HOT_COLD         the segregated folder; of OPTIMIZER=sgd, whose rows are smaller, one of its own
#   more             an array: the trainers' flags that follow from LEARNING_RATE, PROCESSES and DATA_SET
# and SLIPSTREAM_LOCKS, by which two runs that use the same files take turns: see `hold`. `say_current`
# says in one line what its stages found up to date.
# It reads, where set: DATA_SET (kaggle, terabyte, avazu, taobao, custom), COLUMNS_FILE (custom's
# column file), TEST_DATA (a log of held-out rows), SPLIT (last-day, random:SEED, none), MAX_IND_RANGE,
# MIN_COUNT, HISTORY (taobao: clicks before, as sequences), DATA_SUB_SAMPLE_RATE, NUM_DAYS, BAD_LINES
# (stop, skip:N), MAX_MEMORY (of preprocessing, as 2G), JOBS (files read at once), SYNTHETIC_ROWS (rows
# of the synthetic log), EMB_DIM (values of an embedding row), OPTIMIZER (rwsadagrad, sgd),
# LEARNING_RATE (of the rows), PROCESSES (that train together), VERBOSE (1 or true, as --verbose: also
# tables that are else in reports). Relative paths in these variables start where the script was called;
# those of SYNTHETIC_DIR and of flags at the repository, which it goes to.

# What cannot be said (`| head -1`, a full disk under `> file`) does not end the run.
trap '' PIPE

# A run script that calls another has prepared for both, and says so by its number.
is_prepared=""
if [ "${SLIPSTREAM_PREPARED:-}" = "$PPID" ]; then is_prepared=yes; fi

if [ -z "$is_prepared" ]; then
  for name in RAW_DATA TEST_DATA COLUMNS_FILE PROCESSED_DATA HOT_COLD; do
    if [ -z "${!name:-}" ]; then continue; fi
    if [[ "${!name}" == /dev/fd/* ]] || { [ -e "${!name}" ] && [ ! -f "${!name}" ] && [ ! -d "${!name}" ]; }; then
      echo "$0: error: $name=${!name} is a pipe or a device; expected a regular file or a folder: it is read" \
        "more than once (a packed log is read as it is)" >&2
      exit 2
    fi
    declare "$name=$(realpath -ms -- "${!name}")" # links stay: input may be one
  done
  # A virtual environment's interpreter is a link. A bare name is looked up.
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
if [ -n "${PROCESSES:-}" ]; then more+=(--processes "$PROCESSES"); fi
# Of Taobao's few columns each vector meets itself, too: AUC 0.85 for 0.83 (bench/README.md).
if [ "$DATA_SET" = taobao ] && [ "${HISTORY:-0}" = 0 ]; then more+=(--arch-interaction-itself true); fi
hot_cold=hot_cold
if [ "$OPTIMIZER" != rwsadagrad ]; then hot_cold="hot_cold_$OPTIMIZER"; fi

# shellcheck source=bench/python.sh
source bench/python.sh

# The trainer would preprocess a log that a flag names into the file of the one that is named here.
model=""
if [ -z "${preprocess_flags+set}" ]; then
  flag=""
  for word in "$@"; do
    case "$flag:$word" in
      --verbose:[!-]*) VERBOSE="$word" ;;
      --save-model:[!-]*) model="$word" ;;
    esac
    flag="${word%%=*}"
    flag="${flag//_/-}"
    case "$flag" in
      --raw-data-file | --processed-data-file)
        say "$0: error: ${word%%=*}: name the log by RAW_DATA, or a processed file by PROCESSED_DATA" >&2
        exit 2
        ;;
      --verbose) if [ "$flag" = "$word" ]; then VERBOSE=true; else VERBOSE="${word#*=}"; fi ;;
      --save-model) if [[ "$word" == *=* ]]; then model="${word#*=}"; fi ;;
    esac
  done
  export VERBOSE="${VERBOSE:-}"
fi

# Before minutes of installation: what the scripts would refuse after it.
check_path() { # name of a variable
  if [ -e "${!1}" ] || { [ "$DATA_SET" = terabyte ] && compgen -G "${!1}*" >/dev/null; }; then
    return
  fi
  say "$0: error: $1=${!1} does not exist; check the path" >&2
  exit 2
}

# What a stage has written is not replaced before a later one has opened it: the first one locks the
# folders of these files, the trainer unlocks them (slipstream/tools/locks.py). Another run waits.
hold() { # files
  local file folder descriptor
  SLIPSTREAM_LOCKS=""
  for file in "$@"; do
    folder="$(dirname "$(realpath -m -- "$file")")"
    # Where it cannot be made, or read, the stage that writes there says so.
    if mkdir -p "$folder" 2>/dev/null && [ -r "$folder" ]; then
      exec {descriptor}<"$folder"
      SLIPSTREAM_LOCKS+=" $descriptor"
    fi
  done
  export SLIPSTREAM_LOCKS
}

# Stages write there what they find up to date (slipstream/tools/output.py).
collect_current() {
  local file
  if ! file="$(mktemp 2>/dev/null)"; then return; fi # each says it by itself
  exec {SLIPSTREAM_CURRENT}>"$file"
  exec {current}<"$file"
  rm -f "$file"
  export SLIPSTREAM_CURRENT
}

say_current() {
  if [ -n "$is_prepared" ] || [ -z "${current:-}" ]; then return; fi
  local names
  mapfile -t -u "$current" names
  exec {current}<&- {SLIPSTREAM_CURRENT}>&-
  unset SLIPSTREAM_CURRENT
  if [ "${#names[@]}" -gt 0 ]; then say "up to date: $(printf '%s\n' "${names[@]}" | paste -sd , | sed 's/,/, /g')"; fi
}

# What the trainer of a first run says last: commands for the repository.
propose() { # the script's words
  local script paper="" control="" keep="--save-model runs/mine/model  # keeps the model: predict.py scores rows"
  script="./$(basename "$0")"
  if [[ " $* " == *" --paper "* ]]; then paper=" --paper"; fi
  if [ "$script" = ./run_slipstream.sh ] && [[ " $* " != *" --drop"[-_]"policy"* ]]; then
    control="$script$paper --drop-policy random  # the control: as many inputs dropped, at random"$'\n      '
  fi
  keep="$script$paper $keep"
  if [ -n "$model" ]; then keep="$PYTHON predict.py --load-model $model --raw-data-file $RAW_DATA --output scores.csv"; fi
  export SLIPSTREAM_NEXT="next: $control$keep
      $PYTHON -m bench.report runs --output runs/report.html  # all runs on one page
      RAW_DATA=path/to/train.txt $script  # your own log; formats: docs/data.md"
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
    hold "$PROCESSED_DATA" "$HOT_COLD"
    say "No RAW_DATA given: using $PROCESSED_DATA as it is"
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
      say "$0: set RAW_DATA to the log of DATA_SET=$DATA_SET (see docs/data.md)" >&2
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
      "$PWD"/input/*/*)
        folder="$(dirname "$(realpath -ms -- "$RAW_DATA")")"
        folder="${folder#"$PWD"/input/}"
        ;;
      "$PWD"/input/*) ;;
      # Of two logs elsewhere, in folders of the same name, neither replaces the other's file.
      *) folder="$folder-$(printf %s "$RAW_DATA" | cksum | cut -d ' ' -f 1)" ;;
    esac
    PROCESSED_DATA="input/$folder/${name}_processed.npz"
    if [ -n "$synthetic" ]; then PROCESSED_DATA="$SYNTHETIC_DIR/train_processed.npz"; fi
  fi
  if [ ! -f "$PROCESSED_DATA" ]; then modules+=(polars); fi # it reads raw logs
  find_python "${modules[@]}"
  HOT_COLD="${HOT_COLD:-$(dirname "$PROCESSED_DATA")/$hot_cold}"
  hold "$PROCESSED_DATA" "$HOT_COLD" ${synthetic:+"$RAW_DATA"}
  if [ -n "$synthetic" ]; then
    if [ ! -f "$PROCESSED_DATA" ] || [ ! -d runs ]; then propose "$@"; fi
    say "No RAW_DATA given: using a SYNTHETIC log of $SYNTHETIC_ROWS rows, $RAW_DATA"
    "$PYTHON" bench/synthetic_log.py --rows "$SYNTHETIC_ROWS" --output "$RAW_DATA"
  fi
  mkdir -p "$(dirname "$PROCESSED_DATA")"
  local pair
  for pair in MAX_IND_RANGE:--max-ind-range MIN_COUNT:--min-count HISTORY:--history \
    NUM_DAYS:--num-days SPLIT:--split \
    DATA_SUB_SAMPLE_RATE:--data-sub-sample-rate COLUMNS_FILE:--columns TEST_DATA:--test-data-file \
    BAD_LINES:--bad-lines MAX_MEMORY:--max-memory JOBS:--jobs VERBOSE:--verbose; do
    name="${pair%%:*}"
    if [ -n "${!name:-}" ]; then options+=("${pair#*:}" "${!name}"); fi
  done
  "$PYTHON" data_utils.py --data-set "$DATA_SET" --raw-data-file "$RAW_DATA" \
    --processed-data-file "$PROCESSED_DATA" "${options[@]}"
}

if [ -z "$is_prepared" ]; then
  collect_current
  prepare "$@"
  export PYTHON RAW_DATA PROCESSED_DATA HOT_COLD SLIPSTREAM_PREPARED=$$
fi
