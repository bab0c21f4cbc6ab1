"""One change for all images: a universal perturbation, fitted on some patients and tried on others."""

from __future__ import annotations

import torch
from torch import nn

from utils.attacks.balls import project, random_point, steepest
from utils.attacks.given import check_batch
from utils.attacks.gradient import ascent, check_gradient, margin
from utils.core.checks import number, whole
from utils.core.modes import attack_mode
from utils.core.radii import check_eps
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet

#: Where an image is misclassified by this much it pulls no more, so that no image takes over.
_ENOUGH = 1.0


def _enough(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return margin(logits, labels).clamp(max=_ENOUGH)


def universal_perturbation(
    model: nn.Module,
    images: ImageSet,
    *,
    eps: float,
    norm: str = "linf",
    epochs: int = 10,
    batch_size: int = 64,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """One shift that misclassifies as many of the images as it can, by projected ascent over batches.

    The loss of each image is bounded, as in Shafahi et al. (2020, arXiv:1811.11304); here it is the margin.

    Args:
        model: maps images to logits, normalisation inside.
        images: to fit on; not those that the shift is then tried on.
        eps: radius in ``norm``.
        epochs: times that all images are seen. A step is ``2.5 * eps`` over the number of steps, but not less than that
            over 20; in the last quarter of the steps it is a quarter of that.
        seed: of the start and the order.

    Returns:
        float tensor 1 x 1 x H x W within ``eps``; images plus it must be clamped to [0, 1].

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.gradient.pgd`; also epochs or batches below 1, or no images.
    """
    check_eps(eps, norm)
    whole("epochs", epochs, 1)
    whole("batch_size", batch_size, 1)
    number("images", len(images), least=1)
    draws = generator(seed, "universal", eps)
    first = images.pixels(slice(0, 1), device)
    check_batch(model, first, images.labels[:1].to(device))
    shift = random_point(torch.full_like(first, 0.5), eps, norm, draws) - 0.5
    steps = epochs * -(-len(images) // batch_size)
    done = 0
    with attack_mode(model):
        for _ in range(epochs):
            for index in torch.randperm(len(images), generator=draws).split(batch_size):
                alpha = 2.5 * eps / min(steps, 20) * (1.0 if done < 0.75 * steps else 0.25)
                pixels, labels = images.pixels(index, device), images.labels[index].to(device)
                found = ascent(model, (pixels + shift).clamp(0, 1), labels, _enough, check=done == 0)
                check_gradient(found.gradient)
                shift = project(shift + alpha * steepest(found.gradient.sum(0, keepdim=True), norm), eps, norm)
                done += 1
    return shift
