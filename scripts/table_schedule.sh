#!/usr/bin/env bash
# The schedule ablation on the laptop preset of action recognition: train its rows, write table and figure.
#   bash scripts/table_schedule.sh [--seeds 0 1 2] [--dry-run]
# A row that this very code and config have already run is skipped. Logic: action_recognition/table_schedule.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
bash scripts/setup.sh
PYTHONPATH="common:." exec "$VENV/bin/python" -m action_recognition.table_schedule --train "$@"
