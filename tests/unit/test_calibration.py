"""Probabilities that fit, answers at a threshold, and how such answers turned out."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from torch import nn

from utils.evaluation.calibration import CALIBRATION, Calibration, Decision, Outcomes, log_odds, question, with_outcomes
from utils.evaluation.fragility import RADII, smallest_turn
from utils.training.outcomes import fit_outcomes

CLASSES = ["Non", "VeryMild", "Mild", "Moderate"]


def _cases(n: int, *, slope: float, shift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose log-odds of not being Non, times a slope and shifted, are the true ones."""
    draws = torch.Generator().manual_seed(seed)
    odds = torch.randn(n, generator=draws) * 2
    ill = torch.rand(n, generator=draws) < (slope * odds + shift).sigmoid()
    logits = torch.stack([torch.zeros(n), *[odds - math.log(3)] * 3], dim=1)
    kinds = torch.randint(1, 4, (n,), generator=draws)
    return logits, torch.where(ill, kinds, torch.zeros_like(kinds))


def test_slope_and_shift_are_found_again() -> None:
    logits, labels = _cases(6_000, slope=0.5, shift=-0.7)
    assert torch.allclose(log_odds(logits, 0), logits[:, 1] + math.log(3), atol=1e-5)
    found = fit_outcomes(logits, labels, CLASSES)
    assert found.temperature == pytest.approx(2, abs=0.1) and found.shift == pytest.approx(-0.7, abs=0.1)
    # the best threshold for balanced accuracy is the share of the ill
    assert found.threshold == pytest.approx(float((labels > 0).float().mean()), abs=0.1)


def test_calibrated_probabilities_turn_out_as_they_say() -> None:
    fitted = fit_outcomes(*_cases(6_000, slope=2.0, shift=0.5), CLASSES)
    tested = with_outcomes(fitted, *_cases(6_000, slope=2.0, shift=0.5, seed=1), CLASSES)
    for tenth, (n, ill) in enumerate(tested.tested):
        if n > 150:
            assert ill / n == pytest.approx((tenth + 0.5) / 10, abs=0.12)
    assert sum(n for n, _ in tested.tested) == sum(n for n, _ in tested.right.values()) == 6_000


def test_slices_of_one_patient_are_drawn_together() -> None:
    """Ten slices of each patient that all turn out alike tell as much as one."""
    fitted = fit_outcomes(*_cases(6_000, slope=2.0, shift=0.5), CLASSES)
    logits, labels = _cases(60, slope=2.0, shift=0.5, seed=2)
    alone = with_outcomes(fitted, logits, labels, CLASSES)
    tenfold = with_outcomes(fitted, logits.repeat(10, 1), labels.repeat(10), CLASSES, torch.arange(60).repeat(10))
    for answer, (n, right) in alone.right.items():
        assert tenfold.right[answer] == [10 * n, 10 * right] and tenfold.patients[answer] == alone.patients[answer] == n
        wilson = binomtest(right, n).proportion_ci(method="wilson")
        assert alone.bounds[answer] == pytest.approx([wilson.low, wilson.high])
        low, high = tenfold.bounds[answer]
        own, least = alone.bounds[answer], binomtest(10 * right, 10 * n).proportion_ci(method="wilson")
        assert low <= right / n <= high and high - low > 2 * (least.high - least.low)
        assert high - low == pytest.approx(own[1] - own[0], rel=0.3)
    nobody = with_outcomes(fitted, logits[:0], labels[:0], CLASSES)
    assert not nobody.bounds and set(nobody.patients.values()) == {0}


@given(st.floats(0.05, 20), st.floats(-3, 3), st.floats(0.01, 0.99), st.integers(0, 10))
def test_probabilities_sum_to_one_keep_shares_and_agree_with_the_decision(
    temperature: float, shift: float, threshold: float, seed: int
) -> None:
    known = Outcomes(temperature=temperature, shift=shift, threshold=threshold, n_fitted=1, tested=[], right={})
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).double()
    chances = known.chances(logits, 0)
    assert torch.allclose(chances.sum(1), torch.ones(5, dtype=torch.double))
    own = logits.softmax(1)
    assert torch.allclose(chances[:, 2] * own[:, 1], chances[:, 1] * own[:, 2], atol=1e-6)
    ill = 1 - chances[:, 0]
    sure = (ill - threshold).abs() > 1e-6
    said = Decision(nn.Identity(), 0, known.cut)(logits).argmax(1)
    assert torch.equal(said[sure], (ill >= threshold).long()[sure])


def test_without_a_healthy_class_the_likeliest_is_the_answer() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
    fitted = fit_outcomes(logits, torch.tensor([0, 1, 1]), ["cat", "dog"])
    found = with_outcomes(fitted, logits, torch.tensor([0, 1, 1]), ["cat", "dog"])
    assert found.threshold is None and found.right == {"cat": [2, 1], "dog": [1, 1]} and not found.tested
    assert torch.allclose(found.chances(logits, None), (logits / found.temperature).softmax(1))


def test_answers_that_order_the_wrong_way_are_not_turned_around() -> None:
    logits, labels = _cases(500, slope=-3.0, shift=0.0)
    found = fit_outcomes(logits, labels, CLASSES)
    assert found.temperature == pytest.approx(100)


def test_one_kind_of_patient_is_enough_to_go_on() -> None:
    found = fit_outcomes(torch.randn(4, 4), torch.tensor([1, 2, 3, 1]), CLASSES)
    assert found.threshold == 0.5 and found.shift == 0
    with pytest.raises(ValueError, match="there are none"):
        fit_outcomes(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), CLASSES)


@pytest.mark.parametrize(
    ("classes", "asked"),
    [
        (CLASSES, ("no dementia", "dementia")),
        (["CN", "AD"], ("no dementia", "dementia")),
        (["CN", "MCI", "AD"], ("no impairment", "impairment")),
        (["NC", "strange"], ("no impairment", "impairment")),
        (["apple", "pear"], None),
    ],
)
def test_what_is_asked(classes: list[str], asked: tuple[str, str] | None) -> None:
    assert question(classes) == asked


def test_a_file_of_other_weights_is_refused(tmp_path: Path) -> None:
    own = Outcomes(
        temperature=1.0, shift=0.0, threshold=0.5, n_fitted=4, tested=[[1, 0]] * 10, right={"dementia": [2, 1]}
    )
    told = Calibration(
        classes=CLASSES, fingerprint="f", weights_sha256={"A": "1"}, source="phantom", note="", slice=own, patient=None
    )
    with pytest.raises(FileNotFoundError, match="calibrate --model"):
        Calibration.load(tmp_path, {"A": "1"})
    told.save(tmp_path)
    again = Calibration.load(tmp_path, {"A": "1"})
    assert again.of(whole=True) == again.slice == own
    with pytest.raises(ValueError, match="of other weights"):
        Calibration.load(tmp_path, {"A": "2"})
    (tmp_path / CALIBRATION).write_text("{}")
    with pytest.raises(ValueError, match=r"calibration\.json lacks .*calibrate again"):
        Calibration.load(tmp_path, {"A": "1"})


class _Linear(nn.Module):
    """Two logits, 0 and w·x + b: the smallest L-infinity radius that turns the answer is |w·x + b| / |w|₁."""

    def __init__(self, weight: torch.Tensor, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), bias

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = (images * self.weight).flatten(1).sum(1) + self.bias
        return torch.stack([torch.zeros_like(value), value], dim=1)


@pytest.mark.parametrize("levels", [0.3, 0.7, 1.7, 3.1, 6.0])
def test_the_smallest_turn_of_a_linear_model(levels: float) -> None:
    weight = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    images = torch.full((1, 3, 8, 8), 0.5)
    exact = levels / 255
    model = _Linear(weight, float(exact * weight.abs().sum() - (images * weight).sum()))
    eps, attacked = smallest_turn(model, images)
    assert eps is not None and attacked is not None
    # the search tries these and the middles between them
    tried = sorted({*RADII, *((one + other) / 2 for one, other in zip((0, *RADII), RADII))})
    assert exact <= eps <= next(radius for radius in tried if radius > exact + 1e-6) + 1e-9
    assert (attacked - images).abs().max() <= eps + 1e-6
    assert model(attacked).argmax() != model(images).argmax()


def test_an_answer_that_bears_every_radius() -> None:
    weight = torch.ones(1, 1, 4, 4)
    model = _Linear(weight, float(2 * RADII[-1] * weight.sum() - 8))
    assert smallest_turn(model, torch.full((1, 1, 4, 4), 0.5)) == (None, None)
    with pytest.raises(ValueError, match="one answer, and there are 2 images"):
        smallest_turn(model, torch.full((2, 1, 4, 4), 0.5))
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\]"):
        smallest_turn(model, torch.full((1, 1, 4, 4), 128.0))
