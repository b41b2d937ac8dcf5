"""PyTorch's parameters as Flax's: names, layouts, and the order in which maps are flattened.

PyTorch keeps a convolution's kernel as [output, input, height, width] and a dense layer's as
[output, input]; Flax as [height, width, input, output] and [input, output]. Maps are [channel,
height, width] there and [height, width, channel] here, so that a dense layer which reads flattened
maps has its rows in another order too: the part that is forgotten most often.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinv.errors import UserError
from jaxinv.networks.inspect import Use, parameters_in_order
from jaxinv.types import PyTree

# What a state dict holds beside parameters.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
TOLERANCE = 1e-4  # of outputs, relative to the largest


class Place(NamedTuple):
    """Where an array of PyTorch's belongs, and how it is laid out there."""

    path: tuple[str, ...]
    convert: Callable[[np.ndarray], np.ndarray]


class Converted(NamedTuple):
    """A PyTorch module's parameters, and what converts gradients of them."""

    variables: PyTree  # of the Flax network
    update: Callable[[Mapping[str, Any]], PyTree]  # arrays by PyTorch's names -> like "params"


def from_torch(
    torch_module: Any, network: Any, image_shape: tuple[int, int, int], variables: PyTree = None
) -> Converted:
    """Takes a PyTorch module's parameters over into a Flax network of the same layers.

    Both are then called on the same random images, in evaluation mode, with every parameter moved a
    little at random: what comes back computes the same function, and not by layers that happen to
    hold the same numbers, as those of a new BatchNorm do.

    Args:
      torch_module: `torch.nn.Module`, of images [batch, channel, height, width].
      network: the same in Flax.
      image_shape: height, width, channel.
      variables: of the network, for their names and shapes; None to initialize.

    Raises:
      UserError: layers or outputs differ.
    """
    import torch

    if variables is None:
        image = jnp.zeros((1, *image_shape))
        variables = jax.jit(network.init)(jax.random.key(0), image)
    state = {name: _numpy(x) for name, x in torch_module.state_dict().items()}

    def outputs(state, images):
        tensors = {name: torch.from_numpy(x) for name, x in state.items()}
        images = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        modes = {module: module.training for module in torch_module.modules()}
        torch_module.eval()
        with torch.no_grad():
            found = torch.func.functional_call(torch_module, tensors, images)
        for module, mode in modes.items():
            module.training = mode
        return found.numpy()

    return convert_state(state, outputs, network, variables, image_shape)


def convert_state(
    state: Mapping[str, np.ndarray],
    outputs: Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray],
    network: Any,
    variables: PyTree,
    image_shape: tuple[int, int, int],
) -> Converted:
    """`from_torch` of a state dict, and the outputs that it has for images.

    Args:
      state: arrays by PyTorch's names.
      outputs: (state dict, images [image, height, width, channel]) -> outputs.
      network, variables, image_shape: as in `from_torch`.

    Raises:
      UserError: layers or outputs differ.
    """
    uses = parameters_in_order(network, variables, image_shape)
    shapes = {name: x.shape for name, x in state.items()}
    places = match(shapes, uses, "state dict")
    if len(places) < len(uses):
        found = {place.path for place in places.values()}
        missing = next("/".join(use.path) for use in uses if use.path not in found)
        raise UserError(f"state dict: holds nothing for {missing} of the Flax network")

    def update(arrays):
        tree: dict = {}
        for name, place in places.items():
            if name in arrays:
                _put(tree, place.path, place.convert(_numpy(arrays[name])))
        return tree

    def converted(state):
        found = {**variables, "params": update(state)}
        if "batch_stats" in variables:
            found["batch_stats"] = _statistics(state, places)
        return found

    random = np.random.default_rng(0)
    images = random.normal(size=(2, *image_shape)).astype(np.float32)
    moved = {name: _moved(x, random) for name, x in state.items()}
    there, here = outputs(moved, images), np.asarray(network.apply(converted(moved), images))
    apart = np.abs(there - here).max() / np.abs(there).max() if there.shape == here.shape else 1.0
    if not apart < TOLERANCE:
        raise UserError(
            f"state dict: the two networks differ, by {apart:.2g} of the largest output; have both "
            "the same layers in the same order, activations, strides and paddings?"
        )
    return Converted(converted(state), update)


def _statistics(state: Mapping[str, np.ndarray], places: Mapping[str, Place]) -> PyTree:
    """The running statistics of a state dict, as Flax has them."""
    found: dict = {}
    for name, place in places.items():
        prefix = name.rpartition(".")[0]
        if f"{prefix}.running_mean" in state and name.endswith("weight"):
            for theirs, ours in (("running_mean", "mean"), ("running_var", "var")):
                _put(found, (*place.path[:-1], ours), state[f"{prefix}.{theirs}"])
    return found


def _moved(array: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Other parameters of the same kind: variances stay positive, counts what they are."""
    if not np.issubdtype(array.dtype, np.floating):
        return array
    return array * np.exp(0.2 * random.normal(size=array.shape)).astype(array.dtype)


def named_like_it(names: Mapping[str, Any]) -> bool:
    """Whether arrays have PyTorch's names."""
    return any(re.split(r"[./]", name)[-1] == "weight" for name in names)


def match(
    shapes: Mapping[str, tuple[int, ...]], uses: Sequence[Use], name: str
) -> dict[str, Place]:
    """Finds a place for every array of a state dict, or of gradients by its names.

    Layers are taken in their order there. Each goes to the layer of the network that is called
    right after the one before, where that has such a kernel and bias and is not taken: a BatchNorm
    stays with its convolution, whichever branch of a block is written first. Else to the first one
    that has such.

    Args:
      shapes: by PyTorch's names.
      uses: the network's parameters.
      name: of the arrays, for messages.

    Raises:
      UserError: an array has no place.
    """
    theirs: dict[str, dict[str, str]] = {}
    for key in shapes:
        prefix, _, kind = key.replace("/", ".").rpartition(".")
        if kind not in STATISTICS:
            theirs.setdefault(prefix, {})[kind] = key
    ours: dict[tuple[str, ...], dict[str, Use]] = {}
    for use in uses:
        kind = "bias" if use.path[-1] == "bias" else "weight"
        ours.setdefault(use.path[:-1], {})[kind] = use
    places, layers = {}, list(ours.values())
    free, before = list(range(len(layers))), -1
    for prefix, arrays in theirs.items():
        fitting = [
            number
            for number in free
            if layers[number].keys() == arrays.keys()
            and all(shape_of(layers[number][kind]) == shapes[key] for kind, key in arrays.items())
        ]
        if not fitting:
            sizes = ", ".join(f"{kind} {shapes[key]}" for kind, key in arrays.items())
            raise UserError(
                f"{name}: the network has no layer left for {prefix} ({sizes} in PyTorch's layout)"
            )
        before = before + 1 if before + 1 in fitting else fitting[0]
        free.remove(before)
        layer = layers[before]
        for kind, key in arrays.items():
            places[key] = Place(layer[kind].path, converter(layer[kind]))
    return places


def transposed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Flax's shape of a kernel of PyTorch's."""
    return (*shape[2:], shape[1], shape[0]) if len(shape) > 1 else shape


def shape_of(use: Use) -> tuple[int, ...]:
    """PyTorch's shape of a parameter of the network."""
    if use.path[-1] != "kernel":
        return use.shape
    return (use.shape[-1], use.shape[-2], *use.shape[:-2])


def converter(use: Use) -> Callable[[np.ndarray], np.ndarray]:
    """What lays a parameter of PyTorch's out as the network has it."""
    if use.path[-1] != "kernel":
        return np.asarray
    if use.flattened is None:
        return lambda x: np.moveaxis(np.asarray(x), (0, 1), (-1, -2))
    height, width, channels = use.flattened

    def flattened(x):
        maps = np.asarray(x).reshape(len(x), channels, height, width)
        return maps.transpose(2, 3, 1, 0).reshape(height * width * channels, len(x))

    return flattened


def without_statistics(entries: Sequence[Any]) -> list[Any]:
    """A state dict's arrays without BatchNorm's own: two of them, and a number of batches."""
    kept: list[Any] = []
    for entry in entries:
        if entry.shape == ():
            del kept[-2:]
        else:
            kept.append(entry)
    return kept


def usual_order(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Sorts a state dict's names as modules are usually written down, where their order is lost.

    By the numbers in the names, `body.2` before `body.10`, names without a number last; of one
    number a layer before a block of layers, a kernel before a norm: conv1, bn1, conv2, bn2,
    shortcut.
    """
    kernels = {name.rpartition(".")[0] for name, shape in shapes.items() if len(shape) > 1}

    def place(name):
        *parents, kind = name.split(".")
        parts: list[Any] = []
        for depth, part in enumerate(parents, 1):
            number = re.search(r"\d+$", part)
            own = ".".join(parents[:depth])
            block, norm = depth < len(parents), own not in kernels
            parts.append((float(number[0]) if number else np.inf, block, norm, part))
        return parts, kind == "bias", kind

    return sorted(shapes, key=place)


def _numpy(tensor: Any) -> np.ndarray:
    """A tensor of PyTorch's, or an array, as NumPy has it."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu().numpy()
    return np.asarray(tensor)


def _put(tree: dict, path: Sequence[str], leaf: np.ndarray) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
