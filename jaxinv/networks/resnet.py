"""ResNets for small images (He et al. 2016), built like the ones of Geiping et al. 2020.

The stem is a 3x3 convolution of stride 1 and no pooling. Three stages make the CIFAR family
(ResNet20, 32, 56), four the ImageNet family (ResNet18, 34, 50).
"""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinv.networks.kinks import relu
from jaxinv.networks.layers import conv_kaiming, dense, normalize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    features: int
    stride: int
    norm: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channel"], train: bool) -> Array:
        """Computes the block's output; ReLU comes after the addition."""
        shortcut = _shortcut(x, self.features, self.stride, self.norm, train)
        y = conv_kaiming(x, self.features, 3, self.stride)
        y = relu(normalize(y, self.norm, train))
        y = normalize(conv_kaiming(y, self.features, 3), self.norm, train)
        return relu(shortcut + y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 to four times the features, and a shortcut."""

    features: int
    stride: int
    norm: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channel"], train: bool) -> Array:
        """Computes the block's output; ReLU comes after the addition."""
        shortcut = _shortcut(x, 4 * self.features, self.stride, self.norm, train)
        y = relu(normalize(conv_kaiming(x, self.features, 1), self.norm, train))
        y = conv_kaiming(y, self.features, 3, self.stride)
        y = relu(normalize(y, self.norm, train))
        y = normalize(conv_kaiming(y, 4 * self.features, 1), self.norm, train)
        return relu(shortcut + y)


def _shortcut(x: Array, features: int, stride: int, norm: str, train: bool) -> Array:
    """The input itself, or brought to the output's shape."""
    if x.shape[-1] == features and stride == 1:
        return x
    return normalize(conv_kaiming(x, features, 1, stride), norm, train)


class ResNet(nn.Module):
    """A residual network: `blocks` in each stage, features w, 2w, 4w, ..., stride 2 in between.

    With 10 classes, parameters of the published ones: ResNet20 272,474 at width 16 and 4,327,754
    at width 64 ("ResNet20-4"); at width 64 ResNet18 11,173,962, ResNet34 21,282,122 and ResNet50
    23,520,842. The convolutions start Kaiming-normal by fan-out, the dense layer as in PyTorch.
    """

    classes: int
    width: int
    blocks: tuple[int, ...]
    block: type[nn.Module] = BasicBlock
    norm: str = "batch"  # or "group"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes logits from normalized images; `train` uses the batch's own statistics."""
        x = relu(normalize(conv_kaiming(x, self.width, 3), self.norm, train))
        for stage, blocks in enumerate(self.blocks):
            for index in range(blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(self.width * 2**stage, stride, self.norm)(x, train)
        return dense(x.mean(axis=(1, 2)), self.classes)
