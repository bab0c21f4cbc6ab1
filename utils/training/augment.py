"""Augmentation of a whole batch at once, on whatever device the batch is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from utils.core.checks import number

_SCANNER = ("gain", "bias_field", "motion", "noise")


@dataclass(frozen=True)
class Augmentation:
    """Ranges, and the probability that an image gets each change. ``strength`` scales all ranges.

    Attributes:
        strength: factor on every range below; 0 turns everything but the flip off.
        flip, affine, intensity: probability of a left-right flip, of a rotation with shift and
            scaling, and of each of brightness, contrast and gamma.
        rotation: degrees, either way.
        shift: share of the image's side, either way.
        scale: relative size, either way.
        brightness: added to [0, 1] pixels inside the head, either way.
        contrast: relative, either way, about the mean of the image.
        gamma: natural logarithm of the exponent, either way.
        scanner: probability of each of the four changes below, which imitate what scanners and patients do; 0
            leaves all of them out.
        gain: relative scaling of all intensities, either way.
        bias_field: logarithm of a smooth gain across the head, standard deviation at its nodes.
        motion: pixels along which a moving head is smeared.
        noise: Rician noise, standard deviation of both channels in [0, 1] pixels (Gudbjartsson and Patz, 1995).
    """

    strength: float = 1.0
    flip: float = 0.5
    affine: float = 0.8
    intensity: float = 0.3
    rotation: float = 8.0
    shift: float = 0.04
    scale: float = 0.06
    brightness: float = 0.06
    contrast: float = 0.15
    gamma: float = 0.2
    scanner: float = 0.0
    gain: float = 0.15
    bias_field: float = 0.15
    motion: float = 1.5
    noise: float = 0.03

    def __post_init__(self) -> None:
        for name in ("flip", "affine", "intensity", "scanner"):
            number(f"{name}, one of the probabilities,", getattr(self, name), least=0, most=1)
        number("augmentation strength", self.strength, least=0)
        for name in ("rotation", "shift", "scale", "brightness", "contrast", "gamma", *_SCANNER):
            number(name, getattr(self, name), least=0)

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Augmented copies of images N x C x H x W in [0, 1]; same shape and range.

        Every draw comes from ``generator`` (CPU), in an order that does not depend on its values.
        """
        draws = torch.rand(12, len(images), generator=generator).to(images.device)
        chances, amounts = draws[:5], (2 * draws[5:] - 1) * self.strength
        images = self._move(images, chances[0] < self.flip, chances[1] < self.affine, amounts[:4])
        images = self._light(images, chances[2:] < self.intensity, amounts[4:])
        # drawn apart, so that leaving it out changes no other draw
        return self._scan(images, generator) if self.scanner else images

    def _move(
        self, images: torch.Tensor, flip: torch.Tensor, moved: torch.Tensor, amounts: torch.Tensor
    ) -> torch.Tensor:
        angle, right, down, scale = amounts * moved
        angle, scale = angle * math.radians(self.rotation), 1 + scale * self.scale
        cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
        mirror = 1 - 2 * flip.to(cos.dtype)
        first = torch.stack([cos * mirror, -sin, 2 * self.shift * right], 1)
        second = torch.stack([sin * mirror, cos, 2 * self.shift * down], 1)
        grid = F.affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", align_corners=False)

    def _light(self, images: torch.Tensor, chosen: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
        brightness, contrast, gamma = (amounts * chosen)[:, :, None, None, None]
        head = images > _HEAD
        mean = (images * head).sum((1, 2, 3), keepdim=True) / head.sum((1, 2, 3), keepdim=True).clamp(min=1)
        changed = (images - mean) * (1 + contrast * self.contrast) + mean + brightness * self.brightness
        # the small floor keeps the gamma curve's slope finite at black
        changed = changed.clamp(1e-4, 1) ** torch.exp(gamma * self.gamma)
        return torch.where(head, changed, images).clamp(0, 1)

    def _scan(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        head, n = images > _HEAD, len(images)
        draws = torch.rand(7, n, generator=generator).to(images.device)
        chosen = (draws[:4] < self.scanner)[:, :, None, None, None] * self.strength
        gain, angle, length = draws[4:, :, None, None, None]
        nodes, first, second = (
            torch.randn(n, 1, *size, generator=generator).to(images.device)
            for size in ((4, 4), images.shape[-2:], images.shape[-2:])
        )
        field = F.interpolate(nodes, images.shape[-2:], mode="bicubic", align_corners=True)
        changed = images * (1 + chosen[0] * self.gain * (2 * gain - 1)) * torch.exp(chosen[1] * self.bias_field * field)
        changed = _smear(changed, (chosen[2] * self.motion * length)[:, 0, 0, 0], 2 * math.pi * angle[:, 0, 0, 0])
        size = chosen[3] * self.noise
        changed = torch.sqrt((changed + size * first) ** 2 + (size * second) ** 2)
        return torch.where(head, changed, images).clamp(0, 1)


#: Pixels above this belong to the head; what lies around it is black in these data and stays so.
_HEAD = 0.02


def _smear(images: torch.Tensor, length: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Mean of each image and two copies of it, shifted by ``length`` pixels along and against ``angle``, both N."""
    height, width = images.shape[-2:]
    eye = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
    move = torch.stack([2 * length * angle.cos() / width, 2 * length * angle.sin() / height], 1)
    copies = [images]
    for side in (-1, 1):
        matrix = eye + F.pad((side * move)[:, :, None], (2, 0))
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        copies.append(F.grid_sample(images, grid, mode="bilinear", align_corners=False))
    return torch.stack(copies).mean(0)


NO_AUGMENTATION = Augmentation(strength=0.0, flip=0.0, affine=0.0, intensity=0.0)
