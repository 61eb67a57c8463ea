"""MTTR's losses: objects are matched to queries over the whole sequence, then masks and the reference have losses.

    cost   2 (- mean_t p_t[what the object should say]) + 5 (- mean_t dice(mask_t, truth_t))                matching
    loss   5 (1 - dice) + 2 focal, sums over the matched masks / number of targets
           2 cross entropy of p, weight 1 for the query of the referred object, .1 for all others, mean over frames

for each decoder layer, matched anew. p is the softmax of two numbers, referred or not; what an object should say is the
first where it is the referred one and visible, else the second. All objects of the window have masks to learn, only the
referred one has the word. dice = (2 I + 1) / (sum a + sum b + 1). Matching is at the resolution of the predictions, the
truth taken at the center of each cell; losses are at that of the truth, matched masks enlarged. Everything here is
float32, to be called outside autocast. The number of targets is that of the whole global batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import sigmoid_focal_loss

from engine.detr.matching import assign

DICE, FOCAL, REFERRED = 5.0, 2.0, 2.0  # weights of the losses
DICE_COST, REFERRED_COST = 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0
OTHERS = 0.1  # weight of the queries that are not the referred object's
STRIDE = 4  # pixels per cell of a predicted mask
PIECE = 2**22  # pixels of masks whose losses are computed at once


class Target(NamedTuple):
    """What is to be found in a sample's window: M objects in T annotated frames."""

    masks: Tensor  # (M, T, H, W), 0 or 1
    referred: Tensor  # () int64, index of the referred object
    visible: Tensor  # (T,) bool, whether that one is there

    def says(self) -> Tensor:
        """(T, M) bool: whether object m should say "referred" in frame t."""
        number = torch.arange(len(self.masks), device=self.masks.device)
        return (number == self.referred) & self.visible[:, None]


def at_cells(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (..., H, W) at the pixel in the middle of each cell: (..., *size)."""
    rows, columns = (
        (torch.arange(cells, device=masks.device) * STRIDE + STRIDE // 2).clamp(max=pixels - 1)
        for cells, pixels in zip(size, masks.shape[-2:], strict=True)
    )
    return masks[..., rows, :][..., columns]


def matching_costs(logits: Tensor, masks: Tensor, target: Target) -> Tensor:
    """logits (T, Q, 2), masks (T, Q, h, w) -> (Q, M)."""
    p = logits.float().softmax(dim=-1)
    wanted = target.says()[:, None]  # (T, 1, M)
    referred = torch.where(wanted, p[..., :1], p[..., 1:]).mean(dim=0)
    found = masks.float().sigmoid().flatten(2)  # (T, Q, h w)
    truth = at_cells(target.masks, (masks.shape[-2], masks.shape[-1])).float().flatten(2).transpose(0, 1)
    common = found @ truth.transpose(1, 2)
    total = found.sum(dim=-1)[..., None] + truth.sum(dim=-1)[:, None]
    dice = ((2 * common + 1) / (total + 1)).mean(dim=0)
    return -REFERRED_COST * referred - DICE_COST * dice


def mask_losses(masks: Tensor, truth: Tensor) -> Tensor:
    """1 - dice and mean focal loss, sums over P pairs: logits (P, h, w), truth (P, H, W) -> (2,)."""
    size = (truth.shape[-2], truth.shape[-1])
    logits = F.interpolate(masks.float()[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
    wanted = truth.flatten(1).to(logits.dtype)
    focal = sigmoid_focal_loss(logits, wanted, ALPHA, GAMMA).mean(dim=1)
    p = logits.sigmoid()
    dice = (2 * (p * wanted).sum(dim=1) + 1) / (p.sum(dim=1) + wanted.sum(dim=1) + 1)
    return torch.stack([(1 - dice).sum(), focal.sum()])


def referred_loss(logits: Tensor, queries: Tensor, objects: Tensor, target: Target) -> Tensor:
    """logits (T, Q, 2), of which `queries` (K,) are matched to `objects` (K,) -> (), the mean over frames."""
    own = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    own = own.scatter(0, queries, objects == target.referred)
    log_p = logits.float().log_softmax(dim=-1)
    loss = -torch.where(own & target.visible[:, None], log_p[..., 0], log_p[..., 1])
    return (loss * torch.where(own, 1.0, OTHERS)).sum() / len(logits)


def all_losses(logits: Tensor, masks: Tensor, targets: list[Target], num_targets: float) -> Tensor:
    """Dice, focal and reference loss, weighted, of each layer: logits (L, N, Q, 2), masks (L, N, Q, h, w), of N frames
    ordered by sample -> (L, 3).
    """
    counts = [target.masks.shape[1] for target in targets]
    layers = []
    for layer_logits, layer_masks in zip(logits, masks, strict=True):
        sums, referred = logits.new_zeros(2, dtype=torch.float32), logits.new_zeros((), dtype=torch.float32)
        pieces = zip(targets, layer_logits.split(counts), layer_masks.split(counts), strict=True)
        for number, (target, words, found) in enumerate(pieces):
            with torch.no_grad():
                cost = matching_costs(words, found, target).cpu()
            queries, objects = (index.to(logits.device) for index in assign(cost, f"sample {number} of the batch"))
            truth = target.masks[objects].transpose(0, 1).flatten(0, 1)
            number_at_once = max(1, PIECE // truth[0].numel())
            for pair in zip(
                found[:, queries].flatten(0, 1).split(number_at_once), truth.split(number_at_once), strict=True
            ):
                # enlarged masks are large, and quick to make again
                sums = sums + checkpoint(mask_losses, *pair, use_reentrant=False)
            referred = referred + referred_loss(words, queries, objects, target)
        masks_of_layer = sums * sums.new_tensor([DICE, FOCAL]) / num_targets
        layers.append(torch.cat([masks_of_layer, REFERRED * referred[None] / len(targets)]))
    return torch.stack(layers)
