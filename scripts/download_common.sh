# Sourced by the download scripts once ROOT names the default folder: reads [ROOT] [--dry-run], goes to the repository's
# root. `run` runs a command, or with --dry-run prints it.
set -euo pipefail
DOWNLOAD="common/engine/data/download.py"
DRY_RUN=0

for argument in "$@"; do
  case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    -*) echo "unknown option $argument; known: --dry-run" >&2; exit 2 ;;
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
