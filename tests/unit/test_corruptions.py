"""Scans that go wrong: stronger with severity, alike in a patient's slices, and by closed forms where there are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch

from utils.core.reproducibility import generator
from utils.data.anatomy import part_masks
from utils.data.corruptions import (
    CORRUPTIONS,
    MM_A_PIXEL,
    SEVERITIES,
    _half,
    anisotropy,
    bias_field,
    blur,
    corrupt_slices,
    corrupted,
    gamma,
    ghosting,
    misregistration,
    motion,
    moved,
    rician_noise,
    spikes,
    stripped_too_far,
    stripped_too_little,
)
from utils.data.sets import DataSplits

NAMES = list(CORRUPTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_severer_is_farther_from_the_scan(name: str, splits: DataSplits) -> None:
    images = splits.test
    clean = images.pixels(slice(None))
    far = [
        float((corrupted(images, name, severity).pixels(slice(None)) - clean).abs().mean()) for severity in SEVERITIES
    ]
    assert far[0] > 0 and far[-1] > far[0]
    if name not in ("ghosting", "motion", "spikes", "anisotropy"):  # their patterns change with severity
        assert far == sorted(far)


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_result_whoever_else_is_there(name: str, splits: DataSplits) -> None:
    images = splits.test
    first = images.subjects.unique()[1]
    index = torch.nonzero(images.subjects == first)[:, 0]
    alone, together = (corrupted(part, name, 3).images for part in (images.subset(index), images))
    assert torch.equal(alone, together[index])
    assert torch.equal(together, corrupted(images, name, 3).images)
    if name not in ("blur", "contrast compressed", "contrast expanded"):  # these draw nothing
        assert not torch.equal(together, corrupted(images, name, 3, seed=1).images)


@pytest.mark.parametrize("name", ["Rician noise", "ghosting", "motion", "spikes", "blur", "bias field", "anisotropy"])
def test_what_falls_outside_the_head_is_cut_off(name: str, splits: DataSplits) -> None:
    slices = splits.test.pixels(slice(0, 4))
    found = corrupt_slices(slices, name, 5, generator(0))
    assert (found * part_masks(slices, "background")).max() == 0


def test_a_turn_of_nothing_is_the_slice_and_a_shift_moves_by_pixels() -> None:
    image = torch.rand(2, 1, 20, 30)
    torch.testing.assert_close(moved(image, 0.0, (0.0, 0.0)), image, atol=1e-4, rtol=0)
    down = moved(image, 0.0, (3.0, -2.0))
    torch.testing.assert_close(down[..., 3:, :-2], image[..., :-3, 2:], atol=1e-4, rtol=0)


def test_a_quarter_turn_is_exact_on_a_square() -> None:
    image = torch.rand(1, 1, 16, 16)
    turned = moved(image, 90.0, (0.0, 0.0))
    expected = [image.rot90(k, (-2, -1)) for k in (1, 3)]
    assert min((turned - one).abs().max() for one in expected) < 1e-4


def test_rician_noise_where_there_is_no_signal_is_rayleigh() -> None:
    slices = torch.zeros(1, 1, 256, 256)
    slices[..., :128, :] = 1.0  # its standard deviation is a half
    found = rician_noise(slices, 0.2, generator(0))
    silent = found[..., 128:, :]
    sigma = 0.2 * float(slices.std())
    assert float(silent.mean()) == pytest.approx(sigma * (torch.pi / 2) ** 0.5, rel=0.02)


def test_blur_and_gamma_by_their_formulas() -> None:
    point = torch.zeros(1, 1, 41, 41)
    point[0, 0, 20, 20] = 1.0
    found = blur(point, 3.2, generator(0))[0, 0]  # two pixels
    assert float(found[20, 22] / found[20, 20]) == pytest.approx(torch.tensor(-0.5).exp().item(), rel=1e-4)
    assert float(found.sum()) == pytest.approx(1.0, rel=1e-3)
    ramp = torch.linspace(0, 0.8, 9).reshape(1, 1, 3, 3)
    torch.testing.assert_close(gamma(ramp, 2.0, generator(0)), ramp**2 / 0.8)


#: Strength at which each does nothing, and by how much rounding may miss that.
NOTHING = {
    "bias field": (bias_field, 0.0, 0),
    "Rician noise": (rician_noise, 0.0, 1e-6),
    "ghosting": (ghosting, (4, 0.0), 1e-5),
    "motion": (motion, (3, 0.0, 0.0), 1e-4),
    "spikes": (spikes, (2, 0.0), 1e-5),
    "gamma": (gamma, 1.0, 1e-6),
    "anisotropy": (anisotropy, 1.0, 0),
    "mis-registered": (misregistration, (0.0, 0.0), 1e-4),
}


@pytest.mark.parametrize("name", NOTHING)
def test_of_no_strength_it_is_the_scan(name: str) -> None:
    change, strength, most = NOTHING[name]
    slices = torch.rand(3, 1, 24, 24, generator=generator(1))
    assert (change(slices, strength, generator(0)) - slices).abs().max() <= most


def test_one_spike_is_a_stripe_of_its_size() -> None:
    flat = torch.full((1, 1, 32, 32), 0.5)
    found = spikes(flat, (1, 0.2), generator(0))
    # the bright end of the stack is as bright as before, which divides by 1 + its share
    assert float(found.amax() / found.amin()) == pytest.approx(1.2 / 0.8, rel=0.02)


def test_one_ghost_is_the_head_moved_by_its_share_of_the_picture() -> None:
    slices = torch.zeros(1, 1, 64, 64)
    slices[..., 28:36, 28:36] = 1.0
    found = ghosting(slices, (2, 0.5), generator(0))[0, 0]
    # every second line weaker: a copy half a picture away
    away = [torch.roll(found, 32, along)[28:36, 28:36].mean() for along in (0, 1)]
    assert max(away) > 0.1 > min(away)


def test_a_bias_field_is_smooth_and_the_same_in_all_slices_of_a_stack() -> None:
    slices = 0.2 + 0.6 * torch.rand(2, 1, 32, 32, generator=generator(1))
    field = (bias_field(slices, 0.5, generator(0)) / slices).log()
    torch.testing.assert_close(field[0], field[1], atol=1e-4, rtol=0)
    # a polynomial of degree 3: the fourth difference of its logarithm is nothing
    assert field[0, 0].diff(n=4, dim=0).abs().max() < 1e-4 < field[0, 0].diff(n=2, dim=0).abs().max()


def test_thick_voxels_are_means_of_thin_ones() -> None:
    slices = torch.rand(1, 1, 32, 32, generator=generator(1))
    found = anisotropy(slices, 4.0, generator(0))
    means = [slices.unflatten(along, (8, 4)).mean(along + 1) for along in (2, 3)]
    # the middle of a voxel lies between its second and third sample
    seen = [(found.unflatten(along, (8, 4)).narrow(along + 1, 1, 2)).mean(along + 1) for along in (2, 3)]
    inner = [(one - other).abs().narrow(along, 1, 6).max() for one, other, along in zip(seen, means, (2, 3))]
    assert min(inner) < 0.1 < max(inner)


def test_stripping_takes_or_leaves_a_rim_on_one_side() -> None:
    head = np.zeros((64, 64), bool)
    head[16:48, 16:48] = True
    slices = 0.8 * torch.from_numpy(head)[None, None].float()
    square = np.ones((5, 5))  # two pixels to each side
    side = _half(slices, generator(0))[0, 0].numpy()
    less = stripped_too_far(slices, 2 * MM_A_PIXEL, generator(0))[0, 0].numpy() > 0
    assert np.array_equal(less, head & (scipy.ndimage.binary_erosion(head, square) | ~side))
    more = stripped_too_little(slices, 2 * MM_A_PIXEL, generator(0))[0, 0].numpy() > 0
    assert np.array_equal(more, head | (scipy.ndimage.binary_dilation(head, square) & side))


def test_black_slices_stay_black_and_bad_words_are_refused(splits: DataSplits) -> None:
    black = replace(splits.test, images=torch.zeros_like(splits.test.images))
    for name in NAMES:
        assert corrupted(black, name, 5).images.max() == 0
    with pytest.raises(ValueError, match="corruption must be one of"):
        corrupted(black, "rain", 1)
    with pytest.raises(ValueError, match="severity must be a whole number from 1 to 5, not 6"):
        corrupted(black, "blur", 6)
