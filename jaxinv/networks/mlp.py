"""A multilayer perceptron: the network whose first layer gives its input away exactly."""

import flax.linen as nn
from jaxtyping import Array, Float

from jaxinv.networks.kinks import relu
from jaxinv.networks.layers import dense, flatten


class MLP(nn.Module):
    """Three hidden ReLU layers of `width` units, 1024 in the published attacks."""

    classes: int
    width: int = 1024

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes logits from normalized images. There is nothing that `train` changes."""
        x = flatten(x)
        for _ in range(3):
            x = relu(dense(x, self.width))
        return dense(x, self.classes)
