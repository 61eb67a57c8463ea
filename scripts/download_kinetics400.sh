#!/usr/bin/env bash
# Kinetics-400 from the mirror of the Common Visual Data Foundation: lists, archives, unpacking, check. About 450 GiB.
#   bash scripts/download_kinetics400.sh [ROOT] [--dry-run]
# Interrupt it at will: the same command goes on where it stopped, and finished archives are skipped.
# The clips are cut from public web videos; their copyright stays with their makers. Use them under the terms of the
# annotations (CC BY 4.0) and of the videos.
set -euo pipefail

ROOT="data/kinetics400"
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
SPLITS="${SPLITS:-train val}"
OPTIONS=()
[ "$DRY_RUN" = 0 ] || OPTIONS=(--dry-run)

# shellcheck disable=SC2086  # SPLITS is a list of words
exec "$PYTHON" -m action_recognition.prepare --kind kinetics --root "$ROOT" --download --splits $SPLITS "${OPTIONS[@]}"
