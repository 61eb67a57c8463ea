"""Whisper's encoder from a file of CTranslate2: the format, the names, what is refused, and each method's steps."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from examples.audio import run, sounds, whisper
from examples.audio.ctranslate2 import TYPES, read_model
from examples.audio.whisper import build_encoder, log_mel, mean_of_tokens
from examples.compare import Classifier
from examples.tests.toy_comparison import check_each_method
from examples.tests.toy_sounds import NAMES, write_kit

CODES = {np.dtype(kind): code for code, kind in TYPES.items()}


def write_model(path: Path, arrays: dict[str, np.ndarray], version: int = 6) -> Path:
    """As CTranslate2 does."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    parts = [struct.pack("<I", version), string("WhisperSpec"), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        sizes = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content = array.tobytes()
        parts += [string(name), sizes, struct.pack("<BI", CODES[array.dtype], len(content)), content]
    path.write_bytes(b"".join([*parts, struct.pack("<I", 0)]))
    return path


def small_encoder() -> WhisperEncoder:
    config = WhisperConfig(
        d_model=12, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=20, max_source_positions=50
    )
    return WhisperEncoder(config).eval()


def as_written(encoder: WhisperEncoder) -> dict[str, np.ndarray]:
    """The encoder's weights under CTranslate2's names, in float16, with what a file holds beside them."""
    state = {name: value.half().numpy() for name, value in encoder.state_dict().items()}
    found = {f"encoder/{c}/{end}": state[f"{c}.{end}"] for c in ("conv1", "conv2") for end in ("weight", "bias")}
    found |= {"encoder/num_heads": np.array(3, np.int16), "decoder/scale": np.array(1, np.int8)}
    found["encoder/position_encodings/encodings"] = state["embed_positions.weight"]
    norms = {"encoder/layer_norm": "layer_norm"}
    for k in range(2):
        ours, theirs = f"encoder/layer_{k}", f"layers.{k}"
        norms |= {f"{ours}/ffn/layer_norm": f"{theirs}.final_layer_norm"}
        norms |= {f"{ours}/self_attention/layer_norm": f"{theirs}.self_attn_layer_norm"}
        for end in ("weight", "bias"):
            found[f"{ours}/ffn/linear_0/{end}"] = state[f"{theirs}.fc1.{end}"]
            found[f"{ours}/ffn/linear_1/{end}"] = state[f"{theirs}.fc2.{end}"]
            found[f"{ours}/self_attention/linear_1/{end}"] = state[f"{theirs}.self_attn.out_proj.{end}"]
            zeros = np.zeros(12, np.float16)
            joined = [state.get(f"{theirs}.self_attn.{letter}_proj.{end}", zeros) for letter in "qkv"]
            found[f"{ours}/self_attention/linear_0/{end}"] = np.concatenate(joined)
    for ours, theirs in norms.items():
        found |= {f"{ours}/gamma": state[f"{theirs}.weight"], f"{ours}/beta": state[f"{theirs}.bias"]}
    return found


def test_names_and_numbers_come_back_as_they_were_written(tmp_path: Path) -> None:
    arrays = {
        "a/half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a/float": np.array([0.1, -2.5], np.float32),
        "a/count": np.array(7, np.int32),
        "b/codes": np.arange(4, dtype=np.int8),
    }
    found = read_model(write_model(tmp_path / "model.bin", arrays), lambda name: name.startswith("a/"))
    assert list(found) == ["a/half", "a/float", "a/count"] and found["a/count"].item() == 7
    assert all(np.array_equal(found[name].numpy(), arrays[name]) for name in found)
    assert found["a/half"].dtype == found["a/float"].dtype == torch.float32


def test_another_or_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with pytest.raises(FileNotFoundError, match="model.bin"):
        read_model(path, bool)
    content = write_model(path, {"a": np.ones((2, 2), np.float32)}).read_bytes()
    for cut in range(len(content) - 4):  # the last four bytes are not read
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="model.bin: cannot be read as a model of CTranslate2"):
            read_model(path, bool)
    write_model(path, {"a": np.ones(2, np.float32)}, version=9)
    with pytest.raises(ValueError, match="version 9"):
        read_model(path, bool)
    write_model(path, {"a": np.ones(2, np.int8)})
    with pytest.raises(ValueError, match="a is quantized, of type int8"):
        read_model(path, bool)
    path.write_bytes(content.replace(struct.pack("<II", 2, 2), struct.pack("<II", 2, 3)))
    with pytest.raises(ValueError, match=r"a of \(2, 3\) has 16 bytes"):
        read_model(path, bool)


def test_the_encoder_of_a_file_computes_what_was_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = small_encoder().half().float().eval()  # the file has halves
    path = write_model(tmp_path / "model.bin", as_written(original))
    features = torch.randn(2, 80, 100)
    loaded = build_encoder(path, 100).eval()
    assert torch.equal(loaded(features).last_hidden_state, original(features).last_hidden_state)
    short = build_encoder(path, 40).eval()
    assert short.embed_positions.weight.shape == (20, 12)
    assert short(features[..., :40]).last_hidden_state.shape == (2, 20, 12)
    assert mean_of_tokens(short, {"input_features": features[..., :40]}).shape == (2, 12)


def test_weights_that_are_missing_left_over_or_no_whispers_are_named(tmp_path: Path) -> None:
    arrays, path = as_written(small_encoder()), tmp_path / "model.bin"
    write_model(path, {k: v for k, v in arrays.items() if k != "encoder/layer_1/ffn/linear_0/weight"})
    with pytest.raises(ValueError, match=r"layers\.1\.fc1\.weight"):
        build_encoder(path, 40)
    write_model(path, {**arrays, "encoder/layer_1/ffn/linear_2/weight": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match=r"layers\.1\.fc3\.weight"):
        build_encoder(path, 40)
    biased = arrays["encoder/layer_0/self_attention/linear_0/bias"] + np.float16(1)
    write_model(path, {**arrays, "encoder/layer_0/self_attention/linear_0/bias": biased})
    with pytest.raises(ValueError, match="the keys have a bias"):
        build_encoder(path, 40)
    with pytest.raises(ValueError, match="41 frames"):
        build_encoder(write_model(path, arrays), 41)


def test_the_spectrogram_is_that_of_transformers_for_30_seconds(tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    wave = np.random.default_rng(0).normal(size=8000).astype(np.float32)
    short = log_mel(wave[None])
    assert short.shape == (1, 80, 50)
    whole = WhisperFeatureExtractor(feature_size=80)(wave, sampling_rate=16_000, return_tensors="pt")["input_features"]
    torch.testing.assert_close(short[..., :48], whole[..., :48])  # the last frames look beyond the end


def test_another_file_of_weights_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.bin", {"a": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="model.bin: has sha256 .* delete it"):
        whisper.bring_whisper(path)


def test_each_method_makes_its_steps_and_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {name: [f"{k}.wav", f"{k}{k}.wav"] for k, name in enumerate(NAMES)}
    write_kit(tmp_path / "kits" / "kit", files)
    heard = run.Heard(tmp_path / "kits", sounds.read_drumkits(tmp_path / "kits"))
    assert heard.take(torch.tensor([0, 3]))["input_features"].shape == (2, 80, run.NUM_FRAMES)
    path = write_model(tmp_path / "model.bin", as_written(small_encoder()))

    def build() -> Classifier:
        return Classifier(build_encoder(path, run.NUM_FRAMES), mean_of_tokens, 12, 6)

    check_each_method("audio", heard, 6, build, tmp_path)


def test_every_weight_of_the_encoder_is_trained(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.bin", as_written(small_encoder()))
    encoder = build_encoder(path, 40)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"embed_positions.weight"}  # as transformers builds it: sines
    total: Tensor = encoder(torch.randn(1, 80, 40)).last_hidden_state.square().sum()
    total.backward()
    assert all(p.grad is not None for name, p in encoder.named_parameters() if name not in frozen)
