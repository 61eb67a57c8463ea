"""The class of a cloud in a text file: python -m toy_task.predict RUN cloud.txt."""

from pathlib import Path

import numpy as np
import torch

from engine import commands
from engine.task import Model
from toy_task.configs import Config
from toy_task.data import class_names


def predict(config: Config, model: Model, arguments: commands.Prediction) -> list[Path]:
    """Writes the name of the class into the output folder."""
    x = torch.tensor(np.loadtxt(arguments.input, dtype=np.float32, ndmin=2))[None]
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{arguments.input.stem}_class.txt"
    path.write_text(class_names(config)[int(model({"x": x}).argmax())] + "\n")
    return [path]


if __name__ == "__main__":
    from toy_task import model

    commands.predict(Config, model, predict)
