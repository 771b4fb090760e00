# shellcheck shell=bash
# Sourced by the data sets' recipes: takes the method off the command line, then `recipe FLAGS "$@"`
# trains by it; without a method it preprocesses, with --raw-data-file and --processed-data-file where
# given, and other flags of data_utils.py. Expects DATA_SET, RAW_DATA's default, and `source_of`, where
# to get the log, to be set in between.

here="$(cd "$(dirname "$0")/.." && pwd)"
usage="usage: $0 [baseline|fae|slipstream] [flags]"
script=""
case "${1:-}" in
  baseline) script=run_dlrm_baseline.sh ;;
  fae) script=run_fae_baseline.sh ;;
  slipstream) script=run_slipstream.sh ;;
  "" | --*) ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
if [ -n "$script" ]; then shift; fi

# What data_utils.py gets, of the flags of a recipe without a method.
preprocess_flags=()
take_files() {
  local name
  while [ $# -gt 0 ]; do
    name="${1%%=*}"
    case "${name//_/-}" in
      --raw-data-file | --processed-data-file)
        if [ "$1" = "$name" ]; then
          if [ $# -lt 2 ]; then
            echo "$0: error: $1: expected a path" >&2
            exit 2
          fi
          set -- "$1=$2" "${@:3}"
        fi
        if [ "${name//_/-}" = --raw-data-file ]; then RAW_DATA="${1#*=}"; else PROCESSED_DATA="${1#*=}"; fi
        ;;
      *) preprocess_flags+=("$1") ;;
    esac
    shift
  done
}

recipe() {
  if [ -z "$script" ]; then
    # The recipe's flags are the trainers'; the caller's are what was on the command line.
    take_files "${called[@]}"
  fi
  if [ ! -e "$RAW_DATA" ] && ! compgen -G "${RAW_DATA}_*" >/dev/null; then
    echo "$0: error: $RAW_DATA is not there: get it from ${source_of:-}, or name another by RAW_DATA or" \
      "--raw-data-file (which goes without a method)" >&2
    exit 2
  fi
  if [ -n "$script" ]; then exec "$here/$script" "$@"; fi
  # shellcheck source=bench/prepare.sh
  source "$here/bench/prepare.sh"
}
called=("$@")
