#!/usr/bin/env bash
# Memory: every paper row of every task, the paper's Fig. 1, 30 seconds of video, curves; results/memory.md and pictures.
#   bash scripts/table_memory.sh [--dry-run] [--force] [--parts PART ...]
# Parts and rows whose file is in results/ are skipped; --force predicts the parts again, not the rows.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
bash scripts/setup.sh
DRY_RUN=()
for argument in "$@"; do
    if [ "$argument" = --dry-run ]; then DRY_RUN=(--dry-run); fi
done
for configs in */configs.py; do
    bash scripts/table_task.sh "$(dirname "$configs")" "${DRY_RUN[@]}"
done
"$VENV/bin/python" -m scripts.table_memory "$@"
