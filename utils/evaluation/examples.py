"""Attacked slices to look at, beside what the model said of each before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.attacks.attack import Attack
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation.attacker import predict_batch
from utils.evaluation.metrics import predict


@dataclass
class AdversarialExample:
    """One attacked image.

    Attributes:
        image: float tensor 1 x H x W in [0, 1], attacked.
        label, clean, attacked: class indices: the truth, and the model's answer before and after.
        clean_image: like ``image``, before the attack; None where it was not kept.
        attack, eps: title of the attack, and its radius.
    """

    image: torch.Tensor
    label: int
    clean: int
    attacked: int
    clean_image: torch.Tensor | None = None
    attack: str = ""
    eps: float | None = None


def adversarial_examples(
    model: nn.Module,
    images: ImageSet,
    *,
    attacks: Sequence[tuple[Attack, float]],
    n: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[list[AdversarialExample]]:
    """The same ``n`` images under each of several attacks.

    Images that are right without attack come first, one of each class in turn.

    Args:
        attacks: pairs of attack and radius.

    Returns:
        one list of ``n`` examples for each attack.
    """
    clean = predict(model, images, device=device).argmax(1)
    chosen = spread_over_classes(images.labels, clean == images.labels, n)
    pixels, labels = images.pixels(chosen, device), images.labels[chosen].to(device)
    rows = []
    for attack, eps in attacks:
        attacked = attack(model, pixels, labels, eps=eps, draws=generator(seed, "examples"))
        answers = predict_batch(model, attacked).argmax(1).tolist()
        rows.append(
            [
                AdversarialExample(image.cpu(), int(label), int(clean[index]), answer, before.cpu(), attack.title, eps)
                for image, label, index, answer, before in zip(attacked, labels, chosen, answers, pixels)
            ]
        )
    return rows


def spread_over_classes(labels: torch.Tensor, preferred: torch.Tensor, n: int) -> torch.Tensor:
    """Indices of ``n`` images: preferred ones first, the classes in turn."""
    order = []
    for keep in (preferred, ~preferred):
        groups = [torch.nonzero(keep & (labels == label))[:, 0].tolist() for label in labels.unique()]
        longest = max(map(len, groups), default=0)
        order += [group[rank] for rank in range(longest) for group in groups if rank < len(group)]
    return torch.tensor(order[:n])
