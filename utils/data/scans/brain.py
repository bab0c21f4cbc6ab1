"""Which voxels are brain, and how large it is."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from utils.data.extras import need
from utils.data.scans.volume import Volume, read_volume

#: Brains with their fluid, from a small child's to the largest adults', in ml.
SMALLEST_ML, LARGEST_ML = 700.0, 2000.0
#: Least share of zeros around a brain that was stripped before.
_LEAST_BACKGROUND = 0.3


def find_brain(head: Volume) -> np.ndarray:
    """Brain of a whole head, bool X x Y x Z, by deepbet (Fisch et al., 2024, arXiv:2308.07003).

    Raises:
        ModuleNotFoundError: deepbet is not installed.
        ValueError: no brain was found.
    """
    need("deepbet", "the skull is taken off")
    from deepbet.bet import BrainExtraction

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the format in which deepbet keeps its network
        network = BrainExtraction(no_gpu=True)
        try:
            found = network.run_model(head.voxels.copy()) > 0.5
            return network.postprocess(found) > 0
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"no brain was found in {head.name}: is it the scan of a head, and the right way up?"
            ) from error


def stripped_brain(head: Volume) -> np.ndarray:
    """Brain of a volume whose other voxels are 0 already.

    Raises:
        ValueError: they are not.
    """
    low = head.voxels.min()
    background = float((head.voxels == low).mean())
    if background < _LEAST_BACKGROUND:
        raise ValueError(
            f"{head.name} is not stripped: only {background:.0%} of its voxels are background; leave --stripped out"
        )
    return head.voxels > low


def given_brain(head: Volume, path: Path) -> np.ndarray:
    """Brain by a mask that somebody made, a volume of the same grid.

    Raises:
        ValueError: it is of another grid, or marks nothing.
    """
    mask = read_volume(path)
    if mask.voxels.shape != head.voxels.shape or not np.allclose(mask.affine, head.affine, atol=1e-2):
        raise ValueError(f"{path} is not a mask of {head.name}: the voxels of the two do not lie at the same places")
    return mask.voxels > 0.5


def brain_ml(head: Volume, brain: np.ndarray) -> float:
    """Volume of a brain in ml.

    Raises:
        ValueError: it cannot be the brain of a person.
    """
    size = float(brain.sum() * np.abs(np.linalg.det(head.affine[:3, :3])) / 1000)
    if not SMALLEST_ML <= size <= LARGEST_ML:
        raise ValueError(
            f"the brain in {head.name} would have {size:,.0f} ml, not {SMALLEST_ML:,.0f} to {LARGEST_ML:,.0f}: the "
            "skull was not taken off well, the mask is none, part of the head is missing, or the header's voxel size "
            "is wrong. --mask and --stripped take a brain that was found otherwise"
        )
    return size
