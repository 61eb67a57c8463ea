"""DINO's transformer: a deformable encoder, queries chosen from what it finds, a decoder that refines boxes.

    encoder    x = norm1(x + A(x + pos, x));  x = norm2(x + linear2(relu(linear1 x)))                      post-norm
    selection  the tokens with the best class scores become boxes, detached; their contents are learned, not found
    decoder    self-attention, deformable attention at the boxes, linear layers; after each layer
               new box = sigmoid(bbox_embed(x) + logit(box)), given on detached, predicted from undetached
               ("look forward twice")

Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes", arXiv 2203.03605; parameter names of the official code.
The encoder's layers are branches for `dr2net.convert`. Not here: class and box layers, losses (`head.py`).
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dr2net
from detection.attention import DeformableAttention, Shapes, in_chunks
from engine.detr.boxes import inverse_sigmoid
from engine.detr.padding import valid_shares
from engine.detr.positions import sine_of_boxes


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        *first, last = self.layers
        for layer in first:
            x = layer(x).relu()
        return last(x)


class EncoderLayer(nn.Module):
    """x (B, N, C) of all levels, with position, reference points, shapes and padding beside it -> (B, N, C).

    residual: how the layer is split for a reversible pass. norm(x + f) has no clean residual connection: F is
    norm(x + f) - x, which stays near the plain network while alpha is near 1 and grows without bound from beta = 1/2
    on; or, if False, F is norm(x + f) and alpha is 0, which is bounded everywhere.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int, chunk: int | None) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(width, heads, levels, points, chunk)
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width)
        self.chunk = chunk
        self.residual = True

    def forward(
        self, x: Tensor, position: Tensor, reference: Tensor, shapes: Shapes, padding: Tensor | None = None
    ) -> Tensor:
        return self.transform(self.attend(x, position, reference, shapes, padding))

    def attend(
        self, x: Tensor, position: Tensor, reference: Tensor, shapes: Shapes, padding: Tensor | None = None
    ) -> Tensor:
        """norm1(x + attention)."""
        return self.norm1(x + self.self_attn(x + position, reference, x, shapes, padding))

    def transform(self, x: Tensor) -> Tensor:
        """norm2(x + linear layers), each token by itself."""
        return in_chunks(lambda x: self.norm2(x + self.linear2(self.linear1(x).relu())), self.chunk, x)


@dr2net.branches_of.register
def _(block: EncoderLayer) -> tuple[dr2net.Branch, ...]:
    attention, transform = block.attend, lambda x, *arguments: block.transform(x)
    parts = (block.self_attn, block.norm1), (block.linear1, block.linear2, block.norm2)
    if not block.residual:
        return (
            dr2net.Branch("attention", attention, parts[0], residual=False),
            dr2net.Branch("mlp", transform, parts[1], residual=False),
        )
    return (
        dr2net.Branch("attention", lambda x, *arguments: attention(x, *arguments) - x, parts[0]),
        dr2net.Branch("mlp", lambda x, *arguments: transform(x) - x, parts[1]),
    )


class Encoder(nn.Module):
    """All layers, each given the same positions."""

    def __init__(self, layers: list[EncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, position: Tensor, shapes: Shapes, shares: Tensor, padding: Tensor) -> Tensor:
        reference = centers(shapes, shares)
        for layer in self.layers:
            x = layer(x, position, reference, shapes, padding)
        return x


class DecoderLayer(nn.Module):
    """x (B, Q, C) -> (B, Q, C). norm2 follows self-attention, norm1 cross-attention: the official names.

    recompute: keep only what comes in; the values of all tokens, projected anew in each layer, are most of the rest.
    """

    def __init__(self, width: int, heads: int, levels: int, points: int, hidden: int, recompute: bool) -> None:
        super().__init__()
        self.cross_attn = DeformableAttention(width, heads, levels, points)
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm3 = nn.LayerNorm(width)
        self.recompute = recompute

    def forward(self, *arguments: Any) -> Tensor:
        """As `compute`."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *arguments, use_reentrant=False)
        return self.compute(*arguments)

    def compute(
        self,
        x: Tensor,
        position: Tensor,
        reference: Tensor,
        memory: Tensor,
        shapes: Shapes,
        padding: Tensor,
        blocked: Tensor | None,
    ) -> Tensor:
        """reference (B, Q, L, 4); blocked (Q, Q), True where a row's query does not see a column's."""
        q = x + position
        x = self.norm2(x + self.self_attn(q, q, x, attn_mask=blocked, need_weights=False)[0])
        x = self.norm1(x + self.cross_attn(x + position, reference, memory, shapes, padding))
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class Decoder(nn.Module):
    """Contents and boxes of the queries -> per layer the normed contents and the boxes that they refine."""

    def __init__(self, layers: list[DecoderLayer], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)
        self.ref_point_head = MLP(2 * width, width, width)
        self.width = width

    def forward(
        self,
        x: Tensor,
        boxes: Tensor,
        memory: Tensor,
        shapes: Shapes,
        shares: Tensor,
        padding: Tensor,
        blocked: Tensor | None,
        bbox_embed: Sequence[nn.Module],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """boxes: (B, Q, 4) in 0..1; they are the first of the second list, whose others carry a gradient."""
        both = torch.cat([shares, shares], dim=-1)  # (B, L, 4)
        contents, references = [], [boxes]
        for index, layer in enumerate(self.layers):
            reference = boxes[:, :, None] * both[:, None]
            with torch.autocast(x.device.type, enabled=False):
                sine = sine_of_boxes(reference[:, :, 0].float(), self.width // 2)
            x = layer(x, self.ref_point_head(sine), reference, memory, shapes, padding, blocked)
            contents.append(self.norm(x))
            if index + 1 < len(self.layers):
                refined = refine(bbox_embed[index], x, boxes)
                references.append(refined)
                boxes = refined.detach()
        return contents, references


class Selected(NamedTuple):
    """What the encoder proposes: the best tokens."""

    logits: Tensor  # (B, k, K)
    boxes: Tensor  # (B, k, 4)


class Transformer(nn.Module):
    """Maps of several levels -> what the decoder finds; names are those of the official code."""

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        width: int,
        levels: int,
        queries: int,
        class_embed: nn.Module,
        bbox_embed: nn.Module,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.level_embed = nn.Parameter(torch.empty(levels, width))
        self.tgt_embed = nn.Embedding(queries, width)
        self.enc_output = nn.Linear(width, width)
        self.enc_output_norm = nn.LayerNorm(width)
        self.enc_out_class_embed, self.enc_out_bbox_embed = class_embed, bbox_embed
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As officially: matrices by Xavier, then what the attention wants."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.startswith(("enc_out_class_embed", "enc_out_bbox_embed")):
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)

    def encode(
        self, maps: list[Tensor], paddings: list[Tensor], positions: list[Tensor]
    ) -> tuple[Tensor, Shapes, Tensor, Tensor]:
        """maps (B, C, h, w), paddings (B, h, w), positions (B, h, w, C) -> tokens (B, N, C), shapes, the real share of
        each level (B, L, 2), padding (B, N)."""
        shapes: Shapes = [(int(one.shape[2]), int(one.shape[3])) for one in maps]
        x = torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)
        embedded = [p.flatten(1, 2) + self.level_embed[level] for level, p in enumerate(positions)]
        padding = torch.cat([one.flatten(1) for one in paddings], dim=1)
        shares = torch.stack([valid_shares(one) for one in paddings], dim=1)
        return self.encoder(x, torch.cat(embedded, dim=1), shapes, shares, padding), shapes, shares, padding

    def select(self, memory: Tensor, shapes: Shapes, shares: Tensor, padding: Tensor) -> Selected:
        """The tokens that look most like an object of any class, as many as there are queries, or all."""
        boxes, usable = proposals(shapes, padding)

        def look(tokens: Tensor, usable: Tensor) -> Tensor:
            return self.enc_output_norm(self.enc_output(tokens.float().masked_fill(~usable[..., None], 0)))

        with torch.autocast(memory.device.type, enabled=False):
            with torch.no_grad():  # only what is selected has a loss: nothing need be kept of the others
                scores = self.enc_out_class_embed(look(memory, usable)).amax(dim=-1)
            number = min(self.tgt_embed.num_embeddings, scores.shape[1])
            best = scores.topk(number, dim=1).indices
            rows = best[..., None]
            found = look(memory.gather(1, rows.expand(-1, -1, memory.shape[-1])), usable.gather(1, best))
            # a proposal at infinity stays there: sigmoid 1, gradient 0
            moved = self.enc_out_bbox_embed(found) + boxes.gather(1, rows.expand(-1, -1, 4))
            return Selected(self.enc_out_class_embed(found), moved.sigmoid())

    def decode(
        self,
        selected: Selected,
        noised: tuple[Tensor, Tensor] | None,
        blocked: Tensor | None,
        encoded: tuple[Tensor, Shapes, Tensor, Tensor],
        bbox_embed: Sequence[nn.Module],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """noised: contents (B, D, C) and boxes (B, D, 4) of denoising queries, which come before the others."""
        memory, shapes, shares, padding = encoded
        boxes = selected.boxes.detach()
        x = self.tgt_embed.weight[: boxes.shape[1]].expand(len(boxes), -1, -1)
        if noised is not None:
            x, boxes = torch.cat([noised[0].to(x.dtype), x], dim=1), torch.cat([noised[1], boxes], dim=1)
        return cast(
            tuple[list[Tensor], list[Tensor]],
            self.decoder(x, boxes, memory, shapes, shares, padding, blocked, bbox_embed),
        )


def refine(layer: nn.Module, x: Tensor, boxes: Tensor) -> Tensor:
    """sigmoid(layer(x) + logit(boxes)), in float32."""
    with torch.autocast(x.device.type, enabled=False):
        return (layer(x.float()) + inverse_sigmoid(boxes)).sigmoid()


def centers(shapes: Shapes, shares: Tensor) -> Tensor:
    """The center of each token in 0..1 of the image, in each level's padded map: (B, N, L, 2)."""
    points = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, device=shares.device) + 0.5)[None, :] / (shares[:, level, 1:] * height)
        x = (torch.arange(width, device=shares.device) + 0.5)[None, :] / (shares[:, level, :1] * width)
        grid = [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)]
        points.append(torch.stack(grid, dim=-1).flatten(1, 2))
    return torch.cat(points, dim=1)[:, :, None] * shares[:, None]


def proposals(shapes: Shapes, padding: Tensor) -> tuple[Tensor, Tensor]:
    """A box for each token: its center, sides .05 * 2^level, as logits (B, N, 4); infinite where it is padding or
    touches the border (a coordinate not in .01 ... .99), and False in the second, (B, N)."""
    boxes, start = [], 0
    for level, (height, width) in enumerate(shapes):
        real = ~padding[:, start : start + height * width].view(-1, height, width)
        valid_height, valid_width = real[:, :, 0].sum(1), real[:, 0, :].sum(1)  # (B,)
        y = (torch.arange(height, device=padding.device) + 0.5)[None, :, None] / valid_height[:, None, None]
        x = (torch.arange(width, device=padding.device) + 0.5)[None, None, :] / valid_width[:, None, None]
        x, y = torch.broadcast_tensors(x, y)
        side = torch.full_like(x, 0.05 * 2**level)
        boxes.append(torch.stack([x, y, side, side], dim=-1).flatten(1, 2))
        start += height * width
    found = torch.cat(boxes, dim=1)
    usable = ((found > 0.01) & (found < 0.99)).all(dim=-1) & ~padding
    logits = torch.log(found / (1 - found)).masked_fill(~usable[..., None], torch.inf)
    return logits, usable
