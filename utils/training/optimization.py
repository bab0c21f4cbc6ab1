"""Optimiser, learning rate, loss, weight averaging and weight perturbation of the training loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from models.def_models import MRIClassifier
from utils.core.processes import total
from utils.data.sets import ImageSet
from utils.training.config import TrainConfig


def make_optimizer(model: MRIClassifier, config: TrainConfig) -> torch.optim.Optimizer:
    """Optimiser over the trainable parameters; biases and norms are not decayed.

    Each group's ``scale`` is the factor on its learning rate: ``layer_decay`` to the power of the block's distance
    from the head.
    """
    depth = {id(p): d for d, block in enumerate(reversed(model.blocks), start=1) for p in block.parameters()}
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            key = (config.layer_decay ** depth.get(id(parameter), 0), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    listed = [
        {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
        for (scale, decays), parameters in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(listed, lr=config.learning_rate, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(listed, lr=config.learning_rate, fused=True)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its share of the learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def rate_factor(scheduler: str, progress: float) -> float:
    """Learning rate relative to its peak after a share ``progress`` of the training, 0..1."""
    if scheduler == "constant":
        return 1.0
    if scheduler == "step":
        return 0.1 ** (int(progress * 10) // 4)
    if scheduler == "onecycle" and progress < 0.2:
        return 0.04 + 0.96 * progress / 0.2
    rest = (progress - 0.2) / 0.8 if scheduler == "onecycle" else progress
    return 0.5 * (1 + math.cos(math.pi * rest))


def make_criterion(train_set: ImageSet, config: TrainConfig, device: torch.device) -> Callable:
    """Cross-entropy with smoothed labels and class weights of mean 1 over the training images.

    What it returns takes logits N x K and labels, N or N x K shares of mixed images. With ``sampling="class"`` the
    classes are drawn equally often, and get no weights on top.
    """
    counts = train_set.labels.bincount(minlength=len(train_set.classes)).double()
    balance = 0.0 if config.sampling == "class" else config.class_balance
    weights = counts.clamp(min=1) ** -balance
    weights = (weights * counts.sum() / (weights * counts).sum()).float().to(device)

    def criterion(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(
            logits.float(), labels, weight=weights, label_smoothing=config.label_smoothing, reduction="none"
        )
        # a mean over the batch, not over its weights: a batch's makeup must not change its step size
        return losses.mean()

    return criterion


def make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and BatchNorm statistics, which follows faster in the first steps."""

    def average(own: torch.Tensor, current: torch.Tensor, steps: torch.Tensor | int) -> torch.Tensor:
        if not own.is_floating_point():
            return current
        return own.lerp(current, 1 - min(decay, (1 + int(steps)) / (10 + int(steps))))

    return AveragedModel(model, avg_fn=average, use_buffers=True)


@contextmanager
def perturbed_weights(model: nn.Module, losses: Iterable[torch.Tensor], gamma: float) -> Iterator[None]:
    """Adversarial weight perturbation (Wu et al., 2020, arXiv:2004.05884), with one step.

    Inside, each trainable weight matrix is moved up the slope of the sum of ``losses`` by ``gamma`` times its own
    norm; biases and norms stay. Afterwards the weights are exactly what they were, and what was added to ``.grad``
    inside is kept. ``gamma`` 0 does nothing, and asks ``losses`` for none.
    """
    weights = [p for p in model.parameters() if p.requires_grad and p.ndim > 1] if gamma else []
    originals = [weight.detach().clone() for weight in weights]
    if weights:
        gradients = [torch.zeros_like(weight) for weight in weights]
        for loss in losses:
            for gradient, own in zip(gradients, torch.autograd.grad(loss, weights)):
                gradient += own
        with torch.no_grad():
            for weight, gradient in zip(weights, map(total, gradients)):
                weight.add_(gradient * (gamma * weight.norm() / gradient.norm().clamp(min=1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals):
                weight.copy_(original)
