#!/usr/bin/env bash
# Ref-YouTube-VOS: unpacks the archives that you fetch into ROOT/archives; then a check.
#   bash scripts/download_refytvos.sh [ROOT] [--dry-run]
# Without the archives the script says what to get where. Finished steps are skipped.
set -euo pipefail

ROOT="data/refytvos"
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"

license() {
  cat <<TEXT
Ref-YouTube-VOS is given out for research: signing up at the competition (https://competitions.codalab.org, YouTube-VOS,
track 3) was the step in which its terms were agreed to, and the server is closed. What remains for you to do:
  1. Save into $ARCHIVES
     train.zip              YouTube-VOS 2019, train: the frames and masks (Google Drive 13Eqw0gVK-AO5B-cqvJ203mZ2vzWck9s4)
     valid.zip              YouTube-VOS 2019, valid: the frames (Google Drive 1o586Wjya-f2ohxYf9C1RlRH-gkrzGS8t)
     meta_expressions.zip   the sentences (Google Drive 10PwQmpBGhtob_yDt0yJIAopZZQ_wLa3R)
     valid_masks.zip        the masks of valid, which the author has shared since March 2026 (Google Drive, folder
                            1J45ubR8Y24wQ6dzKOTkfpd9GS_F9A2kb): a folder Annotations with a folder per video;
                            without it valid can be segmented, not scored
  2. Run: bash scripts/download_refytvos.sh $ROOT
TEXT
}

lacking=0
part() {  # NAME FOLDER TARGET
  local archive="$ARCHIVES/$1.zip"
  [ -e "$archive.unpacked" ] && return
  if [ -f "$archive" ]; then run adopt "$archive" "$2" "$ROOT/$3" 128; else lacking=1; fi
}

part train train train
part valid valid valid
part meta_expressions meta_expressions meta_expressions
if [ "$lacking" = 1 ]; then
  license
  [ "$DRY_RUN" = 1 ] || exit 1
fi
part valid_masks Annotations valid/Annotations
run "$PYTHON" -m vos.prepare --kind refytvos --root "$ROOT" --lists "$ROOT/lists"
