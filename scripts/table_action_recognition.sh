#!/usr/bin/env bash
# Predict the memory of every paper-scale row of action recognition (status "not run"), then write table and figure.
#   bash scripts/table_action_recognition.sh [--dry-run]
# Rows whose file is in results/ are skipped; delete the file to predict again. About 30 s a row.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
PYTHON=$VENV/bin/python
METHODS=${METHODS:-conventional frozen checkpointed reversible dr2net}
FAMILIES=${FAMILIES:-ssv2_vits ssv2_vitb k400_vits k400_vitb}
DRY_RUN=0
for argument in "$@"; do
    case "$argument" in
    --dry-run) DRY_RUN=1 ;;
    *) echo "unknown option $argument; known: --dry-run" >&2; exit 2 ;;
    esac
done
[ "$DRY_RUN" = 1 ] || bash scripts/setup.sh

for family in $FAMILIES; do
    for method in $METHODS; do
        row="${family}_$method"
        if [ -f "results/action_recognition/$row.json" ]; then
            echo "$row: there already, skipped"
        elif [ "$DRY_RUN" = 1 ]; then
            echo "would run: $PYTHON -m action_recognition.train $row --plan"
        else
            "$PYTHON" -m action_recognition.train "$row" --plan
        fi
    done
done
if [ "$DRY_RUN" = 0 ]; then "$PYTHON" -m dr2net.training.results table action_recognition; fi
