#!/usr/bin/env bash
# Set up, prepare the data, train every row of a preset, write the table and the figure.
#   bash scripts/reproduce.sh [task ...] [--preset tiny|laptop|paper] [--dry-run]
# Without a task: every finished one. A row that this very code and config have already run is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PRESET=tiny
DRY_RUN=false
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
    --dry-run) DRY_RUN=true ;;
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
if [ ${#tasks[@]} -eq 0 ]; then
    for task in $ALL_TASKS; do
        if [ -f "$task/configs.py" ]; then tasks+=("$task"); fi
    done
fi
for task in "${tasks[@]}"; do
    [ -f "$task/configs.py" ] || fail "no task '$task'; there are: $(ls -d $(printf '%s/configs.py ' $ALL_TASKS) 2>/dev/null | xargs -n1 dirname | xargs)"
done

export VENV
bash scripts/setup.sh
python="$VENV/bin/python"

run() {
    echo "+ $*"
    if [ "$DRY_RUN" = false ]; then "$@"; fi
}

prepare() { # task, flags of the rows' data
    if [ "$PRESET" != paper ]; then
        run "$python" -m "$1.prepare" --tiny
        return
    fi
    local flags missing=false
    while read -r flags; do
        # shellcheck disable=SC2086 # flags are words
        run "$python" -m "$1.prepare" $flags || missing=true
    done <<<"$2"
    if [ "$missing" = true ]; then
        fail "the data of $1 is not complete; what is missing stands above, $1/README.md says how to get it"
    fi
}

for task in "${tasks[@]}"; do
    rows=$("$python" -m scripts.rows "$task" "$PRESET")
    [ -n "$rows" ] || fail "$task has no rows at the preset $PRESET"
    if grep -q ' open ' <<<"$rows"; then
        prepare "$task" "$(cut -d' ' -f4- <<<"$rows" | sort -u)"
    fi
    while read -r row seed state _; do
        if [ "$state" = finished ]; then
            echo "$row seed $seed: finished, skipped"
        else
            run "$python" -m "$task.train" "$row" --seed "$seed" </dev/null
        fi
    done <<<"$rows"
    run "$python" -m engine.records.tables publish "$task"
done
