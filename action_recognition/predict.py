"""What is done in a video file: a trained network's top-5 classes, as a contact sheet and an annotated copy.

    python -m action_recognition.predict runs/action_recognition/motion_tiny_dr2net/seed0 clip.mp4 --output predictions

writes predictions/clip.png (the frames of the middle view, and the probabilities) and predictions/clip.mp4.
Probabilities are averaged over the test views of the row, as in evaluation. Not here: streaming, localization in time.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from action_recognition.configs import Config
from action_recognition.data import class_names, clip_indices, read_clip
from action_recognition.head import merge_views
from engine import commands
from engine.data.video import probe, read_frames, write_video
from engine.files import appearing
from engine.task import Model
from engine.training.finetuning import autocast
from engine.visual import DARK, LIGHT, annotated_copy, draw_bar, even_size, resized

if TYPE_CHECKING:
    from PIL import Image

BAR, TRACK = (66, 110, 180), (225, 229, 236)


def predict(config: Config, model: Model, arguments: commands.Prediction) -> tuple[Path, Path]:
    """Print the top-5 and write the contact sheet and the annotated video; returns their paths.

    Raises engine.data.video.BrokenVideo for a file that cannot be decoded.
    """
    video, output = arguments.input, arguments.output
    names = class_names(config)
    info = probe(video)
    probabilities = classify(config, model, video)
    top = [(names[k], float(probabilities[k])) for k in probabilities.topk(min(5, len(names))).indices.tolist()]
    for name, probability in top:
        print(f"{probability:6.1%}  {name}")
    output.mkdir(parents=True, exist_ok=True)
    sheet, annotated = output / f"{video.stem}.png", annotated_copy(video, output)
    seen = read_frames(video, clip_indices(config.data, info, None))
    with appearing(sheet) as temporary:
        draw_contact_sheet(seen, top, title=f"{video.name}, {config.row}").save(temporary)
    frames = read_frames(video, np.arange(info.num_frames))
    write_video(annotated, annotate(frames, top), info.fps)
    return sheet, annotated


def classify(config: Config, model: Model, video: Path) -> Tensor:
    """Probabilities (K,) of a video, the mean over the row's test views."""
    device = next(model.parameters()).device
    data = config.data
    segments, crops = data.test_segments, data.test_crops
    views = torch.stack([read_clip(data, video, None, view, segments, crops) for view in range(segments * crops)])
    with torch.no_grad(), autocast(config.optimization.precision, device):
        logits = torch.cat(
            [model({"video": view})["logits"].float() for view in views.to(device).split(config.run.micro_batch)]
        )
    return merge_views(logits.softmax(dim=-1).cpu())


def draw_contact_sheet(
    frames: np.ndarray, top: list[tuple[str, float]], *, title: str, columns: int = 8
) -> "Image.Image":
    """A picture: frames uint8 (T, H, W, 3) in reading order, below them a bar per class with its probability."""
    from PIL import Image, ImageDraw, ImageFont

    cell_width = 144
    cell_height = round(cell_width * frames.shape[1] / frames.shape[2])
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    width = max(columns * (cell_width + 4) + 12, 640)
    bars_top = 34 + rows * (cell_height + 4) + 8
    sheet = Image.new("RGB", (width, bars_top + 26 * len(top) + 8), LIGHT)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    draw.text((8, 8), title, fill=DARK, font=font)
    for index, frame in enumerate(frames):
        row, column = divmod(index, columns)
        cell = resized(frame, cell_width, cell_height)
        sheet.paste(cell, (8 + column * (cell_width + 4), 34 + row * (cell_height + 4)))
    text_width = max(int(draw.textlength(name, font=font)) for name, _ in top)
    left = min(8 + text_width + 12, width // 2)
    for index, (name, probability) in enumerate(top):
        y = bars_top + 26 * index
        draw.text((8, y + 2), name, fill=DARK, font=font)
        draw_bar(draw, left, y, width - 76, probability, BAR, TRACK)
        draw.text((width - 68, y + 2), f"{probability:.1%}", fill=DARK, font=font)
    return sheet


def annotate(frames: np.ndarray, top: list[tuple[str, float]], *, min_width: int = 480) -> np.ndarray:
    """Frames (T, H, W, 3), enlarged to `min_width` if smaller, the three best classes below; even height and width."""
    from PIL import Image, ImageDraw, ImageFont

    width, height = even_size(frames.shape[2], frames.shape[1], min_width)
    font = ImageFont.load_default(16)
    caption = Image.new("RGB", (width, 24 * len(top[:3]) + 8), DARK)
    draw = ImageDraw.Draw(caption)
    for index, (name, probability) in enumerate(top[:3]):
        draw_bar(draw, 0, 24 * index + 5, width, probability, BAR)
        draw.text((8, 24 * index + 5), f"{probability:6.1%}  {name}", fill=LIGHT, font=font)
    result = np.empty((len(frames), height + caption.height, width, 3), np.uint8)
    result[:, height:] = np.asarray(caption)
    for index, frame in enumerate(frames):
        result[index, :height] = np.asarray(resized(frame, width, height))
    return result


if __name__ == "__main__":
    from action_recognition import model

    commands.predict(Config, model, predict)
