#!/usr/bin/env bash
# Set up, lint, check types, test. Arguments go to pytest:  bash scripts/test.sh common/tests/test_memory.py -k predicted
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
export VENV OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

bash scripts/setup.sh
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
"$VENV/bin/python" -m mypy
exec "$VENV/bin/python" -m pytest --durations=10 "$@"
