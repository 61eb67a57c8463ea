#!/usr/bin/env bash
# The table of action detection: ours beside the published numbers; paper-scale rows are predicted, not run.
#   bash scripts/table_action_detection.sh [--dry-run]
set -euo pipefail
exec bash "$(dirname "$0")/table_task.sh" action_detection "$@"
