"""LeNetZhu: the sigmoid network of Zhu et al. 2019 (DLG), 15,826 parameters on CIFAR-10."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinv.networks.layers import flatten, uniform


class LeNetZhu(nn.Module):
    """Three 5x5 convolutions of 12 channels with sigmoids, one dense layer.

    Every weight and bias is drawn from U(-0.5, 0.5). Smooth everywhere, which is what makes
    second-order attacks on it exact.
    """

    classes: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes logits from normalized images. There is nothing that `train` changes."""
        init = {"kernel_init": uniform(0.5), "bias_init": uniform(0.5)}
        for stride in (2, 2, 1):
            x = nn.Conv(12, (5, 5), strides=stride, padding=((2, 2), (2, 2)), **init)(x)
            x = nn.sigmoid(x)
        return nn.Dense(self.classes, **init)(flatten(x))
