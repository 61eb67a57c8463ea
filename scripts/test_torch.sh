#!/usr/bin/env bash
# The core's tests with another version of torch, in a virtual environment of its own (.venv-torch-VERSION, some GB);
# what does not come with torch has the versions of requirements.lock. Further arguments go to pytest.
#   bash scripts/test_torch.sh 2.6.0 0.21.0            bash scripts/test_torch.sh 2.9.1 0.24.1 -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
    echo "test_torch.sh: name the versions of torch and torchvision: bash scripts/test_torch.sh 2.6.0 0.21.0" >&2
    exit 2
fi
torch=$1 torchvision=$2
shift 2
VENV=${VENV:-.venv-torch-$torch}
PYTHON=${PYTHON:-python3.11}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}

if [ ! -e "$VENV/ready" ]; then
    "$PYTHON" -m venv "$VENV"
    grep -vE '^(torch|torchvision|triton|sympy|nvidia-|cuda-|setuptools)' requirements.lock >"$VENV/constraints.txt"
    "$VENV/bin/python" -m pip install --quiet -c "$VENV/constraints.txt" "torch==$torch" "torchvision==$torchvision" \
        accelerate hypothesis matplotlib packaging peft pytest pytorch-lightning pytorchvideo pyyaml safetensors scipy \
        timm transformers
    touch "$VENV/ready"
fi
PYTHONPATH=common:. exec "$VENV/bin/python" -m pytest common/tests/core "$@"
