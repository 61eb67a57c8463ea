#!/usr/bin/env bash
# Make the committed weights of the tiny preset, action_recognition/weights/tiny.safetensors (float16, 3 MB).
#   bash scripts/make_tiny_weights.sh [--steps 1200]
# Needed only to change the tiny network. Every run with the same steps on the same machine gives the same weights.
set -euo pipefail
exec bash "$(dirname "$0")/pretrain_task.sh" action_recognition "$@"
