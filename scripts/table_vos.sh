#!/usr/bin/env bash
# The table of video object segmentation: ours beside published numbers; options as scripts/table_task.sh --help lists them.
#   bash scripts/table_vos.sh [--preset tiny|laptop|paper] [--dry-run]
set -euo pipefail
exec bash "$(dirname "$0")/table_task.sh" vos "$@"
