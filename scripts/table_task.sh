#!/usr/bin/env bash
# Predict the memory of every paper-scale row of a task (status "not run"), then write its table and figures.
#   bash scripts/table_task.sh TASK [--dry-run]
# Rows whose file is in results/ are skipped; delete the file to predict again.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python
TASK=${1:?usage: bash scripts/table_task.sh TASK [--dry-run]}
shift
DRY_RUN=false
for argument in "$@"; do
    case "$argument" in
    --dry-run) DRY_RUN=true ;;
    *) echo "unknown option $argument; known: --dry-run" >&2; exit 2 ;;
    esac
done
bash scripts/setup.sh

rows=$("$PYTHON" -m scripts.rows "$TASK" paper)
while read -r row _; do
    if [ -f "results/$TASK/$row.json" ]; then
        echo "$row: there already, skipped"
    else
        echo "+ $PYTHON -m $TASK.train $row --plan"
        if [ "$DRY_RUN" = false ]; then "$PYTHON" -m "$TASK.train" "$row" --plan </dev/null; fi
    fi
done <<<"$rows"
if [ "$DRY_RUN" = false ]; then "$PYTHON" -m engine.records.tables show "$TASK"; fi
