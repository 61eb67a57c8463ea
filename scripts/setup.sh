#!/usr/bin/env bash
# Make .venv with everything that the tasks and the tests need (requirements.lock). Done once; a second start only compares a hash.
#   bash scripts/setup.sh            PYTHON=python3.12 bash scripts/setup.sh
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
STAMP="$VENV/setup-stamp"

wanted=$(cat pyproject.toml requirements.lock scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x "$VENV/bin/python" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup.sh: no Python 3.11 or later with venv found (tried: ${PYTHON:-python3.11 python3.12 python3.13 python3})." \
        "Install one, or name it: PYTHON=/path/to/python3.11 bash scripts/setup.sh" >&2
    return 1
}

if [ ! -x "$VENV/bin/python" ]; then
    python=$(find_python)
    echo "setup.sh: creating $VENV with $("$python" -V)"
    "$python" -m venv "$VENV"
fi
echo "setup.sh: installing torch and the rest into $VENV (several GB, a few minutes)"
"$VENV/bin/python" -m pip install --quiet torch==2.14.1 torchvision==0.29.1 -r requirements.lock
"$VENV/bin/python" -m pip install --quiet --no-deps --no-build-isolation -e .
# open3d's wheel loads this library of the system; only .ply and .pcd clouds of one's own need it
if [ "$(uname -s)" = Linux ] && ! ldconfig -p 2>/dev/null | grep -q 'libusb-1\.0'; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get install -y -qq libusb-1.0-0 >/dev/null 2>&1; then
        echo "setup.sh: installed libusb-1.0-0 for open3d"
    else
        echo "setup.sh: to read .ply and .pcd point clouds: sudo apt-get install libusb-1.0-0"
    fi
fi
echo "$wanted" >"$STAMP"
echo "setup.sh: done"
