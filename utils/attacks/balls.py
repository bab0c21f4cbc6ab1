"""Balls of the norms that attacks are bounded in: projection onto them, their steepest directions, points in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

#: CPU generator of a batch, or one for each of its samples: then a sample's start does not depend on the others.
Draws = torch.Generator | Sequence[torch.Generator] | None


def project(shift: torch.Tensor, eps: float, norm: str) -> torch.Tensor:
    """The point of the ball of radius ``eps`` that is nearest to ``shift``, N x C x H x W.

    For L0 the ``eps`` pixels that were changed most stay as they are, in all channels.
    """
    if norm == "l0":
        return shift * _most_changed(shift, int(eps))
    return shift.clamp(-eps, eps) if norm == "linf" else shift * (eps / _length(shift)).clamp(max=1)


def _most_changed(shift: torch.Tensor, count: int) -> torch.Tensor:
    """1 at the ``count`` most changed pixels of each sample, else 0; N x 1 x H x W."""
    size = shift.abs().amax(1).flatten(1)
    kept = torch.zeros_like(size).scatter_(1, size.topk(min(count, size.shape[1])).indices, 1.0)
    return kept.reshape(len(shift), 1, *shift.shape[2:])


def steepest(gradient: torch.Tensor, norm: str) -> torch.Tensor:
    """Direction of length 1 in which a linear loss grows most: the sign, or the scaled gradient for L2.

    Raises:
        ValueError: L0, in which no direction is steepest.
    """
    if norm == "l0":
        raise ValueError("no gradient step is of a number of pixels: L0 attacks search, such as OnePixel or Pixle")
    return gradient.sign() if norm == "linf" else gradient / _length(gradient)


def distance(shift: torch.Tensor, norm: str) -> torch.Tensor:
    """Length of each sample of ``shift``, N x C x H x W to N; for L0 how many pixels are not 0."""
    if norm == "l0":
        return (shift.abs().amax(1) > 0).flatten(1).sum(1).to(shift.dtype)
    return shift.flatten(1).abs().amax(1) if norm == "linf" else shift.flatten(1).norm(dim=1)


def random_point(images: torch.Tensor, eps: float, norm: str, draws: Draws) -> torch.Tensor:
    """A random image in the ball of radius ``eps``: uniform for L-infinity; for L2 a uniform direction and length."""
    if norm == "linf":
        noise = draw(torch.rand, images.shape, draws).to(images)
        return (images + eps * (2 * noise - 1)).clamp(0, 1)
    if isinstance(draws, Sequence) and len(draws):
        # one sample after the other: a generator may stand for several of them, and gives each its two draws in turn
        return torch.cat([random_point(image[None], eps, norm, own) for image, own in zip(images, draws)])
    noise = draw(torch.randn, images.shape, draws).to(images)
    length = draw(torch.rand, torch.Size([len(images), 1, 1, 1]), draws).to(images)
    return (images + eps * length * noise / _length(noise)).clamp(0, 1)


def draw(kind: Callable[..., torch.Tensor], shape: torch.Size, draws: Draws) -> torch.Tensor:
    """Random numbers of a shape N x ..., from one generator or from one for each sample."""
    if draws is None or isinstance(draws, torch.Generator):
        return kind(shape, generator=draws)
    return torch.stack([kind(shape[1:], generator=one) for one in draws]) if len(draws) else kind(shape)


def _length(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1).norm(dim=1).clamp(min=1e-12)[:, None, None, None]
