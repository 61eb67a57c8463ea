"""Train a row of the table: python -m action_recognition.train ROW [--method M] [--seed S] [--any.field value ...]."""

import sys

from action_recognition.configs import row
from action_recognition.data import build_loaders
from action_recognition.evaluate import evaluate
from action_recognition.head import build_criterion
from action_recognition.model import build_model
from dr2net.training.command import parse_config
from dr2net.training.engine import fit, set_seed


def main(arguments: list[str]) -> None:
    """Parse, build, fit."""
    config = parse_config(row, arguments)
    set_seed(config.run.seed)
    criterion = build_criterion(num_classes=config.data.num_classes, label_smoothing=config.label_smoothing)
    record = fit(config, build_model(config), criterion, build_loaders(config), evaluate)
    metrics = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items())
    print(f"{record.row} seed {record.seed}: {metrics}")


if __name__ == "__main__":
    main(sys.argv[1:])
