#!/usr/bin/env bash
# Make the committed weights of the tiny preset: pretrain the row shapes_tiny_pretrain, keep its backbone as float16.
#   bash scripts/make_tiny_weights.sh
# Writes action_recognition/weights/tiny.safetensors (under 4 MB). Needed only to change the tiny network.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
RUNS=${RUNS:-runs}
export PYTHONPATH="common:."

"$VENV/bin/python" -m action_recognition.prepare --tiny --variant shapes
"$VENV/bin/python" -m action_recognition.train shapes_tiny_pretrain --run.output "$RUNS"
"$VENV/bin/python" - "$RUNS/action_recognition/shapes_tiny_pretrain/seed0/checkpoint" <<'PYTHON'
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dr2net.training.checkpoint import load

target = Path("action_recognition/weights/tiny.safetensors")
weights = load(Path(sys.argv[1])).tensors["model"]
backbone = {
    name.removeprefix("backbone."): value.to(torch.float16)
    for name, value in weights.items()
    if name.startswith("backbone.")
}
target.parent.mkdir(exist_ok=True)
save_file(backbone, target)
print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
PYTHON
