"""The branches of pytorchvideo's blocks: ResNet, SlowFast."""

from dr2net.adapters.parts import added
from dr2net.branches import branches_of


def register() -> None:
    """Once, see `dr2net.adapters.register`."""
    from pytorchvideo.models.resnet import ResBlock

    branches_of.register(ResBlock, lambda block: added(block) if block.branch1_conv is None else ())
