#!/usr/bin/env bash
# Everything about a GPU in one run of ten minutes: contracts, memory, time, the longest clip; results/gpu/<card>.json and .md.
#   bash scripts/check_gpu.sh [--minutes 8.5] [--parts contracts peaks times parallel clips]
# Where torch sees no CUDA device it says so and ends. PYTHON=FILE takes that interpreter and sets nothing up.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || bash scripts/setup.sh
. scripts/python.sh
export PYTHONPATH="$PWD/common:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"  # else the longest clip is one of fragmentation
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "check_gpu.sh: torch sees no CUDA device here: skipped"
    exit 0
fi
exec "$PYTHON" -m scripts.check_gpu "$@"
