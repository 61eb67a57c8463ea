#!/usr/bin/env bash
# Make the committed weights of action detection's laptop preset, action_detection/weights/small.safetensors (float16,
# 4.4 MB).
#   bash scripts/make_swin_weights.sh [--steps 900]
# Needed only to change the small Video Swin. Every run with the same steps on the same machine gives the same weights.
set -euo pipefail
exec bash "$(dirname "$0")/pretrain_task.sh" action_detection "$@"
