"""Make what stands around the blocks in the laptop preset: tokenizer and decoder learn rooms while the blocks rest.

    python -m pointcloud.pretrain              # 1200 steps of 8 crops; stop and start it at will

Tokenizer and decoder from scratch would eat the whole budget of a laptop row, and its methods would differ in nothing.
So these two are trained once, below frozen pretrained blocks, on rooms of other seeds and of other furniture than the
table's rooms, training and test alike (`furniture.GROUPS`), and then finetuned with the blocks in each of the six ways.
It is the laptop row's own training by the method `frozen`, so it resumes as any run does. Writes everything but the
blocks to pointcloud/weights/rooms.safetensors in float16, for `--model.around`.
The committed file was made by the command above.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from engine.command_line import run_command
from engine.config import Finetuning
from engine.training.devices import set_seed
from engine.training.fit import build_loaders, fit
from engine.weights import write_half
from pointcloud import data, evaluate
from pointcloud.configs import AROUND, Config, rooms_vits
from pointcloud.furniture import FurnishAreas, write_furnished
from pointcloud.model import PointSegmenter, build_model
from pointcloud.synthetic import Synthetic

ROOMS = Synthetic(seed=7, train_rooms=16, test_rooms=6, density=200.0)


def config_of(steps: int, root: Path, output: Path) -> Config:
    """The laptop row with resting blocks, on the rooms at `root`, for so many steps."""
    base = rooms_vits("frozen")
    return replace(
        base,
        row="rooms_vits_pretraining_frozen",
        data=replace(base.data, root=root, samples_per_epoch=steps * base.optimization.global_batch),
        model=replace(base.model, around=None),
        optimization=replace(base.optimization, epochs=1),
        finetuning=Finetuning(method="frozen"),
        run=replace(base.run, output=output, save_every_steps=100),
    )


def write_around(network: PointSegmenter, path: Path) -> None:
    """What the network has besides its blocks, in float16."""
    write_half({key: value for key, value in network.state_dict().items() if not key.startswith("backbone.")}, path)


def main(words: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="of 8 crops")
    parser.add_argument("--root", type=Path, default=Path("data/rooms_pretraining"), help="where the rooms are written")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run, for resuming")
    parser.add_argument("--output", type=Path, default=Path(AROUND))
    arguments = parser.parse_args(words)
    write_furnished(arguments.root, ROOMS, FurnishAreas("pretrain", "pretrain"))
    config = config_of(arguments.steps, arguments.root, arguments.runs)
    set_seed(config.run.seed)
    network = build_model(config)
    record = fit(config, network, build_loaders(config, data), evaluate)
    write_around(network, arguments.output)
    told = ", ".join(f"{name} {value:.1f}" for name, value in record.metrics.items())
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB; rooms never seen: {told}")


if __name__ == "__main__":
    run_command(main)
