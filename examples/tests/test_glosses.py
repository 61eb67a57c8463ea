"""WordNet's nouns are read as their manual describes them; another file is refused by name."""

from pathlib import Path

import pytest

from examples.text import glosses
from examples.text.glosses import CLASSES, Gloss, definition_of, read_glosses, split_glosses

LICENSE = "  1 This software and database is being provided to you, the LICENSEE, by  \n"
ENTITY = (
    "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 ~ 04424418 n 0000 | that which is perceived or "
    "known (living or nonliving)  \n"
)
OBJECT = (
    "00002684 03 n 02 object 0 physical_object 0 001 @ 00001930 n 0000 | a tangible and visible entity; an entity that "
    'can cast a shadow; "it was full of rackets, balls and other objects"; "it | fell"  \n'
)
TIME = "15113229 28 n 02 time_period 0 period_of_time 0 000 | an amount of time  \n"


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(lines))
    return path


def test_nouns_are_definitions_with_their_class(tmp_path: Path) -> None:
    found = read_glosses(write(tmp_path / "data.noun", LICENSE, ENTITY, OBJECT, TIME))
    assert found == [
        Gloss("that which is perceived or known (living or nonliving)", 0),
        Gloss("a tangible and visible entity; an entity that can cast a shadow", 0),
        Gloss("an amount of time", 25),
    ]
    assert len(CLASSES) == 26 and CLASSES[25] == "time"


def test_examples_are_cut_and_definitions_are_not() -> None:
    assert definition_of('a "b" c; "an example"; "another"  ') == 'a "b" c'
    assert definition_of("a; b; ") == "a; b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (ENTITY.replace(" | ", " "), "line 2 is no noun"),
        (ENTITY.replace(" n 01 ", " v 01 "), "line 2 is no noun"),
        (ENTITY.replace(" 03 ", " xx "), "line 2 is no noun"),
        (ENTITY.replace(" 03 ", " 29 "), "line 2 is in the lexicographers' file 29"),
        ("00001740 03 n 01 entity 0 | \n", "line 2 is no noun"),
        ("\n", "line 2 is no noun"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"data.noun: {message}"):
        read_glosses(write(tmp_path / "data.noun", LICENSE, line))


def test_a_file_without_nouns_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no nouns"):
        read_glosses(write(tmp_path / "data.noun", LICENSE))


def test_no_definition_is_in_both_parts_and_the_split_is_always_the_same() -> None:
    given = [Gloss(f"a thing of kind {k // 2}", k % 5) for k in range(100)]
    train, test = split_glosses(given, 10)
    assert len(test) == 10 and len(train) == 40
    assert not {gloss.text for gloss in train} & {gloss.text for gloss in test}
    assert split_glosses(given, 10) == (train, test) != split_glosses(given, 10, seed=1)
    with pytest.raises(ValueError, match="50 test glosses of 50"):
        split_glosses(given, 50)


def test_another_edition_is_refused_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "usr/share/wordnet").mkdir(parents=True)
    write(tmp_path / "usr/share/wordnet/data.noun", LICENSE, ENTITY)
    installed = glosses.PACKAGE._replace(folder=str(tmp_path / "usr/share/wordnet").lstrip("/"))
    monkeypatch.setattr(glosses, "PACKAGE", installed)
    with pytest.raises(ValueError, match="is not the data.noun of WordNet 3.0"):
        glosses.bring_wordnet(tmp_path / "data")
    assert (tmp_path / "data" / "data.noun").is_file()
