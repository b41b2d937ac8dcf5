"""The same attack in PyTorch: one seed at a time, as public tools run it, and under vmap.

On the GPU where PyTorch sees one.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from jaxinv.networks.mobilenet import HEAD, STAGES, scale_channels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGE = (1, 3, 32, 32)
TV = 0.01  # weight of the total variation


def lenet_zhu(side: int = 8, classes: int = 10) -> nn.Module:
    """LeNetZhu, as in jaxinv.networks.lenet_zhu; `side` is that of its last feature map."""
    layers, channels = [], 3
    for stride in (2, 2, 1):
        layers += [nn.Conv2d(channels, 12, 5, stride, 2), nn.Sigmoid()]
        channels = 12
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12 * side**2, classes))


def convnet(width: int) -> nn.Module:
    """ConvNet, as in jaxinv.networks.convnet."""
    layers, channels = [], 3
    for stage in ((1, 2, 2, 4, 4, 4), (4, 4)):
        for factor in stage:
            features = factor * width
            layers += [nn.Conv2d(channels, features, 3, padding=1), nn.BatchNorm2d(features)]
            layers += [nn.ReLU()]
            channels = features
        layers += [nn.MaxPool2d(3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36 * width, 10))


class _BasicBlock(nn.Module):
    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, features, 3, stride, 1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, 1, 1, bias=False),
            nn.BatchNorm2d(features),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or channels != features:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, features, 1, stride, bias=False), nn.BatchNorm2d(features)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet(width: int, *blocks: int) -> nn.Module:
    """A ResNet of basic blocks, as in jaxinv.networks.resnet."""
    layers = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            features, stride = width * 2**stage, 2 if stage and not block else 1
            layers.append(_BasicBlock(channels, features, stride))
            channels = features
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return nn.Sequential(*layers)


def _convolution(channels: int, features: int, kernel: int, stride=1, groups=1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, features, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(features),
    ]


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, features: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * channels
        layers = [*_convolution(channels, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        layers += [*_convolution(hidden, hidden, 3, stride, hidden), nn.ReLU6()]
        self.body = nn.Sequential(*layers, *_convolution(hidden, features, 1))
        self.residual = stride == 1 and channels == features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def mobilenetv2(width: int) -> nn.Module:
    """MobileNetV2, as in jaxinv.networks.mobilenet."""
    layers, channels = [*_convolution(3, width, 3), nn.ReLU6()], width
    for expansion, published, blocks, first_stride in STAGES:
        features = scale_channels(published, width / 32)
        for index in range(blocks):
            stride = first_stride if index == 0 else 1
            layers.append(_InvertedResidual(channels, features, stride, expansion))
            channels = features
    head = scale_channels(HEAD, max(1.0, width / 32))
    layers += [*_convolution(channels, head, 1), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(head, 10))


NETWORKS = {
    "lenet_zhu": lambda width: lenet_zhu(),
    "convnet": convnet,
    "resnet20": lambda width: resnet(width, 3, 3, 3),
    "resnet18": lambda width: resnet(width, 2, 2, 2, 2),
    "mobilenetv2": mobilenetv2,
}


def make_step(
    name: str, width: int | None, threads: int, chunk: int | None = None
) -> Callable[[int], None]:
    """Makes a function that takes that many steps of cosine + TV, signed Adam and box.

    Args:
      name, width: the network.
      threads: of the CPU.
      chunk: seeds of one target, stepped at once under `torch.func.vmap`; None for one seed and
        the double backward pass of public tools.
    """
    torch.backends.cudnn.allow_tf32 = False  # full float32, as an attack has it by default
    torch.manual_seed(0)
    model = NETWORKS[name](width).to(DEVICE).eval()
    label = torch.tensor([3], device=DEVICE)
    target = share(model, torch.rand(IMAGE, device=DEVICE), label)
    make_gradient = double_backward if chunk is None else functional
    gradient = make_gradient(model, label, target)
    x = torch.randn(IMAGE if chunk is None else (chunk, *IMAGE), device=DEVICE)
    optimizer = torch.optim.Adam([x], lr=0.1)

    def run(steps):
        torch.set_num_threads(threads)
        for _ in range(steps):
            x.grad = gradient(x).sign()
            optimizer.step()
            x.clamp_(-2, 2)
        wait()

    return run


class Case(NamedTuple):
    """One target on one LeNetZhu, as arrays of the other engine: what an attack starts from."""

    params: Mapping[str, Mapping[str, np.ndarray]]  # of Flax
    image: np.ndarray  # normalized; height, width, channel
    label: int
    initial: np.ndarray  # likewise
    box: tuple[np.ndarray, np.ndarray]  # of the normalized pixels, per channel


def attack(case: Case, steps: int, threads: int) -> tuple[np.ndarray, float]:
    """Runs a whole attack by double backward: cosine + TV, signed Adam, step schedule, box.

    Returns:
      The normalized image, and the seconds that the steps took.
    """
    torch.set_num_threads(threads)
    model = carry_over(case.params).to(DEVICE).eval()

    def as_tensor(x):
        return torch.tensor(np.array(x).transpose(2, 0, 1)[None], device=DEVICE)

    low, high = (torch.tensor(np.array(x), device=DEVICE).view(1, -1, 1, 1) for x in case.box)
    label = torch.tensor([case.label], device=DEVICE)
    gradient = double_backward(model, label, share(model, as_tensor(case.image), label))
    x = as_tensor(case.initial)
    optimizer = torch.optim.Adam([x], lr=0.1)
    milestones = [math.floor(steps / part) for part in (2.667, 1.6, 1.142)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    gradient(x)  # the first call is slower
    wait()
    started = time.perf_counter()
    for _ in range(steps):
        x.grad = gradient(x).sign()
        optimizer.step()
        schedule.step()
        x.copy_(x.clamp(low, high))
    wait()
    return x.cpu().numpy()[0].transpose(1, 2, 0), time.perf_counter() - started


def carry_over(params: Mapping[str, Mapping[str, np.ndarray]]) -> nn.Module:
    """The LeNetZhu with the parameters of another one, of Flax."""
    rows, classes = params["Dense_0"]["kernel"].shape
    side = math.isqrt(rows // 12)
    model = lenet_zhu(side, classes)
    layers = [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, name in zip(layers, ("Conv_0", "Conv_1", "Conv_2", "Dense_0")):
        kernel, bias = (np.array(params[name][part]) for part in ("kernel", "bias"))
        # What the dense layer reads is a feature map with its channels last there, first here.
        kernel = kernel.reshape(side, side, 12, -1) if name == "Dense_0" else kernel
        kernel = torch.tensor(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        layer.weight.data = kernel.reshape(layer.weight.shape)
        layer.bias.data = torch.tensor(bias)
    return model


def share(model: nn.Module, image: torch.Tensor, label: torch.Tensor) -> list[torch.Tensor]:
    """The update of an image, scaled to norm 1."""
    loss = nn.functional.cross_entropy(model(image), label)
    update = torch.autograd.grad(loss, list(model.parameters()))
    norm = torch.sqrt(sum((t * t).sum() for t in update))
    return [t / norm for t in update]


def double_backward(
    model: nn.Module, label: torch.Tensor, target: Sequence[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The gradient of the attack's loss with respect to one candidate, by autograd."""
    params = list(model.parameters())

    def gradient(x):
        x = x.detach().requires_grad_()
        loss = nn.functional.cross_entropy(model(x), label)
        update = torch.autograd.grad(loss, params, create_graph=True)
        return torch.autograd.grad(attack_loss(update, target, x), x)[0]

    return gradient


def functional(
    model: nn.Module, label: torch.Tensor, target: Sequence[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same gradient of a chunk of candidates, by `torch.func`."""
    names, params = zip(*model.named_parameters())
    params = tuple(p.detach() for p in params)  # or autograd would record it all once more

    def client_loss(params, x):
        logits = torch.func.functional_call(model, dict(zip(names, params)), (x,))
        return nn.functional.cross_entropy(logits, label)

    def loss(x):
        return attack_loss(torch.func.grad(client_loss)(params, x), target, x)

    return torch.func.vmap(torch.func.grad(loss))


def attack_loss(
    update: Sequence[torch.Tensor], target: Sequence[torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """Cosine distance of an update to a target of norm 1, and TV of the candidate."""
    inner = sum((u * t).sum() for u, t in zip(update, target))
    norm = torch.sqrt(sum((u * u).sum() for u in update))
    down = (x[:, :, 1:] - x[:, :, :-1]).abs().mean()
    right = (x[:, :, :, 1:] - x[:, :, :, :-1]).abs().mean()
    return 1 - inner / norm + TV * (down + right)


def wait() -> None:
    """Blocks until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def make_training(name: str, width: int | None, batch: int) -> Callable[[int], None]:
    """Makes a function that takes that many training steps, on all threads, on one random batch."""
    torch.manual_seed(0)
    model = NETWORKS[name](width).to(DEVICE).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    images = torch.randn(batch, *IMAGE[1:], device=DEVICE)
    labels = torch.randint(10, (batch,), device=DEVICE)

    def run(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        wait()

    return run
