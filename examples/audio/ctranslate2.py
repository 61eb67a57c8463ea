"""Reads the weights file of CTranslate2, an engine that runs translation and speech models: names and arrays.

    tensors = read_model(path, wanted=lambda name: name.startswith("encoder/"))
    tensors["encoder/conv1/weight"]                          # (384, 80, 3) float32

The file, little-endian: version (4 bytes, 2 to 6), the model's class as a string, revision (4), number of variables
(4), and for each its name as a string, its rank (1), its sizes (4 each), the code of its type (1), its bytes (4), its
numbers. Behind them are other names of some variables, which are not read. A string is its length (2), counting a zero
at its end, and its letters. The encoder of whisper-tiny.en that is made of this gives what CTranslate2's own gives,
within 7e-6 of its norm. Not here: weights in whole numbers, which are quantized and refused by name.
"""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from engine.files import require_file

VERSIONS = range(2, 7)
TYPES: dict[int, str] = {0: "<f4", 1: "|i1", 2: "<i2", 3: "<i4", 4: "<f2"}  # by their code
MAX_VARIABLES, MAX_RANK = 1 << 16, 8


def read_model(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The wanted variables by name, floats as float32. FileNotFoundError, or ValueError naming the file and what is
    wrong: another format, a file that ends early, sizes that contradict each other, quantized weights.
    """
    size = require_file(path, "fetch it again").st_size
    with open(path, "rb") as file:
        try:
            return _read(file, size, wanted)
        except (ValueError, struct.error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: cannot be read as a model of CTranslate2 ({error}); fetch it again") from error


def _read(file: BinaryIO, size: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    version = _number(file, "<I")
    if version not in VERSIONS:
        raise ValueError(f"it begins with version {version}, known are {VERSIONS[0]} to {VERSIONS[-1]}")
    _string(file)
    _number(file, "<I")
    count = _number(file, "<I")
    if count > MAX_VARIABLES:
        raise ValueError(f"it says that it has {count} variables")
    found: dict[str, Tensor] = {}
    for _ in range(count):
        name, rank = _string(file), _number(file, "<B")
        if rank > MAX_RANK:
            raise ValueError(f"{name} has {rank} dimensions")
        shape = tuple(_number(file, "<I") for _ in range(rank))
        code, num_bytes = _number(file, "<B"), _number(file, "<I")
        if code not in TYPES:
            raise ValueError(f"{name} is of the unknown type {code}")
        kind = np.dtype(TYPES[code])
        if math.prod(shape) * kind.itemsize != num_bytes or file.tell() + num_bytes > size:
            raise ValueError(f"{name} of {shape} has {num_bytes} bytes, at {file.tell()} of {size}")
        if name in found:
            raise ValueError(f"{name} is there twice")
        if not wanted(name):
            file.seek(num_bytes, 1)
            continue
        if rank and kind.kind != "f":
            raise ValueError(f"{name} is quantized, of type {kind}; give a model with floats of 16 or 32 bits")
        array = np.frombuffer(_bytes(file, num_bytes), kind).reshape(shape)
        found[name] = torch.from_numpy(array.astype(np.float32 if kind.kind == "f" else np.int64))
    return found


def _bytes(file: BinaryIO, count: int) -> bytes:
    content = file.read(count)
    if len(content) != count:
        raise ValueError(f"it ends after {file.tell()} bytes")
    return content


def _number(file: BinaryIO, layout: str) -> int:
    return int(struct.unpack(layout, _bytes(file, struct.calcsize(layout)))[0])


def _string(file: BinaryIO) -> str:
    return _bytes(file, _number(file, "<H")).removesuffix(b"\0").decode()
