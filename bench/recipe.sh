# shellcheck shell=bash
# Sourced by the data sets' recipes: takes the method off the command line, then `recipe FLAGS "$@"`
# trains by it. Expects DATA_SET and RAW_DATA's default to be set in between.

here="$(cd "$(dirname "$0")/.." && pwd)"
usage="usage: $0 baseline|fae|slipstream [flags of the trainer]"
case "${1:-}" in
  baseline) script=run_dlrm_baseline.sh ;;
  fae) script=run_fae_baseline.sh ;;
  slipstream) script=run_slipstream.sh ;;
  *)
    echo "$usage" >&2
    exit 2
    ;;
esac
shift

recipe() {
  exec "$here/$script" "$@"
}
