#!/usr/bin/env bash
# COCO 2017 for detection: the pictures of train and val and their boxes, unpacked and checked.
#   bash scripts/download_coco.sh [ROOT] [--dry-run]
# No form, no password. 20.4 GB are fetched and as much again unpacked; PARTS="val annotations" leaves the training
# pictures (19.3 GB) out. Interrupt it at will: the same command goes on where it stopped, and finished steps are
# skipped. The archives can be deleted afterwards; what stands beside them says that they were unpacked. The annotations
# are under CC BY 4.0, the pictures under the terms of Flickr: https://cocodataset.org/#termsofuse
set -euo pipefail

ROOT="data/coco"
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
SITE="${SITE:-http://images.cocodataset.org}"  # its certificate is that of the storage behind it: plain http, and MD5
PARTS="${PARTS:-annotations val train}"
# Bytes and MD5 as several public installers list them; the site publishes none.
ANNOTATIONS="${ANNOTATIONS:-252907541 f4bbac642086de4f52a3fdda2de5fa2c}"
VAL="${VAL:-815585330 442b8da7639aecaf257c1dceb8ba8c80}"
TRAIN="${TRAIN:-19336861798 cced6f7f71b7629ddf16f17bbcfab6b2}"

unpack() {  # ARCHIVE
  "$PYTHON" "$DOWNLOAD" extract "$1" "$ROOT"
  touch "$1.unpacked"
}

for part in $PARTS; do
  case "$part" in
    annotations) path="annotations/annotations_trainval2017.zip" known="$ANNOTATIONS" ;;
    val) path="zips/val2017.zip" known="$VAL" ;;
    train) path="zips/train2017.zip" known="$TRAIN" ;;
    *) echo "PARTS has $part; known: annotations val train" >&2; exit 2 ;;
  esac
  archive="$ARCHIVES/$(basename "$path")"
  [ -e "$archive.unpacked" ] && continue
  read -r size md5 <<<"$known"
  run "$PYTHON" "$DOWNLOAD" fetch "$SITE/$path" "$archive" "$size" "$md5"
  run unpack "$archive"
done
run "$PYTHON" -m detection.prepare --kind coco --root "$ROOT" --lists "$ROOT/lists"
