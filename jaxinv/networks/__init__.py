"""The networks under attack, by name. A new one is a file here and a line in `NETWORKS`.

Each network with BatchNorm has a GroupNorm twin, `resnet18_gn` beside `resnet18`: the same layers,
parameters and inits, but no image's output depends on another image or on running statistics.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from jaxinv.errors import UserError
from jaxinv.networks.convnet import ConvNet
from jaxinv.networks.lenet_zhu import LeNetZhu
from jaxinv.networks.mlp import MLP
from jaxinv.networks.mobilenet import MobileNetV2
from jaxinv.networks.resnet import Bottleneck, ResNet
from jaxinv.networks.vit import HEAD, PATCH, ViT


class Network(NamedTuple):
    """A table entry: what makes the module, and what it can be given."""

    title: str  # as its paper spells it
    module: Callable[..., nn.Module]  # takes `classes`, and `width` if the network has one
    width: int | None  # the published width; None where the network has no such setting
    smallest: int = 1  # least height and width of an image that survives the pooling
    width_step: int = 1  # widths are multiples of this
    smooth: bool = False  # whether it has no kinks (`networks.kinks`)


def _resnet(title: str, width: int, *blocks: int, **fields) -> Network:
    """A table entry of the ResNet family."""
    return Network(title, functools.partial(ResNet, blocks=blocks, **fields), width)


def _twin(network: Network) -> Network:
    """The same network with GroupNorm."""
    return network._replace(
        title=f"{network.title}-GN", module=functools.partial(network.module, norm="group")
    )


_BATCH_NORM = {
    "convnet": Network("ConvNet", ConvNet, width=64, smallest=9),
    "resnet20": _resnet("ResNet20", 16, 3, 3, 3),
    "resnet32": _resnet("ResNet32", 16, 5, 5, 5),
    "resnet56": _resnet("ResNet56", 16, 9, 9, 9),
    "resnet18": _resnet("ResNet18", 64, 2, 2, 2, 2),
    "resnet34": _resnet("ResNet34", 64, 3, 4, 6, 3),
    "resnet50": _resnet("ResNet50", 64, 3, 4, 6, 3, block=Bottleneck),
    "mobilenetv2": Network("MobileNetV2", MobileNetV2, width=32, width_step=8),
}
NETWORKS = {
    "lenet_zhu": Network("LeNetZhu", LeNetZhu, width=None, smooth=True),
    "mlp": Network("MLP", MLP, width=1024),
    "vit": Network("ViT", ViT, width=192, smallest=PATCH, width_step=HEAD, smooth=True),
    **_BATCH_NORM,
    **{f"{name}_gn": _twin(network) for name, network in _BATCH_NORM.items()},
}


def build(name: str, *, classes: int, width: int | None = None) -> nn.Module:
    """Builds a network by name, at its published width unless another is given.

    Raises:
      UserError: the name is unknown (the known ones are listed), or the network has no such width.
    """
    if name not in NETWORKS:
        raise UserError(f"--model {name}: unknown; known networks: {', '.join(NETWORKS)}")
    entry = NETWORKS[name]
    if entry.width is None:
        return entry.module(classes=classes)
    width = entry.width if width is None else width
    if width % entry.width_step:
        raise UserError(f"--width {width}: {name} has widths that {entry.width_step} divides")
    return entry.module(classes=classes, width=width)


def check_image_size(name: str, dataset: str, shape: tuple[int, int, int]) -> None:
    """Raises a UserError if images of this height, width, channel do not survive the pooling."""
    smallest = NETWORKS[name].smallest
    if min(shape[:2]) < smallest:
        raise UserError(
            f"--model {name} needs images of at least {smallest}x{smallest}; "
            f"--dataset {dataset} has {shape[0]}x{shape[1]}"
        )
