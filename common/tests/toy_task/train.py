"""Train a row of the toy task: python -m toy_task.train ROW."""

from engine import commands
from toy_task import data, evaluate, model
from toy_task.configs import ROWS

if __name__ == "__main__":
    commands.train(ROWS, model, data, evaluate)
