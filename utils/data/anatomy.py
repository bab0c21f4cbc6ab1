"""Parts of a skull-stripped axial slice, told apart by brightness and depth: brain, fluid inside, rim, background."""

from __future__ import annotations

import numpy as np
import scipy  # loads its parts at their first use
import torch

#: An image is dark where it is below this share of its own bright end: fluid, not tissue.
DARK = 0.35
#: Share of the head's half width that counts as its rim, where the sulci are.
RIM = 0.3
#: Brighter than black background, in grey levels.
_SEEN = 5


def head_of(image: np.ndarray) -> np.ndarray:
    """The head, holes filled, bool H x W, of a uint8 slice on black."""
    return scipy.ndimage.binary_fill_holes(image > _SEEN)


def dark_in(image: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Fluid of a head, bool H x W."""
    if not head.any():
        return head
    return head & (image < DARK * np.percentile(image[head], 98))


def rim_of(head: np.ndarray) -> np.ndarray:
    """The outer ``RIM`` of a head, bool H x W; beyond the picture's border lies background."""
    depth = scipy.ndimage.distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1]
    return head & (depth <= RIM * depth.max())


def _ventricles(image: np.ndarray) -> np.ndarray:
    head = head_of(image)
    return dark_in(image, head) & ~rim_of(head)


#: What a region is called -> how it is found in a uint8 slice H x W.
PARTS = {
    "brain": head_of,
    "background": lambda image: ~head_of(image),
    "ventricles": _ventricles,
    "rim": lambda image: rim_of(head_of(image)),
}


def part_masks(images: torch.Tensor, name: str) -> torch.Tensor:
    """A part of each slice, bool N x 1 x H x W on the images' device.

    Args:
        images: N x 1 x H x W in [0, 1], skull-stripped slices on black.
        name: key of ``PARTS``.

    Raises:
        ValueError: no such part, or images of several planes.
    """
    if name not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, not {name!r}")
    if images.shape[1] != 1:
        raise ValueError(f"parts are found in grey slices N x 1 x H x W, not in {tuple(images.shape)}")
    grey = (images[:, 0].detach().cpu().numpy() * 255).round().astype(np.uint8)
    found = np.stack([PARTS[name](image) for image in grey]) if len(grey) else np.zeros(grey.shape, bool)
    return torch.from_numpy(found)[:, None].to(images.device)
