"""What the attacker takes for the labels: known, or read off the update as counts per class.

The gradient of the bias in the layer that makes the logits is the mean of softmax - onehot over the
images, so that

    count of class c = images * (mean softmax at c - bias gradient at c).

The rules differ in where they take the mean softmax from, which no update says.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float, Int

from jaxinv.errors import UserError
from jaxinv.networks.inspect import classifier_features, find_classifier
from jaxinv.types import PyTree

DUMMIES = 1024  # images of noise, over all classes, by which outputs are known to scatter
SCATTER = 0.5  # of a class's images, as a share of the dummies', where only the bias is compared
RIDGE = 1e-4  # on the classes' features, towards their mean
EVEN = 3e-3  # on the counts, towards equal ones
NOISE = 3.0  # variance of each of a gradient's entries, in units of the scatter's over the dummies
ROUNDS = 20


class LastLayer(NamedTuple):
    """All that a rule sees: the layer of the logits, its gradient, and how its inputs scatter."""

    kernel: Float[Array, "feature class"]
    bias: Float[Array, " class"]
    kernel_gradient: Float[Array, "class feature"]  # the mean over the local steps
    bias_gradient: Float[Array, " class"]
    dummies: Float[Array, "dummy feature"]  # features of noise, around their mean, if needed


def infer(
    rule: str,
    module: Any,
    variables: PyTree,
    update: PyTree,
    image_shape: tuple[int, ...],
    images: int,
    steps: int = 1,
) -> Int[Array, " image"]:
    """Reads the labels off an update, in ascending order, repeats included.

    Images of noise go through the network only for rules that look at them, a few at a time.

    Args:
      rule: one of `LABELS` but "known".
      module, variables: the network.
      update: in the gradient's direction (`client.update`), the sum over the local steps; of all
        layers, or some that include the one that makes the logits.
      image_shape: height, width, channel.
      images: how many the update is taken to be of.
      steps: local steps it is taken to be of.

    Raises:
      UserError: the layer that makes the logits was not found, or is not in the update.
      ValueError: the rule reads nothing.
    """
    if (entry := LABELS[rule]) is None:
        raise ValueError(f"labels={rule}: no rule; the labels are given")
    classifier = find_classifier(module, variables, image_shape)
    if classifier is None:
        raise UserError(
            f"labels={rule}: cannot be read, for no one layer alone makes the logits of this "
            "network; give the labels"
        )
    params = variables["params"]
    kernel, bias = classifier.matrix(params), classifier.vector(params)
    try:
        gradient = classifier.matrix(update).T / steps
        of_bias = classifier.vector(update)
    except (KeyError, ValueError):
        name = "/".join(classifier.kernel)
        raise UserError(
            f"labels={rule}: cannot be read, for the update lacks {name}, which makes the logits; "
            "give the labels"
        ) from None
    classes = kernel.shape[1]
    bias = jnp.zeros(classes) if bias is None else bias
    # The error of one image's logits is read off the weights up to a positive factor.
    alone = images == 1 and classes > 2
    features = None
    if entry.dummies or (of_bias is None and entry.bias and not alone):
        noise = natural_noise(jax.random.key(0), (max(8, DUMMIES // classes), *image_shape))
        features = classifier_features(module, variables, noise, classifier)
    if of_bias is not None:
        of_bias = of_bias / steps
    elif features is None:
        of_bias = _error_of_one(gradient)
    else:  # every class's weight gradient is its logit's times about the same features
        of_bias = gradient.sum(1) / features.sum(1).mean()
    dummies = jnp.zeros((0, len(kernel))) if features is None else features - features.mean(axis=0)
    counts = entry.count(LastLayer(kernel, bias, gradient, of_bias, dummies), images)
    return jnp.repeat(jnp.arange(classes), counts, total_repeat_length=images).astype(jnp.int32)


def _error_of_one(kernel_gradient: Float[Array, "class feature"]) -> Float[Array, " class"]:
    """softmax - onehot of one image, times a positive number, from the weight gradient alone.

    Its rows are the entries of the error times the same features. The label's is as large as all
    others together, and the only negative one.
    """
    norms = jnp.sum(jnp.square(kernel_gradient), axis=1)
    return -kernel_gradient @ kernel_gradient[jnp.argmax(norms)]


def natural_noise(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "image height width c"]:
    """Draws normalized images of noise with the spectrum of photographs, amplitude 1 / frequency.

    References: Field 1987 (the spectrum).
    """
    keys = jax.random.split(key, 3)
    height, width, channels = shape[1:]
    frequency = jnp.hypot(jnp.fft.fftfreq(height)[:, None], jnp.fft.fftfreq(width))
    amplitude = 1 / jnp.maximum(frequency, 1 / max(height, width))
    gray = jax.random.normal(keys[0], (*shape[:3], 1))
    white = 2 * gray + jax.random.normal(keys[1], shape)
    colored = jnp.fft.ifft2(
        jnp.fft.fft2(white, axes=(1, 2)) * amplitude[:, :, None], axes=(1, 2)
    ).real
    colored -= colored.mean(axis=(1, 2, 3), keepdims=True)
    scaled = 0.8 * colored / colored.std(axis=(1, 2, 3), keepdims=True)
    return scaled + 0.5 * jax.random.normal(keys[2], (shape[0], 1, 1, channels))


def apportion(shares: Float[Array, " class"], images: int) -> Int[Array, " class"]:
    """Rounds shares to whole counts of that sum, by the largest remainders; below 0 is 0."""
    shares = jnp.maximum(shares, 0)
    shares *= images / jnp.maximum(shares.sum(), 1e-12)
    counts = jnp.floor(shares)
    left = images - counts.sum()
    rank = jnp.argsort(jnp.argsort(counts - shares))
    return (counts + (rank < left)).astype(jnp.int32)


def idlg(layer: LastLayer, images: int) -> Int[Array, " class"]:
    """One image: the class whose logit's gradient, softmax - onehot, is negative.

    References: Zhao et al. 2020 (iDLG), arXiv 2001.02610.
    """
    counts = jnp.zeros(len(layer.bias), jnp.int32)
    return counts.at[jnp.argmin(layer.bias_gradient)].set(images)


def llg(layer: LastLayer, images: int) -> Int[Array, " class"]:
    """Takes the most negative sum of weight gradients, adds what one image does to it, and repeats.

    Sees ratios alone, so that the scale of the update is of no importance.

    References: Wainakh et al. 2021 (LLG), arXiv 2105.09369, algorithm 1.
    """
    sums = layer.kernel_gradient.sum(axis=1)
    classes = len(sums)
    impact = jnp.where(sums < 0, sums, 0).sum() / images * (1 + 1 / classes)

    def take(taken, state):
        sums, counts = state
        # Each class with a negative sum is there; the most negative first.
        present = (counts == 0) & (sums < 0)
        chosen = jnp.argmin(jnp.where(present | ~present.any(), sums, jnp.inf))
        return sums.at[chosen].add(-impact), counts.at[chosen].add(1)

    return lax.fori_loop(0, images, take, (sums, jnp.zeros(classes, jnp.int32)))[1]


def ilrg(layer: LastLayer, images: int) -> Int[Array, " class"]:
    """Solves for the counts, each class's softmax at the features read off its own row.

    References: Ma et al. 2022 (iLRG), arXiv 2206.13191, eqs. 9 to 12.
    """
    features = layer.kernel_gradient / layer.bias_gradient[:, None]
    softmax = jax.nn.softmax(features @ layer.kernel + layer.bias)
    return apportion(_solve(softmax, layer.bias_gradient, 0.0), images)


def counts(layer: LastLayer, images: int) -> Int[Array, " class"]:
    """Fits the last layer's gradient by images that scatter as noise does around class means.

    The class means of the features are read off the gradient (`_class_features`). Around each, the
    dummies' scatter says what one image of that class adds to the gradient, on average and with
    which covariance. The counts then are those that explain the gradient best in generalized least
    squares, whole numbers of the right sum. If the batch's softmax deviates from its expected
    value, the bias gradient and the weight gradient deviate together, so the weight gradient helps
    to correct the count.
    """
    normal, slope = _fit(layer, _class_features(layer))
    classes = len(slope)

    def worth(counts):
        return counts @ normal @ counts / images - 2 * slope @ counts

    def more(state):
        return state[1]

    def swap(state):
        """Gives one image of a class to another, the best such change."""
        counts, _ = state
        pull = 2 * (normal @ counts / images - slope)
        between = normal.diagonal()[:, None] + normal.diagonal() - 2 * normal
        change = pull - pull[:, None] + between / images  # [from, to]
        change = jnp.where((counts > 0)[:, None], change, jnp.inf)
        giver, taker = jnp.unravel_index(jnp.argmin(change), change.shape)
        there = counts.at[giver].add(-1).at[taker].add(1)
        better = worth(there) < worth(counts)
        return jnp.where(better, there, counts), better

    # Without the whole numbers: shares of sum 1.
    bordered = jnp.ones((classes + 1, classes + 1)).at[:classes, :classes].set(normal)
    bordered = bordered.at[classes, classes].set(0)
    shares = jnp.linalg.solve(bordered, jnp.append(slope, 1))[:classes]
    start = apportion(shares, images).astype(slope.dtype)
    return lax.while_loop(more, swap, (start, jnp.bool_(True)))[0].astype(jnp.int32)


def _class_features(layer: LastLayer) -> Float[Array, "class feature"]:
    """Alternates between the counts, as shares, and the mean features of each class's images.

    Given shares s, the weight gradient is M H with M = (softmax^T - 1) diag(s), linear in the
    classes' features H but for the softmax: solved with a small pull to their common mean, for M
    has no full rank. Given features, a class's mean softmax is that of its logits, scattered as the
    dummies' are, and the bias gradient is linear in the shares: solved with a small pull to equal
    ones, for a network that is certain of its images gives no gradient to tell from.
    """
    weights = jnp.abs(layer.bias_gradient)
    signed = jnp.sign(layer.bias_gradient) @ layer.kernel_gradient
    mean = signed / jnp.maximum(weights.sum(), 1e-12)
    classes = len(layer.bias)
    eye = jnp.eye(classes)

    def logits(features):
        return features @ layer.kernel + layer.bias

    scatter = SCATTER * layer.dummies @ layer.kernel

    def features_of(shares, features):
        system = (jax.nn.softmax(logits(features)).T - eye) * jnp.maximum(shares, 0)
        rest = layer.kernel_gradient - system @ common
        normal = system.T @ system + RIDGE * eye
        return common + jnp.linalg.solve(normal, system.T @ rest)

    def turn(_, state):
        features = lax.fori_loop(0, 2, lambda _, x: features_of(state[1], x), common)
        softmax = jax.nn.softmax(logits(features)[:, None] + scatter).mean(axis=1)
        return features, _solve(softmax, layer.bias_gradient, EVEN)

    common = jnp.broadcast_to(mean, (classes, len(mean)))
    start = jax.nn.softmax(logits(mean)) - layer.bias_gradient
    return lax.fori_loop(0, ROUNDS, turn, (common, start))[0]


def _fit(
    layer: LastLayer, means: Float[Array, "class feature"]
) -> tuple[Float[Array, "class class"], Float[Array, " class"]]:
    """The least squares of the counts n: n^T normal n / images - 2 slope n is to be least.

    An image with features h adds e x^T / images to the bias and weight gradients, e = softmax -
    onehot and x = [1, h]. With E the expectations of these products by class, and C their
    covariance by the scatter of the dummies plus `NOISE` in every entry, normal = E C^-1 E^T and
    slope = E C^-1 gradient. C has the rank of the scatter but for the noise, and is inverted there;
    of e x^T and e' x'^T all that is needed is their inner product (e . e') (x . x').
    """
    classes, dummies = len(layer.bias), len(layer.dummies)
    # Bias and weights in one unit.
    unit = jnp.sqrt(jnp.sum(means.mean(axis=0) ** 2) + jnp.sum(layer.dummies**2) / dummies)
    features = (means[:, None] + layer.dummies[None]).reshape(classes * dummies, -1)
    onehots = jnp.repeat(jnp.eye(classes), dummies, axis=0)
    errors = jax.nn.softmax(features @ layer.kernel + layer.bias) - onehots
    inputs = jnp.concatenate([jnp.ones((len(features), 1)), features / unit], axis=1)
    shared = jnp.concatenate([layer.bias_gradient[:, None], layer.kernel_gradient / unit], axis=1)
    products = (errors @ errors.T) * (inputs @ inputs.T)
    products = products.reshape(classes, dummies, classes, dummies)
    with_shared = ((errors @ shared) * inputs).sum(axis=1).reshape(classes, dummies, 1)
    # Of each dummy with the expectations and the gradient.
    known = jnp.concatenate([products.mean(axis=3), with_shared], axis=2)
    expected = known.mean(axis=1)
    count = classes * dummies
    across = (known - expected[:, None]).reshape(count, -1) / count**0.5
    scatter = products - products.mean(axis=1, keepdims=True)
    scatter -= scatter.mean(axis=3, keepdims=True)
    scatter = scatter.reshape(count, count) / count
    noise = NOISE * scatter.diagonal().mean() + 1e-12
    system = cho_factor(scatter + noise * jnp.eye(count))
    fitted = (expected - across[:, :classes].T @ cho_solve(system, across)) / noise
    return fitted[:, :classes], fitted[:, classes]


def _solve(
    softmax: Float[Array, "class class"], bias_gradient: Array, even: float
) -> Float[Array, " class"]:
    """Shares s of sum 1 with softmax^T s - s = bias gradient, in least squares.

    Args:
      softmax: row c is the mean softmax of the images of class c.
      even: weight of the distance to equal shares.
    """
    classes = len(bias_gradient)
    eye = jnp.eye(classes)
    rows = jnp.concatenate([softmax.T - eye, even**0.5 * eye, 10 * jnp.ones((1, classes))])
    equal = jnp.full(classes, even**0.5 / classes)
    return jnp.linalg.lstsq(rows, jnp.concatenate([bias_gradient, equal, jnp.full(1, 10.0)]))[0]


class Rule(NamedTuple):
    """An entry of `LABELS`: what counts each class's images, and what it needs of the update."""

    count: Callable[[LastLayer, int], Int[Array, " class"]]  # of so many images
    one_image: bool = False  # whether it reads one label alone
    scaled: bool = False  # whether the update must be in its own scale
    bias: bool = True  # whether it looks at the bias gradient: without one it is estimated
    dummies: bool = False  # whether it looks at how features of noise scatter


# "known": the client's labels come with the update.
LABELS: dict[str, Rule | None] = {
    "known": None,
    "idlg": Rule(idlg, one_image=True),
    "llg": Rule(llg, bias=False),
    "ilrg": Rule(ilrg, scaled=True),
    "counts": Rule(counts, scaled=True, dummies=True),
}
