#!/usr/bin/env bash
# The table of action recognition: ours beside the published numbers; paper-scale rows are predicted, not run.
#   bash scripts/table_action_recognition.sh [--dry-run]
set -euo pipefail
exec bash "$(dirname "$0")/table_task.sh" action_recognition "$@"
