# Sourced in the repository's root: PYTHON, or else the one of VENV (.venv), must be there.
set -euo pipefail
PYTHON="${PYTHON:-${VENV:-.venv}/bin/python}"
command -v "$PYTHON" >/dev/null || {
  echo "$0: there is no $PYTHON: run bash scripts/setup.sh, or name another with VENV=FOLDER or PYTHON=FILE" >&2
  exit 1
}
