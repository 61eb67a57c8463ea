#!/usr/bin/env bash
# What the scripts make_*_weights.sh share: they run the pretraining of a task.
#   bash scripts/pretrain_task.sh TASK [OPTIONS of python -m TASK.pretrain]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/python.sh
export PYTHONPATH="common:."
# Threads that spin while they wait make a step ten times slower where another program wants a core.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$PYTHON" -m "$1.pretrain" "${@:2}"
