#!/usr/bin/env bash
# Make the weights of the laptop preset of video object segmentation, vos/weights/small.safetensors (float16, 5.8 MB).
#   bash scripts/make_segmenter_weights.sh [--steps 1000 1100 300]
# Needed only to change the small segmenter; takes about 40 minutes on one core. Wants the text encoder that
# `python -m vos.prepare --preset laptop` brings. A run that was killed goes on when the command is repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/python.sh
export PYTHONPATH="common:."
# Threads that spin while they wait make a step ten times slower where another program wants a core.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$PYTHON" -m vos.pretrain "$@"
