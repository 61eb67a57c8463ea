"""A short cut of the campaign with damaged files; `scripts/mutate_files.py` has the whole."""

from collections import Counter

import pytest

from scripts.mutate_files import run


@pytest.mark.slow
def test_damaged_files_are_read_right_or_named_and_cut_ones_always_named():
    table = run(110, 80)
    total = sum(table.values(), Counter())
    assert total.total() == 190 and total["hung"] == total["unnamed"] == 0
    for suffix in ("mp4", "webm", "mkv"):
        assert table[f"{suffix}, 30 cut places"] == {"named": 30}
    assert total["silent"] == 0
