"""Train a row of the table: python -m vos.train ROW [--method M] [--seed S] [--any.field value].

With --plan nothing is trained: the peak memory of a step is predicted and written to results/, status "not run".
"""

from engine import commands
from vos import data, evaluate, model
from vos.configs import ROWS

if __name__ == "__main__":
    commands.train(ROWS, model, data, evaluate)
