"""What happens to an image between attacker and model: saved, compressed, windowed, resized, turned by a degree.

Each view is a function of images and a random generator. Rounding and JPEG have no useful gradient and pass it on as
it is (Athalye et al., 2018, arXiv:1802.00420, section 4.1).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from utils.attacks.balls import Draws, project, random_point, steepest
from utils.attacks.given import check_batch
from utils.attacks.gradient import ascent, check_alpha, check_gradient, cross_entropy
from utils.core.checks import whole
from utils.core.modes import attack_mode
from utils.core.radii import check_eps

View = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


def _between(low: float, high: float, draws: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=draws))


def _straight(images: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """``changed`` in value, the identity in gradient."""
    return images + (changed - images).detach()


def rounded(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """As an 8-bit file holds them."""
    return _straight(images, (images * 255).round() / 255)


def jpeg(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """As a JPEG file of a quality of 75 to 95 holds them."""
    quality = int(torch.randint(75, 96, (), generator=draws))
    return _straight(images, as_jpeg(images, quality))


def as_jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Grey images through a JPEG file and back, N x C x H x W in [0, 1]; each plane is a file of its own."""
    planes = (images.detach().cpu().flatten(0, 1).numpy() * 255).round().astype(np.uint8)
    back = [_through_jpeg(plane, quality) for plane in planes]
    return (torch.from_numpy(np.stack(back)).float() / 255).reshape(images.shape).to(images)


def _through_jpeg(plane: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(plane).save(file, "JPEG", quality=quality)
    with Image.open(file) as opened:
        return np.asarray(opened)


def windowed(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Contrast by up to 5 %, brightness by up to 5 grey levels: another window of the viewer."""
    gain, shift = _between(0.95, 1.05, draws), _between(-5 / 255, 5 / 255, draws)
    return (images * gain + shift).clamp(0, 1)


def resized(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """To 80 to 95 % of the side and back."""
    share = _between(0.80, 0.95, draws)
    size = [max(2, round(side * share)) for side in images.shape[-2:]]
    small = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return F.interpolate(small, size=list(images.shape[-2:]), mode="bilinear").clamp(0, 1)


def turned(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """By up to one degree about the middle."""
    angle = torch.tensor(_between(-1, 1, draws)).deg2rad()
    height, width = images.shape[-2:]
    # in grid units of half a side, so that images that are not square are turned and not sheared
    rows = [[angle.cos(), -angle.sin() * height / width, 0.0], [angle.sin() * width / height, angle.cos(), 0.0]]
    turn = torch.tensor(rows, dtype=images.dtype, device=images.device).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).clamp(0, 1)


#: Name for tables -> what happens.
VIEWS: dict[str, View] = {
    "8-bit file": rounded,
    "JPEG 75-95": jpeg,
    "window": windowed,
    "resized": resized,
    "turned by 1 degree": turned,
}


def any_view(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """One of ``VIEWS``, at random."""
    place = int(torch.randint(len(VIEWS), (), generator=draws))
    return list(VIEWS.values())[place](images, draws)


def eot_pgd(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    eps: float,
    steps: int = 20,
    samples: int = 5,
    alpha: float | None = None,
    norm: str = "linf",
    generator: Draws = None,
    assume_checked: bool = False,
) -> torch.Tensor:
    """PGD on the expected loss over views (Athalye et al., 2018, arXiv:1707.07397).

    Args:
        samples: views a step, over which the gradient is averaged.
        model, images, labels, eps, steps, alpha, norm, generator, assume_checked: see
            :func:`utils.attacks.gradient.pgd`.

    Raises:
        TypeError, ValueError: see :func:`utils.attacks.gradient.pgd`; also samples below 1.
    """
    check_eps(eps, norm)
    check_batch(model, images, labels)
    whole("steps", steps, 1)
    whole("samples", samples, 1)
    if not len(images):
        return images
    draws = _own_draws(generator, len(images))
    alpha = check_alpha(alpha, eps, steps, norm)
    here = random_point(images, eps, norm, generator)
    with attack_mode(model):
        for step in range(steps):
            gradient = torch.zeros_like(images)
            for number in range(samples):
                check = not assume_checked and step == number == 0
                gradient += ascent(_Seen(model, draws), here, labels, cross_entropy, check=check).gradient
            check_gradient(gradient)
            shift = project(here + alpha * steepest(gradient, norm) - images, eps, norm)
            here = (images + shift).clamp(0, 1)
    return here


def _own_draws(generator: Draws, count: int) -> list[torch.Generator]:
    """A generator of views for each image, so that what one meets does not depend on who else is attacked."""
    if isinstance(generator, Sequence):
        seeds = [own.initial_seed() % 2**31 for own in generator]
    else:
        first = 0 if generator is None else generator.initial_seed() % 2**31
        seeds = list(range(first, first + count))
    return [torch.Generator().manual_seed(seed) for seed in seeds]


class _Seen(nn.Module):
    """A model behind a random view of each image."""

    def __init__(self, model: nn.Module, draws: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.model, self.draws = model, draws

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(torch.cat([any_view(image[None], own) for image, own in zip(images, self.draws)]))
