"""ResNets for small images (He et al. 2016), built like the ones of Geiping et al. 2020."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinv.models.layers import batch_norm, dense, kaiming_normal_fan_out


def _conv(features: int, kernel: int, stride: int = 1) -> nn.Conv:
    """A convolution without bias, padded to keep the size at stride 1."""
    pad = (kernel - 1) // 2
    return nn.Conv(
        features, (kernel, kernel), strides=stride, padding=((pad, pad), (pad, pad)),
        use_bias=False, kernel_init=kaiming_normal_fan_out,
    )  # fmt: skip


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channel"], train: bool) -> Array:
        """Computes the block's output; ReLU comes after the addition."""
        norm = lambda y: batch_norm(use_running_average=not train)(y)  # noqa: E731
        shortcut = x
        if x.shape[-1] != self.features or self.stride != 1:
            shortcut = norm(_conv(self.features, 1, self.stride)(x))
        y = nn.relu(norm(_conv(self.features, 3, self.stride)(x)))
        y = norm(_conv(self.features, 3)(y))
        return nn.relu(shortcut + y)


class ResNet20(nn.Module):
    """CIFAR ResNet-20: three stages of three basic blocks, widths w, 2w, 4w.

    272,474 parameters at width 16 and 4,327,754 at width 64 ("ResNet20-4") with 10 classes. The
    convolutions start Kaiming-normal by fan-out, as in the code of Geiping et al.
    """

    classes: int
    width: int = 16

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes logits from normalised images; `train` uses the batch's own statistics."""
        x = nn.relu(batch_norm(use_running_average=not train)(_conv(self.width, 3)(x)))
        for stage in range(3):
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                x = BasicBlock(self.width * 2**stage, stride)(x, train)
        return dense(x.mean(axis=(1, 2)), self.classes)
