"""Scans that go wrong: stronger with severity, alike in a patient's slices, and by closed forms where there are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from utils.core.reproducibility import generator
from utils.data.anatomy import part_masks
from utils.data.corruptions import CORRUPTIONS, SEVERITIES, blur, corrupt_slices, corrupted, gamma, moved, rician_noise
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


def test_black_slices_stay_black_and_bad_words_are_refused(splits: DataSplits) -> None:
    black = replace(splits.test, images=torch.zeros_like(splits.test.images))
    for name in NAMES:
        assert corrupted(black, name, 5).images.max() == 0
    with pytest.raises(ValueError, match="corruption must be one of"):
        corrupted(black, "rain", 1)
    with pytest.raises(ValueError, match="severity must be a whole number from 1 to 5, not 6"):
        corrupted(black, "blur", 6)
