"""Damage that decoders conceal: found where each frame is decoded strictly, or by the checksums of a container."""

import numpy as np
import pytest
from toy_video import NUM_FRAMES, numbers, write

from engine.data.damage import damage, damaged_videos
from engine.data.video import BrokenVideo, probe, read_frames
from scripts.mutate_files import SOURCES


@pytest.mark.parametrize("suffix", SOURCES)
def test_a_video_with_flipped_bits_is_named_or_its_frames_are_right(suffix, tmp_path):
    content = write(tmp_path / f"whole.{suffix}", *SOURCES[suffix]).read_bytes()
    path, rng, concealed = tmp_path / f"a.{suffix}", np.random.default_rng(0), 0
    for _ in range(30):
        changed = bytearray(content)
        for place in rng.integers(len(content), size=3):
            changed[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        said = damage(str(path))
        assert said == "" or (f"a.{suffix}: " in said and "\n" not in said)
        try:
            right = numbers(read_frames(path, range(NUM_FRAMES))) == list(range(NUM_FRAMES))
        except (BrokenVideo, ValueError):  # other frames are asked for than it has
            continue
        assert right or said
        concealed += not right
    # Matroska's checksums show it to every reader.
    assert concealed == 0 if suffix == "mkv" else concealed > 0


def test_a_block_of_an_unknown_track_is_damage(tmp_path):
    path = write(tmp_path / "a.webm", "libvpx-vp9", {"deadline": "realtime", "g": "8"})
    content = bytearray(path.read_bytes())
    block = content.index(b"\xa3", content.index(b"\x1f\x43\xb6\x75"))
    assert content[block + 2] == 0x81  # track 1
    content[block + 2] = 0x85
    path.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"a.webm: .*the frames from byte \d+ on are damaged"):
        probe(path)


def test_frames_of_vp9_that_go_back_in_time_are_damage(tmp_path):
    path = write(tmp_path / "a.webm", "libvpx-vp9", {"deadline": "realtime", "g": "8"})
    content = bytearray(path.read_bytes())
    blocks, at = [], content.index(b"\x1f\x43\xb6\x75")
    while (at := content.find(b"\x81\x00", at + 1)) > 0:
        if content[at + 3] in (0x00, 0x80) and content[at - 2] == 0xA3:  # track 1, a small time, flags
            blocks.append(at)
    first, second = blocks[1:3]
    content[first + 1 : first + 3], content[second + 1 : second + 3] = (
        content[second + 1 : second + 3],
        content[first + 1 : first + 3],
    )
    path.write_bytes(content)
    with pytest.raises(BrokenVideo, match=r"a.webm: is damaged: frame \d+ is to be shown before the one before it"):
        probe(path)


def test_only_unusable_files_are_listed_each_by_its_path(tmp_path):
    good, bad = str(write(tmp_path / "good.mp4", "libx264", {})), str(tmp_path / "bad.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    found = damaged_videos([good, bad, good], workers=1, title="decoding")
    assert list(found) == [bad] and "bad.mp4: is not a readable video" in found[bad]
