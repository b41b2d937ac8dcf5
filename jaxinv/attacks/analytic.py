"""Analytic recovery: the input of a dense layer from its gradients, in closed form.

A dense layer z = x W + b has dL/dW = sum of x^T delta and dL/db = sum of delta over the images,
with delta = dL/dz of one. For one image every column i of dL/dW is delta_i x: the bias gradient
gives the image away. Without biases, delta comes from above: at the last layer it is
softmax - onehot, and below a ReLU it is what the layer above sends down, where the ReLU is open.

For several images a column is a mixture of those that are active at neuron i, but the image itself
where one alone is: such columns agree with one another to the last digits, mixtures do not.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxinv.attacks.closed_form import Given, Recovered
from jaxinv.errors import UserError
from jaxinv.networks.inspect import dense_layers, subtree
from jaxinv.types import PyTree

# In units of the precision: of two columns that are the same image, elementwise, three roundings
# each; of an update against the one that its parts multiply to, as norms.
AGREEMENT, CONSISTENCY = 8, 1000
AGREEING = 2  # neurons that make an image exact
NEWTON_STEPS = 10


def attack(given: Given) -> Recovered:
    """Reads the images off the update of a network of dense layers.

    One image is found in every such network: by the lowest layer with a bias, or without any by its
    label, and then down through the ReLUs. Of several, those are found that are alone at two
    neurons of the first layer or more; mixtures follow them.

    Args:
      given: its label is read for one image without biases alone; its key is of the line on which
        columns are compared.

    Raises:
      UserError: the first layer is not dense, or has no bias and there are several images.

    References: Phong et al. 2017; Geiping et al. 2020, arXiv 2003.14053, proposition 3.1.
    """
    images = given.images
    paths = dense_layers(given.module, given.variables, given.image_shape)
    kernels = [subtree(given.variables["params"], path)["kernel"] for path in paths]
    gradients = [subtree(given.target.update, path) for path in paths]
    if images == 1:
        found, exact = _walk(kernels, gradients, given.target.labels[0])
    elif "bias" in gradients[0]:
        found, exact = split(gradients[0]["kernel"], gradients[0]["bias"], images, given.key)
    else:
        raise UserError("--attack analytic: several images need a first layer with a bias")
    return Recovered(found.reshape(images, *given.image_shape), exact.reshape(images))


def dense_input(
    kernel_gradient: Float[Array, "channel feature"], delta: Float[Array, " feature"]
) -> Float[Array, " channel"]:
    """Computes the input x of a dense layer with kernel gradient x delta^T, in least squares."""
    return kernel_gradient @ delta / jnp.sum(delta**2)


def features(
    params: PyTree, update: PyTree, classifier: tuple[str, ...], label: Int[Array, ""]
) -> Float[Array, " channel"]:
    """Reads the input of any network's last dense layer off its gradients, exact for one image.

    Args:
      params: of the network.
      update: one gradient.
      classifier: path of the last dense layer's parameters (`networks.inspect.classifier_path`).
      label: of the image; read where the layer has no bias.
    """
    gradient = subtree(update, classifier)
    if "bias" in gradient:
        return dense_input(gradient["kernel"], gradient["bias"])
    delta = logit_gradient(subtree(params, classifier)["kernel"], gradient["kernel"], label)
    return dense_input(gradient["kernel"], delta)


def logit_gradient(
    kernel: Float[Array, "channel class"],
    kernel_gradient: Float[Array, "channel class"],
    label: Int[Array, ""],
) -> Float[Array, " class"]:
    """Solves for softmax - onehot of one image at a last layer without a bias.

    The kernel's gradient f delta^T gives the direction u of f and s = |f| delta. What remains is
    the length t = |f|, with s = t (softmax(t u W) - onehot). The softmax's ratios between the other
    classes are s's own, so that log s_c = t (u W)_c + constant there: a line, whose slope starts
    Newton's method.
    """
    column = kernel_gradient[:, label]
    direction = -column / jnp.linalg.norm(column)
    scaled = direction @ kernel_gradient
    slopes = direction @ kernel
    onehot = jax.nn.one_hot(label, len(slopes), dtype=slopes.dtype)

    # A logarithm's error is one over its argument.
    weights = jnp.where((onehot == 0) & (scaled > 0), scaled, 0) ** 2
    logs = jnp.log(jnp.where(weights > 0, scaled, 1))
    centered = slopes - weights @ slopes / weights.sum()
    line = (weights * centered) @ logs / ((weights * centered) @ centered)
    start = jnp.where((line > 0) & jnp.isfinite(line), line, jnp.linalg.norm(scaled))

    def newton(_, length):
        softmax = jax.nn.softmax(length * slopes)
        residual = length * (softmax - onehot) - scaled
        slope = softmax - onehot + length * softmax * (slopes - softmax @ slopes)
        return jnp.abs(length - slope @ residual / (slope @ slope))

    return scaled / lax.fori_loop(0, NEWTON_STEPS, newton, start)


def split(
    kernel_gradient: Float[Array, "channel feature"],
    bias_gradient: Float[Array, " feature"],
    images: int,
    key: jax.Array,
) -> tuple[Float[Array, "image channel"], Bool[Array, " image"]]:
    """Tells images that are alone at some neurons of a ReLU layer from mixtures.

    The columns dW_i / db_i are sorted along a random line, on which equal ones are neighbors; the
    largest groups of neighbors that agree in every element are the images.

    Returns:
      The inputs of the largest groups, and whether at least `AGREEING` neurons gave them. The rest
      are single columns, of the largest bias gradients.
    """
    live = bias_gradient != 0
    columns = (kernel_gradient / jnp.where(live, bias_gradient, 1)).T
    line = jax.random.normal(key, columns.shape[1:], columns.dtype)
    order = jnp.argsort(jnp.where(live, columns @ line, jnp.inf))
    columns, alive = columns[order], live[order]
    precision = AGREEMENT * jnp.finfo(columns.dtype).eps
    apart = jnp.abs(columns[1:] - columns[:-1]).max(axis=1)
    joined = (apart <= precision * jnp.abs(columns[1:]).max(axis=1)) & alive[1:]
    group = jnp.zeros(len(order), int).at[order[1:]].set(jnp.cumsum(~joined))

    sizes = jnp.zeros(len(order), columns.dtype).at[group].add(live)
    weight = jnp.zeros_like(sizes).at[group].add(bias_gradient**2)
    _, largest = lax.top_k(sizes + weight / (2 * weight.sum()), images)

    def one(g):
        return dense_input(kernel_gradient, jnp.where(group == g, bias_gradient, 0))

    return jax.vmap(one)(largest), sizes[largest] >= AGREEING


def _walk(
    kernels: list[Array], gradients: list[PyTree], label: Int[Array, ""]
) -> tuple[Float[Array, " channel"], Bool[Array, ""]]:
    """Finds the one image under a stack of dense layers, and whether it explains the update."""
    biased = [index for index, gradient in enumerate(gradients) if "bias" in gradient]
    layer = biased[0] if biased else len(kernels) - 1
    gradient = gradients[layer]["kernel"]
    exact = jnp.bool_(True)
    if biased:
        delta = gradients[layer]["bias"]
        found = dense_input(gradient, delta)
    else:
        delta = logit_gradient(kernels[layer], gradient, label)
        found = dense_input(gradient, delta)
        onehot = jax.nn.one_hot(label, len(delta), dtype=delta.dtype)
        exact = close(jax.nn.softmax(found @ kernels[layer]) - onehot, delta)
    exact &= close(jnp.outer(found, delta), gradient)
    for index in reversed(range(layer)):
        delta = kernels[index + 1] @ delta * (found > 0)
        gradient = gradients[index]["kernel"]
        found = dense_input(gradient, delta)
        exact &= close(jnp.outer(found, delta), gradient)
    return found, exact


def close(found: Array, shared: Array) -> Bool[Array, ""]:
    """Whether two arrays differ by rounding alone."""
    tolerance = CONSISTENCY * jnp.finfo(shared.dtype).eps
    return jnp.linalg.norm(found - shared) <= tolerance * jnp.linalg.norm(shared)
