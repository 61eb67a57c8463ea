"""A list of checksums: written once, in sha256sum's form; then what differs is named."""

import shutil
import subprocess

import pytest

from engine.data.checksums import differing


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "videos").mkdir()
    found = [tmp_path / "videos" / f"{k} é.mp4" for k in range(3)]
    for k, path in enumerate(found):
        path.write_bytes(bytes([k]) * 1000)
    return [str(path) for path in found]


def test_the_first_call_writes_the_list_and_later_ones_name_what_differs(paths, tmp_path):
    file = tmp_path / "sums.txt"
    assert differing(file, tmp_path, paths, workers=1) == {} and file.read_text().count("\n") == 3
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--quiet", "-c", "sums.txt"], cwd=tmp_path, check=True)
    assert differing(file, tmp_path, paths, workers=2) == {}
    content = bytearray((tmp_path / "videos" / "1 é.mp4").read_bytes())
    content[500] ^= 1
    (tmp_path / "videos" / "1 é.mp4").write_bytes(content)
    (tmp_path / "videos" / "new.mp4").write_bytes(b"1")
    found = differing(file, tmp_path, [*paths, str(tmp_path / "videos" / "new.mp4")], workers=1)
    assert [path.rsplit("/", 1)[1] for path in found] == ["1 é.mp4", "new.mp4"]
    changed, new = found.values()
    assert "1 é.mp4: is not the file of" in changed and "new.mp4: is not in" in new and "\n" not in changed + new


@pytest.mark.parametrize("content", ["x\n", "0" * 64, "0" * 63 + "  a\n", "\n"])
def test_a_list_of_another_form_is_named_with_the_line(content, paths, tmp_path):
    (tmp_path / "sums.txt").write_text(content)
    with pytest.raises(ValueError, match="sums.txt: line 1 is not `sha256  name`"):
        differing(tmp_path / "sums.txt", tmp_path, paths, workers=1)
