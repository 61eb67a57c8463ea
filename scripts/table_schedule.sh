#!/usr/bin/env bash
# The schedule ablation on the laptop preset of action recognition: train its rows, write table and figure.
#   bash scripts/table_schedule.sh [--seeds "0 1 2"] [--dry-run]
# A row that this very code and config have already run is skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
SEEDS="0 1 2"
DRY_RUN=false

fail() {
    echo "table_schedule.sh: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case "$1" in
    --seeds)
        [[ "${2:-}" =~ ^[0-9]+(\ [0-9]+)*$ ]] || fail "--seeds needs numbers, such as --seeds \"0 1 2\""
        SEEDS=$2
        shift
        ;;
    --dry-run) DRY_RUN=true ;;
    -h | --help)
        sed -n '2,4s/^# \{0,1\}//p' scripts/table_schedule.sh
        exit 0
        ;;
    *) fail "unknown option $1; known: --seeds, --dry-run" ;;
    esac
    shift
done

bash scripts/setup.sh
python="$VENV/bin/python"

run() {
    echo "+ $*"
    if [ "$DRY_RUN" = false ]; then "$@"; fi
}

# shellcheck disable=SC2086 # seeds are words
rows=$("$python" -m action_recognition.table_schedule --list $SEEDS)
if grep -q ' open$' <<<"$rows"; then
    run "$python" -m action_recognition.prepare --tiny
fi
while read -r row seed state; do
    if [ "$state" = finished ]; then
        echo "$row seed $seed: finished, skipped"
    else
        run "$python" -m action_recognition.train "$row" --seed "$seed" </dev/null
    fi
done <<<"$rows"
run "$python" -m engine.records.tables publish action_recognition
run "$python" -m action_recognition.table_schedule
