"""MobileNetV2 (Sandler et al. 2018) for small images."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinv.networks.kinks import relu6
from jaxinv.networks.layers import conv_kaiming, normalize

# Of the inverted residuals: expansion, channels at multiplier 1, repetitions, stride of the first.
# For images of 32x32, the stem and the second group keep the size (both halve it for ImageNet).
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
HEAD = 1280  # channels of the last convolution; smaller multipliers leave it as it is


class InvertedResidual(nn.Module):
    """1x1 expansion (if any), depthwise 3x3, linear 1x1; added to the input if it fits."""

    features: int
    stride: int
    expansion: int
    norm: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channel"], train: bool) -> Array:
        """Computes the block's output; no activation follows the last convolution."""
        hidden = self.expansion * x.shape[-1]
        y = x
        if self.expansion != 1:
            y = relu6(normalize(conv_kaiming(y, hidden, 1), self.norm, train))
        y = conv_kaiming(y, hidden, 3, self.stride, groups=hidden)
        y = relu6(normalize(y, self.norm, train))
        y = normalize(conv_kaiming(y, self.features, 1), self.norm, train)
        return x + y if self.stride == 1 and self.features == x.shape[-1] else y


class MobileNetV2(nn.Module):
    """MobileNetV2 with a 3x3 stem of stride 1 and ReLU6.

    `width` is the number of channels of the stem, a multiple of 8; the width multiplier of the
    paper is `width` / 32. 2,236,682 parameters at width 32 with 10 classes. Convolutions start
    Kaiming-normal by fan-out, the dense layer N(0, 0.01). The published dropout before the dense
    layer acts in training alone and is left out.
    """

    classes: int
    width: int = 32
    norm: str = "batch"  # or "group"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes logits from normalized images; `train` uses the batch's own statistics."""
        x = relu6(normalize(conv_kaiming(x, self.width, 3), self.norm, train))
        for expansion, channels, blocks, first_stride in STAGES:
            features = scale_channels(channels, self.width / 32)
            for index in range(blocks):
                stride = first_stride if index == 0 else 1
                x = InvertedResidual(features, stride, expansion, self.norm)(x, train)
        x = conv_kaiming(x, scale_channels(HEAD, max(1.0, self.width / 32)), 1)
        x = relu6(normalize(x, self.norm, train))
        return nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.01))(x.mean(axis=(1, 2)))


def scale_channels(channels: int, multiplier: float) -> int:
    """Channels times the multiplier, to the nearest multiple of 8 not 10% below the product."""
    exact = channels * multiplier
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8
