"""The networks under attack, by name. A new one is a file here and a line in `NETWORKS`."""

from typing import NamedTuple

import flax.linen as nn

from jaxinv.errors import UserError
from jaxinv.models.convnet import ConvNet
from jaxinv.models.lenet_zhu import LeNetZhu
from jaxinv.models.mlp import MLP
from jaxinv.models.resnet import ResNet20


class Network(NamedTuple):
    """A table entry: the module class, and what it can be given."""

    module: type[nn.Module]
    width: int | None  # the published width; None where the network has no such setting
    smallest: int = 1  # least height and width of an image that survives the pooling


NETWORKS = {
    "lenet_zhu": Network(LeNetZhu, width=None),
    "convnet": Network(ConvNet, width=64, smallest=9),
    "resnet20": Network(ResNet20, width=16),
    "mlp": Network(MLP, width=1024),
}


def build(name: str, *, classes: int, width: int | None = None) -> nn.Module:
    """Builds a network by name, at its published width unless told otherwise.

    Raises:
      UserError: the name is unknown (the known ones are listed).
    """
    if name not in NETWORKS:
        raise UserError(f"--model {name}: unknown; known networks: {', '.join(NETWORKS)}")
    entry = NETWORKS[name]
    if entry.width is None:
        return entry.module(classes=classes)
    return entry.module(classes=classes, width=width or entry.width)
