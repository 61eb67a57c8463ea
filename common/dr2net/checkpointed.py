"""One residual branch of a checkpointed sequence: only its input is kept, and chunks are as in a reversible one.

    forward   x_i = F_i(x_{i-1}) + x_{i-1}          the plain network, in the plain network's precision
    backward  recompute F_i at the kept x_{i-1}, chunk by chunk, and differentiate it

This is what reversibility has to be compared with: it changes no function, needs no coefficients, and never holds a
branch's inner activations, nor F(x), as a whole. It keeps one tensor of the stream's size per branch, where a
reversible sequence keeps remainders of a few bits. Nothing is rebuilt, so nothing is checked against what was.
Not here: what a first run notes for the second, and its refusals (`node.py`); the streams of a pass (`reversible.py`).
"""

from typing import Any

import torch
from torch import Tensor

from dr2net.node import Node


class Checkpointed(torch.autograd.Function):
    """Inputs: node, x = x_{i-1}, then the tensors among the block's side arguments, then the branch's trainable
    parameters. Output x_i.
    """

    @staticmethod
    def forward(ctx: Any, node: Node, x: Tensor, *tensors: Tensor) -> Tensor:
        side = list(tensors[: len(node.tensor_at)])
        needs = ctx.needs_input_grad[1 : 2 + len(side)]
        with node.first_run(ctx, x, needs):
            following = node.run(x, side, needs, plus=node.alpha)
        if node.recording:
            ctx.save_for_backward(x, *side)
        return following

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a sequence checkpointed in chunks has no second derivative: call without create_graph=True, or use "
                "dr2net.checkpoint_blocks(model) without chunk_mib"
            )
        node: Node = ctx.node
        x, *side = ctx.saved_tensors
        if node.chunks is None:
            grad_x, rest = node.differentiate(node.recompute(x, side), grad)
        else:
            _, grad_x, rest = node.differentiate_in_chunks(x, side, grad, keep_f=False)
        return None, grad_x, *rest
