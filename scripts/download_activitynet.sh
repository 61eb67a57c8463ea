#!/usr/bin/env bash
# ActivityNet-1.3: the annotations from the official server, the videos from archives that you request; then a check.
#   bash scripts/download_activitynet.sh [ROOT] [--dry-run]
# The archives belong in ROOT/archives; without them the script says what to request where. Finished steps are skipped,
# and an interrupted transfer goes on where it stopped. Plan for several hundred GB, half of them for the archives.
set -euo pipefail

ROOT="data/activitynet"
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
# The address of the official download page (also the one in MMAction2). The server publishes no checksum: the first
# download's sha256 is kept beside the file, and later ones are held to it.
ANNOTATIONS_URL="${ANNOTATIONS_URL:-http://ec2-52-25-205-214.us-west-2.compute.amazonaws.com/files/activity_net.v1-3.min.json}"
# MD5 as the README of the shared folder lists them (read in a public copy of it). CHECK=0 goes on after a mismatch.
PACKED=(
  "v1-2_train.tar.gz 8510ed0d8ae399b1bda399fd117e7406"
  "v1-2_val.tar.gz 34f0d2b867f188883259b607e68c830f"
  "v1-3_train_val.tar.gz eb0829a2eae2e3f254a0fcb64c6583c4"
)
CHECK="${CHECK:-1}"

license() {
  cat <<TEXT
The videos of ActivityNet belong to their makers and are given out for research. What remains for you to do:
  1. Open http://activity-net.org/download.html and fill in the form for missing videos,
     https://docs.google.com/forms/d/e/1FAIpQLSeKaFq9ZfcmZ7W0B0PbEhfbTHY41GeEgwsa7WobJgGUhn4DTQ/viewform
     (OpenTAD now names another one: .../1FAIpQLSdxhNVeeSCwB2USAfeNWCaI9saVT6i2hpiiizVYfa3MsTyamg/viewform).
     The answer is access to a shared folder (Google Drive or Baidu) for seven days.
  2. Download v1-2_train.tar.gz, v1-2_val.tar.gz and v1-3_train_val.tar.gz into $ARCHIVES
     (release 1.3 adds videos to 1.2, so all three are needed; the test set has no labels), or
     Anet_videos_15fps_short256.zip, the videos at 15 fps and 256 pixels on which OpenTAD trains.
  3. Run: bash scripts/download_activitynet.sh $ROOT
To compare with OpenTAD's numbers you need two files more, both from the folder that its
tools/prepare_data/activitynet/download_annotation.sh fetches (Google Drive, folder 1HwLFaUdrTLkTcx0oKm_z9WPyQiD2moJU):
  - blocked.json, the validation videos left out (4,728 of 4,926 remain): $ROOT/blocked.json, --data.blocked
  - classifiers/cuhk_val_simp_7.json, the outside class scores: $ROOT/class_scores.json
TEXT
}

check_archive() {  # FILE MD5
  local found
  [ -e "$1.checked" ] && return
  found="$(md5sum "$1" | cut -d ' ' -f 1)"
  if [ "$found" != "$2" ]; then
    echo "$1: md5 $found instead of $2: download it again, or go on with CHECK=0" >&2
    [ "$CHECK" = 0 ] || exit 1
  fi
  touch "$1.checked"
}

unpack() {  # ARCHIVE; the videos of all folders in it go to ROOT/videos, others of the same name stay
  local place="$ARCHIVES/unpacked-$(basename "$1")"
  "$PYTHON" "$DOWNLOAD" extract "$1" "$place" 1024
  mkdir -p "$ROOT/videos"
  find "$place" -type f \( -name '*.mp4' -o -name '*.mkv' -o -name '*.webm' \) -exec mv -n -t "$ROOT/videos" {} +
  rm -r "$place"
  touch "$1.unpacked"
}

run "$PYTHON" "$DOWNLOAD" fetch "$ANNOTATIONS_URL" "$ROOT/activity_net.v1-3.min.json"
present=0
for line in "${PACKED[@]}"; do
  read -r name md5 <<<"$line"
  archive="$ARCHIVES/$name"
  [ -e "$archive.unpacked" ] && { present=$((present + 1)); continue; }
  [ -f "$archive" ] || continue
  present=$((present + 1))
  run check_archive "$archive" "$md5"
  run unpack "$archive"
done
small="$ARCHIVES/Anet_videos_15fps_short256.zip"
if [ -f "$small" ] && [ ! -e "$small.unpacked" ]; then run unpack "$small"; fi
if [ "$present" -lt "${#PACKED[@]}" ] && [ ! -e "$small.unpacked" ]; then
  license
  [ "$DRY_RUN" = 1 ] || exit 1
fi
run "$PYTHON" -m action_detection.prepare --kind activitynet --root "$ROOT" --lists "$ROOT/lists"
