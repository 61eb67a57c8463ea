#!/usr/bin/env bash
# Make the committed weights of detection's laptop and tiny presets, detection/weights/small.safetensors (float16).
#   bash scripts/make_detector_weights.sh [--minutes 45 | --steps N]
# Needed only to change the small detector. Every run with the same steps on the same machine gives the same weights. A
# run that was killed goes on when the command is repeated.
# The committed ones were made in four parts, each from the weights of the one before; one class from the third on:
#   bash scripts/make_detector_weights.sh --steps 2600 --copies 0 --precision fp32 --output runs/first.safetensors
#   bash scripts/make_detector_weights.sh --steps 2000 --start runs/first.safetensors --output runs/second.safetensors
#   bash scripts/make_detector_weights.sh --one-class --steps 1600 --start runs/second.safetensors --output runs/third.safetensors
#   bash scripts/make_detector_weights.sh --one-class --steps 1000 --start runs/third.safetensors
# In the third, every second scene was a forest, without grain of leaves; the code has moved on since (see git).
set -euo pipefail
exec bash "$(dirname "$0")/pretrain_task.sh" detection "$@"
