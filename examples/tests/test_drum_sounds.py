"""Drum kits: what an instrument's name says, sounds of every format, and files that are not as they should be."""

from pathlib import Path

import numpy as np
import pytest

from examples.audio import sounds
from examples.audio.sounds import CLASSES, RATE, Sound, class_of, decode, read_drumkits, read_mono, split_kits
from examples.tests.toy_sounds import CODECS, NAMES, tone, write_kit, write_sound


@pytest.mark.parametrize("kind", CODECS)
def test_sounds_of_every_format_are_one_channel_at_16_khz(tmp_path: Path, kind: str) -> None:
    wave = read_mono(write_sound(tmp_path / f"a.{kind}", tone(440)))
    assert abs(len(wave) - int(0.6 * RATE)) < 0.02 * RATE  # vorbis pads
    spectrum = np.abs(np.fft.rfft(wave[: int(0.6 * RATE)]))
    assert abs(np.argmax(spectrum) / 0.6 - 440) < 4  # the peak is as wide as a decay of 1/6 s makes it
    assert 0.45 < np.abs(wave).max() < 0.6  # (.5 + .25) / sqrt(2)


def test_a_sound_begins_at_its_stroke_and_is_as_loud_as_can_be(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.wav", tone(440, silence=0.5))
    wave = decode(path, 4000)
    assert wave.shape == (4000,) and wave.dtype == np.float32 and np.abs(wave).max() == 1
    assert np.argmax(np.abs(wave) > 0.1) < 2 * sounds.LEAD
    long = decode(path, 16_000)
    assert not long[-4000:].any() and np.array_equal(long[:4000], wave)


def test_what_holds_no_sound_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.wav"):
        decode(tmp_path / "absent.wav", 100)
    silent = write_sound(tmp_path / "silent.wav", 0 * tone(440))
    with pytest.raises(ValueError, match="silent.wav: is silent"):
        decode(silent, 100)
    for content in (b"", b"no sound at all", silent.read_bytes()[:20]):
        (tmp_path / "broken.wav").write_bytes(content)
        with pytest.raises(ValueError, match="broken.wav"):
            decode(tmp_path / "broken.wav", 100)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(ValueError, match="folder.wav: is a folder"):
        decode(tmp_path / "folder.wav", 100)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Kick (Tama Superstar 22&quot;)", "kick"),
        ("c3 - bass drum 1", "kick"),
        ("Pearl Snare Rimshot", "snare"),
        ("Floor Tom", "tom"),
        ("tomhi2", "tom"),
        ("Sabian Hat Semi-Open", "hi-hat"),
        ("Hi-Hat Closed (Paiste Alpha Metal edge 14&quot;)", "hi-hat"),
        ("Side OHH", "hi-hat"),
        ("Paiste Ride", "cymbal"),
        ("c#4 - crash", "cymbal"),
        ("Hand Clap", "percussion"),
        ("Agogo Low (Pearl ECB-23)", "percussion"),
        ("Stick", None),
        ("Whistle", None),
        ("17", None),
        ("", None),
        ("What", None),
    ],
)
def test_the_class_of_an_instrument_is_in_its_name(name: str, kind: str | None) -> None:
    found = class_of(name)
    assert (None if found is None else CLASSES[found]) == kind


def test_kits_are_read_in_order_with_each_file_once(tmp_path: Path) -> None:
    write_kit(tmp_path / "b", {"Kick": ["k.wav", "l.flac"], "Kick 2": ["k.wav"], "Stick": ["s.wav"]}, namespace=True)
    write_kit(tmp_path / "a", {"Crash": ["c.ogg"], "Cowbell": ["absent.wav"]})
    (tmp_path / "a" / "absent.wav").unlink()
    with pytest.warns(UserWarning, match="absent.wav: is listed by its kit and not there"):
        found = read_drumkits(tmp_path)
    assert found == [Sound("a", "c.ogg", 4), Sound("b", "k.wav", 0), Sound("b", "l.flac", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<drumkit_info><instrument>", "cannot be read as XML"),
        ("<!DOCTYPE a [<!ENTITY b 'c'>]><drumkit_info/>", "document type"),
        ("<d><instrument><name>Kick</name><filename>../x.wav</filename></instrument></d>", "no file of this kit"),
        ("<d><instrument><name>Kick</name><filename></filename></instrument></d>", "no file of this kit"),
        ("<d/>", "holds no drum kit"),
    ],
)
def test_a_kit_of_another_form_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "drumkit.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_drumkits(tmp_path)


def test_test_kits_are_never_trained_on(tmp_path: Path) -> None:
    files = {name: [f"{k}.wav"] for k, name in enumerate(NAMES)}
    for kit in ("one", "two", "three"):
        write_kit(tmp_path / kit, files)
    found = read_drumkits(tmp_path)
    train, test = split_kits(found, ("two",))
    assert len(train) == 12 and {s.kit for s in test} == {"two"} and {s.kit for s in train} == {"one", "three"}
    assert [s.label for s in test] == list(range(6))
    with pytest.raises(ValueError, match="the test kits have no tom"):
        split_kits([s for s in found if s.label != 2 or s.kit != "two"], ("two",))


def test_other_kits_than_the_measured_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_kit(tmp_path / "usr" / "kit", {"Kick": ["k.wav"]}).parent
    monkeypatch.setattr(sounds, "PACKAGE", sounds.PACKAGE._replace(folder=str(source).lstrip("/")))
    with pytest.raises(ValueError, match="not those that the results were measured with"):
        sounds.bring_drumkits(tmp_path / "data" / "drumkits")
    monkeypatch.setattr(sounds, "SHA256", sounds.fingerprint(source, read_drumkits(source)))
    assert (sounds.bring_drumkits(tmp_path / "data" / "drumkits") / "kit" / "k.wav").is_file()
    write_sound(tmp_path / "data" / "drumkits" / "kit" / "k.wav", tone(999))
    with pytest.raises(ValueError, match="fingerprint"):
        sounds.bring_drumkits(tmp_path / "data" / "drumkits")
