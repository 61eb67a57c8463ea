"""Train a row of the table: python -m detection.train ROW [--method M] [--seed S] [--any.field value].

With --plan nothing is trained: the peak memory of a step is predicted and written to results/, status "not run".
"""

from detection import data, evaluate, model
from detection.configs import ROWS
from engine import commands

if __name__ == "__main__":
    commands.train(ROWS, model, data, evaluate)
