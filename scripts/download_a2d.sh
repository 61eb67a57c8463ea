#!/usr/bin/env bash
# A2D-Sentences: videos and sentences from their sites, the masks from an archive that you fetch; then a check.
#   bash scripts/download_a2d.sh [ROOT] --accept-license [--dry-run]
# The videos (1.9 GB, about 20 GB unpacked with the frames beside them) "may not be republished in any form without
# written consent"; --accept-license says that you will not. Finished steps are skipped, and an interrupted transfer
# goes on where it stopped.
set -euo pipefail

ROOT="data/a2d"
ACCEPTED=0
words=()
for word in "$@"; do
  if [ "$word" = "--accept-license" ]; then ACCEPTED=1; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
source "$(dirname "${BASH_SOURCE[0]}")/download_common.sh"
# No checksum is published: the first download's sha256 is kept beside the file, and later ones are held to it.
VIDEOS_URL="${VIDEOS_URL:-https://web.eecs.umich.edu/~jjcorso/bigshare/A2D_main_1_0.tar.bz}"
TEXTS_URL="${TEXTS_URL:-https://kgavrilyuk.github.io/actor_action}"
MASKS="a2d_annotation_with_instances"

license() {
  cat <<TEXT
A2D is given out for research: its videos may not be republished in any form without written consent (see
https://web.eecs.umich.edu/~jjcorso/r/a2d/). What remains for you to do:
  1. If you agree: bash scripts/download_a2d.sh $ROOT --accept-license
  2. Open https://kgavrilyuk.github.io/publication/actor_action/, follow the link to the masks of the instances
     (Google Drive, file 14DNamenZsvZnb32NFBNkZCGene5D2oaE) and save them as $ARCHIVES/$MASKS.zip
  3. Run the same command again.
TEXT
}

texts="$ROOT/text_annotations" masks="$ARCHIVES/$MASKS.zip" videos="$ARCHIVES/A2D_main_1_0.tar.bz2"
if [ "$ACCEPTED" = 0 ]; then
  license
  [ "$DRY_RUN" = 1 ] || exit 1
fi
for name in a2d_annotation.txt a2d_missed_videos.txt; do
  run "$PYTHON" "$DOWNLOAD" fetch "$TEXTS_URL/$name" "$texts/$name"
done
if [ ! -e "$videos.unpacked" ]; then
  run "$PYTHON" "$DOWNLOAD" fetch "$VIDEOS_URL" "$videos"
  run adopt "$videos" Release "$ROOT/Release"
fi
if [ ! -e "$masks.unpacked" ]; then
  if [ -f "$masks" ]; then
    run adopt "$masks" "$MASKS" "$texts/$MASKS"
  else
    license
    [ "$DRY_RUN" = 1 ] || exit 1
  fi
fi
run "$PYTHON" -m vos.prepare --kind a2d --root "$ROOT" --lists "$ROOT/lists"
