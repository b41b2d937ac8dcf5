"""What gradient matching moves: the pixels themselves, or something that images come out of.

An optimizer that takes steps of one length in every direction, as Adam and the gradient's sign do,
goes where the coordinates point. In pixels that is as far into noise as into anything that looks
like an image; in coordinates in which images are equally spread in all directions it is not.

References: Olah et al. 2017, doi 10.23915/distill.00007 (decorrelated coordinates in place of a
  regularizer, for the visualization of features).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxinv.data.image_prior import unwhiten, whiten


class Representation(NamedTuple):
    """A table entry: pure functions to normalized images and back."""

    to_images: Callable[..., Any]  # (image prior, parameters) -> images
    to_parameters: Callable[..., Any]  # (image prior, images) -> parameters
    needs_prior: bool = False


REPRESENTATIONS = {
    "pixels": Representation(lambda prior, pixels: pixels, lambda prior, images: images),
    # The coefficients of a Gaussian image prior, in units of their standard deviations.
    "whitened": Representation(unwhiten, whiten, needs_prior=True),
}
