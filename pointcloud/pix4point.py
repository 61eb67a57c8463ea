"""The authors' checkpoint: its names to ours, and its score on S3DIS.

    python -m pointcloud.evaluate --weights pix4point.pth --root data/s3dis

Names were derived from the authors' code (openpoints), not from a file: their sizes add up to the 23.7 million
parameters that are published. 1x1 convolutions become linear layers by dropping their last dimensions. Classes are in
our order. The file is read with weights_only=True, and every key must fit. The authors' reversible form is another
function than ours (alpha (x + pos), where we have alpha x + pos), so its checkpoints are refused. Not here: MAE's and
timm's weights of the blocks alone (`engine.backbones.point_vit`).
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from engine import settings
from engine.command_line import parse, run_command
from engine.commands import Device, score_network
from engine.rows import find_row
from engine.weights import Tensors, load_tensors, read_state_dict
from pointcloud import data, evaluate
from pointcloud.configs import ROWS
from pointcloud.model import build_model

LAYERS = {"0.0.0": "first", "0.0.1": "first_norm", "0.1.0": "second", "1.0.0": "third", "1.0.1": "third_norm"}
LAYERS |= {"1.1.0": "fourth", "1.1.1": "fourth_norm"}
PARTS = {"0.0": "first", "0.1": "first_norm.norm", "1.0": "second", "1.1": "second_norm.norm"}
_RENAMES = (
    (r"encoder\.(cls_token|cls_pos)", r"\1"),
    (r"encoder\.pos_embed\.0\.0\.(weight|bias)", r"pos_embed.0.\1"),
    (r"encoder\.pos_embed\.1\.(weight|bias)", r"pos_embed.2.\1"),
    (r"encoder\.blocks\.(.+)", r"backbone.blocks.\1"),
    (r"encoder\.norm\.(.+)", r"norm.\1"),
    (r"head\.head\.0\.0\.(.+)", r"decoder.classifier.hidden.\1"),
    (r"head\.head\.0\.1\.(.+)", r"decoder.classifier.norm.\1"),
    (r"head\.head\.2\.0\.(.+)", r"decoder.classifier.linear.\1"),
)


def our_name(key: str) -> str:
    """The name here of a tensor of the authors' checkpoint; the key itself if it is unknown."""
    key = key.removeprefix("module.")
    if match := re.fullmatch(r"encoder\.patch_embed\.convs\.(\d+)\.(\d\.\d\.\d)\.(\w+)", key):
        return f"tokenizer.stages.{match[1]}.{LAYERS.get(match[2], match[2])}.{match[3]}"
    if match := re.fullmatch(r"decoder\.decoder\.(\d+)\.0\.convs\.(\d\.\d)\.(\w+)", key):
        return f"decoder.propagations.{match[1]}.{PARTS.get(match[2], match[2])}.{match[3]}"
    for pattern, replacement in _RENAMES:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    return key


def from_official(state: Tensors, source: str) -> Tensors:
    """The authors' state dict with our names and shapes. ValueError for a checkpoint of the reversible form."""
    if any(".inv_block." in key for key in state):
        raise ValueError(
            f"{source}: is a checkpoint of the authors' reversible network, alpha (x + pos) + ..., which is another "
            "function than the one here; give one of the plain PointViT"
        )
    found = {}
    for key, value in state.items():
        is_convolution = key.endswith(".weight") and value.dim() > 2
        found[our_name(key)] = value.flatten(1) if is_convolution and set(value.shape[2:]) == {1} else value
    return found


@dataclass(frozen=True)
class Arguments(settings.Arguments):
    """Score the authors' checkpoint on the test area of a row."""

    weights: Path  # what torch.save wrote, with the state dict under "model"
    root: Path | None = None  # the data set's folder
    row: str = "s3dis_vits_conventional"
    output: Path = Path("runs/pointcloud/official")  # folder for scores.json
    device: Device = "auto"


def main() -> None:
    """The command line."""
    run_command(_main)


def _main(words: list[str]) -> None:
    arguments = parse(Arguments, words)
    config = find_row(ROWS, arguments.row)
    if arguments.root is not None:
        config = replace(config, data=replace(config.data, root=arguments.root))
    network = build_model(config, pretrained=False)
    state = read_state_dict(arguments.weights, inside="model")
    load_tensors(network, from_official(state, str(arguments.weights)), str(arguments.weights))
    arguments.output.mkdir(parents=True, exist_ok=True)
    title = str(arguments.weights)
    score_network(config, network, data, evaluate, arguments.output, title, device=arguments.device)
