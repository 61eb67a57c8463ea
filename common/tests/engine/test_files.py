"""Text and JSON files that are not what they should be: one line with the file's name, at once."""

import os
import re
from pathlib import Path

import numpy as np
import pytest

from engine.data.video import write_video
from engine.files import appearing, make_folder, read_csv, read_json, read_text

BAD = {
    "not JSON": (b"{", "cannot be read as JSON"),
    "empty": (b"", "cannot be read as JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "is not in UTF-8 .* at byte 7"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not in UTF-8"),
    "nested": (b"[" * 100_000 + b"]" * 100_000, "is nested too deep"),
    "nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is nested too deep"),
    "a long number": (b'{"a": ' + b"9" * 400 + b"}", "the number 999999999999... has 400 digits"),
    "a very long number": (b'{"a": ' + b"9" * 10_000 + b"}", "the number 999999999999... has 10000 digits"),
    "a key twice": (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' is listed twice"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_json_file_is_one_line_with_its_name_and_the_remedy(kind, tmp_path):
    content, message = BAD[kind]
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.json: .*{message}.*; write it anew") as caught:
        read_json(tmp_path / "a.json", "write it anew")
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    for path in (tmp_path / "a.json", tmp_path):
        with pytest.raises(ValueError, match="not a regular file; write it anew"):
            read_json(path, "write it anew")
    with pytest.raises(FileNotFoundError, match="b.json: no such file; write it anew"):
        read_json(tmp_path / "b.json", "write it anew")


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json", "") == {"a": 1}
    assert read_text(tmp_path / "a.json", "")[0] == "{"


def test_there_is_one_way_to_open_a_json_file():
    root = Path(__file__).parents[3]
    opened = re.compile(r"json\.loads?\([^\n]*(read_|open\()")
    tops = ("common/engine", "scripts", "action_*", "detection", "pointcloud", "vos")
    files = [path for top in tops for path in root.glob(f"{top}/**/*.py")]
    found = [path.name for path in files if "tests" not in path.parts and opened.search(path.read_text())]
    # The campaign compares that reader with a plain parser.
    assert len(files) > 50 and found == ["mutate_files.py"]


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "out").write_text("")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(NotADirectoryError, match="out: is there already and is no folder; give another one"):
            make_folder(folder)


def test_rows_of_commas_have_the_numbers_of_their_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffa,"b, ""c"""\r\n\r\nd,e\u2028f\r\n'.encode())
    assert read_csv(path, "mend it") == [(1, ["a", 'b, "c"']), (3, ["d", "e\u2028f"])]
    path.write_text('a,b\nc,"d\ne,f\ng,"h\n')
    with pytest.raises(ValueError, match=r"a.csv: the quote that opens in line 2 goes on to line 4; close it"):
        read_csv(path, "mend it")
    path.write_text("a,b\nc," + "d" * 200_000)
    with pytest.raises(ValueError, match=r"a.csv: line 2 cannot be read as csv .*; mend it"):
        read_csv(path, "mend it")


def test_there_is_one_way_to_open_a_file_of_commas():
    root = Path(__file__).parents[3]
    tops = ("common/engine", "scripts", "action_*", "detection", "pointcloud", "vos")
    files = [path for top in tops for path in root.glob(f"{top}/**/*.py") if "tests" not in path.parts]
    assert [p.name for p in files if re.search(r"csv\.(Dict)?[Rr]eader", p.read_text())] == ["files.py"]


def test_large_values_that_nobody_needs_are_let_go_wherever_they_stand(tmp_path):
    path = tmp_path / "large.json"
    path.write_text('{"a": [{"mask": [1, 2], "b": 1}, {"b": {"mask": {"c": 2}}}], "mask": 3}')
    assert read_json(path, "mend it", without=("mask", "absent")) == {"a": [{"b": 1}, {"b": {}}]}
    path.write_text('{"mask": 1, "mask": 2}')
    with pytest.raises(ValueError, match="'mask' is listed twice"):
        read_json(path, "mend it", without=("mask",))


def test_a_file_appears_whole_and_follows_no_planted_link(tmp_path):
    path, other = tmp_path / "sheets" / "a.png", tmp_path / "other"
    path.parent.mkdir()
    other.write_text("of somebody else")
    planted = path.with_name(f".a.png.{os.getpid()}.tmp.png")
    planted.symlink_to(other)
    with pytest.raises(OverflowError), appearing(path) as temporary:
        temporary.write_text("half")
        raise OverflowError
    assert not path.exists() and list(path.parent.iterdir()) == []
    planted.symlink_to(other)
    with appearing(path) as temporary:
        assert temporary.suffix == ".png" and not path.exists()
        temporary.write_text("whole")
    assert path.read_text() == "whole" and [p.name for p in path.parent.iterdir()] == ["a.png"]
    assert other.read_text() == "of somebody else"
    assert path.stat().st_mode & 0o777 == other.stat().st_mode & 0o777


def test_a_video_is_written_beside_a_planted_link_and_not_through_it(tmp_path):
    (tmp_path / "other").write_text("of somebody else")
    for name in ("a.mp4.part", f".a.mp4.{os.getpid()}.tmp.mp4"):
        (tmp_path / name).symlink_to(tmp_path / "other")
    write_video(tmp_path / "a.mp4", np.zeros((2, 32, 32, 3), np.uint8), 10)
    assert (tmp_path / "other").read_text() == "of somebody else" and (tmp_path / "a.mp4").stat().st_size > 500


def test_whatever_is_written_for_users_goes_through_one_of_two_functions():
    root = Path(__file__).parents[3]
    direct = re.compile(
        r"\.write_text\(|\.savefig\((?!temporary)|\.save\((path|sheet)|write_tensors\([^\n]*, (path|arguments)"
    )
    tops = ("common/engine", "scripts", "action_*", "detection", "pointcloud", "vos")
    files = [path for top in tops for path in root.glob(f"{top}/**/*.py")]
    files = [path for path in files if "tests" not in path.parts]
    # The writers themselves; a file cut in half on purpose.
    allowed = {"files.py", "weights.py", "kill_campaign.py"}
    assert len(files) > 90
    assert [path for path in files if direct.search(path.read_text()) and path.name not in allowed] == []
