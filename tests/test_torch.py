"""What PyTorch itself computes and writes, taken over: networks, gradients, files. Needs torch."""

import runpy
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

import jaxinv
from jaxinv import client
from jaxinv.client import updates
from jaxinv.errors import UserError
from jaxinv.networks.inspect import parameters_in_order
from jaxinv.networks.resnet import ResNet

torch = pytest.importorskip("torch")

EXAMPLES = Path(__file__).parents[1] / "examples"
SHAPE, CLASSES, WIDTH = (8, 8, 3), 5, 4


class Block(torch.nn.Module):
    """As torchvision names its layers: the shortcut last, though Flax's network calls it first."""

    def __init__(self, channels, features, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(features)
        self.conv2 = torch.nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(features)
        self.downsample = torch.nn.Identity()
        if stride > 1:
            self.downsample = torch.nn.Sequential(
                torch.nn.Conv2d(channels, features, 1, stride, bias=False),
                torch.nn.BatchNorm2d(features),
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.downsample(x))


class TorchResNet(torch.nn.Module):
    """`ResNet(CLASSES, WIDTH, (1, 2))`."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(WIDTH)
        self.layer1 = torch.nn.Sequential(Block(WIDTH, WIDTH, 1))
        self.layer2 = torch.nn.Sequential(
            Block(WIDTH, 2 * WIDTH, 2), Block(2 * WIDTH, 2 * WIDTH, 1)
        )
        self.fc = torch.nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, x):
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean(dim=(2, 3)))


class Theirs:
    """A client that uses PyTorch, and the same network in Flax."""

    def __init__(self):
        torch.manual_seed(0)
        self.module, self.network = TorchResNet(), ResNet(CLASSES, WIDTH, (1, 2))
        self.image = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)
        self.labels = np.array([1, 4])
        self.converted = jaxinv.from_torch(self.module, self.network, SHAPE)

    def gradient(self, mode):
        """By PyTorch's names, of a client that trains (and moves its statistics) or evaluates."""
        images = torch.from_numpy(np.moveaxis(self.image, -1, 1).copy())
        before = {name: x.clone() for name, x in self.module.state_dict().items()}
        self.module.zero_grad()
        self.module.train(mode == "train")
        loss = torch.nn.functional.cross_entropy(self.module(images), torch.tensor(self.labels))
        loss.backward()
        found = {name: p.grad.clone() for name, p in self.module.named_parameters()}
        self.module.load_state_dict(before)
        return found

    def expected(self, mode):
        """The same in Flax."""
        loss = client.loss_fn(self.network, self.converted.variables, mode)
        params = self.converted.variables["params"]
        return jax.jit(lambda p: client.gradient(loss, p, self.image, self.labels)[0])(params)

    def uses(self):
        return parameters_in_order(self.network, self.converted.variables, SHAPE)


@pytest.fixture(scope="module")
def theirs():
    return Theirs()


def close(found, expected):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_a_resnets_gradient_is_flaxs_in_both_modes_of_batch_norm(theirs):
    expected = {mode: theirs.expected(mode) for mode in ("train", "eval")}
    for mode, own in expected.items():
        close(theirs.converted.update(theirs.gradient(mode)), own)
    with pytest.raises(AssertionError):
        close(expected["train"], expected["eval"])


def test_what_torch_writes_comes_back_from_every_file(theirs, tmp_path):
    """Safetensors sorts by name: bn1, bn2, conv1, ..., of which each has to find its layer."""
    from safetensors.torch import save_file

    gradient = theirs.gradient("train")
    save_file(gradient, tmp_path / "gradient.safetensors")
    save_file(theirs.module.state_dict(), tmp_path / "weights.safetensors")
    np.savez(tmp_path / "gradient.npz", **{name: x.numpy() for name, x in gradient.items()})
    np.savez(tmp_path / "unnamed.npz", *(x.numpy() for x in theirs.module.state_dict().values()))
    params = theirs.converted.variables["params"]
    for name in ("gradient.safetensors", "gradient.npz", "weights.safetensors"):
        found = updates.load(tmp_path / name, params, theirs.uses)
        close(found, theirs.expected("train") if "gradient" in name else params)


def test_layers_that_hold_the_same_numbers_are_told_apart(theirs):
    """Both norms of a block begin as ones and zeros: exchanged, the first outputs are equal."""

    class Exchanged(nn.Module):
        @nn.compact
        def __call__(self, x):
            norms = [nn.BatchNorm(use_running_average=True, epsilon=1e-5, name=n) for n in "ab"]
            first, second = (norm(x) for norm in norms)
            return nn.Dense(CLASSES)((first + 2 * second).mean(axis=(1, 2)))

    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.BatchNorm2d(3), torch.nn.BatchNorm2d(3)
            self.fc = torch.nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.fc((2 * self.a(x) + self.b(x)).mean(dim=(2, 3)))

    with pytest.raises(UserError, match="the two networks differ"):
        jaxinv.from_torch(Sum(), Exchanged(), SHAPE)


def test_the_module_is_left_as_it_was(theirs):
    theirs.module.train()
    theirs.module.layer1.eval()
    before = {name: x.clone() for name, x in theirs.module.state_dict().items()}
    jaxinv.from_torch(theirs.module, theirs.network, SHAPE)
    assert theirs.module.training
    assert not theirs.module.layer1.training
    for name, x in theirs.module.state_dict().items():
        assert torch.equal(x, before[name])
    theirs.module.train()


@pytest.mark.slow  # docs/from_pytorch.md is the same, and its code is run
def test_the_example_goes_from_a_model_to_a_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "from_pytorch.py"))
    found = example["main"](seeds=1, iterations=6)
    assert found.sent.factor == pytest.approx(1, abs=0.01)
    assert "label rocket" in capsys.readouterr().out
    with Image.open(tmp_path / "from_pytorch.png") as picture:
        pixels = np.asarray(picture, np.float32) / 255
    assert pixels.shape == (32, 64, 3)
    truth, best = pixels[:, :32], pixels[:, 32:]
    np.testing.assert_allclose(best, found.best[0], atol=1 / 255)
    assert np.mean(np.square(best - truth)) < np.mean(np.square(truth.mean((0, 1)) - truth))
