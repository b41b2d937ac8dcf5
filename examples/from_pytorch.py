"""From a PyTorch model, and the gradient of one image, to a picture.

    pip install "jaxinv[torch]"
    python examples/from_pytorch.py

The same layers are written down in Flax once. `jaxinv.from_torch` takes the parameters over, checks
that both networks compute the same, and converts the client's gradient with them: kernels are laid
out otherwise, and so are the rows of a dense layer that reads flattened maps.
"""

import sys

import flax.linen as nn
import numpy as np
import torch
from PIL import Image

import jaxinv
from jaxinv import data

EXAMPLE = 17  # of the shipped test tiles


def torch_model(classes: int) -> torch.nn.Module:
    """The client's network."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 5, stride=2, padding=2),
        torch.nn.Sigmoid(),
        torch.nn.Conv2d(12, 12, 5, stride=2, padding=2),
        torch.nn.Sigmoid(),
        torch.nn.Flatten(),
        torch.nn.Linear(768, classes),
    )


class FlaxModel(nn.Module):
    """The same in Flax."""

    classes: int

    @nn.compact
    def __call__(self, x):
        """Images [batch, height, width, channel] -> logits."""
        x = nn.sigmoid(nn.Conv(12, (5, 5), strides=2, padding=2)(x))
        x = nn.sigmoid(nn.Conv(12, (5, 5), strides=2, padding=2)(x))
        return nn.Dense(self.classes)(x.reshape(len(x), -1))


def main(seeds: int = 2, iterations: int = 28) -> jaxinv.Inversion:
    """The client's gradient in PyTorch; the attack in JAX."""
    tiles = data.load("tiles", split="test", ids=[EXAMPLE])
    image = tiles.images.astype(np.float32) / 255
    torch.manual_seed(0)
    theirs = torch_model(len(tiles.classes))
    logits = theirs(torch.from_numpy(np.moveaxis(image, -1, 1).copy()))
    torch.nn.functional.cross_entropy(logits, torch.tensor(tiles.labels).long()).backward()
    gradient = {name: p.grad for name, p in theirs.named_parameters()}

    ours = FlaxModel(len(tiles.classes))
    converted = jaxinv.from_torch(theirs, ours, image.shape[1:])
    found = jaxinv.invert(
        ours,
        converted.variables,
        converted.update(gradient),
        image_shape=image.shape[1:],
        method=jaxinv.GaussNewton(),  # of a network with sigmoids; of one with ReLUs leave it out
        seeds=seeds,
        iterations=iterations,
    )
    print(f"label {tiles.classes[found.labels[0]]}, objective {np.nanmin(found.objectives):.2g}")
    print(f"{found.verdict} (a gray image: {found.guesses.gray:.2g})")
    pixels = np.concatenate([image[0], found.best[0]], axis=1)
    Image.fromarray(np.uint8(np.round(255 * pixels))).save("from_pytorch.png")
    return found


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
