#!/usr/bin/env bash
# Something-Something v2: unpack what the license lets you download by hand, bring it to its layout, check it.
#   bash scripts/download_ssv2.sh [ROOT] [--dry-run]
# The archives belong in ROOT/archives; without them the script says what to request where. Finished steps are skipped.
set -euo pipefail

ROOT="data/ssv2"
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
PARTS=(20bn-something-something-v2-00 20bn-something-something-v2-01)
LABELS="20bn-something-something-download-package-labels.zip"

VIDEOS="$ROOT/20bn-something-something-v2"

unpack_videos() {
  # The parts are one gzipped tar, cut in pieces.
  "$PYTHON" "$DOWNLOAD" extract-pieces "$ROOT" "${PARTS[@]/#/$ARCHIVES/}"
  touch "$VIDEOS/.complete"
}

unpack_labels() {
  "$PYTHON" common/engine/data/download.py extract "$ARCHIVES/$LABELS" "$ARCHIVES/labels"
  local split file
  for split in train validation labels test; do
    file="$(find "$ARCHIVES/labels" -name "$split.json" -o -name "something-something-v2-$split.json" | head -n 1)"
    if [ -n "$file" ]; then cp "$file" "$ROOT/something-something-v2-$split.json"; fi
  done
}

missing=0
if [ ! -e "$VIDEOS/.complete" ]; then
  for part in "${PARTS[@]}"; do [ -f "$ARCHIVES/$part" ] || missing=1; done
fi
if [ ! -f "$ROOT/something-something-v2-labels.json" ] && [ ! -f "$ARCHIVES/$LABELS" ]; then missing=1; fi
if [ "$missing" = 1 ]; then
  "$PYTHON" -m action_recognition.prepare --kind ssv2 --root "$ROOT" --download --dry-run
  [ "$DRY_RUN" = 1 ] || exit 1
fi

[ -e "$VIDEOS/.complete" ] || run unpack_videos
[ -f "$ROOT/something-something-v2-labels.json" ] || run unpack_labels
run "$PYTHON" -m action_recognition.prepare --kind ssv2 --root "$ROOT"
