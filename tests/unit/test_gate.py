"""Which images a model knows."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import SmallNet
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import interpolate

from utils.data.corruptions import corrupted
from utils.data.sets import DataSplits
from utils.evaluation.detectors import GateDetector, push_score
from utils.evaluation.gate import ACCEPTED, DOUBTFUL, GATE, REFUSED, TURNS, Gate, _comparable, fine_detail, fit_gate


@pytest.fixture(scope="module")
def gate(splits: DataSplits) -> Gate:
    return fit_gate(splits.train, splits.validation)


def test_slices_of_unknown_patients_pass_and_foreign_images_do_not(gate: Gate, splits: DataSplits) -> None:
    own = splits.test.pixels(slice(0, len(splits.test)))
    draws = torch.Generator().manual_seed(0)
    smooth = interpolate(torch.rand(8, 1, 6, 6, generator=draws), own.shape[-2:], mode="bicubic").clamp(0, 1)
    foreign = {
        "noise": torch.rand(8, 1, 64, 64, generator=draws),
        "clouds": smooth,
        "inverted": 1 - own[:8],
        "turned": own[:8].rot90(1, (-2, -1)),
        "shifted": own[:8].roll(40, -1),
        "black": torch.zeros(1, 1, 50, 50),
    }
    assert (gate.distances(own) > gate.refused).float().mean() <= 0.05
    for name, images in foreign.items():
        assert (gate.distances(images) > gate.refused).all(), name


def test_brightness_contrast_and_size_do_not_matter(gate: Gate, splits: DataSplits) -> None:
    own = splits.test.pixels(slice(0, 6))
    same = gate.distances(own)
    assert torch.allclose(gate.distances(0.5 * own + 0.2), same, atol=1e-3)
    # 24 cells a side: 72 pixels cut evenly into them
    assert torch.allclose(gate.distances(interpolate(own, (72, 72), mode="area")), same, atol=0.05)


def test_what_the_distance_does_not_see_of_brightness_and_contrast_is_seen_beside_it(
    gate: Gate, splits: DataSplits
) -> None:
    for part in (splits.train, splits.test):
        assert gate.unlike_in_grey(part.pixels(slice(0, len(part)))).float().mean() <= 0.05
    own = splits.test.pixels(slice(0, 6))
    changed = {"seven levels": own * 7 / 255, "half": own / 3, "gamma": own**0.3, "lifted": 0.4 + 0.6 * own}
    for name, images in changed.items():
        assert gate.unlike_in_grey(images).all(), name
        said = gate.grey_reason(images)
        assert f"mean {255 * images.mean((1, 2, 3)).median():.0f} of 255" in said and "once it is scaled" in said


def test_what_the_distance_does_not_see_of_noise_and_blur_is_seen_beside_it(gate: Gate, splits: DataSplits) -> None:
    for part in (splits.train, splits.test):
        assert gate.unlike_in_detail(part.pixels(slice(0, len(part)))).float().mean() <= 0.05
    assert not gate.unlike_in_detail(splits.train.pixels(slice(0, len(splits.train)))).any()
    for kind in ("Rician noise", "blur"):
        images = corrupted(splits.test, kind, 3).pixels(slice(0, 6))
        assert (gate.distances(images) <= gate.refused).any() and gate.unlike_in_detail(images).all(), kind
        said = gate.detail_reason(images)
        assert ("noise or motion" in said) == (kind == "Rician noise") and f"{100 * gate.detail[1]:.1f} %" in said


def test_fine_detail_is_the_deviation_of_white_noise_and_nothing_of_slopes_and_edges() -> None:
    draws = torch.Generator().manual_seed(0)
    noise = 0.5 + 0.05 * torch.randn(3, 1, 128, 128, generator=draws)
    assert fine_detail(noise) == pytest.approx(1.0, abs=0.02)
    slope = torch.linspace(0.1, 0.9, 128).expand(1, 1, 128, 128)
    edge = (slope > 0.5).float() * 0.5 + 0.2
    assert fine_detail(torch.cat([slope, edge, edge.mT, torch.full_like(slope, 0.3)])).max() < 1e-4
    # twice the contrast of everything is no other detail
    mixed = slope + 0.01 * torch.randn(1, 1, 128, 128, generator=draws)
    assert fine_detail(0.4 * mixed + 0.1) == pytest.approx(fine_detail(mixed), rel=1e-4)


def test_a_gate_from_before_there_was_detail_asks_nothing_about_it(
    gate: Gate, splits: DataSplits, tmp_path: Path
) -> None:
    gate.save(tmp_path)
    assert Gate.load(tmp_path).detail == gate.detail
    with safe_open(tmp_path / GATE, "pt") as opened:
        told = {"gate": opened.metadata()["gate"].split(";detail=")[0]}
    save_file({"references": gate.references, "trained": gate.trained}, tmp_path / GATE, metadata=told)
    old = Gate.load(tmp_path)
    assert not old.unlike_in_detail(corrupted(splits.test, "blur", 5).pixels(slice(0, 6))).any()
    old.save(tmp_path)
    assert Gate.load(tmp_path).detail == old.detail == (0.0, math.inf)


def test_a_training_slice_has_no_distance(gate: Gate, splits: DataSplits) -> None:
    assert gate.distances(splits.train.pixels(slice(0, 4))).max() < 0.02  # of rounding to 8 bits


def test_it_knows_each_training_slice_by_its_pixels(gate: Gate, splits: DataSplits, tmp_path: Path) -> None:
    train, test = splits.train.images, splits.test.images
    assert len(gate.trained) == len(train) and gate.among_training(train).all()
    assert not gate.among_training(test).any()
    # what is told is certain: another copy is not recognised
    touched = train.clone()
    touched[:, 0, 0, 0] ^= 1
    assert not gate.among_training(touched).any()
    gate.save(tmp_path)
    assert Gate.load(tmp_path).among_training(train[:3]).all()
    # a gate from before it knows none
    save_file({"references": gate.references}, tmp_path / GATE, metadata=safe_open(tmp_path / GATE, "pt").metadata())
    assert not Gate.load(tmp_path).among_training(train).any()


def test_distances_are_those_of_pytorch_ood_and_can_be_attacked(gate: Gate, splits: DataSplits) -> None:
    from pytorch_ood.detector import KNN

    images = splits.test.pixels(slice(0, 12))
    known = _comparable(gate.references[:, None].float() / 255)
    theirs = KNN(None, k=1).fit_features(known, torch.zeros(len(known), dtype=torch.long))
    torch.testing.assert_close(gate.distances(images), theirs.predict_features(_comparable(images)).float())
    for up in (True, False):
        found = push_score(GateDetector(SmallNet().eval(), gate), images, eps=8 / 255, up=up, steps=10)
        away = gate.distances(found) - gate.distances(images)
        assert (away > 0 if up else away < 0).all() and (found - images).abs().max() <= 8 / 255 + 1e-6


def test_verdicts_and_their_order(gate: Gate) -> None:
    assert gate.verdict(gate.doubtful) == ACCEPTED and gate.verdict(gate.refused + 1e-6) == REFUSED
    assert gate.verdict((gate.doubtful + gate.refused) / 2) == DOUBTFUL and gate.doubtful < gate.refused


@pytest.mark.parametrize("name", TURNS)
def test_a_turned_slice_is_called_so(name: str, gate: Gate, splits: DataSplits) -> None:
    slices = splits.test.pixels(slice(0, 1))
    done = {
        "turned by 90 degrees clockwise": lambda images: images.rot90(-1, (-2, -1)),
        "turned by 90 degrees anticlockwise": lambda images: images.rot90(1, (-2, -1)),
        "inverted and upside down": lambda images: (1 - images).flip(-2),
    }
    turned = done.get(name, TURNS[name])(slices)
    if float(gate.distances(turned)) > gate.refused:  # a phantom is nearly its own mirror image
        assert name in gate.reason(turned) or name.startswith(("upside", "turned by 180", "inverted"))


def test_other_reasons(gate: Gate) -> None:
    assert gate.reason(torch.zeros(1, 1, 32, 32)) == "it shows nothing"
    noise = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    assert "no training slice looks like it" in gate.reason(noise)
    assert "farther from the kept training slices than 99%" in gate.reason(noise, DOUBTFUL)


def test_it_is_written_and_read_as_it_is(gate: Gate, splits: DataSplits, tmp_path: Path) -> None:
    gate.save(tmp_path)
    first = (tmp_path / GATE).read_bytes()
    again = Gate.load(tmp_path)
    assert again.doubtful == gate.doubtful and again.shape == gate.shape and again.fingerprint == splits.fingerprint
    own = splits.test.pixels(slice(0, 5))
    assert torch.equal(again.distances(own), gate.distances(own))
    again.save(tmp_path)
    assert (tmp_path / GATE).read_bytes() == first


def test_a_missing_or_damaged_gate_says_what_to_do(gate: Gate, splits: DataSplits, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="calibrate --model"):
        Gate.load(tmp_path)
    (tmp_path / GATE).write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"gate\.safetensors is not a readable gate"):
        Gate.load(tmp_path)
    with pytest.raises(ValueError, match="needs validation images"):
        fit_gate(splits.train, splits.validation.subset(torch.tensor([], dtype=torch.long)))
