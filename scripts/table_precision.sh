#!/usr/bin/env bash
# Gradient error of float, anchored and exact inversion over a grid of (alpha, beta): table and heat map in results/.
#   bash scripts/table_precision.sh [--dry-run]
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
if [ "${1:-}" = --dry-run ]; then
    echo "+ $VENV/bin/python -m scripts.table_precision"
    exit 0
fi
bash scripts/setup.sh
"$VENV/bin/python" -m scripts.table_precision "$@"
