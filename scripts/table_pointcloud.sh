#!/usr/bin/env bash
# The table of point clouds: ours beside the published numbers; options as scripts/table_task.sh --help lists them.
#   bash scripts/table_pointcloud.sh [--preset tiny|laptop|paper] [--dry-run]
set -euo pipefail
exec bash "$(dirname "$0")/table_task.sh" pointcloud "$@"
