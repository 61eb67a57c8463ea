"""What a task folder is: the contract between a task and the engine. Modules implement the Protocols.

    configs.py     Config(engine.config.Config), ROWS = rows_of(...)
    data.py        DataFile           model.py      ModelFile and a Model          evaluate.py    EvaluateFile
    train.py, evaluate.py, predict.py, prepare.py end in a few lines over `engine.commands`

A batch is a dictionary; tensors in it, however nested in lists and dictionaries, move to the device. Known keys:

    name           list[str], names of the samples, for messages
    skipped        list[str], files that `on_broken="skip"` left out
    num_targets    float, targets in this batch, where losses are divided by their number: in training the engine puts
                   their mean over all batches of the optimizer step and all devices there (at least 1 over the number
                   of batches), so that how a step is split changes nothing

Nothing here runs; common/tests/test_tasks.py holds every folder to it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor, nn

from engine.config import Split
from engine.data.fingerprint import Files

Batch = dict[str, Any]
Row = Any  # what `collect` returns per sample: small, on the CPU, picklable
C = TypeVar("C", contravariant=True)


class Model(nn.Module):
    """A pretrained `backbone`, on which a finetuning method acts, and what a task puts around it.

    Layers for learning-rate decay: 0 the embeddings, ..., `num_layers` everything outside the backbone.
    """

    backbone: nn.Module

    def forward(self, batch: Batch) -> Any:
        """The outputs, the same in training and evaluation; targets in the batch may be used by neither."""
        raise NotImplementedError

    def losses(self, outputs: Any, batch: Batch) -> dict[str, Tensor]:
        """Named scalars, float32, outside autocast; their sum is minimized."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """Number of the last layer."""
        return int(cast(Any, self.backbone).num_layers)

    def layer_of(self, name: str) -> int:
        """Layer of a parameter by its name in `named_parameters()`."""
        if name.startswith("backbone."):
            return cast(Any, self.backbone).layer_of(name.removeprefix("backbone."))
        return self.num_layers


@runtime_checkable
class Recomputed(Protocol):
    """A part of a model, outside the backbone and without residual blocks, that can run again in backward instead of
    keeping what it computes. `finetuning.also` names it.
    """

    def recompute(self, chunk_mib: float | None) -> None:
        """Do so from now on; in chunks of about so many MiB where that changes nothing, None: as a whole."""


class KeyedDataset(Protocol):
    """A length, and samples by (index, sample seed), of which a sample is a pure function."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: tuple[int, int]) -> Any: ...

    def files(self) -> Files:
        """The annotations and the files that the samples are read from: a run notices when they change."""


class DataFile(Protocol[C]):
    """<task>/data.py"""

    def build_dataset(self, config: C, split: Split) -> KeyedDataset:
        """FileNotFoundError or ValueError, with the remedy, for data that is not there or not as configured."""

    def collate(self, samples: list[Any]) -> Batch:
        """Samples, which may have unequal sizes, to one batch."""

    def class_names(self, config: C) -> list[str]:
        """The name of each class, by index."""


class ModelFile(Protocol[C]):
    """<task>/model.py"""

    def build_model(self, config: C, *, pretrained: bool = True) -> Model:
        """The row's network. ValueError if its weights are unreachable, do not fit or are not finite.

        pretrained: False for random weights, for planning, and where a checkpoint is about to fill every weight.
        """

    def example_batch(self, config: C) -> Batch:
        """A batch of the shapes of one forward in training; called under fake tensors, where it takes no memory."""


class EvaluateFile(Protocol[C]):
    """<task>/evaluate.py"""

    def read_truth(self, config: C) -> Any:
        """What `score` needs besides the rows. Raises before the training, not after it."""

    def collect(self, model: Model, batch: Batch, config: C) -> list[Row]:
        """What the metric needs of one batch of the evaluation; a sample may take several forwards. In eval mode,
        without gradients, under the row's precision.
        """

    def score(self, rows: Sequence[Row], truth: Any, config: C) -> dict[str, float]:
        """Metrics of all rows, in the order of the dataset; the first is the one that tables show."""

    def write(self, folder: Path, rows: Sequence[Row], truth: Any, config: C) -> Path:
        """The predictions in the field's submission format; returns the file."""
