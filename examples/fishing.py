"""One image out of a batch, for a server that may send other parameters: fishing for a class.

    python examples/fishing.py

A client shares one gradient of 19 photographs, 18 of six classes and one of a seventh. The server
set the weights of all other classes in the last layer to zero and their biases high, so that no
derivative goes back through them: in front of that layer the gradient is of the one image alone,
divided by 19. A second-order attack on single images then finds it; the gradient that an honest
server gets determines two images at most. The picture has the client's images, the one that was
fished for, and what was found. What a client can look for beforehand: examples/flower_filter.py.

References: Wen et al. 2022 (Fishing for user data), arXiv 2202.00580.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxinv
from jaxinv import client, data, metrics
from jaxinv.audit.server import fish_class
from jaxinv.reporting.figures import style
from jaxinv.reporting.figures.pictures import tile
from jaxinv.types import Normalization

WANTED = 1  # the class that the server fishes for
OTHERS = 3  # images of each other class


def main(picture: str = "fished.png") -> float:
    """Plays a round, attacks what the server got, and writes the truth beside what was found."""
    victim = jaxinv.load_victim("lenet_zhu-tiles")
    tiles = data.load("tiles", split="test", ids=64)
    own = np.flatnonzero(tiles.labels == WANTED)[:1]
    rest = [np.flatnonzero(tiles.labels == c)[:OTHERS] for c in set(tiles.labels) - {WANTED}]
    batch = np.concatenate([own, *rest])

    # The server.
    params = dict(victim.variables["params"])
    kernel, bias = fish_class(params["Dense_0"]["kernel"], params["Dense_0"]["bias"], WANTED)
    params["Dense_0"] = {"kernel": kernel, "bias": bias}
    fished = {**victim.variables, "params": params}

    # The client, who suspects nothing.
    normalization = Normalization.of(victim.info.mean, victim.info.std)
    images = normalization.normalize(tiles.images[batch] / np.float32(255))
    loss = client.loss_fn(victim.module, fished)
    update, _ = client.gradient(loss, params, images, tiles.labels[batch])

    # The server again: the layers in front of the last one.
    in_front = {name: layer for name, layer in update.items() if name != "Dense_0"}
    found = jaxinv.invert(
        victim.module,
        fished,
        jax.tree.map(lambda x: x * len(batch), in_front),
        image_shape=victim.info.image_shape,
        labels=[WANTED],
        mean=victim.info.mean,
        std=victim.info.std,
        method=jaxinv.GaussNewton(),
    ).best[0]

    every = tiles.images[batch] / np.float32(255)
    psnr = float(metrics.psnr(jnp.asarray(found[None]), jnp.asarray(every[:1]))[0])
    style.save(draw(tile(every), every[0], found, len(batch), psnr), Path(picture), ("png",))
    print(f"the only {tiles.classes[WANTED]} of {len(batch)} images: {psnr:.1f} dB ({picture})")
    return psnr


@style.styled
def draw(
    batch: np.ndarray, truth: np.ndarray, found: np.ndarray, count: int, psnr: float
) -> Figure:
    """Draws the client's images, the one that was fished for, and what was found."""
    heads = {
        f"The client's batch: {count} images, one gradient": batch,
        "The only one of its class": truth,
        f"Found in that gradient, {psnr:.1f} dB": found,
    }
    figure = Figure(figsize=(9, 2.75), layout="constrained")
    widths = {"width_ratios": [batch.shape[1] / batch.shape[0], 1, 1]}
    for axes, (head, pixels) in zip(figure.subplots(1, 3, gridspec_kw=widths), heads.items()):
        axes.imshow(pixels, interpolation="none")
        axes.set_title(head, size=10)
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    main(*sys.argv[1:2])
