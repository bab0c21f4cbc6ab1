"""Small classifiers of small noisy pictures, trained in a second or two, for tests that need real decisions."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.gradient import pgd
from utils.data.classes import CLASSES
from utils.data.sets import ImageSet

SIDE = 16
EPS = 6 / 255


def toy_images(n: int, seed: int, k: int = 4) -> ImageSet:
    """``n`` noisy copies of ``k`` prototypes, eight pictures a subject."""
    prototypes = torch.rand(k, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(99))
    draws = torch.Generator().manual_seed(seed)
    subjects = torch.arange(n) // 8
    labels = subjects % k
    noise = torch.randn(n, 1, SIDE, SIDE, generator=draws)
    pictures = (0.42 + 0.16 * prototypes[labels] + 0.12 * noise).clamp(0, 1)
    paths = [f"{number}.png" for number in range(n)]
    return ImageSet(
        (pictures * 255).round().byte(),
        labels,
        subjects,
        torch.arange(n) % 8,
        torch.zeros(n, dtype=torch.bool),
        paths,
        list(CLASSES[:k]),
        {"protocol": "patient", "source": "toy", "fingerprint": "toy"},
    )


def toy_net(seed: int, k: int = 4, stride: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    side = (((SIDE - 3) // stride + 1) - 3) // 2 + 1
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=stride),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * side * side, k),
    )


def train_toy(seed: int = 0, *, k: int = 4, hardened: bool = False, steps: int = 150) -> nn.Sequential:
    """A trained net in eval mode; ``hardened`` trains it on PGD-5 at ``EPS``."""
    net, images = toy_net(seed, k), toy_images(1024, seed=1, k=k)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for step in range(steps):
        index = torch.randperm(1024, generator=torch.Generator().manual_seed(1000 * seed + step))[:128]
        pixels, labels = images.pixels(index), images.labels[index]
        if hardened:
            pixels = pgd(net, pixels, labels, eps=EPS, steps=5)
        loss = nn.functional.cross_entropy(net.train()(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.zero_grad(set_to_none=True)
    return net.eval()


class WeightedSum(nn.Module):
    """Class 1 where the weighted sum of what pixels are above grey goes beyond ``border``: each best change is known.

    Args:
        weights: C x H x W.
    """

    def __init__(self, weights: torch.Tensor, border: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.border = border

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        away = ((images - 0.5) * self.weights).sum((1, 2, 3)) - self.border
        return torch.stack([-away, away], 1)


class HalfSpace(nn.Module):
    """Class 1 where the mean pixel is above a half: how far an image is from the border is known."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        away = images.mean((1, 2, 3)) - 0.5
        return torch.stack([-away, away], 1)


class Chances(nn.Module):
    """A model whose logits were turned into probabilities, as none that is attacked may be."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).softmax(1)


class Sigmoids(Chances):
    """A model that is sure, with a sigmoid for each class."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (20 * self.model(images)).sigmoid()
