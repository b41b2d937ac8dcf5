"""A vision transformer of CIFAR's size: patches of 4 x 4 pixels, learned positions, attention."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

PATCH = 4  # pixels to a side
HEAD = 64  # channels of an attention head
EXPANSION = 4  # of a block's hidden layer


class ViT(nn.Module):
    """Pre-norm blocks of attention and GELU layers on `width` channels, 192 in ViT-Ti.

    The class is read off the mean over the patches. Smooth everywhere, so that second-order attacks
    apply.

    References: Dosovitskiy et al. 2021, arXiv 2010.11929; Touvron et al. 2021, arXiv 2012.12877
      (ViT-Ti); Beyer et al. 2022, arXiv 2205.01580 (mean in place of a class token).
    """

    classes: int
    width: int = 192
    depth: int = 6

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channel"], train: bool = False
    ) -> Float[Array, "batch class"]:
        """Computes logits from normalized images. There is nothing that `train` changes."""
        x = nn.Conv(self.width, (PATCH, PATCH), strides=PATCH, padding="VALID", name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for _ in range(self.depth):
            attention = nn.MultiHeadDotProductAttention(num_heads=self.width // HEAD)
            x = x + attention(nn.LayerNorm()(x))
            hidden = nn.gelu(nn.Dense(EXPANSION * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        return nn.Dense(self.classes)(jnp.mean(nn.LayerNorm()(x), axis=1))
