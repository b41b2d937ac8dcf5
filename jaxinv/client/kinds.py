"""What was sent: a gradient, a difference of parameters or new parameters, and in which scale.

The attacks compare updates in the gradient's direction; some label rules and the squared distance
need its scale too. Much of that is in the numbers. New parameters are nearly the old ones. With the
cross-entropy, the gradient of the bias that makes the logits is the mean of softmax - onehot:

* of one image one entry is negative, the label's, and all others are positive;
* its absolute values sum to 2 at the most (a summed loss: 2 for every image);
* of one image the weight gradient gives the layer's input, and so the softmax: the factor by which
  the update was multiplied is found exactly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.errors import UserError
from jaxinv.networks.inspect import Classifier
from jaxinv.types import PyTree, path_name

AUTO = "auto"
SAME_WEIGHTS = 0.9  # cosine with the old parameters from which new ones are taken for such
LEAST_NORM, MOST_NORM = 1e-12, 1e12  # between which float32 can square an update
CLOSE = 0.02  # to 1: a factor that is none
NEAR = 0.05  # relative error of a last layer that is taken for one image's
SURE = 3.0  # factor by which the scale of several images' update can be told


class Received(NamedTuple):
    """An update as the attacks take it."""

    gradient: PyTree  # float32 or float64, in the gradient's direction
    scaled: bool  # whether it is the mean gradient itself, not a multiple of it
    kind: str  # of `KINDS`
    factor: float | None  # of the mean gradient, where it was found in the numbers
    rounding: float  # relative error that its own numbers' rounding leaves, as norms
    remarks: tuple[str, ...]  # on what was found


class Kind(NamedTuple):
    """A table entry: how what was sent becomes a gradient."""

    # (sent, parameters before) -> something in the gradient's direction
    turn: Callable[[PyTree, PyTree], PyTree]
    # (images, the client's rate or None) -> what that is to be divided by; None: unknown
    scale: Callable[[int, float | None], float | None]


def _minus(left, right):
    return jax.tree.map(np.subtract, left, right)


def _of_rate(images: int, rate: float | None) -> float | None:
    """The scale of a difference of parameters: the client's rate times the gradient."""
    return rate


KINDS: dict[str, Kind] = {
    # The gradient of the mean loss, or of several steps the sum of theirs.
    "gradient": Kind(lambda sent, old: sent, lambda images, rate: 1.0),
    # The gradient of the loss summed over the images.
    "summed-gradient": Kind(lambda sent, old: sent, lambda images, rate: float(images)),
    # The parameters before minus those after the client's work, and the other way round.
    "old-minus-new": Kind(lambda sent, old: sent, _of_rate),
    "new-minus-old": Kind(lambda sent, old: jax.tree.map(np.negative, sent), _of_rate),
    # The parameters after the client's work.
    "weights": Kind(lambda sent, old: _minus(old, sent), _of_rate),
}


def understand(
    sent: PyTree,
    old: PyTree,
    kind: str = AUTO,
    *,
    images: int = 1,
    steps: int = 1,
    rate: float | None = None,
    classifier: Classifier | None = None,
    params: PyTree = None,
    name: str = "update",
) -> Received:
    """Checks what a client sent, and makes a gradient of it.

    Args:
      sent: shaped like `old`, of any real numbers.
      old: the parameters before the client's work, those that were sent.
      kind: of `KINDS`; or "auto", told from the numbers, and where they do not tell, a gradient.
      images: how many it is of.
      steps: the client's local steps.
      rate: the client's learning rate; None where it is not known.
      classifier: the layer that makes the logits, of a client with the cross-entropy; else None.
      params: all parameters, where some were not sent.
      name: of the update, for messages.

    Raises:
      UserError: it holds something else than finite numbers, or nothing, or numbers that
        contradict the kind.
    """
    if kind not in (AUTO, *KINDS):
        raise UserError(f"update_kind={kind}: known are {AUTO}, {', '.join(KINDS)}")
    check_numbers(sent, name)
    given, rounding = kind != AUTO, _rounding(sent)
    sent, old = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree) for tree in (sent, old))
    kind = kind if given else _weights_or_gradient(sent, old)
    _check_weights(kind, sent, old, name)
    gradient, remarks = KINDS[kind].turn(sent, old), []
    if kind == "weights" and not given:
        remarks.append("read as new parameters: they point where the network's own do")
    if not _norm(gradient) > 0:
        raise UserError(f"{name}: the new parameters are the old ones; the client took no step")
    layer = _last_layer(classifier, gradient, old if params is None else params)
    if layer is not None and (why := _wrong_way(layer, images)):
        if given or kind == "weights":
            raise UserError(f"{name}: update_kind={kind} points the wrong way: {why}")
        remarks.append(f"read as new minus old parameters: {why}")
        kind, layer = "new-minus-old", layer.negative()
        gradient = jax.tree.map(np.negative, gradient)
    own = KINDS[kind].scale(images, rate)
    scale = _Scale(own or 1.0, own is not None)
    if layer is not None:
        if given:
            _check_size(kind, layer, steps, scale.divisor, name)
        scale = _found_scale(scale, layer, given, images, steps)
        remarks += [scale.remark] if scale.remark else []
    if scale.is_multiple or not kind.endswith("gradient"):  # a difference of rounded parameters
        rounding *= max(1.0, _norm(old) / _norm(sent if kind != "weights" else gradient))
    gradient = jax.tree.map(lambda x: x / scale.divisor, gradient)
    return Received(gradient, scale.known, kind, scale.factor, rounding, tuple(remarks))


class _Scale(NamedTuple):
    """What an update is to be divided by, and how sure that is."""

    divisor: float
    known: bool
    factor: float | None = None  # of the mean gradient, where the numbers tell
    exact: bool = False
    remark: str = ""

    @property
    def is_multiple(self) -> bool:
        """Whether the numbers show a multiple of the mean gradient."""
        return self.factor is not None and self.exact and abs(self.factor - 1) > CLOSE


def _found_scale(own: _Scale, layer: "_LastLayer", given: bool, images: int, steps: int) -> _Scale:
    """The scale that the numbers tell, where they tell it better than the kind."""
    factor, exact = _factor(layer, images, steps)
    if factor is None:
        return own
    left = factor / own.divisor  # of what the kind explains
    known = exact or (own.known and (given or 1 / SURE < left < SURE))
    remark = ""
    if not known or (exact and abs(left - 1) > CLOSE):
        about = "" if exact else "about "
        remark = f"{about}{factor:.2g} times the mean gradient, by its last layer"
    return _Scale(factor if exact else own.divisor, known, factor, exact, remark)


def check_numbers(tree: PyTree, name: str) -> None:
    """Refuses what is no update at all, in one line that names the first leaf.

    Raises:
      UserError: a leaf holds no real numbers, NaN or infinities; all are 0; or they are too large
        or too small to be squared in float32.
    """
    check_finite(tree, name)
    norm = _norm(tree)
    if norm == 0:
        raise UserError(f"{name}: is zero in all layers: there is nothing to invert")
    if not LEAST_NORM <= norm <= MOST_NORM:
        raise UserError(
            f"{name}: its norm is {norm:.3g}; scale it into {LEAST_NORM:g} to {MOST_NORM:g}, which "
            "float32 can square"
        )


def check_finite(tree: PyTree, name: str) -> None:
    """Refuses what holds no real numbers, NaN or infinities, in one line that names the first leaf.

    Raises:
      UserError: a leaf does.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        of = path_name(path)
        dtype = getattr(leaf, "dtype", np.asarray(leaf).dtype)
        if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
            raise UserError(f"{name}: {of} holds {dtype}; an update is of real numbers")
        values = np.asarray(leaf).astype(np.float64)
        for what, bad in (("NaN", np.isnan(values)), ("infinite", np.isinf(values))):
            if bad.any():
                raise UserError(
                    f"{name}: {of} has {bad.sum()} {what} of {bad.size} numbers; the client's "
                    "training diverged, or the file is damaged"
                )


def _weights_or_gradient(sent: PyTree, old: PyTree) -> str:
    """New parameters point where the old ones do, and are as long."""
    alike = _cosine(sent, old) > SAME_WEIGHTS and 0.5 < _norm(sent) / _norm(old) < 2
    return "weights" if alike else "gradient"


def _check_weights(kind: str, sent: PyTree, old: PyTree, name: str) -> None:
    """Refuses weights that are none, and what is weights but was not said to be."""
    cosine = _cosine(sent, old)
    if kind == "weights" and cosine < 1 - SAME_WEIGHTS:
        raise UserError(
            f"{name}: update_kind=weights: its cosine with the network's own parameters is "
            f"{cosine:.2g}; is it a gradient, or of another network?"
        )
    if kind != "weights" and cosine > 0.99:
        raise UserError(
            f"{name}: update_kind={kind}: its cosine with the network's own parameters is "
            f"{cosine:.4f}: these are new weights; use weights"
        )


def _wrong_way(layer: "_LastLayer", images: int) -> str:
    """Says what shows that an update points against the gradient; "" where nothing does."""
    if _direction(layer.error, images) >= 0:
        return ""
    return (
        f"{layer.name} has {int(np.sum(layer.error < 0))} negative entries, that of the "
        f"gradient of {images} image{'s' if images > 1 else ''} at most {images}"
    )


def _check_size(kind: str, layer: "_LastLayer", steps: int, divisor: float, name: str) -> None:
    """Refuses what was said to be a gradient and is larger than one can be."""
    if kind.endswith("gradient") and layer.size > 2.002 * steps * divisor:
        raise UserError(
            f"{name}: update_kind={kind}: the absolute values of {layer.name} sum to "
            f"{layer.size:.3g}; those of a mean gradient to {2 * steps} at the most"
        )


class _LastLayer(NamedTuple):
    """The layer that makes the logits, and its gradient up to a factor."""

    name: str  # of its bias
    kernel: np.ndarray  # [feature, class]
    bias: np.ndarray
    weights: np.ndarray  # the gradient of the kernel
    error: np.ndarray  # that of the bias

    @property
    def size(self) -> float:
        """Sum of the absolute values of the bias gradient."""
        return float(np.abs(self.error).sum())

    def negative(self) -> "_LastLayer":
        """The same with the gradient turned round."""
        return self._replace(weights=-self.weights, error=-self.error)


def _last_layer(classifier, gradient, params) -> _LastLayer | None:
    """What of the update the checks look at; None where there is no bias, or it was not sent."""
    if classifier is None or classifier.bias is None:
        return None
    try:
        parts = (
            classifier.matrix(params),
            classifier.vector(params),
            classifier.matrix(gradient),
            classifier.vector(gradient),
        )
    except (KeyError, ValueError):  # some layers were not sent
        return None
    arrays = (np.asarray(x, np.float64) for x in parts)
    layer = _LastLayer("/".join(classifier.bias), *arrays)
    return layer if layer.size > 0 and len(layer.error) > 1 else None


def _direction(error: np.ndarray, images: int) -> int:
    """1 for a gradient's direction, -1 for the opposite, 0 where the signs do not tell."""
    least = 1e-7 * np.abs(error).max()
    negative, positive = int(np.sum(error < -least)), int(np.sum(error > least))
    if len(error) < 3 or (negative > images) == (positive > images):
        return 0
    return 1 if positive > images else -1


def _factor(layer: _LastLayer, images: int, steps: int) -> tuple[float | None, bool]:
    """The factor of the mean gradient, and whether it is exact.

    The inputs of the layer are its weight gradient over its bias gradient: of one image its
    features, of several a mean of theirs. Those give the softmax. Of several images the classes
    with a positive entry are mostly absent, and their entries the softmax alone.
    """
    size = layer.size
    features = layer.weights @ np.sign(layer.error) / size
    logits = features @ layer.kernel + layer.bias
    softmax = np.exp(logits - logits.max())
    softmax /= softmax.sum()
    if images == 1 and steps == 1:
        error = softmax - np.eye(len(softmax))[np.argmin(layer.error)]
        factor = layer.error @ error / (error @ error)
        apart = np.linalg.norm(layer.error - factor * error) / np.linalg.norm(layer.error)
        return (float(factor), True) if apart < NEAR and factor > 0 else (None, False)
    positive = layer.error > 0
    if not positive.any() or softmax[positive].sum() < 1e-6:
        return None, False
    return float(layer.error[positive].sum() / softmax[positive].sum() / steps), False


def _rounding(tree: PyTree) -> float:
    """Relative error, as norms, of numbers rounded to the types that they have."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        dtype = getattr(leaf, "dtype", np.asarray(leaf).dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            # A uniform error of a spacing, which is between eps / 2 and eps of the number.
            values = np.asarray(leaf).astype(np.float64)
            total += (0.2 * float(jnp.finfo(dtype).eps)) ** 2 * float(np.sum(values**2))
        else:
            total += np.size(leaf) / 12
    return total**0.5 / _norm(tree)


def _norm(tree: PyTree) -> float:
    """L2 norm over all leaves, in float64."""
    with np.errstate(over="ignore"):  # infinite is an answer too
        squares = (np.sum(np.asarray(x).astype(np.float64) ** 2) for x in jax.tree.leaves(tree))
        return float(np.sqrt(sum(squares)))


def _cosine(left: PyTree, right: PyTree) -> float:
    """Cosine over all leaves; 0 where one is zero."""
    inner = sum(float(np.sum(a * b)) for a, b in zip(*map(jax.tree.leaves, (left, right))))
    return inner / max(_norm(left) * _norm(right), 1e-300)
