#!/usr/bin/env bash
# JHMDB-Sentences, on which models of A2D-Sentences are evaluated: frames, masks, sentences, MTTR's list of the frames
# that count; then a check.
#   bash scripts/download_jhmdb.sh [ROOT] [--dry-run]
# The official site is reported dead: what it does not give, you fetch from a copy. Finished steps are skipped.
set -euo pipefail

ROOT="data/jhmdb"
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
# No checksum is published: the first download's sha256 is kept beside the file, and later ones are held to it.
SITE="${SITE:-http://files.is.tue.mpg.de/jhmdb}"
TEXTS_URL="${TEXTS_URL:-https://kgavrilyuk.github.io/actor_action}"
LIST="jhmdb_sentences_samples_metadata.json"
LIST_URL="${LIST_URL:-https://raw.githubusercontent.com/mttr2021/MTTR/main/datasets/jhmdb_sentences/$LIST}"

license() {
  cat <<TEXT
JHMDB is given out for research (http://jhmdb.is.tue.mpg.de/). Its site did not give $1. What remains for you to do:
  1. Get $1 from one of the copies: Google Drive, file 1xZ3PPqcD32Y36wVLG3SyCS9HQNL6dYmR (all of
     JHMDB-Sentences, named in the issues of ReferDINO), OpenDataLab, or Kaggle.
  2. Save it as $ARCHIVES/$1
  3. Run: bash scripts/download_jhmdb.sh $ROOT
TEXT
}

part() {  # ARCHIVE FOLDER
  local archive="$ARCHIVES/$1"
  [ -e "$archive.unpacked" ] && return
  if [ ! -f "$archive" ] && ! run "$PYTHON" "$DOWNLOAD" fetch "$SITE/$1" "$archive"; then
    license "$1"
    exit 1
  fi
  run adopt "$archive" "$2" "$ROOT/$2"
}

run "$PYTHON" "$DOWNLOAD" fetch "$LIST_URL" "$ROOT/$LIST"
run "$PYTHON" "$DOWNLOAD" fetch "$TEXTS_URL/jhmdb_annotation.txt" "$ROOT/jhmdb_annotation.txt"
part Rename_Images.tar.gz Rename_Images
part puppet_mask.zip puppet_mask
run "$PYTHON" -m vos.prepare --kind jhmdb --root "$ROOT" --lists "$ROOT/lists"
