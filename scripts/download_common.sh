# Sourced by the download scripts once ROOT names the default folder: reads [ROOT] [--dry-run], goes to the repository's
# root. `run` runs a command, or with --dry-run prints it.
set -euo pipefail
DOWNLOAD="common/engine/data/download.py"
DRY_RUN=0

for argument in "$@"; do
  case "$argument" in
    -h|--help) sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --dry-run) DRY_RUN=1 ;;
    -*) echo "unknown option $argument; --help lists the options" >&2; exit 2 ;;
    *) ROOT="$argument" ;;
  esac
done

ROOT="$(realpath -m "$ROOT")"
ARCHIVES="$ROOT/archives"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/python.sh
export PYTHONPATH="common:."

run() {
  if [ "$DRY_RUN" = 1 ]; then printf 'would run:'; printf ' %q' "$@"; printf '\n'; else "$@"; fi
}

adopt() {  # ARCHIVE NAME TARGET [MAX_GIB]: unpack, and move what the folder NAME in it holds, however deep, to TARGET
  local place found
  place="$ARCHIVES/unpacked-$(basename "$1")"
  "$PYTHON" "$DOWNLOAD" extract "$1" "$place" "${4:-64}"
  found="$(find "$place" -type d -name "$2" -print -quit)"
  [ -n "$found" ] || { echo "$1: has no folder $2; is it the right archive?" >&2; exit 1; }
  mkdir -p "$3"
  find "$found" -mindepth 1 -maxdepth 1 -exec mv -n -t "$3" {} +
  rm -r "$place"
  touch "$1.unpacked"
}
