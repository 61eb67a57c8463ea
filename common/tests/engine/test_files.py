"""Text and JSON files that are not what they should be: one line with the file's name, at once."""

import os
import re
from pathlib import Path

import pytest

from engine.files import read_json, read_text

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
    files = [path for top in ("common/engine", "scripts", "action_*") for path in root.glob(f"{top}/**/*.py")]
    found = [path.name for path in files if "tests" not in path.parts and opened.search(path.read_text())]
    # The campaign compares that reader with a plain parser.
    assert len(files) > 50 and found == ["mutate_files.py"]
