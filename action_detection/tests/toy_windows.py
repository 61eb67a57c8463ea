"""Windows with actions, as `action_detection.data` collates them, for the tests of what is learnt."""

import torch


def windows(num_times: int, real: list[int], segments: list[list], labels: list[list[int]]) -> dict:
    """A batch without its video: one second per step, all windows from 0 to num_times seconds."""
    size = len(real)
    return {
        "mask": torch.arange(num_times) < torch.tensor(real)[:, None],
        "segments": [torch.tensor(s, dtype=torch.float32).reshape(-1, 2) for s in segments],
        "labels": [torch.tensor(label, dtype=torch.long) for label in labels],
        "name": [f"video{i}" for i in range(size)],
        "window": torch.arange(size),
        "start": torch.zeros(size),
        "seconds_per_time": torch.ones(size),
        "duration": torch.full((size,), float(num_times)),
    }
