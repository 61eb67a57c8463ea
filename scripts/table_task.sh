#!/usr/bin/env bash
# The table of a task: ours beside the published numbers.
#   bash scripts/table_<task>.sh [--preset tiny|laptop|paper] [--train] [--seeds 0 1] [--dry-run]
# Default: the paper's rows, whose memory is predicted (status "not run"). Tiny and laptop rows are trained; paper rows
# too with --train, which takes the data set and GPUs. What is finished is skipped. Logic: engine/rows.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
TASK=${1:?usage: bash scripts/table_task.sh TASK [--preset P] [--train] [--dry-run]}
shift
case "${1:-}" in
-h | --help)
    sed -n '2,5s/^# \{0,1\}//p' scripts/table_task.sh
    exit 0
    ;;
esac
bash scripts/setup.sh
PYTHONPATH="common:." exec "$VENV/bin/python" -m engine.rows "$TASK" "$@"
