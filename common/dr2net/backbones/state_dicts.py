"""Read the weight files that others publish: `read_state_dict(path)`, safetensors or what torch.save wrote.

torch.save's files are unpickled with weights_only=True, which runs no code of theirs. Not here: this project's own
checkpoints, which are safetensors alone (dr2net/training/checkpoint.py).
"""

from pathlib import Path

import torch
from torch import Tensor

from dr2net.training.checkpoint import Tensors, read_tensors


def read_state_dict(path: Path, *, inside: str | None = None) -> Tensors:
    """Names and tensors, floating-point ones in float32, on the CPU.

    inside: the key under which a checkpoint that holds more than weights has them; without it the file is the state
    dict itself. FileNotFoundError or ValueError, naming the file, if there are none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; give an existing file with --model.weights FILE")
    if path.suffix == ".safetensors":
        state = read_tensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling raises unrelated types
            reason = str(error).splitlines()[0] if str(error) else "no message"
            raise ValueError(
                f"{path}: not a file of tensors ({type(error).__name__}: {reason}). Download it again, or save its "
                "state dict as safetensors"
            ) from error
        if isinstance(state, dict) and inside in state:
            state = state[inside]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        found = f"keys {list(state)[:6]}" if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: no state dict of tensors but {found}; save the state dict alone as safetensors")
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
