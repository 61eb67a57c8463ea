#!/usr/bin/env bash
# THUMOS-14, the 20 classes of temporal detection: annotations, archives, the annotated videos out of them, a check.
#   THUMOS14_PASSWORD=... bash scripts/download_thumos14.sh [ROOT] [--dry-run]
# Interrupt it at will: the same command goes on where it stopped, and finished steps are skipped. The two archives hold
# all 2,584 videos, about 180 GB; the 413 annotated ones are unpacked, and the archives can be deleted afterwards.
set -euo pipefail

ROOT="data/thumos14"
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
SITE="${SITE:-http://crcv.ucf.edu/THUMOS14}"
# The archives of the official page, at the address that AFSD, MMAction2 and others use. No checksums are published: the
# first download's sha256 is kept beside each file, and later ones are held to it.
VIDEOS="${VIDEOS:-https://storage.googleapis.com/thumos14_files}"

TEXTS="$ROOT/official_annotations"

unpack_annotations() {
  local subset
  for subset in validation test; do
    "$PYTHON" "$DOWNLOAD" extract "$ARCHIVES/TH14_Temporal_annotations_$subset.zip" "$TEXTS"
  done
}

unpack_videos() {  # ARCHIVE SUFFIX; only videos with annotations, without their folders; what is there is kept
  local names
  names="$(find "$TEXTS" -name "[A-Z]*_$2.txt" ! -name 'Ambiguous*' -exec cat {} + | awk 'NF {print "*" $1 ".mp4"}' | sort -u)"
  mkdir -p "$ROOT/videos"
  # A status of 11 says that some are not in the archive; the check below names them.
  # shellcheck disable=SC2086  # one pattern a word
  unzip -q -n -j -P "$THUMOS14_PASSWORD" "$1" $names -d "$ROOT/videos" || [ $? = 11 ]
  touch "$1.unpacked"
}

if [ -z "${THUMOS14_PASSWORD:-}" ]; then
  cat <<TEXT
The archives of THUMOS-14 are locked. What remains for you to do:
  1. Open https://www.crcv.ucf.edu/THUMOS14/download.html and fill in the request form there; read its terms: the videos
     are for research, their copyright stays with their makers. The answer holds the password.
  2. Run: THUMOS14_PASSWORD=<it> bash scripts/download_thumos14.sh $ROOT
If you have the videos already, put the annotated ones, video_validation_*.mp4 and video_test_*.mp4, in $ROOT/videos, and
OpenTAD's thumos_14_anno.json (Google Drive, folder 1sGTFuJ-G08sOZi9SHCBR7W3Q8IIryHKN) in $ROOT, then run
  $PYTHON -m action_detection.prepare --kind thumos --root $ROOT
TEXT
  [ "$DRY_RUN" = 1 ] || exit 1
fi

[ "$DRY_RUN" = 1 ] || command -v unzip >/dev/null || { echo "unzip is missing; install it (apt install unzip)" >&2; exit 1; }
for path in Validation_set/TH14_Temporal_annotations_validation.zip test_set/TH14_Temporal_annotations_test.zip; do
  run "$PYTHON" "$DOWNLOAD" fetch "$SITE/$path" "$ARCHIVES/$(basename "$path")"
done
run unpack_annotations
for pair in "TH14_validation_set_mp4.zip val" "TH14_Test_set_mp4.zip test"; do
  read -r name suffix <<<"$pair"
  [ -e "$ARCHIVES/$name.unpacked" ] && continue
  run "$PYTHON" "$DOWNLOAD" fetch "$VIDEOS/$name" "$ARCHIVES/$name"
  run unpack_videos "$ARCHIVES/$name" "$suffix"
done
options=()
[ -f "$ROOT/thumos_14_anno.json" ] || options=(--thumos-annotations "$TEXTS")
run "$PYTHON" -m action_detection.prepare --kind thumos --root "$ROOT" --lists "$ROOT/lists" "${options[@]}"
