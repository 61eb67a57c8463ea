#!/usr/bin/env bash
# Set up, prepare the data, train every row of a preset, write the tables and figures.
#   bash scripts/reproduce.sh [task ...] [--preset tiny|laptop|paper] [--dry-run]
# Without a task: every one. A row that this very code and config have already run is skipped. Logic: engine/rows.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
PRESET=tiny
DRY_RUN=()
ALL_TASKS="action_detection vos action_recognition pointcloud detection"

fail() {
    echo "reproduce.sh: $*" >&2
    exit 2
}

tasks=()
while [ $# -gt 0 ]; do
    case "$1" in
    --preset)
        [ $# -ge 2 ] || fail "--preset needs tiny, laptop or paper"
        PRESET=$2
        shift
        ;;
    --dry-run) DRY_RUN=(--dry-run) ;;
    -h | --help)
        sed -n '2,4s/^# \{0,1\}//p' scripts/reproduce.sh
        exit 0
        ;;
    -*) fail "unknown option $1; known: --preset, --dry-run" ;;
    *) tasks+=("$1") ;;
    esac
    shift
done
case "$PRESET" in tiny | laptop | paper) ;; *) fail "no preset '$PRESET'; there are tiny, laptop and paper" ;; esac
there=()
for task in $ALL_TASKS; do
    if [ -f "$task/configs.py" ]; then there+=("$task"); fi
done
[ ${#tasks[@]} -gt 0 ] || tasks=("${there[@]}")
for task in "${tasks[@]}"; do
    [[ " ${there[*]} " == *" $task "* ]] || fail "no task '$task'; there are: ${there[*]}"
done

bash scripts/setup.sh
export PYTHONPATH="common:."
for task in "${tasks[@]}"; do
    "$VENV/bin/python" -m engine.rows "$task" --preset "$PRESET" --train "${DRY_RUN[@]}"
done
echo "reproduce.sh: ${tasks[*]} in $((SECONDS / 60)) min $((SECONDS % 60)) s"
