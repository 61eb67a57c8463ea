"""Files of detectors and backbones into ours: official DINO, detrex, mmdetection, Swin alone, and this project's own.

    load_file(model, Path("checkpoint0011_4scale_swin.pth"), config)

Which kind a file is, its names say. Everything must fit, but for layers of another number of classes, which stay fresh
and are named: class layers and the embedding of labels. The official files have a row per COCO category id (0 to 90);
of them the 80 that exist are taken where the model has 80 classes. Where a file belongs to another network than the row
says (a head per layer, other positions), that is an error that names the flags. The maps were written from the modules
of those projects; no real file of theirs was here. Not here: files of a classifier (`engine.backbones.swin`).
"""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from detection.configs import Config
from engine.backbones.swin import load_backbone, torchvision_names
from engine.weights import Tensors, load_tensors, read_state_dict, refuse_other_kinds

if TYPE_CHECKING:
    from detection.model import Detector

COCO_IDS = [number for number in range(1, 91) if number not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
CLASS_LAYERS = re.compile(r"head\.(class_embed\.\d+|transformer\.enc_out_class_embed|label_enc)\.")
QUERIES = "head.transformer.tgt_embed.weight"  # a row per query
Rule = tuple[str, str]  # regular expression and what replaces it
ENCODER_COPY = ("class_embed", "bbox_embed")

OFFICIAL: list[Rule] = [
    (r"^backbone\.0\.", "backbone."),
    (r"^(input_proj|transformer|class_embed|bbox_embed|label_enc)\.", r"head.\1."),
]
DETREX: list[Rule] = [
    (r"^neck\.convs\.(\d+)\.conv\.", r"head.input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.norm\.", r"head.input_proj.\1.1."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    (r"^(transformer\.encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"^(transformer\.encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"^(transformer\.encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"^(transformer\.decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"^(transformer\.decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^(transformer\.decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
    (r"^(transformer\.decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"^(transformer\.decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".linear1."),
    (r"\.ffns\.0\.layers\.1\.", ".linear2."),
    (r"^(transformer|class_embed|bbox_embed|label_enc)\.", r"head.\1."),
]
MMDETECTION: list[Rule] = [
    (r"^neck\.convs\.(\d+)\.conv\.", r"head.input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.gn\.", r"head.input_proj.\1.1."),
    (r"^level_embed$", "head.transformer.level_embed"),
    (r"^(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"^(encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"^(decoder\.layers\.\d+)\.self_attn\.attn\.", r"\1.self_attn."),
    (r"^(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),
    (r"^(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"^(decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
    (r"^((?:encoder|decoder)\.layers\.\d+)\.ffn\.layers\.0\.0\.", r"\1.linear1."),
    (r"^((?:encoder|decoder)\.layers\.\d+)\.ffn\.layers\.1\.", r"\1.linear2."),
    (r"^memory_trans_fc\.", "head.transformer.enc_output."),
    (r"^memory_trans_norm\.", "head.transformer.enc_output_norm."),
    (r"^query_embedding\.", "head.transformer.tgt_embed."),
    (r"^(encoder|decoder)\.", r"head.transformer.\1."),
    (r"^bbox_head\.cls_branches\.", "head.class_embed."),
    (r"^bbox_head\.reg_branches\.(\d+)\.0\.", r"head.bbox_embed.\1.layers.0."),
    (r"^bbox_head\.reg_branches\.(\d+)\.2\.", r"head.bbox_embed.\1.layers.1."),
    (r"^bbox_head\.reg_branches\.(\d+)\.4\.", r"head.bbox_embed.\1.layers.2."),
    (r"^dn_query_generator\.label_embedding\.", "head.label_enc."),
]
# What the networks of these projects have and a row must say: fields of `configs.Model`.
OTHERWISE = {
    "official DINO": {"shared_heads": True, "temperature": 20.0, "position_offset": 0.0},
    "detrex": {"shared_heads": False, "temperature": 10000.0, "position_offset": -0.5},
    "mmdetection": {"shared_heads": False, "temperature": 20.0, "position_offset": 0.0},
}


def load_file(model: "Detector", path: Path, config: Config) -> tuple[str, ...]:
    """Fill a freshly built model; returns what stays fresh. FileNotFoundError or ValueError, naming the file, for what
    does not fit.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # official files hold their arguments, as plain values
        state = _unwrapped(path)
    source = f"weights {path}"
    kind = kind_of(state)
    if kind == "backbone":
        fresh = load_backbone(model.backbone, state, source)
        fresh = [f"backbone.{name}" for name in fresh] + ["the head"]
        _say(source, kind, fresh)
        return tuple(fresh)
    _refuse_another_network(kind, config, source)
    _refuse_other_levels(state, kind, model.backbone.strides, len(model.head.input_proj), source)
    state = our_names(state, kind, len(model.head.input_proj), source)
    own = model.state_dict()
    if kind == "official DINO" and config.data.num_classes == len(COCO_IDS):
        state = {key: _of_coco(value) if CLASS_LAYERS.match(key) else value for key, value in state.items()}
    fresh = [
        key
        for key, value in own.items()
        if CLASS_LAYERS.match(key) and key in state and _differs_in_rows(state[key], value)
    ]
    if QUERIES in state and _differs_in_rows(state[QUERIES], own[QUERIES]):
        number = len(state[QUERIES])
        raise ValueError(f"{source}: has {number} queries, the row {len(own[QUERIES])}: give --model.queries {number}")
    refuse_other_kinds(own, state, source)
    load_tensors(model, {**state, **{key: own[key] for key in fresh}}, source)
    _say(source, kind, fresh)
    return tuple(fresh)


def kind_of(state: Tensors) -> str:
    """Whose names these are: "ours", "official DINO", "detrex", "mmdetection", or a "backbone" alone."""
    if any(key.startswith("head.transformer.") for key in state):
        return "ours"
    if any(key.startswith("bbox_head.") for key in state):
        return "mmdetection"
    if any(key.startswith("neck.") for key in state):
        return "detrex"
    return "official DINO" if any(key.startswith("transformer.") for key in state) else "backbone"


def our_names(state: Tensors, kind: str, levels: int, source: str) -> Tensors:
    """The tensors of a detector under the names of `model.Detector`, with `levels` input projections. ValueError where
    copies of a layer differ that are one layer in the network they come from.
    """
    if kind == "ours":
        return state
    rules = {"official DINO": OFFICIAL, "detrex": DETREX, "mmdetection": MMDETECTION}[kind]
    # levels beyond the backbone's are projections too
    rules = [(r"^neck\.extra_convs\.(\d+)\.", f"neck.convs.{levels - 1}."), *rules]
    renamed: Tensors = {}
    for key, value in state.items():
        for pattern, ours in rules:
            key = re.sub(pattern, ours, key)
        renamed[key] = value
    for name in ENCODER_COPY:
        renamed = _without_copies(renamed, name, source, shared=kind == "official DINO")
    swin = {key.removeprefix("backbone."): value for key, value in renamed.items() if key.startswith("backbone.")}
    swin = {key: v for key, v in torchvision_names(swin).items() if not key.endswith(("_position_index", "attn_mask"))}
    head = {key: value for key, value in renamed.items() if not key.startswith("backbone.")}
    return {**{f"backbone.{key}": value for key, value in swin.items()}, **head}


def _without_copies(state: Tensors, name: str, source: str, *, shared: bool) -> Tensors:
    """One set of class or box layers: files have them again below the decoder, official ones six times each, detrex and
    mmdetection those of the encoder as the last.
    """
    kept = {key: value for key, value in state.items() if f"head.transformer.decoder.{name}." not in key}
    for key, value in state.items():
        if key.startswith(f"head.transformer.decoder.{name}."):
            _refuse_difference(kept, key.replace("transformer.decoder.", ""), value, source)
    for key in kept:
        if key.startswith(f"head.{name}.") and not re.fullmatch(rf"head\.{name}\.\d+\..+", key):
            raise ValueError(f"{source}: has a layer {key.removeprefix('head.')}, which is of another kind of detector")
    numbers = sorted({int(key.split(".")[2]) for key in kept if key.startswith(f"head.{name}.")})
    if not numbers:
        return kept
    last = numbers[-1]
    found = {}
    for key, value in kept.items():
        if not key.startswith(f"head.{name}."):
            found[key] = value
            continue
        _, _, number, rest = key.split(".", 3)
        if shared:
            _refuse_difference(kept, f"head.{name}.0.{rest}", value, source)
            found[f"head.{name}.0.{rest}"] = value
        elif int(number) == last:
            found[f"head.transformer.enc_out_{name}.{rest}"] = value
        else:
            found[key] = value
    return found


def _refuse_difference(state: Tensors, key: str, value: torch.Tensor, source: str) -> None:
    if key not in state or not torch.equal(state[key], value):
        raise ValueError(f"{source}: copies of {key} differ, which are one layer in the network they should come from")


def _refuse_another_network(kind: str, config: Config, source: str) -> None:
    wanted = OTHERWISE.get(kind, {})
    wrong = {name: value for name, value in wanted.items() if getattr(config.model, name) != value}
    if wrong:
        flags = " ".join(_flag(name, value) for name, value in wrong.items())
        raise ValueError(f"{source} is of {kind}, whose network is another one than the row's: give {flags}")


def _refuse_other_levels(state: Tensors, kind: str, strides: list[int], levels: int, source: str) -> None:
    """ValueError for a detector that sees other maps: DINO 5-scale also takes the backbone's first, of stride 4."""
    if any(re.match(r"(backbone\.)+(0\.)?norm0\.", key) for key in state):
        raise ValueError(
            f"{source}: of {kind} 5-scale, which also takes the map of stride 4; here the finest is that of stride "
            f"{strides[0]}: give a 4-scale file"
        )
    projections = [re.match(r"((head\.)?input_proj|neck\.(extra_)?convs)\.\d+\.", key) for key in state]
    number = len({found[0] for found in projections if found})
    if number != levels and number > len(strides):
        extra = number - len(strides)
        raise ValueError(f"{source}: has {number} levels, the row {levels}: give --model.extra-levels {extra}")


def _flag(name: str, value: bool | float) -> str:
    """As the command line takes it."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{name}" if value else f"--model.no-{name}"
    return f"--model.{name} {value}"


def _of_coco(value: torch.Tensor) -> torch.Tensor:
    """Rows by category id (91, or 92 of the embedding) -> the 80 that exist."""
    return value[COCO_IDS] if value.dim() and len(value) in (91, 92) else value


def _differs_in_rows(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    """Whether there is another number of classes or queries, and nothing else is other."""
    return theirs.dim() == ours.dim() and theirs.shape[1:] == ours.shape[1:] and len(theirs) != len(ours)


def _unwrapped(path: Path) -> Tensors:
    """The state dict of a file, from under "model" (official DINO, detrex, Microsoft) or "state_dict" (mmdetection)."""
    try:
        return read_state_dict(path, inside="model")
    except ValueError:
        return read_state_dict(path, inside="state_dict")


def _say(source: str, kind: str, fresh: Iterable[str]) -> None:
    names = list(fresh)
    print(f"{source}: of {kind}" + (f"; fresh: {', '.join(names)}" if names else ", all layers loaded"))
