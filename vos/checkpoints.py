"""Files into our model: a Video Swin alone, the official MTTR, and this project's own.

    load_file(model, Path("mttr_a2d_w10.pth.tar"))

Which kind a file is, its names say. Everything must fit. An official MTTR file also holds the text encoder, which is
frozen and not part of our model, the state of its training, and perhaps its best mAP as a number of numpy, which is
read as that and nothing else. The map was written from the modules of that project; no real file was here.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from engine.backbones.video_swin import INDEX, load_stages, torchvision_names
from engine.weights import Tensors, load_tensors, read_state_dict

if TYPE_CHECKING:
    from vos.model import Segmenter

TEXT_ENCODER = "transformer.text_encoder."
HEAD = re.compile(r"(transformer|is_referred_head|instance_kernels_head|obj_queries|vid_embed_proj|spatial_decoder)\.")
CLASSIFIER = re.compile(r"head\.(weight|bias)$")  # torchvision's
INSIDE = ("model_state_dict", "state_dict", "model")  # MTTR; the official Video Swin
# A number of numpy in a pickle, as it was called before and since numpy 2. None of the three runs what it is given.
SCALAR = np._core.multiarray.scalar  # type: ignore[attr-defined]
NUMBERS = [
    SCALAR,
    (SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
]


def load_file(model: "Segmenter", path: Path) -> None:
    """Fill a freshly built model. FileNotFoundError or ValueError, naming the file, for what does not fit."""
    state, source = _unwrapped(path), f"weights {path}"
    kind = kind_of(state)
    if kind == "backbone":
        if odd := [key for key in state if key.startswith("head.") and not CLASSIFIER.match(key)]:
            raise ValueError(f"{source}: of another task ({odd[0]}): give a Video Swin alone, or an MTTR")
        load_stages(model.backbone, state, source)
        print(f"{source}: of a Video Swin; fresh: the head")
        return
    load_tensors(model, our_names(state) if kind == "official MTTR" else state, source)
    print(f"{source}: of {kind}, all layers loaded")


def kind_of(state: Tensors) -> str:
    """Whose names these are: "ours", "official MTTR", or a "backbone" alone."""
    if any(key.startswith("head.transformer.") for key in state):
        return "ours"
    return "official MTTR" if any(key.startswith("transformer.") for key in state) else "backbone"


def our_names(state: Tensors) -> Tensors:
    """The tensors of an official MTTR under the names of `model.Segmenter`; unknown names stay."""
    backbone = {key: value for key, value in state.items() if key.startswith("backbone.")}
    renamed = {
        f"backbone.{key}": value
        for key, value in torchvision_names(backbone).items()
        if not key.endswith((f".{INDEX}", ".attn_mask"))
    }
    for key, value in state.items():
        if key not in backbone and not key.startswith(TEXT_ENCODER):
            renamed[f"head.{key}" if HEAD.match(key) else key] = value
    return renamed


def _unwrapped(path: Path) -> Tensors:
    """The state dict of a file, from under one of `INSIDE` or bare."""
    with torch.serialization.safe_globals(NUMBERS):
        for inside in INSIDE[:-1]:
            try:
                return read_state_dict(path, inside=inside)
            except ValueError as error:
                if "no state dict of tensors" not in str(error):
                    raise
        return read_state_dict(path, inside=INSIDE[-1])
