"""How small a change of its pixels turns a model's answer around: an upper bound, found by attacking it."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.attack import Attack
from utils.core.modes import eval_mode
from utils.core.reproducibility import generator
from utils.evaluation.attacker import predict_batch

#: Radii among which is searched.
RADII = (0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255)
#: Between the last radius that the answer survived and the first that turned it around the search goes on so often.
HALVINGS = 1
ATTACK = Attack("pgd", steps=10, stop_when_fooled=True)


def smallest_turn(model: nn.Module, images: torch.Tensor, *, seed: int = 0) -> tuple[float | None, torch.Tensor | None]:
    """The smallest radius at which the attack turned the answer around, and the attacked images.

    A better attack may need less, so this is an upper bound of what the answer bears.

    Args:
        model: gives logits 1 x K, whose largest is the answer.
        images: 1 x C x H x W in [0, 1]; for a patient the slices are channels.
        seed: of the random starts.

    Returns:
        None and None where no radius of ``RADII`` did.

    Raises:
        TypeError, ValueError: several images; also see :func:`utils.attacks.gradient.pgd`.
    """
    if len(images) != 1:
        raise ValueError(f"the smallest turn is that of one answer, and there are {len(images)} images")
    best: float | None = None
    images_of_best: torch.Tensor | None = None
    survived = 0.0
    first, last = 0, len(RADII)
    while first < last:  # by halves: who is turned around by a small change is so by larger ones, but for chance
        middle = (first + last) // 2
        if (found := attack_answer(model, images, RADII[middle], seed=seed)) is not None:
            best, images_of_best, last = RADII[middle], found, middle
        else:
            survived, first = RADII[middle], middle + 1
    for _ in range(HALVINGS if best else 0):
        between = (survived + (best or 0.0)) / 2
        if (found := attack_answer(model, images, between, seed=seed)) is not None:
            best, images_of_best = between, found
        else:
            survived = between
    return best, images_of_best


def attack_answer(model: nn.Module, images: torch.Tensor, eps: float, *, seed: int = 0) -> torch.Tensor | None:
    """Attacked images within ``eps`` to which the answer is another one; None where the attack found none.

    Args:
        model, images: see :func:`smallest_turn`.
    """
    with eval_mode(model):
        answer = predict_batch(model, images).argmax(1)
        draws = generator(seed, "predict", eps)
        found = ATTACK(model, images, answer, eps=eps, draws=draws, assume_checked=True)
        return found if bool((predict_batch(model, found).argmax(1) != answer).all()) else None
