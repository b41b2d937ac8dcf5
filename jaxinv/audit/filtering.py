"""The client's filter: whether to send an update, decided in seconds."""

import math
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from jaxinv.audit import games, server
from jaxinv.audit.auditing import ceiling_of
from jaxinv.client.capacity import capacity
from jaxinv.data.image_prior import ImagePrior
from jaxinv.errors import UserError
from jaxinv.types import Normalization, PyTree, Truth


class Limits(NamedTuple):
    """From when on an update is held back."""

    d_snr: float = server.DOMINANT  # of a layer: one image against all others
    parallel: float = 0.0  # share of a dense layer's units that measure what another does
    least_images: float = 1.0  # times the network's capacity: fewer can be determined exactly
    psnr: float = math.inf  # dB that the ceiling may reach; inf: it is not computed


class Decision(NamedTuple):
    """Whether to send."""

    action: str  # "send" or "hold"
    reasons: tuple[str, ...]


def filter(
    module: nn.Module,
    variables: PyTree,
    normalization: Normalization,
    images: np.ndarray,
    image_labels: np.ndarray,
    *,
    variances: PyTree | None = None,
    image_prior: ImagePrior | None = None,
    limits: Limits = Limits(),  # noqa: B008
) -> Decision:
    """Decides for a client, before it sends, in seconds.

    Args:
      module, variables: as the server sent them.
      normalization: how the network sees pixels.
      images: the client's batch, uint8.
      image_labels: its classes.
      variances: of the noise that it will add, a scalar a leaf; None: none.
      image_prior: for the ceiling, where `limits.psnr` asks for it.
      limits: from when on it is held back.
    """
    count = len(image_labels)
    normalized = normalization.normalize(np.asarray(images) / np.float32(255))
    network = games.network(module, variables, normalization)
    seen = server.inspect(network.loss, network.params, normalized, image_labels)
    reasons = []
    if count == 1:
        reasons.append("one image alone: the update is its gradient; take more images")
    else:
        worst = max(seen.d_snr, key=lambda name: np.nan_to_num(seen.d_snr[name]))
        if seen.d_snr[worst] > limits.d_snr:
            reasons.append(
                f"one image outweighs all others in {worst} (D-SNR {seen.d_snr[worst]:.2g})"
            )
    if seen.parallel > limits.parallel:
        reasons.append(f"{seen.parallel:.0%} of a dense layer's units measure the same thing")
    room = capacity(module, variables, normalized.shape[1:]).images
    if variances is None and count <= limits.least_images * room:
        reasons.append(
            f"without noise one gradient can determine {room:.1f} images; here are {count}"
        )
    if math.isfinite(limits.psnr):
        if image_prior is None:
            raise UserError("limits.psnr: the ceiling needs an image_prior")
        truth = Truth(np.asarray(images) / np.float32(255), np.asarray(image_labels, np.int32))
        top = ceiling_of(network, truth, image_prior, variances).psnr.max()
        if top > limits.psnr:
            reasons.append(f"an attacker may reach {top:.1f} dB; the limit is {limits.psnr:g}")
    return Decision("hold" if reasons else "send", tuple(reasons))
