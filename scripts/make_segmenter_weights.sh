#!/usr/bin/env bash
# Make the weights of the laptop preset of video object segmentation, vos/weights/small.safetensors (float16, 5.8 MB).
#   bash scripts/make_segmenter_weights.sh [--steps 1000 1100 300]
# Needed only to change the small segmenter; takes about 40 minutes on one core. Wants the text encoder that
# `python -m vos.prepare --preset laptop` brings. A run that was killed goes on when the command is repeated.
set -euo pipefail
exec bash "$(dirname "$0")/pretrain_task.sh" vos "$@"
