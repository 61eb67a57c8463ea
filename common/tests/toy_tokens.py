"""Blocks that treat tokens independently, and the families of the model zoo whose branches can be cut."""

import torch
from model_zoo import run
from torch import Tensor, nn
from toy_blocks import WIDTH, build_net

import dr2net

CHUNK_MIB = 0.01  # a window, or about ten tokens, of the models in the zoo
TRANSFORMERS = [
    *("vit", "vit_with_layer_scale_and_drop_path", "timm_swin", "swin", "swin_v2", "swin3d"),
    *("huggingface_vit", "videomae"),
]
HAVE_DROPOUT = ("huggingface_vit", "videomae")


class TokenBlock(nn.Module):
    """x + mlp(x) with dropout and drop path. x: (B, N, WIDTH)."""

    def __init__(self, dropout: float = 0.0, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm, self.up, self.down = norm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)
        self.dropout, self.drop_path = nn.Dropout(dropout), ToyDropPath()

    def f(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(torch.tanh(self.up(self.norm(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


class ToyDropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype) if self.training else x


@dr2net.branches_of.register
def _(block: TokenBlock):
    modules = (block.norm, block.up, block.down)
    return (dr2net.Branch("mlp", block.f, modules, drop_path=block.drop_path, independent="tokens"),)


def token_net(num_blocks: int = 3, **options: object) -> nn.Module:
    net = build_net(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net.blocks = nn.ModuleList([TokenBlock(**options) for _ in range(num_blocks)]).double()
    return net


def step(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    outputs = run(net, x)
    outputs.square().sum().backward()
    return outputs.detach()
