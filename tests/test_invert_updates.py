"""What a client sent: told from its numbers, refused where it cannot be right, read from files."""

import io
import json
import zipfile

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxinv.client import kinds, pytorch, updates
from jaxinv.errors import UserError
from jaxinv.networks.inspect import find_classifier, parameters_in_order

SHAPE, CLASSES = (8, 8, 3), 5


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.sigmoid(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(CLASSES)(x.reshape(len(x), -1))


class Client:
    """A network, and the gradient of a batch."""

    def __init__(self):
        self.module = Net()
        images = jnp.asarray(np.random.default_rng(0).uniform(size=(8, *SHAPE)), jnp.float32)
        self.images, self.labels = images, jnp.array([2, 4, 4, 4, 0, 0, 1, 1])
        self.variables = jax.jit(self.module.init)(jax.random.key(0), images)
        self.params = jax.tree.map(np.asarray, self.variables["params"])
        self.classifier = find_classifier(self.module, self.variables, SHAPE)

        def loss(params, images, labels):
            logits = self.module.apply({"params": params}, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        self.gradient_of = jax.jit(jax.grad(loss))

    def gradient(self, images):
        found = self.gradient_of(self.params, self.images[:images], self.labels[:images])
        return jax.tree.map(np.asarray, found)

    def understand(self, sent, kind="auto", **settings):
        return kinds.understand(sent, self.params, kind, classifier=self.classifier, **settings)

    def uses(self):
        return parameters_in_order(self.module, self.variables, SHAPE)


@pytest.fixture(scope="module")
def sender():
    return Client()


def times(factor, tree):
    return jax.tree.map(lambda x: np.asarray(factor * x, np.float32), tree)


def close(found, expected, tolerance=1e-4):
    for a, b in zip(*map(jax.tree.leaves, (found, expected))):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("name", "kind", "factor"),
    [
        ("gradient", "gradient", 1.0),
        ("old-minus-new", "gradient", 0.1),
        ("new-minus-old", "new-minus-old", 0.1),
        ("weights", "weights", 0.1),
    ],
)
def test_one_images_update_is_told_from_its_numbers_and_scaled(sender, name, kind, factor):
    gradient = sender.gradient(1)
    new = jax.tree.map(lambda p, g: np.float32(p - 0.1 * g), sender.params, gradient)
    sent = {
        "gradient": gradient,
        "old-minus-new": jax.tree.map(np.subtract, sender.params, new),
        "new-minus-old": jax.tree.map(np.subtract, new, sender.params),
        "weights": new,
    }[name]
    found = sender.understand(sent)
    assert (found.kind, found.scaled) == (kind, True)
    assert found.factor == pytest.approx(factor, rel=1e-3)
    close(found.gradient, gradient, 1e-3)
    assert bool(found.remarks) == (name != "gradient")
    close(sender.understand(sent, name if factor < 1 else "gradient", rate=0.1).gradient, gradient)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda c: times(-0.1, c.gradient(1)), "gradient", "wrong way: .* 4 negative entries"),
        (lambda c: times(8, c.gradient(8)), "gradient", "those of a mean gradient to 2"),
        (lambda c: c.gradient(1), "weights", "cosine with the network's own parameters"),
        (lambda c: c.params, "gradient", "these are new weights; use weights"),
        (lambda c: c.params, "auto", "the client took no step"),
        (lambda c: c.gradient(1), "delta", "update_kind=delta: known are auto, gradient"),
    ],
)
def test_numbers_that_contradict_the_kind_are_refused(sender, change, kind, message):
    sent = change(sender)
    images = 8 if "mean gradient to" in message else 1
    with pytest.raises(UserError, match=message):
        sender.understand(sent, kind, images=images)


def test_several_images_scale_is_known_only_where_it_is_said_or_looks_so(sender):
    mean = sender.gradient(8)
    assert sender.understand(mean, images=8).scaled
    assert not sender.understand(times(0.01, mean), images=8).scaled
    assert not sender.understand(times(8, mean), images=8).scaled
    close(sender.understand(times(8, mean), "summed-gradient", images=8).gradient, mean)
    by_rate = sender.understand(times(0.01, mean), "old-minus-new", images=8, rate=0.01)
    assert by_rate.scaled
    close(by_rate.gradient, mean)
    assert not sender.understand(times(0.01, mean), "old-minus-new", images=8).scaled


@pytest.mark.parametrize("kind", [np.float16, jnp.bfloat16, np.int32])
def test_numbers_of_every_real_type_are_taken_and_their_rounding_is_known(sender, kind):
    gradient = times(1000, sender.gradient(1)) if kind is np.int32 else sender.gradient(1)
    sent = jax.tree.map(lambda x: np.round(x) if kind is np.int32 else x, gradient)
    sent = jax.tree.map(lambda x: x.astype(kind), sent)
    found = sender.understand(sent)
    assert all(x.dtype == np.float64 for x in jax.tree.leaves(found.gradient))
    error = jax.tree.map(lambda x, y: np.float64(x) - y.astype(np.float64), gradient, sent)

    def norm(tree):
        return sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)) ** 0.5

    assert found.rounding == pytest.approx(norm(error) / norm(gradient), rel=0.5)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "Conv_0/kernel has 1 NaN of 108"),
        (np.inf, "Conv_0/kernel has 1 infinite of 108"),
        (1e300, "its norm is inf; scale it"),
        (1j, "Conv_0/kernel holds complex128; an update is of real numbers"),
        ("a", "Conv_0/kernel holds <U"),
        (np.datetime64("2020-01-01"), "Conv_0/kernel holds datetime64"),
        (True, "Conv_0/kernel holds bool"),
    ],
)
def test_what_is_no_update_is_refused(sender, value, message):
    sent = jax.tree.map(np.copy, sender.gradient(1))
    kernel = sent["Conv_0"]["kernel"].astype(np.float64)
    if isinstance(value, float):
        kernel.flat[5] = value
    else:
        kernel = np.full(kernel.shape, value)
    sent["Conv_0"]["kernel"] = kernel
    with pytest.raises(UserError, match=message):
        sender.understand(sent)


def test_zeros_are_refused(sender):
    with pytest.raises(UserError, match="is zero in all layers"):
        sender.understand(times(0, sender.params))


# --- Files ---


def torch_names(tree):
    """A tree as PyTorch would have it: names, layouts, and the dense rows in its order of maps."""
    conv, dense = tree["Conv_0"], tree["Dense_0"]
    kernel = np.asarray(dense["kernel"]).reshape(4, 4, 4, CLASSES)
    return {
        "body.0.weight": np.asarray(conv["kernel"]).transpose(3, 2, 0, 1),
        "body.0.bias": np.asarray(conv["bias"]),
        "fc.weight": kernel.transpose(3, 2, 0, 1).reshape(CLASSES, 64),
        "fc.bias": np.asarray(dense["bias"]),
    }


def write_safetensors(path, arrays):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(arrays):
        size = arrays[name].nbytes
        kind = "BF16" if arrays[name].dtype == jnp.bfloat16 else "F32"
        header[name] = {
            "dtype": kind,
            "shape": list(arrays[name].shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    body = b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays))
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


@pytest.mark.parametrize(
    "form", ["named", "dots", "below", "arr", "torch", "torch-arr", "safetensors", "torch-safe"]
)
def test_an_update_comes_back_from_every_form(sender, tmp_path, form):
    gradient = sender.gradient(1)
    named, path = updates.names_of(gradient), tmp_path / "update.npz"
    if form == "named":
        updates.save(path, gradient)
    elif form == "dots":
        np.savez(path, **{name.replace("/", "."): x for name, x in named.items()})
    elif form == "below":
        np.savez(path, **{f"params/{name}": x for name, x in named.items()})
    elif form == "arr":
        np.savez(path, *named.values())
    elif form == "torch":
        np.savez(path, **torch_names(gradient))
    elif form == "torch-arr":
        np.savez(path, *torch_names(gradient).values())
    else:
        path = tmp_path / "update.safetensors"
        write_safetensors(path, named if form == "safetensors" else torch_names(gradient))
    found = updates.load(path, sender.params, sender.uses)
    jax.tree.map(np.testing.assert_array_equal, found, gradient)


def test_orbax_and_a_checkpoint_of_the_package_come_back(sender, tmp_path):
    import orbax.checkpoint as ocp

    gradient = sender.gradient(1)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", gradient)
    ocp.v1.save(tmp_path / "trained" / "arrays", {"params": gradient, "batch_stats": {"a": [1.0]}})
    for place in ("orbax", "trained"):
        found = updates.load(tmp_path / place, sender.params)
        jax.tree.map(np.testing.assert_array_equal, found, gradient)


def test_bfloat16_and_some_of_the_layers_come_back(sender, tmp_path):
    head = {"Dense_0": sender.gradient(1)["Dense_0"]}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), head)
    updates.save(tmp_path / "head.npz", half)
    write_safetensors(tmp_path / "head.safetensors", updates.names_of(half))
    for name in ("head.npz", "head.safetensors"):
        found = updates.load(tmp_path / name, sender.params)
        assert found.keys() == {"Dense_0"}
        jax.tree.map(np.testing.assert_array_equal, found, half)


def test_statistics_come_back_beside_the_update(sender, tmp_path):
    path, gradient = tmp_path / "update.npz", sender.gradient(1)
    sent = {"BatchNorm_0": {"mean": np.arange(3.0), "var": np.ones(3)}}
    updates.save(path, gradient, sent)
    jax.tree.map(np.testing.assert_array_equal, updates.load(path, sender.params), gradient)
    jax.tree.map(np.testing.assert_array_equal, updates.load_statistics(path, sent), sent)
    wanted = {"BatchNorm_0": {"mean": np.ones(4), "var": np.ones(4)}}
    with pytest.raises(UserError, match=r"batch_stats/BatchNorm_0/mean \(4,\) is \(3,\)"):
        updates.load_statistics(path, wanted)
    updates.save(path, gradient)
    with pytest.raises(UserError, match=r"BatchNorm_0/mean \(3,\) is not there; .* use train"):
        updates.load_statistics(path, sent)


def bomb(path, name="Conv_0/kernel.npy"):
    """A small file whose one array takes 8 GB."""
    header = io.BytesIO()
    fields = {"descr": "<f8", "fortran_order": False, "shape": (10**9,)}
    np.lib.format.write_array_header_1_0(header, fields)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, header.getvalue() + bytes(10**6))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: np.savez(p, a=np.array([{}], object)), "a.npy is a pickled array"),
        (lambda p: p.write_bytes(b"\x80\x04K\x01."), "is a pickle, which can run code"),
        (bomb, "holds 7.63e\\+03 MiB, far more than the network's 4 parameters"),
        (lambda p: np.savez(p, other=np.zeros(3)), "the network has no other; its arrays are Conv"),
        (lambda p: np.savez(p, np.zeros(3)), "have no names.*wanted are Conv_0/bias \\(4,\\)"),
        (lambda p: np.savez(p), "holds no arrays"),
        (lambda p: p.write_bytes(b"PK\x03\x04"), "cannot be read as .npz"),
        (lambda p: np.savez(p, **{"fc.weight": np.zeros((2, 3))}), "no layer left for fc"),
        (
            lambda p: np.savez(p, **{"Conv_0/kernel": np.zeros((4, 3, 3, 3))}),
            "Conv_0/kernel is .4, 3, 3, 3., the network's is .3, 3, 3, 4.; that is PyTorch's",
        ),
        (lambda p: np.savez(p, x=np.zeros(3, [("a", "f4")])), "real numbers|no x"),
    ],
)
def test_files_that_are_no_update_are_one_line(sender, tmp_path, write, message):
    path = tmp_path / "update.npz"
    write(path)
    with pytest.raises(UserError, match=message) as raised:
        updates.load(path, sender.params, sender.uses)
    assert str(raised.value).startswith(f"--update {path}")
    assert "\n" not in str(raised.value)


def test_a_torn_safetensors_file_is_one_line(sender, tmp_path):
    path = tmp_path / "u.safetensors"
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match="its header is longer than the file"):
        updates.load(path, sender.params)


# --- PyTorch ---


class Bodies(nn.Module):
    """A convolution, BatchNorm, pooling, and a dense layer that reads the flattened maps."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), padding=1)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(6)(x.reshape(len(x), -1))))


def torch_state(rng):
    """Parameters as such a module of PyTorch has them."""
    shapes = {
        "conv.weight": (4, 3, 3, 3),
        "conv.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "norm.running_mean": (4,),
        "norm.running_var": (4,),
        "norm.num_batches_tracked": (),
        "hidden.weight": (6, 64),
        "hidden.bias": (6,),
        "out.weight": (CLASSES, 6),
        "out.bias": (CLASSES,),
    }
    return {name: np.abs(rng.normal(size=s)).astype(np.float32) / 3 for name, s in shapes.items()}


def torch_outputs(state, images):
    """What PyTorch computes, in its own layouts: [batch, channel, height, width]."""
    x = jnp.moveaxis(images, -1, 1)
    x = jax.lax.conv_general_dilated(
        x,
        state["conv.weight"],
        (1, 1),
        ((1, 1), (1, 1)),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
    )

    def column(name):
        return state[name][:, None, None]

    x = x + column("conv.bias") - column("norm.running_mean")
    x = x / np.sqrt(column("norm.running_var") + 1e-5)
    x = nn.relu(x * column("norm.weight") + column("norm.bias"))
    x = x.reshape(len(x), 4, 4, 2, 4, 2).max(axis=(3, 5)).reshape(len(x), -1)
    x = nn.relu(x @ state["hidden.weight"].T + state["hidden.bias"])
    return np.asarray(x @ state["out.weight"].T + state["out.bias"])


def test_pytorchs_parameters_compute_the_same_and_its_gradients_follow(rng_numpy):
    state, module = torch_state(rng_numpy), Bodies()
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *SHAPE)))

    found = pytorch.convert_state(state, torch_outputs, module, variables, SHAPE)
    shapes = jax.tree.map(jnp.shape, found.variables)
    assert shapes == jax.tree.map(jnp.shape, variables)
    close(found.update(state), found.variables["params"])
    with pytest.raises(UserError, match="the two networks differ"):
        pytorch.convert_state(
            state, lambda s, x: 1.1 * torch_outputs(s, x), module, variables, SHAPE
        )
    state.pop("out.bias")
    with pytest.raises(UserError, match="no layer left for out"):
        pytorch.convert_state(state, torch_outputs, module, variables, SHAPE)
