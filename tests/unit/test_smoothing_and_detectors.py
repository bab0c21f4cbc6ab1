"""Certificates against the closed form of a linear model, detectors against pytorch-ood, and attacks on both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import SmallNet
from scipy.stats import beta, norm
from torch import nn

from models.def_models import build_model
from tests.toy import HalfSpace, toy_images
from utils.attacks.attack import Attack
from utils.attacks.gradient import pgd
from utils.core.reproducibility import generator
from utils.data.sets import ImageSet
from utils.evaluation import detectors
from utils.evaluation.detectors import (
    Accepted,
    answers_and_scores,
    fit_detectors,
    push_score,
    separation,
    share_fooled,
    share_noticed,
)
from utils.evaluation.smoothing import ABSTAINS, Smoothed, certify, lower_bound, noisy_counts
from utils.evaluation.worst_case import robustness_curve
from utils.training.objectives import Noisy, Step

EPS = 8 / 255


# --- certificates ---------------------------------------------------------------------------------------------------


def test_a_certificate_is_below_the_distance_to_the_border_and_comes_close() -> None:
    image, sigma = torch.full((1, 2, 8, 8), 0.52), 0.25
    distance = 0.02 * 128**0.5
    found = certify(HalfSpace(), image, sigma=sigma, draws=generator(0), samples=20000, batch_size=1000)
    assert found.answer == 1 and 0.9 * distance < found.radius <= distance
    assert found.share == pytest.approx(norm.cdf(distance / sigma), abs=0.01)


def test_it_abstains_at_the_border_and_few_samples_certify_less() -> None:
    border = torch.full((1, 1, 8, 8), 0.5)
    found = certify(HalfSpace(), border, sigma=0.25, draws=generator(0), samples=500)
    assert found.answer == ABSTAINS and found.radius == 0
    sure = torch.full((1, 1, 8, 8), 0.9)
    radii = [certify(HalfSpace(), sure, sigma=0.25, draws=generator(0), samples=n).radius for n in (50, 500, 5000)]
    assert radii == sorted(radii) and radii[0] < radii[2]
    with pytest.raises(ValueError, match="sigma must be a number above 0"):
        certify(HalfSpace(), sure, sigma=0.0, draws=generator(0))


@pytest.mark.parametrize(("hits", "samples"), [(0, 10), (7, 10), (10, 10)])
def test_the_bound_is_clopper_and_pearsons(hits: int, samples: int) -> None:
    low = lower_bound(hits, samples, 0.05)
    assert low == (beta.ppf(0.05, hits, samples - hits + 1) if hits else 0)
    # the chance of so many hits or more, were the probability as low as the bound, is the error
    from scipy.stats import binom

    if hits:
        assert binom.sf(hits - 1, samples, low) == pytest.approx(0.05)


def test_counts_do_not_depend_on_the_size_of_batches() -> None:
    image = torch.full((1, 1, 8, 8), 0.51)
    one, other = (
        noisy_counts(HalfSpace(), image, sigma=0.3, samples=60, draws=generator(1), batch_size=size) for size in (60, 7)
    )
    assert one.sum() == other.sum() == 60 and torch.equal(one, other)


def test_the_smoothed_model_is_the_mean_over_noise_and_can_be_attacked() -> None:
    image = torch.full((3, 1, 8, 8), 0.52)
    smoothed = Smoothed(HalfSpace(), 0.2, samples=500)
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn((500, 1, 8, 8), generator=draws)
    mean = torch.stack([HalfSpace()(image + 0.2 * one).softmax(1) for one in noise]).mean(0)
    torch.testing.assert_close(smoothed(image).exp(), mean)
    attacked = pgd(smoothed, image, torch.ones(3, dtype=torch.long), eps=0.5, norm="l2", assume_checked=True)
    assert (smoothed(attacked)[:, 1] < smoothed(image)[:, 1]).all()
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1"):
        Smoothed(HalfSpace(), 0.2, samples=0)
    with pytest.raises(ValueError, match="sigma must be a number above 0"):
        Smoothed(HalfSpace(), -0.2)


def test_training_on_noise_sees_noise_of_the_asked_size() -> None:
    seen: list[torch.Tensor] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return torch.zeros(len(images), 4)

    images = torch.full((64, 1, 16, 16), 0.5)
    step = Step(nn.CrossEntropyLoss(), 0.0, generator(0), SmallNet())
    Noisy(sigma=0.3).loss(model, images, images, torch.zeros(64, dtype=torch.long), step)  # type: ignore[arg-type]
    assert float((seen[0] - images).std()) == pytest.approx(0.3, rel=0.02)
    with pytest.raises(ValueError, match="sigma must be a number above 0"):
        Noisy(sigma=-1.0)


# --- detectors ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted() -> dict[str, detectors.Detector]:
    torch.manual_seed(0)
    return fit_detectors(build_model("resnet34", image_size=32).eval(), toy_images(128, seed=1))


def test_scores_are_those_of_pytorch_ood(fitted) -> None:
    from pytorch_ood.detector import Mahalanobis

    own = fitted["Mahalanobis"]
    train, test = toy_images(128, seed=1), toy_images(24, seed=2)
    with torch.no_grad():
        known, asked = (own.model.features(part.pixels(slice(None))) for part in (train, test))
    theirs = Mahalanobis(None).fit_features((known - own.centre) @ own.axes, train.labels)
    expected = theirs.predict_features((asked - own.centre) @ own.axes)
    _, scores = answers_and_scores(own, test.pixels(slice(None)))
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-3)
    # the fifth neighbour of a training image is the fourth of the others
    _, near = answers_and_scores(fitted["nearest neighbours"], train.pixels(slice(0, 4)))
    apart = torch.cdist(*[nn.functional.normalize(known, dim=1)] * 2)[:4].sort(1).values
    torch.testing.assert_close(near, apart[:, 4], rtol=1e-3, atol=1e-3)


def test_the_detector_answers_as_its_model_does(fitted) -> None:
    pixels = toy_images(8, seed=2).pixels(slice(None))
    for detector in fitted.values():
        logits, scores = answers_and_scores(detector, pixels, batch_size=3)
        with torch.no_grad():
            torch.testing.assert_close(logits, detector.model(pixels))
        assert scores.shape == (8,) and scores.isfinite().all()


def test_separation_by_hand() -> None:
    found = separation(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 4.0]))
    assert (found.auroc, found.fpr95) == (1.0, 0.0)
    assert separation(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 3.0])).auroc == 0.75


@pytest.mark.parametrize("name", ["maximum softmax", "energy", "Mahalanobis", "nearest neighbours"])
def test_scores_can_be_pushed_both_ways_and_never_the_wrong_one(name: str, fitted) -> None:
    pixels = toy_images(8, seed=3).pixels(slice(None))
    _, before = answers_and_scores(fitted[name], pixels)
    for up in (True, False):
        found = push_score(fitted[name], pixels, eps=EPS, up=up, steps=5)
        assert (found - pixels).abs().max() <= EPS + 1e-6
        _, after = answers_and_scores(fitted[name], found)
        assert ((after >= before - 1e-4) if up else (after <= before + 1e-4)).all()
        assert not torch.allclose(after, before)


class Halves(nn.Module):
    """Class 1 where the left half is bright on the whole; the more foreign the brighter the right half is."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left, right = (own.mean((1, 2, 3)) for own in (images[..., :8], images[..., 8:]))
        return torch.stack([0.5 - left, left - 0.5, right], 1)


def test_a_score_that_is_a_mean_is_pushed_by_the_whole_radius_and_no_less_than_by_one_step() -> None:
    images = torch.rand(4, 1, 16, 16, generator=generator(0))
    for up, sign in ((True, 1), (False, -1)):
        found = push_score(Halves(), images, eps=EPS, up=up, steps=10)
        expected = (images + sign * EPS).clamp(0, 1)
        torch.testing.assert_close(found[..., 8:], expected[..., 8:])
        assert sign * (Halves()(found)[:, 2] - Halves()(expected)[:, 2]).min() >= -1e-6


def _halves(away_left: torch.Tensor, away_right: torch.Tensor) -> ImageSet:
    """Images of class 1 whose halves are so far above the borders of :class:`Halves`, 8-bit values."""
    grey = torch.full((len(away_left), 1, 16, 16), 128, dtype=torch.uint8)
    grey[..., :8] += away_left.to(torch.uint8)[:, None, None, None]
    grey[..., 8:] += away_right.to(torch.uint8)[:, None, None, None]
    images = toy_images(len(grey), seed=0)
    return replace(images, images=grey, labels=torch.ones(len(grey), dtype=torch.long))


def test_both_halves_are_fooled_where_the_radius_reaches_both_borders() -> None:
    levels = torch.arange(1, 5)
    images = _halves(levels.repeat(4), levels.repeat_interleave(4))
    needed = torch.maximum(levels.repeat(4), levels.repeat_interleave(4)) + 0.5  # the border lies at 127.5
    radii = [eps / 255 for eps in (1.0, 2.0, 3.25, 6.0)]
    found = share_fooled(Halves(), images, limit=0.5, epsilons=radii, steps=40)
    assert found == [float((needed / 255 < eps).float().mean()) for eps in radii]
    assert found[0] == 0 and found[-1] == 1


@pytest.mark.parametrize(("truth", "right_half", "fooled"), [(0, 0, True), (0, 9, False), (1, 0, False), (1, 9, False)])
def test_fooled_is_who_is_misclassified_and_accepted(truth: int, right_half: int, fooled: bool) -> None:
    pixels = _halves(torch.tensor([5]), torch.tensor([right_half])).pixels(slice(None))  # answer: class 1
    assert Accepted(Halves(), truth, limit=130 / 255)(pixels).argmax(1).item() == fooled


def test_the_second_answer_grows_towards_what_is_not_reached_yet() -> None:
    asked = Accepted(Halves(), 1, limit=0.5)
    for left, right, brighter in ((5, 9, "left"), (-5, 9, "right")):
        pixels = torch.full((1, 1, 16, 16), 0.5)
        pixels[..., :8] += left / 255
        pixels[..., 8:] += right / 255
        asked(pixels.requires_grad_())[0, 1].backward()
        slopes = {"left": pixels.grad[..., :8].abs().sum(), "right": pixels.grad[..., 8:].abs().sum()}
        assert slopes.pop(brighter) > 0 and slopes.popitem()[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maximum softmax", "energy", "Mahalanobis", "nearest neighbours"])
def test_both_are_fooled_at_once_more_often_than_by_an_attack_that_knows_only_one(name: str, fitted) -> None:
    detector, images = fitted[name], toy_images(16, seed=4)
    logits, scores = answers_and_scores(detector, images.pixels(slice(None)))
    images = replace(images, labels=logits.argmax(1))  # all are right
    limit, made = float(scores.quantile(0.3)), []
    robustness_curve(
        detector.model, images, attack=Attack("pgd"), epsilons=[EPS], on_broken=lambda _, found, __: made.append(found)
    )
    refused = answers_and_scores(detector, torch.cat(made))[1] > limit
    assert share_noticed(detector, images, limit=limit, eps=EPS, steps=20) == refused.float().mean()
    known = share_fooled(detector, images, limit=limit, epsilons=[EPS], steps=20)[0]
    assert known > (~refused).sum() / len(images)


def test_shares_of_nobody() -> None:
    nobody, detector = toy_images(0, seed=4), Halves()
    detector.model = HalfSpace()
    assert share_fooled(detector, nobody, limit=0.5, epsilons=[0.01, 0.02], steps=2) == [0.0, 0.0]
    sure = replace(toy_images(2, seed=4), images=torch.full((2, 1, 16, 16), 250).byte(), labels=torch.ones(2).long())
    for images in (nobody, sure):
        assert share_noticed(detector, images, limit=0.5, eps=0.01, steps=2) is None


def test_attacks_on_detectors_refuse_what_they_cannot_do(fitted) -> None:
    detector, images = fitted["energy"], toy_images(4, seed=4)
    pixels = images.pixels(slice(None))
    with pytest.raises(ValueError, match="must be in"):
        share_fooled(detector, images, limit=0.0, epsilons=[8.0], steps=1)
    with pytest.raises(ValueError, match="limit must be a number"):
        share_fooled(detector, images, limit=float("nan"), epsilons=[EPS], steps=1)
    with pytest.raises(ValueError, match="label must be a whole number of at least 0"):
        Accepted(detector, -1, 0.0)
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        push_score(detector, pixels, eps=EPS, up=True, steps=0)
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        push_score(detector, 255 * pixels, eps=EPS, up=True)
    with pytest.raises(ValueError, match="at least 5 training images"):
        fit_detectors(detector.model, toy_images(4, seed=1))


def test_detectors_do_not_depend_on_the_global_generator() -> None:
    torch.manual_seed(0)
    model, train, pixels = build_model("resnet34", image_size=32).eval(), toy_images(64, seed=1), toy_images(8, seed=2)
    scores = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found = fit_detectors(model, train)
        scores.append([answers_and_scores(one, pixels.pixels(slice(None)))[1] for one in found.values()])
    assert all(torch.equal(one, other) for one, other in zip(*scores))


@pytest.mark.slow
def test_the_scale_of_logits_does_not_change_what_is_fooled(fitted) -> None:
    detector, images = fitted["nearest neighbours"], toy_images(12, seed=4)
    logits, scores = answers_and_scores(detector, images.pixels(slice(None)))
    images, limit = replace(images, labels=logits.argmax(1)), float(scores.quantile(0.5))
    asked = [one / 255 for one in (2, 4, 6, 8)]
    found = share_fooled(detector, images, limit=limit, epsilons=asked, steps=10)
    head = detector.model.backbone.get_submodule(detector.model.head_name)
    before = [parameter.data.clone() for parameter in head.parameters()]
    try:
        for parameter in head.parameters():
            parameter.data *= 0.25  # a power of two, so that nothing is rounded otherwise
        again = share_fooled(detector, images, limit=limit, epsilons=asked, steps=10)
    finally:
        for parameter, value in zip(head.parameters(), before):
            parameter.data = value
    assert found[-1] > 0 and again == found
