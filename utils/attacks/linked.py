"""An attack on all slices of a patient at once, whose changes may be tied from slice to slice."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.balls import Draws, random_point
from utils.attacks.given import check_batch
from utils.attacks.gradient import ascent, check_alpha, check_gradient, named_loss
from utils.core.checks import whole
from utils.core.modes import attack_mode
from utils.core.radii import check_eps

#: How the changes of a patient's slices hang together -> for titles.
LINKS = {"free": "each slice free", "smooth": "smooth from slice to slice", "shared": "one change for all slices"}
#: Standard deviation of the Gaussian that ties slices, in slices of the stack.
WIDTH = 1.0


def link_matrix(link: str, slices: int) -> torch.Tensor:
    """Weights S x S with rows that sum to 1: the change of a slice is a mean of free changes.

    Args:
        link: key of ``LINKS``.
        slices: S.

    Raises:
        ValueError: an unknown link.
    """
    if link not in LINKS:
        raise ValueError(f"link must be one of {', '.join(LINKS)}, not {link!r}")
    if link == "free":
        return torch.eye(slices)
    if link == "shared":
        return torch.full((slices, slices), 1 / slices)
    place = torch.arange(slices).float()
    near = torch.exp(-((place[:, None] - place) ** 2) / (2 * WIDTH**2))
    return near / near.sum(1, keepdim=True)


def linked_pgd(
    model: nn.Module,
    stacks: torch.Tensor,
    labels: torch.Tensor,
    *,
    link: str,
    eps: float,
    steps: int = 20,
    alpha: float | None = None,
    loss: str = "ce",
    generator: Draws = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """L-infinity PGD on free changes, of which each slice gets a weighted mean.

    A mean of numbers within ``eps`` lies within ``eps``, so that every link's images lie in the ball of the free one.

    Args:
        model: maps stacks to logits of patients, P x K.
        stacks: float tensor P x S x H x W in [0, 1], a patient's slices as channels.
        labels: int64 tensor P.
        link: key of ``LINKS``.
        eps, steps, alpha, loss, generator, assume_checked: see :func:`utils.attacks.gradient.pgd`.

    Returns:
        attacked stacks of the same shape, in [0, 1] and within ``eps``; of all steps the one with the highest loss.

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.gradient.pgd` and :func:`link_matrix`; also slices that are to
            be tied where each patient has one.
    """
    check_eps(eps)
    whole("steps", steps, 1)
    check_batch(model, stacks, labels)
    tie = link_matrix(link, stacks.shape[1]).to(stacks)
    if link != "free" and stacks.shape[1] < 2:
        raise ValueError(f"{LINKS[link]!r} ties the slices of a patient, and here each has a single one")
    alpha = check_alpha(alpha, eps, steps, "linf")

    def tied(free: torch.Tensor) -> torch.Tensor:
        return (stacks + torch.einsum("st,pthw->pshw", tie, free)).clamp(0, 1)

    free = random_point(torch.full_like(stacks, 0.5), eps, "linf", generator) - 0.5
    best, highest = tied(free), torch.full((len(stacks),), -torch.inf, device=stacks.device)
    with attack_mode(model):
        for step in range(steps + 1):
            here = tied(free)
            found = ascent(model, here, labels, named_loss(loss), check=not assume_checked and step == 0)
            check_gradient(found.gradient)
            better = found.loss > highest
            best[better], highest = here[better], torch.maximum(highest, found.loss)
            pull = torch.einsum("st,pshw->pthw", tie, found.gradient)
            free = (free + alpha * pull.sign()).clamp(-eps, eps)
    return best
