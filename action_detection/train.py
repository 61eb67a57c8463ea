"""Train a row of the table: python -m action_detection.train ROW [--method M] [--seed S] [--any.field value].

With --plan nothing is trained: the peak memory of a step is predicted and written to results/, status "not run".
"""

from pathlib import Path

from action_detection.configs import row
from action_detection.data import build_loaders
from action_detection.evaluate import build_evaluate
from action_detection.model import build_model, example_batch, without_weights
from engine.commands import parse_config, run_command
from engine.training.devices import set_seed
from engine.training.fit import fit
from engine.training.plan import plan_row, publish_plan


def main(arguments: list[str]) -> None:
    """Parse, build, fit (or plan)."""
    plan = "--plan" in arguments
    config = parse_config(row, [argument for argument in arguments if argument != "--plan"])
    set_seed(config.run.seed)
    if plan:
        model = build_model(without_weights(config))
        publish_plan(plan_row(config, model, model.head.losses, lambda: example_batch(config)), Path("results"))
        return
    model = build_model(config)
    record = fit(config, model, model.head.losses, build_loaders(config), build_evaluate(config))
    metrics = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items())
    print(f"{record.row} seed {record.seed}: {metrics}")


if __name__ == "__main__":
    run_command(main)
