#!/usr/bin/env bash
# S3DIS 1.2, not aligned: the terms, the archive (5.1 GB), its size, the rooms, a check.
#   bash scripts/download_s3dis.sh [ROOT] --accept-license [--dry-run]
# Interrupt it at will: the same command goes on where it stopped, and finished steps are skipped.
set -euo pipefail

ROOT="data/s3dis"
ACCEPTED=0
words=()
for word in "$@"; do
  if [ "$word" = "--accept-license" ]; then ACCEPTED=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
NAME="Stanford3dDataset_v1.2"
# The address that current projects name as the official one; the older site is gone. No checksum is published: the
# first download's sha256 is kept beside the file, and later ones are held to it.
URL="${URL:-https://cvg-data.inf.ethz.ch/s3dis/$NAME.zip}"
BYTES="${BYTES:-5149528258}"

if [ "$ACCEPTED" = 0 ]; then
  "$PYTHON" -m pointcloud.prepare --kind s3dis --root "$ROOT" --download --dry-run
  [ "$DRY_RUN" = 1 ] || exit 1
fi
if [ ! -d "$ROOT/Area_6" ]; then
  run "$PYTHON" "$DOWNLOAD" fetch "$URL" "$ARCHIVES/$NAME.zip"
  if [ "$DRY_RUN" = 0 ] && [ "$(stat -c %s "$ARCHIVES/$NAME.zip")" != "$BYTES" ]; then
    echo "$ARCHIVES/$NAME.zip has $(stat -c %s "$ARCHIVES/$NAME.zip") bytes, not $BYTES: another version, or cut;" \
      "remove it and run this again" >&2
    exit 1
  fi
  run "$PYTHON" "$DOWNLOAD" extract "$ARCHIVES/$NAME.zip" "$ROOT/unpacked" 60
  for area in Area_1 Area_2 Area_3 Area_4 Area_5 Area_6; do  # some may stand there already, if this was interrupted
    [ -d "$ROOT/$area" ] || run mv "$ROOT/unpacked/$NAME/$area" "$ROOT/"
  done
  run rm -r "$ROOT/unpacked"
fi
run "$PYTHON" -m pointcloud.prepare --kind s3dis --root "$ROOT"
