"""Scans that go wrong by themselves: noise, motion, ghosts, coils and stripping, at five severities.

Ranges are those of ROOD-MRI (Boone et al., 2022, arXiv:2203.06060), from its defaults
for volumes; spikes and stripping are not among them and have ranges of ours. Here they act on slices: the k-space is
that of each slice, a patient's slices meet the same coil, ghost and motion, and what falls outside the head is cut off,
as skull stripping does after the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F

from utils.core.checks import whole
from utils.core.reproducibility import generator
from utils.data.anatomy import part_masks
from utils.data.sets import ImageSet

SEVERITIES = (1, 2, 3, 4, 5)
#: Size of a pixel of the 128-pixel slices of the public sets, on average of both directions.
MM_A_PIXEL = 1.6
#: Shares of k-space lines about the middle that ghosting leaves as they are.
_RESTORED = 0.02

Corruption = Callable[[torch.Tensor, float, torch.Generator], torch.Tensor]


def _uniform(low: float, high: float, draws: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=draws))


def _kept_window(changed: torch.Tensor, slices: torch.Tensor) -> torch.Tensor:
    """Scaled so that the bright end of the stack is as bright as before: a scanner chooses its window."""
    before, after = (float(values.flatten().quantile(0.995)) for values in (slices, changed))
    return changed * (before / after if after > 1e-6 else 1.0)


def rician_noise(slices: torch.Tensor, share: float, draws: torch.Generator) -> torch.Tensor:
    """Length of a complex signal with normal noise in both parts (Gudbjartsson and Patz, 1995).

    Args:
        share: standard deviation of the noise, as a share of the stack's own.
    """
    sigma = share * float(slices.std())
    first, second = (sigma * torch.randn(slices.shape, generator=draws).to(slices) for _ in range(2))
    return ((slices + first) ** 2 + second**2).sqrt()


def bias_field(slices: torch.Tensor, most: float, draws: torch.Generator) -> torch.Tensor:
    """A coil that is brighter here than there: the exponential of a polynomial of degree 3 in x and y.

    Args:
        most: coefficients are drawn between minus and plus this.
    """
    height, width = slices.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    powers = [(i, j) for i in range(4) for j in range(4 - i) if i + j]
    field = sum(_uniform(-most, most, draws) * x**i * y**j for i, j in powers)
    return _kept_window(slices * torch.as_tensor(field).exp().to(slices), slices)


def _spectrum(slices: torch.Tensor) -> torch.Tensor:
    return torch.fft.fftshift(torch.fft.fft2(slices), dim=(-2, -1))


def _image(spectrum: torch.Tensor) -> torch.Tensor:
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum, dim=(-2, -1))).abs()


def ghosting(slices: torch.Tensor, strength: tuple[int, float], draws: torch.Generator) -> torch.Tensor:
    """Copies of the head along one direction: every so many lines of k-space are weighted otherwise.

    Args:
        strength: number of ghosts, and how much is taken off those lines.
    """
    count, intensity = strength
    spectrum = _spectrum(slices)
    along = -2 if torch.rand((), generator=draws) < 0.5 else -1
    lines = torch.arange(spectrum.shape[along])
    chosen = lines % count == 0
    chosen &= (lines - len(lines) // 2).abs() > _RESTORED * len(lines)
    weight = torch.where(chosen, 1 - intensity, 1.0).to(slices)
    weight = weight[:, None] if along == -2 else weight
    return _kept_window(_image(spectrum * weight), slices)


def moved(slices: torch.Tensor, degrees: float, shift: tuple[float, float]) -> torch.Tensor:
    """Slices shifted by ``shift`` pixels (down, right) and then turned about the middle of the picture."""
    angle = math.radians(degrees)
    height, width = slices.shape[-2:]
    turn = [[math.cos(angle), -math.sin(angle) * height / width, -2 * shift[1] / width]]
    turn += [[math.sin(angle) * width / height, math.cos(angle), -2 * shift[0] / height]]
    matrix = torch.tensor(turn, dtype=slices.dtype, device=slices.device).expand(len(slices), 2, 3)
    grid = F.affine_grid(matrix, list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, align_corners=False)


def motion(slices: torch.Tensor, strength: tuple[int, float, float], draws: torch.Generator) -> torch.Tensor:
    """A head that moved while it was scanned: parts of k-space come from turned and shifted slices.

    The part about the middle comes from the head at rest, so that the picture stays in place (after Shaw et al., 2020,
    doi:10.1109/TMI.2020.2972547).

    Args:
        strength: number of moves, and the most degrees and millimetres of each.
    """
    moves, degrees, millimetres = strength
    height = slices.shape[-2]
    ends = torch.randperm(height - 1, generator=draws)[:moves].sort().values + 1
    bounds = [0, *ends.tolist(), height]
    spectrum, pixels = _spectrum(slices), millimetres / MM_A_PIXEL
    result = spectrum.clone()
    for low, high in pairwise(bounds):
        angle = _uniform(-degrees, degrees, draws)
        shift = (_uniform(-pixels, pixels, draws), _uniform(-pixels, pixels, draws))
        if not low <= height // 2 < high:
            result[..., low:high, :] = _spectrum(moved(slices, angle, shift))[..., low:high, :]
    return _kept_window(_image(result), slices)


def spikes(slices: torch.Tensor, strength: tuple[int, float], draws: torch.Generator) -> torch.Tensor:
    """Points of k-space that are far too bright, which lay stripes over the picture.

    Args:
        strength: number of spikes, and their size as a share of the brightest point.
    """
    count, size = strength
    spectrum = _spectrum(slices)
    height, width = spectrum.shape[-2:]
    brightest = spectrum.abs().amax((-2, -1))
    for _ in range(count):
        row, column = (int(torch.randint(side // 4, 3 * side // 4, (), generator=draws)) for side in (height, width))
        spectrum[..., row, column] += size * brightest
    return _kept_window(_image(spectrum), slices)


def blur(slices: torch.Tensor, millimetres: float, draws: torch.Generator) -> torch.Tensor:
    """A Gaussian of ``millimetres`` standard deviation over each slice."""
    sigma = millimetres / MM_A_PIXEL
    reach = max(1, math.ceil(3 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1).float() ** 2) / (2 * sigma**2)).to(slices)
    line = line / line.sum()
    wide = F.conv2d(F.pad(slices, (reach, reach, 0, 0), mode="replicate"), line[None, None, None])
    return F.conv2d(F.pad(wide, (0, 0, reach, reach), mode="replicate"), line[None, None, :, None])


def gamma(slices: torch.Tensor, power: float, draws: torch.Generator) -> torch.Tensor:
    """Brightness to a power, over the range of the stack: below 1 less contrast in the bright, above 1 more."""
    top = slices.amax().clamp(min=1e-6)
    return (slices / top).clamp(min=0) ** power * top


def anisotropy(slices: torch.Tensor, factor: float, draws: torch.Generator) -> torch.Tensor:
    """Thicker voxels in one direction of the slice: sampled ``factor`` times as coarsely, and enlarged again."""
    along = 0 if torch.rand((), generator=draws) < 0.5 else 1
    size = list(slices.shape[-2:])
    coarse = [max(2, round(side / factor)) if place == along else side for place, side in enumerate(size)]
    return F.interpolate(F.interpolate(slices, size=coarse, mode="area"), size=size, mode="bilinear")


def misregistration(slices: torch.Tensor, strength: tuple[float, float], draws: torch.Generator) -> torch.Tensor:
    """A head that lies wrong on the atlas.

    Args:
        strength: most degrees, and most millimetres in each direction.
    """
    degrees, pixels = strength[0], strength[1] / MM_A_PIXEL
    angle = _uniform(-degrees, degrees, draws)
    return moved(slices, angle, (_uniform(-pixels, pixels, draws), _uniform(-pixels, pixels, draws)))


def _half(slices: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """One side of the picture at a random angle, bool 1 x 1 x H x W: stripping goes wrong in one place."""
    height, width = slices.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    angle = _uniform(0, 2 * math.pi, draws)
    return (x * math.cos(angle) + y * math.sin(angle) > 0)[None, None].to(slices.device)


def _grown(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    return F.max_pool2d(mask.float(), 2 * pixels + 1, stride=1, padding=pixels) > 0


def stripped_too_far(slices: torch.Tensor, millimetres: float, draws: torch.Generator) -> torch.Tensor:
    """The rim of the brain is missing on one side."""
    head = part_masks(slices, "brain")
    kept = ~_grown(~head, max(1, round(millimetres / MM_A_PIXEL)))
    return slices * (kept | ~_half(slices, draws))


def stripped_too_little(slices: torch.Tensor, millimetres: float, draws: torch.Generator) -> torch.Tensor:
    """A bright shell of what is outside the brain is left on one side."""
    head = part_masks(slices, "brain")
    shell = _grown(head, max(1, round(millimetres / MM_A_PIXEL))) & ~head & _half(slices, draws)
    return torch.where(shell, 0.9 * slices.flatten().quantile(0.995), slices)


#: Name for tables -> what happens, its strength at each severity, and whether what falls outside the head is cut off.
CORRUPTIONS: dict[str, tuple[Callable[..., torch.Tensor], tuple, bool]] = {
    "Rician noise": (rician_noise, (0.16, 0.32, 0.48, 0.64, 0.8), True),
    "bias field": (bias_field, (0.3, 0.6, 0.9, 1.2, 1.5), True),
    "ghosting": (ghosting, ((3, 0.5), (5, 1.0), (7, 1.5), (9, 2.0), (11, 2.5)), True),
    "motion": (motion, ((2, 1.0, 2.0), (4, 2.0, 4.0), (6, 3.0, 6.0), (8, 4.0, 8.0), (10, 5.0, 10.0)), True),
    "spikes": (spikes, ((1, 0.1), (1, 0.2), (2, 0.2), (2, 0.3), (3, 0.3)), True),
    "blur": (blur, (0.8, 1.6, 2.4, 3.2, 4.0), True),
    "contrast compressed": (gamma, (0.86, 0.72, 0.58, 0.44, 0.3), True),
    "contrast expanded": (gamma, (1.4, 1.8, 2.2, 2.6, 3.0), True),
    "anisotropy": (anisotropy, (2.8, 4.6, 6.4, 8.2, 10.0), True),
    "mis-registration": (misregistration, ((6, 8), (12, 16), (18, 24), (24, 32), (30, 40)), False),
    "stripped too far": (stripped_too_far, (3.0, 6.0, 9.0, 12.0, 15.0), False),
    "stripped too little": (stripped_too_little, (2.0, 4.0, 6.0, 8.0, 10.0), False),
}


def corrupt_slices(slices: torch.Tensor, name: str, severity: int, draws: torch.Generator) -> torch.Tensor:
    """One patient's slices as a scan that went wrong.

    Args:
        slices: S x 1 x H x W in [0, 1], skull-stripped.
        name: key of ``CORRUPTIONS``.
        severity: 1 to 5.
        draws: CPU generator.

    Returns:
        slices of the same shape, in [0, 1].

    Raises:
        ValueError: another name or severity.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, not {name!r}")
    whole("severity", severity, SEVERITIES[0], SEVERITIES[-1])
    change, strengths, stripped = CORRUPTIONS[name]
    found = change(slices, strengths[severity - 1], draws)
    if stripped:
        found = found * part_masks(slices, "brain")
    return found.clamp(0, 1)


def corrupted(images: ImageSet, name: str, severity: int, *, seed: int = 0) -> ImageSet:
    """All images as scans that went wrong, a patient's slices alike, rounded to 8 bits.

    Args:
        images: skull-stripped slices.
        seed: of the draws, with name and patient: the same at each severity, and whoever else is there.
        name, severity: see :func:`corrupt_slices`.

    Raises:
        ValueError: see :func:`corrupt_slices`.
    """
    found = images.images.clone()
    for patient in images.subjects.unique().tolist():
        own = torch.nonzero(images.subjects == patient)[:, 0]
        draws = generator(seed, name, patient)
        changed = corrupt_slices(images.pixels(own), name, severity, draws)
        found[own] = (changed * 255).round().byte()
    return replace(images, images=found)
