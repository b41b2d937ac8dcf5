"""ConvNet: the eight-layer convolutional network of Geiping et al. 2020, any width."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinv.networks.kinks import relu
from jaxinv.networks.layers import conv, dense, flatten, max_pool, normalize


class ConvNet(nn.Module):
    """Six 3x3 convolutions, pool, two more, pool, dense; norm and ReLU after each convolution.

    `width` is the number of channels of the first convolution; the published network has 64.
    2,904,970 parameters at width 64 with 10 classes on 32x32x3.
    """

    classes: int
    width: int = 64
    norm: str = "batch"  # or "group"

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes logits from normalized images; `train` uses the batch's own statistics."""
        for stage in ((1, 2, 2, 4, 4, 4), (4, 4)):
            for factor in stage:
                x = conv(x, factor * self.width, kernel=3)
                x = relu(normalize(x, self.norm, train))
            x = max_pool(x, 3)
        return dense(flatten(x), self.classes)
